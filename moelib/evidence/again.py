"""How to measure a study again: the code, the commands, and what they start."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from moelib.audit.record import Record
from moelib.base.neutral import plain, word
from moelib.catalogue.facts import LLAMA_SERVER
from moelib.evidence.table import Text, cite
from moelib.study.study import Study


def commands(study: Study) -> Text:
    """The commands that measure the study and make its document, and each placement's own as it was started."""
    runs = sorted((r for r in study.done if r.observed), key=lambda r: r.started_utc)
    if not runs:
        return Text("again", "No run is usable.", cite(study.records))
    commits = list(dict.fromkeys(r.host.commit for r in runs if r.host.commit))
    steps, started = ("\n".join(part) for part in (_steps(study, commits), _started(study)))
    told = f" The runs are by {len(commits)} commits, of which this is the last." if len(commits) > 1 else ""
    text = (
        f"```bash\n{steps}\n```\n\nThese measure the study again and make its document.{told} What they start, of the "
        "first file and of each placement (a port is any free one; a process for each request where the runner has no "
        f"server):\n\n```bash\n{started}\n```"
    )
    return Text("again", text, cite(runs))


def _steps(study: Study, commits: list[str]) -> Iterator[str]:
    if commits:
        yield f"git checkout {word(commits[-1])}"
    runner = study.parameters.runner
    yield "make setup engine" + (" shimmy" if runner.startswith("shimmy") else "")
    for placement, address in study.parameters.endpoints.items():
        yield f"# a server with placement {plain(placement)} at {plain(address)}"
    yield f".venv/bin/moelib study run {word(study.name)}"
    yield f".venv/bin/moelib report {word(study.name)}"


def _started(study: Study) -> Iterator[str]:
    """A command for each placement of the first file."""
    seen: set[str] = set()
    first: Record | None = None
    for r in study.used or study.done:
        first = first or r
        if r.cell != first.cell or r.spec.label in seen or r.observed is None or not r.observed.argv:
            continue
        seen.add(r.spec.label)
        yield f"# {plain(r.spec.label)}"
        yield shlex.join(plain(part, None).replace("`", "'") for part in r.observed.argv)
    if not seen:
        yield f"# {'llama-server' if study.parameters.runner == LLAMA_SERVER else 'the server'} was not started here"
