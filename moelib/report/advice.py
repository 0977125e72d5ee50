"""What to run: which file and placement fit which card, with the command, and what CPU offload saves and costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from moelib.answers import points
from moelib.answers.points import Choice, Point
from moelib.audit.record import Record
from moelib.base import stats
from moelib.base.neutral import code, word
from moelib.base.neutral import markdown as neutral
from moelib.base.stats import number, size, span
from moelib.catalogue.placement import REFERENCE, Placement
from moelib.evidence.table import Table, Text, below_names, merged, reference, several_load_modes
from moelib.report import findings
from moelib.study import frames
from moelib.study.frames import Comparison, Pairs, Side
from moelib.study.study import Study

CARDS_GB = (4, 6, 8, 12, 16, 24, 32, 48, 80)
RAM_GB = (16, 32, 64, 128)
GIB = 1 << 30
GB = 10**9
"""Bytes that count as one GB of a card or of RAM: most have 2^30, and the difference is left to driver and desktop."""
COMMAND = "llama-server -m {file} -ngl 99 -c {context} -np 1 -fa on"
"""What every advised command begins with: the engine's settings of the measured runs that matter to others."""
AIMS, BOTH = ("speed", "bits"), "both"
"""What a choice is best for."""
TIE = "tied"
"""Of files whose tokens/s cannot be told apart; a short word, as a long one makes flags break."""
NO_GPU = Table("what-to-run", [], [], why_empty="no GPU took part in this study, so no card is advised for.")
SHARED = Table("what-to-run", [], [], why_empty="runs shared their host, so which is fastest is not known.")


def models(study: Study) -> list[str]:
    """The models with a measured cell, in the study's order."""
    return list(dict.fromkeys(name.rsplit("/", 1)[0] for name in study.measured))


def what_to_run(study: Study) -> list[Text | Table]:
    """`of_model` of each model, below its name; what the columns mean is said once."""
    if not_advised := _not_advised(study):
        return [not_advised]
    return below_names("run", {model: of_model(study, model) for model in models(study)})


def of_model(study: Study, model: str) -> Table:
    """For cards and RAM that people own: the fastest file and placement of a model, and that with most bits."""
    if not_advised := _not_advised(study):
        return not_advised
    rows, sources, runs = [], [], {r.run_id: r for r in study.used}
    found = _measured(study, model)
    for cards, ram, aim, chosen in _grid(study, model, found):
        rows.append({"card": _range(cards), "RAM": str(ram), "for": aim, **_chosen(chosen, runs)})
        sources.append(_cited(chosen, found))
    return Table(
        f"what-to-run-{model}", rows, sources, _note(study), ("layers", "tokens/s", "VRAM", "RAM used"), unbroken=True
    )


def _note(study: Study) -> str:
    """What the columns mean, of all models, so that it can be said once."""
    command = COMMAND.format(file="FILE", context=study.parameters.context)
    sentences = [
        "Of what fits the fastest (*speed*), the fastest with most bits per weight (*bits*), or what is both; tokens/s "
        f"of {neutral(study.parameters.workloads[-1])}. The command is `{command}` with the flags. Card and RAM, so "
        "much of it or more, are in GB of 10⁹ bytes, 7 % less than most cards have; *layers* have their experts in "
        "RAM; VRAM (of the run that needed most) and RAM used (weights that are not in VRAM, and "
        f"{points.PROCESS_BYTES >> 20} MiB for the server) in GiB. Speeds are those of the machine measured, not of "
        "yours. *Predicted*: on a line between two measured placements, not run. "
        f"*{TIE.capitalize()}*: not distinguishable, as the 95 % intervals of tokens/s overlap."
    ]
    if several_load_modes(study.parameters.arms):
        sentences.append(
            "Load mode *none* where a warm request then has its first token sooner in every placement that was run in "
            "both; else, and of placements that were run in *mmap* alone, *mmap*."
        )
    return " ".join(sentences)


