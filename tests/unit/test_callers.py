"""Who waits, looked up in /proc: real processes, and thread numbers that are used again."""

import errno
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from healfs.core.request import Kind, Request
from healfs.fuse import callers
from healfs.fuse.callers import UNKNOWN, Callers, is_leaving, process_of

ROOT = Path(__file__).parents[2]
LIMIT = 60  # seconds
# The caller of one request is a thread that ends; its number is then a process's that lives.
USED_AGAIN = """
import json, os, subprocess, sys, time
from healfs.core.request import Kind, Request
from healfs.fuse import callers

def request(tag, caller):
    made = Request(Kind.WRITE, 0, 1, lambda *answer: None, tag=tag)
    made.caller = caller
    return made

class Clock:
    now = 1000.0
    monotonic = classmethod(lambda cls: cls.now)

callers.time = Clock
threaded = (
    "import sys, threading\\n"
    "threading.Thread(target=lambda: print(threading.get_native_id(), flush=True)"
    " or threading.Event().wait(), daemon=True).start()\\n"
    "sys.stdin.read()"
)
first = subprocess.Popen(
    [sys.executable, "-c", threaded], stdin=subprocess.PIPE, stdout=subprocess.PIPE
)
thread = int(first.stdout.readline())
known = callers.Callers()
noted = known.note(request(1, thread))
first.kill()
first.wait()
for attempt in range(100):  # the kernel lets a number go a little after the parent was told
    with open("/proc/sys/kernel/ns_last_pid", "w") as last:
        last.write(str(thread - 1))
    second = subprocess.Popen(["sleep", "60"])
    if second.pid == thread:
        break
    second.kill()
    second.wait()
Clock.now += float(sys.argv[1])
again = request(2, second.pid)
known.note(again)
print(json.dumps({
    "same number": second.pid == thread,
    "noted": noted == first.pid,
    "let go": len(known.leaving({2: again})),
    "named": known.note(again) == second.pid,
}))
second.kill()
"""


def _request(tag: int, caller: int) -> Request:
    request = Request(Kind.WRITE, 0, 1, lambda *answer: None, tag=tag)
    request.caller = caller
    return request


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    running = subprocess.Popen(["sleep", str(LIMIT)])
    yield running
    running.kill()
    running.wait()


