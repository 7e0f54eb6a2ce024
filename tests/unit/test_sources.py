"""What a source that cannot be had means to who asked for it."""

from __future__ import annotations

import errno

import pytest

from healfs.backends.base import SourceError
from healfs.daemon.parent import ParentError
from healfs.daemon.sources import exit_status, lock_name


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SourceError("a scheme that is none"), 2),
        (SourceError("no such file", errno.ENOENT), 2),
        (SourceError("in use by QEMU", errno.EBUSY), 1),
        (SourceError("no room to create it", errno.ENOSPC), 1),
        (ParentError(errno.ENODEV, "cannot mount"), 1),
    ],
)
def test_only_what_no_other_try_mends_is_bad_input(error: OSError, status: int) -> None:
    """The unit's RestartPreventExitStatus=2 makes no other try."""
    assert exit_status(error) == status


def test_an_abstract_socket_has_a_lock_and_no_path() -> None:
    names = {lock_name(f"nbd+unix:///?socket={path}") for path in ("%00a", "%00b", "/a")}
    assert len(names) == 3
