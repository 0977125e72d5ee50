"""Notebooks as people call them: papermill from a clone."""

import json
import os
import re
import subprocess
import sys

import pytest
import shown as analysis
from conftest import REPO

from moelib.base import files
from moelib.campaign import notebooks
from moelib.catalogue import params
from moelib.catalogue.params import ParamsError
from moelib.evidence import table
from moelib.report import document

PAPERMILL = [sys.executable, "-m", "papermill", "--no-progress-bar"]


def papermill(home, models_folder, *args):
    env = {**os.environ, "MOELIB_HOME": str(home), "MOELIB_MODELS": str(models_folder)}
    argv = [*PAPERMILL, "notebooks/run.ipynb", str(home / "out.ipynb"), *args]
    return subprocess.run(argv, capture_output=True, text=True, env=env, cwd=REPO, timeout=300, encoding="utf-8")


@pytest.mark.engine
def test_run_works_by_itself_and_from_a_file_of_parameters(home, models_folder):
    (home / "p.yaml").write_text("study: smoke\nmodel: deepseek-moe-16b\nquant: Q8_0\n", encoding="utf-8")
    done = papermill(home, models_folder, "-f", str(home / "p.yaml"))
    assert done.returncode == 0, done.stderr
    notebooks.require_whole(home / "out.ipynb")
    cells = json.loads((home / "out.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [o for c in cells if c["cell_type"] == "code" for o in c["outputs"]]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2
    provenance = [o["metadata"]["moelib"] for o in outputs if "moelib" in o.get("metadata", {})]
    assert {t["name"] for t in provenance if t["kind"] == "table"} == {"sheet", "placement", "runs"}
    figures = {"memory-deepseek-moe-16b-Q8_0", "tokens-deepseek-moe-16b-Q8_0-smoke"}
    assert {t["name"] for t in provenance if t["kind"] == "figure"} == figures
    numbers = [t for t in provenance if t["kind"] != "text"]  # the texts are headings
    assert all(row["from"] for t in numbers for row in t.get("rows", [t]))
    assert table.collect(provenance)["sources"]
    assert len(list((home / "outputs/smoke/records").glob("*.json"))) == 4
    # again with -p: nothing is done twice
    args = ["-p", "study", "smoke", "-p", "model", "deepseek-moe-16b", "-p", "quant", "Q8_0"]
    assert papermill(home, models_folder, *args).returncode == 0
    assert len(list((home / "outputs/smoke/records").glob("*.json"))) == 4


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-p", "qaunt", "Q2_K"], "unknown parameter qaunt; this notebook has: study, model, quant"),
        (["-p", "quant", "Q3_K"], "study demo has no cell trained-phimoe/Q3_K; did you mean"),
        (["-p", "model", "phi"], f"allowed: {', '.join(sorted(params.entries('models.yaml')))}"),
        (
            ["-p", "study", "dmeo"],
            f"allowed: {', '.join(params.study_names()[:6])}",
        ),
        (["-p", "model", "gpt-oss-20b"], "MXFP4"),
    ],
)
def test_a_wrong_parameter_fails_before_any_work_and_names_what_is_allowed(home, tmp_path, args, words):
    own = tmp_path / "own-models"
    done = papermill(home, own, *args)
    assert done.returncode != 0
    assert words in done.stderr
    assert not own.exists()
    assert not list((home / "outputs").rglob("records")) if (home / "outputs").exists() else True


def test_injected_names_are_read_from_the_cell_that_papermill_adds():
    good, bad = '# Parameters\nquant = "Q2_K"\n', '# Parameters\nqunt = "Q2_K"\nx = [1]\n'
    document.check_injected(["quant"], ["", "import os\nunrelated = 1", good])
    with pytest.raises(ParamsError, match="unknown parameter qunt, x; this notebook has: quant"):
        document.check_injected(["quant"], ["", bad])


def test_names_are_compared_before_the_kernel_starts(home, monkeypatch):
    import papermill

    monkeypatch.setattr(papermill, "execute_notebook", lambda *a, **k: pytest.fail("a kernel was started"))
    with pytest.raises(ParamsError, match="unknown parameter qaunt"):
        notebooks.execute("run", home / "out.ipynb", {"qaunt": "Q2_K"})
    with pytest.raises(ParamsError, match="unknown parameter"):
        notebooks.execute("run", home / "out.ipynb", {"quant = __import__('os'); x": "Q2_K"})


def cell(count=1, outputs=(), source="x"):
    return {"cell_type": "code", "source": [source], "execution_count": count, "outputs": list(outputs)}


FORMS = ({}, [], {"cells": 1}, {"cells": [1]}, {"cells": [{"cell_type": "code"}]}, b"{", b"\xff\xfe", b"[" * 100_000)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"cells": []}, "no code cells"),
        ({"cells": [cell(), cell(None)]}, "code cell 2 was not executed"),
        ({"cells": [cell(outputs=[{"output_type": "error", "evalue": "boom"}])]}, "code cell 1 failed: boom"),
        *((form, "n.ipynb cannot be read") for form in FORMS),
        (None, "n.ipynb cannot be read"),
    ],
)
def test_a_notebook_that_is_not_whole_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "n.ipynb"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(notebooks.NotebookError, match=words):
        notebooks.require_whole(path)
    assert not notebooks.is_whole(path)


def outputs(metadata, text="42"):
    """An executed notebook of one cell with one output."""
    out = {"output_type": "display_data", "data": {"text/markdown": text, "text/plain": text}, "metadata": metadata}
    return {"cells": [{**cell(outputs=[out]), "metadata": {}}], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}


