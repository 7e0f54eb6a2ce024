"""What healfs attach prints, taken by QEMU, paused, and by libvirt's own schema."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import pytest

from healfs.control.client import Client, ControlError, connect
from tests.backends.nbd_servers import nbdkit, wait_until
from tests.conftest import Mounter
from tests.mounts import HealfsMount

Bus = Literal["virtio", "scsi"]
SIZE = 64 << 20
# What a shell, a QEMU option and XML take for something else.
NAME = "a <disk>, 'mine' & yours.img"

DOMAIN = """<domain type='qemu'>
  <name>vm1</name>
  <memory unit='MiB'>256</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
{disk}
    <controller type='scsi' model='virtio-scsi'/>
  </devices>
</domain>
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.touch()
    os.truncate(path, SIZE)
    return path


def attach(mount: HealfsMount, *options: str) -> str:
    return mount.run("attach", str(mount.mountpoint), *options).stdout


def command(printed: str) -> list[str]:
    """A shell's work: what is printed is pasted into a command line."""
    machine = "-accel tcg -M q35 -m 64M -nodefaults -no-user-config -display none -S"
    return ["sh", "-c", f'exec qemu-system-x86_64 {machine} "$@" {printed}', "sh"]


def answers(monitor: Path) -> bool:
    """A socket has its name (bind) before anybody answers there (listen)."""
    try:
        connect(str(monitor), 180).close()
    except ControlError:
        return False
    return True


@contextlib.contextmanager
def qemu(printed: str, directory: Path) -> Iterator[Client]:
    """QEMU with these arguments, paused before its first instruction; its monitor."""
    monitor = directory / "qmp"
    monitor.unlink(missing_ok=True)
    arguments = [*command(printed), "-qmp", f"unix:{monitor},server=on,wait=off"]
    process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *arguments])
    try:
        wait_until(lambda: answers(monitor) or process.poll() is not None, "QEMU's monitor", 180)
        assert process.poll() is None, "QEMU did not take the arguments"
        with connect(str(monitor), 180) as client:
            yield client
    finally:
        process.kill()
        process.wait(120)


def device_property(client: Client, device: str, name: str) -> object:
    return client.execute("qom-get", {"path": f"/machine/peripheral/{device}", "property": name})


@pytest.mark.parametrize("bus", ["virtio", "scsi"])
def test_qemu_takes_the_arguments(
    healfs_mount: Mounter, image: Path, tmp_path: Path, bus: Bus
) -> None:
    mount = healfs_mount(image, name=NAME)
    printed = attach(mount, "--qemu", "--bus", bus)
    with qemu(printed, tmp_path) as monitor:
        [disk] = monitor.execute("query-block")
        inserted = disk["inserted"]
        node = inserted["node-name"]
        assert (inserted["drv"], inserted["file"]) == ("file", str(mount.file))
        assert inserted["image"]["virtual-size"] == SIZE
        assert not inserted["ro"]
        assert inserted["cache"] == {"writeback": True, "direct": False, "no-flush": False}
        assert inserted["detect_zeroes"] == "off"
        assert node in disk["qdev"].split("/")
        driver = {"virtio": "virtio-blk-pci", "scsi": "scsi-hd"}[bus]
        assert device_property(monitor, node, "type") == driver
        assert device_property(monitor, node, "serial") == node and len(node) <= 20
        for direction in ("rerror", "werror"):
            assert device_property(monitor, node, direction) == "report"
        assert device_property(monitor, node, "physical_block_size") == 512
        controller = node if bus == "virtio" else f"{node}-bus"
        assert device_property(monitor, controller, "iothread") == f"/objects/{node}"


def test_the_serial_number_is_the_sources(healfs_mount: Mounter, image: Path) -> None:
    """Not the mountpoint's, and not another's."""
    other = image.with_name("other")
    other.touch()
    os.truncate(other, SIZE)
    printed = []
    for source in (image, image, other):
        mount = healfs_mount(source)
        arguments = attach(mount)
        # Without a quote in it, it can be used as $(healfs attach ...) as well.
        assert shlex.split(arguments) == arguments.split()
        printed.append(arguments.partition("serial=")[2].partition(",")[0])
        mount.umount()
    assert printed[0] == printed[1] != printed[2]


