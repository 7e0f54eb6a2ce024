"""What the shells are told to complete, as click's scripts ask for it."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.shell_completion import CompletionItem, ShellComplete

from healfs.cli import completion
from healfs.cli.completion import Directory, Mountpoint, Source
from healfs.cli.main import VERBS, main
from healfs.control import mounts


@pytest.fixture(autouse=True)
def one_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEALFS_RUNTIME_DIR", str(tmp_path / "run"))
    claim = mounts.claim("/srv/vm-one")
    claim.record(
        mountpoint="/srv/vm-one", file="/srv/vm-one/d", source="s", keeper=1, worker=1, log=""
    )


def complete(*words: str) -> list[CompletionItem]:
    """Of the last word, which is typed so far."""
    shell = ShellComplete(main, {}, "healfs", completion.VARIABLE)
    return shell.get_completions([*words[:-1]], words[-1])


def arguments(verb: str) -> dict[str, click.Parameter]:
    command = main.get_command(click.Context(main), verb)
    assert command is not None
    return {p.name or "": p for p in command.params if isinstance(p, click.Argument)}


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_has_a_type_that_completes(verb: str) -> None:
    types = {"mountpoint": Directory if verb == "mount" else Mountpoint, "source": Source}
    for name, argument in arguments(verb).items():
        assert isinstance(argument.type, types[name])


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "mount" and arguments(v)])
def test_a_verb_completes_the_mountpoints(verb: str) -> None:
    assert [item.value for item in complete(verb, "/srv")] == ["/srv/vm-one"]
    assert complete(verb, "/mnt") == []


def test_mount_completes_names_of_files_then_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion, "DIRECTORY", tmp_path)
    for name in ("vm2.toml", "vm1.toml", "nas.toml"):
        (tmp_path / name).touch()
    assert [(item.value, item.type) for item in complete("mount", "vm")] == [
        ("vm1", "plain"),
        ("vm2", "plain"),
    ]
    assert [item.type for item in complete("mount", "/srv/d")] == ["file"]
    assert [item.type for item in complete("mount", "a", "/m")] == ["dir"]


@pytest.mark.parametrize("option", ["--config", "--fault"])
def test_options_that_name_a_file_complete_paths(option: str) -> None:
    assert [item.type for item in complete("mount", option, "/etc/")] == ["file"]
