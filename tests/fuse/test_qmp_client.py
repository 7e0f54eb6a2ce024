"""QEMU's own QMP client, from PyPI, on the control socket of a real mount."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from tests.backends.nbd_servers import NbdServer
from tests.conftest import Mounter
from tests.fuse.agent import Agent
from tests.fuse.conftest import Opener

DEADLINE = 240


async def _talk(path: str, server: NbdServer, writer: Agent) -> None:
    qemu = QMPClient("test")
    await qemu.connect(path)
    try:
        [block] = await _execute(qemu, "query-block")
        assert block["io-status"] == "ok" and block["inserted"]["image"]["format"] == "raw"
        with pytest.raises(ExecuteError, match="has not been found"):
            await qemu.execute("nope")
        with qemu.listener(("STOP", "RESUME")) as listener:
            await qemu.execute("stop")
            assert (await listener.get())["event"] == "STOP"
            assert (await _execute(qemu, "query-status"))["status"] == "paused"
            await qemu.execute("cont")
            assert (await listener.get())["event"] == "RESUME"
            assert (await _execute(qemu, "query-status"))["running"] is True
        with qemu.listener(("BLOCK_IO_ERROR", "HEALFS_RECOVERED")) as listener:
            server.kill()
            writer.ask("pwrite", 0, b"A" * 4096)
            error: Any = await listener.get()
            assert error["event"] == "BLOCK_IO_ERROR"
            assert error["data"].keys() >= {"device", "operation", "action", "nospace", "reason"}
            assert error["data"]["action"] == "retry"
            server.start()
            recovered: Any = await listener.get()
            assert recovered["event"] == "HEALFS_RECOVERED" and recovered["data"]["seconds"] > 0
            assert writer.answer().errno == 0
            assert listener.empty()  # one of each: never one a retry
        [stats] = await _execute(qemu, "query-blockstats")
        assert stats["stats"]["wr_operations"] == 1 and stats["stats"]["wr_bytes"] == 4096
    finally:
        await qemu.disconnect()


async def _execute(qemu: QMPClient, command: str) -> Any:
    return await qemu.execute(command)


def test_qemus_own_client_on_a_mount(
    server: NbdServer, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri())
    writer = agent(mount.file)
    path = mount.status()["control"]
    asyncio.run(asyncio.wait_for(_talk(path, server, writer), DEADLINE))
