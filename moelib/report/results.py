"""What a study concludes and its results: answers, claims, VRAM by parts, speed, and what is odd."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import pandas as pd

from moelib.answers import claims, quality, verdicts
from moelib.answers.verdicts import Answer
from moelib.audit.bounds import COPIED_TOKENS
from moelib.base import stats
from moelib.base.neutral import markdown as neutral
from moelib.base.stats import Estimate, number, percent
from moelib.engine.client import WARM_UP
from moelib.evidence import appendix
from moelib.evidence.small import neighbours, prompt_lengths
from moelib.evidence.table import (
    Sources,
    Table,
    Text,
    below_names,
    cite,
    cite_overhead,
    load_modes_as_one,
    merged,
    placed,
    reference,
)
from moelib.merge import setups
from moelib.report import findings
from moelib.study import frames, overhead
from moelib.study.frames import Comparison, Side
from moelib.study.study import Study


def answers(study: Study) -> list[Text]:
    """The plan's four questions, each with its verdict and the numbers for it."""
    return [_text(i, one) for i, one in enumerate((ask(study) for ask in verdicts.ANSWERS), 1)]


def _text(i: int, one: Answer) -> Text:
    lines = "\n".join(f"- {sentence}" for sentence in one.because)
    return Text(f"answer-{i}", f"### {i}. {one.asked}\n\n**{one.headline}**\n\n{lines}", one.sources)


def hypotheses(study: Study) -> Table:
    """H1 to H3, each half by itself; of a study of several quants, which they compare."""
    quants = study.parameters.quants
    if len(quants) == 1:
        return Table("hypotheses", [], [], why_empty=f"they compare quants; this study has {neutral(quants[0])} alone.")
    return _claims("hypotheses", "claim", claims.hypotheses(study), study)


def criteria(study: Study) -> Table:
    """The plan's six criteria of success."""
    return _claims("criteria", "criterion", claims.criteria(study), study)


def _claims(name: str, head: str, made: Sequence[Answer], study: Study) -> Table:
    rows = [{head: one.asked, "state": one.verdict, "because": " ".join(one.because)} for one in made]
    every = cite(study.used)
    return Table(name, rows, [one.sources or every for one in made])


def _span(of: Iterable[frames.Summary]) -> str:
    return stats.span(stats.values(s.value for s in of), stats.percent)


def prompts(study: Study) -> list[Text]:
    """Of workloads that repeat a text: what that does to the numbers; empty where none does."""
    sentences: list[str] = []
    sources: dict[str, str] = {}
    for name in (n for n, w in study.workloads.items() if w.repeats):
        moved = [s for s in frames.summaries(study.runs, f"experts_over_bus/{name}") if s.value]
        shares = ", ".join(
            f"{neutral(model)} {_span(s for s in moved if s.model == model)}"
            for model in dict.fromkeys(s.model for s in moved)
        )
        told = f" It copied this share of what a prompt of all experts copies to the GPU: {shares}." if moved else ""
        sentences.append(
            f"**Workload {neutral(name)} repeats one sentence to its {study.workloads[name].prompt_tokens} tokens.** "
            f"Such a prompt may need few of the experts: with experts on the CPU its TTFT may be too short.{told}"
        )
        sources |= {k: v for s in moved for k, v in s.sources.items()}
    return [Text("prompts", " ".join(sentences), sources or cite(study.used))] if sentences else []


def limits(study: Study) -> Text:
    """What the study does not tell."""
    cpus = "; ".join(sorted({f"{neutral(r.host.cpu)}, {r.host.cpus} usable" for r in study.used}))
    kinds, devices = {r.device.kind for r in study.used}, "; ".join(sorted(set(map(findings.machine, study.used))))
    sentences, sources = [_quality(study)], cite(study.used)
    if slowed := overhead.bias(study.overhead.values()):
        sentences.append(slowed)
        sources |= cite_overhead(study.overhead)
    if machines := appendix.apart(study):
        sentences.append(machines)
    if of_kinds := setups.said(setups.setups(study.used)):
        sentences.append(f"Machines of {len(of_kinds)} kinds: {neutral('. '.join(of_kinds))}. Speeds are theirs.")
    if "cuda" in kinds:
        sentences += [
            "VRAM is what the driver reports for a process that is alone on the GPU; the driver's list and the growth "
            "of the whole GPU must agree.",
            f"Speeds are those of {devices} with its CPU ({cpus}): they compare files and placements, "
            "and do not predict the speed of your machine. Experts on the CPU are computed by the CPU from RAM.",
        ]
    if "loopback" in kinds:
        sentences.append(
            "On the *loopback* device, VRAM is the resident memory of the process that acts as the device. Pages of "
            "caches and workspaces count once they are touched. Both processes share the cores and memory bandwidth of "
            "one machine, so the speed penalty of CPU offload is not that of a GPU."
        )
    sentences.append(
        f"Measured with a context of {study.parameters.context} tokens, one request at a time: a longer context, or "
        "more requests at once, takes more VRAM."
    )
    return Text("limits", "\n".join(f"- {s}" for s in sentences), sources)


