"""Which file and which placement: what fits which GPU, with its command, and what CPU offload saves and costs, for the
document and the model cards.

The rule: a file fits a GPU of N GB if no run of it took more than N * 10^9 bytes of VRAM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from moelib.audit.record import Record
from moelib.base import neutral, stats
from moelib.base.neutral import markdown
from moelib.base.stats import number, size, span
from moelib.catalogue.facts import Manifest
from moelib.catalogue.placement import REFERENCE, Placement
from moelib.report import appendix, findings
from moelib.report.table import Sources, Table, Text, cite, cite_manifest, cite_overhead, merged, reference
from moelib.study import frames, overhead
from moelib.study.frames import Comparison, Pairs, Side
from moelib.study.study import Study

GPUS_GB = (4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 80)
"""VRAM of GPUs that people own, as they are sold."""
GB = 10**9
"""Bytes that count as one GB of a GPU: most GPUs have 2^30, and the difference is left to driver and desktop."""
COMMAND = "llama-server -m {file} -ngl 99 -c {context} -np 1 -fa on"
"""What every advised command begins with: the engine's settings of the measured runs that matter to others."""
NO_FIT = ("both", "none fits", *[stats.NONE] * 4)
"""The cells of a GPU that holds nothing."""


@dataclass(frozen=True)
class Choice:
    """One quant in one placement, as it was measured."""

    quant: str
    file_name: str
    place: str
    """The placement in words."""
    flags: str
    """llama-server's flags for it, beside those that all have; empty with all on the GPU."""
    context: int
    vram_bytes: float
    """The most VRAM that any of its runs took."""
    cpu_layers: int
    """Layers whose experts are on the CPU."""
    cpu_bytes: int
    """Bytes of these experts."""
    bits_per_weight: float
    rate: stats.Estimate
    """tokens/s of the study's last workload."""
    sources: Sources

    @property
    def command(self) -> str:
        return f"{COMMAND.format(file=neutral.word(self.file_name), context=self.context)} {self.flags}".rstrip()

    @property
    def title(self) -> str:
        """What the command does, and what it gave."""
        ram = f", {size(self.cpu_bytes)} of experts in RAM" if self.cpu_bytes else ""
        took = f"{size(self.vram_bytes)} of VRAM{ram}, {number(self.rate.value)} tokens/s"
        return f"{self.quant}, {self.place}: {took}"


@dataclass(frozen=True)
class Answer:
    """What to take for a GPU, and for what."""

    wanted: str
    choice: Choice
    as_fast: tuple[str, ...] = ()
    """Other quants whose tokens/s the data do not tell apart from this one's."""


def fitting(choices: Sequence[Choice], gpu_bytes: int) -> list[Choice]:
    """The choices that fit, fewest bits per weight first."""
    return sorted((c for c in choices if c.vram_bytes <= gpu_bytes), key=lambda c: c.bits_per_weight)


def fastest(choices: Sequence[Choice]) -> Choice:
    return max(choices, key=lambda c: c.rate.value)


def finest(choices: Sequence[Choice]) -> Choice:
    """The one with most bits per weight; of equal ones the fastest."""
    return max(choices, key=lambda c: (c.bits_per_weight, c.rate.value))


def answers(choices: Sequence[Choice]) -> list[Answer]:
    """The fastest and the finest of choices that fit; one answer where that is the same.

    Of those whose interval overlaps that of the fastest, the finest: the data do not tell that it is slower.
    """
    if not choices:
        return []
    quickest = fastest(choices)
    tied = [c for c in choices if c is quickest or stats.overlap(c.rate, quickest.rate)]
    fast, fine = finest(tied), finest(choices)
    others = tuple(dict.fromkeys(c.quant for c in tied if c.quant != fast.quant))
    if fast is fine:
        return [Answer("both", fast, others)]
    return [Answer("most tokens/s", fast, others), Answer("most bits per weight", fine)]


def models(study: Study) -> list[str]:
    """The models with a measured cell, in the study's order."""
    return list(dict.fromkeys(name.rsplit("/", 1)[0] for name in study.measured))


