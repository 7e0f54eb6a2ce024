"""The healfs command: finds the verb, and turns every error into one line and a status."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import importlib.util
import io
import os
import sys
from typing import Any

import click

from healfs.cli import exit_status
from healfs.cli.output import CliError, error_line, os_error
from healfs.config import ConfigError
from healfs.control.client import ControlError
from healfs.control.mounts import MountsError
from healfs.core.policy import PolicyError

# verb -> module and name. Loaded when asked for: `healfs status` need not wait for the rest.
VERBS = {
    "mount": "healfs.cli.mount:mount",
    "status": "healfs.cli.status:status",
    "list": "healfs.cli.status:list_",
    "events": "healfs.cli.events:events",
    "policy": "healfs.cli.policy:policy",
    "reconnect": "healfs.cli.recovery:reconnect",
    "accept": "healfs.cli.recovery:accept",
    "pause": "healfs.cli.pause:pause",
    "resume": "healfs.cli.pause:resume",
    "fail": "healfs.cli.recovery:fail",
    "attach": "healfs.cli.attach:attach",
    "upgrade": "healfs.cli.upgrade:upgrade",
    "umount": "healfs.cli.umount:umount",
    "doctor": "healfs.cli.doctor:doctor",
    "demo": "healfs.cli.demo:demo",
}


class _Healfs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [v for v, place in VERBS.items() if importlib.util.find_spec(place.split(":")[0])]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module, name = VERBS[cmd_name].split(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as exc:
            if exc.ctx is None and (verb := ctx.invoked_subcommand):
                # click names no verb when the parser itself finds the error.
                command = self.get_command(ctx, verb)
                assert command is not None
                exc.ctx = click.Context(command, parent=ctx, info_name=verb)
            raise

    def main(self, *args: Any, **extra: Any) -> Any:
        extra["standalone_mode"] = False
        _open_standard_streams()
        sys.exit(self._run(*args, **extra))

    def _run(self, *args: Any, **extra: Any) -> int:
        try:
            result = super().main(*args, **extra)
            sys.stdout.flush()
            return result if isinstance(result, int) else exit_status.SUCCESS
        except CliError as exc:
            error_line(exc.message)
            return exc.status
        except click.exceptions.NoArgsIsHelpError:
            error_line(f"no verb; there are {', '.join(VERBS)}: see healfs --help")
            return exit_status.BAD_INPUT
        except click.UsageError as exc:
            where = exc.ctx.command_path if exc.ctx else "healfs"
            text = exc.format_message().rstrip(".")
            see = " See" if text.endswith("?") else "; see"  # "Did you mean ...?"
            error_line(f"{text}{see} {where} --help")
            return exit_status.BAD_INPUT
        except click.ClickException as exc:
            error_line(exc.format_message())
            return exit_status.FAILURE
        except (ConfigError, PolicyError) as exc:
            error_line(str(exc))
            return exit_status.BAD_INPUT
        except (ControlError, MountsError) as exc:
            error_line(str(exc))
            return exit_status.FAILURE
        except (KeyboardInterrupt, click.Abort):
            error_line("interrupted")
            return exit_status.INTERRUPTED
        except BrokenPipeError:
            # The reader (head, less) has seen enough. Python would complain once more at exit.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return exit_status.FAILURE
        except OSError as exc:
            error_line(os_error(exc))
            return exit_status.FAILURE


def _open_standard_streams() -> None:
    """A closed one's number would be the next file's that is opened."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - to the end
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors=_NO_LETTER)


_NO_LETTER = "healfs"  # the name of an error handler of codecs


def _without_a_letter(error: UnicodeError) -> tuple[str | bytes, int]:
    """A path's bytes that are no text go out as they are; for what the locale has no letter for, ?.

    Most locales of UTF-8 refuse both.
    """
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("replace")(error)


codecs.register_error(_NO_LETTER, _without_a_letter)


@click.group(
    cls=_Healfs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="healfs", message="healfs %(version)s")
def main() -> None:
    """A disk that waits instead of failing.

    Mounts a directory that holds one disk image file. While the storage behind it is away,
    requests wait; when it is back, they complete.
    """


if __name__ == "__main__":
    main()