def _quality(study: Study) -> str:
    """What is and is not known of the text."""
    lost = quality.by_file(study)
    if not lost:
        return "Text and quality were not measured: more bits per weight do not guarantee better text."
    models = sorted(neutral(m) for m in {m for m, _ in lost})
    return (
        f"Quality is that of {' and '.join(models)} over the texts named: other models, and other texts, lose more or "
        "less at the same quant."
    )


MIB = 1 << 20
ODD = 3.5
"""Robust standard deviations (1.4826 times the median distance from the median) beyond which a value is named."""
ODD_SHARE = 0.05
"""A value that is nearer to the median is not named: where values hardly vary, each is far in standard deviations."""


PARTS = {
    "weights": "vram_weights_bytes",
    "KV": "vram_cache_bytes",
    "buffer": "vram_compute_bytes",
    "rest": "vram_rest_bytes",
    "VRAM": "vram_bytes",
    "device": "vram_growth_bytes",
}
"""Heads -> columns of runs."""


def vram(study: Study) -> list[Text | Table]:
    """`vram_of` each model, below its name; what the columns mean is said once."""
    shown = below_names("vram", {model: vram_of(study, model) for model in study.runs["model"].unique()})
    return shown or [Table("vram", [], [], why_empty="no round is complete.")]


def vram_of(study: Study, model: str) -> Table:
    """VRAM of every file and placement of a model by its parts, in MiB, and what the placement saves; without parts
    that are not known of any. An interval is that of VRAM: other parts vary with it or not at all."""
    runs = study.runs[study.runs["model"] == model]
    saved = {(c.quant, c.side): c.ratio for c in frames.comparisons(runs, "vram_bytes")}
    rows: list[dict[str, Any]] = []
    sources: list[Sources] = []
    for cells in zip(*(frames.summaries(runs, column) for column in PARTS.values()), strict=True):
        first, ratio = cells[0], saved.get((cells[0].quant, cells[0].side))
        row = {"quant": neutral(first.quant), "placement": placed(study, first.side)}
        row |= {name: number(s.value.value if s.value else None, 1 / MIB) for name, s in zip(PARTS, cells, strict=True)}
        row["VRAM"] = stats.estimate(cells[-2].value, 1 / MIB)
        row["saved"] = percent(1 - ratio.value) if ratio else stats.NONE
        rows.append(row)
        sources.append(cells[-2].sources)
    unknown = {name for name in PARTS if all(row[name] == stats.NONE for row in rows)} - {"VRAM"}
    rows = [{k: v for k, v in row.items() if k not in unknown} for row in rows]
    rows, sources = load_modes_as_one(rows, sources)
    note = (
        "MiB (2²⁰ bytes), mean of the runs' peaks. *Weights*: by the file's header; *KV* cache, compute *buffer*: by "
        "the engine; *rest*: what the driver charges the process beyond these: the GPU's context, workspaces, code. "
        "*Device*: by how much the use of the whole GPU grew, page tables of pinned RAM with it. *Saved*: "
        f"of the VRAM that {reference(study)} takes. No interval where nothing varies."
    )
    numbers = tuple(rows[0])[2:] if rows else ()
    return Table(f"vram-{model}", rows, sources, note, numbers, "no round is complete.", unbroken=True)


@dataclass(frozen=True)
class _Column:
    """A column of runs, compared within rounds."""

    values: dict[tuple[str, Side], Estimate]
    ratios: dict[tuple[str, Side], Estimate]
    pooled: bool
    apart: bool
    """Whether some were measured on several machines, whose ratios are not pooled."""

    @classmethod
    def of(cls, runs: pd.DataFrame, name: str) -> _Column:
        every = frames.comparisons(runs, name)
        values = {(c.quant, c.side): c.value for c in every if c.value}
        values |= {(c.quant, c.against): c.baseline for c in every if c.baseline}
        ratios = {(c.quant, c.side): c.ratio for c in every if c.ratio}
        told = [c for c in every if c.ratio and len(set(frames.paired(c.before, c.after))) == 1]
        pooled = stats.pooled_ratios([_pairs(c, name) for c in told])
        if pooled:
            ratios |= {(c.quant, c.side): r for c, r in zip(told, pooled, strict=True)}
        return cls(values, ratios, bool(pooled), len(told) < len(ratios))


