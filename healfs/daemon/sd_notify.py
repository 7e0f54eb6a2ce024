"""sd_notify(3) for the keeper, and systemd's watchdog. Standard library only.

Nothing here blocks or fails: what the socket does not take now goes with the next message.
"""

from __future__ import annotations

import os
import socket

MAXIMUM_STATUS = 500  # characters of STATUS=


class SdNotify:
    """Without NOTIFY_SOCKET every call does nothing.

    The variables are taken out of the environment: they are meant for this process alone.
    """

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        seconds = os.environ.pop("WATCHDOG_USEC", "")
        process = os.environ.pop("WATCHDOG_PID", "")
        self.watchdog = 0.0  # it wants to be fed within so many seconds; 0: there is none
        if seconds.isdecimal() and process in ("", str(os.getpid())):
            self.watchdog = int(seconds) / 1e6
        self._socket: socket.socket | None = None
        if address[:1] in ("/", "@"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        self._address = "\0" + address[1:] if address[:1] == "@" else address
        self._unsent: dict[str, str] = {}
        self._status = ""
        self._stops = False

    def ready(self) -> None:
        self._tell(READY="1")

    def stopping(self) -> None:
        """Told once, however often it is said."""
        if not self._stops:
            self._stops = True
            self.status("unmounting")
            self._tell(STOPPING="1")

    def status(self, text: str) -> None:
        """For `systemctl status`; goes with the next message."""
        text = " ".join(text.split())[:MAXIMUM_STATUS]
        if text != self._status:
            self._status = self._unsent["STATUS"] = text

    def feed(self) -> None:
        """The watchdog, if there is one; and the status, if it is another one."""
        if self.watchdog:
            self._tell(WATCHDOG="1")
        else:
            self._tell()

    def _tell(self, **values: str) -> None:
        self._unsent |= values
        if self._socket is None or not self._unsent:
            return
        message = "\n".join(f"{key}={value}" for key, value in self._unsent.items())
        try:
            self._socket.sendto(message.encode(errors="replace"), self._address)
        except OSError:
            return  # nobody reads now
        self._unsent.clear()
