"""Which modules of healfs are used: those that were compiled, or plain Python; all or none.

A .pxd file beside a module tells a C compiler (Cython) what types its attributes have; the module's
.py is the source all the same, but for a .pyx where C calls the kernel by itself. Plain Python does
the same without: where there was no compiler, where HEALFS_PLAIN is set, and in a checkout where a
source is newer than what was compiled of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

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


class _PlainFinder:
    """Finds the .py of what has a compiled one beside it."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("healfs."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.origin is None or not spec.origin.endswith(".so"):
            return spec
        module = Path(spec.origin)
        return spec_from_file_location(name, module.with_name(module.name.split(".")[0] + ".py"))


#: Why plain Python is used; "": it is not.
why_plain = _why_not()
if why_plain:
    sys.meta_path.insert(0, _PlainFinder)