def _pairs(c: Comparison, column: str) -> dict[str, tuple[float, float]]:
    """By the run of the baseline, which the placements of a quant have in common."""
    return {run: (a, b) for run, a, b in zip(c.before["run_id"], c.before[column], c.after[column], strict=True)}


def speeds(study: Study, workload: str) -> list[Text | Table]:
    """`speed` of each model, below its name."""
    models = study.runs["model"].unique()
    return below_names("speed", {f"{model}, {workload}": speed(study, model, workload) for model in models})


def speed(study: Study, model: str, workload: str) -> Table:
    """tokens/s and TTFT of a model's files in each placement, beside their ratios to the baseline of the same round."""
    runs = study.runs[study.runs["model"] == model]
    names = (f"tokens_per_s/{workload}", f"ttft_first_s/{workload}", f"ttft_warm_s/{workload}")
    rate, first, warm = (_Column.of(runs, name) for name in names)
    rows, sources, base = [], [], reference(study)
    for s in frames.summaries(runs, names[0]):
        key = (s.quant, s.side)
        rows.append(
            {
                "quant": neutral(s.quant),
                "placement": placed(study, s.side),
                "tokens/s": stats.estimate(rate.values.get(key)),
                f"% of {base}": stats.estimate(rate.ratios.get(key), 100) if key in rate.ratios else "",
                "TTFT, first": number(e.value if (e := first.values.get(key)) else None, 1e3),
                "TTFT, warm": stats.estimate(warm.values.get(key), 1e3),
                f"times {base}": stats.estimate(warm.ratios.get(key)) if key in warm.ratios else "",
                "n": len(s.runs),
            }
        )
        sources.append(s.sources)
    pooled = " and ".join(what for what, c in (("tokens/s", rate), ("TTFT", warm)) if c.pooled)
    alike = " that one machine measured" if rate.apart or warm.apart else ""
    spread = f", those of {pooled} with the spread of all quants and placements{alike} together" if pooled else ""
    counts = {row["n"] for row in rows}
    if len(counts) == 1:  # said once, and not in each row
        rows = [{k: v for k, v in row.items() if k != "n"} for row in rows]
    note = (
        "TTFT in ms: of the first request of a fresh server, and of warm ones. Geometric means [95 % interval] of "
        f"{counts.pop() if len(counts) == 1 else 'n'} rounds; ratios are paired within them{spread}."
    )
    numbers = tuple(rows[0])[2:] if rows else ()
    return Table(f"speed-{model}-{workload}", rows, sources, note, numbers, unbroken=True)


def by_prompt(study: Study) -> list[Table]:
    """TTFT of warm requests by the length of the prompt, of each model; empty for a study of few lengths."""
    lengths = prompt_lengths(study)
    return [_by_prompt(study, model, lengths) for model in study.runs["model"].unique()] if lengths else []


def _by_prompt(study: Study, model: str, lengths: dict[int, str]) -> Table:
    runs = study.runs[study.runs["model"] == model]
    columns = {str(n): f"ttft_warm_s/{name}" for n, name in lengths.items()}
    rows, sources = [], []
    for cells in zip(*(frames.summaries(runs, c) for c in columns.values()), strict=True):
        row = {"quant": neutral(cells[0].quant), "placement": placed(study, cells[0].side)}
        for (head, column), s in zip(columns.items(), cells, strict=True):
            row[head] = number(stats.geometric_mean(list(s.runs[column])).value if len(s.runs) else None, 1e3)
        for n, m in neighbours(lengths):
            two = [columns[str(n)], columns[str(m)]]
            both = cells[0].runs.dropna(subset=two)
            pairs = list(both[two].itertuples(index=False, name=None))
            row[f"{m} / {n}"] = stats.estimate(stats.ratio(pairs, frames.machines(both)) if pairs else None)
        rows.append(row)
        sources.append(merged(s.sources for s in cells))
    note = (
        f"TTFT of warm requests in ms by the tokens of the prompt, {neutral(model)}; geometric means, their intervals "
        f"are in `EVIDENCE.md`. From {COPIED_TOKENS} tokens on llama.cpp copies the experts of a prompt to the GPU, if "
        "that is not switched off: the ratio [95 % interval] of two lengths beside each other shows what that does."
    )
    return Table(f"ttft-by-prompt-{model}", rows, sources, note, tuple(rows[0])[2:] if rows else (), unbroken=True)


