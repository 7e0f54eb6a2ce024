"""A network of the test's own: a namespace behind one link that can go down. Needs root."""

from __future__ import annotations

import ipaddress
import os
import subprocess
from types import TracebackType

# RFC 2544's range: no real network is cut off by a route to it. Four addresses a
# process, so that test runs side by side do not meet.
RANGE = int(ipaddress.ip_address("198.18.0.0"))


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, timeout=30)


class Network:
    """A namespace in which a server listens on `address`; gone when the context ends."""

    def __init__(self) -> None:
        number = os.getpid() % 32768
        here, there = (str(ipaddress.ip_address(RANGE + 4 * number + n)) for n in (1, 2))
        self.address = there
        self.name = f"healfs-{number}"
        self._near, self._far = f"hfs{number}n", f"hfs{number}f"
        _ip("netns", "add", self.name)
        try:
            _ip("link", "add", self._near, "type", "veth", "peer", self._far, "netns", self.name)
            _ip("addr", "add", f"{here}/30", "dev", self._near)
            _ip("-n", self.name, "addr", "add", f"{there}/30", "dev", self._far)
            _ip("link", "set", self._near, "up")
            self.up()
        except BaseException:
            self.remove()
            raise

    @property
    def inside(self) -> tuple[str, ...]:
        """What to put before a command to run it in the namespace, under the same pid."""
        return ("ip", "netns", "exec", self.name)

    def down(self) -> None:
        """From now on packets vanish: neither side hears of it."""
        _ip("-n", self.name, "link", "set", self._far, "down")

    def up(self) -> None:
        _ip("-n", self.name, "link", "set", self._far, "up")

    def remove(self) -> None:
        # The namespace outlives its name while a process is in it, the link as well.
        subprocess.run(("ip", "link", "del", self._near), check=False, timeout=30)
        _ip("netns", "del", self.name)

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()
