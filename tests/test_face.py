"""What `import moelib` offers, on the committed studies."""

import re
import subprocess
import sys

import ggufs
import nbformat
import pandas as pd
import papermill
import pytest
from conftest import REPO
from factory import SHARED

import moelib
from moelib import lab
from moelib.catalogue import params
from moelib.face import UnknownName
from moelib.study import frames


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELIB_OUTPUTS", str(REPO / "docs/example"))
        patch.setenv("MOELIB_HOME", str(REPO))
        yield moelib.load("demo")


def test_the_face_is_what_completion_shows():
    names = [
        "Record",
        "__version__",
        "compare",
        "frame",
        "header",
        "load",
        "plan",
        "preview",
        "quantize",
        "run",
        "studies",
        "twin",
    ]
    assert dir(moelib) == names
    assert all(getattr(moelib, name).__doc__ for name in moelib.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        moelib.lod  # noqa: B018


def test_what_the_package_says_first_of_a_study_runs(monkeypatch):
    monkeypatch.setenv("MOELIB_OUTPUTS", str(REPO / "outputs"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    *before, compared = moelib.__doc__.split("\n\n")[1].splitlines()
    names = {"moelib": moelib}
    exec("\n".join(before), names)
    assert len(before) == 2
    assert list(eval(compared, names)["study"].unique()) == [names["study"].name]


def test_from_nothing_to_a_plot_in_four_lines(tmp_path):
    code = (
        "import matplotlib; matplotlib.use('Agg')\n"
        "import moelib, seaborn\n"
        "runs = moelib.load('demo').runs\n"
        "plot = seaborn.scatterplot(runs, x='vram_bytes', y='tokens_per_s/prose', hue='quant', style='placement')\n"
        f"plot.figure.savefig({str(tmp_path / 'plot.png')!r}); print(len(runs))"
    )
    env = {
        "MOELIB_OUTPUTS": str(REPO / "docs/example"),
        "MOELIB_HOME": str(REPO),
        "PATH": "/usr/bin",
        "HOME": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, encoding="utf-8")
    assert done.stdout.strip() == "60", done.stderr
    assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["index", "explore"])
def test_a_playground_runs_from_top_to_bottom(tmp_path, monkeypatch, name):
    monkeypatch.setenv("MOELIB_OUTPUTS", str(REPO / "docs/example"))
    monkeypatch.setenv("MOELIB_HOME", str(REPO))
    out = tmp_path / f"{name}.ipynb"
    papermill.execute_notebook(REPO / f"notebooks/{name}.ipynb", out, {"study": "demo"}, progress_bar=False)
    cells = [c for c in nbformat.read(out, 4).cells if c.cell_type == "code"]
    assert all(c.execution_count for c in cells)
    assert any("image/png" in o.get("data", {}) for c in cells for o in c.outputs)
    assert [p.name for p in tmp_path.iterdir()] == [f"{name}.ipynb"]


def test_studies_lists_what_can_be_loaded(study):
    frame = moelib.studies()
    assert frame.loc["demo", "records"] == 60
    assert frame.loc["demo", "models"] == "trained-phimoe, trained-deepseek"


def test_an_unknown_name_gets_the_nearest_one_or_the_list(study):
    with pytest.raises(UnknownName, match="did you mean 'demo'"):
        moelib.load("demmo")
    with pytest.raises(UnknownName, match="did you mean 'trained-phimoe/Q4_K_M'"):
        study.why("trained-phimoe/Q4_K")
    with pytest.raises(UnknownName, match="no record of demo match"):
        study.record("nothing")
    with pytest.raises(UnknownName, match="30 records"):
        study.record("trained-phimoe")
    assert issubclass(UnknownName, params.UserError)


def test_a_study_reads_short_and_leads_to_its_records(study):
    assert repr(study) == (
        "<Study demo: 60 of 60 runs usable: 60 valid, 0 degraded; 6 cells, columns in .runs and .requests>"
    )
    html = study._repr_html_()
    assert html.count("<tr>") == 7
    assert "trained-phimoe/Q4_K_M" in html
    run_id = study.runs["run_id"][0]
    assert study.record(run_id).run_id == run_id
    assert study.record(run_id[-15:]).digest == study.record(run_id).digest
    assert study.why("trained-phimoe/Q2_K") == "trained-phimoe/Q2_K: 9 of 9 runs usable"
    assert study.problems == []


def test_every_measured_column_is_declared_and_every_declared_one_is_there(study):
    columns = study.columns
    assert list(columns.columns) == ["label", "unit", "better", "source"]
    assert set(study.runs.columns) == set(columns.index) | set(frames.WHERE) | set(frames.SETUP)
    assert columns["label"].notna().all()
    assert columns.loc["tokens_per_s/prose", "better"] == "more"
    for name, unit in (("vram_bytes", "bytes"), ("load_s", "s"), ("ttft_warm_s/plan-short", "s")):
        assert columns.loc[name, "unit"] == unit


def test_what_was_not_measured_is_not_0(study):
    """Loopback has no board whose energy could be counted."""
    assert study.runs["board_watt"].isna().all()
    assert study.runs["joule_per_token/prose"].isna().all()
    measured = study.runs.drop(columns=[*frames.WHERE, *frames.SETUP])
    assert (measured.dtypes == "float64").all()


def test_requests_have_a_row_each(study):
    assert len(study.requests) == 60 * 4
    assert set(study.requests["request"]) == {0, 1}
    assert (study.requests["ttft_s"] > 0).all()


def test_compare_pairs_within_rounds(study):
    ratios = moelib.compare(study.runs, "tokens_per_s/prose")
    assert len(ratios) == 14  # two placements between the ends at Q4_K_M, else one, and all experts on the CPU
    assert (ratios["n"] == 3).all()
    assert ((ratios["low"] <= ratios["ratio"]) & (ratios["ratio"] <= ratios["high"])).all()
    assert (ratios["ratio"] < 1).sum() > 10
    still = study.runs.assign(vram_bytes=1e9)
    assert moelib.compare(still, "vram_bytes")[["low", "high"]].isna().all(axis=None)
    one = moelib.compare(study.runs[study.runs["round"] == 1], "vram_bytes")
    assert (one["n"] == 1).all()
    assert one["low"].isna().all()
    # a round that lacks one side says nothing
    lame = study.runs.drop(study.runs.index[(study.runs["round"] == 1) & (study.runs["placement"] == "baseline")])
    assert (moelib.compare(lame, "vram_bytes")["n"] == 2).all()
    shuffled = study.runs.sample(frac=1, random_state=1)
    merged = ratios.merge(moelib.compare(shuffled, "tokens_per_s/prose"), on=["model", "quant", "placement"])
    assert (abs(merged["ratio_x"] - merged["ratio_y"]) < 1e-12).all()


def test_compare_refuses_what_cannot_be_compared(study):
    with pytest.raises(frames.FrameError, match="did you mean 'tokens_per_s/prose'"):
        moelib.compare(study.runs, "tokens_per_s/prse")
    with pytest.raises(frames.FrameError, match="lacks model, round"):
        moelib.compare(study.runs.drop(columns=["round", "model"]), "vram_bytes")
    mixed = pd.concat([study.runs, study.runs.assign(gpu="another card", round=study.runs["round"] + 3)])
    with pytest.raises(frames.FrameError, match="differ in gpu: .*another card"):
        moelib.compare(mixed.reset_index(drop=True), "vram_bytes")
    with pytest.raises(frames.FrameError, match="a round has two runs of baseline"):
        moelib.compare(pd.concat([study.runs, study.runs], ignore_index=True), "vram_bytes")
    with pytest.raises(frames.FrameError, match="no round has board_watt"):
        moelib.compare(study.runs, "board_watt")
    with pytest.raises(frames.FrameError, match="the frame has baseline, cpu-moe, n-cpu-moe=2"):
        moelib.compare(study.runs, "vram_bytes", baseline="n-cpu-moe=9")


def test_frame_takes_any_records(study):
    frame = moelib.frame(study.records[:2])
    assert len(frame) == 2
    assert isinstance(study.records[0], moelib.Record)
    assert repr(study.records[0]) == f"<Record {study.records[0].run_id}: valid>"
    assert moelib.frame([]).empty


def test_a_header_is_read_without_its_weights(tmp_path):
    path = ggufs.write_nextn(tmp_path / "small.gguf")
    header = moelib.header(path)
    assert header.layers == 3
    assert re.fullmatch(
        r"<Header small.gguf: \w+, 3 layers, \d+ tensors, [\d,]+ MiB, experts [\d,]+ MiB>", repr(header)
    )
    with pytest.raises(params.UserError):
        moelib.header(REPO / "README.md")


@pytest.mark.engine
def test_one_run_without_a_study_is_measured_and_audited_and_written_nowhere(home, models_folder):
    before = sorted(p for p in home.rglob("*") if p.is_file())
    file = moelib.quantize("deepseek-moe-16b", "Q8_0", scale="nano")
    assert moelib.quantize("deepseek-moe-16b", "Q8_0", scale="nano") == file
    short = {"workloads": ["smoke"], "context": 256, "device": "loopback"}
    sweep = [moelib.run(file, placement, **short) for placement in ("baseline", "cpu-moe")]
    assert {r.status for r in sweep} <= {"valid", "degraded"}
    assert {reason for r in sweep for reason in r.reasons} <= SHARED
    assert all(len(r.audit) > 30 and len(r.digest) == 64 for r in sweep)
    frame = moelib.frame(sweep)
    assert frame["placement"].tolist() == ["baseline", "cpu-moe"]
    assert frame["moved_bytes"].tolist() == [0, moelib.header(file).moved_bytes("cpu-moe")]
    assert moelib.compare(frame, "vram_bytes")["ratio"].iloc[0] < 1
    assert sorted(p for p in home.rglob("*") if p.is_file()) == before


def test_a_quant_that_does_not_exist_is_refused_before_a_source_is_written(home, engine, monkeypatch):
    monkeypatch.setenv("MOELIB_MODELS", str(home / "own-models"))
    with pytest.raises(params.ParamsError, match="did you mean 'Q4_K_M'"):
        moelib.quantize("deepseek-moe-16b", "Q4_KM", scale="nano")
    assert not (home / "own-models").exists()


def test_a_run_that_cannot_be_is_refused_in_a_sentence(tmp_path):
    own = ggufs.write_nextn(tmp_path / "own.gguf")
    with pytest.raises(ValueError, match="did you mean 'ubatch'"):
        moelib.run(own, "cpu-moe,ubath=64")
    with pytest.raises(params.ParamsError, match="unknown workload"):
        moelib.run(own, workloads=["nothing"])


def test_a_notebook_completes_studies_and_columns(study):
    """As the kernel answers the tab key."""
    from IPython.core.completer import provisionalcompleter
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell(user_ns={"moelib": moelib, "runs": study.runs})
    lab.install(shell)

    def offered(line):
        with provisionalcompleter():
            return {c.text for c in shell.Completer.completions(line, len(line))}

    assert offered('moelib.load("de') == {"demo"}
    assert offered("x = moelib.load('nothing") == set()
    assert {"load", "studies", "run"} <= {text.lstrip(".") for text in offered("moelib.")}
    assert 'vram_bytes"]' in {f'{text}"]' for text in offered('runs["vram_b')}
