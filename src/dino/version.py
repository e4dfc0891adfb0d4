"""The version of this package; hatchling reads it here."""

__version__ = "0.2.0"
