"""The analysis notebook without a kernel: its cells run here, and what they show comes back."""

from __future__ import annotations

import ast
import json
from contextlib import ExitStack
from typing import Any
from unittest import mock

from conftest import REPO

from moelib.figures import plots
from moelib.report import document as documents


def document(name: str, figures: bool = False, book: str = "analysis", **parameters: str) -> str:
    """The Markdown that `notebooks/<book>.ipynb` shows of study `name`; figures are made, and drawn if asked for."""
    cells = json.loads((REPO / f"notebooks/{book}.ipynb").read_text(encoding="utf-8"))["cells"]
    parts: list[str] = []

    def display(*things: Any, raw: bool = False, metadata: dict[str, Any] | None = None) -> None:
        for thing in things:
            if raw:
                parts.append(f"![{metadata['alt']}]({metadata['filename']}.png)")
            elif hasattr(thing, "_repr_mimebundle_"):
                data, details = thing._repr_mimebundle_()
                json.dumps(details, allow_nan=False)
                parts.append(data["text/markdown"])
            elif thing is not None:
                parts.append(thing._repr_markdown_())

    def draw(figure: Any, name: str, alt: str, records: Any = ()) -> None:
        assert figure.axes
        display(None, raw=True, metadata={"filename": plots._file_name(name), "alt": plots.neutral.markdown(alt)})

    here: dict[str, Any] = {"display": display}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(documents, "check_injected", return_value=None))
        stack.enter_context(mock.patch.object(plots, "display", display))
        if not figures:
            stack.enter_context(mock.patch.object(plots, "show", draw))
        for cell in cells:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                parts.append(source)
                continue
            if "parameters" in cell["metadata"].get("tags", []):
                here |= {"study": name, **parameters}
                continue
            *rest, last = ast.parse(source).body
            value = None
            if isinstance(last, ast.Expr):
                exec(compile(ast.Module(rest, []), "<cell>", "exec"), here)
                value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), here)
            else:
                exec(compile(ast.Module([*rest, last], []), "<cell>", "exec"), here)
            display(value)
    return "\n\n".join(parts)
