"""Which quant and which placement: the comparison, and what fits which card, for the document and for model cards.

The rule: a file fits a card of N GB if no run of it took more than N * 10^9 bytes from the device.
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

CARDS_GB = (4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 80)
"""Memory of cards that people own, as they are sold."""
GB = 10**9
"""Bytes that count as one GB of a card: most cards have 2^30, and the difference is left to driver and desktop."""
WORDS = {"baseline": "all on the {}", "cpu-moe": "experts on the CPU"}


@dataclass(frozen=True)
class Choice:
    """One quant in one placement, as it was measured."""

    quant: str
    place: str
    """The placement in words."""
    memory_bytes: int
    """The most that any of its runs took from the device."""
    bits_per_weight: float
    rate: stats.Estimate
    """Tokens per second of the study's last workload."""
    sources: Sources

    def __str__(self) -> str:
        return f"{self.quant} {self.place}, {number(self.rate.value)} tokens/s"


def fitting(choices: Sequence[Choice], card_bytes: int) -> list[Choice]:
    """The choices that fit, fewest bits per weight first."""
    return sorted((c for c in choices if c.memory_bytes <= card_bytes), key=lambda c: c.bits_per_weight)


def fastest(choices: Sequence[Choice]) -> Choice:
    return max(choices, key=lambda c: c.rate.value)


def finest(choices: Sequence[Choice]) -> Choice:
    """The one with most bits per weight; of equal ones the fastest."""
    return max(choices, key=lambda c: (c.bits_per_weight, c.rate.value))


def models(results: Results) -> list[str]:
    """The models of which something was measured, in the study's order."""
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
    """(baseline, arm) in the baseline's load mode, llama.cpp's default; in any, if the study has no other."""
    found = analyse.offloads(study)
    return [(base, arm) for base, arm in found if arm.load_mode == base.load_mode] or found


def _compare(
    results: Results, model: str, quantity: analyse.Quantity, of: Callable[[Study], list[tuple[Arm, Arm]]] = pairs
) -> list[analyse.Comparison]:
    return [c for c in analyse.compare(results, quantity, of) if c.model == model]


def _sheets(results: Results, model: str) -> dict[str, Manifest]:
    return {s.quant: s for s in results.manifests if s.model == model}


def choices(results: Results, model: str) -> list[Choice]:
    """Every quant and placement of `model` that has a whole block, a sheet and a known device memory."""
    sheets, found = _sheets(results, model), {}
    for c in _compare(results, model, analyse.tokens_per_s(results.study.workloads[-1])):
        for arm, rate in ((c.against, c.baseline), (c.arm, c.offload)):
            runs = [r for r in c.records if r.spec.arm == arm.label]
            memory = [analyse.vram_needed(r) for r in runs]
            if rate and c.quant in sheets and None not in memory:
                sheet, where = sheets[c.quant], place(results, arm)
                sources = cite(runs) | cite_manifest(sheet)
                found[c.quant, where] = Choice(c.quant, where, max(memory), sheet.bits_per_weight, rate, sources)
    return list(found.values())


def which_file(results: Results, model: str) -> Table:
    """What fits which card; cards of the same answer share a row."""
    name, found = f"which-file-{model}", choices(results, model)
    if not _gpu(results):
        return Table(name, [], [], why_empty="no GPU took part in this study, so no card is advised.")
    places = _places(results)
    answers: dict[tuple[str, ...], list[int]] = {}
    for gb in CARDS_GB:
        fit = fitting(found, gb * GB)
        told = [_listed([c.quant for c in fit if c.place == p]) for p in places]
        told += [str(fastest(fit)), str(finest(fit))] if fit else ["none fits"] * 2
        answers.setdefault(tuple(told), []).append(gb)
    columns = ["card", *(f"fits, {p}" for p in places), "fastest of these", "most bits per weight of these"]
    rows = [dict(zip(columns, (_cards(gbs), *told), strict=True)) for told, gbs in answers.items()]
    every = {k: v for c in found for k, v in c.sources.items()}
    note = f"Bold: the most bits per weight. Speeds are not your card's but those of {machine(results, model)}."
    return Table(name, rows, [every] * len(rows), note)


def _listed(quants: Sequence[str]) -> str:
    return ", ".join([*quants[:-1], f"**{quants[-1]}**"]) if quants else "none"


def _cards(gbs: Sequence[int]) -> str:
    if gbs[-1] == CARDS_GB[-1]:
        return f"{gbs[0]} GB and more"
    return f"{gbs[0]} GB" if len(gbs) == 1 else f"{gbs[0]} to {gbs[-1]} GB"


def machine(results: Results, model: str | None = None) -> str:
    return "; ".join(sorted({report.machine(r) for r in _runs(results, model)}))


