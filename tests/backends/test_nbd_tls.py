"""NBD over TLS, against nbdkit and qemu-nbd, with certificates made here."""

# Small files on a local disk: the loop may wait for them.

from __future__ import annotations

import errno
import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from healfs.backends import nbd_tls
from healfs.backends.base import SourceError
from healfs.backends.nbd import NbdBackend
from healfs.backends.nbd_uri import NbdUri, Tls
from tests.backends.certificates import Authority
from tests.backends.nbd_disk import DEADLINE, MIB, connected, pattern, read, write
from tests.backends.nbd_servers import NbdServer, nbdkit, qemu_nbd
from tests.mounts import ROOT

SIZE = 16 * MIB
PIECE = 16 << 10  # of many writes


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def own(authority: Authority, tmp_path: Path) -> Path:
    """The server's directory."""
    return authority.directory(f"{tmp_path.name}-own", "server")


@pytest.fixture
def mine(authority: Authority, tmp_path: Path) -> Path:
    """Our directory."""
    return authority.directory(f"{tmp_path.name}-mine")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    """Another CA."""
    return Authority(tmp_path / "stranger")


def nbdkit_tls(
    image: Path, own: Path, tls: Path | None, *, tcp: bool = True, verify: bool = False
) -> NbdServer:
    options = ["--tls=require", f"--tls-certificates={own}"]
    options += ["--tls-verify-peer"] * verify
    return nbdkit(*options, "file", str(image), tcp=tcp, tls=tls)


def qemu_tls(
    image: Path, own: Path, tls: Path | None, *, tcp: bool = True, verify: bool = False
) -> NbdServer:
    peer = "yes" if verify else "no"
    credentials = f"tls-creds-x509,id=tls0,dir={own},endpoint=server,verify-peer={peer}"
    return qemu_nbd(image, "--object", credentials, "--tls-creds", "tls0", tcp=tcp, tls=tls)


Serve = Callable[..., NbdServer]
both = pytest.mark.parametrize("serve", [nbdkit_tls, qemu_tls])


async def failure(source: str | NbdBackend) -> OSError:
    backend = NbdBackend(source) if isinstance(source, str) else source
    with trio.fail_after(DEADLINE), pytest.raises(OSError) as caught:
        await backend.connect()
    assert "\n" not in str(caught.value)
    return caught.value


async def refusal(source: str) -> str:
    """The line of a source that no waiting mends."""
    error = await failure(source)
    assert isinstance(error, SourceError), repr(error)
    return str(error)


@both
@pytest.mark.parametrize("tcp", [False, True])
async def test_what_was_written_is_read(
    image: Path, own: Path, mine: Path, serve: Serve, tcp: bool
) -> None:
    """Both servers, both kinds of socket, large and many requests, sizes around a record's."""
    with serve(image, own, mine, tcp=tcp) as server:
        async with connected(server.uri()) as disk:
            tls = disk.geometry.tls
            assert tls["version"] == "TLSv1.3" and "GCM" in tls["cipher"]
            assert tls["peer"] == ("127.0.0.1" if tcp else "a server")
            assert any("any server" in note for note in disk.geometry.notes) is not tcp
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


# --- who the server is ---------------------------------------------------------------------------


@both
async def test_the_name_has_to_be_in_the_certificate(
    authority: Authority, image: Path, own: Path, mine: Path, serve: Serve
) -> None:
    authority.issue(own, "server", "subjectAltName=DNS:storage.example,IP:192.0.2.1")
    with serve(image, own, mine) as server:
        said = await refusal(server.uri())
        assert "not for 127.0.0.1" in said and "tls-hostname=" in said
        assert "not for other.example" in await refusal(
            server.uri() + "&tls-hostname=other.example"
        )
        for name in ("storage.example", "192.0.2.1"):
            async with connected(server.uri() + f"&tls-hostname={name}") as disk:
                assert disk.geometry.tls["peer"] == name and not disk.geometry.notes


@both
async def test_the_name_of_a_unix_socket_is_checked_where_one_is_given(
    image: Path, own: Path, mine: Path, serve: Serve
) -> None:
    with serve(image, own, mine, tcp=False) as server:
        async with connected(server.uri() + "&tls-hostname=localhost") as disk:
            assert disk.geometry.tls["peer"] == "localhost" and not disk.geometry.notes
        assert "not for other" in await refusal(server.uri() + "&tls-hostname=other")


