"""What a study concludes, first in its document: what to run on which card, and the plan's questions and claims."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moelib.answers import claims, points, verdicts
from moelib.answers.points import Choice, Point
from moelib.answers.verdicts import Answer
from moelib.base import stats
from moelib.base.neutral import code
from moelib.base.neutral import markdown as neutral
from moelib.base.stats import number, size
from moelib.report import advice, appendix
from moelib.report.table import Table, Text, cite, cite_overhead
from moelib.study import frames, overhead
from moelib.study.study import Study

CARDS_GB = (8, 12, 16, 24, 32, 48, 80)
RAM_GB = (16, 32, 64, 128)
GB = 10**9
"""Bytes that count as one GB of a card or of RAM: most have 2^30, and the difference is left to driver and desktop."""


def what_to_run(study: Study) -> Table:
    """For cards and RAM that people own: of each model the fastest file and placement, and that with most bits."""
    workload = study.parameters.workloads[-1]
    found = points.measured(study, workload)
    if {r.device.kind for r in study.used} != {"cuda"}:
        return Table("what-to-run", [], [], why_empty="no GPU took part in this study, so no card is advised for.")
    rows, sources = [], []
    for model in dict.fromkeys(p.model for p in found):
        of_model = [p for p in found if p.model == model]
        for card, ram, aim, chosen in _grid(of_model):
            rows.append({"model": neutral(model), "card": card, "RAM": ram, "for": aim, **_chosen(study, chosen)})
            sources.append(_cited(chosen, of_model))
    note = (
        f"Of what fits the fastest, and the fastest with most bits per weight; tokens/s of {neutral(workload)}. GB are "
        "10⁹ bytes here, 7 % less than most cards have. *Predicted*: on a line between two measured placements. Ties "
        "cannot be told from it by their 95 % intervals. Speeds are those of the machine measured, not of yours."
    )
    return Table("what-to-run", rows, sources, note, ("tokens/s", "VRAM", "RAM used"))


def _grid(found: Sequence[Point]) -> list[tuple[str, str, str, Choice | None]]:
    """(cards, RAM, what it is best for, choice), neighbouring cards of one choice together, and of RAM the least."""
    told: list[tuple[list[int], int, str, Choice | None]] = []
    finest = max((p.bits_per_weight for p in found), default=0.0)
    for aim in ("speed", "bits per weight"):
        for card in CARDS_GB:
            last: str | None = None
            for ram in RAM_GB:
                chosen = points.choose(found, card * GB, ram * GB, finest=aim != "speed")
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
    return [(_range(cards), f"{ram} GB and more", aim, chosen) for cards, ram, aim, chosen in told]


def _before(card: int) -> int | None:
    i = CARDS_GB.index(card)
    return CARDS_GB[i - 1] if i else None


def _label(chosen: Choice | None) -> str:
    return f"{chosen.best.quant} {chosen.best.placement.label}" if chosen else "none"


def _range(cards: Sequence[int]) -> str:
    if cards[-1] == CARDS_GB[-1]:
        return f"{cards[0]} GB and more"
    return f"{cards[0]} GB" if len(cards) == 1 else f"{cards[0]} to {cards[-1]} GB"


def _chosen(study: Study, chosen: Choice | None) -> dict[str, str]:
    if chosen is None:
        return dict.fromkeys(("file", "flags", "tokens/s", "VRAM", "RAM used", "by"), stats.NONE) | {
            "file": "none fits"
        }
    best = chosen.best
    ties = f", or {' or '.join(neutral(p.quant) for p in chosen.ties)}: not distinguishable" if chosen.ties else ""
    by = "measured" if best.between is None else f"predicted between {' and '.join(best.between)}"
    return {
        "file": f"{neutral(best.quant)}{ties}",
        "flags": code(_flags(study, best)),
        "tokens/s": stats.estimate(best.rate) if best.is_measured else number(best.rate.value),
        "VRAM": size(best.vram_bytes),
        "RAM used": size(best.ram_bytes),
        "by": by,
    }


def _flags(study: Study, best: Point) -> str:
    """Of llama-server, beside the model's file."""
    flags = {"-ngl": "99", "-c": str(study.parameters.context), **best.placement.flags()}
    if best.placement.load_mode != "mmap":
        flags["--load-mode"] = best.placement.load_mode
    return " ".join(part for flag, value in flags.items() for part in (flag, value) if part is not None)