def commands(study: Study, model: str, quant: str | None = None) -> Text:
    """llama-server's whole command for every answer of `what_to_run`, of what was measured; for every placement of one
    quant, or of the first where no GPU took part."""
    found = _measured(study, model)
    if quant is None and _gpu(study):
        chosen = [c.best for *_, c in _grid(study, model, found, predicted=False) if c]
    else:
        every = points.in_load_mode(found, load_mode(study, model))
        chosen = sorted((p for p in every if p.quant == (quant or every[0].quant)), key=lambda p: p.moved_layers)
    runs, files = {r.run_id: r for r in study.used}, {m.quant: m.file_name for m in study.manifests if m.model == model}
    lines = {}
    for p in chosen:
        r = runs[next(iter(p.sources))]
        command = COMMAND.format(file=word(files[p.quant]), context=r.spec.context_tokens)
        away = r.observation.placement.moved_bytes
        ram = f", {size(away)} of experts in RAM" if away else ""
        told = f"{size(p.vram_bytes)} of VRAM{ram}, {number(p.rate.value)} tokens/s"
        lines[f"{command} {flags(p.placement, r)}".rstrip()] = f"# {p.quant}, {place(r)}: {told}"
    text = "\n".join(["```bash", *(f"{title}\n{line}" for line, title in lines.items()), "```"])
    text = text if lines else "No command is advised: no run has VRAM and tokens/s."
    return Text(f"commands-{model}", text, merged(p.sources for p in chosen))


def _not_advised(study: Study) -> Table | None:
    """Why no file is advised for any card; None where some may be."""
    return NO_GPU if not _gpu(study) else SHARED if study.host_shared else None


def _gpu(study: Study) -> bool:
    return {r.device.kind for r in study.used} == {"cuda"}


def _measured(study: Study, model: str) -> list[Point]:
    """What may be advised."""
    return [p for p in points.measured(study, study.parameters.workloads[-1]) if p.model == model]


_Answer = tuple[list[int], int, str, Choice | None]
"""(cards, RAM, what it is best for, choice)."""


def _grid(study: Study, model: str, found: Sequence[Point], predicted: bool = True) -> list[_Answer]:
    """Neighbouring cards of one choice together, and of RAM the least."""
    told: list[_Answer] = []
    mode = load_mode(study, model)
    finest = max((p.bits_per_weight for p in found), default=0.0)
    for aim in AIMS if found else ():
        for card in CARDS_GB:
            last: str | None = None
            for ram in RAM_GB:
                limits = (card * GB, ram * GB)
                chosen = points.choose(found, *limits, finest=aim != "speed", load_mode=mode, predicted=predicted)
                label = _label(chosen)
                if label != last:
                    same = (t for t in told if t[1:3] == (ram, aim) and _label(t[3]) == label)
                    joined = next((t for t in same if t[0][-1] == _before(card)), None)
                    if joined:
                        joined[0].append(card)
                    else:
                        told.append(([card], ram, aim, chosen))
                last = label
                if chosen and chosen.best.bits_per_weight == finest and aim != "speed":
                    break
    return list(_once(told))


def _once(told: Sequence[_Answer]) -> Iterator[_Answer]:
    """Answers that are the same for both aims as one."""
    aims: dict[tuple[tuple[int, ...], int, str], list[str]] = {}
    for cards, ram, aim, choice in told:
        aims.setdefault((tuple(cards), ram, _label(choice)), []).append(aim)
    for cards, ram, aim, choice in told:
        of = aims[tuple(cards), ram, _label(choice)]
        if aim == of[0]:
            yield cards, ram, BOTH if len(of) > 1 else aim, choice


def _before(card: int) -> int | None:
    i = CARDS_GB.index(card)
    return CARDS_GB[i - 1] if i else None


def _label(chosen: Choice | None) -> str:
    """What makes neighbouring cards differ: the choice, and what cannot be told from it."""
    return "; ".join(f"{p.quant} {p.placement.label}" for p in (chosen.best, *chosen.ties)) if chosen else "none"


def _range(cards: Sequence[int]) -> str:
    if cards[-1] == CARDS_GB[-1]:
        return f"from {cards[0]}"
    return str(cards[0]) if len(cards) == 1 else f"{cards[0]} to {cards[-1]}"


def _chosen(chosen: Choice | None, runs: Mapping[str, Record]) -> dict[str, str]:
    if chosen is None:
        return dict.fromkeys(("file", "flags", "layers", "tokens/s", "VRAM", "RAM used"), stats.NONE) | {
            "file": "none fits"
        }
    best, r = chosen.best, runs[next(iter(chosen.best.sources))]
    ties = " or ".join(f"{neutral(p.quant)}{_elsewhere(p, best)}" for p in chosen.ties)
    given = flags(best.placement, r)
    return {
        "file": neutral(best.quant) + (f", or {ties}: {TIE}" if ties else ""),
        "flags": code(given) if given else "",
        "layers": str(best.moved_layers or ""),
        "tokens/s": stats.estimate(best.rate) if best.is_measured else f"{number(best.rate.value)}, predicted",
        "VRAM": number(best.vram_bytes, 1 / GIB),
        "RAM used": number(best.ram_bytes, 1 / GIB),
    }


