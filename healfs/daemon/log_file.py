"""Where the worker's log goes."""

from __future__ import annotations

import logging
from logging.handlers import RotatingFileHandler

LOG_BYTES = 1 << 20  # then the log file is rotated; one old one is kept


def set_up(where: str) -> None:
    """`where` is a file, stderr or journal."""
    handler: logging.Handler
    if where in ("stderr", "journal"):
        handler = logging.StreamHandler()
    else:
        handler = RotatingFileHandler(
            where, maxBytes=LOG_BYTES, backupCount=1, delay=True, errors="backslashreplace"
        )
    # The journal has its own clock.
    stamp = "" if where == "journal" else "%(asctime)s "
    handler.setFormatter(logging.Formatter(stamp + "%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