def test_a_number_that_does_not_say_where_it_came_from_is_not_shown(tmp_path):
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps(outputs({})), encoding="utf-8")
    with pytest.raises(notebooks.NotebookError, match="shows '42' without its source"):
        document.render(path, tmp_path)
    provenance = {"kind": "text", "name": "answer", "text": "42", "from": ["a run"], "sets": {}}
    path.write_text(json.dumps(outputs({"moelib": provenance | {"sources": {}}})), encoding="utf-8")
    with pytest.raises(notebooks.NotebookError, match="a run is cited and not defined; run the notebook from"):
        document.render(path, tmp_path)
    provenance["sources"] = {"a run": "its digest"}
    verdict = {"summary": "1 of 1 runs usable", "problems": [], "rounds": 1}
    path.write_text(json.dumps(outputs({"moelib": provenance, "moelib-verdict": verdict})), encoding="utf-8")
    assert document.render(path, tmp_path).path.read_text(encoding="utf-8") == "42\n"
    provenance = json.loads((tmp_path / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["texts"] == {"answer": {"text": "42", "from": ["a run"]}}
    assert provenance["sources"] == {"a run": "its digest"}


@pytest.mark.engine
def test_a_dead_kernel_is_seen(home, monkeypatch):
    """papermill's saved copy then says that every cell is completed."""
    path = home / "notebooks/run.ipynb"
    book = json.loads(path.read_text(encoding="utf-8"))
    code = [c for c in book["cells"] if c["cell_type"] == "code"]
    code[2]["source"] = ["import os\n", "os._exit(9)"]
    path.write_text(json.dumps(book), encoding="utf-8")
    out = home / "out.ipynb"
    with pytest.raises(notebooks.NotebookError):
        notebooks.execute("run", out, {"study": "smoke"}, progress=False)
    assert not notebooks.is_whole(out)


def test_a_document_made_elsewhere_leaves_the_studys_folder_alone(home, tmp_path, monkeypatch):
    executed = []

    def execute(name, out, parameters, progress):
        out.parent.mkdir(parents=True, exist_ok=True)
        provenance = {"moelib": {"kind": "text", "name": "answer", "text": "42", "from": [], "sets": {}, "sources": {}}}
        out.write_text(json.dumps(outputs(provenance | {"moelib-verdict": verdict})), encoding="utf-8")
        executed.append(out)

    verdict = {"summary": "1 of 2 runs usable", "problems": ["one"], "rounds": 0}
    monkeypatch.setattr(document.notebooks, "execute", execute)
    monkeypatch.setattr(document.study, "require_results", lambda _: None)
    reported = document.report("smoke", tmp_path / "into")
    assert reported == (tmp_path / "into" / document.DOCUMENT, *verdict.values())
    assert not (home / "outputs").exists()
    assert not executed[0].exists(), "its working copy is gone"
    document.report("smoke")
    assert executed[1] == home / "outputs/smoke/notebooks/analysis.ipynb"
    assert executed[1].exists()
    verdict.clear()
    with pytest.raises(notebooks.NotebookError, match="it must show `appendix.problems`"):
        document.report("smoke")


def test_what_an_output_has_told_no_later_one_of_the_notebook_repeats():
    every = {f"run {i}": "a digest" for i in range(9)}
    outputs = [table.Text("one", "1", every), table.facts("two", {"a": "1", "b": "2"}, every), table.Text("three", "3")]
    for _ in range(2):
        table.begin()
        parts = [s._repr_mimebundle_()[1]["moelib"] for s in outputs]
        assert [(len(p["sets"]), len(p["sources"])) for p in parts] == [(1, 9), (0, 0), (0, 0)]
        assert table.collect(parts) == table.collect(s.provenance() for s in outputs)
    whole = table.collect(parts)
    (name,) = whole["sets"]
    assert name == f"set {files.digest(every)[:12]}"
    assert whole["tables"]["two"]["rows"][1] == {"cells": {"what": "b", "value": "2"}, "from": [name]}
    assert table.resolved([name], whole) == every
    with pytest.raises(ValueError, match="is cited and not defined"):
        table.collect(parts[1:])


def test_a_whole_cells_notebook_shows_on_a_machine_without_engine_or_device(monkeypatch):
    """The committed study of a GPU."""
    from moelib.engine import engine
    from moelib.measure import device

    monkeypatch.setattr(engine, "find", lambda *_: pytest.fail("an engine was asked for"))
    monkeypatch.setattr(device, "choose", lambda *_: pytest.fail("a device was asked for"))
    text = analysis.document("h100-twins", book="run", model="deepseek-moe-16b", quant="Q2_K", runner="")
    assert len(re.findall(r"\| cpu-moe +\| none +\|", text)) == 10  # of placement and runs, five blocks each
    assert "![VRAM of each run over time, deepseek-moe-16b/Q2_K](memory-deepseek-moe-16b-Q2_K.png)" in text
    assert "Tokens generated over time, deepseek-moe-16b/Q2_K, long-512" in text


@pytest.mark.parametrize("harm", ["gone", "damaged", "deep"])
def test_a_template_that_cannot_be_read_is_one_sentence(home, tmp_path, harm):
    path = home / "notebooks/analysis.ipynb"
    if harm == "gone":
        path.unlink()
    else:
        path.write_text("{" if harm == "damaged" else "[" * 100_000, encoding="utf-8")
    with pytest.raises(notebooks.NotebookError, match="analysis.ipynb .*cannot be read.*MOELIB_HOME"):
        notebooks.execute("analysis", tmp_path / "out.ipynb", {"study": "smoke"}, progress=False)
