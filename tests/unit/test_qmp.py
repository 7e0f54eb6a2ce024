"""The control socket: the wire format, and the server and both clients over a real socket."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from qemu.qmp import ExecuteError, QMPClient

from healfs.control import client, qmp
from healfs.control.server import (
    FAIR_SHARE,
    Argument,
    CommandError,
    ControlServer,
    Limits,
    Peer,
    Verb,
)

DEADLINE = 120
CAPABILITIES = b'{"execute":"qmp_capabilities"}'

# --- the wire format ----------------------------------------------------------------------------

json_objects = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=6,
    ),
    max_size=4,
)


def split(*chunks: bytes) -> list[bytes | qmp.ProtocolError]:
    splitter = qmp.Splitter()
    return [message for chunk in chunks for message in splitter.feed(chunk)]


@given(
    st.lists(st.tuples(json_objects, st.booleans(), st.sampled_from([b"", b"\n", b" \r\n"]))),
    st.data(),
)
def test_messages_are_cut_the_same_however_they_arrive(
    messages: list[tuple[dict[str, Any], bool, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(
        json.dumps(value, ensure_ascii=ascii).encode() + end for value, ascii, end in messages
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert [qmp.parse(m) for m in split(*chunks) if isinstance(m, bytes)] == [
        value for value, _, _ in messages
    ]


@given(st.binary(max_size=300))
def test_any_bytes_give_errors_and_never_an_exception(garbage: bytes) -> None:
    for message in split(garbage):
        if isinstance(message, bytes):
            try:
                qmp.parse_command(message)
            except qmp.ProtocolError:
                pass


@given(st.binary(max_size=100).map(lambda b: b.replace(b"{", b"").replace(b"[", b"")))
def test_after_garbage_a_client_can_start_afresh(garbage: bytes) -> None:
    # 0xFF is what QEMU's own clients send to get the parser out of whatever it is in.
    assert split(garbage + b"\xff\n" + CAPABILITIES)[-1] == CAPABILITIES


def test_a_message_over_the_limit_is_fatal_and_one_below_is_not() -> None:
    def message(length: int) -> bytes:
        return b'{"x":"' + b"y" * (length - 8) + b'"}'

    assert split(message(qmp.MAXIMUM_MESSAGE)) == [message(qmp.MAXIMUM_MESSAGE)]
    (error,) = split(message(qmp.MAXIMUM_MESSAGE + 1) * 2)
    assert isinstance(error, qmp.ProtocolError) and error.fatal


def test_nesting_over_the_limit_is_fatal() -> None:
    deep = qmp.MAXIMUM_NESTING
    assert split(b"[" * deep + b"]" * deep) == [b"[" * deep + b"]" * deep]
    (error,) = split(b"[" * 100_000)
    assert isinstance(error, qmp.ProtocolError) and error.fatal


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"garbage", "JSON parse error"),
        (b"5", "must be a JSON object"),
        (b'"abc"', "must be a JSON object"),
        (b"[1]", "must be a JSON object"),
        (b"}", "JSON parse error"),
        (b'{"execute":"a","execute":"b"}', "duplicate key"),
        (b'{"execute":"a","id":NaN}', "invalid keyword"),
        (b'{"execute":"a","id":1e999}', "out of range"),
        (b'{"execute":"a","id":' + b"1" * 9000 + b"}", "JSON parse error"),
        (b'{"execute":"a","zz":1}', "member 'zz' is unexpected"),
        (b'{"execute":5}', "'execute' must be a string"),
        (b'{"id":1}', "lacks member 'execute'"),
        (b'{"execute":"a","arguments":3}', "'arguments' must be an object"),
        (b'{"execute":"\xc3"}', "JSON parse error"),
    ],
)
def test_what_is_no_command_is_an_error(message: bytes, words: str) -> None:
    (cut,) = split(message + b"\n")
    assert isinstance(cut, bytes)
    with pytest.raises(qmp.ProtocolError, match=words):
        qmp.parse_command(cut)


def test_an_id_comes_back_with_an_error_and_null_is_one() -> None:
    with pytest.raises(qmp.ProtocolError) as caught:
        qmp.parse_command(b'{"execute":5,"id":null}')
    assert qmp.failure("x", of=caught.value)["id"] is None
    assert "id" not in qmp.failure("x", of=qmp.parse_command(b'{"execute":"a"}'))


def test_the_timestamp_of_an_event() -> None:
    assert qmp.event("STOP", {}, 12.9999999)["timestamp"] == {"seconds": 13, "microseconds": 0}


# --- the server ---------------------------------------------------------------------------------


class Toy:
    """A served table of commands, at `path`."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = str(path)
        self.peer: Peer | None = None
        self.release = trio.Event()
        self.waiting = 0
        self.dialled: list[trio.SocketStream] = []
        self.server = ControlServer(
            {
                "peer": Verb(self._peer),
                "echo": Verb(
                    lambda arguments, peer: arguments,
                    {"n": Argument(float), "text": Argument(str, optional=True)},
                ),
                "wait": Verb(self._wait),
                "wait-not": Verb(self._wait_not),
                "refuse": Verb(self._refuse),
                "crash": Verb(lambda arguments, peer: arguments["missing"]),
                "unspeakable": Verb(lambda arguments, peer: object()),
                "large": Verb(lambda arguments, peer: "x" * 200_000),
            },
            version="1.2.3",
            limits=limits,
        )

    async def dial(self) -> Raw:
        self.dialled.append(await trio.open_unix_socket(self.path))
        return Raw(self.dialled[-1])

    def _peer(self, arguments: dict[str, Any], peer: Peer) -> dict[str, int]:
        return {"uid": peer.uid, "pid": peer.pid}

    async def _wait(self, arguments: dict[str, Any], peer: Peer) -> str:
        self.waiting += 1
        await self.release.wait()
        return "done"

    def _wait_not(self, arguments: dict[str, Any], peer: Peer) -> None:
        self.waiting += 1

    def _refuse(self, arguments: dict[str, Any], peer: Peer) -> None:
        raise CommandError("not today", "DeviceNotActive")