@both
async def test_the_ca_has_to_be_ours(
    stranger: Authority, image: Path, own: Path, serve: Serve
) -> None:
    theirs = stranger.directory("theirs")
    for tcp in (True, False):
        with serve(image, own, theirs, tcp=tcp) as server:
            said = await refusal(server.uri())
            assert "not signed by a CA" in said and f"{theirs}/ca-cert.pem" in said
            async with connected(server.uri() + "&tls-verify-peer=0") as disk:
                assert disk.geometry.tls["peer"] == "not checked"
                assert any("tls-verify-peer=0" in note for note in disk.geometry.notes)


async def test_the_system_s_cas_do_not_know_ours(
    image: Path, own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(nbd_tls, "default_directories", lambda: (str(tmp_path / "none"),))
    with nbdkit_tls(image, own, None) as server:
        said = await refusal(server.uri().replace("nbd:", "nbds:"))
        assert "not signed by a CA" in said and f"{tmp_path}/none/ca-cert.pem" in said
    said = await refusal(f"nbds+unix:///?socket={tmp_path}/none.sock")
    assert "tls-hostname=" in said and "tls-certificates=" in said


async def test_certificates_are_looked_for_where_libnbd_does(
    image: Path, own: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nbd_tls.default_directories() == ("/etc/pki/libnbd",)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", str(mine.parent))
    pki = (f"{mine.parent}/.pki/libnbd", f"{mine.parent}/.config/pki/libnbd")
    assert nbd_tls.default_directories() == pki
    with nbdkit_tls(image, own, None) as server:
        source = server.uri().replace("nbd:", "nbds:")
        await refusal(source)
        for place in map(Path, reversed(pki)):
            shutil.copytree(mine, place)
            try:
                async with connected(source):
                    pass
            finally:
                shutil.rmtree(place)


async def test_an_expired_certificate_is_refused_at_first_and_an_outage_later(
    authority: Authority, image: Path, own: Path, mine: Path
) -> None:
    """The same backend: the server's certificate expires, and is renewed. (qemu-nbd does not even
    start with one that has expired.)"""
    with nbdkit_tls(image, own, mine) as server:
        backend = NbdBackend(server.uri())
        async with connected(backend):
            server.kill()
        authority.issue(own, "server", days=-1)
        server.start()
        error = await failure(backend)
        assert not isinstance(error, SourceError) and "has expired; renew it" in str(error)
        assert "has expired; renew it" in await refusal(server.uri())
        server.kill()
        authority.issue(own, "server")
        server.start()
        async with connected(backend) as disk:
            await disk.ok(read(0, 4096))


async def test_a_revoked_certificate_is_refused(
    authority: Authority, image: Path, own: Path, mine: Path
) -> None:
    with nbdkit_tls(image, own, mine) as server:
        authority.revoke(mine)
        async with connected(server.uri()):
            pass
        authority.revoke(mine, own / "server-cert.pem")
        assert "was revoked" in await refusal(server.uri())


# --- who we are ----------------------------------------------------------------------------------


@both
async def test_a_server_that_wants_to_know_us(
    authority: Authority, stranger: Authority, image: Path, own: Path, mine: Path, serve: Serve
) -> None:
    """Neither server says why: the line tells what may be wrong. It is mended on disk, and the
    next attempt of the same backend has it."""
    with serve(image, own, mine, verify=True) as server:
        backend = NbdBackend(server.uri())
        stranger.issue(mine, "client")
        for _ in range(2):
            error = await failure(backend)
            assert error.errno == errno.ECONNRESET and not isinstance(error, SourceError)
            assert "client-cert.pem and client-key.pem" in str(error)
            (mine / "client-cert.pem").unlink(missing_ok=True)
            (mine / "client-key.pem").unlink(missing_ok=True)
        authority.issue(mine, "client")
        async with connected(backend) as disk:
            await disk.ok(write(0, pattern(4096)))


Spoil = Callable[[Path], object]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: (d / "ca-cert.pem").unlink(), "ca-cert.pem: No such file"),
        (lambda d: (d / "ca-cert.pem").write_text("x"), "ca-cert.pem: no PEM"),
        (lambda d: (d / "client-key.pem").unlink(), "client-key.pem: No such file"),
        (lambda d: (d / "client-cert.pem").unlink(), "client-cert.pem: No such file"),
        (lambda d: (d / "client-cert.pem").write_text(""), "client-cert.pem and"),
        (lambda d: shutil.copy(d / "ca-cert.pem", d / "client-cert.pem"), "mismatch"),
        (lambda d: (d / "ca-crl.pem").mkdir(), "ca-crl.pem: Is a directory"),
        (lambda d: shutil.rmtree(d), "ca-cert.pem: No such file"),
    ],
)
async def test_our_own_files_are_wrong_before_the_server_is_asked(
    authority: Authority, tmp_path: Path, spoil: Spoil, says: str
) -> None:
    directory = authority.directory(tmp_path.name, "client")
    spoil(directory)
    # Nobody listens there: an absent server would be waited for.
    source = f"nbds+unix:///?socket={tmp_path}/none.sock&tls-certificates={directory}"
    assert says in await refusal(source)


