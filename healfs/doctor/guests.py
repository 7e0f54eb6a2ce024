"""The virtual machines that have a disk's file open: how QEMU was told to use it.

All is read from /proc: readlink of a descriptor names a file without touching it. Of QEMU only the
command line is seen; a disk that was plugged in later is not in it, and what is not known is said.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from healfs.config import shell_word
from healfs.doctor.finding import Finding, Level

_FREEZES = ("native", "io_uring")
_PATIENT = ("virtio",)  # virtio-blk-pci, virtio-scsi-device, if=virtio, ...
_SHORT_BUSES = {
    "ide": "IDE or SATA",
    "nvme": "NVMe",
    "usb": "USB",
    "sd": "SD card",
    **dict.fromkeys(("lsi", "megasas", "mptsas", "pvscsi", "am53c974", "dc390", "esp"), "SCSI"),
}
_IDE_OPTIONS = ("hda", "hdb", "hdc", "hdd", "cdrom")
_ALONE = (
    *("S", "s", "nographic", "nodefaults", "no-user-config", "snapshot", "enable-kvm", "usb"),
    *("daemonize", "no-reboot", "no-shutdown", "no-acpi"),
)
_X86 = ("qemu-system-x86_64", "qemu-system-i386", "qemu-kvm", "kvm")


@dataclass
class Guest:
    """One QEMU process, as its command line has this disk. `named`: it has it at all."""

    pid: int
    name: str
    aio: str = "threads"
    no_flush: bool = False
    ignores: set[str] = field(default_factory=set)  # werror, rerror
    named: bool = False
    buses: list[str] = field(default_factory=list)  # QEMU's names: virtio-blk-pci, ide-hd, ...


def guests_of(file: str, proc: Path = Path("/proc")) -> list[Guest]:
    try:
        entries = list(proc.iterdir())
    except OSError:
        return []
    return [guest for entry in entries if (guest := _guest_of(entry, file))]


def _guest_of(process: Path, file: str) -> Guest | None:
    if not process.name.isdigit() or not (command := _command(process)):
        return None
    is_open = _has_open(process, file)
    if is_open is False:
        return None
    guest = _guest(int(process.name), command, file, _directory(process))
    # Another user's descriptors cannot be seen; what it was told to open can.
    return guest if is_open or guest.named else None


def _command(process: Path) -> list[str]:
    """The arguments of a QEMU; [] for anything else."""
    try:
        words = os.fsdecode((process / "cmdline").read_bytes()).split("\0")
    except OSError:
        return []
    return words if Path(words[0]).name.startswith(("qemu-system-", "qemu-kvm", "kvm")) else []


def _has_open(process: Path, file: str) -> bool | None:
    """None: nobody may look."""
    try:
        links = list((process / "fd").iterdir())
    except PermissionError:
        return None
    except OSError:
        return False
    return any(_target(link) == file for link in links)


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


def _directory(process: Path) -> str:
    return _target(process / "cwd") or "/"


def _guest(pid: int, command: list[str], file: str, directory: str) -> Guest:
    options = list(_options(command))
    devices = [_keys(word) for option, word in options if option == "device"]
    name = next((word for option, word in options if option == "name"), f"pid {pid}")
    guest = Guest(pid, str(_keys(name).get("guest", name.split(",")[0])))
    nodes = _Nodes(guest, file, directory)
    nodes.of_blockdevs([_keys(word) for option, word in options if option == "blockdev"])
    interface = "ide" if Path(command[0]).name in _X86 else "the machine's own bus"
    for option, word in options:
        if option == "drive":
            nodes.of_drive(_keys(word), interface)
        elif option in (*_IDE_OPTIONS, "") and nodes.is_file(word):
            guest.named = True
            guest.buses.append(interface)
    for device in devices:
        if str(device.get("drive", "")) in nodes.names:
            guest.buses.append(_bus(device, devices))
            nodes.note_ignored(device)
    return guest


class _Nodes:
    """What leads to the file in one command line: the names of nodes, and the ids of drives."""

    def __init__(self, guest: Guest, file: str, directory: str) -> None:
        self.names: set[str] = set()
        self._guest, self._file, self._directory = guest, file, directory

    def is_file(self, name: object) -> bool:
        path = str(name).removeprefix("file:")
        return os.path.normpath(os.path.join(self._directory, path)) == self._file

    def of_blockdevs(self, blockdevs: list[dict[str, Any]]) -> None:
        files = [(node, key) for node in blockdevs for key in node if _last(key) == "filename"]
        passed = [(node, key) for node, key in files if str(node[key]).startswith("/dev/fdset/")]
        for node, key in files:
            # Of descriptors that were passed nobody says which file they are; a single one is it.
            if self.is_file(node[key]) or [(node, key)] == passed:
                self._add(node, key)
        for _ in blockdevs:  # format nodes, filters: each names what is below it
            for node in blockdevs:
                self._add_what_is_on_it(node)

    def of_drive(self, drive: dict[str, Any], interface: str) -> None:
        if str(drive.get("file")).startswith("json:{"):
            drive |= {f"file.{k}": v for k, v in _keys(drive["file"].removeprefix("json:")).items()}
        for key in list(drive):
            if (key == "file" or _last(key) == "filename") and self.is_file(drive[key]):
                self._add(drive, "file.filename" if key == "file" else key)
                break
        else:
            if not self._add_what_is_on_it(drive):
                return
        self.note_ignored(drive)
        if (given := str(drive.get("if", interface))) != "none":
            self._guest.buses.append(given)

    def note_ignored(self, options: dict[str, Any]) -> None:
        self._guest.ignores |= {k for k in ("werror", "rerror") if options.get(k) == "ignore"}

    def _add_what_is_on_it(self, node: dict[str, Any]) -> bool:
        below = [k for k in node if _last(k) in _BELOW and str(node[k]) in self.names]
        for key in below:
            self._add(node, key)
        return bool(below)

    def _add(self, node: dict[str, Any], key: str) -> None:
        """`key` says where in it the file is, or a node that leads there: what is above, does so,
        too."""
        guest = self._guest
        guest.named = True
        parts = key.split(".")[:-1]
        levels = ["".join(f"{part}." for part in parts[:depth]) for depth in range(len(parts) + 1)]
        for level in levels:  # the deepest last
            names = (node.get(f"{level}node-name"), node.get("id") if not level else None)
            self.names |= {str(name) for name in names if name is not None}
            guest.aio = str(node.get(f"{level}aio", guest.aio))
            guest.no_flush |= _yes(node.get(f"{level}cache.no-flush"))
        guest.no_flush |= node.get("cache") == "unsafe"


_BELOW = ("file", "backing", "data-file")  # the keys by which a node names another


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _bus(device: dict[str, Any], devices: list[dict[str, Any]]) -> str:
    """The device; of a SCSI disk the adapter that it hangs on, where that is certain, before it."""
    driver = str(device.get("driver"))
    if not driver.startswith("scsi-"):
        return driver
    adapters = [d for d in devices if _is_scsi_adapter(str(d.get("driver")))]
    wanted = str(device.get("bus", "")).partition(".")[0]
    named = [d for d in adapters if wanted and wanted == d.get("id")] or adapters
    kinds = {str(d.get("driver")) for d in named}
    return f"{kinds.pop()}, {driver}" if len(kinds) == 1 else driver


def _is_scsi_adapter(driver: str) -> bool:
    kind = next((text for begin, text in _SHORT_BUSES.items() if driver.startswith(begin)), "")
    return driver.startswith("virtio-scsi") or kind == "SCSI" or driver in ("usb-bot", "usb-uas")


def _yes(value: object) -> bool:
    return value is True or value in ("on", "yes", "true")


def _options(command: list[str]) -> Iterator[tuple[str, str]]:
    """Options and their values; a word that belongs to none is the value of ""."""
    before = ""
    for word in command[1:]:
        if word.startswith("-"):
            before = word.lstrip("-")
            before = "" if before in _ALONE else before
        else:
            yield before, word
            before = ""


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
    right = f"healfs attach {shell_word(mountpoint)} # start it with what this prints"
    if not guest.named:
        yield Finding(
            check,
            Level.NOTE,
            "its command line does not name the disk's file (plugged in later, or passed as a "
            "descriptor): how it uses the disk is not known",
            f"{right}; query-named-block-nodes in its monitor says what it does",
        )
        return
    good = True
    if guest.aio in _FREEZES:
        good = False
        yield Finding(
            check,
            Level.ERROR,
            f"aio={guest.aio}: in an outage the whole QEMU freezes, its monitor too",
            right,
        )
    if guest.no_flush:
        good = False
        yield Finding(
            check,
            Level.ERROR,
            "the guest's flushes are thrown away by QEMU: nothing is known to be stable",
            right,
        )
    if guest.ignores:
        good = False
        yield Finding(
            check,
            Level.ERROR,
            f"{', '.join(sorted(guest.ignores))}=ignore: the guest takes what healfs answers "
            "with an error for done",
            right,
        )
    for bus in guest.buses or ["no device"]:
        short = next((text for name, text in _SHORT_BUSES.items() if bus.startswith(name)), None)
        if short is not None:
            good = False
            text = f"{bus} ({short}): guests give a command up after about 30 s"
            yield Finding(check, Level.WARNING, text, f"{right}; or see healfs-guests(7)")
        elif not bus.startswith(_PATIENT):
            good = False
            text = f"{bus}: how long the guest waits is not known from its command line"
            yield Finding(check, Level.NOTE, text, f"{right}; see healfs-guests(7)")
    if good:
        yield Finding(check, Level.OK, f"aio={guest.aio}, {', '.join(guest.buses)}")