def test_a_thread_is_known_by_its_process() -> None:
    script = "import threading,sys; print(threading.get_native_id()); sys.stdout.flush(); input()"
    threaded = f"import threading; threading.Thread(target=lambda: exec({script!r})).start()"
    child = subprocess.Popen(
        [sys.executable, "-c", threaded], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        thread = int(child.stdout.readline())
        assert thread != child.pid and process_of(thread) == child.pid
        assert not is_leaving(child.pid)
    finally:
        child.kill()
        child.communicate(timeout=LIMIT)


@pytest.mark.parametrize("call", ["os.listdir", "builtins.open"])
def test_who_cannot_be_looked_at_is_not_taken_for_gone(
    process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Else an outage in which descriptors run out would answer everybody with EINTR."""

    def none_left(*arguments: object, **named: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as short:
        short.setattr(call, none_left)
        assert not is_leaving(process.pid)


def test_who_cannot_be_looked_up_is_looked_up_later(
    process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*arguments: object, **named: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    callers, requests = Callers(), {1: _request(1, process.pid)}
    with monkeypatch.context() as short:
        short.setattr("builtins.open", none_left)
        assert callers.note(requests[1]) is None
        assert not callers.leaving(requests) and not callers.unknown(requests)
    process.kill()
    assert callers.leaving(requests) == [requests[1]]


@pytest.mark.parametrize(
    ("more", "leaving"),
    [
        ({"ShdPnd": "4"}, True),  # SIGQUIT
        ({"SigPnd": "4000", "SigCgt": "200"}, True),  # SIGTERM, behind one that it catches
        ({"ShdPnd": "4", "SigCgt": "4"}, False),
        ({"ShdPnd": "4", "SigBlk": "4"}, False),
        ({"ShdPnd": "4", "SigIgn": "4"}, False),
        ({"ShdPnd": "8430000"}, False),  # SIGCHLD, SIGCONT, SIGURG, SIGWINCH
        ({"ShdPnd": "200000000"}, True),  # a real-time signal
        ({"ShdPnd": "4", "TracerPid": "1"}, False),
        ({"ShdPnd": "100", "TracerPid": "1"}, True),
        ({"ShdPnd": "4", "State": "S (sleeping)"}, False),
        ({"SigPnd": "100", "State": "S (sleeping)"}, True),
    ],
)
def test_a_pending_signal_that_will_end_it(more: dict[str, str], leaving: bool) -> None:
    sets = dict.fromkeys(("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "TracerPid"), "0")
    sets["State"] = "D (disk sleep)"
    assert callers._is_ended_by_a_signal(sets | more, alone=False) is leaving
    # Another thread may wait for what only waits: of one thread alone it tells nothing.
    of_it_alone = any(more.get(name) == "100" for name in ("SigPnd", "ShdPnd"))
    assert callers._is_ended_by_a_signal(sets | more, alone=True) is of_it_alone


def test_who_waits_for_a_signal_is_not_ended_by_it() -> None:
    """In sigwait(3) the signal is shown as not blocked, and for a moment as pending."""
    script = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print(flush=True)
while True: signal.sigwait([signal.SIGTERM])
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        for _ in range(5000):
            child.send_signal(signal.SIGTERM)
            assert not is_leaving(child.pid)
    finally:
        child.kill()
        child.communicate(timeout=LIMIT)


def test_a_thread_of_the_kernel_is_not_who_waits() -> None:
    """A loop device's kworker ends when it was idle for a while, as in a long outage."""
    first = Path("/proc/2/comm")
    if not first.exists() or first.read_text() != "kthreadd\n":
        pytest.skip("in this pid namespace there are no threads of the kernel")
    callers = Callers()
    request = _request(1, 2)
    assert callers.note(request) == UNKNOWN
    assert callers.unknown({1: request}) == 1


def test_who_may_never_be_looked_at_is_unknown(
    process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's, with /proc mounted with hidepid=1."""

    def hidden(*arguments: object, **named: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    callers, requests = Callers(), {1: _request(1, process.pid)}
    monkeypatch.setattr("builtins.open", hidden)
    assert not callers.leaving(requests) and callers.unknown(requests) == 1


def test_who_is_killed_is_leaving_before_he_is_reaped(process: subprocess.Popen[bytes]) -> None:
    callers = Callers()
    requests = {1: _request(1, process.pid), 2: _request(2, threading.get_native_id())}
    assert not callers.leaving(requests)
    process.send_signal(signal.SIGKILL)  # pending at once; a zombie is exiting, too
    assert callers.leaving(requests) == [requests[1]]
    process.wait(LIMIT)
    assert callers.leaving(requests) == [requests[1]] and is_leaving(process.pid)


def test_a_caller_of_another_pid_namespace_is_unknown_and_never_let_go(
    process: subprocess.Popen[bytes],
) -> None:
    callers = Callers()
    requests = {1: _request(1, 0), 2: _request(2, process.pid)}
    assert [callers.note(request) for request in requests.values()] == [UNKNOWN, process.pid]
    assert not callers.leaving(requests)
    assert callers.unknown(requests) == 1


def test_a_process_is_known_after_its_thread_has_gone(process: subprocess.Popen[bytes]) -> None:
    """It is looked up when the request is parked, and remembered by the request."""
    callers = Callers()
    request = _request(1, process.pid)
    assert callers.note(request) == process.pid
    process.kill()
    process.wait(LIMIT)
    assert callers.note(request) == process.pid
    assert callers.leaving({1: request}) == [request]


def test_a_thread_number_that_is_used_again_is_another_caller() -> None:
    """In a pid namespace of its own, where numbers are given out as the test says."""
    done = subprocess.run(
        [
            *("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"),
            *("--mount-proc", sys.executable, "-c", USED_AGAIN, "1.5"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "same number": True,
        "noted": True,
        "let go": 0,
        "named": True,
    }
