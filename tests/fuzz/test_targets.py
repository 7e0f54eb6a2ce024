"""A short run of each target, by hypothesis and by atheris. `tests.fuzz.run` runs for hours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from healfs.backends import nbd_protocol, nbd_transmission
from healfs.control import qmp
from tests.fuzz import targets
from tests.mounts import ROOT

SECONDS = 5


@given(st.binary(max_size=400))
def test_any_handshake(data: bytes) -> None:
    targets.handshake(data)


@given(st.binary(max_size=400))
def test_any_replies(data: bytes) -> None:
    targets.transmission(data)


@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_any_input_of_a_client(data: bytes) -> None:
    targets.control(data)


def test_the_harness_reaches_the_far_ends() -> None:
    """Else nothing is fuzzed: each target gets through to what comes last."""
    reached = set()

    class Seen(nbd_transmission.Transmission):
        def _block_status(self, *arguments: object) -> None:
            reached.add("block status")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "Transmission", Seen)
        patch.setattr(nbd_protocol, "_info", lambda export, kind, data: reached.add("info"))
        patch.setattr(qmp, "success", lambda value, command: reached.add(command.name) or {})
        # Structured, cookie 5, a chunk of block status, 12 bytes.
        piece = bytes([7, 4]) + bytes([0, 0]) + b"\x00\x03" + b"\x00\x04" + bytes(8)
        targets.transmission(b"\x01" + piece.ljust(16, b"\0"))
        targets.control(b'{"execute": "healfs-set-policy"}')
        targets.handshake(bytes([5]) + bytes(40))
    assert reached == {"block status", "info", "healfs-set-policy"}


@pytest.mark.parametrize("target", targets.TARGETS)
def test_some_seconds_of_atheris(target: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", target, str(SECONDS), str(tmp_path / "corpus")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Done" in done.stderr
