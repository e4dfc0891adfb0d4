"""Features of images: computed, kept, written to disk, searched."""
