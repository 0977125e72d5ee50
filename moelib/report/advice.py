"""Which quant and which placement: the comparison, and which file fits which GPU, for the document and model cards.

The rule: a file fits a GPU of N GB if no run of it took more than N * 10^9 bytes of VRAM.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from moelib.audit.record import Record
from moelib.base import stats
from moelib.base.neutral import markdown
from moelib.base.stats import number, size, span
from moelib.catalogue.facts import Manifest
from moelib.catalogue.placement import REFERENCE
from moelib.report import appendix, findings
from moelib.report.table import Sources, Table, Text, cite, cite_manifest, cite_overhead, merged, reference
from moelib.study import frames, overhead
from moelib.study.frames import Comparison, Pairs, Side
from moelib.study.study import Study

GPUS_GB = (4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 80)
"""VRAM of GPUs that people own, as they are sold."""
GB = 10**9
"""Bytes that count as one GB of a GPU: most GPUs have 2^30, and the difference is left to driver and desktop."""
WORDS = {"baseline": "all on the {}", "cpu-moe": "experts on the CPU"}


@dataclass(frozen=True)
class Choice:
    """One quant in one placement, as it was measured."""

    quant: str
    place: str
    """The placement in words."""
    vram_bytes: float
    """The most VRAM that any of its runs took."""
    bits_per_weight: float
    rate: stats.Estimate
    """tokens/s of the study's last workload."""
    sources: Sources

    def __str__(self) -> str:
        return f"{self.quant} {self.place}, {number(self.rate.value)} tokens/s"


def fitting(choices: Sequence[Choice], gpu_bytes: int) -> list[Choice]:
    """The choices that fit, fewest bits per weight first."""
    return sorted((c for c in choices if c.vram_bytes <= gpu_bytes), key=lambda c: c.bits_per_weight)


def fastest(choices: Sequence[Choice]) -> Choice:
    return max(choices, key=lambda c: c.rate.value)


def finest(choices: Sequence[Choice]) -> Choice:
    """The one with most bits per weight; of equal ones the fastest."""
    return max(choices, key=lambda c: (c.bits_per_weight, c.rate.value))


def models(study: Study) -> list[str]:
    """The models with a measured cell, in the study's order."""
    return list(dict.fromkeys(name.rsplit("/", 1)[0] for name in study.measured))


def _runs(study: Study, model: str | None = None) -> list[Record]:
    return [r for r in study.used if model in (None, r.spec.model)]


def _gpu(study: Study) -> bool:
    return {r.device.kind for r in _runs(study)} == {"cuda"}


def place(study: Study, side: Side) -> str:
    """A placement in words."""
    placement, _ = side
    return WORDS.get(placement, placement).format("GPU" if _gpu(study) else "device")


def _places(study: Study) -> list[str]:
    """The placements that are compared, in words, the baselines first."""
    by_side = zip(*pairs(study), strict=True)
    return list(dict.fromkeys(place(study, side) for sides in by_side for side in sides))


def _sides(study: Study) -> tuple[str, list[str]]:
    """(what is compared with, what is compared), in words; cells whose placements were planned differ in the former."""
    bases, others = ({pair[i]: place(study, pair[i]) for pair in pairs(study)} for i in (0, 1))
    base = next(iter(bases.values())) if len(bases) == 1 else "as much on the GPU as fits"
    return base, list(dict.fromkeys(others.values()))


def pairs(study: Study) -> list[tuple[Side, Side]]:
    """(baseline, other) that the advice is about."""
    every = []
    for cell in study.cells:
        labels = {s.label for s in cell.specs}
        sides = [(mode.placement, mode.load_mode) for mode in study.parameters.arms if mode.label in labels]
        every += frames.in_one_load_mode(sides)
    return list(dict.fromkeys(every))


def _compare(study: Study, model: str, column: str, pairs: Pairs = frames.in_one_load_mode) -> list[Comparison]:
    return frames.comparisons(study.runs[study.runs["model"] == model], column, pairs)


def _manifests(study: Study, model: str) -> dict[str, Manifest]:
    return {s.quant: s for s in study.manifests if s.model == model}


