"""The plan's three hypotheses, each half by itself, and its six criteria of success, by code from records."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from moelib.answers import contrasts, quality
from moelib.answers.contrasts import Contrast
from moelib.answers.verdicts import OPEN, SHARED, Answer, Verdict, merged, offloads
from moelib.base import stats
from moelib.base.neutral import markdown as neutral
from moelib.base.stats import number, percent, size
from moelib.catalogue.facts import Receipt
from moelib.study.study import Study

AWAY = ("cpu-moe", "mmap")
PLANNED = {"baseline", "cpu-moe"}
PLANNED_ROUNDS = 3
"""The plan's runs: each of these placements so often."""
SLACK = 0.99
"""Of the engine's buffers: on loopback, pages of them count once they are touched."""


def hypotheses(study: Study) -> list[Answer]:
    """H1 to H3, each in the halves that it is made of."""
    workload = study.parameters.workloads[-1]
    rate, ttft = f"tokens_per_s/{workload}", f"ttft_warm_s/{workload}"
    return [
        _extreme(study, "H1: Q2_K needs the least VRAM with offload", "Q2_K", "vram_bytes", least=True),
        _extreme(study, "H1: Q2_K decodes fastest with offload", "Q2_K", rate, least=False),
        _extreme(
            study, "H1: at Q2_K there is the least to move: TTFT is shortest with offload", "Q2_K", ttft, least=True
        ),
        _saves(study, "H2: Q4_K_M saves VRAM with offload", "Q4_K_M"),
        _balance(study, "H2: Q4_K_M is a good balance of quality and VRAM", "Q4_K_M"),
        _extreme(study, "H3: Q8_0 needs the most VRAM with offload", "Q8_0", "vram_bytes", least=False),
        _saves(study, "H3: Q8_0 still benefits: offload saves VRAM", "Q8_0"),
        _finest(study, "H3: Q8_0 has the highest quality", "Q8_0"),
    ]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _extreme(study: Study, claim: str, quant: str, column: str, least: bool) -> Answer:
    """Whether a quant has the least, or the most, of a column with all experts on the CPU, against each other one."""
    if study.host_shared and column != "vram_bytes":
        return Answer(claim, "open", (SHARED,))
    found = [_facing(c, quant) for c in contrasts.of_values(study.runs, column, AWAY) if quant in (c.first, c.second)]
    if not found:
        return Answer(claim, "open", (f"The study has no {quant} beside another quant with all experts on the CPU.",))
    told = {"supported" if (ratio < 1) == least and ratio != 1 else "refuted" for _, ratio, c in found if c.is_told}
    if any(not c.is_told for _, _, c in found) and "refuted" not in told:
        verdict: Verdict = "undecided"
    else:
        verdict = "refuted" if "refuted" in told else "supported"
    return Answer(claim, verdict, tuple(text for text, _, _ in found), merged(c for _, _, c in found))


def _facing(c: Contrast, quant: str) -> tuple[str, float, Contrast]:
    """(sentence, ratio of the quant to the other one, the contrast)."""
    ratio, other = (c.ratio, c.second) if c.first == quant else (stats.inverse(c.ratio), c.first)
    machines = ", on different machines" if c.apart and c.column != "vram_bytes" else ""
    alone = ", no longer told once corrected for the number of pairs" if c.told_alone else ""
    return f"{neutral(c.model)}: {quant} / {neutral(other)} {stats.estimate(ratio)}{machines}{alone}.", ratio.value, c


def _saves(study: Study, claim: str, quant: str) -> Answer:
    """Whether all experts on the CPU save VRAM at a quant, in every round."""
    found = [c for c in offloads(study, "vram_bytes") if c.quant == quant and c.ratio and c.difference]
    if not found:
        return Answer(claim, "open", (f"The study has no {quant} with a baseline and all experts on the CPU.",))
    saved = all((c.before["vram_bytes"].to_numpy() > c.after["vram_bytes"].to_numpy()).all() for c in found)
    sentences = [
        f"{neutral(c.model)}: {size(c.difference.value)} of {size(c.baseline.value)}, {percent(1 - c.ratio.value)}, in "
        f"{c.difference.n} rounds."
        for c in found
        if c.difference and c.baseline and c.ratio
    ]
    return Answer(claim, "supported" if saved else "refuted", tuple(sentences), merged(found))