@asynccontextmanager
async def served(tmp_path: Path, limits: Limits | None = None) -> AsyncIterator[Toy]:
    toy = Toy(tmp_path / "control", limits or Limits())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(toy.path)
        listener.listen(64)
        with trio.fail_after(DEADLINE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(toy.server.serve, listener)
                try:
                    yield toy
                finally:
                    for stream in toy.dialled:
                        await stream.aclose()
                    nursery.cancel_scope.cancel()


class Raw:
    """A client that may misbehave."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._input = b""

    async def message(self) -> dict[str, Any] | None:
        while b"\n" not in self._input:
            data = await self.stream.receive_some(65536)
            if not data:
                return None
            self._input += data
        line, self._input = self._input.split(b"\n", 1)
        value: dict[str, Any] = json.loads(line)
        return value

    async def ask(self, *data: bytes) -> dict[str, Any] | None:
        for chunk in data:
            await self.stream.send_all(chunk)
        return await self.message()


async def raw(toy: Toy) -> Raw:
    result = await toy.dial()
    greeting = await result.message()
    assert greeting is not None and greeting["QMP"]["capabilities"] == []
    assert greeting["QMP"]["version"]["qemu"] == {"major": 1, "minor": 2, "micro": 3}
    return result


async def negotiated(toy: Toy) -> Raw:
    result = await raw(toy)
    assert await result.ask(CAPABILITIES) == {"return": {}}
    return result


def error(message: dict[str, Any] | None) -> tuple[str, str]:
    assert message is not None
    return message["error"]["class"], message["error"]["desc"]


async def test_nothing_works_before_the_negotiation(tmp_path: Path) -> None:
    async with served(tmp_path) as toy:
        peer = await raw(toy)
        for command in (b'{"execute":"peer"}', b'{"execute":"nope"}'):
            cls, desc = error(await peer.ask(command))
            assert cls == "CommandNotFound" and "qmp_capabilities" in desc
        assert error(await peer.ask(b'{"execute":"qmp_capabilities","arguments":{"x":1}}'))
        assert await peer.ask(CAPABILITIES) == {"return": {}}
        assert error(await peer.ask(CAPABILITIES))[0] == "CommandNotFound"
        assert await peer.ask(b'{"execute":"peer","id":[7]}') == {
            "return": {"uid": os.geteuid(), "pid": os.getpid()},
            "id": [7],
        }


async def test_arguments_are_checked_as_declared(tmp_path: Path) -> None:
    async with served(tmp_path) as toy:
        peer = await negotiated(toy)

        async def echo(arguments: dict[str, Any]) -> dict[str, Any]:
            request = {"execute": "echo", "arguments": arguments}
            answer = await peer.ask(json.dumps(request).encode())
            assert answer is not None
            return answer

        assert (await echo({"n": 1, "text": "a"}))["return"] == {"n": 1, "text": "a"}
        assert (await echo({"n": 1.5}))["return"] == {"n": 1.5}
        assert error(await echo({"n": 1, "m": 2}))[1] == "Parameter 'm' is unexpected"
        assert error(await echo({}))[1] == "Parameter 'n' is missing"
        assert "expected: number" in error(await echo({"n": True}))[1]
        assert "expected: string" in error(await echo({"n": 1, "text": None}))[1]


async def test_a_command_that_fails_hurts_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(tmp_path) as toy:
        peer = await negotiated(toy)
        assert error(await peer.ask(b'{"execute":"refuse"}')) == ("DeviceNotActive", "not today")
        for name in (b"crash", b"unspeakable"):
            desc = error(await peer.ask(b'{"execute":"' + name + b'"}'))[1]
            assert "internal error" in desc
        assert error(await peer.ask(b'{"execute":"nope"}'))[0] == "CommandNotFound"
        assert error(await peer.ask(b"garbage\n"))[0] == "GenericError"
        assert await peer.ask(b'{"execute":"query-version"}')
    assert "KeyError" in caplog.text


async def test_a_message_that_is_too_long_ends_the_connection(tmp_path: Path) -> None:
    async with served(tmp_path) as toy:
        peer = await negotiated(toy)
        assert "limit" in error(await peer.ask(b'{"x":"' + b"y" * qmp.MAXIMUM_MESSAGE))[1]
        assert await peer.message() is None
        await negotiated(toy)


async def test_commands_of_one_connection_wait_for_each_other_and_others_do_not(
    tmp_path: Path,
) -> None:
    async with served(tmp_path) as toy:
        waiting, other = await negotiated(toy), await negotiated(toy)
        await waiting.stream.send_all(b'{"execute":"wait"}{"execute":"query-version"}')
        assert await other.ask(b'{"execute":"query-version"}')
        toy.release.set()
        assert await waiting.message() == {"return": "done"}
        assert "return" in (await waiting.message() or {})


async def test_events_go_to_who_has_negotiated(tmp_path: Path) -> None:
    async with served(tmp_path) as toy:
        deaf, listening = await raw(toy), await negotiated(toy)
        toy.server.emit("STOP", {})
        toy.server.emit("BLOCK_IO_ERROR", {"device": "disk.img"})
        first, second = await listening.message(), await listening.message()
        assert first is not None and second is not None
        assert first["event"] == "STOP" and set(first["timestamp"]) == {"seconds", "microseconds"}
        assert second["data"] == {"device": "disk.img"}
        assert await deaf.ask(CAPABILITIES) == {"return": {}}


async def test_one_more_connection_takes_the_place_of_the_longest_idle_one(tmp_path: Path) -> None:
    async with served(tmp_path, Limits(connections=3)) as toy:
        first, silent, second = await negotiated(toy), await raw(toy), await negotiated(toy)
        third = await negotiated(toy)  # who has not negotiated goes first
        assert await silent.message() is None
        assert await first.ask(b'{"execute":"query-version"}')  # idle since now
        await negotiated(toy)
        assert await second.message() is None
        for peer in first, third:
            assert await peer.ask(b'{"execute":"query-version"}')
        assert toy.server.connected == 3


async def test_a_process_with_more_than_its_share_makes_room_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path, Limits(connections=FAIR_SHARE + 2)) as toy:
        pid = 1

        def admit(peer: socket.socket) -> Peer:
            return Peer(0, pid)

        monkeypatch.setattr(toy.server, "_admit", admit)
        honest = [await negotiated(toy), await raw(toy)]
        pid = 2
        for _ in range(3 * FAIR_SHARE):
            await negotiated(toy)
        assert await honest[0].ask(b'{"execute":"query-version"}')
        assert await honest[1].ask(CAPABILITIES) == {"return": {}}
        assert toy.server.connected == FAIR_SHARE + 2


async def test_who_comes_is_not_behind_all_of_a_flood(tmp_path: Path) -> None:
    """How often the loop goes round says it: what there is to do each time is bounded."""
    async with served(tmp_path) as toy:
        deaf = [await negotiated(toy) for _ in range(16)]
        for peer in deaf:
            await peer.stream.send_all(b'{"execute":"wait-not"}' * 100)
        rounds, most, before = 0, 0, toy.waiting

        async def count() -> None:
            nonlocal rounds, most, before
            while True:
                await trio.lowlevel.checkpoint()
                rounds += 1
                most, before = max(most, toy.waiting - before), toy.waiting

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            await until(lambda: toy.waiting > 100)
            came = [socket.socket(socket.AF_UNIX) for _ in range(60)]
            for one in came:
                one.connect(toy.path)  # and are silent
            begun = rounds
            late = await toy.dial()
            assert "QMP" in (await late.message() or {})
            assert rounds - begun < len(came)
            nursery.cancel_scope.cancel()
        for one in came:
            one.close()
        assert most <= 2  # a round may see a piece of its neighbour


async def test_a_command_under_way_is_never_dropped_for_another_connection(tmp_path: Path) -> None:
    async with served(tmp_path, Limits(connections=2)) as toy:
        busy = [await negotiated(toy), await negotiated(toy)]
        for peer in busy:
            await peer.stream.send_all(b'{"execute":"wait"}')
        await until(lambda: toy.waiting == 2)
        refused = await toy.dial()
        assert "all 2 connections have a command under way" in error(await refused.message())[1]
        assert await refused.message() is None

        def refused_client() -> None:
            with pytest.raises(client.CommandFailed, match="under way; try again"):
                client.connect(toy.path, DEADLINE)  # it lives: nobody may take it for dead

        await trio.to_thread.run_sync(refused_client)
        toy.release.set()
        for peer in busy:
            assert await peer.message() == {"return": "done"}
        await negotiated(toy)


async def test_who_reads_no_answer_has_no_command_under_way(tmp_path: Path) -> None:
    async with served(tmp_path, Limits(connections=1, output_messages=1)) as toy:
        deaf = await negotiated(toy)
        await deaf.stream.send_all(b'{"execute":"large"}' * 50)
        assert await (await negotiated(toy)).ask(b'{"execute":"query-version"}')


async def test_who_does_not_negotiate_is_dropped_and_who_has_stays(tmp_path: Path) -> None:
    async with served(tmp_path, Limits(negotiation_seconds=0.3)) as toy:
        early = await negotiated(toy)
        peers = [await raw(toy) for _ in range(5)]
        await peers[0].stream.send_all(b'{"execute":"qmp_capabilities"')  # half a message
        for peer in peers:
            assert await peer.message() is None
        await until(lambda: toy.server.connected == 1)
        assert await early.ask(b'{"execute":"query-version"}')


async def test_a_thousand_connections_fill_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("healfs.control.server.SAID_EVERY", 3600.0)
    async with served(tmp_path, Limits(connections=1)) as toy:
        for _ in range(100):
            await raw(toy)
    assert len(caplog.messages) == 1 and "dropped" in caplog.text


async def until(condition: Callable[[], bool]) -> None:
    """Bounded by the deadline of `served`."""
    while not condition():
        await trio.lowlevel.checkpoint()


async def test_a_client_that_reads_no_events_is_dropped(tmp_path: Path) -> None:
    async with served(tmp_path, Limits(output_messages=8)) as toy:
        slow, good = await negotiated(toy), await negotiated(toy)
        while toy.server.connected == 2:
            toy.server.emit("NOISE", {"x": "y" * 20_000})
            assert (await good.message() or {})["event"] == "NOISE"
        assert await good.ask(b'{"execute":"query-version"}')
        with pytest.raises(trio.BrokenResourceError):
            while await slow.message():
                pass
            raise trio.BrokenResourceError  # an end of file is as good as a reset


async def test_a_client_that_reads_no_replies_is_dropped(tmp_path: Path) -> None:
    async with served(tmp_path, Limits(output_messages=2, send_seconds=0.2)) as toy:
        slow = await negotiated(toy)
        await slow.stream.send_all(b'{"execute":"large"}' * 50)
        await until(lambda: toy.server.connected == 0)


async def test_only_root_and_the_owner_may_connect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path) as toy:
        await negotiated(toy)
        monkeypatch.setattr(toy.server, "_allowed", {os.geteuid() + 1})
        stranger = await toy.dial()
        assert "only root, the owner" in error(await stranger.message())[1]
        assert await stranger.message() is None


# --- the clients --------------------------------------------------------------------------------


async def test_the_client_of_the_cli(tmp_path: Path) -> None:
    async with served(tmp_path) as toy:

        def talk() -> None:
            with client.connect(toy.path, DEADLINE) as connection:
                assert connection.version == "healfs 1.2.3"
                assert connection.execute("echo", {"n": 1}) == {"n": 1}
                with pytest.raises(client.CommandFailed, match="not today") as caught:
                    connection.execute("refuse")
                assert caught.value.cls == "DeviceNotActive"
                trio.from_thread.run_sync(toy.server.emit, "OTHER", {})
                trio.from_thread.run_sync(toy.server.emit, "STOP", {"a": 1})
                assert len(connection.execute("large")) == 200_000
                assert connection.wait_event("STOP", timeout=DEADLINE)["data"] == {"a": 1}
                with pytest.raises(client.ControlError, match="does not answer"):
                    connection.wait_event("NEVER", timeout=0.01)
                with pytest.raises(client.ControlError, match="does not answer"):
                    connection.execute("wait", timeout=0.01)

        await trio.to_thread.run_sync(talk)


def test_a_daemon_that_is_gone_or_hangs(tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    with pytest.raises(client.ControlError, match="gone"):
        client.connect(path, 1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        with pytest.raises(client.ControlError, match="gone"):
            client.connect(path, 1)
        listener.listen(0)
        with pytest.raises(client.ControlError, match="does not answer"):
            client.connect(path, 0.05)
        with pytest.raises(client.ControlError, match="does not answer"):
            client.connect(path, 0.05)  # the backlog may be full now: as good as no answer
        listener.close()


async def test_the_timeout_is_for_the_whole_conversation(tmp_path: Path) -> None:
    async with served(tmp_path) as toy:

        def talk() -> None:
            with client.connect(toy.path, 3) as connection:
                with pytest.raises(client.ControlError, match="does not answer"):
                    connection.execute("wait")
                assert connection.left == 0
                begun = time.monotonic()
                with pytest.raises(client.ControlError, match="does not answer"):
                    connection.execute("wait")
                assert time.monotonic() - begun < 3

        await trio.to_thread.run_sync(talk)


async def test_qemus_own_client(tmp_path: Path) -> None:
    async def talk(emit: Callable[[], None], path: str) -> None:
        qemu = QMPClient("test")
        await qemu.connect(path)
        try:
            commands: Any = await qemu.execute("query-commands")
            assert {"name": "query-version"} in commands
            assert await qemu.execute("echo", {"n": 2}) == {"n": 2}
            with pytest.raises(ExecuteError, match="has not been found"):
                await qemu.execute("nope")
            with qemu.listener(("STOP", "RESUME")) as listener:
                emit()
                assert (await listener.get())["event"] == "STOP"
                assert (await listener.get())["data"] == {"a": 1}
        finally:
            await qemu.disconnect()

    async with served(tmp_path) as toy:

        def events() -> None:
            trio.from_thread.run_sync(toy.server.emit, "STOP", {})
            trio.from_thread.run_sync(toy.server.emit, "RESUME", {"a": 1})

        await trio.to_thread.run_sync(
            lambda: asyncio.run(asyncio.wait_for(talk(events, toy.path), DEADLINE))
        )
