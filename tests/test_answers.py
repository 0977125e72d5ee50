"""The plan's questions, hypotheses and criteria: known worlds, and the committed study against its raw JSON."""

import json
import math
import re
import shutil
from collections import defaultdict
from dataclasses import replace
from statistics import fmean

import pytest
from conftest import REPO
from hypothesis import given
from hypothesis import strategies as st

from moelib.answers import claims, points, verdicts
from moelib.answers.points import Point
from moelib.base import stats
from moelib.base.stats import Estimate, number, percent
from moelib.catalogue.placement import Placement
from moelib.evidence.table import Table, load_modes_as_one
from moelib.report import advice, results
from moelib.study import frames
from moelib.study.study import Study

FULL = REPO / "outputs/h100-twins"
GIB = 1 << 30


@pytest.fixture(scope="module")
def full():
    return Study.read(FULL)


def point(quant="Q4_K_M", n="baseline", layers=0, vram=10.0, rate=100.0, spread=0.01, ttft=0.1, bits=4.8, ram=1.0):
    def told(x):
        return Estimate(x, x * (1 - spread), x * (1 + spread), 5)

    placement = Placement.parse(n)
    sources = {f"{quant} {n}": "digest"}
    return Point("m", quant, placement, layers, vram * GIB, ram * GIB, told(rate), told(ttft), bits, sources)


def test_a_point_dominates_only_beyond_doubt():
    usual = point()
    assert point(vram=5).dominates(usual)
    assert not point(vram=9.95).dominates(usual)  # within a hundredth
    assert point(rate=110).dominates(usual)
    assert not point(rate=101).dominates(usual)  # intervals overlap
    assert not point(rate=110, vram=11).dominates(usual)
    assert not point(vram=5, rate=95, spread=0.5).dominates(usual)  # slower, if not beyond doubt
    assert not point(rate=110, ttft=0.2).dominates(usual)
    assert point(ttft=0.05).dominates(usual)
    assert not replace(usual, ttft=None).dominates(usual)


def test_a_wide_interval_makes_no_tie_of_what_is_much_slower():
    wide = replace(point("Q2_K", rate=40.0), rate=Estimate(40.0, 2.0, 600.0, 5))
    assert points.choose([point(), wide], 12 * GIB, 64 * GIB).ties == ()
    near = replace(wide, rate=Estimate(60.0, 2.0, 600.0, 5))
    assert points.choose([point(), near], 12 * GIB, 64 * GIB).ties == (near,)


def test_the_document_says_which_rounds_ran_on_another_machine(full):
    """And does not pool their ratios with those of one machine."""
    two = Study.read(REPO / "outputs/h100")
    said = [line for line in results.conventions(two).text.splitlines() if "several machines" in line]
    assert len(said) == 1
    assert "rounds 4 and 5 of deepseek-moe-16b (Q4_K_M, Q2_K, Q8_0) on a second machine." in said[0]
    assert "t is 12.7" in said[0]
    assert "88 to 97 %" in said[0]
    workload = two.parameters.workloads[-1]
    table = results.speed(two, "deepseek-moe-16b", workload)
    assert "that one machine measured together" in table.note
    column = f"tokens_per_s/{workload}"
    for c in frames.comparisons(two.runs, column):
        row = next(r for r in table.rows if (r["quant"], r["placement"]) == (c.quant, f"{c.side[0]}, {c.side[1]}"))
        own = stats.estimate(c.ratio, 100)
        assert (row["% of baseline"] == own) == (c.after["machine"].nunique() == 2), row
    assert "several machines" not in results.conventions(full).text
    assert "one machine measured" not in results.speed(full, "deepseek-moe-16b", "long-512").note


POINTS = st.lists(
    st.builds(point, vram=st.floats(1, 80), rate=st.floats(1, 500), ttft=st.floats(0.01, 10), spread=st.floats(0, 0.2)),
    min_size=1,
    max_size=8,
)


@given(POINTS)
def test_the_front_is_never_empty_and_nobody_on_it_is_dominated(some):
    judged = points.front(some)
    assert any(by is None for by in judged.values())
    for p, by in judged.items():
        assert (by is None) == (not any(q.dominates(p) for q in some))
        assert by is None or by.dominates(p)