def choices(study: Study, model: str) -> list[Choice]:
    """Every quant and placement of `model` with a complete round, a manifest and known VRAM."""
    manifests, by_place = _manifests(study, model), {}
    for c in _compare(study, model, f"tokens_per_s/{study.parameters.workloads[-1]}"):
        for side, rate, runs in ((c.against, c.baseline, c.before), (c.side, c.value, c.after)):
            vram = runs["vram_needed_bytes"]
            if rate and c.quant in manifests and vram.notna().all():
                manifest, where = manifests[c.quant], place(study, side)
                sources = frames.sources(runs) | cite_manifest(manifest)
                by_place[c.quant, where] = Choice(c.quant, where, vram.max(), manifest.bits_per_weight, rate, sources)
    return list(by_place.values())


def which_file(study: Study, model: str) -> Table:
    """Which file fits which GPU; GPUs of the same answer share a row."""
    name, measured = f"which-file-{model}", choices(study, model)
    if not _gpu(study):
        return Table(name, [], [], why_empty="no GPU took part in this study, so no GPU is advised.")
    places = _places(study)
    answers: dict[tuple[str, ...], list[int]] = {}
    for gb in GPUS_GB:
        fit = fitting(measured, gb * GB)
        cells = [_listed([c.quant for c in fit if c.place == p]) for p in places]
        cells += [str(fastest(fit)), str(finest(fit))] if fit else ["none fits"] * 2
        answers.setdefault(tuple(cells), []).append(gb)
    columns = ["VRAM of the GPU", *(f"fits, {p}" for p in places), "fastest of these", "most bits per weight of these"]
    rows = [dict(zip(columns, (_range(gbs), *cells), strict=True)) for cells, gbs in answers.items()]
    every = {k: v for c in measured for k, v in c.sources.items()}
    note = f"Bold: the most bits per weight. Speeds are those of {machine(study, model)}, not of your GPU."
    return Table(name, rows, [every] * len(rows), note)


def _listed(quants: Sequence[str]) -> str:
    return ", ".join([*quants[:-1], f"**{quants[-1]}**"]) if quants else "none"


def _range(gbs: Sequence[int]) -> str:
    if gbs[-1] == GPUS_GB[-1]:
        return f"{gbs[0]} GB and more"
    return f"{gbs[0]} GB" if len(gbs) == 1 else f"{gbs[0]} to {gbs[-1]} GB"


def machine(study: Study, model: str | None = None) -> str:
    return "; ".join(sorted({findings.machine(r) for r in _runs(study, model)}))


def comparison(study: Study, model: str) -> Table:
    """One row for each quant (and placement, where there are several): size, VRAM, tokens/s, TTFT."""
    manifests, workload, many = _manifests(study, model), study.parameters.workloads[-1], len(pairs(study)) > 1
    columns = ("vram_bytes", f"tokens_per_s/{workload}", f"ttft_warm_s/{workload}")
    rows, sources = [], []
    for vram, rate, ttft in zip(*(_compare(study, model, c) for c in columns), strict=True):
        manifest = manifests.get(vram.quant)
        where = {"placement": vram.side[0]} if many else {}
        values = {
            "file": size(manifest.file_bytes if manifest else None),
            "bits/weight": f"{manifest.bits_per_weight:.2f}" if manifest else stats.NONE,
            "VRAM": _both(vram, size),
            "tokens/s": _both(rate, number),
            "tokens/s, ratio": stats.estimate(rate.ratio),
            "TTFT, ms": _both(ttft, lambda s: number(s, 1000)),
            "TTFT, ratio": stats.estimate(ttft.ratio),
            "rounds": rate.difference.n if rate.difference else 0,
        }
        rows.append({"quant": vram.quant, **where, **values})
        runs = merged(c.sources for c in (vram, rate, ttft))
        sources.append(runs | (cite_manifest(manifest) if manifest else {}))
    asked, (base, offloaded) = study.workloads[workload], _sides(study)
    note = (
        f"Left of the arrow: {base}; right of it: {' or '.join(offloaded)}. Workload {markdown(workload)} "
        f"({markdown(asked.title)}, {asked.generate_tokens} generated); TTFT of warm requests. Means, and ratios "
        f"[95 % interval] paired within rounds, on {machine(study, model)}."
    )
    return Table(f"comparison-{model}", rows, sources, note, tuple(rows[0])[1 + many :] if rows else ())


