"""`moelib study` and the commands on a study's results, without logic of their own."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moelib.base import neutral
from moelib.terminal import CELLS, FAILED, INVALID, MEASURED, MISSING, STUDIES, Group, say, say_all

if TYPE_CHECKING:
    from moelib.study.plan import Cell
    from moelib.study.status import Status
    from moelib.study.study import Study


@click.group(cls=Group)
def study() -> None:
    """Run a study, or show its progress."""


@study.command("run")
@click.argument("name", shell_complete=STUDIES)
@click.option("--cell", shell_complete=CELLS, help="Only MODEL/QUANT, or all of MODEL.")
def study_run(name: str, cell: str | None) -> None:
    """Do the runs of study NAME that are not done, then write its document."""
    from moelib.base.bar import tqdm
    from moelib.campaign import campaign
    from moelib.machine import monitor
    from moelib.report import document

    asked, cells = campaign.select(name, cell)
    planned = sum(len(c.specs) for c in cells)
    statuses = _statuses(asked, cells, cell)
    before = sum(s.usable for s in statuses)
    if before < planned:
        if note := campaign.device_note(asked):
            say(f"{name} {note}")
        for line in ahead(asked, cells):
            say(line)
    books = len(campaign.together(asked, cells))
    say(f"{name}: {books} notebooks, {planned} runs, {before} of them done")
    bar = tqdm(total=planned, initial=before, unit="run", disable=None)
    # the bar counts the records on disk: reading them all would disturb the runs
    written = asked.path / "records"
    known = before - len(list(written.glob("*.json")))
    taken, begun = None, list[str]()

    def tell(text: str) -> None:
        begun.append(text)
        tqdm.write(text)

    with bar, monitor.repeating(lambda: bar.update(known + len(list(written.glob("*.json"))) - bar.n), 1.0):
        try:
            problems = campaign.run_cells(asked, cells, say=tell)
        except campaign.CellsTaken as err:
            taken, problems = err, err.problems
    measured = asked.again()
    if begun:  # else all stands as it was read: a scheduler asks often for cells that are done
        statuses = _statuses(measured, cells, cell)
    if cell:
        for one, status in zip(cells, statuses, strict=True):
            say(f"{one.name}: {status.summary()}")
    else:
        problems = list(dict.fromkeys([*problems, *measured.problems]))
        say(measured.summary())
    say_all(problems, err=True)
    if taken:
        raise taken
    if not cell and measured.done:
        say(f"document: {os.path.relpath(document.report(name, progress=False).path)}")
    elif not cell:
        say("no document: no run has a result", err=True)
    sys.exit(_code(statuses, problems))


def _statuses(asked: "Study", cells: "list[Cell]", cell: str | None) -> "list[Status]":
    """Of some cells by their own records alone: a scheduler asks for each cell of a large study."""
    return [asked.status_now(c) if cell else asked.statuses[c.name] for c in cells]


@study.command("cells")
@click.argument("name", shell_complete=STUDIES)
@click.option("--json", "as_json", is_flag=True, help="For a program: a list of objects.")
def study_cells(name: str, as_json: bool) -> None:
    """List what `study run NAME --cell` takes, each measured by one process on one machine; writes nothing.

    A study whose quants take turns has a cell for each model, any other one for each model and quant.
    """
    import json

    from moelib.campaign import campaign

    listed = [
        {
            "cell": label,
            "model": group[0].model,
            "quants": [c.quant for c in group],
            "runs": sum(len(c.specs) for c in group),
        }
        for label, group in campaign.together(*campaign.select(name))
    ]
    if as_json:
        say(json.dumps(listed, indent=1))
        return
    for one in listed:
        say(f"{one['cell']}  {one['runs']} runs")


def _code(statuses: "list[Status]", problems: list[str]) -> int:
    """What became of cells, as an exit code."""
    if any(status.tally["missing"] or status.failed for status in statuses):
        return MISSING
    if any(status.tally["invalid"] for status in statuses):
        return INVALID
    return FAILED if problems else 0


def ahead(asked: "Study", cells: "list[Cell]") -> Iterator[str]:
    """What a study needs, as text. Raises StudyError if a placement of it makes no sense, FileError if the disk is too
    small."""
    from moelib.base.schema import UserError
    from moelib.campaign import preflight
    from moelib.study.plan import StudyError

    try:
        needs = preflight.preflight(asked, cells)
    except StudyError:
        raise
    except UserError as err:  # what stands in the way of runs is said by these
        yield f"what it needs cannot be foretold: {err}"
        return
    yield from needs.lines()
    needs.require()


@study.command("files")
@click.argument("name", shell_complete=STUDIES)
@click.option("--cell", shell_complete=CELLS, help="Only MODEL/QUANT, or all of MODEL.")
@click.option("--source", is_flag=True, help="Only what they are quantised from.")
def study_files(name: str, cell: str | None, source: bool) -> None:
    """Make the files that study NAME measures, and measure nothing: on a machine without a GPU, before the others."""
    from moelib.campaign import campaign, given

    asked, cells = campaign.select(name, cell)
    if source:
        for model in dict.fromkeys(c.model for c in cells):
            path = given.source_of(asked, model)
            say(f"{model}: {path.name if path else 'nothing to quantise from'}")
        return
    for made in campaign.prepare(asked, cells):
        say(f"{made.path.name}: {made.manifest['sha256']}")


@study.command("plan")
@click.argument("name", shell_complete=STUDIES)
@click.option("--cell", shell_complete=CELLS, help="Only MODEL/QUANT, or all of MODEL.")
@click.option("--vram", metavar="SIZE", help="Of a card that is not here, such as 12GiB.")
def study_plan(name: str, cell: str | None, vram: str | None) -> None:
    """Show what study NAME needs (download, disk, RAM, VRAM) and which placements it runs; nothing is written."""
    from moelib.campaign import campaign, preflight
    from moelib.catalogue import sizes

    room = preflight.elsewhere(sizes.parse(vram)) if vram else None
    needs = preflight.preflight(*campaign.select(name, cell, room), room)
    for line in needs.lines():
        say(line)


@study.command("status")
@click.argument("name", shell_complete=STUDIES)
def study_status(name: str) -> None:
    """Show which runs of study NAME are usable, and why the rest are not; writes nothing."""
    from moelib.study.study import Study

    measured = Study.named(name)
    say(measured.summary())
    for cell, status in measured.statuses.items():
        say(f"{neutral.plain(cell)}: {status.summary()}")
    say_all(measured.problems)
    sys.exit(FAILED if measured.problems else 0)


@click.command()
@click.argument("name", shell_complete=MEASURED)
@click.option("--re-audit", is_flag=True, help="First re-audit runs without a valid result by the current rules.")
def audit(name: str, re_audit: bool) -> None:
    """Check every record of study NAME against every invariant again, and show the result."""
    from moelib.campaign import campaign
    from moelib.evidence import appendix
    from moelib.study.plan import outputs
    from moelib.study.study import Study

    for r in campaign.reaudit(Study.named(name)) if re_audit else ():
        say(f"re-audited: {r.line}, from the readings of {r.judged and r.judged.record}")
    measured = Study.read(outputs() / name)
    say(measured.summary())
    say_all(measured.problems)
    say(appendix.audit_table(measured).text())
    sys.exit(FAILED if measured.problems else 0)


@click.command()
@click.argument("name", shell_complete=MEASURED)
@click.option("--into", type=click.Path(file_okay=False, path_type=Path), help="Folder; default: the study's.")
def report(name: str, into: Path | None) -> None:
    """Rebuild the document of study NAME from its records alone.

    Fails if nothing can be compared, or something in the study is wrong; runs that are not done yet are only listed.
    """
    from moelib.report import document

    started = time.monotonic()
    made = document.report(name, into)
    say(f"document: {os.path.relpath(made.path)} ({time.monotonic() - started:.0f} s)")
    say(made.summary)
    wrong = [p for p in made.problems if not p.endswith(": not run")]
    say_all(wrong, err=True)
    if not made.rounds:
        say("moelib: no round is complete, so the document compares nothing: run the study again", err=True)
    sys.exit(FAILED if wrong or not made.rounds else 0)


@click.command()
@click.argument("name", shell_complete=MEASURED)
@click.option("--namespace", required=True, help="User or organisation on the Hub that the cards are for.")
@click.option("--into", type=click.Path(file_okay=False, path_type=Path), help="Folder; default: cards/ of the study.")
def card(name: str, namespace: str, into: Path | None) -> None:
    """Write the model cards of study NAME from its records alone, and check them."""
    from moelib.catalogue import upstream
    from moelib.publish import cards
    from moelib.study.plan import outputs
    from moelib.study.study import Study

    upstream.namespace(namespace)
    path = outputs() / name
    measured, folder = Study.read(path), into or path / "cards"
    for path in cards.write(measured, namespace, folder):
        say(os.path.relpath(path))
    for model in cards.missing(measured):
        say(f"no card for {model}: it has no complete round", err=True)
    wrong = cards.check(folder, measured, namespace)
    say_all(wrong, err=True)
    sys.exit(FAILED if wrong else 0)


@click.command()
@click.argument("name", shell_complete=MEASURED)
@click.option("--to", "namespace", required=True, help="User or organisation on the Hub.")
@click.option("--yes", is_flag=True, help="Upload; without this, only the plan is shown.")
@click.option("--public/--private", default=None, help="Public in the end; default: yes. Twins stay private.")
def publish(name: str, namespace: str, yes: bool, public: bool | None) -> None:
    """Upload the files and cards of study NAME to the Hub; they are verified before they become public."""
    from moelib.catalogue import upstream
    from moelib.publish import cards
    from moelib.publish import upload as publishing
    from moelib.study.plan import outputs
    from moelib.study.study import Study

    upstream.namespace(namespace)
    measured = Study.read(outputs() / name)
    plans = publishing.plan(measured, namespace, public)
    for p in plans:
        say(p.text())
    for model in cards.missing(measured):
        say(f"nothing of {model}: it has no complete round", err=True)
    if not yes:
        say("nothing was changed; add --yes to upload")
        return
    publishing.publish(plans, say, receipts=measured.path / "published")
    say("done")


@click.command()
@click.argument("into", type=click.Path(path_type=Path))
@click.argument("sources", metavar="FROM...", nargs=-1, required=True, type=click.Path(path_type=Path))
def merge(into: Path, sources: tuple[Path, ...]) -> None:
    """Bring the study folders FROM, of several machines, into the folder INTO, which may be there or not.

    Every record is verified and audited first. Refused: folders of other plans, two records of one run, a round of two
    machines, a cell of two engines, devices or files. The order of FROM does not matter.
    """
    from moelib.merge import merge as merging
    from moelib.merge import setups
    from moelib.study.study import Study

    merged = merging.merge(into, sources)
    say(f"{into}: {merged.records} records, {merged.new} files new")
    lines = setups.said(merged.setups)
    if lines:
        say(f"{len(lines)} kinds of machine, whose numbers are not compared with each other:")
        say_all(lines)
    say(Study.read(into).summary())


@click.command()
@click.argument("name", shell_complete=STUDIES)
@click.option("--cell", shell_complete=CELLS, help="Only MODEL/QUANT, or all of MODEL.")
def quality(name: str, cell: str | None) -> None:
    """Compare what the files of study NAME say: what quantising costs, and that placements change nothing.

    Token by token, over the texts that the study names; what is done is not repeated. Of geometry twins, only
    placements are compared.
    """
    from moelib.base.bar import tqdm
    from moelib.campaign import assess, campaign
    from moelib.quality import wanted

    asked, cells = campaign.select(name, cell)
    planned = assess.planned(asked, cells)
    if not planned:
        raise click.ClickException(wanted.none(asked.parameters))
    if asked.parameters.weights == "twin":
        say(f"{name}: {wanted.TWIN}")
    for c in tqdm(assess.assess(asked, cells), total=len(planned), unit="comparison", disable=None):
        tqdm.write(c.line)
    wrong = assess.missing(asked, cells)
    say(f"{len(planned) - len(wrong)} of {len(planned)} comparisons are valid")
    say_all(wrong, err=True)
    sys.exit(FAILED if wrong else 0)


@click.command()
@click.argument("name", shell_complete=STUDIES)
@click.option("--cell", shell_complete=CELLS, help="Only MODEL/QUANT, or all of MODEL; default: one quant of each.")
@click.option("--tokens", default=128, show_default=True, type=click.IntRange(8, 4096), help="Followed one by one.")
@click.option("--twins", is_flag=True, help="Also of each file's twin: the same shapes and tokenizer, random weights.")
@click.option("--beside", shell_complete=STUDIES, help="Also show what another study has, such as its twins.")
@click.option("--into", type=click.Path(file_okay=False, path_type=Path), help="Folder that figures are drawn into.")
def experts(name: str, cell: str | None, tokens: int, twins: bool, beside: str | None, into: Path | None) -> None:
    """Show which experts a text uses in the files of study NAME: how evenly, and what a cache of some would hit.

    By the engine's own routing, outside of all timed runs, over the first text that the study names. Each token that is
    followed takes a start of the engine: 128 of a file of 100 MB some 20 s without a device, and two minutes on
    loopback. What is done is not repeated; a file that was stopped begins anew. `moelib report NAME` shows it.
    """
    from moelib.answers import experts as answers
    from moelib.base.bar import tqdm
    from moelib.campaign import assess, campaign
    from moelib.evidence.table import Table
    from moelib.figures import routing
    from moelib.quality import wanted
    from moelib.routing.routed import spec_key
    from moelib.study.plan import outputs

    asked, cells = campaign.select(name, cell)
    if cell is None:
        cells = assess.first_quants(asked)
    specs = assess.routes(asked, cells, tokens, twins)
    if not specs:
        raise click.ClickException(wanted.none(asked.parameters))
    done = 0
    for r in tqdm(assess.route(asked, specs), total=len(specs), unit="file", disable=None):
        tqdm.write(f"{r.line}{'' if r.done else f': {r.message}'}")
        done += r.done
    shown = answers.used(asked.path, {spec_key(spec) for _, spec in specs})
    shown += answers.used(outputs() / beside) if beside else []
    table = Table("experts", answers.rows(shown), [u.routed.cited for u in shown], answers.NOTE)
    say(table.markdown())
    for path in routing.draw(shown, into) if into and shown else ():
        say(os.path.relpath(path))
    sys.exit(0 if done == len(specs) else FAILED)


COMMANDS = (study, merge, quality, experts, audit, report, card, publish)
