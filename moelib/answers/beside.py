"""Two runners on the same files: what agrees, and what one of them cannot tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moelib.audit.invariants import INVARIANTS
from moelib.audit.record import Record
from moelib.base import stats
from moelib.base.stats import Estimate
from moelib.catalogue.facts import SHIMMY_GENERATE
from moelib.measure.runner import QUANTITIES, untold
from moelib.study import study as studies
from moelib.study.columns import machine
from moelib.study.study import Study


@dataclass(frozen=True)
class Pair:
    """The runs of one file in one placement by two runners."""

    model: str
    quant: str
    placement: str
    mine: Sequence[Record]
    its: Sequence[Record]

    @property
    def same_file(self) -> bool:
        return {r.sheet.sha256 for r in self.mine} == {r.sheet.sha256 for r in self.its}

    @property
    def same_text(self) -> tuple[int, int]:
        """(requests of which both runners' every text is the same, requests that both were asked)."""
        a, b = (_texts(runs) for runs in (self.mine, self.its))
        shared = a.keys() & b.keys()
        return sum(a[k] == b[k] for k in shared), len(shared)

    @property
    def proven(self) -> tuple[bool, bool]:
        """Whether the placement of each one's runs is proven, by all checks of placement that a run has."""
        return _proven(self.mine), _proven(self.its)

    def whole_s(self, workload: str) -> tuple[Estimate | None, Estimate | None]:
        """Seconds from a warm request to its last token, by each; one value a run."""
        return _whole_s(self.mine, workload), _whole_s(self.its, workload)


def _texts(runs: Sequence[Record]) -> dict[tuple[str, int], set[str | None]]:
    texts: dict[tuple[str, int], set[str | None]] = defaultdict(set)
    for r in runs:
        for q in r.observation.requests:
            texts[q.workload, q.index].add(q.text)
    return texts


def _proven(runs: Sequence[Record]) -> bool:
    of_placement = {i for i in INVARIANTS if i.startswith("placement-")}
    return all(c.passed for r in runs for c in r.audit if c.id in of_placement)


def _whole_s(runs: Sequence[Record], workload: str) -> Estimate | None:
    of_runs = [
        (machine(r), [q.total_s for q in r.observation.requests if q.workload == workload and q.index and q.total_s])
        for r in runs
    ]
    means = [(where, sum(of) / len(of)) for where, of in of_runs if of]
    return stats.geometric_mean([x for _, x in means], [where for where, _ in means]) if means else None


def other(study: Study) -> Study | None:
    """The study that this one is shown beside; None where it names none, or that was not measured here."""
    try:
        return studies.load(study.parameters.beside) if study.parameters.beside else None
    except (studies.UnknownName, studies.StudyError):
        return None


def pairs(study: Study, beside: Study) -> Iterator[Pair]:
    """What both have runs of, in the study's order."""
    theirs = _by_placement(beside.used)
    for (model, quant, placement), runs in _by_placement(study.used).items():
        if its := theirs.get((model, quant, placement)):
            yield Pair(model, quant, placement, runs, its)


def _by_placement(runs: Sequence[Record]) -> dict[tuple[str, str, str], list[Record]]:
    found: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for r in runs:
        if r.spec.load_mode == "mmap":
            found[r.spec.model, r.spec.quant, r.spec.placement].append(r)
    return found


def unmeasured(study: Study) -> list[str]:
    """What no run of a study has, with the reason."""
    runner, runs = study.parameters.runner, study.used
    found = []
    requests = [q for r in runs for q in r.observation.requests]
    if requests and not any(q.is_live for q in requests):
        at_once = "sends an answer's tokens all at once when the last one is made"
        how = "prints an answer when it is whole" if runner == SHIMMY_GENERATE else at_once
        found.append(f"TTFT and tokens/s, as {runner} {how}")
    if runs and all(r.observation.memory.value_bytes is None for r in runs):
        found.append("VRAM, as there is no device: all weights are in RAM at any placement")
    silent = [words for name, words in QUANTITIES.items() if name in untold(runner) - {"log", "process"}]
    return found + ([f"and {runner} does not report {', '.join(silent)}"] if silent else [])
