"""Running a study: one papermill execution for each (model, quant) that is not done."""

from __future__ import annotations

import logging
from collections.abc import Callable

from moelib import notebook, params
from moelib.study import Cell, Folder, standing

log = logging.getLogger(__name__)


def select(name: str, cell: str | None) -> tuple[Folder, list[Cell]]:
    """The study's folder and its cells, or the one named MODEL/QUANT. Raises ParamsError."""
    folder = Folder(name)
    if cell is None:
        return folder, folder.cells
    model, _, quant = cell.partition("/")
    return folder, [folder.cell(model, params.quant(quant))]


def done(folder: Folder, cells: list[Cell]) -> int:
    """How many of the cells' runs have a valid record."""
    here = {c.name for c in cells}
    found = standing(folder.records()).values()
    return sum(r.done for r in found if f"{r.spec.model}/{r.spec.quant}" in here)


def run(folder: Folder, cells: list[Cell], say: Callable[[str], object] = log.info) -> list[str]:
    """Execute the notebook of every cell that is not done; a cell that fails leaves the rest running.

    `say` is told of each cell as its turn comes.

    Returns what has no valid result, run by run, with reasons; empty if all is done.
    """
    problems = []
    for i, cell in enumerate(cells):
        out = folder.notebook(cell)
        if not (folder.status(cell).complete and notebook.is_whole(out)):
            say(f"{cell.name} ({i + 1} of {len(cells)})")
            try:
                parameters = {"study": folder.study.name, "model": cell.model, "quant": cell.quant}
                notebook.execute("run", out, parameters, progress=False)
            except notebook.NotebookError as err:
                log.error("%s: %s", cell.name, err)
                if folder.status(cell).complete:
                    problems.append(f"{cell.name}: its runs are valid, its notebook is not: {err}")
        problems += folder.status(cell).problems
    return problems
