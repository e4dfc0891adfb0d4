"""Where images come from and how they become views: sources, decoding, view parameters, rendering, loading."""
