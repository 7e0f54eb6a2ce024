"""The one table: errno -> class, and what a guest is told.

*lost*: the backend is away; the whole disk stalls and one prober tries to come back.
*failed*: an answer, with an error for this request; the policy decides, others flow on.
*refused*: the request itself is wrong; it goes back at once and is never retried.

A backend answers with an errno; nobody else decides what it means. Every errno of Linux is in
the table; a number that is none is *failed*, as are those that no disk is known to answer with:
the policy keeps such a request, and neither the disk nor the data suffers from a guess. (A wrong
*lost* would stall a whole disk for one request, a wrong *refused* would hand the guest an error.)

What becomes of an errno while connecting is not asked here: healfs.backends.base says it.
"""

from __future__ import annotations

import enum
import errno as e


class ErrorClass(enum.Enum):
    LOST = "lost"
    FAILED = "failed"
    REFUSED = "refused"


# errno -> why. The reason is for the reader and for `healfs doctor`.
LOST: dict[int, str] = {
    e.ECONNREFUSED: "nobody listens",
    e.ECONNRESET: "the peer closed the connection",
    e.ECONNABORTED: "the connection was aborted",
    e.EPIPE: "the peer closed its end",
    e.ENOTCONN: "there is no connection",
    e.EPROTO: "the server broke the protocol: its stream cannot be trusted any more",
    e.ECOMM: "communication error",
    e.ENETDOWN: "the network is down",
    e.ENETUNREACH: "no route",
    e.ENETRESET: "the network dropped the connection",
    e.ENONET: "this machine is not on the network",
    e.ERFKILL: "the radio is switched off",
    e.EADDRNOTAVAIL: "the local address is gone",
    e.EHOSTDOWN: "the host is down",
    e.EHOSTUNREACH: "no route to the host",
    e.ESHUTDOWN: "the server is shutting down (NBD_ESHUTDOWN)",
    e.ESTALE: "the NFS handle is stale: the server was restarted or the file replaced",
    e.ENOENT: "the file is gone",
    e.ENODEV: "the device is gone",
    e.ENXIO: "the device is gone, or was detached",
    e.ENOLINK: "the transport failed (SCSI: transport disrupted)",
    e.ETIMEDOUT: "no answer in time",
    e.EBADF: "the file was closed below us",
}

EHWPOISON = 133  # Python 3.11 has no name for it

# fmt: off
_PATH = (
    e.ENOTDIR, e.EISDIR, e.ELOOP, e.ENAMETOOLONG, e.EEXIST, e.EXDEV, e.EMLINK, e.ENOTEMPTY,
)
_SOCKET = (
    e.ENOTSOCK, e.EDESTADDRREQ, e.EMSGSIZE, e.EPROTOTYPE, e.ENOPROTOOPT, e.EPROTONOSUPPORT,
    e.ESOCKTNOSUPPORT, e.EPFNOSUPPORT, e.EAFNOSUPPORT, e.EADDRINUSE, e.EISCONN, e.EALREADY,
    e.EINPROGRESS,
)
# processes, STREAMS, shared libraries, XENIX, System V, old network file systems
_NO_DISK = (
    e.ESRCH, e.ENOEXEC, e.ECHILD, e.ENOMSG, e.EIDRM, e.ECHRNG, e.EL2NSYNC, e.EL3HLT, e.EL3RST,
    e.ELNRNG, e.EUNATCH, e.ENOCSI, e.EL2HLT, e.EBADR, e.EXFULL, e.ENOANO, e.EBADRQC, e.EBADSLT,
    e.EBFONT, e.ENOSTR, e.ENOSR, e.ENOPKG, e.EREMOTE, e.EADV, e.ESRMNT, e.EMULTIHOP, e.EDOTDOT,
    e.ENOTUNIQ, e.EBADFD, e.ELIBACC, e.ELIBBAD, e.ELIBSCN, e.ELIBMAX, e.ELIBEXEC, e.ESTRPIPE,
    e.ENOTNAM, e.ENAVAIL, e.EISNAM, e.EOWNERDEAD, e.ENOTRECOVERABLE,
)
# fmt: on

