"""Notebooks through papermill: parameters are checked before any work, incomplete executed copies are refused."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moelib.base import files
from moelib.catalogue import params

QUIET = ["--log-level=CRITICAL"]  # ipykernel warns of loopback TCP at every start


class NotebookError(params.UserError):
    """A notebook was called wrongly or failed; the message says how."""


def refuse_unknown(names: Iterable[str], allowed: list[str]) -> None:
    """Raise ParamsError for parameters that a notebook does not have."""
    unknown = sorted(set(names) - set(allowed))
    if unknown:
        raise params.ParamsError(f"unknown parameter {', '.join(unknown)}; this notebook has: {', '.join(allowed)}")


def execute(name: str, out: Path, parameters: dict[str, Any], progress: bool = True) -> None:
    """Run `notebooks/<name>.ipynb` with `parameters` into `out`; the copy of a failed run is kept too.

    Names are compared before the kernel starts. Raises ParamsError, NotebookError; InUse where a cell says that another
    process has what it needs.
    """
    import papermill
    from papermill.exceptions import PapermillException

    source = Path("notebooks") / f"{name}.ipynb"
    root = params.root()
    try:
        known = papermill.inspect_notebook(str(root / source))
    except Exception as err:  # of the file, of JSON, of nbformat
        why = " ".join(str(err).split())[:200] or type(err).__name__
        cure = "restore it from the repository, or set MOELIB_HOME to a clone that has it"
        raise NotebookError(f"{source} of {root} cannot be read ({why}); {cure}") from None
    refuse_unknown(parameters, list(known))
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    # relative paths: papermill writes them into the executed copy
    to = out.relative_to(root.resolve()) if out.is_relative_to(root.resolve()) else out
    with contextlib.chdir(root):
        try:
            how = {"progress_bar": progress, "kernel_name": "python3", "extra_arguments": QUIET}
            # an analysis grows with its study, and papermill would write all of it before and after each cell
            saves = name != "analysis"
            papermill.execute_notebook(str(source), str(to), parameters, request_save_on_cell_execute=saves, **how)
        except Exception as err:  # a cell's error; else a dead kernel, a lost connection: many types, one meaning
            if getattr(err, "ename", None) == files.InUse.__name__:
                raise files.InUse(getattr(err, "evalue", "")) from err
            kind = "" if isinstance(err, PapermillException) else f"{type(err).__name__}: "
            raise NotebookError(f"{out.name}: {kind}{(str(err).strip() or 'no message').splitlines()[-1]}") from err
    require_whole(out)


def is_whole(path: Path, digests: Iterable[str] = ()) -> bool:
    """Whether an executed copy is whole and shows the records with these digests: others may have been measured since,
    and times of files say little, as a clone gives them new ones."""
    with contextlib.suppress(NotebookError):
        require_whole(path)
        text = path.read_text(encoding="utf-8")
        return all(digest in text for digest in digests)
    return False


def require_whole(path: Path) -> None:
    """Raise NotebookError unless every code cell was executed and none shows an error.

    After a kernel died, papermill's own metadata says that every cell is completed.
    """
    try:
        cells = json.loads(path.read_bytes())["cells"]
        code = [c for c in cells if c["cell_type"] == "code" and "".join(c["source"]).strip()]
        ran = [([o for o in c["outputs"] if o["output_type"] == "error"], c["execution_count"]) for c in code]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise NotebookError(f"{path.name} cannot be read: {type(err).__name__} {err}") from None
    for i, (failed, count) in enumerate(ran):
        errors = [str(o.get("evalue")) for o in failed]
        if errors or count is None:
            what = f"failed: {errors[0]}" if errors else "was not executed"
            raise NotebookError(f"{path.name}: code cell {i + 1} {what}")
    if not code:
        raise NotebookError(f"{path.name} has no code cells")
