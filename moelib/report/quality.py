"""Tables of what a study's files say: what quantising costs, whether placements change it, and samples."""

from __future__ import annotations

from collections.abc import Sequence

from moelib.answers import quality as losses
from moelib.answers.quality import Loss
from moelib.base import stats
from moelib.base.neutral import code
from moelib.base.neutral import markdown as neutral
from moelib.base.stats import number, size
from moelib.catalogue import corpora, params
from moelib.catalogue.placement import Placement
from moelib.evidence.table import Table, Text, below_names, heading, reference
from moelib.quality import checks, score, wanted
from moelib.quality.comparison import Spec
from moelib.study import frames
from moelib.study.study import Study

FLOOR = "F16, other batches"
SHOWN = 160
"""Characters of a sample."""


def lost(study: Study) -> list[Table | Text]:
    """What quantising costs in what the files say, and whether placements change it; empty where nobody asked."""
    asked = study.parameters.quality
    if asked is None:
        return []
    shown: list[Table | Text] = [heading("h-quality", "Quality", 2)]
    for corpus in asked.corpora:
        by_model = {f"{m}, {corpus}": _lost(study, corpus, m) for m in study.parameters.models}
        shown += below_names("quality", by_model)
    shown += _matrices(losses.losses(study))
    return [*shown, *samples(study)[-1:]]


def tables(study: Study, model: str) -> list[Table]:
    """What each quant of a model lost, a table for each text; empty where nobody asked."""
    asked = study.parameters.quality
    return [_lost(study, corpus, model) for corpus in asked.corpora] if asked else []


def sources(study: Study) -> dict[str, str]:
    """The comparisons with the unquantised files, path -> digest; empty where there is none."""
    return {name: digest for x in losses.losses(study) for name, digest in x.sources.items()}


def _lost(study: Study, corpus: str, model: str) -> Table:
    """What each quant of a model lost over one text, the smallest first. The note is of all models."""
    text, lost = corpora.corpus(corpus), losses.losses(study, corpus)
    offloaded = {
        c.quant: c.value
        for c in frames.comparisons(study.runs[study.runs["model"] == model], "vram_bytes")
        if Placement.parse(*c.side).is_whole and c.side[1] == "mmap"
    }
    rows, bits = [], {m.quant: m.bits_per_weight for m in study.manifests if m.model == model}
    floors = losses.floors(study, corpus) if lost else []
    shown = sorted((x for x in [*lost, *floors] if x.model == model), key=lambda x: bits.get(x.quant, 99.0))
    for x in shown:
        c = x.found.chunks
        vram = offloaded.get(x.quant)
        rows.append(
            {
                "quant": FLOOR if x in floors else neutral(x.quant),
                "perplexity ratio": stats.close(x.perplexity_ratio),
                "mean KLD": stats.estimate(x.divergence),
                "99 % KLD": number(x.tail("kld_99").value),
                "99.9 % KLD": stats.estimate(x.tail("kld_999")),
                "RMS Δp, %": stats.estimate(score.rms_p_diff(c), 100),
                "same top, %": stats.estimate(score.same_top(c), 100),
                "VRAM, offload": size(vram.value if vram else None),
            }
        )
    found = [x.found for x in lost]
    note = f"Text *{neutral(corpus)}*: {neutral(text.title)} ({neutral(text.licence)})"
    if found:
        chunks, each = (stats.span(n, str) for n in ([len(f.chunks.kld) for f in found], [f.scored for f in found]))
        base = stats.span([score.base_perplexity(f.chunks).value for f in found], number)
        note += f", {chunks} chunks of {each} scored tokens, after as many of context; perplexity unquantised {base}"
    note += (
        ". *Perplexity ratio*: to the unquantised file's. KLD: Kullback-Leibler divergence of a token's distribution "
        "from the unquantised "
        "file's, in nats; *99 %*, *99.9 %*: what one token in a hundred, in a thousand exceeds. *RMS Δp*: of the "
        "probability of the token that follows. *Same top*: tokens of which both find the same one likeliest. 95 % "
        "intervals take a chunk as one observation: tokens of one chunk are not independent."
    )
    note += _cut_off(lost)
    if floors:
        n = len(floors[0].found.chunks.kld)
        note += (
            f" *{FLOOR}*: the unquantised file against itself, {wanted.OTHER_BATCH} tokens at a time instead of 512, "
            f"over {n} chunks: what rounding alone changes, where it changes most."
        )
    why = wanted.TWIN if study.parameters.weights == "twin" else "no comparison with the unquantised file is valid."
    numbers = tuple(rows[0])[1:] if rows else ()
    return Table(f"quality-{corpus}-{model}", rows, [x.sources for x in shown], note, numbers, why)


def _cut_off(lost: Sequence[Loss]) -> str:
    """By how much the tool's own ratio of perplexities is off, where that can be seen."""
    off = []
    for x in lost:
        if (tool := x.found.tool) and {"perplexity", "base_perplexity"} <= set(tool):
            off.append(tool["perplexity"] / tool["base_perplexity"] / x.perplexity_ratio.value - 1)
    if max(off, default=0.0) < 1e-4:
        return ""
    return (
        f" A token more than {checks.DEPTH:.0f} nats below the likeliest counts as that deep in both files; "
        f"llama-perplexity's own ratio cuts off the unquantised file alone, and is up to {100 * max(off):.2g} % higher "
        "in these rows."
    )