SWEEP = [
    point(n="baseline", layers=0, vram=24, rate=200, ram=1),
    point(n="n-cpu-moe=9", layers=8, vram=17, rate=60, ram=8),
    point(n="cpu-moe", layers=27, vram=2, rate=20, ram=23),
]


def test_between_two_measured_placements_bytes_and_time_lie_on_a_line():
    """One dense layer: N=9 moves 8. 12 GiB are a third of the way from 17 to 2: 6.33 of 19 layers, so 7 are needed."""
    (one,) = points.between(SWEEP, 12 * GIB)
    assert (str(one.placement), one.moved_layers, one.between) == ("n-cpu-moe=16", 15, ("n-cpu-moe=9", "cpu-moe"))
    assert one.vram_bytes == pytest.approx((17 - 15 * 7 / 19) * GIB)
    assert one.vram_bytes <= 12 * GIB
    assert 1 / one.rate.value == pytest.approx(1 / 60 + (1 / 20 - 1 / 60) * 7 / 19)
    assert one.rate.low is None
    assert not one.is_measured
    assert list(points.between(SWEEP, 30 * GIB)) == []  # all fits
    assert list(points.between(SWEEP, 1 * GIB)) == []  # nothing does
    assert list(points.between([SWEEP[0], SWEEP[2]], 12 * GIB)) == []  # how many layers are dense is not known


def test_what_fits_is_chosen_by_speed_or_by_bits_and_ties_are_said():
    small = [point("Q2_K", n="cpu-moe", layers=27, vram=1.5, rate=20.1, bits=2.9, ram=14)]
    every = [*SWEEP, *small]
    best = points.choose(every, 12 * GIB, 64 * GIB)
    assert (str(best.best.placement), best.best.is_measured) == ("n-cpu-moe=16", False)
    tied = points.choose(every, 2 * GIB, 64 * GIB)
    assert (tied.best.quant, [p.quant for p in tied.ties]) == ("Q2_K", ["Q4_K_M"])
    assert points.choose(every, 2 * GIB, 64 * GIB, finest=True).best.quant == "Q4_K_M"
    assert points.choose(every, 2 * GIB, 20 * GIB, finest=True).best.quant == "Q2_K"  # its experts do not fit the RAM
    assert points.choose(every, 1 * GIB, 64 * GIB) is None


@given(POINTS, st.floats(1, 80), st.floats(0, 80), st.floats(0.5, 2))
def test_more_vram_or_ram_never_makes_the_choice_slower_or_coarser(some, card, more, ram):
    for larger in ((card + more, ram), (card, ram + more)):
        for finest in (False, True):
            small = points.choose(some, card * GIB, ram * GIB, finest=finest)
            large = points.choose(some, *(x * GIB for x in larger), finest=finest)
            fit = [p for p in some if p.vram_bytes <= card * GIB and p.ram_bytes <= ram * GIB]
            assert (small is None) == (not fit)
            if small:
                assert small.best in fit
                assert large.best.bits_per_weight >= small.best.bits_per_weight or not finest
                assert large.best.rate.value >= small.best.rate.value or finest


def test_of_several_load_modes_one_is_taken():
    """Though another one is 5 % faster; where there is no other, that one is."""
    labels = {"baseline": "mmap none", "n-cpu-moe=9": "mmap", "n-cpu-moe=20": "mmap none", "cpu-moe": "mmap none mlock"}
    sweep = [*SWEEP[:2], point(n="n-cpu-moe=20", layers=19, vram=8, rate=28), SWEEP[2]]
    some = [
        replace(p, placement=replace(p.placement, load_mode=mode), rate=Estimate(rate, None, None, 1))
        for p in sweep
        for mode in labels[str(p.placement)].split()
        for rate in [p.rate.value * (1.05 if mode == "mmap" else 1)]
    ]
    for mode in ("none", "mmap"):
        kept = [p.placement.label for p in points.in_load_mode(some, mode)]
        assert kept == ["baseline, mmap", "n-cpu-moe=9, mmap", f"n-cpu-moe=20, {mode}", f"cpu-moe, {mode}"]

        def chosen(gib, of=some, mode=mode, **options):
            best = points.choose(of, gib * GIB, 64 * GIB, load_mode=mode, **options).best
            return best.placement.load_mode, best.is_measured

        assert [chosen(gib) for gib in (2, 5, 12)] == [(mode, True), (mode, False), (mode, False)]
        assert chosen(12, of=[p for p in some if p.placement.label != "baseline, none"]) == ("mmap", False)
        assert chosen(12, predicted=False) == (mode, True)


