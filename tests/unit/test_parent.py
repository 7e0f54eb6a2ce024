"""The worker's end of the socket to its keeper."""

from __future__ import annotations

import json
import socket

import trio
import trio.testing

from healfs.daemon.parent import Parent

DEADLINE = 120.0


async def test_a_request_waits_for_a_keeper_that_does_not_read() -> None:
    """It was frozen, and beats have filled the socket: they may be lost, what is asked may not."""
    keeper, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    keeper.send(b"{}")
    parent = Parent(worker.detach())
    for _ in range(10_000):
        parent.tell({"do": "beat"})
    keeper.setblocking(False)
    with keeper, trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parent.listen)

            async def reading() -> None:
                while True:
                    await trio.lowlevel.wait_readable(keeper)
                    if json.loads(keeper.recv(1 << 16)) == {"do": "umount"}:
                        keeper.send(b'{"ok": true}')
                        return

            nursery.start_soon(parent.ask, {"do": "umount"})
            await trio.testing.wait_all_tasks_blocked()
            await reading()
            keeper.close()
    parent._socket.close()


async def test_who_asks_while_all_ends_ends_too() -> None:
    """Ctrl-C came between a question and its answer: the keeper had to kill the worker."""
    keeper, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    keeper.send(b"{}")
    parent = Parent(worker.detach())
    ended = []
    life = trio.CancelScope()

    async def live() -> None:
        with life:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(parent.listen)
                await parent.ask({"do": "lock"})
        ended.append(life.cancelled_caught)

    with keeper:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(live)
            await trio.testing.wait_all_tasks_blocked()
            life.cancel()
            await trio.testing.wait_all_tasks_blocked()
            by_itself = ended.copy()
            parent._to_reply.close()
    assert by_itself == [True]
    parent._socket.close()
