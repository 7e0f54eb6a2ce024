"""The error table is complete, says one thing of each errno, and lets nothing odd out."""

import errno as e
import os

import pytest

from healfs.core import errors
from healfs.core.errors import FAILED, LOST, REFUSED, ErrorClass, classify, for_guest, reason

EVERY = sorted(e.errorcode)
CONNECTION = {
    e.ECONNREFUSED,
    e.ECONNRESET,
    e.ECONNABORTED,
    e.ENOTCONN,
    e.EPIPE,
    e.ENETDOWN,
    e.ENETUNREACH,
    e.ENETRESET,
    e.EHOSTDOWN,
    e.EHOSTUNREACH,
    e.ESHUTDOWN,
    e.ETIMEDOUT,
    e.ESTALE,
    e.ENODEV,
    e.ENXIO,
    e.ENOLINK,
    e.EPROTO,
}


def test_every_errno_of_linux_is_listed() -> None:
    listed = LOST.keys() | FAILED.keys() | REFUSED.keys()
    assert {e.errorcode[n] for n in EVERY if n not in listed} == set()


def test_nothing_is_listed_that_linux_does_not_have() -> None:
    for errno in LOST.keys() | FAILED.keys() | REFUSED.keys():
        assert not os.strerror(errno).startswith("Unknown error"), errno


def test_no_errno_is_in_two_tables() -> None:
    assert LOST.keys() & FAILED.keys() == set()
    assert LOST.keys() & REFUSED.keys() == set()
    assert FAILED.keys() & REFUSED.keys() == set()


@pytest.mark.parametrize("table", [LOST, FAILED, REFUSED])
def test_each_has_a_reason_of_one_line(table: dict[int, str]) -> None:
    for errno, why in table.items():
        assert why.strip() == why and why and "\n" not in why, e.errorcode.get(errno, errno)
        assert reason(errno) == why


@pytest.mark.parametrize(
    ("table", "name"),
    [(LOST, ErrorClass.LOST), (FAILED, ErrorClass.FAILED), (REFUSED, ErrorClass.REFUSED)],
)
def test_classify_follows_the_tables(table: dict[int, str], name: ErrorClass) -> None:
    for errno in table:
        assert classify(errno) is name


@pytest.mark.parametrize("errno", [0xBAD, 4095, 524])
def test_a_number_that_is_no_errno_is_failed(errno: int) -> None:
    assert classify(errno) is ErrorClass.FAILED
    assert reason(errno) == "unknown error"
    assert for_guest(errno) == e.EIO


@pytest.mark.parametrize("errno", sorted(CONNECTION))
def test_lost_is_what_the_design_names(errno: int) -> None:
    assert classify(errno) is ErrorClass.LOST


@pytest.mark.parametrize(
    "errno",
    [e.ENODATA, e.EREMOTEIO, e.EILSEQ, e.ENOSPC, e.EDQUOT, e.EACCES, e.ENOMEM, e.EIO, e.EROFS],
)
def test_failed_is_what_the_design_names(errno: int) -> None:
    assert classify(errno) is ErrorClass.FAILED


def test_a_guest_never_sees_a_lost_backend_or_enosys() -> None:
    seen = {for_guest(errno) for errno in range(1, 4096)}
    assert seen & (LOST.keys() | {e.ENOSYS, e.EAGAIN, e.EINTR, e.EFAULT}) == set()
    assert {for_guest(errno) for errno in LOST} == {e.EIO}
    assert for_guest(e.ENOSYS) == e.EOPNOTSUPP


def test_a_guest_is_never_told_success_for_an_error() -> None:
    assert 0 not in {for_guest(errno) for errno in range(1, 4096)}
    assert for_guest(0) == 0


@pytest.mark.parametrize(
    "errno",
    [e.ENODATA, e.EREMOTEIO, e.ENOSPC, e.ENOMEM, e.EINVAL, e.EBADE, e.EDOM, e.ENOMEDIUM],
)
def test_what_qemu_turns_into_sense_goes_through(errno: int) -> None:
    assert for_guest(errno) == errno


def test_for_guest_changes_nothing_the_second_time() -> None:
    for errno in range(4096):
        assert for_guest(for_guest(errno)) == for_guest(errno)


def test_a_refused_request_is_not_reported_as_the_backends_fault() -> None:
    told = {errno: for_guest(errno) for errno in REFUSED if errno != e.EFAULT}
    assert set(told.values()) == {e.EINVAL, e.EOPNOTSUPP}
    assert errors.for_guest(e.EFAULT) == e.EIO
