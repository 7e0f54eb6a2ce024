"""The QMP verbs of a mount: QEMU's names where QEMU has them, healfs's own beside them."""

from __future__ import annotations

import contextlib
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from healfs import __version__, compiled
from healfs.backends.base import Geometry
from healfs.config import MAXIMUM_UIDS, counted
from healfs.control.server import Argument, CommandError, Peer, Verb
from healfs.core.policy import Action, Policy, PolicyError
from healfs.core.states import State
from healfs.daemon.parent import UnmountError
from healfs.events import KEPT

if TYPE_CHECKING:
    from healfs.daemon.worker import Worker

BUSY_SHOWN = 5  # processes named when a mount is in use


def verbs(worker: Worker) -> dict[str, Verb]:
    """The command table of the control server."""
    return {
        "query-status": Verb(lambda arguments, peer: query_status(worker)),
        "query-block": Verb(lambda arguments, peer: query_block(worker)),
        "query-blockstats": Verb(lambda arguments, peer: query_blockstats(worker)),
        "stop": Verb(lambda arguments, peer: stop(worker, peer)),
        "cont": Verb(lambda arguments, peer: cont(worker, peer)),
        "healfs-query-status": Verb(lambda arguments, peer: status(worker)),
        "healfs-set-policy": Verb(
            lambda arguments, peer: set_policy(worker, arguments, peer),
            {"read": Argument(dict, optional=True), "write": Argument(dict, optional=True)},
        ),
        "healfs-reconnect": Verb(lambda arguments, peer: reconnect(worker, peer)),
        "healfs-accept": Verb(
            lambda arguments, peer: accept(worker, bool(arguments["replay"]), peer),
            {"replay": Argument(bool)},
        ),
        "healfs-fail": Verb(lambda arguments, peer: fail(worker, peer)),
        "healfs-umount": Verb(
            lambda arguments, peer: umount(worker, bool(arguments.get("force", False)), peer),
            {"force": Argument(bool, optional=True)},
        ),
    }


def status(worker: Worker) -> dict[str, Any]:
    """The object that `healfs status --json` prints (healfs-status(1), "Status")."""
    engine = worker.engine.status()
    seconds = engine["state_seconds"]
    assert isinstance(seconds, float)
    mountpoint = worker.config.mountpoint
    ring = worker.channel.ring
    limits = dict(engine.pop("limits"))  # type: ignore[call-overload]
    limits |= {
        "worker_silence_seconds": {"limit": worker.parent.greeting["silence"]},
        "payload_bytes": {"used": ring.used, "limit": ring.size},
        "payload_overflow_bytes": {"used": ring.overflow, "limit": worker.channel.overflow_limit},
        "background_requests": {
            "used": len(worker.channel.held),
            "limit": worker.channel.max_background,
        },
        "control_connections": {
            "used": worker.control.connected,
            "limit": worker.control.limits.connections,
        },
        "control_negotiation_seconds": {"limit": worker.control.limits.negotiation_seconds},
        "allowed_uids": {"used": len(worker.config.allow_uid), "limit": MAXIMUM_UIDS},
        "events": {"limit": KEPT},
    }
    geometry = worker.geometry
    notes = [*(geometry.notes if geometry else ()), *worker.notes]
    if unknown := worker.callers.unknown(worker.channel.held):
        requests = counted(
            unknown, "waiting request is of a process", "waiting requests are of processes"
        )
        notes.append(f"{requests} that cannot be named")
    if worker.unlocked:
        notes.append(worker.unlocked)
    if gone := worker.parent.gone.is_set():
        notes.append("the keeper is gone: the worker's death is not survived, no event is kept")
    write_log: Any = engine["write_log"]
    if not write_log["enabled"]:
        write_log["reason"] = why_no_log(geometry)
    return {
        "mountpoint": mountpoint,
        "file": os.path.join(mountpoint, worker.config.name),
        "source": worker.config.source,
        "control": os.path.join(worker.parent.greeting["directory"], "control"),
        "log": worker.parent.greeting["log"],
        "tls": (geometry.tls or None) if geometry else None,
        "device": worker.config.device,
        "configuration": configuration(worker),
        "minimum_block": worker.engine.align if geometry else None,
        "backend": abilities(geometry),
        "worker_restarts": worker.parent.greeting["restarts"],
        "pids": {"keeper": 0 if gone else os.getppid(), "worker": os.getpid()},
        "since": datetime.fromtimestamp(time.time() - seconds, UTC).isoformat("T", "seconds"),
        **engine,
        "limits": limits,
        "notes": notes,
        "version": __version__,
        "plain_python": compiled.why_plain or None,
    }


