"""A mount's configuration file: the options of `healfs mount` in TOML (healfs.toml(5)).

Each key is an option's name without its dashes, besides `source` and `mountpoint`. What the
command line says goes before the file, the file before the default.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from healfs.cli.output import bad_input, os_error
from healfs.config import ConfigError

DIRECTORY = Path("/etc/healfs")
MAXIMUM_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@:-]*", re.ASCII)
# A file is read at each mount. A disk that is missing then (its file system is not mounted, say)
# would come back as a new and empty one.
_NOT_IN_A_FILE = {
    "config": "not in a file; give it on the command line",
    "create": "not in a file, which is read at each mount; create the disk once, on the command "
    "line: healfs mount NAME --create SIZE",
}
_PATHS = ("source", "mountpoint", "fault")
_EMPTY = {
    "source": "SOURCE is empty; give a path, an NBD URI, or the NAME of a file in /etc/healfs",
    "mountpoint": "MOUNTPOINT is empty; give a directory",
    "config": "--config is empty; give the path of a file",
}
_WORDS = {ParameterSource.COMMANDLINE: "option", ParameterSource.DEFAULT_MAP: "file"}


class ConfiguredCommand(click.Command):
    """Takes SOURCE and MOUNTPOINT, or a NAME in DIRECTORY, or `--config FILE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # a shell completes it
            return super().parse_args(ctx, args)
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        # What is missing may be there as a sentinel of click's.
        words = {key: value for key, value in given.items() if isinstance(value, str)}
        source, mountpoint = words.get("source"), words.get("mountpoint")
        asked = self.get_help_option(ctx)  # its name is click's own, and changed in click 8.5
        if asked is not None and given.get(asked.name) is True:
            return super().parse_args(ctx, args)
        for key in ("source", "mountpoint", "config"):
            if words.get(key) == "":
                bad_input(f"{_EMPTY[key]}; see healfs mount --help")
        if path := words.get("config"):
            if source is not None:
                bad_input("--config has the source and the mountpoint; give no more than options")
            ctx.default_map = read(Path(path).absolute(), ctx)
        elif source is not None and mountpoint is None:
            ctx.default_map = read(_path_of(source), ctx)
        elif source is None:
            bad_input(
                "give SOURCE and MOUNTPOINT, or the NAME of a file in /etc/healfs; "
                "see healfs mount --help"
            )
        rest = super().parse_args(ctx, args)
        if ctx.default_map is not None:
            for name in ("source", "mountpoint"):
                ctx.params[name] = ctx.default_map[name]
                ctx.set_parameter_source(name, ParameterSource.DEFAULT_MAP)
            _prefer_options(ctx)
        return rest


def file_of(ctx: click.Context) -> str | None:
    """The path of the file that this command was configured by."""
    found: str | None = ctx.meta.get(__name__)
    return found


def origin(ctx: click.Context, parameter: str) -> str:
    """Where the value of a parameter came from: option, file or default."""
    source = ctx.get_parameter_source(parameter)
    return "default" if source is None else _WORDS.get(source, "default")


def _prefer_options(ctx: click.Context) -> None:
    """--retry-timeout on the command line goes before a file's read-retry-timeout."""
    for name in ctx.params:
        both = name.removeprefix("read_").removeprefix("write_")
        named = both != name and both in ctx.params
        if named and origin(ctx, name) == "file" and origin(ctx, both) == "option":
            ctx.params[name] = None
            ctx.set_parameter_source(name, ParameterSource.DEFAULT)


def _path_of(name: str) -> Path:
    if not _NAME.fullmatch(name):
        bad_input(
            f"{name}: no MOUNTPOINT is given, and that is no name of a file in {DIRECTORY} "
            "(letters, digits, _ . @ : -)"
        )
    path = DIRECTORY / f"{name}.toml"
    if not path.exists():
        bad_input(f"{path}: no such file; write it (healfs.toml(5)), or give a MOUNTPOINT")
    return path


def read(path: Path, ctx: click.Context) -> dict[str, Any]:
    """The values for the command's parameters, converted. Raises ConfigError."""
    text = _text(path)
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:  # of an integer of 5000 digits, too
        raise ConfigError(f"{path}: {exc}") from None
    parameters = dict(keys(ctx.command))
    values: dict[str, Any] = {}
    for key, value in table.items():
        where = f"{path}:{_line(text, key)}: {key}"
        if key in _NOT_IN_A_FILE:
            raise ConfigError(f"{where}: {_NOT_IN_A_FILE[key]}")
        if key not in parameters:
            raise ConfigError(f"{where}: unknown key{_nearest(key, parameters)}")
        parameter = parameters[key]
        assert parameter.name is not None
        values[parameter.name] = _value(value, parameter, ctx, where)
    for key in ("source", "mountpoint"):
        if not values.get(key):
            raise ConfigError(f'{path}: no {key}; add a line {key} = "..."')
    ctx.meta[__name__] = str(path)
    return values


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAXIMUM_BYTES + 1)
    except OSError as exc:
        raise ConfigError(os_error(exc)) from None
    if len(data) > MAXIMUM_BYTES:
        raise ConfigError(f"{path}: longer than {MAXIMUM_BYTES} bytes; is it a configuration?")
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: not UTF-8 at byte {exc.start}; TOML is") from None


def keys(command: click.Command) -> Iterator[tuple[str, click.Parameter]]:
    """What a file may have, and the parameter of the command that it is."""
    for parameter in command.params:
        key = (parameter.name or "").replace("_", "-")
        if key not in _NOT_IN_A_FILE:
            yield key, parameter


def _line(text: str, key: str) -> int:
    """tomllib does not tell: the first line that begins with the key, as a value or a table."""
    pattern = rf"""^[ \t]*(?:\[+[ \t]*)?["']?{re.escape(key)}["']?[ \t]*[.=\]]"""
    found = re.search(pattern, text, re.MULTILINE)
    return text.count("\n", 0, found.start()) + 1 if found else 1


def _nearest(key: str, known: dict[str, click.Parameter]) -> str:
    near = difflib.get_close_matches(key.replace("_", "-").lower(), known, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else "; healfs.toml(5) has the keys"


def _value(value: Any, parameter: click.Parameter, ctx: click.Context, where: str) -> Any:
    flag = isinstance(parameter, click.Option) and parameter.is_flag
    if flag != isinstance(value, bool):
        raise ConfigError(f"{where}: {'true or false' if flag else 'no bool'} is expected")
    if flag:
        return value
    if parameter.multiple and isinstance(value, list):
        return [_value(one, _single(parameter), ctx, where) for one in value]
    if parameter.multiple:
        raise ConfigError(f"{where}: write a list, such as [107]")
    if not isinstance(value, str | int):
        raise ConfigError(f'{where}: write a string or a number, such as "5s" or 64')
    if isinstance(value, int) and value.bit_length() > 64:
        raise ConfigError(f"{where}: the number is too large")
    if "\0" in str(value):
        raise ConfigError(f"{where}: a NUL character is in it; leave it out")
    if parameter.name in _PATHS and not _is_absolute(str(value), parameter.name):
        raise ConfigError(f"{where}: {value}: write an absolute path: it is used from anywhere")
    try:
        return parameter.type.convert(str(value), parameter, ctx)
    except click.BadParameter as exc:
        raise ConfigError(f"{where}: {exc.message.rstrip('.')}") from None


def _single(parameter: click.Parameter) -> click.Parameter:
    """What each value of a list has to be."""
    return click.Option([f"--{parameter.name}"], type=parameter.type)


def _is_absolute(value: str, name: str) -> bool:
    return value.startswith("/") or (name == "source" and "://" in value)
