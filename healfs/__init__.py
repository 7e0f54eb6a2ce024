"""healfs: a disk that waits instead of failing."""

from healfs import compiled as compiled  # before any module that may be compiled

__version__ = "0.1.0"
