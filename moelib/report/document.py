"""An executed analysis becomes the document, its figures and provenance; the same input gives the same bytes."""

import ast
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from moelib.base import files
from moelib.campaign import notebooks
from moelib.campaign.notebooks import NotebookError
from moelib.catalogue import params
from moelib.evidence import table
from moelib.study import study
from moelib.study.plan import outputs

INJECTED = "# Parameters"  # papermill's comment on the cell that it adds
DOCUMENT = "MOE-TECHNICAL-VALIDATION.md"
EVIDENCE = "EVIDENCE.md"
"""Of the cells that are tagged `evidence`."""
FIGURES = "figures"
TEMPLATE = Path(__file__).with_name("document.md.j2")


def check_injected(allowed: list[str], history: Iterable[str] | None = None) -> None:
    """Raise ParamsError if papermill injected a parameter that the notebook does not have.

    papermill itself only logs a misspelt `-p` name and goes on with the default. `history` are the sources of the
    cells run so far, by default this kernel's.
    """
    if history is None:
        from IPython import get_ipython

        history = get_ipython().user_ns["In"]
    table.begin()
    cells = [ast.parse(source) for source in history if source.startswith(INJECTED)]
    notebooks.refuse_unknown({n.id for c in cells for n in ast.walk(c) if isinstance(n, ast.Name)}, allowed)


class Reported(NamedTuple):
    """A document that was rebuilt, and what its notebook says of the study."""

    path: Path
    summary: str
    problems: list[str]
    rounds: int
    """How many rounds are complete and usable."""


def render(executed: Path, folder: Path) -> Reported:
    """Write the document of an executed notebook into `folder`, and its evidence.

    Beside them: `figures/`, and `provenance.json`, which names the records of every number of both. Raises
    NotebookError if the notebook is not whole, shows something that Markdown cannot hold, or does not show its study's
    problems.
    """
    import nbformat
    from nbconvert import MarkdownExporter

    notebooks.require_whole(executed)
    book = nbformat.read(executed, as_version=4)
    cells: dict[str, list[Any]] = {DOCUMENT: [], EVIDENCE: []}
    for cell in book.cells:
        cells[EVIDENCE if "evidence" in cell.metadata.get("tags", []) else DOCUMENT].append(cell)
    provenance = _provenance(executed.name, _shown(book.cells))
    verdicts = [v for out in _shown(book.cells) if (v := out.get("metadata", {}).get("moelib-verdict"))]
    if not verdicts:
        raise NotebookError(f"{executed.name} does not show its study's problems: it must show `appendix.problems`")
    exporter = MarkdownExporter(raw_template=TEMPLATE.read_text(encoding="utf-8"))
    for stale in (folder / FIGURES).glob("*.png"):
        stale.unlink()
    for name, of in cells.items():
        part = nbformat.from_dict({**book, "cells": of})
        text, resources = exporter.from_notebook_node(part, resources={"output_files_dir": FIGURES})
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip() + "\n"
        if str(params.root().resolve()) in text:
            raise NotebookError(f"the document of {executed.name} names a folder of this machine")
        for figure, data in resources.get("outputs", {}).items():
            files.write_bytes(folder / figure, data)
        files.write_bytes(folder / name, text.encode())
    files.write_json(folder / "provenance.json", provenance)
    return Reported(folder / DOCUMENT, **verdicts[0])


def _shown(cells: Iterable[Any]) -> list[Any]:
    return [out for cell in cells for out in cell.get("outputs", [])]


def _provenance(name: str, shown: Iterable[Any]) -> dict[str, Any]:
    """Where every number of the outputs of an executed notebook came from, by table, text and figure.

    Raises NotebookError for an output without provenance: a number without a source is not shown.
    """
    parts = []
    for out in shown:
        if out.output_type == "stream":
            raise NotebookError(f"{name} prints: {out.text[:120]!r}; the document cannot hold it")
        provenance = out.get("metadata", {}).get("moelib")
        if provenance is None:
            text = str(out.get("data", {}).get("text/plain", ""))[:120]
            raise NotebookError(f"{name} shows {text!r} without its source; show a Table, Text or figure")
        parts.append(provenance)
    try:
        return table.collect(parts)
    except ValueError as err:
        raise NotebookError(f"{name}: {err}; run the notebook from its start") from None


def report(name: str, into: Path | None = None, progress: bool = True) -> Reported:
    """Rebuild the document of study `name` from its records alone, in the study's folder or `into` another; then
    nothing is written in the study's. The records are read once, by the notebook.

    Raises StudyError if there are none.
    """
    path = outputs() / name
    study.require_results(path)
    with tempfile.TemporaryDirectory() as scratch:
        executed = (Path(scratch) if into else path / "notebooks") / "analysis.ipynb"
        notebooks.execute("analysis", executed, {"study": name}, progress)
        return render(executed, into or path)