def _cited(chosen: Choice | None, found: Sequence[Point]) -> dict[str, str]:
    of = (chosen.best, *chosen.ties) if chosen else tuple(found)
    return {k: v for p in of for k, v in p.sources.items()}


def answers(study: Study) -> list[Text]:
    """The plan's four questions, each with its verdict and the numbers for it."""
    return [_text(i, one) for i, one in enumerate((ask(study) for ask in verdicts.ANSWERS), 1)]


def _text(i: int, one: Answer) -> Text:
    lines = "\n".join(f"- {sentence}" for sentence in one.because)
    return Text(f"answer-{i}", f"### {i}. {one.asked}\n\n**{one.headline}**\n\n{lines}", one.sources)


def hypotheses(study: Study) -> Table:
    """H1 to H3, each half by itself."""
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
    for name in (n for n, w in study.workloads.items() if w.text and w.prompt_tokens):
        moved = [s for s in frames.summaries(study.runs, f"experts_over_bus/{name}") if s.value]
        shares = ", ".join(
            f"{neutral(model)} {_span(s for s in moved if s.model == model)}"
            for model in dict.fromkeys(s.model for s in moved)
        )
        told = (
            f" Of the experts' bytes that a prompt of all experts copies to the GPU it copied {shares}."
            if moved
            else ""
        )
        sentences.append(
            f"**Workload {neutral(name)} repeats one sentence to its {study.workloads[name].prompt_tokens} tokens.** "
            f"Such a prompt needs few of the experts: with experts on the CPU its TTFT may be too short.{told}"
        )
        sources |= {k: v for s in moved for k, v in s.sources.items()}
    return [Text("prompts", " ".join(sentences), sources or cite(study.used))] if sentences else []


def limits(study: Study) -> Text:
    """What the study does not tell."""
    cpus = "; ".join(sorted({f"{neutral(r.host.cpu)}, {r.host.cpus} usable" for r in study.used}))
    kinds = {r.device.kind for r in study.used}
    sentences = ["Text and quality were not measured, and nothing is said of them."]
    sources = cite(study.used)
    if slowed := overhead.bias(study.overhead.values()):
        sentences.append(slowed)
        sources |= cite_overhead(study.overhead)
    if machines := appendix.apart(study):
        sentences.append(machines)
    if "cuda" in kinds:
        sentences += [
            "VRAM is what the driver reports for a process that is alone on the GPU; the driver's list and the growth "
            "of the whole GPU must agree. Energy is that of the GPU board, by a counter that moves about ten "
            "times a second.",
            f"Speeds are those of {advice.machine(study)} with its CPU ({cpus}): they compare files and placements, "
            "and do not predict the speed of your machine. Experts on the CPU are computed by the CPU from RAM.",
        ]
    if "loopback" in kinds:
        sentences.append(
            "On the *loopback* device, VRAM is the resident memory of the process that acts as the device. Pages of "
            "caches and workspaces count once they are touched. Both processes share the cores and memory bandwidth of "
            "one machine, so the speed penalty of CPU offload is not that of a GPU."
        )
    sentences.append(f"Measured with a context of {study.parameters.context} tokens, one request at a time.")
    return Text("limits", "\n".join(f"- {s}" for s in sentences), sources)


def models(study: Study) -> list[str]:
    """The models with a measured cell, in the study's order."""
    return advice.models(study)