def _both(c: Comparison, text: Callable[[float], str]) -> str:
    return f"{text(c.baseline.value)} → {text(c.value.value)}" if c.baseline and c.value else stats.NONE


def verdict(study: Study, model: str) -> Text:
    """What CPU offload saves and costs for `model`, in sentences."""
    workload, name = study.parameters.workloads[-1], f"verdict-{model}"
    vram = [c for c in _compare(study, model, "vram_bytes") if c.ratio]
    rate = [c for c in _compare(study, model, f"tokens_per_s/{workload}") if c.ratio]
    if not vram or not rate:
        return Text(name, "VRAM and tokens/s were not measured together, so nothing is recommended.")
    (base, offloaded), used = _sides(study), [*vram, *rate]
    away = " or ".join(offloaded)
    experts = [m.expert_bytes for q, m in _manifests(study, model).items() if q in {c.quant for c in vram}]
    slower = all(x < 1 for x in stats.values(c.ratio for c in rate))
    keep = "If the whole file fits in VRAM, keep it there"
    if reference(study) != REFERENCE:
        keep, base = "Keep as much on the GPU as fits", f"with {base}"
    sentences = [
        f"**{keep if slower else 'Speed'}**: {base}, decoding was "
        f"{span([1 / x for x in stats.values(c.ratio for c in rate)], number)} times as fast as with {away}.",
        f"**If not**: with {away}, {span(stats.values(c.value for c in vram), size)} of VRAM was enough, instead of "
        f"{span(stats.values(c.baseline for c in vram), size)}. The experts, "
        f"{span(experts, size) if experts else stats.NONE}, must then fit in host RAM.",
    ]
    modes = [
        [c for c in _compare(study, model, column, frames.load_modes) if c.ratio and _is_offload(c)]
        for column in (f"ttft_warm_s/{workload}", "load_s")
    ]
    if all(modes):
        ttft, load = (span(stats.values(c.ratio for c in comparisons), number) for comparisons in modes)
        sooner = all(c.ratio and (c.ratio.high or 1) < 1 for c in modes[0])
        loads = pd.concat([side for c in modes[1] for side in (c.before, c.after)])
        sentences.append(
            f"**{'For long prompts, copy' if sooner else 'Copying'} the experts** to memory of their own instead of "
            "mapping the file (`--load-mode none`; older builds `--no-mmap`): TTFT of warm "
            f"{markdown(workload)} requests was then {ttft} times, and load time {load} times, that of the mapped file"
            f"{f' (files {findings.cache(loads)})' if findings.cache_known(study) else ''}."
        )
        used += [c for comparisons in modes for c in comparisons]
    return Text(name, "\n".join(f"- {s}" for s in sentences), merged(c.sources for c in used))


def _is_offload(c: Comparison) -> bool:
    """Of a cached file: that one is cold is no choice of whoever is advised."""
    return not c.placement.is_baseline and not c.placement.cold


def limits(study: Study) -> Text:
    """What the advice does not cover, once for all models."""
    cpus = "; ".join(sorted({f"{markdown(r.host.cpu)}, {r.host.cpus} usable" for r in _runs(study)}))
    sentences, sources = [], cite(_runs(study))
    if slowed := overhead.bias(study.overhead.values()):
        sentences.append(slowed)
        sources |= cite_overhead(study.overhead)
    if machines := appendix.apart(study):
        sentences.append(machines)
    if _gpu(study):
        sentences += [
            "A file *fits* a GPU of N GB if none of its runs took more than N × 10⁹ bytes of VRAM. Most GPUs have "
            "N × 2³⁰ bytes, 7 % more: only that is left for driver, desktop and other programs.",
            f"No GPU of these sizes was measured. The speeds are those of {machine(study)} with its CPU ({cpus}): "
            "they compare files and placements, and do not predict the speed of your machine. With experts on the "
            "CPU, CPU and host RAM do that part of the work.",
        ]
    sentences += [
        f"Measured with a context of {study.parameters.context} tokens and one request at a time. A longer context, or "
        "more requests at once, takes more VRAM.",
        "Where intervals overlap, the data do not settle which is faster.",
        "Between the two, `--n-cpu-moe N` keeps the experts of the first N layers on the CPU.",
        "Quality was not measured: more bits per weight do not guarantee better text.",
    ]
    return Text("advice-limits", "\n".join(f"- {s}" for s in sentences), sources)
