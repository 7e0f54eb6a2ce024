"""What a compiler is told of the modules is what they say themselves."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from healfs import compiled
from healfs.compiled import PLAIN, ROOT

MODULES = [path.relative_to(ROOT.parent) for path in compiled.modules()]
ATTRIBUTE = re.compile(
    r'^    cdef (?:public )?[\w \[\]:,*]*?\*?(\w+)(?: "\w+")?(?:  #.*)?$', re.MULTILINE
)


def declared(module: Path) -> dict[str, tuple[str | None, set[str]]]:
    """class -> its base, its attributes"""
    text = module.with_suffix(".pxd").read_text()
    found = {}
    for head, body in re.findall(
        r"^cdef class ([^:]+):\n((?:    .*\n|\n(?=    ))*)", text, re.MULTILINE
    ):
        name, _, base = head.partition("(")
        found[name] = (base.rstrip(")") or None, set(ATTRIBUTE.findall(body)))
    return found


def assigned(module: Path) -> dict[str, set[str]]:
    """class -> the attributes of self that it sets"""
    found = {}
    for node in ast.parse(module.with_suffix(".py").read_text()).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                target.attr
                for target in ast.walk(node)
                if isinstance(target, ast.Attribute)
                and isinstance(target.ctx, ast.Store)
                and isinstance(target.value, ast.Name)
                and target.value.id == "self"
            }
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_attribute_is_declared(module: Path) -> None:
    """Else setting it fails, where it is compiled and nowhere else."""
    known = {name: pair for m in MODULES for name, pair in declared(ROOT.parent / m).items()}
    for name, attributes in assigned(ROOT.parent / module).items():
        base: str | None = name
        while base is not None and base in known:
            attributes = attributes - known[base][1]
            base = known[base][0]
        assert name not in known or not attributes, name


def test_every_module_is_in_the_list_of_what_is_compiled() -> None:
    text = (ROOT.parent / "pyproject.toml").read_text()
    listed = re.findall(r'name = "([\w.]+)", sources = \["([\w/.]+)"\]', text)
    assert [name for name, _ in listed] == [".".join(path.parts) for path in MODULES]
    for name, source in listed:
        pyx = Path(name.replace(".", "/") + ".pyx")
        assert source == str(pyx if (ROOT.parent / pyx).exists() else pyx.with_suffix(".py"))


def test_no_integer_is_narrower_than_its_values() -> None:
    """Shifts and sums of C's int are not Python's; a view's items have the kernel's types."""
    for module in MODULES:
        for line in (ROOT.parent / module.with_suffix(".pxd")).read_text().splitlines():
            if "[" not in line and "*" not in line:
                assert not re.search(r"\b(int|long)\b", line.replace("long long", "")), line


def test_plain_python_takes_its_place_when_it_is_asked_for() -> None:
    code = "import healfs.core.engine as e; from healfs import compiled as c; "
    code += "print(e.__file__.endswith('.py'), c.why_plain)"
    found = subprocess.run(
        (sys.executable, "-c", code),
        env=os.environ | {PLAIN: "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT.parent,
    )
    assert found.stdout == f"True {PLAIN} is set\n"


def test_it_is_compiled_here() -> None:
    """make setup has done it: else the tests of what is compiled would be tests of plain Python."""
    assert compiled.why_plain in ("", f"{PLAIN} is set")
