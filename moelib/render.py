"""An executed analysis notebook -> document, figures and provenance. The same input gives the same bytes."""

from __future__ import annotations

import re
from pathlib import Path

from moelib import files, notebook, params, study

DOCUMENT = "MOE-TECHNICAL-VALIDATION.md"
FIGURES = "figures"

# The document shows results; the code that made them is in the notebook. A figure's alternative text is in its output.
TEMPLATE = """{%- extends 'markdown/index.md.j2' -%}
{% block input %}{% endblock input %}
{% block data_png %}
![{{ output.metadata.alt }}]({{ output.metadata.filenames['image/png'] | path2url }})
{% endblock data_png %}
"""


def render(executed: Path, folder: Path) -> Path:
    """Write the document of an executed notebook into `folder` and return its path.

    Beside it: `figures/`, and `provenance.json`, which names the records of every table. Raises NotebookError if the
    notebook is not whole or shows something that Markdown cannot hold.
    """
    import nbformat
    from nbconvert import MarkdownExporter

    notebook.require_whole(executed)
    book = nbformat.read(executed, as_version=4)
    provenance = {}
    for cell in book.cells:
        for out in cell.get("outputs", []):
            if out.output_type == "stream":
                raise notebook.NotebookError(f"{executed.name} prints: {out.text[:120]!r}; the document cannot hold it")
            told = out.get("metadata", {}).get("moelib")
            if told:
                provenance[told["table"]] = told["records"]
    exporter = MarkdownExporter(raw_template=TEMPLATE)
    text, resources = exporter.from_notebook_node(book, resources={"output_files_dir": FIGURES})
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip() + "\n"
    root = str(params.root().resolve())
    if root in text:
        raise notebook.NotebookError(f"the document of {executed.name} names a folder of this machine")
    for stale in (folder / FIGURES).glob("*.png"):
        stale.unlink()
    for name, data in resources.get("outputs", {}).items():
        files.write_bytes(folder / name, data)
    files.write_json(folder / "provenance.json", provenance)
    files.write_bytes(folder / DOCUMENT, text.encode())
    return folder / DOCUMENT


def report(name: str, progress: bool = True) -> Path:
    """Rebuild the document of study `name` from its records alone. Raises StudyError if there are none."""
    path = study.outputs() / name
    study.results(path)
    executed = path / "notebooks" / "analysis.ipynb"
    notebook.execute("analysis", executed, {"study": name}, progress)
    return render(executed, path)
