"""Tables of the laws that a study's runs tell, each with how far it is off, and estimates of another machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from moelib.base import stats
from moelib.base.neutral import markdown as neutral
from moelib.base.stats import NONE, number, percent, span
from moelib.evidence.table import Table, merged
from moelib.laws import speed, vram
from moelib.laws.law import ANY_FITS, HELD_OUT, AnyLaw, Domain, Law, Parameter, held_out, standing
from moelib.laws.speed import TimeLaw
from moelib.study.study import Study

MIB = 1 << 20
NO_ROUND = "no round is complete."
SHARED = "runs shared their host, and their times are also those of what ran beside them."
NO_PARTS = "the records lack VRAM or a part of it: weights, KV cache or compute buffer."
EXAMPLES = {"dual-channel DDR4, PCIe 3.0 x16": (50e9, 12e9), "dual-channel DDR5, PCIe 4.0 x16": (80e9, 25e9)}
"""Machines that readers have -> bytes/s that their RAM and their bus give: what is reached of what is on the box."""
MODE = "none"
RATE, TTFT = "tokens/s, estimated", "TTFT in s, estimated"
ERRORS = "error: median (largest) of what is predicted without what the last column names"
SHORT = 6  # digits of a host, which tell it from the others of a study
WORDS = ("model", "quant", "load mode", "host", "without")
"""Columns that hold no numbers."""


def decode_table(study: Study, workload: str) -> Table:
    """The laws of a token: one for all quants of a model where these share it, else one for each."""
    what = (
        f"A token of {neutral(workload)} takes: GPU time + cost per layer × layers with experts on the CPU + bytes "
        "that it reads of host RAM / their speed"
    )
    laws = speed.decode(study.runs, workload) if _has(study, workload) else []

    def row(law: TimeLaw) -> dict[str, Any]:
        per_layer = stats.estimate(_parameter(law, "cost").value, 1e6)
        return {
            "host": neutral(law.domain.machines[0][:SHORT]),
            **_gpu(law),
            "per layer, µs": per_layer,
            **_bytes(law),
        }

    return _table(f"laws-decode-{workload}", what, study, laws, row, _no_law(study))


def ttft_table(study: Study, workload: str) -> Table:
    """The laws of a warm prompt: one for all models and quants of a load mode where there is one."""
    laws = speed.ttft(study.runs, workload) if _has(study, workload) else []
    of = {law.formula.removeprefix("GPU time + ").removesuffix(" / speed") for law in standing(laws)}
    what = f"TTFT of a warm prompt of {neutral(workload)}: GPU time + {' or '.join(sorted(of))} / their speed"

    def row(law: TimeLaw) -> dict[str, Any]:
        return {"hosts": len(law.domain.machines), **_gpu(law), **_bytes(law)}

    what = f"{what}.{_repeated(study, workload)}".removesuffix(".")
    return _table(f"laws-ttft-{workload}", what, study, laws, row, _no_law(study))


def vram_table(study: Study) -> Table:
    """The law of VRAM of each model and quant, in MiB."""
    laws = vram.vram(study.runs) if len(study.runs) else []
    what = (
        "VRAM, in MiB: weights on the GPU by the file's header + KV cache + compute buffer + rest (what processes held "
        "at their peak beside the engine's buffers)"
    )
    several = any(law.told.cache.per_token is not None for law in laws)

    def row(law: vram.VramLaw) -> dict[str, Any]:
        cache, rest = law.told.cache, _parameter(law, "rest").value
        compute = {on_cpu: line.nbytes for on_cpu, line in law.told.compute.items() if line}
        more = {f"per {vram.STEP:,} more": number(cache.per_token, vram.STEP / MIB)} if several else {}
        varies = rest and rest.low is not None
        return {
            "context": f"{cache.context:,}",
            "KV cache": number(cache.nbytes, 1 / MIB),
            **more,
            "compute, all on GPU": number(compute.get(False), 1 / MIB),
            "compute, experts on CPU": number(compute.get(True), 1 / MIB),
            "rest": stats.estimate(rest, 1 / MIB) if varies else number(law.told.rest.value, 1 / MIB),
        }

    return _table("laws-vram", what, study, laws, row, NO_PARTS if len(study.runs) else NO_ROUND)


def _no_law(study: Study) -> str:
    return SHARED if study.host_shared else NO_ROUND


def _repeated(study: Study, workload: str) -> str:
    """A sentence on a prompt that may need few of the experts; empty for another."""
    known = study.workloads.get(workload)
    if not (known and known.repeats):
        return ""
    return f" {neutral(workload)} repeats one sentence: it may need few of the experts, and its TTFT be too short."


def _has(study: Study, workload: str) -> bool:
    return f"tokens_per_s/{workload}" in study.runs


def _parameter(law: Law, name: str) -> Parameter:
    return next(p for p in law.parameters if p.name.startswith(name))


def _gpu(law: TimeLaw) -> dict[str, Any]:
    return {"GPU time, ms": span([1e3 * cell.gpu_s for cell in law.cells], number)}


def _bytes(law: TimeLaw) -> dict[str, Any]:
    return {"bytes, GB/s": stats.estimate(_parameter(law, "speed").value, 1e-9)}


def _table(
    name: str,
    what: str,
    study: Study,
    laws: Sequence[AnyLaw],
    terms: Callable[[AnyLaw], dict[str, Any]],
    no_law: str = NO_ROUND,
) -> Table:
    """A row for each law that stands; in the note the formula, what it is of, and what is not told with the reason."""
    told = standing(laws)
    reasons = [*_untold(laws, told), *_unknown(told)]
    if not told:
        return Table(name, [], [], why_empty=" ".join(reasons) or no_law)
    rows = [_row(law, terms(law)) for law in told]
    if len({row["load mode"] for row in rows}) == 1:
        rows = [{k: v for k, v in row.items() if k != "load mode"} for row in rows]
    fitted = f"each fitted to {span([law.n for law in told], str)} runs"
    note = " ".join([f"{what}. {_where(study, told)}; {fitted}; intervals 95 %; {ERRORS}.", *reasons])
    return Table(name, rows, [law.sources for law in told], note, tuple(k for k in rows[0] if k not in WORDS))


def _row(law: Law, terms: dict[str, Any]) -> dict[str, Any]:
    kind = held_out(law.residuals)
    off = law.errors(kind)
    return {
        "model": neutral(", ".join(law.domain.models)),
        "quant": neutral(", ".join(law.domain.quants)),
        "load mode": neutral(law.domain.load_mode),
        **terms,
        "error, %": f"{100 * off.median:.1f} ({100 * off.largest:.1f})" if off else NONE,
        "without": HELD_OUT[kind] if off else ANY_FITS,
    }


def _where(study: Study, laws: Sequence[Law]) -> str:
    """On which GPU, with which context, threads and RAM."""
    every = [law.domain for law in laws]
    ram = [d.ram_bytes_per_s / 1e9 for d in every if d.ram_bytes_per_s]
    gpus = ", ".join(dict.fromkeys(neutral(d.gpu) for d in every))
    on = gpus if (study.runs["device"] == "cuda").all() else f"the loopback device ({gpus}), which is no GPU"
    modes = " and ".join(dict.fromkeys(neutral(d.load_mode) for d in every))
    return (
        f"On {on}; scale {neutral(every[0].scale)}, load mode {modes}, context "
        f"{span([d.context for d in every], '{:,}'.format)}, {span([n for d in every for n in d.threads], str)} CPU "
        f"threads, RAM {f'that reads {span(ram, number)} GB/s' if ram else 'of unknown speed'}"
    )


def _untold(laws: Sequence[Law], told: Sequence[Law], what: str = "law") -> list[str]:
    """A sentence for each reason why a model and quant has no law in a load mode."""
    missing: dict[str, list[Domain]] = {}
    for law in laws:
        stands = [t.domain for t in told if t.domain.load_mode == law.domain.load_mode]
        known = {(m, q) for d in stands for m in d.models for q in d.quants}
        for model in law.domain.models if law.reason else ():
            if quants := tuple(q for q in law.domain.quants if (model, q) not in known):
                of_model = replace(law.domain, models=(model,), quants=quants)
                missing.setdefault(str(law.reason), []).append(of_model)
    return [f"No {what} for {_names(domains)}: {neutral(reason)}." for reason, domains in missing.items()]


def _names(domains: Sequence[Domain]) -> str:
    """Models with their quants, by load mode."""
    by_mode: dict[str, dict[str, dict[str, None]]] = {}
    for d in domains:
        for model in d.models:
            by_mode.setdefault(d.load_mode, {}).setdefault(model, {}).update(dict.fromkeys(d.quants))
    modes: dict[str, list[str]] = {}
    for mode, models in by_mode.items():
        names = ", ".join(f"{neutral(m)} ({neutral(', '.join(quants))})" for m, quants in models.items())
        modes.setdefault(names, []).append(neutral(mode))
    return "; ".join(f"{names}, load mode {' and '.join(of)}" for names, of in modes.items())


def _unknown(told: Sequence[Law]) -> list[str]:
    """A sentence for each reason why a term of a law that stands has no number, with the host where others have laws of
    the same; a context that none else was beside is seen in the table."""
    hosts = Counter(law.domain.question for law in told)
    missing: dict[tuple[str, str, str], list[Domain]] = {}
    for law in told:
        on = f", on host {neutral(law.domain.machines[0][:SHORT])}" if hosts[law.domain.question] > 1 else ""
        for p in law.parameters:
            if p.value is None and p.reason and p.reason != vram.ONE_CONTEXT:
                missing.setdefault((p.name, p.reason, on), []).append(law.domain)
    return [f"No {neutral(name)} for {_names(of)}{on}: {neutral(why)}." for (name, why, on), of in missing.items()]


# a machine that nobody measured


def estimates(study: Study, workload: str, ram_bytes_per_s: float, bus_bytes_per_s: float) -> Table:
    """What the laws say of a machine with this RAM and bus and the same GPU, with all experts on the CPU.

    In load mode none alone: what is copied from a mapped file does not go at the speed of the bus.
    """
    name = f"estimates-{workload}-{ram_bytes_per_s / 1e9:g}-{bus_bytes_per_s / 1e9:g}"
    runs = study.runs
    if not _has(study, workload):
        return Table(name, [], [], why_empty=NO_ROUND)
    whole = runs[(runs["placement"] == "cpu-moe") & (runs["load_mode"] == MODE) & (runs["device"] == "cuda")]
    if whole.empty:
        return Table(name, [], [], why_empty=f"no run of cpu-moe at load mode {MODE} on a GPU gives a law to go by.")
    prompts = speed.ttft(runs, workload)
    tokens = [law for law in standing(speed.decode(runs, workload)) if law.domain.ram_bytes_per_s]
    tokens, times = ([law for law in of if law.domain.load_mode == MODE] for of in (tokens, standing(prompts)))
    rows, sources = [], []
    for (model, quant), own in whole.groupby(["model", "quant"], sort=False):
        layers = float(own["moved_layers"].iloc[0])
        rates = [law.estimate(model, quant, layers, ram_bytes_per_s=ram_bytes_per_s) for law in tokens]
        ttft = [law.estimate(model, quant, layers, bus_bytes_per_s=bus_bytes_per_s) for law in times]
        row = {"model": neutral(model), "quant": neutral(quant), "placement": f"cpu-moe, {MODE}"}
        row[RATE] = _span([1 / told.value for told in rates if told])
        if times:
            row[TTFT] = _span([told.value for told in ttft if told])
        rows.append(row)
        told = zip([*tokens, *times], [*rates, *ttft], strict=True)
        sources.append(merged(law.sources for law, value in told if value))
    if not any(sources):
        return Table(name, [], [], why_empty=" ".join(_untold(prompts, [], "TTFT")) or NO_ROUND)
    gpu = " and ".join(dict.fromkeys(neutral(law.domain.gpu) for law in (*tokens, *times)))
    off = " and ".join(filter(None, (_off(tokens, "a token"), _off(times, "TTFT"))))
    note = (
        f"**Estimates, not measurements**: {neutral(workload)} on a machine whose RAM gives "
        f"{ram_bytes_per_s / 1e9:g} GB/s to all CPUs together and whose bus gives {bus_bytes_per_s / 1e9:g} GB/s, by "
        f"laws fitted on {gpu}. What the CPU does is scaled with the RAM, what is copied with the bus. The GPU's own "
        f"time is that of {gpu} and is not scaled: a slower GPU takes longer."
    )
    note += f" On their own machine the laws were off by {off}." if off else ""
    note += _repeated(study, workload) if times else ""
    reasons = [] if times else _untold([law for law in prompts if law.domain.load_mode == MODE], [], "TTFT")
    return Table(name, rows, sources, " ".join([note, *reasons]), (RATE, TTFT))


def _span(values: Sequence[float]) -> str:
    """Over machines that were fitted one by one."""
    return span(values, number) if values else NONE


def _off(laws: Sequence[Law], what: str) -> str:
    """The largest error of what the laws had not seen; empty where they saw all."""
    kinds = [(law, held_out(law.residuals)) for law in laws]
    off = [e.largest for law, kind in kinds if kind != "nothing" and (e := law.errors(kind))]
    return f"up to {percent(max(off))} for {what}" if off else ""