def comparison(results: Results, model: str) -> Table:
    """One row for each quant (and placement, where there are several): size, memory, speed, first token."""
    sheets, workload, many = _sheets(results, model), results.study.workloads[-1], len(pairs(results.study)) > 1
    quantities = (analyse.vram, analyse.tokens_per_s(workload), analyse.ttft(workload, warm=True))
    rows, sources = [], []
    for memory, rate, ttft in zip(*(_compare(results, model, q) for q in quantities), strict=True):
        sheet = sheets.get(memory.quant)
        arm = {"placement": memory.arm.placement} if many else {}
        told = {
            "file": size(sheet.file_bytes if sheet else None),
            "bits/weight": f"{sheet.bits_per_weight:.2f}" if sheet else stats.NONE,
            "device memory": _both(memory, size),
            "tokens/s": _both(rate, number),
            "tokens/s, ratio": stats.estimate(rate.ratio),
            "first token, ms": _both(ttft, lambda s: number(s, 1000)),
            "first token, ratio": stats.estimate(ttft.ratio),
            "blocks": rate.difference.n if rate.difference else 0,
        }
        rows.append({"quant": memory.quant, **arm, **told})
        sources.append(
            cite(r for c in (memory, rate, ttft) for r in c.records) | (cite_manifest(sheet) if sheet else {})
        )
    asked, (base, *offloaded) = results.workloads[workload], _places(results)
    note = (
        f"Left of the arrow {base}, right of it {' or '.join(offloaded)}. Workload {markdown(workload)} "
        f"({markdown(asked.title)}, {asked.generate_tokens} generated), warm requests for the first token; means, and "
        f"ratios [95 % interval] within blocks, on {machine(results, model)}."
    )
    return Table(f"comparison-{model}", rows, sources, note, tuple(rows[0])[1 + many :] if rows else ())


def _both(c: analyse.Comparison, text: Callable[[float], str]) -> str:
    return f"{text(c.baseline.value)} → {text(c.offload.value)}" if c.baseline and c.offload else stats.NONE


def verdict(results: Results, model: str) -> Text:
    """What offloading buys and costs `model`, in sentences."""
    workload, name = results.study.workloads[-1], f"verdict-{model}"
    memory = [c for c in _compare(results, model, analyse.vram) if c.ratio]
    rate = [c for c in _compare(results, model, analyse.tokens_per_s(workload)) if c.ratio]
    if not memory or not rate:
        return Text(name, "Memory and speed were not measured together, so nothing is recommended.")
    (here, *away), used = _places(results), [*memory, *rate]
    experts = [s.expert_bytes for q, s in _sheets(results, model).items() if q in {c.quant for c in memory}]
    slower = all(c.ratio.value < 1 for c in rate)
    told = [
        f"**{'First look whether a file fits whole' if slower else 'Speed'}**: {here}, decoding ran at "
        f"{span([1 / c.ratio.value for c in rate], number)} times its speed with {' or '.join(away)}.",
        f"**If not**: with {' or '.join(away)}, {span([c.offload.value for c in memory], size)} of device memory was "
        f"enough, instead of {span([c.baseline.value for c in memory], size)}. The experts, "
        f"{span(experts, size) if experts else stats.NONE}, must then fit in the host's memory.",
    ]
    modes = [
        [c for c in _compare(results, model, q, analyse.load_modes) if c.ratio and c.arm.placement != "baseline"]
        for q in (analyse.ttft(workload, warm=True), analyse.load_time)
    ]
    if all(modes):
        first, load = (span([c.ratio.value for c in found], number) for found in modes)
        sooner = all((c.ratio.high or 1) < 1 for c in modes[0])
        told.append(
            f"**{'For long prompts, copy' if sooner else 'Copying'} the experts** to memory of their own instead of "
            "mapping the file (`--load-mode none`; older builds `--no-mmap`): the first token of a warm "
            f"{markdown(workload)} request then took {first} times as long, starting the server {load} times."
        )
        used += [c for found in modes for c in found]
    return Text(name, "\n".join(f"- {t}" for t in told), cite(r for c in used for r in c.records))


def limits(results: Results) -> Text:
    """What the advice leaves out, once for all models."""
    cpus = "; ".join(sorted({f"{markdown(r.host.cpu)}, {r.host.cpus} usable" for r in _runs(results)}))
    told, sources = [], cite(_runs(results))
    if slowed := harness.bias(results.accuracy.values()):
        told.append(slowed)
        sources |= cite_harness(results.accuracy)
    if machines := evidence.apart(results):
        told.append(machines)
    if _gpu(results):
        told += [
            "A file *fits* a card of N GB if none of its runs took more than N × 10⁹ bytes from the device. Most "
            "cards have N × 2³⁰, 7 % more: that is all that is left to driver, desktop and other programs.",
            f"No card of these sizes was measured. The speeds are those of {machine(results)} with its CPU ({cpus}): "
            "they compare files and placements, and do not say what yours would reach. With experts on the CPU, "
            "the CPU and its memory do that part of the work.",
        ]
    told += [
        f"Measured with a context of {results.study.context} tokens and one request at a time. A longer context, or "
        "more requests at once, takes more memory.",
        "Where intervals overlap, which is faster is not settled.",
        "Between *all* and *none* there is `--n-cpu-moe N`: the experts of the first N blocks on the CPU.",
        "Quality was not measured: more bits per weight are no promise of better text.",
    ]
    return Text("advice-limits", "\n".join(f"- {t}" for t in told), sources)
