"""The guest's kernel and initramfs, made once from Debian packages and kept in a cache.

Nothing is installed and /boot is not touched: the kernel package is downloaded and
unpacked into ~/.cache/healfs (or $HEALFS_TEST_CACHE).

`python -m tests.vm.image DIRECTORY` lays those of README.md there: vmlinuz and initrd.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

INIT = Path(__file__).with_name("init")
README_INIT = Path(__file__).with_name("init-readme")
META_PACKAGE = "linux-image-cloud-amd64"
MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "ext4")
PROGRAMS = ("/usr/sbin/mkfs.ext4", "/usr/sbin/e2fsck")
BUSYBOX = Path("/bin/busybox")


class Image(NamedTuple):
    kernel: Path
    initrd: Path


def image(init: Path = INIT) -> Image:
    """The guest's kernel and initramfs; built if the cache has none for these versions.

    Raises RuntimeError when there is neither a package to download nor a kernel in
    the cache, subprocess.CalledProcessError when a tool fails.
    """
    cache = Path(os.environ.get("HEALFS_TEST_CACHE", "~/.cache/healfs")).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        # apt-get update refuses to run beside another, and once is enough.
        fcntl.flock(lock, fcntl.LOCK_EX)
        tree = _kernel_tree(cache)
        kernel = next(tree.glob("boot/vmlinuz-*"))
        initrd = cache / f"initrd-{_initrd_key(kernel, init)}.gz"
        if not initrd.exists():
            _build_initrd(tree, kernel.name.removeprefix("vmlinuz-"), init, initrd)
    return Image(kernel, initrd)


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, check=True, timeout=900, text=True, stdout=subprocess.PIPE
    )
    return done.stdout


def _candidate() -> str | None:
    """package=version of the kernel that the meta package stands for now."""
    if (shown := _run("apt-cache", "show", "--no-all-versions", META_PACKAGE)) and (
        found := re.search(r"^Depends: (linux-image-\S+) \(= (\S+)\)", shown, re.MULTILINE)
    ):
        return f"{found[1]}={found[2]}"
    return None


def _kernel_tree(cache: Path) -> Path:
    try:
        package = _candidate()
    except subprocess.CalledProcessError:
        package = None
    if package and (tree := cache / package).exists():
        return tree
    try:
        return _unpack(package, cache)
    except (subprocess.CalledProcessError, RuntimeError):
        # Offline, or the archive has moved on: an older kernel is as good a guest.
        if older := sorted(cache.glob("linux-image-*=*")):
            return older[-1]
        raise


def _unpack(package: str | None, cache: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        try:
            if package is None:
                raise RuntimeError(f"apt knows no {META_PACKAGE}: run apt-get update")
            _download(package, Path(scratch))
        except (subprocess.CalledProcessError, RuntimeError):
            # Lists that are absent or older than the archive.
            if os.geteuid() != 0:
                raise
            _run("apt-get", "-q", "update")
            package = _candidate()
            if package is None:
                raise RuntimeError(f"apt knows no {META_PACKAGE}") from None
            _download(package, Path(scratch))
        tree = Path(scratch, "tree")
        _run("dpkg-deb", "-x", next(Path(scratch).glob("*.deb")), tree)
        for version in (tree / "lib/modules").iterdir():
            _run("/usr/sbin/depmod", "-b", tree, version.name)
        return _publish(tree, cache / package)


def _download(package: str, directory: Path) -> None:
    # _apt, the user that root's apt downloads as, has no way into a private directory.
    _run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package, cwd=directory)


def _publish(made: Path, place: Path) -> Path:
    try:
        made.rename(place)
    except OSError:
        # Another run published the same meanwhile; a directory is not replaced.
        if not place.exists():
            raise
    return place


def _initrd_key(kernel: Path, init: Path) -> str:
    digest = hashlib.sha256(repr((str(kernel), MODULES)).encode())
    for path in (init, Path(__file__), BUSYBOX, *map(Path, PROGRAMS)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _build_initrd(tree: Path, version: str, init: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        root = Path(scratch, "root")
        for name in ("bin", "dev", "proc", "sys", "tmp", "modules"):
            (root / name).mkdir(parents=True)
        shutil.copy(init, root / "init")
        (root / "init").chmod(0o755)
        shutil.copy(BUSYBOX, root / "bin/busybox")
        for applet in _run(BUSYBOX, "--list").split():
            if applet != "busybox":
                (root / "bin" / applet).symlink_to("busybox")
        order = _modules(tree, version)
        for module in order:
            shutil.copy(module, root / "modules")
        (root / "modules/order").write_text("".join(f"{m.name}\n" for m in order))
        for path in _programs():
            (root / path.parent.relative_to("/")).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / path.relative_to("/"))
        names = "".join(f"{p.relative_to(root)}\n" for p in sorted(root.rglob("*")))
        archive = subprocess.run(
            ("cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"),
            input=names.encode(),
            stdout=subprocess.PIPE,
            cwd=root,
            check=True,
            timeout=300,
        ).stdout
        packed = Path(scratch, target.name)
        packed.write_bytes(gzip.compress(archive, 1))
        packed.rename(target)


def _modules(tree: Path, version: str) -> list[Path]:
    """The module files in the order in which insmod takes them."""
    order: dict[Path, None] = {}
    for name in MODULES:
        shown = _run("/usr/sbin/modprobe", "-d", tree, "-S", version, "--show-depends", name)
        for line in shown.splitlines():
            word, path = line.split()[:2]
            if word == "insmod":
                order[Path(path)] = None
    return list(order)


def _programs() -> set[Path]:
    """PROGRAMS, mke2fs's configuration, and the shared libraries that they load."""
    paths = {Path("/etc/mke2fs.conf"), *map(Path, PROGRAMS)}
    for program in PROGRAMS:
        paths.update(map(Path, re.findall(r"(/\S+) \(0x", _run("ldd", program))))
    return paths


def main(directory: str) -> None:
    made = image(README_INIT)
    Path(directory).mkdir(parents=True, exist_ok=True)
    shutil.copy(made.kernel, Path(directory, "vmlinuz"))
    shutil.copy(made.initrd, Path(directory, "initrd"))


if __name__ == "__main__":
    main(*sys.argv[1:])