def _runs(study: Study, model: str | None = None) -> list[Record]:
    return [r for r in study.used if model in (None, r.spec.model)]


def _gpu(study: Study) -> bool:
    return {r.device.kind for r in _runs(study)} == {"cuda"}


def _side(r: Record) -> Side:
    return r.spec.placement, r.spec.load_mode


def place(r: Record) -> str:
    """A run's placement in words: N by the layers that hold experts."""
    placed, layers = r.spec.placed, r.observation.placement.moved_blocks
    where = f"experts of {_layers(layers)} on the CPU"
    if placed.is_baseline:
        where = f"all on the {'GPU' if r.device.kind == 'cuda' else 'device'}"
    elif placed.is_whole:
        where = "experts on the CPU"
    settings = str(placed).partition(",")[2]
    return f"{where} ({settings})" if settings else where


def flags(r: Record) -> str:
    """llama-server's flags of a run's placement, in the words of its build; none for what is llama.cpp's default."""
    placed = r.spec.placed
    given = placed.flags() | ({"-t": str(placed.threads)} if placed.threads else {})
    if placed.load_mode != "mmap":
        given |= placed.load_flags(r.observation.argv)
    return " ".join(flag if value is None else f"{flag} {value}" for flag, value in given.items())


def _compare(study: Study, model: str, column: str, pairs: Pairs = frames.in_one_load_mode) -> list[Comparison]:
    return frames.comparisons(study.runs[study.runs["model"] == model], column, pairs)


def _ends(sides: Sequence[Side]) -> list[tuple[Side, Side]]:
    """(most on the GPU, all experts on the CPU) in the load mode of the former; every pair where none is that."""
    pairs = frames.in_one_load_mode(sides)
    return [p for p in pairs if Placement.parse(*p[1]).is_whole] or pairs


def _load_modes(study: Study, model: str, column: str) -> list[Comparison]:
    """Load mode none against mmap, of every placement with experts on the CPU that has both."""
    compared = _compare(study, model, column, frames.load_modes)
    return [c for c in compared if c.ratio and _is_offload(c)]


def copied(study: Study, model: str) -> bool:
    """Whether copying the experts to memory of their own is advised: a warm request of the last workload then has its
    first token sooner, beyond doubt, in every placement that has both load modes."""
    compared = _load_modes(study, model, f"ttft_warm_s/{study.parameters.workloads[-1]}")
    highs = [c.ratio.high for c in compared if c.ratio]
    return bool(highs) and all(high is not None and high < 1 for high in highs)


def advised(study: Study, model: str) -> Pairs:
    """The pairs (most on the GPU, other) that are advised: in the load mode that is, where a placement has it."""
    mode = "none" if copied(study, model) else "mmap"

    def pairs(sides: Sequence[Side]) -> list[tuple[Side, Side]]:
        every = frames.offloads(sides)
        kept = [(b, s) for b, s in every if s[1] == mode or (s[1] == b[1] and (s[0], mode) not in sides)]
        return kept or every

    return pairs


def _base(study: Study, model: str, compared: Sequence[Comparison]) -> str:
    """What is compared with, in words; cells whose placements were planned differ in it."""
    places = {_side(r): place(r) for r in _runs(study, model)}
    bases = {places[c.against] for c in compared}
    return bases.pop() if len(bases) == 1 else "as much on the GPU as fits"


def _manifests(study: Study, model: str) -> dict[str, Manifest]:
    return {s.quant: s for s in study.manifests if s.model == model}


