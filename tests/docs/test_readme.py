"""What the pages tell a reader to type exists: verbs, options, make targets, files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from healfs.cli.main import VERBS, main

ROOT = Path(__file__).parents[2]
MARKDOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES = [*MARKDOWN, *sorted((ROOT / "man").glob("*.scd"))]

# click keeps the names of a verb's help option, from the first context it sees.
PARENT = click.Context(main, info_name="healfs", **main.context_settings)


def blocks(text: str) -> str:
    """What is set as code, in lines; a line that ends in \\ is one with the next."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    .*\n", text, re.MULTILINE)
    return "".join([*fenced, *indented]).replace("\\\n", " ")


def commands(page: Path) -> list[list[str]]:
    """The words of each `healfs ...` line."""
    lines = re.findall(r"^\s*(?:\$ )?(healfs .*)$", blocks(page.read_text()), re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines]


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]


def test_there_are_some() -> None:
    assert {"README.md", "healfs.1.scd"} <= {name for name, _ in COMMANDS}
    assert {words[0] for _, words in COMMANDS} >= {"mount", "status", "policy", "accept", "umount"}


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=str)
def test_a_command_line_is_one_that_the_program_takes(page: str, words: list[str]) -> None:
    verb, *arguments = words
    command = main.get_command(click.Context(main), verb)
    assert command is not None, f"{page}: no verb {verb}"
    command.make_context(
        verb, arguments, parent=PARENT
    )  # raises click.UsageError, and runs nothing


def test_a_command_line_that_is_wrong_is_found() -> None:
    command = main.get_command(click.Context(main), "umount")
    assert command is not None
    with pytest.raises(click.UsageError):
        command.make_context("umount", ["/mnt/vm1", "--lazily"], parent=PARENT)


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.name)
def test_what_is_named_in_the_text_exists(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^    make ([a-z]+)|`make ([a-z]+)`", text, re.MULTILINE)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }
    options = {
        name
        for verb in VERBS
        if (command := main.get_command(click.Context(main), verb))
        for parameter in command.params
        for name in parameter.opts
    }
    for span in re.findall(r"`([^`\n]+)`", text):
        if span.startswith("--"):
            assert span.split()[0] in options, span
        elif span.startswith("healfs "):
            assert span.split()[1] in VERBS, span
        elif re.match(r"(healfs|man|tests)/|[A-Za-z]+\.(md|toml)$", span):
            assert (ROOT / span).exists(), span


@pytest.mark.parametrize("group", ["run", "man", "guest"])
def test_the_packages_are_those_that_make_asks_for(group: str) -> None:
    script = (ROOT / "tests/setup/packages").read_text()
    found = re.search(rf"^{group}=\(([^)]*)\)", script, re.MULTILINE)
    assert found
    listed = re.findall(r"^sudo apt-get install (.*)$", MARKDOWN[0].read_text(), re.MULTILINE)
    assert set(found[1].split()) in [set(line.split()) - {"git", "make"} for line in listed]


def test_a_reader_makes_each_mountpoint_first() -> None:
    """The second command must not fail."""
    made: set[str] = set()
    text = blocks(MARKDOWN[0].read_text())
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["mkdir", "-p"]:
            made |= set(words[2:])
        elif words[:2] == ["healfs", "mount"] and words[2] != "vm1":
            assert words[-1] in made, line


def test_the_demo_in_the_readme_passed() -> None:
    assert re.search(
        r"^PASS: \d+ blocks written, \d+ verified, 0 errors", blocks(MARKDOWN[0].read_text()), re.M
    )