def _balance(study: Study, claim: str, quant: str) -> Answer:
    """Whether a quant's quality is good, and no smaller file's is."""
    lost = quality.by_file(study)
    found = {m: x for (m, q), x in lost.items() if q == quant}
    if not found:
        return Answer(claim, "open", (_sentence(OPEN),))
    bits = {(m.model, m.quant): m.bits_per_weight for m in study.manifests}
    sentences, told = [], set()
    for model, own in found.items():
        most = bits.get((model, quant), 0.0)
        smaller = [x for (m, q), x in lost.items() if m == model and bits.get((m, q), most) < most]
        others = ", ".join(f"{neutral(x.quant)} {stats.close(x.perplexity_ratio)}" for x in smaller)
        sentences.append(
            f"{neutral(model)}: its perplexity is {stats.close(own.perplexity_ratio)} times that of the unquantised "
            f"file{f', that of smaller files {others}' if others else ''}."
        )
        states = [own.is_good, *(None if x.is_good is None else not x.is_good for x in smaller)]
        told.add("refuted" if False in states else "undecided" if None in states else "supported")
    good = percent(quality.GOOD - 1)
    sentences.append(f"A good balance: at most {good} above the unquantised file's, and no smaller file as good.")
    verdict: Verdict = "refuted" if "refuted" in told else "undecided" if "undecided" in told else "supported"
    return Answer(claim, verdict, tuple(sentences), _of_losses(lost.values()))


def _finest(study: Study, claim: str, quant: str) -> Answer:
    """Whether a quant diverges least from the unquantised file, against each other one, paired by chunk."""
    lost = quality.by_file(study)
    pairs = [(lost[m, quant], x) for (m, q), x in lost.items() if q != quant and (m, quant) in lost]
    if not pairs:
        return Answer(claim, "open", (_sentence(OPEN),))
    sentences, told = [], set()
    for own, other in pairs:
        more = quality.differs(own, other)
        sentences.append(
            f"{neutral(own.model)}: {neutral(other.quant)} diverges {number(other.divergence.value)} nats a token, "
            f"{quant} {number(own.divergence.value)}; difference {stats.estimate(more)}."
        )
        if more.low is None or more.high is None or more.low <= 0 <= more.high:
            told.add("undecided")
        else:
            told.add("supported" if more.low > 0 else "refuted")
    verdict: Verdict = "refuted" if "refuted" in told else "undecided" if "undecided" in told else "supported"
    return Answer(claim, verdict, tuple(sentences), _of_losses(x for pair in pairs for x in pair))


def _of_losses(of: Iterable[quality.Loss]) -> dict[str, str]:
    return {k: v for x in of for k, v in x.sources.items()}


def criteria(study: Study) -> list[Answer]:
    """The plan's six criteria of success, with their state."""
    return [test(study) for test in (_files, _runs, _vram, _consistent, _cards, _uploaded)]


def _state(asked: str, met: bool, why: str, sources: dict[str, str] | None = None) -> Answer:
    return Answer(asked, "met" if met else "not met", (why,), sources or {})


def _files(study: Study) -> Answer:
    planned, made = len(study.cells), len({(m.model, m.quant) for m in study.manifests})
    why = f"{made} of {planned} planned files were made, each with its manifest and SHA-256."
    return _state("All quantised files are complete", made == planned, why)


def _runs(study: Study) -> Answer:
    asked = [
        s
        for c in study.cells
        for b in c.blocks[:PLANNED_ROUNDS]
        for s in b
        if s.placement in PLANNED and s.load_mode == "mmap"
    ]
    usable = {(r.spec.model, r.spec.quant, r.spec.label, r.spec.block) for r in study.used}
    done = sum((s.model, s.quant, s.label, s.block) in usable for s in asked)
    tally = study.tally
    why = (
        f"{done} of the {len(asked)} runs that the plan has (baseline and cpu-moe, {PLANNED_ROUNDS} times each) are "
        f"usable; of all runs here {tally['usable']} of {tally['planned']}."
    )
    return _state("All planned runs went without errors", done == len(asked) and bool(asked), why)