FAILED: dict[int, str] = {
    e.EIO: "an error for this request (a file's EIO is decided by a probe)",
    e.ENODATA: "medium error: a bad sector",
    e.EREMOTEIO: "the target failed (SCSI: target failure)",
    e.EILSEQ: "the protection information does not match",
    e.EBADMSG: "a checksum of the file system below does not match",
    e.EUCLEAN: "the file system below is damaged",
    EHWPOISON: "a page of memory below is broken",
    e.ENOSPC: "no space",
    e.EDQUOT: "no quota",
    e.EFBIG: "the file below may not grow that far (ulimit, file system)",
    e.EACCES: "permission taken away, may be given back",
    e.EPERM: "permission taken away, may be given back",
    e.EROFS: "the file system below went read-only",
    e.ETXTBSY: "the file below is in use as swap or as a program",
    e.ENOKEY: "a key or ticket for the storage below is missing",
    e.EKEYEXPIRED: "a key or ticket for the storage below has expired",
    e.EKEYREVOKED: "a key or ticket for the storage below was revoked",
    e.EKEYREJECTED: "a key or ticket for the storage below was rejected",
    e.ENOMEM: "no memory for it just now",
    e.ENOBUFS: "no memory for it just now",
    e.EAGAIN: "no resources for it just now",
    e.ENOLCK: "no lock for it just now",
    e.EMFILE: "no file descriptor for it just now",
    e.ENFILE: "no file descriptor for it just now",
    e.EUSERS: "no room for one more user just now",
    e.EBUSY: "busy just now",
    e.EDEADLK: "a lock below would wait for itself; the next try may not",
    e.EINTR: "interrupted below",
    e.ERESTART: "interrupted below",
    e.ECANCELED: "cancelled below",
    e.EREMCHG: "a path below failed; the device mapper asks for another try",
    e.ETIME: "over the duration limit that was set for the device",
    e.ETOOMANYREFS: "the zoned device has too many open zones",
    e.EBADE: "reservation conflict",
    e.EDOM: "task set full",
    e.ENOMEDIUM: "no medium just now",
    e.EMEDIUMTYPE: "not the medium for it just now (DRBD: secondary)",
    **dict.fromkeys(_PATH, "about a path; no request names one"),
    **dict.fromkeys(_SOCKET, "about setting up a socket; no request does"),
    **dict.fromkeys(_NO_DISK, "no disk is known to answer with this"),
}

REFUSED: dict[int, str] = {
    e.EINVAL: "the request is malformed",
    e.EOVERFLOW: "the request is too large (NBD_EOVERFLOW)",
    e.E2BIG: "the request is too large",
    e.ERANGE: "out of range",
    e.ESPIPE: "the backend has no offsets",
    e.EOPNOTSUPP: "the backend cannot do it",
    e.ENOSYS: "the backend cannot do it",
    e.ENOTTY: "the backend cannot do it (no such ioctl)",
    e.ENOTBLK: "the backend cannot do it (not a block device)",
    e.EFAULT: "a bug of ours: a buffer is gone",
}


def classify(errno: int) -> ErrorClass:
    """The class of an errno (positive)."""
    if errno in LOST:
        return ErrorClass.LOST
    if errno in REFUSED:
        return ErrorClass.REFUSED
    return ErrorClass.FAILED


# What read(2), write(2), fsync(2) and fallocate(2) may say of a disk, and what QEMU's virtio-blk
# and SCSI disks make something of. 0 is success, not an error.
# fmt: off
_GUEST_KNOWS = (
    0, e.EIO, e.ENODATA, e.EREMOTEIO, e.EILSEQ, e.ENOSPC, e.EDQUOT, e.EFBIG, e.ENOMEM, e.EROFS,
    e.EBADE, e.EDOM, e.ENOMEDIUM, e.EINVAL, e.EOPNOTSUPP,
)
# fmt: on

# Nobody expects ECONNREFUSED from a disk, and ENOSYS is remembered by the kernel for ever: all
# but these become EIO.
_FOR_GUEST: dict[int, int] = {
    **{errno: errno for errno in _GUEST_KNOWS},
    **dict.fromkeys((e.ENOSYS, e.ENOTTY, e.ENOTBLK), e.EOPNOTSUPP),
    **dict.fromkeys((e.EOVERFLOW, e.E2BIG, e.ERANGE, e.ESPIPE), e.EINVAL),
    e.ENOBUFS: e.ENOMEM,
}


def is_lost(errno: int) -> bool:
    return errno in LOST


def for_guest(errno: int) -> int:
    """The errno that a guest sees for the backend's errno (0 stays 0)."""
    return _FOR_GUEST.get(errno, e.EIO)


def reason(errno: int) -> str:
    """One short phrase on what an errno means for a disk."""
    return LOST.get(errno) or FAILED.get(errno) or REFUSED.get(errno) or "unknown error"