def raw(folder):
    """(model, quant, placement, load mode) -> its runs by round, from the JSON alone: the last attempt of each."""
    found = defaultdict(dict)
    for path in sorted(folder.glob("records/*.json"), key=lambda p: int(p.stem.rpartition("_a")[2])):
        r = json.loads(path.read_bytes())
        s = r["spec"]
        found[s["model"], s["quant"], s["placement"], s["load_mode"]][s["block"]] = r["observed"]
    return found


def rate_of(observed, workload):
    requests = [q for q in observed["requests"] if q["workload"] == workload]
    begins = [next(i for i, n in enumerate(q["token_n"]) if n >= 20) for q in requests]
    return fmean(
        (q["token_n"][-1] - q["token_n"][i]) / (q["token_s"][-1] - q["token_s"][i])
        for q, i in zip(requests, begins, strict=True)
    )


@pytest.mark.parametrize(("folder", "workload"), [("h100-twins", "long-512"), ("h200", "mixed-512")])
def test_the_committed_answers_are_those_of_a_calculation_by_hand(folder, workload):
    study = Study.read(REPO / "outputs" / folder)
    told = {a.asked: a for a in (ask(study) for ask in verdicts.ANSWERS)}
    equally, _, slower, least = told.values()
    assert (equally.verdict, slower.verdict) == ("no", "yes")
    runs = raw(study.path)
    for model in ("phi-3.5-moe", "deepseek-moe-16b"):
        for quant in ("Q4_K_M", "Q2_K", "Q8_0"):
            base, away = runs[model, quant, "baseline", "mmap"], runs[model, quant, "cpu-moe", "mmap"]
            kept = math.exp(fmean(math.log(rate_of(away[b], workload) / rate_of(base[b], workload)) for b in base))
            said = next(s for s in equally.because if s.startswith(model))
            assert f"{percent(kept)} at {quant}" in said
            said = next(s for s in slower.because if s.startswith(f"{model}: decoding"))
            assert re.search(rf"{re.escape(number(1 / kept))} \[[\d., ]+\] times at {quant}", said)
            extra = 1 / math.exp(fmean(math.log(rate_of(o, workload)) for o in away.values()))
            extra -= 1 / math.exp(fmean(math.log(rate_of(o, workload)) for o in base.values()))
            assert f"{number(extra, 1e3)} ms for" in " ".join(slower.because)
            vram = max(max(o["memory"]["value_bytes"], o["memory"]["growth_bytes"]) for o in away.values())
            said = next(s for s in least.because if s.startswith(model))
            assert f"{vram / GIB:.2f} GiB at {quant}" in said
            assert "with 1,024 tokens of context (cpu-moe, mmap)" in said


def test_each_half_of_a_hypothesis_stands_by_itself(full):
    states = [(a.asked, a.verdict) for a in claims.hypotheses(full)]
    assert [verdict for _, verdict in states] == [
        *("supported", "supported", "supported"),
        *("supported", "open"),
        *("supported", "supported", "open"),
    ]
    assert [asked[:2] for asked, _ in states] == ["H1"] * 3 + ["H2"] * 2 + ["H3"] * 3
    (quality,) = [a for a in claims.hypotheses(full) if "highest quality" in a.asked]
    assert "was not measured" in quality.because[0]
    assert len(results.hypotheses(full).rows) == 8


def test_a_study_of_one_quant_is_not_asked_what_compares_quants():
    table = results.hypotheses(Study.read(REPO / "outputs/h100-threads"))
    assert not table.rows
    assert table.why_empty == "they compare quants; this study has Q4_K_M alone."


def swapped(study, column, a, b):
    """The study whose runs of two quants have each other's values of a column."""
    runs = study.runs.copy()
    other = runs.copy()
    for one, two in ((a, b), (b, a)):
        to = runs["quant"] == one
        keys = ["model", "placement", "load_mode", "round"]
        values = runs[runs["quant"] == two].set_index(keys)[column]
        other.loc[to, column] = [values.get(tuple(row)) for row in runs.loc[to, keys].itertuples(index=False)]
    changed = Study(study.path, study.plan, study.contents)
    changed.__dict__["runs"] = other
    return changed