def test_a_second_qemu_is_refused_until_the_first_is_gone(
    healfs_mount: Mounter, image: Path, tmp_path: Path
) -> None:
    """QEMU's own lock, on the file in the mount; kill -9 leaves none behind."""
    printed = attach(healfs_mount(image))
    with qemu(printed, tmp_path):
        done = subprocess.run(command(printed), capture_output=True, text=True, timeout=180)
        assert done.returncode == 1 and 'Failed to get "write" lock' in done.stderr
    with qemu(printed, tmp_path):
        pass


def test_a_read_only_disk(healfs_mount: Mounter, image: Path, tmp_path: Path) -> None:
    mount = healfs_mount(image, "--read-only")
    for bus in ("virtio", "scsi"):
        with qemu(attach(mount, "--bus", bus), tmp_path) as monitor:
            assert monitor.execute("query-block")[0]["inserted"]["ro"] is True
    element = attach(mount, "--libvirt")
    assert "<readonly />" in element
    assert_valid(element, tmp_path)


def test_a_backend_with_large_blocks(healfs_mount: Mounter, image: Path, tmp_path: Path) -> None:
    policy = ("--filter=blocksize-policy", "file", str(image), "blocksize-minimum=4096")
    with nbdkit(*policy, "blocksize-preferred=4096", "blocksize-maximum=1M") as server:
        mount = healfs_mount(server.uri(), "--device", "scsi")
        assert mount.status()["minimum_block"] == 4096
        # The bus is that of the kind of disk that was mounted.
        with qemu(attach(mount), tmp_path) as monitor:
            node = monitor.execute("query-block")[0]["inserted"]["node-name"]
            assert device_property(monitor, node, "type") == "scsi-hd"
            assert device_property(monitor, node, "physical_block_size") == 4096
            assert device_property(monitor, node, "logical_block_size") == 512
        assert_valid(attach(mount, "--libvirt"), tmp_path)
        mount.umount()


def test_requests_come_as_they_are_and_no_cache_is_between(
    healfs_mount: Mounter, image: Path
) -> None:
    """512 bytes are one request of 512 bytes, each time anew; a flush is a flush."""
    mount = healfs_mount(image)
    node = shlex.split(attach(mount))[1]
    before = mount.status()["totals"]
    commands = ("read 512 512", "read 512 512", "write 1536 512", "flush", "discard 8192 4096")
    options = [word for command in commands for word in ("-c", command)]
    subprocess.run(
        ["qemu-io", "-t", "writeback", "-d", "unmap", *options, "--image-opts", node],
        check=True,
        timeout=180,
        stdout=subprocess.DEVNULL,
    )
    now = mount.status()["totals"]
    done = {
        kind: tuple(now[kind][key] - before[kind][key] for key in ("requests", "bytes"))
        for kind in ("read", "write", "write_zeroes")
    }
    assert done == {"read": (2, 1024), "write": (1, 512), "write_zeroes": (1, 4096)}
    assert now["flush"]["requests"] > before["flush"]["requests"]


def validate(element: str, directory: Path) -> subprocess.CompletedProcess[str]:
    domain = directory / "domain.xml"
    domain.write_text(DOMAIN.format(disk=element))
    return subprocess.run(
        ["virt-xml-validate", domain, "domain"], capture_output=True, text=True, timeout=180
    )


def assert_valid(element: str, directory: Path) -> None:
    done = validate(element, directory)
    assert done.returncode == 0, done.stderr


def test_libvirts_schema_takes_the_element(
    healfs_mount: Mounter, image: Path, tmp_path: Path
) -> None:
    mount = healfs_mount(image, "--allow-other", name=NAME)
    for bus in ("virtio", "scsi"):
        element = attach(mount, "--libvirt", "--bus", bus)
        assert_valid(element, tmp_path)
        assert validate(element.replace('"threads"', '"thread"'), tmp_path).returncode != 0
        disk = ElementTree.fromstring(element)
        assert disk.find("source").get("file") == str(mount.file)  # type: ignore[union-attr]


def test_libvirts_user_is_thought_of(healfs_mount: Mounter, image: Path) -> None:
    for options, said in (((), "--allow-other"), (("--allow-other",), "")):
        mount = healfs_mount(image, *options)
        done = mount.run("attach", str(mount.file), "--libvirt")
        assert said in done.stderr and bool(said) == bool(done.stderr)
        mount.umount()
