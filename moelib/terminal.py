"""What the commands share: one message and exit code for every error, output that is safe on a terminal, names that are
completed and corrected."""

import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from moelib.base import neutral

FAILED = 1
"""Exit code when something was wrong; 2 is click's for a wrong call."""
INVALID, MISSING = 3, 4
"""Exit codes of a study that ran to its end: runs have results that do not stand; runs have none."""
TAKEN = 75
"""Exit code where another process has what is needed, and the same command succeeds later (EX_TEMPFAIL of sysexits.h):
what a scheduler runs again."""
STOPPED = 128
"""Exit code of what a signal ended, beside the signal's number: 130 for Ctrl-C, 143 for SIGTERM."""
PLACES = "MOELIB_OUTPUTS (studies) or MOELIB_MODELS (model files)"
CURES = {
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        f"give this user permission, or set {PLACES} to a folder that it may write",
    ),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP),
        f"a file is where a folder belongs, or the other way round: move it, or set {PLACES} to another folder",
    ),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), f"free some space, or set {PLACES} to another disk"),
}
"""What to do when the system refuses a file."""


Command = TypeVar("Command", bound=Callable[..., Any])


class Unprinted(OSError):
    """The reader of what is printed went away, or its disk is full."""


def say(text: object, err: bool = False) -> None:
    """Print lines that may hold what somebody else wrote, without what a terminal would obey."""
    try:
        click.echo(neutral.lines(text), err=err)
    except OSError as error:
        raise Unprinted(error.errno, error.strerror, "standard output") from None


def say_all(problems: list[str], err: bool = False) -> None:
    """Print each on a line of its own."""
    for p in problems:
        say(f"  {neutral.plain(p, None)}", err)


def _stop_in_peace() -> None:
    """Take SIGTERM, which schedulers send before they kill, as Ctrl-C. A second one does not disturb the end."""
    if threading.current_thread() is not threading.main_thread():
        return

    def stop(number: int, _: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stopped.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


stopped: list[int] = []
"""Signals other than Ctrl-C's that ended this process."""


class Group(click.Group):
    """Turns errors into one message and an exit code; ends quietly if the reader of the output goes away."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a terminal that has no `→` shows a `?`
                stream.reconfigure(errors="replace")
        _stop_in_peace()
        return super().main(*args, **kwargs)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as err:
            from moelib.base.schema import near

            raise click.UsageError(f"{err.message.rstrip('.')}{near(args[0], self.list_commands(ctx))}", ctx) from None

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except KeyboardInterrupt:
            say("\nmoelib: interrupted; what is finished is kept, run the same command to go on", err=True)
            sys.exit(STOPPED + (stopped or [signal.SIGINT])[0])
        except OSError as err:
            if isinstance(err, Unprinted):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try again at its end
            if not (isinstance(err, Unprinted) and err.errno == errno.EPIPE):
                cure = CURES.get(err.errno or 0, "fix that, and run the same command again")
                say(f"moelib: {err.filename or type(err).__name__}: {err.strerror or err}; {cure}", err=True)
            sys.exit(FAILED)
        except Exception as err:
            from moelib.base.files import InUse
            from moelib.base.schema import UserError

            if isinstance(err, UserError):
                say(f"moelib: {err}", err=True)
            else:
                logging.getLogger(__name__).info("where it went wrong", exc_info=err)
                what = neutral.plain(f"{type(err).__name__}: {err}")
                say(f"moelib: {what}; this is a bug in moelib: report it with the output of `moelib -v`", err=True)
            sys.exit(TAKEN if isinstance(err, InUse) else FAILED)


class Formatter(logging.Formatter):
    """Neutralises log messages: they may contain text from outside."""

    def format(self, record: logging.LogRecord) -> str:
        return neutral.lines(super().format(record))


PLANNED = (
    click.option("--ram", metavar="SIZE", help="That weights may take; default: as much as it needs."),
    click.option("--context", type=int, help="Tokens of prompt and answer; default: 8192, or the model's."),
    click.option("--ubatch", type=int, help="Tokens of a prompt computed at once; default: 512."),
    click.option("--kv", help="Type of the KV cache: f16 (default), q8_0, q4_0, ..."),
)


def planned(command: Command) -> Command:
    """Give a command the options of a plan, beside its --vram."""
    for option in reversed(PLANNED):
        command = option(command)
    return command


Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def completing(names: Callable[[click.Context], Iterable[str]]) -> Complete:
    """A shell's completion from `names`; none where these cannot be listed."""

    def complete(ctx: click.Context, _: click.Parameter, begun: str) -> list[str]:
        try:
            return sorted(name for name in names(ctx) if name.startswith(begun))
        except Exception:  # whatever it is, a shell that completes is not where to say it
            return []

    return complete


def _studies(_: click.Context) -> list[str]:
    from moelib.catalogue import params

    return params.study_names()


def _measured(_: click.Context) -> list[str]:
    from moelib.study.plan import outputs

    return [path.parent.name for path in outputs().glob("*/plan.json") if any(path.parent.glob("records/*.json"))]


def _models(_: click.Context) -> list[str]:
    from moelib.catalogue import params

    return list(params.entries("models.yaml"))


def _quants(_: click.Context) -> list[str]:
    from moelib.catalogue import params
    from moelib.engine import engine, quants

    try:
        return [name for name in quants.offered(engine.find()) if name not in quants.PLAIN]
    except params.UserError:  # without an engine, those that every engine makes
        return [*params.QUANTS]


def _cells(_: click.Context) -> set[str]:
    """Of all studies: where a value is being typed, click does not say what stands before it."""
    from moelib.catalogue import params

    studies = map(params.study, params.study_names())
    return {
        name
        for study in studies
        for model in study.models
        for name in (model, *(f"{model}/{quant}" for quant in study.quants))
    }


STUDIES, MEASURED, MODELS, QUANTS, CELLS = map(completing, (_studies, _measured, _models, _quants, _cells))
