"""healfs policy: show the policy, or change it while the disk is used."""

from __future__ import annotations

from typing import Any

import click

from healfs.cli.completion import MOUNTPOINT
from healfs.cli.daemons import connected, find
from healfs.cli.output import console, print_json, table
from healfs.cli.policy_options import changes, policy_options, without_defaults
from healfs.config import format_duration
from healfs.core.policy import Policy

_TIMEOUT = 5.0


@without_defaults
@click.command(short_help="Show what is done on errors, or change it.")
@click.argument("mountpoint", type=MOUNTPOINT)
@policy_options
@click.option("--json", "as_json", is_flag=True, help="For programs; the keys are stable.")
def policy(mountpoint: str, as_json: bool, **options: Any) -> None:
    """Show the policy of the disk at MOUNTPOINT, or change what the options name.

    A change acts on the requests that wait already. What no option names stays as it is.
    """
    read, write = changes(options)
    Policy().change(read, write)  # what can never be is refused before anyone is asked
    mount = find(mountpoint)
    with connected(mount, _TIMEOUT) as client:
        current = client.execute("healfs-query-status").get("policy") or {}
        if read or write:
            if current:
                Policy.from_dict(current).change(read, write)
            arguments = {k: v for k, v in (("read", read), ("write", write)) if v}
            current = client.execute("healfs-set-policy", arguments)
    if as_json:
        print_json(current)
    else:
        show(current)


def words(policy: dict[str, Any]) -> tuple[str, str, str, str]:
    """One direction: error, interval, timeout, then; "-" where it has no meaning."""
    error = str(policy.get("rerror") or policy.get("werror") or "?")
    if error != "retry":
        return error, "-", "-", "-"
    timeout = float(policy.get("retry_timeout") or 0)
    return (
        error,
        format_duration(float(policy.get("retry_interval") or 0)),
        format_duration(timeout) if timeout else "for ever",
        str(policy.get("then", "?")) if timeout else "-",
    )


def sentence(policy: dict[str, Any]) -> str:
    """One direction, for status: "retry for 2m, then report"."""
    error, _, timeout, then = words(policy)
    if error != "retry":
        return error
    return "retry for ever" if then == "-" else f"retry for {timeout}, then {then}"


def show(policies: dict[str, Any]) -> None:
    result = table("", "error", "retry interval", "retry timeout", "then")
    for direction, label in (("read", "reads"), ("write", "writes")):
        result.add_row(label, *words(policies.get(direction) or {}))
    console().print(result)
