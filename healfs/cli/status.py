"""healfs status and healfs list: what a mount does, in at most 5 s, whatever its daemon does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click
from rich.text import Text

from healfs.cli.completion import MOUNTPOINT
from healfs.cli.daemons import about_dead, about_silent, advice, connected, find
from healfs.cli.output import (
    CliError,
    cell,
    console,
    error_line,
    fields,
    print_json,
    state_text,
    table,
)
from healfs.cli.pause import pause_words
from healfs.cli.policy import sentence
from healfs.config import counted, format_duration, format_size, one_line, retrying_words
from healfs.control import mounts
from healfs.control.client import ControlError, connect
from healfs.control.mounts import Mount

_TIMEOUT = 4.0  # of the 5 s, some are for starting this program
_MAXIMUM_THREADS = 64

Status = dict[str, Any]


@click.command(short_help="Show the state of one disk, or of all.")
@click.argument("mountpoint", type=MOUNTPOINT, required=False)
@click.option("--json", "as_json", is_flag=True, help="For programs; the keys are stable.")
def status(mountpoint: str | None, as_json: bool) -> None:
    """Show the state of the disk at MOUNTPOINT, or of all disks."""
    if mountpoint is None:
        found = _ask_all(mounts.list_mounts())
        if as_json:
            print_json(found)
        else:
            _print_all(found)
        return
    mount = find(mountpoint)
    if mount.is_dead():
        raise CliError(f"{mount.mountpoint}: the daemon is gone; {advice(mount)}")
    with connected(mount, _TIMEOUT) as client:
        answer = client.execute("healfs-query-status")
    if as_json:
        print_json(answer)
    else:
        _print_one(mount, answer)


@click.command("list", short_help="List the mounts of this user; asks no daemon.")
@click.option("--json", "as_json", is_flag=True, help="For programs; the keys are stable.")
def list_(as_json: bool) -> None:
    """List the mounts of this user. Asks no daemon."""
    rows = [_record(mount) for mount in mounts.list_mounts()]
    if as_json:
        print_json(rows)
        return
    result = table("MOUNTPOINT", "SOURCE", "KEEPER", "VERSION", "STATE")
    for row in rows:
        result.add_row(
            cell(row["mountpoint"]),
            cell(row["source"]),
            str(row["pids"]["keeper"]),
            cell(row["version"]),
            state_text(row["state"]),
        )
    _print_table(result)
    _print_problems(rows)


def _restarts(count: int) -> str:
    return f" (started again {counted(count, 'time')})" if count else ""


def _record(mount: Mount) -> Status:
    """What is known without asking the daemon; keys as in the status object."""
    dead = mount.is_dead()
    record: Status = {
        "mountpoint": mount.mountpoint,
        "file": mount.file,
        "source": mount.source,
        "control": mount.control,
        "log": mount.log,
        "pids": {"keeper": mount.keeper, "worker": mount.worker},
        "version": mount.version,
        "state": "dead" if dead else _alive(mount),
    }
    if mount.problem and not dead:
        record["reason"] = mount.problem
    return record


def _alive(mount: Mount) -> str:
    if not mount.mounted:
        return "waiting"
    return "no worker" if mount.problem else "mounted"


def _ask_all(found: list[Mount]) -> list[Status]:
    if not found:
        return []
    with ThreadPoolExecutor(min(len(found), _MAXIMUM_THREADS)) as pool:
        return list(pool.map(_ask, found))


def _ask(mount: Mount) -> Status:
    record = _record(mount)
    if record["state"] != "mounted":
        return record
    try:
        with connect(mount.control, _TIMEOUT) as client:
            answer: Status = client.execute("healfs-query-status")
            return answer
    except ControlError as exc:
        return {**record, "state": "no answer", "reason": str(exc)}


def _print_table(result: Any) -> None:
    if result.row_count:
        console().print(result)
    else:
        click.echo("no mounts")


def _print_all(found: list[Status]) -> None:
    result = table("MOUNTPOINT", "STATE", "FOR", "IN FLIGHT", "PARKED", "SOURCE")
    for one in found:
        requests = one.get("requests") or {}
        seconds = one.get("state_seconds")
        result.add_row(
            cell(one.get("mountpoint")),
            state_text(str(one.get("state", "?"))),
            "" if seconds is None else format_duration(float(seconds)),
            str(requests.get("in_flight", "")),
            str(requests.get("parked", "")),
            cell(one.get("source", "")),
        )
    _print_table(result)
    _print_problems(found)


def _print_problems(found: list[Status]) -> None:
    """What to do about each that serves nobody."""
    for one in found:
        match one.get("state"):
            case "dead":
                text = f"the daemon is gone; {about_dead(one['mountpoint'], one['log'])}"
            case "no answer":
                text = f"{one['reason']}; {about_silent(one['log'])}"
            case "no worker" | "waiting":
                text = f"{one['reason']}; see {one['log']}"
            case _:
                continue
        error_line(f"{one['mountpoint']}: {text}")


def _print_one(mount: Mount, one: Status) -> None:
    state = state_text(str(one.get("state", "?")))
    if (seconds := one.get("state_seconds")) is not None:
        state.append(f" for {format_duration(float(seconds))}")
    if since := one.get("since"):
        state.append(f", since {since}")
    rows: list[tuple[str, object]] = [("state", state)]
    if reason := one.get("reason"):
        rows.append(("reason", reason))
    if retrying := one.get("retrying"):
        rows.append(("retrying", Text(one_line(retrying_words(retrying)), "yellow")))
    if paused := one.get("pause"):
        rows.append(("pause", pause_words(paused)))
    if one.get("state") == "mismatch":
        advice = (
            "the right disk is taken when it is back; healfs accept takes this one, where it is no"
            " smaller and takes blocks as small"
        )
        rows.append(("", advice))
    rows += [
        ("file", one.get("file", mount.file)),
        ("source", one.get("source", mount.source)),
    ]
    if tls := one.get("tls"):
        rows.append(("tls", f"{tls['version']}, {tls['cipher']}, peer: {tls['peer']}"))
    if (size := one.get("size")) is not None:
        rows.append(("size", f"{format_size(int(size))} ({size} bytes)"))
    rows += _load_rows(one)
    rows += _policy_rows(one)
    rows += [
        ("device", one.get("device", "?")),
        ("control", one.get("control", mount.control)),
        ("log", one.get("log", mount.log)),
        ("pids", _counts(one.get("pids") or {}) + _restarts(one.get("worker_restarts", 0))),
        ("version", one.get("version", "?")),
        *([("plain Python", plain)] if (plain := one.get("plain_python")) else []),
    ]
    rows += _group("configuration", _configuration(one.get("configuration") or {}))
    rows += _group("limits", [_limit(*item) for item in (one.get("limits") or {}).items()])
    rows += _group("notes", one.get("notes") or [])
    console().print(fields(rows))


def _group(label: str, lines: list[str]) -> list[tuple[str, object]]:
    return [(label if number == 0 else "", line) for number, line in enumerate(lines)]


def _configuration(configuration: dict[str, Any]) -> list[str]:
    """What is not the default, and where it came from."""
    words = {"option": "command line", "file": configuration.get("file")}
    return [
        f"{name.replace('_', '-')} = {_value(name, value.get('value'))}"
        f" ({words.get(origin, origin)})"
        for name, value in (configuration.get("values") or {}).items()
        if (origin := value.get("from")) != "default"
    ]


def _value(name: str, value: object) -> str:
    """As `healfs mount` would be given it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        if name in ("slow_after", "settle") or name.endswith(("_interval", "_timeout")):
            return format_duration(float(value))
        if name in ("create", "size", "log_size"):
            return format_size(int(value))
    return str(value)


