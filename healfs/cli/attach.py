"""healfs attach: what a virtual machine's configuration says, so that healfs keeps its promises.

The reasons for each word are in healfs-attach(1).
"""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import dataclass
from xml.etree import ElementTree as Xml

import click

from healfs.cli.completion import MOUNTPOINT
from healfs.cli.daemons import connected, find
from healfs.cli.output import bad_input, error_line

_TIMEOUT = 4.0
_SECTOR = 512  # the block size that QEMU and libvirt take for granted
_BUSES = {"virtio-blk": "virtio", "scsi": "scsi"}  # by the device of `healfs mount --device`


@dataclass(frozen=True, slots=True)
class Disk:
    """`name` is the serial number, and the name in QEMU: 19 characters, virtio-blk shows 20."""

    file: str
    name: str
    bus: str
    read_only: bool
    minimum_block: int


@click.command(short_help="Print how a virtual machine attaches the disk.")
@click.argument("mountpoint", type=MOUNTPOINT)
@click.option("--qemu", is_flag=True, help="Print arguments for QEMU (the default).")
@click.option("--libvirt", is_flag=True, help="Print a <disk> element for libvirt.")
@click.option("--bus", type=click.Choice(["virtio", "scsi"]), help="How the guest sees the disk.")
def attach(mountpoint: str, qemu: bool, libvirt: bool, bus: str | None) -> None:
    """Print how a virtual machine attaches the disk at MOUNTPOINT.

    Nothing is changed; it asks the daemon, never the backend.
    """
    if qemu and libvirt:
        bad_input("give one of --qemu and --libvirt, not both")
    mount = find(mountpoint)
    with connected(mount, _TIMEOUT) as client:
        status = client.execute("healfs-query-status")
    if not mount.file.isprintable():
        bad_input(f"{mount.file}: no configuration can name this path; mount it at another")
    values = (status.get("configuration") or {}).get("values", {})
    given = {name: value["value"] for name, value in values.items()}
    disk = Disk(
        file=mount.file,
        name=f"healfs-{hashlib.sha256(os.fsencode(mount.source)).hexdigest()[:12]}",
        bus=bus or _BUSES.get(status.get("device"), "virtio"),
        read_only=given.get("read_only", False),
        minimum_block=status.get("minimum_block") or _SECTOR,
    )
    if not libvirt:
        click.echo(shlex.join(qemu_arguments(disk)))
        return
    if not given.get("allow_other", True):
        error_line(
            f"{mount.mountpoint}: mounted without --allow-other: libvirt's own user cannot open it"
        )
    click.echo(libvirt_element(disk))


def qemu_arguments(disk: Disk) -> list[str]:
    name = disk.name
    node = ["driver=file", f"node-name={name}", f"filename={disk.file.replace(',', ',,')}"]
    node += ["aio=threads", "cache.direct=off", "cache.no-flush=off", "discard=unmap"]
    node += ["read-only=on"] if disk.read_only else []
    device = [f"id={name}", f"drive={name}", f"serial={name}", "werror=report", "rerror=report"]
    if disk.minimum_block > _SECTOR:
        device.append(f"physical_block_size={disk.minimum_block}")
    # A thread of its own for each disk: QEMU has one pool of 64 threads for all disks of a thread,
    # and in an outage the requests that wait take them all.
    if disk.bus == "virtio":
        devices = ["-device", ",".join(["virtio-blk-pci", f"iothread={name}", *device])]
    else:
        devices = ["-device", f"virtio-scsi-pci,id={name}-bus,iothread={name}"]
        devices += ["-device", ",".join(["scsi-hd", f"bus={name}-bus.0", *device])]
    return ["-blockdev", ",".join(node), "-object", f"iothread,id={name}", *devices]


def libvirt_element(disk: Disk) -> str:
    root = Xml.Element("disk", type="file", device="disk")
    driver = {"name": "qemu", "type": "raw", "cache": "writeback", "io": "threads"}
    driver |= {"discard": "unmap", "error_policy": "report", "rerror_policy": "report"}
    Xml.SubElement(root, "driver", driver)
    Xml.SubElement(root, "source", file=disk.file)
    if disk.minimum_block > _SECTOR:
        Xml.SubElement(root, "blockio", physical_block_size=str(disk.minimum_block))
    name = "vda" if disk.bus == "virtio" else "sda"
    Xml.SubElement(root, "target", dev=name, bus=disk.bus)
    if disk.read_only:
        Xml.SubElement(root, "readonly")
    Xml.SubElement(root, "serial").text = disk.name
    Xml.indent(root)
    return Xml.tostring(root, encoding="unicode")