def _elsewhere(tie: Point, best: Point) -> str:
    """Its placement, where that is not the best's."""
    return "" if tie.placement == best.placement else f" ({tie.placement.label})"


def _cited(chosen: Choice | None, found: Sequence[Point]) -> dict[str, str]:
    return merged(p.sources for p in ((chosen.best, *chosen.ties) if chosen else found))


def _runs(study: Study, model: str) -> list[Record]:
    return [r for r in study.used if r.spec.model == model]


def place(r: Record) -> str:
    """A run's placement in words: N by the layers that hold experts."""
    placed, moved = r.spec.placed, r.observation.placement.moved_blocks
    where = f"experts of {layers(moved)} on the CPU"
    if placed.is_baseline:
        where = f"all on the {'GPU' if r.device.kind == 'cuda' else 'device'}"
    elif placed.is_whole:
        where = "experts on the CPU"
    settings = str(placed).partition(",")[2]
    return f"{where} ({settings})" if settings else where


def flags(placed: Placement, r: Record) -> str:
    """llama-server's flags of a placement, in the words of the build of a run; none for what is llama.cpp's default."""
    given = placed.flags() | ({"-t": str(placed.threads)} if placed.threads else {})
    if placed.load_mode != "mmap":
        given |= placed.load_flags(r.observation.argv)
    return " ".join(flag if value is None else f"{flag} {value}" for flag, value in given.items())


def layers(n: int) -> str:
    return f"{n} layer" if n == 1 else f"{n} layers"


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


def load_mode(study: Study, model: str) -> str:
    """The load mode that is advised: none, which copies the experts to memory of their own, if a warm request of the
    last workload then has its first token sooner, beyond doubt, in every placement that has both; else mmap."""
    compared = _load_modes(study, model, f"ttft_warm_s/{study.parameters.workloads[-1]}")
    highs = [c.ratio.high for c in compared if c.ratio]
    return "none" if highs and all(high is not None and high < 1 for high in highs) else "mmap"


def _base(study: Study, model: str, compared: Sequence[Comparison]) -> str:
    """What is compared with, in words; cells whose placements were planned differ in it."""
    places = {(r.spec.placement, r.spec.load_mode): place(r) for r in _runs(study, model)}
    bases = {places[c.against] for c in compared}
    return bases.pop() if len(bases) == 1 else "as much on the GPU as fits"


def verdict(study: Study, model: str) -> Text:
    """What CPU offload saves and costs for `model`, in sentences."""
    workload, name = study.parameters.workloads[-1], f"verdict-{model}"
    vram = [c for c in _compare(study, model, "vram_bytes", _ends) if c.ratio]
    rate = [c for c in _compare(study, model, f"tokens_per_s/{workload}", _ends) if c.ratio]
    if not vram or not rate:
        return Text(name, "VRAM and tokens/s were not measured together, so nothing is recommended.")
    places, used = {(r.spec.placement, r.spec.load_mode): place(r) for r in _runs(study, model)}, [*vram, *rate]
    base, away = _base(study, model, vram), " or ".join(dict.fromkeys(places[c.side] for c in vram))
    quants = {c.quant for c in vram}
    experts = [m.expert_bytes for m in study.manifests if m.model == model and m.quant in quants]
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
    copy = "For long prompts, copy" if load_mode(study, model) == "none" else "Copying"
    if all(modes):
        loads = pd.concat([side for c in modes[1] for side in (c.before, c.after)])
        ttft, load = (span(stats.values(c.ratio for c in comparisons), number) for comparisons in modes)
        sentences.append(
            f"**{copy} the experts** to memory of their own "
            "instead of mapping the file (`--load-mode none`; older builds `--no-mmap`): TTFT of warm "
            f"{neutral(workload)} requests was then {ttft} times, and load time {load} times, that of the mapped file"
            f"{f' (files {findings.cache(loads)})' if findings.cache_known(study) else ''}."
        )
        used += [c for comparisons in modes for c in comparisons]
    return Text(name, "\n".join(f"- {s}" for s in sentences), merged(c.sources for c in used))


def _is_offload(c: Comparison) -> bool:
    """Of a cached file: that one is cold is no choice of whoever is advised."""
    return not c.placement.is_baseline and not c.placement.cold
