"""Which quant and which placement: the comparison, and which file fits which GPU, for the document and model cards.

The rule: a file fits a GPU of N GB if no run of it took more than N * 10^9 bytes of VRAM.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moelib import analyse, evidence, harness, report, stats
from moelib.facts import Manifest
from moelib.neutral import markdown
from moelib.params import Arm, Study
from moelib.record import Record
from moelib.stats import number, size, span
from moelib.study import Results
from moelib.table import Sources, Table, Text, cite, cite_harness, cite_manifest

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
    vram_bytes: int
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


def models(results: Results) -> list[str]:
    """The models with a measured cell, in the study's order."""
    return list(dict.fromkeys(name.rsplit("/", 1)[0] for name in results.measured))


def _runs(results: Results, model: str | None = None) -> list[Record]:
    return [r for b in results.blocks for r in b if model in (None, r.spec.model)]


def _gpu(results: Results) -> bool:
    return {r.device.kind for r in _runs(results)} == {"cuda"}


def place(results: Results, arm: Arm) -> str:
    """A placement in words."""
    return WORDS.get(arm.placement, arm.placement).format("GPU" if _gpu(results) else "device")


def _places(results: Results) -> list[str]:
    """The placements that are compared, in words, the baseline first."""
    return list(dict.fromkeys(place(results, arm) for pair in pairs(results.study) for arm in pair))


def pairs(study: Study) -> list[tuple[Arm, Arm]]:
    """(baseline, other) in the baseline's load mode, llama.cpp's default; in any, if the study has none in that."""
    every = analyse.cpu_offloads(study)
    return [(base, arm) for base, arm in every if arm.load_mode == base.load_mode] or every


def _compare(
    results: Results, model: str, quantity: analyse.Quantity, of: Callable[[Study], list[tuple[Arm, Arm]]] = pairs
) -> list[analyse.Comparison]:
    return [c for c in analyse.compare(results, quantity, of) if c.model == model]


def _manifests(results: Results, model: str) -> dict[str, Manifest]:
    return {s.quant: s for s in results.manifests if s.model == model}


def choices(results: Results, model: str) -> list[Choice]:
    """Every quant and placement of `model` with a complete round, a manifest and known VRAM."""
    manifests, by_place = _manifests(results, model), {}
    for c in _compare(results, model, analyse.tokens_per_s(results.study.workloads[-1])):
        for arm, rate in ((c.against, c.baseline), (c.arm, c.offload)):
            runs = [r for r in c.records if r.spec.arm == arm.label]
            memory = [analyse.vram_needed(r) for r in runs]
            if rate and c.quant in manifests and None not in memory:
                manifest, where = manifests[c.quant], place(results, arm)
                sources = cite(runs) | cite_manifest(manifest)
                by_place[c.quant, where] = Choice(c.quant, where, max(memory), manifest.bits_per_weight, rate, sources)
    return list(by_place.values())


def which_file(results: Results, model: str) -> Table:
    """Which file fits which GPU; GPUs of the same answer share a row."""
    name, measured = f"which-file-{model}", choices(results, model)
    if not _gpu(results):
        return Table(name, [], [], why_empty="no GPU took part in this study, so no GPU is advised.")
    places = _places(results)
    answers: dict[tuple[str, ...], list[int]] = {}
    for gb in GPUS_GB:
        fit = fitting(measured, gb * GB)
        cells = [_listed([c.quant for c in fit if c.place == p]) for p in places]
        cells += [str(fastest(fit)), str(finest(fit))] if fit else ["none fits"] * 2
        answers.setdefault(tuple(cells), []).append(gb)
    columns = ["VRAM of the GPU", *(f"fits, {p}" for p in places), "fastest of these", "most bits per weight of these"]
    rows = [dict(zip(columns, (_range(gbs), *cells), strict=True)) for cells, gbs in answers.items()]
    every = {k: v for c in measured for k, v in c.sources.items()}
    note = f"Bold: the most bits per weight. Speeds are those of {machine(results, model)}, not of your GPU."
    return Table(name, rows, [every] * len(rows), note)


def _listed(quants: Sequence[str]) -> str:
    return ", ".join([*quants[:-1], f"**{quants[-1]}**"]) if quants else "none"


def _range(gbs: Sequence[int]) -> str:
    if gbs[-1] == GPUS_GB[-1]:
        return f"{gbs[0]} GB and more"
    return f"{gbs[0]} GB" if len(gbs) == 1 else f"{gbs[0]} to {gbs[-1]} GB"


def machine(results: Results, model: str | None = None) -> str:
    return "; ".join(sorted({report.machine(r) for r in _runs(results, model)}))


