"""`moelib`: the commands, without logic of their own."""

import logging
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from tqdm import tqdm

from moelib import __version__, files, measure, models, monitor, notebook, params, sources
from moelib import engine as engines
from moelib import quantize as quants

FAILED = 1
"""Exit code when something was wrong; 2 is click's for a wrong call, 130 for Ctrl-C."""


class Group(click.Group):
    """Turns the errors that are meant for people into one message and an exit code."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except params.UserError as err:
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
    from moelib import doctor as doctors  # scipy takes its time

    findings = list(doctors.examine(engine_path))
    width = max(len(what) for what, _, _ in findings)
    for what, found, mend in findings:
        click.echo(f"{'!!' if mend else 'ok'} {what:<{width}}  {found}")
        if mend:
            click.echo(f"   {'':<{width}}  mend: {mend}")
    sys.exit(FAILED if any(mend for _, _, mend in findings) else 0)


@main.command()
@click.argument("model")
@click.option("--scale", default="full", show_default=True, help="full, a named scale, or a factor in (0, 1].")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Default: under models/.")
def twin(model: str, scale: str, seed: int, out: Path | None) -> None:
    """Write a geometry twin of MODEL: its shapes, random weights."""
    source = models.make_twin(model, scale, seed, out)
    click.echo(f"{source.path}  {source.header.file_bytes} bytes  sha256 {source.sha256}")


@main.command()
@click.argument("model")
@click.option("--pin", metavar="OWNER/NAME", help="Ask the Hub for this repository's F16 files, and write them down.")
@click.option("--revision", default="main", show_default=True, help="With --pin: branch, tag or commit.")
@click.option("--from", "given", type=click.Path(exists=True, path_type=Path), help="An F16 GGUF, or safetensors.")
def fetch(model: str, pin: str | None, revision: str, given: Path | None) -> None:
    """Get MODEL's real weights: the files pinned in params/models.yaml, or what --from names."""
    if pin:
        told = sources.pin(model, pin, revision)
        size = sum(f.bytes for f in told.files.values())
        click.echo(f"pinned {told.repository}@{told.revision}: {len(told.files)} files, {size / 2**30:.2f} GiB")
        click.echo(f"params/models.yaml has them; `moelib fetch {model}` downloads")
        return
    source = sources.adopt(model, given) if given else sources.fetch(model)
    click.echo(f"{source.path}  {source.header.file_bytes} bytes  sha256 {source.sha256}  from {source.origin}")


@main.command()
@click.argument("model")
@click.argument("quant")
@click.option("--scale", default="full", show_default=True, help="Scale of the twin to quantise.")
@click.option("--real", is_flag=True, help="The real weights, not a twin.")
def quantize(model: str, quant: str, scale: str, real: bool) -> None:
    """Quantise MODEL's twin, or its real weights, to QUANT and print the file's sheet."""
    params.quant(quant)
    with TemporaryDirectory() as scratch:
        source = sources.obtain(model, "real" if real else "twin", scale, needed=False)
        made = quants.make(source, quant, engines.find(), Path(scratch))
    click.echo(f"{made.path}\n{files.canonical(made.sheet).decode()}")


@main.group()
def study() -> None:
    """Run a study, or say what is done of it."""


@study.command("run")
@click.argument("name")
@click.option("--cell", help="Only MODEL/QUANT.")
def study_run(name: str, cell: str | None) -> None:
    """Do everything of study NAME that is not done, then write its document."""
    folder, cells = measure.select(name, cell)
    planned = sum(len(c.specs) for c in cells)
    before = measure.done(folder, cells)
    if before < planned and (note := measure.device_note(folder)):
        click.echo(f"{name} {note}")
    click.echo(f"{name}: {len(cells)} notebooks, {planned} runs, {before} of them done")
    bar = tqdm(total=planned, initial=before, unit="run", disable=None)
    # the bar follows the records on disk by their number alone: reading them all would disturb what is being timed
    written = folder.path / "records"
    known = before - len(list(written.glob("*.json")))
    with bar, monitor.repeating(lambda: bar.update(known + len(list(written.glob("*.json"))) - bar.n), 1.0):
        problems = measure.run_cells(folder, cells, say=tqdm.write)
    for p in problems:
        click.echo(f"  {p}", err=True)
    if not cell:
        click.echo(f"{sum(len(b) for c in cells for b in folder.status(c).blocks)} of {planned} runs valid")
        click.echo(f"document: {os.path.relpath(notebook.report(name, progress=False))}")
    if problems:
        sys.exit(FAILED)