@pytest.fixture
def encrypted(authority: Authority, mine: Path) -> Path:
    """Our directory, with a key that has a pass phrase."""
    authority.issue(mine, "client")
    key = mine / "client-key.pem"
    command = ("openssl", "pkey", "-in", key, "-aes128", "-passout", "pass:x", "-out", f"{key}.new")
    subprocess.run(command, check=True, timeout=60)
    Path(f"{key}.new").replace(key)
    return mine


async def test_an_encrypted_key_is_not_asked_for(encrypted: Path) -> None:
    assert "is encrypted" in await refusal(f"nbds://127.0.0.1:1/?tls-certificates={encrypted}")


# --- no TLS --------------------------------------------------------------------------------------


@both
async def test_a_server_that_demands_tls(image: Path, own: Path, mine: Path, serve: Serve) -> None:
    with serve(image, own, None) as server:
        assert "write nbds in place of nbd" in await refusal(server.uri())


def plain_nbdkit(image: Path, tls: Path) -> NbdServer:
    return nbdkit("file", str(image), tls=tls)


def plain_qemu(image: Path, tls: Path) -> NbdServer:
    return qemu_nbd(image, tcp=True, tls=tls)


@pytest.mark.parametrize("serve", [plain_nbdkit, plain_qemu])
async def test_a_server_without_tls(image: Path, mine: Path, serve: Serve) -> None:
    with serve(image, mine) as server:
        assert "the server offers no TLS" in await refusal(server.uri())


@pytest.mark.parametrize("pause", [False, True])
async def test_what_somebody_puts_before_tls_is_not_believed(mine: Path, pause: bool) -> None:
    """In one piece with the server's answer, or after it: the client gives up, and has said no
    more than that it wants TLS."""
    listener = socket.create_server(("127.0.0.1", 0))
    injected = b"\0\3\xe8\x89\4Ue\xa9" + bytes([0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0])
    heard = bytearray()

    async def serve() -> None:
        with trio.socket.from_stdlib_socket(listener) as listening:
            sock, _ = await listening.accept()
            with sock:
                await sock.send(b"NBDMAGICIHAVEOPT\0\3")
                while len(heard) < 20:
                    heard.extend(await sock.recv(100))
                answer = injected[:8] + bytes([0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 0])
                await sock.send(answer if pause else answer + injected)
                if pause:
                    heard.extend(await sock.recv(1))  # the TLS handshake has begun
                    await sock.send(injected)
                while data := await sock.recv(1000):
                    heard.extend(data)

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            port = listener.getsockname()[1]
            said = await refusal(f"nbds://127.0.0.1:{port}/d?tls-certificates={mine}")
    assert ("TLS failed" if pause else "data before TLS") in said
    assert heard[:20] == b"\0\0\0\3IHAVEOPT\0\0\0\5\0\0\0\0"
    assert b"IHAVEOPT" not in heard[20:]


# --- the connection ------------------------------------------------------------------------------