def choices(study: Study, model: str) -> list[Choice]:
    """Every quant and advised placement of `model` with a complete round, a manifest and known VRAM."""
    manifests, found = _manifests(study, model), {}
    first = {(r.spec.quant, _side(r)): r for r in reversed(_runs(study, model))}
    column = f"tokens_per_s/{study.parameters.workloads[-1]}"
    for c in _compare(study, model, column, advised(study, model)):
        for side, rate, runs in ((c.against, c.baseline, c.before), (c.side, c.value, c.after)):
            vram = runs["vram_needed_bytes"]
            if not rate or c.quant not in manifests or vram.isna().any():
                continue
            manifest, r = manifests[c.quant], first[c.quant, side]
            moved = r.observation.placement
            found[c.quant, side] = Choice(
                quant=c.quant,
                file_name=manifest.file_name,
                place=place(r),
                flags=flags(r),
                context=r.spec.context_tokens,
                vram_bytes=vram.max(),
                cpu_layers=moved.moved_blocks,
                cpu_bytes=moved.moved_bytes,
                bits_per_weight=manifest.bits_per_weight,
                rate=rate,
                sources=frames.sources(runs) | cite_manifest(manifest),
            )
    return list(found.values())


def which_file(study: Study, model: str) -> Table:
    """Which file to take for which GPU, with which flags; GPUs of the same answer share rows."""
    name, measured = f"which-file-{model}", choices(study, model)
    if not _gpu(study):
        return Table(name, [], [], why_empty="no GPU took part in this study, so no GPU is advised.")
    if not measured:
        return Table(name, [], [], why_empty="no run has VRAM and tokens/s, so no GPU is advised.")
    found: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for gb in GPUS_GB:
        found.setdefault(tuple(map(_cells, answers(fitting(measured, gb * GB)))) or (NO_FIT,), []).append(gb)
    heads = ("VRAM of the GPU", "wanted", "take", "flags", "experts in RAM", "VRAM needed", "tokens/s")
    rows = [dict(zip(heads, (_range(gbs), *cells), strict=True)) for given, gbs in found.items() for cells in given]
    every = merged(c.sources for c in measured)
    context = " or ".join(f"{n}" for n in sorted({c.context for c in measured}))
    asked = study.workloads[study.parameters.workloads[-1]]
    note = (
        f"Measured on {machine(study, model)}, not on your GPU; tokens/s [95 % interval] after a prompt of workload "
        f"{markdown(asked.name)}, VRAM by the run that needed most. Before the flags goes "
        f"`{COMMAND.format(file='FILE', context=context)}`."
    )
    if any(" or " in row["take"] for row in rows):
        note += (
            " Where two files are named, the data do not tell their tokens/s apart: the row is that of the first, with "
            "more bits per weight."
        )
    return Table(name, rows, [every] * len(rows), note, ("VRAM needed", "tokens/s"))


def _cells(answer: Answer) -> tuple[str, ...]:
    c = answer.choice
    take = " or ".join((f"**{c.quant}**", *answer.as_fast))
    ram = _in_ram(c.cpu_layers, c.cpu_bytes)
    return answer.wanted, take, _flags(c.flags), ram, size(c.vram_bytes), stats.estimate(c.rate)


def _flags(text: str) -> str:
    return neutral.code(text) if text else "none"


def _in_ram(layers: int, nbytes: int) -> str:
    return f"{size(nbytes)}, {_layers(layers)}" if nbytes else "none"


def _layers(n: int) -> str:
    return f"{n} layer" if n == 1 else f"{n} layers"


def commands(study: Study, model: str, quant: str | None = None) -> Text:
    """llama-server's whole command for every answer of `which_file`; for every advised placement of one quant, or of
    the first where no GPU took part."""
    every = choices(study, model)
    if quant is None and _gpu(study):
        every = [a.choice for gb in GPUS_GB for a in answers(fitting(every, gb * GB))]
    else:
        every = [c for c in every if c.quant == (quant or every[0].quant)]
        every.sort(key=lambda c: c.cpu_layers)
    distinct = {c.command: c for c in every}
    lines = [f"# {c.title}\n{command}" for command, c in distinct.items()]
    text = "\n".join(["```bash", *lines, "```"]) if lines else "No command is advised: no run has VRAM and tokens/s."
    return Text(f"commands-{model}", text, merged(c.sources for c in distinct.values()))


