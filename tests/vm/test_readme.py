"""README's way to a machine that survives an outage, walked as it is written."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends.nbd_servers import free_port, wait_until
from tests.fuse.commands import Commands
from tests.mounts import ROOT
from tests.vm import image

TITLE = "### From here to a machine that survives an outage"
BOOT_SECONDS = 400
OUTAGE_SECONDS = 6
WAITED_SECONDS = 3  # the guest begins a line each second, and counts whole ones

pytestmark = pytest.mark.vm


@pytest.fixture
def commands() -> Iterator[Commands]:
    with Commands() as made:
        yield made


@pytest.fixture
def blocks(tmp_path: Path, commands: Commands) -> list[str]:
    """What it has the reader type, with a port, an outage and places of the test's own."""
    section = (ROOT / "README.md").read_text().partition(TITLE)[2].partition("\n###")[0]
    found = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    changed, port = "\0".join(found), free_port()
    for old, new in (
        ("make guest", ": make guest"),  # it would install
        ("build/guest", str(tmp_path)),
        ("build/try", str(commands.directory)),
        ("rm -r ", ": rm -r "),
        ("--ipaddr localhost", f"--ipaddr localhost --port {port}"),
        ("nbd://localhost", f"nbd://localhost:{port}"),
        ("sleep 20", f"sleep {OUTAGE_SECONDS}"),
        ("sleep 2 ", "sleep 10 "),
    ):
        assert old in changed, old
        changed = changed.replace(old, new)
    image.main(str(tmp_path))
    return changed.split("\0")


@pytest.mark.timeout(1200)
def test_the_machine_survives(blocks: list[str], commands: Commands) -> None:
    _, storage_and_machine, outage, end = blocks
    environment = commands.environment | {"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"}

    def shell(text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-ec", text], env=environment, cwd=ROOT, capture_output=True, text=True
        )

    lines: list[str] = []
    terminal = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "sh", "-ec", f"{storage_and_machine}"],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert terminal.stdout is not None and terminal.stdin is not None
    reader = threading.Thread(target=lambda: lines.extend(terminal.stdout), daemon=True)  # type: ignore[arg-type]
    reader.start()
    try:
        wait_until(lambda: seconds(lines), "the machine's first line", BOOT_SECONDS)
        done = shell(outage)
        assert done.returncode == 0, done.stderr
        assert "stalled" in done.stdout and "outage over" in done.stdout
        wait_until(lambda: max(seconds(lines)) >= WAITED_SECONDS, "the line that waited", 180)
        waited = len(seconds(lines))
        wait_until(lambda: len(seconds(lines)) >= waited + 2, "it to go on", 180)
        assert "ERROR" not in "".join(lines)
        terminal.stdin.write("\x01x")
        terminal.stdin.flush()
        terminal.wait(180)
        assert shell(end).returncode == 0
        commands.nothing_left(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(terminal.pid, signal.SIGKILL)
        terminal.wait(180)
        with contextlib.suppress(OSError):  # gone: all went well
            os.kill(int((commands.directory / "nbd.pid").read_text()), signal.SIGKILL)
        reader.join(10)
        terminal.stdin.close()
        terminal.stdout.close()


def seconds(lines: list[str]) -> list[int]:
    """How long each line took."""
    found = (re.search(r"line \d+: written, flushed and read back in (\d+) s", x) for x in [*lines])
    return [int(match[1]) for match in found if match]
