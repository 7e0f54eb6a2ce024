"""healfs: a disk that waits instead of failing."""

__version__ = "0.1.0"