def test_the_least_vram_names_the_cache_of_the_placement_that_needs_it():
    folder = REPO / "outputs/h100-least-vram"
    memory = [
        json.loads(f.read_text(encoding="utf-8"))["observed"]["memory"]
        for f in (folder / "records").iterdir()
        if "ubatch=31,kv=q8_0" in f.name
    ]
    answer = verdicts.least_vram(Study.read(folder))
    assert answer.says == f"{max(max(m['value_bytes'], m['growth_bytes']) for m in memory) / GIB:.2f} GiB."
    # 1,024 tokens of 28 layers, K and V of 16 heads of 128, 34 bytes for 32 numbers of q8_0
    cache = 1024 * 28 * 2 * 16 * 128 * 34 / 32 / (1 << 20)
    assert f"{cache:.2f} MiB more for each 1,024 tokens" in answer.because[0]


def test_that_a_file_is_cold_is_no_choice():
    (cold,) = verdicts.sweet_spot(Study.read(REPO / "outputs/h200-cold")).because[:1]
    assert "of 2 files and placements no other one beats these" in cold
    assert "cache=cold" not in cold


def test_a_study_of_one_quant_says_nothing_of_others():
    one = Study.read(REPO / "outputs/h100-prompts")
    assert not any("the smallest" in s for s in verdicts.sweet_spot(one).because)
    assert verdicts.penalty(one).verdict == "undecided"
    assert verdicts.penalty(one).because[0] == "No two quants were measured side by side."


def test_a_world_in_which_a_hypothesis_is_wrong_refutes_it(full):
    def states(study):
        return {a.asked: a.verdict for a in claims.hypotheses(study)}

    slow = states(swapped(full, "tokens_per_s/long-512", "Q2_K", "Q8_0"))
    assert slow["H1: Q2_K decodes fastest with offload"] == "refuted"
    assert slow["H1: Q2_K needs the least VRAM with offload"] == "supported"
    large = states(swapped(full, "vram_bytes", "Q2_K", "Q8_0"))
    assert large["H3: Q8_0 needs the most VRAM with offload"] == "refuted"
    assert large["H1: Q2_K needs the least VRAM with offload"] == "refuted"


def test_the_criteria_are_computed(tmp_path):
    study = Study.read(REPO / "outputs/h200")
    states = {a.asked: (a.verdict, a.because[0]) for a in claims.criteria(study)}
    assert [v for v, _ in states.values()] == ["met", "met", "met", "met", "met", "not met"]
    assert states["All planned runs went without errors"][1].startswith("36 of the 36 runs that the plan has")
    part = study.part("phi-3.5-moe", ["Q2_K"])
    lost = Study(tmp_path, part.plan, replace(part.contents, manifests=(), evidence=replace(part.evidence, records=[])))
    assert [a.verdict for a in claims.criteria(lost)] == ["not met", "not met", "not met", "open", "not met", "not met"]


def receipt(study, **how):
    files = {m.file_name: m.sha256 for m in study.manifests}
    known = {"hub": "https://hub", "here": False, "repository": "a/b", "public": True, "at": "2026", "files": files}
    return json.dumps(known | how)


def test_an_upload_counts_by_its_receipt(full, tmp_path):
    def state(**left):
        shutil.rmtree(tmp_path / "published", ignore_errors=True)
        for name, text in left.items():
            (tmp_path / "published").mkdir(exist_ok=True)
            (tmp_path / "published" / f"{name}.json").write_text(text, encoding="utf-8")
        told = claims.criteria(Study(tmp_path, full.plan, full.contents))[-1]
        return told.verdict, told.because[0]

    assert state() == ("not met", "Random weights are not to be published.")
    assert state(b=receipt(full)) == ("met", "Public, and read back whole: a/b.")
    verdict, why = state(b=receipt(full, here=True), c=receipt(full, public=False), d="{}")
    assert verdict == "not met"
    assert "The file d.json is no receipt; a/b was read back whole, but is on a stand-in of the Hub" in why
    assert "a/b was read back whole, but is private; in no public repository: " in why
    assert all(m.file_name in why.replace("\\", "") for m in full.manifests)
    one = full.manifests[0]
    assert state(b=receipt(full, files={one.file_name: "0" * 64})) == ("not met", state(b=receipt(full, files={}))[1])


