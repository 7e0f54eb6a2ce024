"""Disks on NBD over TLS: what is verified, what is refused, and how certificates heal."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from tests.backends.certificates import Authority
from tests.backends.nbd_servers import NbdServer, nbdkit, wait_until
from tests.conftest import Mounter
from tests.fuse.commands import Commands
from tests.fuse.conftest import Opener
from tests.fuse.control import control
from tests.fuse.test_verify import through_outages


@pytest.fixture
def own(authority: Authority, tmp_path: Path) -> Path:
    """The directory of the server's certificate, and of a client's."""
    return authority.directory(tmp_path.name, "server", "client")


def served(path: Path, own: Path, *options: str, tls: str = "require") -> NbdServer:
    secret = (f"--tls={tls}", f"--tls-certificates={own}")
    return nbdkit(*secret, *options, "file", str(path), tcp=True, tls=own)


def test_fio_verifies_through_two_outages(tmp_path: Path, healfs_mount: Mounter, own: Path) -> None:
    through_outages(tmp_path, healfs_mount, lambda path: served(path, own), 2, 64)


def test_status_shows_tls(image: Path, own: Path, healfs_mount: Mounter) -> None:
    with served(image, own) as server:
        mount = healfs_mount(server.uri() + "&tls-hostname=localhost")
        tls = mount.status()["tls"]
        assert tls["version"] == "TLSv1.3" and tls["peer"] == "localhost"
        line = f"tls         TLSv1.3, {tls['cipher']}, peer: localhost"
        assert line.split() in [
            row.split() for row in mount.run("status", str(mount.mountpoint)).stdout.splitlines()
        ]
        assert not mount.status()["notes"]
        mount.umount()
        mount = healfs_mount(server.uri() + "&tls-verify-peer=0")
        assert mount.status()["tls"]["peer"] == "not checked"
        assert any("tls-verify-peer=0" in note for note in mount.status()["notes"])


def test_without_tls_status_says_null(server: NbdServer, healfs_mount: Mounter) -> None:
    assert healfs_mount(server.uri()).status()["tls"] is None


def test_an_expired_certificate_is_an_outage_until_it_is_renewed(
    authority: Authority, image: Path, own: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    with served(image, own) as server:
        mount = healfs_mount(server.uri())
        with control(mount) as disk:
            writer = agent(mount.file)
            server.kill()
            authority.issue(own, "server", days=-1)
            server.start()
            writer.ask("pwrite", 0, b"x" * 4096)
            status = disk.until(lambda s: "has expired; renew it" in (s["reason"] or ""))
            assert status["state"] == "stalled"
            disk.parked(1)
            server.kill()
            authority.issue(own, "server")
            server.start()
            assert not writer.answer().errno
            disk.state("ready")
    assert image.read_bytes()[:4096] == b"x" * 4096


def _refused(commands: Commands, source: str, *says: str, status: int = 2) -> None:
    done = commands.mount(source)
    assert (done.returncode, done.stdout) == (status, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("healfs: ") and all(text in line for text in says), line
    commands.nothing_left()


def test_what_does_not_fit_together_is_refused_in_one_line(
    commands: Commands, authority: Authority, image: Path, own: Path, tmp_path: Path
) -> None:
    with served(image, own) as server:
        uri = server.uri()
        plain = uri.replace("nbds", "nbd").partition("?")[0]
        _refused(commands, plain, "demands TLS; write nbds in place of nbd")
        _refused(commands, uri + "&tls-hostname=other", "not for other", "tls-hostname=NAME")
        _refused(commands, uri.partition("?")[0], "not signed by a CA", "tls-certificates=DIR")
        _refused(commands, f"{uri}x", f"{own}x/ca-cert.pem: No such file", "tls-certificates=DIR")
        _refused(commands, uri + "&tls-type=anon", "use x509 or psk")
    with nbdkit("file", str(image), tls=own) as server:
        _refused(commands, server.uri(), "the server offers no TLS", "write nbd in place of nbds")
    authority.issue(own, "server", days=-1)
    with served(image, own) as server:
        _refused(commands, server.uri(), "has expired; renew it")


def test_a_key_is_refused_before_anything_else(commands: Commands, tmp_path: Path) -> None:
    """On this Python; the file is not even looked for, nor the mountpoint."""
    assert platform.python_version_tuple() < ("3", "13")
    os.rmdir(commands.mountpoint)
    source = f"nbds+unix://u@/?socket={tmp_path}/s&tls-psk-file={tmp_path}/none"
    _refused(commands, source, "needs Python 3.13 or later", "tls-certificates=DIR")
    commands.mountpoint.mkdir()


def test_a_missing_client_certificate_is_told_and_waited_for(
    commands: Commands, authority: Authority, image: Path, own: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.symlink_to(authority.directory(f"{tmp_path.name}-before"))
    with served(image, own, "--tls-verify-peer") as server:
        source = server.uri().replace(str(own), str(mine))
        mounting = commands.start("mount", source, commands.mountpoint)
        assert mounting.stderr is not None
        line = mounting.stderr.readline()
        assert line.startswith("healfs: waiting for nbds://")
        assert "client-cert.pem and client-key.pem" in line
        # Both files at once: one without the other is an error.
        (tmp_path / "new").symlink_to(authority.directory(f"{tmp_path.name}-after", "client"))
        (tmp_path / "new").replace(mine)
        out, said = mounting.communicate(timeout=60)
        assert (mounting.returncode, out, said) == (0, f"{commands.file}\n", "")


def test_one_export_is_one_disk_with_tls_and_without(
    commands: Commands, image: Path, own: Path, healfs_mount: Mounter
) -> None:
    with served(image, own, tls="on") as server:
        mount = healfs_mount(server.uri())
        plain = server.uri().replace("nbds", "nbd").partition("?")[0]
        _refused(commands, plain, "in use by another healfs", status=1)
        mount.umount()
        done = commands.mount(plain)
        assert done.returncode == 0, done.stderr
        wait_until(lambda: commands.file.exists(), "the mount")
