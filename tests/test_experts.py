"""The table, the figures and the command of which experts texts use."""

import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from routes import found_of, made, sample, spec_of
from test_quality import STUDY, give_text

from moelib import cli
from moelib.answers import experts as answers
from moelib.base.files import InUse
from moelib.campaign import assess, bench, campaign
from moelib.catalogue import params
from moelib.figures import routing
from moelib.report import experts


@pytest.fixture
def shown(tmp_path):
    """A trained model with favourites, beside its twin."""
    both = spec_of(context=320, chunks=2, tokens=96)
    trained = replace(both, weights="real", quant="Q4_K_M")
    made(tmp_path, both, sample(96, 8, 16, seed=1))
    t = sample(96, 8, 16, seed=2, skew=1.2, stay=0.4)
    usual = found_of(t, trained)
    skewed = tuple(tuple(int(x) for x in np.array(c) * 640 // 96) for c in t.selections)
    short = [640 * 2 - sum(c) for c in skewed]
    counts = tuple((*c[:-1], c[-1] + n) for c, n in zip(skewed, short, strict=True))
    made(tmp_path, trained, t, replace(usual, counts=counts))
    return answers.used(tmp_path)


def test_a_sealed_record_that_does_not_hold_is_not_shown(tmp_path):
    spec, t = spec_of(context=16, chunks=2), sample()
    good = found_of(t, spec)
    made(tmp_path, spec, t, replace(good, counts=tuple(tuple(c + 1 for c in layer) for layer in good.counts)))
    assert answers.used(tmp_path) == []
    made(tmp_path, replace(spec, tokens=11), sample(11))
    (u,) = answers.used(tmp_path)
    assert [x.routed for x in answers.used(tmp_path, {u.routed.key})] == [u.routed]
    assert answers.used(tmp_path, {"other"}) == []


def test_the_table_has_balance_and_hits_trained_before_its_twin(shown):
    trained, twin = answers.rows(shown)
    assert (trained["weights"], twin["weights"]) == ("trained", "geometry twin")
    assert twin["evenness"] == "1.000, least 1.000"
    assert float(trained["evenness"].split(",")[0]) < 0.9
    assert twin["experts"] == "2 of 16"
    assert twin["unused"] == "0 of 128"
    c = shown[0].curve
    assert trained["hits of 1/2"] == f"{c.lru[6]:.0%} / {c.shuffled[6]:.0%} / {c.static[6]:.0%} (k = 8)"
    assert "nothing of time" in answers.NOTE


def test_the_map_has_every_expert_on_one_scale(shown):
    figure = routing.use(shown)
    maps = [ax for ax in figure.axes if ax.images]
    assert len(maps) == 2
    scales = {ax.images[0].get_clim() for ax in maps}
    ((low, high),) = scales
    for ax, u in zip(maps, shown, strict=True):
        table = np.asarray(ax.images[0].get_array())
        assert table.shape == (8, 16)
        assert np.allclose(table.mean(axis=1), 1)
        assert low == 0
        assert table.max() <= high
        crosses = {tuple(p) for c in ax.collections for p in c.get_offsets().tolist()}
        unused = {(e, n) for n, layer in enumerate(u.counts) for e, c in enumerate(layer) if c == 0}
        assert crosses == unused
    assert "trained" in maps[0].get_title()
    assert "geometry twin" in maps[1].get_title()


def test_the_curves_are_those_of_the_trace_and_differ_in_grey(shown):
    figure = routing.hits(shown)
    for ax, u in zip(figure.axes, shown, strict=True):
        by_line = dict(zip(routing.STYLES, ax.lines, strict=True))
        for line, ys in zip(by_line.values(), (u.curve.lru, u.curve.shuffled, u.curve.static), strict=True):
            assert line.get_ydata() == pytest.approx([100 * y for y in ys])
        assert len({(line.get_linestyle(), line.get_marker()) for line in ax.lines}) == 3
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == list(routing.STYLES)


def test_figures_say_what_they_show_and_of_what_and_are_the_same_each_time(shown, tmp_path):
    paths = routing.draw(shown, tmp_path / "a")
    assert [p.name for p in paths] == ["experts.png", "hits.png"]
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in routing.draw(shown, tmp_path / "b")]
    for p in paths:
        said = json.loads(p.with_suffix(".json").read_text(encoding="utf-8"))
        assert all(u.name in said["alt"] for u in shown)
        assert said["from"] == {k: v for u in shown for k, v in u.routed.cited.items()}
    for empty in (routing.use([]), routing.hits([])):
        (axis,) = empty.axes
        assert axis.texts[0].get_text().startswith("no data: ")


def test_lightness_alone_tells_more_from_less():
    """For readers who see no colours: each step of the scale is lighter than the one before."""
    import matplotlib as mpl

    r, g, b = mpl.colormaps[routing.MAP](np.linspace(0, 1, 64))[:, :3].T
    assert (np.diff(0.2126 * r + 0.7152 * g + 0.0722 * b) > 0).all()


@pytest.fixture
def words(home):
    give_text(home)
    (home / "params/studies/words.yaml").write_text(STUDY, encoding="utf-8")
    params._yaml.cache_clear()
    return home


def run(*args):
    return CliRunner().invoke(cli.main, ["experts", *args])


@pytest.mark.engine
def test_the_command_shows_the_first_quant_of_each_model_and_does_nothing_twice(words, monkeypatch):
    into = words / "figures"
    said = run("words", "--tokens", "8", "--into", str(into))
    assert said.exit_code == 0, said.output
    assert "deepseek-moe-16b Q8_0, words: valid" in said.output
    assert "| deepseek-moe-16b | Q8_0" in said.output
    assert "Q2_K" not in said.output
    assert "6 of 16" in said.output
    assert {p.name for p in into.iterdir()} == {"experts.png", "experts.json", "hits.png", "hits.json"}
    study, _ = campaign.select("words")
    records = sorted((study.path / "routing").glob("*.json"))
    assert len(records) == 1
    monkeypatch.setenv("MOELIB_LLAMA_CPP", "/nowhere")
    again = run("words", "--tokens", "8", "--beside", "words")
    assert again.exit_code == 0, again.output
    assert again.output.count("| deepseek-moe-16b | Q8_0") == 2
    assert sorted((study.path / "routing").glob("*.json")) == records
    other = run("words", "--tokens", "9")
    assert other.exit_code != 0
    monkeypatch.undo()


@pytest.mark.engine
def test_evidence_that_was_touched_is_not_shown_and_what_it_bore_out_is_done_again(words):
    args = ("words", "--tokens", "8", "--cell", "deepseek-moe-16b/Q2_K")
    assert run(*args).exit_code == 0
    study, _ = campaign.select("words")
    assert [u.routed.spec.quant for u in answers.used(study.path)] == ["Q2_K"]
    evidence = next((study.path / "routing/raw").glob("*.csv.gz"))
    evidence.write_bytes(evidence.read_bytes()[:-9])
    assert answers.used(study.path) == []
    again = run(*args)
    assert again.exit_code == 0, again.output
    assert [u.routed.attempt for u in answers.used(study.path)] == [2]


@pytest.mark.engine
def test_what_another_process_followed_meanwhile_is_not_followed_again(words, monkeypatch):
    study, cells = campaign.select("words", "deepseek-moe-16b/Q2_K")
    asked = assess.routes(study, cells, 8)
    with bench.alone(study, cells), monkeypatch.context() as m:
        m.setenv("MOELIB_PATIENCE", "0.01")
        with pytest.raises(InUse, match=r"deepseek-moe-16b/Q2_K of study words"):
            list(assess.route(study, asked))
    real, others = assess.alone, []

    @contextlib.contextmanager
    def second(study, cells):
        monkeypatch.setattr(assess, "alone", real)
        others.extend(assess.route(study, asked))
        with real(study, cells) as leases:
            yield leases

    monkeypatch.setattr(assess, "alone", second)
    mine = list(assess.route(study, asked))
    assert [r.digest for r in mine] == [r.digest for r in others]
    assert [r.attempt for r in mine] == [1]


@pytest.mark.engine
def test_what_failed_is_said_and_exits_so(words):
    text = (words / "params/studies/words.yaml").read_text(encoding="utf-8")
    (words / "params/studies/words.yaml").write_text(text.replace("chunks: 6,", "chunks: 9000,"), encoding="utf-8")
    said = run("words", "--tokens", "8", "--beside", "elsewhere")
    assert said.exit_code == 1
    assert "failed (text-too-short)" in said.output
    assert "must have 9000 chunks of 64 tokens" in said.output
    assert "n/a" not in said.output


def test_a_study_without_texts_says_what_to_do(home):
    said = run("smoke")
    assert said.exit_code != 0
    assert "names no texts to compare over" in said.output


def test_what_is_asked_is_of_the_first_text_and_of_each_file(words):
    study, cells = campaign.select("words")
    asked = assess.routes(study, cells, 100)
    assert [(c.quant, s.model, s.quant, s.corpus, s.tokens, s.weights) for c, s in asked] == [
        (c.quant, "deepseek-moe-16b", c.quant, "words", 100, "twin") for c in cells
    ]
    assert assess.routes(study, cells, 100, twins=True) == asked, "a study of twins has no others"
    assert [c.quant for c in assess.first_quants(study)] == ["Q8_0"]
    assert not (study.path / "routing").exists()


def test_the_document_has_the_table_the_cache_and_their_records(shown):
    said = experts.used(shown)
    table, cache = said[1], said[2]
    assert [row["weights"] for row in table.rows] == ["trained", "geometry twin"]
    assert table.row_sources == [u.routed.cited for u in shown]
    assert set(table.rows[0]) == set(experts.COLUMNS)
    c = shown[0].curve
    gain = f"{100 * (c.lru[6] - c.shuffled[6]):+.1f} points"
    assert f"8 of 16 experts of each layer would serve {c.lru[6]:.0%} of all accesses, {gain}" in cache.text
    assert cache.sources == experts.sources(shown)
    assert "hits over its first 96 tokens, one by one" in table.note
    assert experts.used([]) == []


@pytest.mark.engine
def test_a_twin_of_trained_weights_has_their_header_and_is_followed_beside_them(words, engine):
    path = words / "params/studies/words.yaml"
    text = path.read_text(encoding="utf-8").replace("weights: twin", "weights: real").replace("scale: nano\n", "")
    text = text.replace("models: [deepseek-moe-16b]", "models: [trained-phimoe]").replace("Q2_K", "Q4_K_M")
    path.write_text(text, encoding="utf-8")
    said = run("words", "--tokens", "8", "--twins")
    assert said.exit_code == 0, said.output
    folder = campaign.select("words")[0].path
    real, twin = answers.used(folder)
    assert (real.is_twin, twin.is_twin) == (False, True)
    assert real.routed.sheet.weights == "real"
    assert twin.routed.sheet.weights == "twin"
    assert real.routed.sheet.tensor_types == twin.routed.sheet.tensor_types
    assert real.counts != twin.counts