def _range(gbs: Sequence[int]) -> str:
    if gbs[-1] == GPUS_GB[-1]:
        return f"{gbs[0]} GB and more"
    return f"{gbs[0]} GB" if len(gbs) == 1 else f"{gbs[0]} to {gbs[-1]} GB"


def machine(study: Study, model: str | None = None) -> str:
    return "; ".join(sorted({findings.machine(r) for r in _runs(study, model)}))


def comparison(study: Study, model: str) -> Table:
    """One row for each quant and placement with experts on the CPU: VRAM, tokens/s, TTFT, against most on the GPU."""
    workload = study.parameters.workloads[-1]
    first = {(r.spec.quant, _side(r)): r for r in reversed(_runs(study, model))}
    columns = ("vram_bytes", f"tokens_per_s/{workload}", f"ttft_warm_s/{workload}")
    rows, sources = [], []
    every = list(zip(*(_compare(study, model, c, frames.offloads) for c in columns), strict=True))
    for vram, rate, ttft in every:
        r = first[vram.quant, vram.side]
        moved = r.observation.placement
        rows.append(
            {
                "quant": vram.quant,
                "flags": _flags(flags(r)),
                "experts in RAM": _in_ram(moved.moved_blocks, moved.moved_bytes),
                "VRAM": _both(vram, size),
                "tokens/s": _both(rate, number),
                "tokens/s, ratio": stats.estimate(rate.ratio),
                "TTFT, ms": _both(ttft, lambda s: number(s, 1000)),
                "TTFT, ratio": stats.estimate(ttft.ratio),
                "rounds": rate.difference.n if rate.difference else 0,
            }
        )
        sources.append(merged(c.sources for c in (vram, rate, ttft)))
    asked, base = study.workloads[workload], _base(study, model, [vram for vram, _, _ in every]) if every else ""
    note = (
        f"Left of the arrow: {base}; right of it: with these flags. Workload {markdown(workload)} "
        f"({markdown(asked.title)}, {asked.generate_tokens} generated); TTFT of warm requests. Means, and ratios "
        f"[95 % interval] paired within rounds, on {machine(study, model)}."
    )
    return Table(f"comparison-{model}", rows, sources, note, tuple(rows[0])[3:] if rows else ())


def _both(c: Comparison, text: Callable[[float], str]) -> str:
    return f"{text(c.baseline.value)} → {text(c.value.value)}" if c.baseline and c.value else stats.NONE


def verdict(study: Study, model: str) -> Text:
    """What CPU offload saves and costs for `model`, in sentences."""
    workload, name = study.parameters.workloads[-1], f"verdict-{model}"
    vram = [c for c in _compare(study, model, "vram_bytes", _ends) if c.ratio]
    rate = [c for c in _compare(study, model, f"tokens_per_s/{workload}", _ends) if c.ratio]
    if not vram or not rate:
        return Text(name, "VRAM and tokens/s were not measured together, so nothing is recommended.")
    places, used = {_side(r): place(r) for r in _runs(study, model)}, [*vram, *rate]
    base, away = _base(study, model, vram), " or ".join(dict.fromkeys(places[c.side] for c in vram))
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
    modes = [_load_modes(study, model, column) for column in (f"ttft_warm_s/{workload}", "load_s")]
    if all(modes):
        loads = pd.concat([side for c in modes[1] for side in (c.before, c.after)])
        ttft, load = (span(stats.values(c.ratio for c in comparisons), number) for comparisons in modes)
        sentences.append(
            f"**{'For long prompts, copy' if copied(study, model) else 'Copying'} the experts** to memory of their own "
            "instead of mapping the file (`--load-mode none`; older builds `--no-mmap`): TTFT of warm "
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
        "Between all and none, `--n-cpu-moe N` keeps the experts of the first N layers on the CPU; a layer without "
        "experts counts among the N, and moves nothing.",
        "Quality was not measured: more bits per weight do not guarantee better text.",
    ]
    return Text("advice-limits", "\n".join(f"- {s}" for s in sentences), sources)