def _vram(study: Study) -> Answer:
    runs = study.runs
    known = runs["vram_bytes"].notna()
    below = int((runs["vram_bytes"] < SLACK * runs["vram_engine_bytes"]).sum())
    least = f", the least is {size(float(runs['vram_bytes'].min()))}" if known.any() else ""
    why = (
        f"{int(known.sum())} of {len(runs)} usable runs have a VRAM on which the driver, the whole device and the "
        f"engine's buffers agree; in {below} it is more than {100 * (1 - SLACK):.0f} % below these buffers{least}."
    )
    return _state("VRAM is measured accurately (no 0 or 3 MB)", bool(known.all()) and not below and len(runs) > 0, why)


def _consistent(study: Study) -> Answer:
    asked = "CPU offload saves VRAM alike at all quants"
    found = [c for c in offloads(study, "vram_bytes") if c.difference and len(c.after)]
    shares = [c.difference.value / float(c.after["moved_bytes"].iloc[0]) for c in found if c.difference]
    if not shares:
        return Answer(asked, "open", ("No quant has a baseline and all experts on the CPU.",))
    met = max(shares) / min(shares) <= 1 + contrasts.MARGIN and min(shares) > 0
    why = f"What is saved is {stats.span(shares, percent)} of the experts' bytes that are moved, in {len(found)} files."
    return _state(asked, met, why, merged(found))


def _cards(study: Study) -> Answer:
    """A card is true to the records if each run that it cites has the digest that it had then."""
    now = {r.run_id: r.digest for r in study.records}
    pages, cited, changed = 0, 0, 0
    for path in sorted((study.path / "cards").glob("*/provenance.json")):
        by_page = json.loads(path.read_bytes())
        runs = {(k, v) for page in by_page.values() for k, v in page["sources"].items() if k in now}
        pages += len(by_page)
        cited, changed = cited + len(runs), changed + sum(now[k] != v for k, v in runs)
    why = (
        f"{pages} cards cite {cited} runs by digest, of which {changed} changed since."
        if pages
        else f"There are none yet: `moelib card {neutral(study.name)}` makes them."
    )
    return _state("Model cards are accurate", bool(pages and cited) and not changed, why)


def _uploaded(study: Study) -> Answer:
    """Publishing leaves a receipt of each repository; it counts if it is on the Hub itself, seen by all, and holds the
    files that were measured."""
    asked = "Files and cards are on the Hugging Face Hub"
    left, unreadable = _receipts(study)
    there = [r for r in left if r.public and not r.here]
    held = {sha256 for r in there for sha256 in r.files.values()}
    missing = sorted(neutral(m.file_name) for m in study.manifests if m.sha256 not in held)
    if there and not missing:
        names = ", ".join(neutral(r.repository) for r in there)
        return _state(asked, True, f"Public, and read back whole: {names}.")
    if left or unreadable:
        told = [f"the file {name} is no receipt" for name in unreadable]
        told += [
            f"{neutral(r.repository)} was read back whole, but is {'on a stand-in of the Hub' if r.here else 'private'}"
            for r in left
            if r not in there
        ]
        return _state(asked, False, _sentence("; ".join([*told, f"in no public repository: {', '.join(missing)}"])))
    twin = study.parameters.weights == "twin"
    why = "random weights are not to be published" if twin else "nothing was uploaded yet (`moelib publish`)"
    return _state(asked, False, _sentence(why))


def _receipts(study: Study) -> tuple[list[Receipt], list[str]]:
    """What publishing left, and the names of files beside it that are none."""
    told, unreadable = [], []
    for path in sorted((study.path / "published").glob("*.json")):
        try:
            told.append(Receipt.model_validate_json(path.read_bytes()))
        except ValueError:
            unreadable.append(neutral(path.name))
    return told, unreadable


CLAIMS: tuple[Callable[[Study], list[Answer]], ...] = (hypotheses, criteria)
