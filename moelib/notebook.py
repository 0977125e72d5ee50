"""Notebooks through papermill: parameters checked before any work, executed copies that are whole or not believed."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moelib import params

log = logging.getLogger(__name__)

INJECTED = "# Parameters"  # papermill's comment on the cell that it adds


class NotebookError(RuntimeError):
    """A notebook was called or went wrong; the message says how."""


def check_injected(allowed: Iterable[str], history: Iterable[str] | None = None) -> None:
    """Raise ParamsError if papermill injected a parameter that the notebook does not have.

    papermill itself only logs a misspelt `-p` name and goes on with the default. `history` are the sources of the
    cells run so far, by default this kernel's.
    """
    if history is None:
        from IPython import get_ipython

        shell = get_ipython()
        history = shell.user_ns.get("In", []) if shell else []
    allowed = list(allowed)
    for source in history:
        if source.startswith(INJECTED):
            _refuse_unknown({n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}, allowed)


def _refuse_unknown(names: Iterable[str], allowed: list[str]) -> None:
    unknown = sorted(set(names) - set(allowed) - {"True", "False", "None"})
    if unknown:
        raise params.ParamsError(f"unknown parameter {', '.join(unknown)}; this notebook has: {', '.join(allowed)}")


def execute(name: str, out: Path, parameters: dict[str, Any], progress: bool = True) -> None:
    """Run `notebooks/<name>.ipynb` with `parameters` into `out`; the copy of a failed run is kept too.

    Names are compared before the kernel starts. Raises ParamsError or NotebookError.
    """
    import papermill
    from papermill.exceptions import PapermillException

    source = Path("notebooks") / f"{name}.ipynb"
    root = params.root()
    known = papermill.inspect_notebook(str(root / source))
    _refuse_unknown(parameters, list(known))
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    # relative paths: papermill writes them into the executed copy
    with contextlib.chdir(root):
        try:
            to = out.relative_to(root.resolve())
        except ValueError:
            to = out
        try:
            papermill.execute_notebook(
                str(source), str(to), parameters=parameters, progress_bar=progress, kernel_name="python3"
            )
        except PapermillException as err:
            raise NotebookError(f"{out.name}: {_last_line(err)}") from None
        except Exception as err:  # a dead kernel, a lost connection: many types, one meaning
            raise NotebookError(f"{out.name}: {type(err).__name__}: {_last_line(err)}") from err
    require_whole(out)


def _last_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[-1]


def is_whole(path: Path) -> bool:
    try:
        require_whole(path)
    except NotebookError:
        return False
    return True


def require_whole(path: Path) -> None:
    """Raise NotebookError unless every code cell was executed and none shows an error.

    After a dead kernel papermill's own metadata says that every cell is completed.
    """
    try:
        cells = json.loads(path.read_text())["cells"]
    except (OSError, ValueError, KeyError) as err:
        raise NotebookError(f"{path.name} cannot be read: {err}") from None
    code = [c for c in cells if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    for i, cell in enumerate(code):
        errors = [o["evalue"] for o in cell["outputs"] if o["output_type"] == "error"]
        if errors:
            raise NotebookError(f"{path.name}: code cell {i + 1} failed: {errors[0]}")
        if cell["execution_count"] is None:
            raise NotebookError(f"{path.name}: code cell {i + 1} was not executed")
    if not code:
        raise NotebookError(f"{path.name} has no code cells")