def comparison(results: Results, model: str) -> Table:
    """One row for each quant (and placement, where there are several): size, VRAM, tokens/s, TTFT."""
    manifests, workload, many = _manifests(results, model), results.study.workloads[-1], len(pairs(results.study)) > 1
    quantities = (analyse.vram, analyse.tokens_per_s(workload), analyse.ttft(workload, warm=True))
    rows, sources = [], []
    for vram, rate, ttft in zip(*(_compare(results, model, q) for q in quantities), strict=True):
        manifest = manifests.get(vram.quant)
        where = {"placement": vram.arm.placement} if many else {}
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
        runs = cite(r for c in (vram, rate, ttft) for r in c.records)
        sources.append(runs | (cite_manifest(manifest) if manifest else {}))
    asked, (base, *offloaded) = results.workloads[workload], _places(results)
    note = (
        f"Left of the arrow: {base}; right of it: {' or '.join(offloaded)}. Workload {markdown(workload)} "
        f"({markdown(asked.title)}, {asked.generate_tokens} generated); TTFT of warm requests. Means, and ratios "
        f"[95 % interval] paired within rounds, on {machine(results, model)}."
    )
    return Table(f"comparison-{model}", rows, sources, note, tuple(rows[0])[1 + many :] if rows else ())


def _both(c: analyse.Comparison, text: Callable[[float], str]) -> str:
    return f"{text(c.baseline.value)} → {text(c.offload.value)}" if c.baseline and c.offload else stats.NONE


def verdict(results: Results, model: str) -> Text:
    """What CPU offload saves and costs for `model`, in sentences."""
    workload, name = results.study.workloads[-1], f"verdict-{model}"
    vram = [c for c in _compare(results, model, analyse.vram) if c.ratio]
    rate = [c for c in _compare(results, model, analyse.tokens_per_s(workload)) if c.ratio]
    if not vram or not rate:
        return Text(name, "VRAM and tokens/s were not measured together, so nothing is recommended.")
    (base, *offloaded), used = _places(results), [*vram, *rate]
    away = " or ".join(offloaded)
    experts = [m.expert_bytes for q, m in _manifests(results, model).items() if q in {c.quant for c in vram}]
    slower = all(c.ratio.value < 1 for c in rate)
    sentences = [
        f"**{'If the whole file fits in VRAM, keep it there' if slower else 'Speed'}**: {base}, decoding was "
        f"{span([1 / c.ratio.value for c in rate], number)} times as fast as with {away}.",
        f"**If not**: with {away}, {span([c.offload.value for c in vram], size)} of VRAM was enough, instead of "
        f"{span([c.baseline.value for c in vram], size)}. The experts, "
        f"{span(experts, size) if experts else stats.NONE}, must then fit in host RAM.",
    ]
    modes = [
        [c for c in _compare(results, model, q, analyse.load_modes) if c.ratio and not c.arm.placed.is_baseline]
        for q in (analyse.ttft(workload, warm=True), analyse.load_time)
    ]
    if all(modes):
        ttft, load = (span([c.ratio.value for c in comparisons], number) for comparisons in modes)
        sooner = all((c.ratio.high or 1) < 1 for c in modes[0])
        sentences.append(
            f"**{'For long prompts, copy' if sooner else 'Copying'} the experts** to memory of their own instead of "
            "mapping the file (`--load-mode none`; older builds `--no-mmap`): TTFT of warm "
            f"{markdown(workload)} requests was then {ttft} times, and load time {load} times, that of the mapped file."
        )
        used += [c for comparisons in modes for c in comparisons]
    return Text(name, "\n".join(f"- {s}" for s in sentences), cite(r for c in used for r in c.records))


def limits(results: Results) -> Text:
    """What the advice does not cover, once for all models."""
    cpus = "; ".join(sorted({f"{markdown(r.host.cpu)}, {r.host.cpus} usable" for r in _runs(results)}))
    sentences, sources = [], cite(_runs(results))
    if slowed := harness.bias(results.accuracy.values()):
        sentences.append(slowed)
        sources |= cite_harness(results.accuracy)
    if machines := evidence.apart(results):
        sentences.append(machines)
    if _gpu(results):
        sentences += [
            "A file *fits* a GPU of N GB if none of its runs took more than N × 10⁹ bytes of VRAM. Most GPUs have "
            "N × 2³⁰ bytes, 7 % more: only that is left for driver, desktop and other programs.",
            f"No GPU of these sizes was measured. The speeds are those of {machine(results)} with its CPU ({cpus}): "
            "they compare files and placements, and do not predict the speed of your machine. With experts on the "
            "CPU, CPU and host RAM do that part of the work.",
        ]
    sentences += [
        f"Measured with a context of {results.study.context} tokens and one request at a time. A longer context, or "
        "more requests at once, takes more VRAM.",
        "Where intervals overlap, the data do not settle which is faster.",
        "Between the two, `--n-cpu-moe N` keeps the experts of the first N layers on the CPU.",
        "Quality was not measured: more bits per weight do not guarantee better text.",
    ]
    return Text("advice-limits", "\n".join(f"- {s}" for s in sentences), sources)