def odd(study: Study) -> Text:
    """Runs whose tokens/s or TTFT is far from those of their placement, by name; they are kept."""
    found, every = [], 0
    for column in (f"{c}/{w}" for w in study.parameters.workloads for c in ("tokens_per_s", "ttft_warm_s")):
        for s in frames.summaries(study.runs, column):
            every += len(s.runs)
            found += [f"{name}: {text}" for name, text in _odd(s.runs, column)]
    listed = f" {len(found)} of {every} are: {'; '.join(found)}." if found else f" No value of {every} is."
    text = (
        f"A value is named where it is more than {ODD} robust standard deviations and {100 * ODD_SHARE:.0f} % from the "
        f"median of its placement; it is kept in all tables.{listed}"
    )
    return Text("odd", text, cite(study.used))


def _odd(runs: pd.DataFrame, column: str) -> Iterator[tuple[str, str]]:
    values: Sequence[float] = list(runs[column])
    if len(values) < 5:  # of fewer, the median distance is no measure
        return
    middle = median(values)
    spread = 1.4826 * median(abs(x - middle) for x in values)
    for name, x in zip(runs["run_id"], values, strict=True):
        if abs(x - middle) > max(ODD * spread, ODD_SHARE * middle):
            yield neutral(name), f"{column.partition('/')[0]} {number(x)}, median {number(middle)}"


def _diversity(study: Study) -> str:
    """How many of the tokens that were generated are different ones: few of them keep few experts busy."""
    columns = [c for c in study.runs if str(c).startswith("token_diversity/")]
    shares = [float(x) for c in columns for x in study.runs[c].dropna()]
    return f": of a request's generated tokens {stats.span(shares, percent)} were different ones" if shares else ""


def conventions(study: Study) -> Text:
    """What the tables' words, units and intervals mean."""
    n = sum(
        len([c for c in frames.comparisons(study.runs, f"{column}/{w}") if c.ratio])
        for w in study.parameters.workloads
        for column in ("tokens_per_s", "ttft_warm_s")
    )
    sentences = [
        "A *round* is one run of every placement, in seeded random order, each a fresh server. *baseline* has all the "
        "model in VRAM; *cpu-moe* keeps the weights of all experts in RAM, where the CPU computes them; *n-cpu-moe=N* "
        "those of the first N layers. Load mode *mmap* leaves them in the mapped file, *none* copies them to memory of "
        "their own, pinned with CUDA.",
        f"tokens/s: of the tokens after the first {WARM_UP}, which take a GPU longer (in answers of less than "
        f"{2 * WARM_UP}, after the first one), as they arrive at the client. TTFT: from sending a request to its "
        "first token. VRAM: the peak of the run's processes. GB is 10⁹ bytes, GiB and MiB are 2³⁰ and 2²⁰.",
        f"Intervals are 95 % by Student's t over rounds, ratios on logarithms.{_by_chance(n)}",
        *_several_machines(study),
        f"One request at a time, greedy choice of the next token{_diversity(study)}.",
    ]
    return Text("conventions", "\n".join(f"- {s}" for s in sentences), cite(study.used))


def _several_machines(study: Study) -> Iterator[str]:
    """Which rounds ran elsewhere than the first ones of their cell, and what that does to intervals."""
    elsewhere: dict[tuple[str, tuple[int, ...], int], list[str]] = {}
    for (model, quant), runs in study.runs.groupby(["model", "quant"], sort=False):
        on = pd.Series(frames.machines(runs), runs["round"])
        if others := set(on) - {on.iloc[0]}:
            numbers = tuple(sorted(set(on.index[on != on.iloc[0]])))
            elsewhere.setdefault((model, numbers, len(others)), []).append(quant)
    if not elsewhere:
        return
    told = "; ".join(
        f"round{'s' * (len(numbers) > 1)} {' and '.join(map(str, numbers))} of {neutral(model)} "
        f"({', '.join(map(neutral, quants))}) on {'a second machine' if n == 1 else f'{n} other machines'}"
        for (model, numbers, n), quants in elsewhere.items()
    )
    least, most = stats.COVERED
    yield (
        f"Measured on several machines: {told}. Their intervals count the machine as a random factor: wide where "
        f"machines differ, as t is {number(stats.student(1))} for two of them, and true in {100 * least:.0f} to "
        f"{100 * most:.0f} % of simulated studies."
    )


def _by_chance(n: int) -> str:
    """How many of n intervals may be wrong."""
    if not n:
        return ""
    return (
        f" Of {n} such ratios of speed about {max(1, round(n / 20))} may miss the truth by chance alone; the verdicts "
        "above are corrected for that."
    )
