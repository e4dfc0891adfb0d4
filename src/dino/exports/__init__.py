"""Models written for other libraries and runtimes."""