def _matrices(lost: Sequence[Loss]) -> list[Text]:
    """What an importance matrix changed, of every quant that there is with one and without."""
    by = {(x.corpus, x.model, x.quant): x for x in lost}
    sentences, found = [], []
    for (corpus, model, quant), x in by.items():
        without = by.get((corpus, model, params.plain(quant)))
        if quant == params.plain(quant) or without is None:
            continue
        more = losses.differs(without, x)
        sentences.append(
            f"- {neutral(model)}, {neutral(corpus)}: {neutral(quant)} diverges {stats.estimate(more)} nats a token "
            f"more than {neutral(without.quant)}, whose mean is {number(without.divergence.value)}; paired by chunk."
        )
        found += [x, without]
    if not sentences:
        return []
    text = "\n".join(["What an importance matrix changes (less than 0: it helps):", "", *sentences])
    return [Text("matrices", text, {k: v for x in found for k, v in x.sources.items()})]


def same(study: Study) -> list[Text]:
    """Whether offload changed what files say, in a sentence; empty where nobody compared."""
    judged = checks.sameness(study.comparisons)
    if not judged:
        return []
    off = [one for one in judged if one.verdict == "differs"]
    most, same = max(one.nmse for one in judged), sum(one.verdict == "identical" for one in judged)
    sentence = (
        f"**Offload changed what {len(off)} of {len(judged)} files and placements say**: "
        f"{'; '.join(neutral(one.line) for one in off)}."
        if off
        else f"**Offload changed nothing but rounding** in {len(judged)} files and placements: the error of the logits "
        f"was at most {most:.1e} of their variance, and {same} were identical."
    )
    return [Text("same", sentence, {k: v for one in judged for k, v in one.sources.items()})]


def sameness(study: Study) -> list[Table | Text]:
    """Whether a placement changes what a file says, by its logits and by its likeliest tokens."""
    judged = checks.sameness(study.comparisons)
    if not judged:
        return []
    rows = []
    for one in judged:
        spec, found = one.comparison.spec, one.comparison.found
        rows.append(
            {
                "model": neutral(spec.model),
                "file": neutral(spec.other.quant),
                "placement": spec.other.placed.label,
                "NMSE of logits": f"{one.nmse:.1e}" if one.nmse else "0",
                "in other batches": f"{max(map(checks.nmse, one.floors)):.1e}" if one.floors else stats.NONE,
                "rounding up to": f"{one.limit:.1e}",
                "largest KLD": f"{found.tails['kld_max'].value:.1e}" if found else stats.NONE,
                "first other token": _first_other(study, spec),
                "verdict": one.verdict,
            }
        )
    note = (
        "The same file at two placements: its logits against those with everything on the GPU. *In other batches*: the "
        f"same file all on the GPU, its tokens taken {wanted.OTHER_BATCH} at a time instead "
        f"of 512, which changes nothing but rounding. What is within {checks.TIMES_FLOOR:g} times that (or "
        f"{checks.LEAST_LIMIT:.0e}) is called rounding. *First other token*: where the likeliest "
        "tokens first differ from the baseline's, of how many generated, over all requests of the study."
    )
    if any(not one.comparison.spec.other.placed.op_offload for one in judged):
        note += (
            " A GPU copies the experts of 32 tokens and more and computes them itself; *op-offload=off* has the CPU "
            "compute them all, as it does while text is generated."
        )
    table = Table("sameness", rows, [one.sources for one in judged], note, tuple(rows[0])[3:])
    return [heading("h-sameness", "What offload changes in what is said", 2), table]


def _first_other(study: Study, spec: Spec) -> str:
    """`none of 400`, or `at 12 of 400`: of the study's requests at a placement against the baseline of their round."""
    runs = [r for r in study.used if (r.spec.model, r.spec.quant) == (spec.model, spec.other.quant)]
    base = {r.spec.block: r for r in runs if r.spec.placement == spec.base.placement and r.spec.load_mode == "mmap"}
    firsts, total = [], 0
    for r in runs:
        if r.spec.placement == spec.other.placement and r.spec.block in base:
            for mine, its in zip(r.observation.requests, base[r.spec.block].observation.requests, strict=False):
                total += len(mine.tokens)
                first = next((i for i, (a, b) in enumerate(zip(mine.tokens, its.tokens, strict=False)) if a != b), None)
                firsts += [] if first is None else [first + 1]
    if not total:
        return stats.NONE
    return f"none of {total}" if not firsts else f"token {min(firsts)}, in {len(firsts)} requests"


def samples(study: Study) -> list[Table]:
    """What files of real weights wrote after each prompt of text: the first request of the first round, everything on
    the GPU; a table for each workload that has one."""
    if study.parameters.weights != "real":
        return []
    made = [_samples(study, name, w.text) for name, w in study.workloads.items() if w.text is not None]
    return [t for t in made if t.rows]


def other_samples(study: Study) -> list[Table | Text]:
    """Those of all but the last, below a heading; nothing where there are none."""
    others: list[Table | Text] = [*samples(study)[:-1]]
    return [heading("h-samples", "What files write after other prompts", 2), *others] if others else []


def _samples(study: Study, workload: str, prompt: str) -> Table:
    rows, sources = [], []
    for r, name, text in losses.written(study, reference(study)):
        if name == workload:
            told = {"continued": code(_short(text, SHOWN))}
            rows.append({"model": neutral(r.spec.model), "quant": neutral(r.spec.quant)} | told)
            sources.append({r.run_id: r.digest})
    note = (
        f"What they write after {code(_short(prompt, SHOWN))}: the likeliest token each time; at most {SHOWN} "
        "characters are shown, the records have all."
    )
    return Table(f"samples-{workload}", rows, sources, note)


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