def summary(worker: Worker) -> str:
    """One line for the service manager, which shows it in its own status."""
    if not hasattr(worker, "channel"):
        return worker.report.waits or "connecting"
    engine = worker.engine.status()
    state, seconds, requests = engine["state"], engine["state_seconds"], engine["requests"]
    assert isinstance(seconds, float) and isinstance(requests, dict)
    if state == State.READY:
        failed: Any = engine["retrying"]
        if failed is None:
            return str(state)
        # Without the time, which would be another one each second.
        many = counted(failed["requests"], "request that failed is", "requests that failed are")
        return f"{state}, {many} tried again ({failed['reason']})"
    since = datetime.fromtimestamp(time.time() - seconds).isoformat(" ", "seconds")
    why = f" ({engine['reason']})" if engine["reason"] else ""
    waiting = requests["parked"] + requests["in_flight"]
    return f"{state} since {since}: {counted(waiting, 'request waits', 'requests wait')}{why}"


def abilities(geometry: Geometry | None) -> dict[str, bool] | None:
    """What the backend can; None: it was not asked yet."""
    if geometry is None:
        return None
    return {
        "flush": geometry.can_flush,
        "fua": geometry.can_fua,
        "discard": geometry.can_discard,
        "write_zeroes": geometry.can_write_zeroes,
        "volatile_cache": geometry.volatile_cache,
        "multi_conn": geometry.multi_conn,
    }


def configuration(worker: Worker) -> dict[str, Any]:
    """As mounted; where the policy was changed since, with that origin."""
    given = worker.config.configuration
    values = dict(given.get("values", {}))
    mounted = worker.config.policy.as_options()
    for name, value in worker.engine.policy.as_options().items():
        if value != mounted[name]:
            values[name] = {"value": value, "from": "healfs policy"}
    return {"file": given.get("file"), "values": values}


def why_no_log(geometry: Geometry | None) -> str:
    """For status and for `healfs mount`, of a backend whose writes are not kept."""
    if geometry is None:
        return "not connected yet"
    if not geometry.can_flush:
        return "the backend cannot flush: nothing is on stable storage for certain"
    return "the backend has no volatile cache: what is answered is stable"


def query_status(worker: Worker) -> dict[str, Any]:
    """QEMU's run states, as near as a disk comes to them."""
    state = worker.engine.state
    if state is State.PAUSED:
        names = {"operator": "paused", "policy": "io-error"}
        return {"running": False, "status": names[worker.engine.paused_by]}
    if state is State.FAULTED:
        return {"running": False, "status": "internal-error"}
    return {"running": True, "status": "running"}


def query_block(worker: Worker) -> list[dict[str, Any]]:
    engine, config = worker.engine, worker.config
    ok = engine.state in (State.READY, State.CONNECTING)
    return [
        {
            "device": config.name,
            "qdev": config.device,
            "type": "unknown",
            "locked": False,
            "removable": False,
            "io-status": "ok" if ok else "nospace" if engine.no_space else "failed",
            "inserted": {
                "file": config.source,
                "node-name": config.name,
                "drv": "raw",
                "ro": config.read_only,
                "image": {
                    "filename": config.source,
                    "format": "raw",
                    "virtual-size": engine.size,
                },
            },
        }
    ]


def query_blockstats(worker: Worker) -> list[dict[str, Any]]:
    totals: Any = worker.engine.status()["totals"]
    read, write, flush = totals["read"], totals["write"], totals["flush"]
    unmap = [totals["discard"], totals["write_zeroes"]]
    stats = {
        "rd_bytes": read["bytes"],
        "rd_operations": read["requests"] - read["errors"],
        "failed_rd_operations": read["errors"],
        "wr_bytes": write["bytes"],
        "wr_operations": write["requests"] - write["errors"],
        "failed_wr_operations": write["errors"],
        "flush_operations": flush["requests"] - flush["errors"],
        "failed_flush_operations": flush["errors"],
        "unmap_bytes": sum(kind["bytes"] for kind in unmap),
        "unmap_operations": sum(kind["requests"] - kind["errors"] for kind in unmap),
        "failed_unmap_operations": sum(kind["errors"] for kind in unmap),
    }
    return [{"device": worker.config.name, "node-name": worker.config.name, "stats": stats}]


def stop(worker: Worker, peer: Peer) -> dict[str, Any]:
    """Answers at once, in an outage too; the event HEALFS_DRAINED tells of drain and flush."""
    if worker.engine.state is State.FAULTED:
        raise CommandError("the disk is faulted by an internal error; see the log")
    worker.engine.pause(peer.as_dict())
    worker.commit()
    return {}


def cont(worker: Worker, peer: Peer) -> dict[str, Any]:
    worker.engine.resume(peer.as_dict())
    worker.commit()
    return {}