def tables(shown):
    return {t.name: t for t in shown if isinstance(t, Table)}


def test_what_to_run_says_it_card_by_card(full):
    shown = tables(advice.what_to_run(full))
    assert list(shown) == ["what-to-run-phi-3.5-moe", "what-to-run-deepseek-moe-16b"]
    phi, deepseek = shown.values()
    assert "`llama-server -m FILE -ngl 99 -c 1024 -np 1 -fa on`" in phi.note
    assert not deepseek.note, "it is the same"
    fastest = [r for r in phi.rows if r["for"] != "bits"]
    assert [(r["card"], r["file"]) for r in fastest] == [("4 to 16", "Q2_K"), ("24", "Q2_K"), ("from 32", "Q4_K_M")]
    assert [r["flags"] for r in fastest] == ["`--cpu-moe --load-mode none`", "", ""]
    assert (fastest[0]["VRAM"], fastest[0]["RAM used"]) == ("1.70", "14.1")
    assert ("4 to 32", "64", "Q8_0") in [(r["card"], r["RAM"], r["file"]) for r in phi.rows if r["for"] != "speed"]
    assert not any("predicted" in r["tokens/s"] for t in shown.values() for r in t.rows)
    assert [(r["card"], r["file"]) for r in deepseek.rows if r["for"] != "bits"] == [
        ("4 to 6", "Q2_K"),
        ("8", "Q2_K"),
        ("from 12", "Q2_K, or Q4_K_M: tied"),  # which does not fit 8 GB
    ]


def width(word):
    """Pixels at a letter's 16, in Noto Sans; 15 less than a whole table's in Chromium at the most."""
    return sum(9.2 if c.isdigit() else 4.7 if c in " ,.[]()-\xa0" else 8.8 for c in word)


@pytest.mark.parametrize("study", ["outputs/h100-twins", "outputs/h200", "outputs/h200-twins", "docs/example/demo"])
def test_the_first_tables_fit_a_page_of_760_pixels(study):
    """As GitHub shows them: a cell has 27 pixels more for margins and border; a line ends at a space or a hyphen."""
    of = Study.read(REPO / study)
    speeds = [results.speed(of, model, of.parameters.workloads[-1]) for model in advice.models(of)]
    for table in (*tables([*advice.what_to_run(of), *results.vram(of)]).values(), *speeds):
        rows = [row["cells"] for row in table.provenance()["rows"]]
        columns = ([head, *(row[head] for row in rows)] for head in (rows[0] if rows else ()))
        words = ([w for cell in cells for w in re.findall(r"[^ -]*-|[^ -]+", cell)] for cells in columns)
        assert sum(27 + max(map(width, of_column)) for of_column in words) <= 745, table.name


def test_a_repeated_prompt_is_said_first_with_what_it_copied(full):
    (said,) = results.prompts(full)
    assert "**Workload long-512 repeats one sentence to its 512 tokens.**" in said.text
    deepseek = re.search(r"deepseek-moe-16b ([\d.]+) % to ([\d.]+) %", said.text)
    assert 55 < float(deepseek[1]) <= float(deepseek[2]) < 70


def test_nothing_that_does_not_vary_has_an_interval(full):
    parts = tables(results.vram(full)).values()
    for t in (*parts, *(results.speed(full, m, "long-512") for m in ("phi-3.5-moe", "deepseek-moe-16b"))):
        for row in t.rows:
            for value in row.values():
                m = re.search(r"\[([\d.]+), ([\d.]+)\]", str(value))
                assert not m or m[1] != m[2], row
    every = [row for t in parts for row in t.rows]
    assert [row["VRAM"] for row in every if "[" in row["VRAM"]] == ["2855 [2853, 2857]"]
    for row in (row for row in every if row["placement"] == "baseline, mmap"):
        terms = [float(str(row[k]).split(" ")[0]) for k in ("weights", "KV", "buffer", "rest", "VRAM")]
        assert sum(terms[:4]) == pytest.approx(terms[4], abs=2)
    demo = Study.read(REPO / "tests/fixtures/twins")
    assert not any("device" in row for t in tables(results.vram(demo)).values() for row in t.rows), "it is not known"


