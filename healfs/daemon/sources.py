"""From what the operator wrote to a backend, and from a backend's answers to their meaning."""

from __future__ import annotations

import errno
import os
from types import ModuleType

import trio

from healfs.backends import nbd_uri
from healfs.backends.base import Backend, Geometry, SourceError
from healfs.config import MountConfig, format_size
from healfs.daemon import host_lock
from healfs.daemon.report import Report
from healfs.device import scsi, virtio_blk

DEVICES: dict[str, ModuleType] = {"virtio-blk": virtio_blk, "scsi": scsi}


def device_for(name: str) -> ModuleType:
    """The module whose status or sense status and events name."""
    return DEVICES[name]


# Of a source that is right, and may be free, or have room, another time.
_PASSING = {errno.EBUSY, errno.ETXTBSY, errno.ENOSPC, errno.EDQUOT, errno.EIO}


def exit_status(error: OSError) -> int:
    """Of a mount that came to nothing: 2 where no other try helps (systemd makes none then)."""
    return 2 if isinstance(error, SourceError) and error.errno not in _PASSING else 1


def backend_for(config: MountConfig) -> Backend:
    """Not connected yet. Raises SourceError."""
    backend = _plain_backend(config)
    if config.fault is not None:
        from healfs.backends.fault import FaultBackend

        backend = FaultBackend(backend, config.fault)
    from healfs.backends.align import AlignedBackend

    return AlignedBackend(backend)


def lock_name(source: str) -> str:
    """What is locked for it on this host, see daemon/host_lock.py. Raises SourceError."""
    if source.partition("://")[0] not in nbd_uri.SCHEMES:
        # By its name only: its storage may hang. What the name does not tell, the file's own
        # locks do.
        return host_lock.name_of("file", os.path.abspath(source))
    uri = nbd_uri.parse(source)
    server = f"{uri.host.lower()}:{uri.port}"
    if uri.socket is not None:
        abstract = uri.socket.startswith("\0")
        server = uri.socket if abstract else os.path.realpath(uri.socket)
    return host_lock.name_of("nbd", f"{server}/{uri.export}")


def _plain_backend(config: MountConfig) -> Backend:
    scheme, found, _ = config.source.partition("://")
    if found and not config.source.startswith(("/", ".")):
        if scheme in nbd_uri.SCHEMES:
            from healfs.backends.nbd import NbdBackend

            return NbdBackend(config.source)
        raise SourceError(
            f"{config.source}: unknown scheme {scheme}; use a path or an NBD URI ("
            + ", ".join(f"{known}://" for known in nbd_uri.SCHEMES)
            + ")"
        )
    from healfs.backends.file import FileBackend

    return FileBackend(config.source, read_only=config.read_only, create=config.create)


async def first_connection(backend: Backend, config: MountConfig, report: Report) -> Geometry:
    """Wait for an absent server, as long as it takes. Raises SourceError."""
    pause, told = 0.05, ""
    while True:
        try:
            geometry = await backend.connect()
        except SourceError:
            raise
        except OSError as exc:
            if str(exc) != told:
                told = str(exc)
                report.waiting(f"waiting for {backend.source}: {exc.strerror or exc}")
            with trio.move_on_after(pause):
                await backend.wait_changed()
            pause = min(1.0, pause * 2)
            continue
        check_geometry(geometry, config)
        return geometry


def check_geometry(geometry: Geometry, config: MountConfig) -> None:
    """Is this a disk for this mount? Raises SourceError."""
    source = config.source
    if geometry.size <= 0:
        raise SourceError(f"{source}: its size is 0; a disk needs at least one sector")
    if geometry.read_only and not config.read_only:
        raise SourceError(f"{source}: it is read-only; mount it with --read-only")
    if config.size is not None and geometry.size < config.size:
        have, want = format_size(geometry.size), format_size(config.size)
        raise SourceError(f"{source}: it has {have}, --size says {want}")


def mismatch(first: Geometry | None, now: Geometry, config: MountConfig) -> str:
    """Why what came back is not the disk it was; "" if it is, as far as it can tell.

    A disk that grew is the same one; the engine compares the size.
    """
    if now.read_only and not config.read_only:
        return "it is read-only now"
    if first is None:
        return ""
    for key, value in first.identity.items():
        other = now.identity.get(key)
        if other != value:
            return f"its {key} is {other!r}, was {value!r}"
    return ""
