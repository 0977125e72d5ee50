"""Small studies, each of one question, told beside the study that names them: what each found, from its own records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from moelib.base import stats
from moelib.base.neutral import markdown as neutral
from moelib.base.stats import Estimate, Machines
from moelib.evidence.table import Text, cite_of, heading, placed
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
    mean: Callable[[Sequence[float], Machines], Estimate] = stats.geometric_mean


VRAM = Quantity("VRAM", "vram_bytes", stats.sizes, stats.mean)
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
        sources |= cite_of(name, small.used)
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
    last, lengths = small.parameters.workloads[-1], prompt_lengths(small)
    quantities = _by_length(lengths) if lengths else [_of_workload(q, last) for q in _asked(small)]
    yield f"{_and([q.title for q in quantities])}."
    by_file: dict[str, list[str]] = {}
    for of in zip(*(frames.summaries(small.runs, q.column) for q in quantities), strict=True):
        values = [_value(s, q) for s, q in zip(of, quantities, strict=True)]
        by_file.setdefault(f"{of[0].model} {of[0].quant}", []).append(
            f"{placed(small, of[0].side)} {', '.join(values)}"
        )
    for file, placements in by_file.items():
        yield f"{neutral(file)}: {'; '.join(placements)}."


def _asked(small: Study) -> list[Quantity]:
    placements = [r.spec.placed for r in small.used]
    varied = [of for setting, of in ASKED.items() if len({getattr(p, setting) for p in placements}) > 1]
    return list(dict.fromkeys(q for of in varied or [OTHERS] for q in of))


def _of_workload(q: Quantity, workload: str) -> Quantity:
    return q._replace(title=q.title.format(neutral(workload)), column=q.column.format(workload))


def prompt_lengths(study: Study) -> dict[int, str]:
    """Tokens of a prompt -> its workload, the shortest first; empty of a study of few lengths."""
    lengths = {w.prompt_tokens: name for name, w in study.workloads.items() if w.prompt_tokens is not None}
    return dict(sorted(lengths.items())) if len(lengths) > FEW else {}


def neighbours(lengths: Mapping[int, str]) -> list[tuple[int, int]]:
    """Lengths that differ by so little that TTFT should not."""
    return [(n, m) for n, m in pairwise(lengths) if m <= ALIKE * n]


def _by_length(lengths: Mapping[int, str]) -> list[Quantity]:
    """TTFT of the two prompts beside each other, if there are two, and of the longest."""
    beside = [n for pair in neighbours(lengths) for n in pair]
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
    return q.text(q.mean(values, frames.machines(s.runs)))
