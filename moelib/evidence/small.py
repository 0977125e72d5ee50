"""Small studies, each of one question, told beside the study that names them: what each found, from its own records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from moelib.base import stats
from moelib.base.neutral import markdown as neutral
from moelib.base.stats import Estimate
from moelib.catalogue.placement import Placement
from moelib.evidence.table import Text, cite, heading, several_load_modes
from moelib.study import frames
from moelib.study import study as studies
from moelib.study.frames import Summary
from moelib.study.study import Study

ALIKE = 1.05
"""Two prompts differ by less in length: what differs more in TTFT is no matter of length."""
FEW = 3
"""Prompts of so many lengths, or fewer, are no question about length."""


class Quantity(NamedTuple):
    """What is told of each placement."""

    title: str
    column: str
    """Of the last workload, where it is one of a workload."""
    text: Callable[[Estimate], str]


VRAM = Quantity("VRAM", "vram_bytes", stats.sizes)
RATE = Quantity("tokens/s of {}", "tokens_per_s/{}", stats.estimate)
TTFT = Quantity("TTFT of warm {} in ms", "ttft_warm_s/{}", lambda e: stats.estimate(e, 1e3))
LOAD = Quantity("load time in s", "load_s", stats.estimate)
ASKED = {
    "threads": (RATE,),
    "context": (VRAM, RATE),
    "ubatch": (VRAM, TTFT),
    "op_offload": (VRAM, TTFT),
    "kv": (VRAM, TTFT),
    "cold": (LOAD,),
}
"""Setting of a placement that a small study varies -> what it asks about."""
OTHERS = (VRAM, RATE, TTFT)
"""What is told where no setting varies."""


def told(study: Study) -> list[Text]:
    """What the small studies found that a study names, a line each; empty of a study that names none."""
    if not study.parameters.small_studies:
        return []
    lines: list[str] = []
    sources: dict[str, str] = {}
    for name in study.parameters.small_studies:
        try:
            small = studies.load(name)
        except (studies.UnknownName, studies.StudyError):
            lines.append(f"- {neutral(name)}: not measured yet.")
            continue
        lines.append(f"- **{neutral(small.title)}** ({_measured(small)}): {' '.join(_found(small))}")
        sources |= {f"{name}/{run}": digest for run, digest in cite(small.used).items()}
    note = (
        "Each of one question, with a document of its own in `outputs/`. Means, [95 % intervals] over rounds; of "
        "times and speeds geometric ones."
    )
    return [heading("h-small", "Small studies beside it", 2), Text("small", "\n".join([note, "", *lines]), sources)]


def _measured(small: Study) -> str:
    gpus = " and ".join(dict.fromkeys(neutral(r.device.name or "no GPU") for r in small.used))
    tally = small.tally
    return f"{neutral(small.name)}, {tally['usable']} of {tally['planned']} runs{f' on {gpus}' if gpus else ''}"


def _found(small: Study) -> Iterator[str]:
    """Sentences: what is told, then of each file its placements."""
    if small.runs.empty:
        yield "no round is complete."
        return
    lengths = {w.prompt_tokens: name for name, w in small.workloads.items() if w.prompt_tokens is not None}
    if len(lengths) > FEW:
        quantities = _by_length(dict(sorted(lengths.items())))
    else:
        quantities = [_of_workload(q, small.parameters.workloads[-1]) for q in _asked(small)]
    yield f"{_and([q.title for q in quantities])}."
    by_file: dict[str, list[str]] = {}
    for of in zip(*(frames.summaries(small.runs, q.column) for q in quantities), strict=True):
        values = [_value(s, q) for s, q in zip(of, quantities, strict=True)]
        by_file.setdefault(f"{of[0].model} {of[0].quant}", []).append(f"{_place(small, of[0])} {', '.join(values)}")
    for file, placements in by_file.items():
        yield f"{neutral(file)}: {'; '.join(placements)}."


def _asked(small: Study) -> list[Quantity]:
    placements = [Placement.parse(*side) for side in {s.side for s in frames.summaries(small.runs, "vram_bytes")}]
    varied = [of for setting, of in ASKED.items() if len({getattr(p, setting) for p in placements}) > 1]
    return list(dict.fromkeys(q for of in varied or [OTHERS] for q in of))


def _of_workload(q: Quantity, workload: str) -> Quantity:
    return q._replace(title=q.title.format(neutral(workload)), column=q.column.format(workload))


def _by_length(lengths: dict[int, str]) -> list[Quantity]:
    """TTFT of the two prompts beside each other, if there are two, and of the longest."""
    beside = [n for pair in pairwise(lengths) if pair[1] <= ALIKE * pair[0] for n in pair]
    of = {n: TTFT.column.format(lengths[n]) for n in dict.fromkeys([*beside, max(lengths)])}
    titles = [f"TTFT in ms of a warm prompt of {min(of):,}", *(f"{n:,}" for n in list(of)[1:])]
    titles[-1] += " tokens"
    return [TTFT._replace(title=title, column=column) for title, column in zip(titles, of.values(), strict=True)]


def _and(titles: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(titles[:-1]), titles[-1]]))


def _value(s: Summary, q: Quantity) -> str:
    values = list(s.runs[q.column])
    if not values:
        return stats.NONE
    return q.text(s.value if s.value and q is VRAM else stats.geometric_mean(values, frames.machines(s.runs)))


def _place(small: Study, s: Summary) -> str:
    return ", ".join(s.side) if several_load_modes(small.parameters.arms) else s.side[0]