@study.command("status")
@click.argument("name")
def study_status(name: str) -> None:
    """Say what of study NAME is valid, and why the rest is not."""
    folder, _ = measure.select(name)
    found = folder.look()
    for cell, status in found.statuses.items():
        click.echo(f"{cell}: {sum(len(b) for b in status.blocks)} of {status.planned} runs in usable blocks")
    for p in found.problems:
        click.echo(f"  {p}")
    sys.exit(FAILED if found.problems else 0)


@main.command()
@click.argument("name")
@click.option("--judge-again", is_flag=True, help="First judge runs without a valid result by the present rules.")
def audit(name: str, judge_again: bool) -> None:
    """Check every record of study NAME against every invariant again, and say what stands."""
    from moelib import evidence
    from moelib.study import Folder, outputs, results

    for r in measure.judge_again(Folder(name)) if judge_again else ():
        click.echo(f"judged again: {r.line}, from the readings of {r.judged.record}")
    found = results(outputs() / name)
    click.echo(evidence.audit_table(found).text())
    click.echo(", ".join(f"{count} {what}" for what, count in found.tally.items()))
    for p in found.problems:
        click.echo(f"  {p}")
    sys.exit(FAILED if found.problems else 0)


@main.command()
@click.argument("name")
@click.option("--into", type=click.Path(file_okay=False, path_type=Path), help="Folder of the document; the study's.")
def report(name: str, into: Path | None) -> None:
    """Rebuild the document of study NAME from its records alone."""
    started = time.monotonic()
    path = os.path.relpath(notebook.report(name, into))
    click.echo(f"document: {path} ({time.monotonic() - started:.0f} s)")


@main.command()
@click.argument("name")
@click.option("--namespace", required=True, help="User or organisation on the Hub that the cards are for.")
@click.option("--into", type=click.Path(file_okay=False, path_type=Path), help="Folder; default: cards/ of the study.")
def card(name: str, namespace: str, into: Path | None) -> None:
    """Write the model cards of study NAME from its records alone, and check them."""
    from moelib import cards
    from moelib.study import outputs, results

    found, folder = results(outputs() / name), into or outputs() / name / "cards"
    for path in cards.write(found, namespace, folder):
        click.echo(os.path.relpath(path))
    for model in cards.missing(found):
        click.echo(f"no card for {model}: no whole block of it is measured", err=True)
    wrong = cards.check(folder, found, namespace)
    for fault in wrong:
        click.echo(f"  {fault.page}: {fault.rule}: {fault.what}", err=True)
    sys.exit(FAILED if wrong else 0)


@main.command()
@click.argument("name")
@click.option("--to", "namespace", required=True, help="User or organisation on the Hub.")
@click.option("--yes", is_flag=True, help="Do it; without this, only the plan is shown.")
@click.option("--public/--private", default=None, help="Seen by all in the end; default: real weights are, twins not.")
def publish(name: str, namespace: str, yes: bool, public: bool | None) -> None:
    """Put the files and cards of study NAME on the Hub, verified before they are public."""
    from moelib import cards
    from moelib import publish as publishing
    from moelib.study import outputs, results

    found = results(outputs() / name)
    plans = publishing.plan(found, namespace, public)
    for p in plans:
        click.echo(p.text())
    for model in cards.missing(found):
        click.echo(f"nothing of {model}: no whole block of it is measured", err=True)
    if not yes:
        click.echo("nothing was touched; add --yes to do it")
        return
    publishing.publish(plans, lambda line: tqdm.write(line, file=sys.stdout))
    click.echo("done")


if __name__ == "__main__":
    main()