@both
async def test_kill_in_flight_is_lost_and_what_was_handed_over_is_known(
    image: Path, own: Path, mine: Path, serve: Serve
) -> None:
    with serve(image, own, mine) as server:
        backend = NbdBackend(server.uri())
        async with connected(backend) as disk:
            await disk.ok(write(0, pattern(4096)))
            server.pause()
            data = pattern(PIECE)
            writes = [write(i % 1000 * PIECE, data) for i in range(3000)]
            link = backend._link
            assert link is not None and link.tls is not None
            before = link.protocol.sent
            for request in writes:
                backend.submit(request, lambda *_: None)
            backend.commit()
            handed = link.tls.handed
            assert handed > 2 * PIECE
            begun = -(-(link.protocol.sent - before + handed) // (28 + PIECE))
            server.kill()
            await disk.ended.wait()
            assert disk.lost is not None and disk.lost.errno in (errno.ECONNRESET, errno.EPIPE)
            assert begun < len(writes)
            assert [write for write in writes if backend.taken(write)] == writes[:begun]
        server.start()
        async with connected(backend) as disk:
            await disk.ok(write(4096, pattern(4096, 2)))
            assert await disk.ok(read(0, 8192)) == pattern(4096) + pattern(4096, 2)


# --- keys ----------------------------------------------------------------------------------------

NEWER = Path.home() / ".pyenv/versions/3.13.0/bin/python"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.psk"
    path.write_text("bob:00\nalice:" + "0123456789abcdef" * 4 + "\nmallory:nothex\nempty:\n")
    return path


def test_a_key_never_lets_a_certificate_do(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python 3.13 is told, on any Python: nobody checks certificates, so none may be used."""
    given: list[Callable[[str | None], tuple[str | None, bytes]]] = []
    monkeypatch.setattr(
        ssl.SSLContext,
        "set_psk_client_callback",
        lambda self, callback: given.append(callback),
        raising=False,
    )
    uri = NbdUri("", "h", tls=Tls("h", psk_file=str(keys), username="alice"))
    context = nbd_tls.credentials(uri)
    assert given[0]("hint") == ("alice", bytes.fromhex("0123456789abcdef" * 4))
    assert context.maximum_version == ssl.TLSVersion.TLSv1_2
    old = [cipher for cipher in context.get_ciphers() if cipher["protocol"] != "TLSv1.3"]
    assert old
    assert all("PSK" in cipher["name"] and "NULL" not in cipher["name"] for cipher in old)


@pytest.mark.parametrize(
    ("name", "says"),
    [("carol", "no key of user 'carol'"), ("mallory", "not hexadecimal"), ("empty", "not hexa")],
)
def test_a_key_that_is_none(keys: Path, name: str, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        nbd_tls.credentials(NbdUri("", "h", tls=Tls(psk_file=str(keys), username=name)))
    with pytest.raises(SourceError, match="No such file"):
        nbd_tls.credentials(NbdUri("", "h", tls=Tls(psk_file=f"{keys}.none", username=name)))


def test_a_key_of_a_user_without_a_name(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4294960001)  # in no passwd(5)
    with pytest.raises(SourceError, match="uid 4294960001 has no name; nbds://USER@HOST/"):
        nbd_tls.credentials(NbdUri("", "h", tls=Tls(psk_file=str(keys))))


_WITH_A_KEY = """
import sys, trio
from healfs.backends.nbd import NbdBackend

async def main():
    with trio.fail_after(60):
        geometry = await NbdBackend(sys.argv[1]).connect()
    print(geometry.size, geometry.tls)

try:
    trio.run(main)
except OSError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(not NEWER.exists(), reason="needs Python 3.13, of pyenv")
def test_a_key_opens_nbdkit_with_a_newer_python(keys: Path) -> None:
    # What trio needs is plain Python; this interpreter's own library must not come with it.
    packages = [path for path in sys.path if path.endswith("-packages")]
    path = ":".join([str(ROOT), *packages])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}

    def run(source: str) -> str:
        command = [NEWER, "-c", _WITH_A_KEY, source]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=180, check=True
        ).stdout

    with nbdkit("--tls=require", f"--tls-psk={keys}", "memory", "1M", tcp=True) as server:
        source = server.uri().replace("nbd://", "nbds://{}@") + "?tls-psk-file=" + str(keys)
        said = run(source.format("alice"))
        assert said.startswith(f"{MIB} ") and "PSK" in said and "TLSv1.2" in said
        wrong = keys.with_name("wrong")
        wrong.write_text("alice:" + "ff" * 32)
        said = run(source.format("alice").replace(str(keys), str(wrong)))
        assert "Error" in said and said.count("\n") == 1
