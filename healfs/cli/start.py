"""The command `healfs`. Until the other modules are read, and when all is done, Ctrl-C ends it
as it ends any other program: without a traceback."""

from __future__ import annotations

import signal


def main() -> None:
    python = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored
    if python:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from healfs.cli.main import main as healfs

    try:
        if python:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        healfs(prog_name="healfs")
    finally:
        if python:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
