"""Which modules of healfs are used: those that were compiled, or plain Python; all or none.

A .pxd file beside a module tells a C compiler (Cython) what types its attributes have; the module's
.py is the source all the same, but for a .pyx where C calls the kernel by itself. Plain Python does
the same without: where there was no compiler, where HEALFS_PLAIN is set, and in a checkout where a
source is newer than what was compiled of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, FileFinder, SourceFileLoader
from pathlib import Path

ROOT = Path(__file__).parent
PLAIN = "HEALFS_PLAIN"  # of the environment


def modules() -> Iterator[Path]:
    """What can be compiled, without the ending."""
    for path in sorted(ROOT.glob("*/*.pxd")):
        yield path.with_suffix("")


def _why_not() -> str:
    if os.environ.get(PLAIN):
        return f"{PLAIN} is set"
    checkout = (ROOT.parent / "pyproject.toml").exists()
    for module in modules():
        built = next((p for s in EXTENSION_SUFFIXES if (p := Path(f"{module}{s}")).exists()), None)
        if built is None:
            return "they are not compiled"
        if checkout:
            for ending in ".py", ".pyx", ".pxd":
                source = module.with_suffix(ending)
                if source.exists() and source.stat().st_mtime > built.stat().st_mtime:
                    return f"{source.name} was changed since: make setup compiles it"
    return ""


def _only_sources(directory: str) -> FileFinder:
    """A hook of sys.path_hooks: in healfs's directories no compiled module is found."""
    if not Path(directory).is_relative_to(ROOT):
        raise ImportError("not healfs")
    return FileFinder(directory, (SourceFileLoader, SOURCE_SUFFIXES))


#: Why plain Python is used; "": it is not.
why_plain = _why_not()
if why_plain:
    sys.path_hooks.insert(0, _only_sources)
    sys.path_importer_cache.pop(str(ROOT), None)