def _limit(name: str, value: Any) -> str:
    used, limit = (value.get("used"), value.get("limit")) if isinstance(value, dict) else (0, value)
    if not isinstance(limit, int | float):
        limit, used = "?", None
    elif name.endswith("_seconds"):
        name, limit = name.removesuffix("_seconds"), format_duration(float(limit))
    elif name.endswith("_bytes"):
        name, limit = name.removesuffix("_bytes"), format_size(int(limit))
        used = None if used is None else format_size(int(used))
    words = name.replace("_", " ")
    return f"{words}: {limit}" if used is None else f"{words}: {used} of {limit}"


def _counts(values: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items())


def _load_rows(one: Status) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    if requests := one.get("requests"):
        rows.append(("requests", _counts(requests)))
    if log := one.get("write_log"):
        if log.get("enabled", True):
            used, limit = int(log.get("bytes", 0)), int(log.get("limit_bytes", 0))
            text = (
                f"{log.get('requests', 0)} unflushed, {format_size(used)} of {format_size(limit)}"
            )
        else:
            text = f"off: {log.get('reason') or 'no reason given'}"
        rows.append(("write log", text))
    if outages := one.get("outages"):
        text = f"{outages.get('count', 0)}"
        if current := outages.get("current_seconds"):
            text += f", this one {format_duration(float(current))}"
        if longest := outages.get("longest_seconds"):
            text += f", the longest {format_duration(float(longest))}"
        rows.append(("outages", text))
    totals = one.get("totals") or {}
    for kind, total in totals.items():
        if isinstance(total, dict) and total.get("requests"):
            text = counted(total["requests"], "request")
            if total.get("bytes"):
                text += f", {format_size(int(total['bytes']))}"
            rows.append(
                (kind.replace("_", " "), f"{text}, {counted(total.get('errors', 0), 'error')}")
            )
    counters = {key: n for key, n in totals.items() if not isinstance(n, dict) and n}
    if counters:
        rows.append(("totals", _counts(counters)))
    return rows


def _policy_rows(one: Status) -> list[tuple[str, object]]:
    policies = one.get("policy") or {}
    rows: list[tuple[str, object]] = [
        (label, sentence(policies[direction]))
        for direction, label in (("read", "policy, reads"), ("write", "policy, writes"))
        if direction in policies
    ]
    if (slow := one.get("slow_after")) is not None:
        rows.append(("slow after", format_duration(float(slow))))
    return rows