def set_policy(worker: Worker, arguments: dict[str, Any], peer: Peer) -> dict[str, Any]:
    """Change the given keys of the policy; returns the whole one."""
    old = worker.engine.policy
    try:
        new = old.change(_fields(arguments.get("read")), _fields(arguments.get("write")))
    except (PolicyError, TypeError) as exc:
        raise CommandError(str(exc)) from None
    if new != old:
        worker.event(
            "HEALFS_POLICY_CHANGED",
            {**peer.as_dict(), "from": old.as_dict(), "to": new.as_dict()},
        )
    worker.engine.set_policy(new)
    worker.commit()
    return Policy.as_dict(new)


def _fields(given: dict[str, Any] | None) -> dict[str, object]:
    fields: dict[str, object] = {}
    for key, value in (given or {}).items():
        if key in ("error", "then"):
            try:
                fields[key] = Action(value)
            except ValueError:
                names = ", ".join(Action)
                raise CommandError(f"{key}: {value!r} is none of {names}") from None
        elif key in ("retry_interval", "retry_timeout"):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise CommandError(f"{key}: {value!r} is not a number of seconds")
            fields[key] = float(value)
        else:
            raise CommandError(f"{key}: not part of a policy")
    return fields


def reconnect(worker: Worker, peer: Peer) -> dict[str, Any]:
    """Give up a connection that hangs; its attempts are unsettled then."""
    if worker.engine.state is State.MISMATCH:
        raise CommandError(
            f"another disk came back ({worker.engine.reason}); healfs accept goes on with it,"
            " and the right one is taken when it is back"
        )
    if worker.engine.state is State.FAULTED:
        raise CommandError(f"the disk is faulted: {worker.engine.reason}")
    worker.event("HEALFS_RECONNECT", peer.as_dict())
    worker.engine.reconnect()
    worker.commit()
    return {}


def accept(worker: Worker, replay: bool, peer: Peer) -> dict[str, Any]:
    """Go on with the disk that came back: write the log to it, or throw the log away."""
    if worker.engine.state is not State.MISMATCH:
        raise CommandError(
            f"there is nothing to accept: the disk is {worker.engine.state}, not in mismatch"
        )
    worker.engine.accept(replay=replay, who=peer.as_dict())
    worker.commit()
    return {}


def fail(worker: Worker, peer: Peer) -> dict[str, Any]:
    """Answer all that waits with an error, now; what comes later waits again."""
    failed = worker.engine.fail_all()
    worker.commit()
    if failed:
        worker.event("HEALFS_FAILED", {**peer.as_dict(), "requests": failed})
    return {"failed": sum(kind["requests"] for kind in failed.values())}


async def umount(worker: Worker, force: bool, peer: Peer) -> dict[str, Any]:
    try:
        given_up = await worker.unmounting.umount(force=force, who=peer.as_dict())
    except (UnmountError, OSError) as exc:
        raise CommandError(str(exc)) from None
    worker.unmounting.end_soon()
    return {"given_up": given_up}


def busy_text(places: set[str], error: OSError) -> str:
    """Why it cannot be unmounted from these, with the processes that have the file open."""
    if error.errno != 16:
        return str(error)
    users = _users_of(tuple(place + "/" for place in places))
    shown = ", ".join(users[:BUSY_SHOWN]) or "a process that cannot be seen"
    more = f" and {len(users) - BUSY_SHOWN} more" if len(users) > BUSY_SHOWN else ""
    return f"in use by {shown}{more}; end them first, or use --force"


def _is_below(places: tuple[str, ...], link: str) -> bool:
    try:
        target = os.readlink(link)
    except OSError:
        return False  # closed meanwhile; the others are there still
    return f"{target}/".startswith(places)


def _users_of(places: tuple[str, ...]) -> list[str]:
    """readlink in /proc names the files without touching them."""
    users = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            links = [f"/proc/{name}/cwd"]
            links += [f"/proc/{name}/fd/{fd}" for fd in os.listdir(f"/proc/{name}/fd")]
            if any(_is_below(places, link) for link in links):
                # The kernel cuts it off after 15 bytes, also inside a character.
                with open(f"/proc/{name}/comm", errors="replace") as comm:
                    users.append(f"{comm.read().strip()} (pid {name})")
        except OSError:
            continue  # gone, or not ours to see
    return users + _loops_of(places)


def _loops_of(places: tuple[str, ...]) -> list[str]:
    """No process has the file open for these, and sysfs does not touch it either."""
    loops = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # detached meanwhile
            if os.fsdecode(backing.read_bytes()).startswith(places):
                device = f"/dev/{backing.parts[3]}"
                loops.append(f"{device} (losetup -d {device})")
    return loops
