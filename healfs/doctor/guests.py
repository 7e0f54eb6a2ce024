"""The virtual machines that have a disk's file open: how QEMU was told to use it.

All is read from /proc: readlink of a descriptor names a file without touching it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from healfs.doctor.finding import Finding, Level

_FREEZES = ("native", "io_uring")
_SHORT_BUSES = {"ide": "IDE or SATA", "nvme": "NVMe", "usb": "USB", "sd": "SD card"}


@dataclass
class Guest:
    """One QEMU process, as its command line has this disk."""

    pid: int
    name: str
    aio: str = "threads"
    cache: str = ""  # of -drive
    no_flush: bool = False
    devices: list[str] = field(default_factory=list)  # QEMU's names: virtio-blk-pci, ide-hd, ...


def guests_of(file: str, proc: Path = Path("/proc")) -> list[Guest]:
    return [
        _guest(int(entry.name), command, file)
        for entry in proc.iterdir()
        if entry.name.isdigit() and (command := _command(entry)) and _has_open(entry, file)
    ]


def _command(process: Path) -> list[str]:
    """The arguments of a QEMU; [] for anything else."""
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
    return words if Path(words[0]).name.startswith(("qemu-system-", "qemu-kvm", "kvm")) else []


def _has_open(process: Path, file: str) -> bool:
    with contextlib.suppress(OSError):
        for link in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if str(link.readlink()) == file:
                    return True
    return False


def _guest(pid: int, command: list[str], file: str) -> Guest:
    name = next((w for o, w in _options(command) if o == "name"), f"pid {pid}")
    guest = Guest(pid, _keys(name).get("guest", name.split(",")[0]))
    nodes = {file}  # what leads to the file: node names and drive ids
    blockdevs = [_keys(w) for o, w in _options(command) if o == "blockdev"]
    for node in blockdevs:
        if node.get("filename") == file or node.get("file.filename") == file:
            nodes.add(str(node.get("node-name")))
            guest.aio = str(node.get("aio", node.get("file.aio", guest.aio)))
            guest.no_flush |= _yes(node.get("cache.no-flush"))
    for _ in blockdevs:  # format nodes, filters: each names what is below it
        for node in blockdevs:
            if nodes & {str(node.get("file")), str(node.get("backing"))}:
                nodes.add(str(node.get("node-name")))
                guest.no_flush |= _yes(node.get("cache.no-flush"))
    for drive in (_keys(w) for o, w in _options(command) if o == "drive"):
        if drive.get("file") == file or drive.get("file.filename") == file:
            nodes.add(str(drive.get("id")))
            guest.aio = str(drive.get("aio", guest.aio))
            guest.cache = str(drive.get("cache", ""))
            if (interface := str(drive.get("if", "ide"))) != "none":
                guest.devices.append(interface)
    for device in (_keys(w) for o, w in _options(command) if o == "device"):
        if str(device.get("drive")) in nodes - {"None"}:
            guest.devices.append(str(device.get("driver")))
    return guest


def _yes(value: object) -> bool:
    return value is True or value in ("on", "yes", "true")


def _options(command: list[str]) -> Iterator[tuple[str, str]]:
    for option, word in itertools.pairwise(command):
        if option.startswith("-"):
            yield option.lstrip("-"), word


def _keys(word: str) -> dict[str, Any]:
    """QEMU's key=value list, where the first key may be left out, or JSON; flat."""
    if word.startswith("{"):
        try:
            return dict(_flat(json.loads(word)))
        except (ValueError, RecursionError):
            return {}
    keys: dict[str, Any] = {}
    for part in word.replace(",,", "\0").split(","):
        key, equals, value = part.replace("\0", ",").partition("=")
        if not equals:
            key, value = ("driver", key) if not keys else (key, "on")
        keys[key] = value
    return keys


def _flat(tree: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def examine(file: str, mountpoint: str, proc: Path = Path("/proc")) -> list[Finding]:
    """What each of them should do otherwise."""
    return [finding for guest in guests_of(file, proc) for finding in _findings(guest, mountpoint)]


def _findings(guest: Guest, mountpoint: str) -> Iterator[Finding]:
    check = f"guest {guest.name} (pid {guest.pid})"
    right = f"start it with what healfs attach {mountpoint} prints"
    before = True
    if guest.aio in _FREEZES:
        before = False
        yield Finding(
            check,
            Level.ERROR,
            f"aio={guest.aio}: in an outage the whole QEMU freezes, its monitor too",
            right,
        )
    if guest.no_flush or guest.cache == "unsafe":
        before = False
        yield Finding(
            check,
            Level.ERROR,
            "the guest's flushes are thrown away by QEMU: nothing is known to be stable",
            right,
        )
    for device in guest.devices:
        bus = next((text for name, text in _SHORT_BUSES.items() if device.startswith(name)), None)
        if bus is not None:
            before = False
            yield Finding(
                check,
                Level.WARNING,
                f"{device} ({bus}): guests give a command up after about 30 s",
                right + "; healfs-guests(7)",
            )
    if before:
        yield Finding(
            check, Level.OK, f"aio={guest.aio}, {', '.join(guest.devices) or 'no device'}"
        )
