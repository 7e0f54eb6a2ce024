"""NBD over TLS, against nbdkit and qemu-nbd, with certificates made here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.backends.certificates import Authority
from tests.backends.nbd_disk import MIB, connected, pattern, read, write
from tests.backends.nbd_servers import NbdServer, nbdkit, qemu_nbd

SIZE = 16 * MIB


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "right")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def nbdkit_tls(image: Path, own: Path, *more: str, tcp: bool, tls: Path | None) -> NbdServer:
    arguments = ("--tls=require", f"--tls-certificates={own}", *more, "file", str(image))
    return nbdkit(*arguments, tcp=tcp, tls=tls)


def qemu_tls(image: Path, own: Path, *more: str, tcp: bool, tls: Path | None) -> NbdServer:
    verify = "yes" if more else "no"
    credentials = f"tls-creds-x509,id=tls0,dir={own},endpoint=server,verify-peer={verify}"
    return qemu_nbd(image, "--object", credentials, "--tls-creds", "tls0", tcp=tcp, tls=tls)


Serve = Callable[..., NbdServer]
both = pytest.mark.parametrize("serve", [nbdkit_tls, qemu_tls])


@both
@pytest.mark.parametrize("tcp", [False, True])
async def test_what_was_written_is_read(
    authority: Authority, image: Path, tmp_path: Path, serve: Serve, tcp: bool
) -> None:
    """Both servers, both kinds of socket, large and many requests, sizes around a record's."""
    own = authority.directory(f"{tmp_path.name}-own", "server")
    mine = authority.directory(f"{tmp_path.name}-mine")
    with serve(image, own, tcp=tcp, tls=mine) as server:
        async with connected(server.uri()) as disk:
            tls = disk.geometry.tls
            assert tls["version"] == "TLSv1.3" and "GCM" in tls["cipher"]
            assert tls["peer"] == ("127.0.0.1" if tcp else "a server")
            data = pattern(SIZE)
            await disk.ok(*(write(i * MIB, data[i * MIB : (i + 1) * MIB]) for i in range(16)))
            assert await disk.ok(read(0, SIZE)) == data
            small = [write(i * 4096, pattern(4096, i)) for i in range(500)]
            await disk.ok(*small)
            reads = await disk.do(*(read(i * 4096, 4096) for i in range(500)))
            assert reads == [(0, pattern(4096, i)) for i in range(500)]
            for length in (1, 16383, 16384, 16385, 65536 - 28, 300_001):
                await disk.ok(write(7, pattern(length)))
                assert await disk.ok(read(7, length)) == pattern(length)