def test_vram_and_what_is_saved_are_means_over_the_rounds(full):
    models, mib = ("phi-3.5-moe", "deepseek-moe-16b"), 1 << 20
    rows = {(m, r["quant"], side): r for m in models for r in results.vram_of(full, m).rows for side in sides(r)}
    for (model, quant, placement, load_mode), rounds in raw(FULL).items():
        row = rows.pop((model, quant, f"{placement}, {load_mode}"))
        base = raw_vram(model, quant)
        vram = {b: o["memory"]["value_bytes"] for b, o in rounds.items()}
        assert row["VRAM"].split(" ")[0] == number(fmean(vram.values()), 1 / mib)
        assert row["weights"] == number(rounds[0]["placement"]["device_bytes"], 1 / mib)
        saved = 1 - math.exp(fmean(math.log(vram[b] / base[b]) for b in vram))
        assert row["saved"] == (percent(saved) if placement == "cpu-moe" else "n/a")
    assert not rows


def sides(row):
    """Of a row of VRAM: load modes that differ in nothing else have one."""
    placement, _, modes = row["placement"].partition(", ")
    return [f"{placement}, {mode}" for mode in modes.split(" or ")]


def test_load_modes_are_one_row_only_where_they_take_the_same():
    row = {"placement": "cpu-moe, mmap", "VRAM": "5", "device": "6"}
    rows = [
        row,
        row | {"placement": "cpu-moe, none", "device": "7"},
        row | {"placement": "cpu-moe, mlock", "VRAM": "4"},
    ]
    shown, sources = load_modes_as_one(rows, [{"a": "1"}, {"b": "2"}, {"c": "3"}])
    assert shown == [row | {"placement": "cpu-moe, mmap or none", "device": "6 or 7"}, rows[2]]
    assert sources == [{"a": "1", "b": "2"}, {"c": "3"}]
    other = [row, row | {"placement": "cpu-moe,ubatch=31, mmap"}]
    assert load_modes_as_one(other, [{}, {}])[0] == other, "it is another placement"
    plain = [{"placement": "cpu-moe", "VRAM": "5"}] * 2
    assert load_modes_as_one(plain, [{}, {}])[0] == plain


def raw_vram(model, quant):
    return {b: o["memory"]["value_bytes"] for b, o in raw(FULL)[model, quant, "baseline", "mmap"].items()}


def test_values_far_from_the_others_are_named_and_kept(full):
    text = results.odd(full).text
    m = re.search(r"(\d+) of (\d+) are: (.*)\.$", text)
    assert (int(m[2]), len(m[3].split("; "))) == (360, int(m[1]))
    assert 0 < int(m[1]) < 30


def test_ttft_by_the_length_of_the_prompt_is_that_of_the_records():
    """The step at 32 tokens, by hand from the raw JSON."""
    study = Study.read(REPO / "outputs/h100-prompts")
    (table,) = results.by_prompt(study)
    took = defaultdict(list)
    for file in (study.path / "records").iterdir():
        run = json.loads(file.read_text(encoding="utf-8"))
        side = f"{run['spec']['placement']}, {run['spec']['load_mode']}"
        for tokens in (31, 32):
            warm = [q for q in run["observed"]["requests"] if q["workload"] == f"drawn-{tokens}" and q["index"]]
            took[side, tokens].append(fmean(q["token_s"][0] for q in warm))
    for row in table.rows:
        of = [math.exp(fmean(map(math.log, took[row["placement"], n]))) for n in (31, 32)]
        assert [row["31"], row["32"]] == [number(x, 1e3) for x in of]
        assert row["32 / 31"].split()[0] == number(of[1] / of[0])
    steps = {row["placement"]: float(row["32 / 31"].split()[0]) for row in table.rows}
    assert steps["cpu-moe, mmap"] > 2 > 1 > steps["cpu-moe, none"], "a copy from a mapped file costs, a pinned one pays"
    assert results.by_prompt(Study.read(REPO / "outputs/h100-threads")) == []
