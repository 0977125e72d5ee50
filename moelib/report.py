"""The results of a study as tables and sentences, for `analysis.ipynb` and cards. Units and rounding are set here."""

from collections.abc import Callable, Iterable

from moelib import analyse, harness, stats, words
from moelib.neutral import markdown as neutral
from moelib.record import Record
from moelib.stats import percent, size
from moelib.study import Results
from moelib.table import Table, Text, cite, cite_harness

WEIGHTS = {
    "twin": "The weights are **geometry twins**: random numbers in the tensor shapes of the models named, at scale "
    "{scale} ({parameters} parameters). VRAM, load time, tokens/s and time to first token (TTFT) depend on shapes and "
    "types, so these numbers stand for files of the real models at this size. Text, quality and which experts are "
    "chosen (here nearly evenly) depend on the values of the weights; nothing is said of them.",
    "real": "The weights are the **published ones** ({parameters} parameters): {origins}. VRAM, load time, tokens/s "
    "and time to first token (TTFT) are those of these files. Their text was not evaluated, and nothing is said of "
    "quality.",
}


def headline(results: Results) -> Text:
    """What was measured and on what machine: the first lines of the document."""
    runs = results.done
    parameters = " and ".join(f"{n / 1e6:,.0f} M" for n in sorted({s.parameters for s in results.manifests}))
    origins = "; ".join(sorted({neutral(s.origin) for s in results.manifests if s.origin})) or "of unknown origin"
    values = {"scale": neutral(results.study.scale), "parameters": parameters or "unknown", "origins": origins}
    text = (
        f"{WEIGHTS[results.study.weights].format(**values)}\n\nStudy **{neutral(results.name)}**: "
        f"{neutral(results.study.title)}. {neutral(words.summary(results))}. Measured on "
        f"{'; '.join(sorted({machine(r) for r in runs})) or 'no machine yet'}."
    )
    if any(r.device.kind == "loopback" for r in runs):
        text += " VRAM here is the resident memory of the process that acts as the device."
    if unmeasured := [name for name in results.statuses if name not in results.measured]:
        text += f"\n\n**Not measured yet**, and in no table below: {', '.join(map(neutral, unmeasured))}."
    if not results.measured:
        text += "\n\n**Nothing is compared here**: no round is complete. The reasons are listed below."
    return Text("headline", text, cite(runs))


def machine(r: Record) -> str:
    name = neutral(r.device.name or "")
    if r.device.kind == "loopback":
        return f"the *loopback* device ({name}): no GPU took part, and no number here is that of a GPU"
    return name or f"no device ({neutral(r.host.cpu or 'CPU unknown')})"


def answer(results: Results) -> Text:
    """The study in a few sentences, from the same comparisons as the tables."""

    def compare(quantity: analyse.Quantity) -> list[analyse.Comparison]:
        return [c for c in analyse.compare(results, quantity, analyse.cpu_offloads) if c.ratio]

    rates = [c for w in results.study.workloads for c in compare(analyse.tokens_per_s(w))]
    memory = compare(analyse.vram)
    if not rates or not memory:
        text = (
            "No complete round has a baseline and a CPU offload run with known VRAM and tokens/s: nothing can be "
            "compared."
        )
        return Text("answer", text, cite(r for b in results.blocks for r in b))
    saved = stats.span([1 - c.ratio.value for c in memory], percent)
    kept = stats.span([c.ratio.value for c in rates], percent)
    sentences = [f"CPU offload of the experts saved {saved} of VRAM."]
    sentences.append(f"Decoding then ran at {kept} of the baseline's tokens/s.")
    used = [*rates, *memory]
    for workload in results.study.workloads:
        comparisons = compare(analyse.ttft(workload, warm=True))
        for mode in dict.fromkeys(arm.load_mode for arm in results.study.arms[1:]):
            of_mode = [c for c in comparisons if c.arm.load_mode == mode]
            if of_mode:
                times = stats.span([c.ratio.value for c in of_mode], stats.number)
                what = f"TTFT of warm {neutral(workload)} requests"
                sentences.append(f"{what} was then {times} times the baseline's (load mode {mode}).")
                used += of_mode
    rest = [s for s in analyse.summarise(results, analyse.residual) if s.value]
    if rest:
        more = stats.span([s.value.value for s in rest], size)
        sentences.append(f"VRAM was {more} more than the sum of the engine's own buffers.")
    sentences.append(
        "Ranges are over models, quants, placements and load modes; the tables give the interval of each value."
    )
    sources = cite(r for c in [*used, *rest] for r in c.records)
    if slowed := harness.bias(results.accuracy.values()):
        sentences.append(slowed)
        sources |= cite_harness(results.accuracy)
    return Text("answer", "\n".join(f"- {s}" for s in sentences), sources)


WHERE = ("model", "quant", "placement", "load mode")
"""Columns that say what a row is about; the others are values."""
Show = Callable[[analyse.Comparison], dict[str, str]]


def _where(row: analyse.Comparison | analyse.Summary, results: Results) -> dict[str, str]:
    """What a row is about; the load mode only where the study has several."""
    modes = {"load mode": row.arm.load_mode} if len({arm.load_mode for arm in results.study.arms}) > 1 else {}
    return {"model": neutral(row.model), "quant": row.quant, "placement": row.arm.placement} | modes


def _compared(
    name: str, results: Results, quantity: analyse.Quantity, show: Show, note: str, why_empty: str = ""
) -> Table:
    comparisons = analyse.compare(results, quantity)
    rows = [{**_where(c, results), **show(c), "rounds": c.difference.n if c.difference else 0} for c in comparisons]
    return _table(name, rows, [c.records for c in comparisons], note, why_empty)


def _table(
    name: str, rows: list[dict[str, str]], records: Iterable[Iterable[Record]], note: str, why_empty: str = ""
) -> Table:
    """A table of what each row is about, then its values; without any record it says why instead."""
    sources = [cite(r) for r in records]
    if why_empty and not any(sources):
        rows, sources = [], []
    values = tuple(k for k in rows[0] if k not in WHERE) if rows else ()
    return Table(name, rows, sources, note, values, why_empty or "no round is complete.")


def _absent(results: Results, *counters: str) -> str:
    """Why the runs have no value of a counter."""
    why = {r.observed.absent.get(c) for c in counters for r in results.done if r.observed} - {None}
    return f"not measured: {'; '.join(sorted(map(neutral, why))) or 'no run has a value'}."


def vram_table(results: Results) -> Table:
    expert_bytes = {(s.model, s.quant): s.expert_bytes for s in results.manifests}

    def show(c: analyse.Comparison) -> dict[str, str]:
        return {
            "baseline": stats.sizes(c.baseline),
            "CPU offload": stats.sizes(c.offload),
            "saved": stats.sizes(c.difference),
            "saved, share": percent(1 - c.ratio.value if c.ratio else None),
            "experts in the file": size(expert_bytes.get((c.model, c.quant))),
        }

    note = "Peak VRAM of the run's processes, mean [95 % interval]; *saved* is paired within rounds."
    return _compared("device-memory", results, analyse.vram, show, note)


def vram_parts_table(results: Results) -> Table:
    """VRAM against the buffers that the engine reports."""
    quantities = (analyse.vram, analyse.engine_buffers, analyse.residual, analyse.growth)
    parts = zip(*(analyse.summarise(results, q) for q in quantities), strict=True)
    rows, records = [], []
    for whole, engine, rest, grown in parts:
        contexts = {r.device.context_bytes for r in whole.records} - {None}
        share = rest.value.value / whole.value.value if rest.value and whole.value else None
        rows.append(
            {
                **_where(whole, results),
                "VRAM": stats.sizes(whole.value),
                "engine's buffers": stats.sizes(engine.value),
                "rest": stats.sizes(rest.value),
                "rest, share": percent(share),
                "empty context, part of the rest": ", ".join(size(c) for c in sorted(contexts)) or stats.NONE,
                "whole device": size(grown.value.value if grown.value else None),
            }
        )
        records.append(whole.records)
    note = (
        "Mean [95 % interval]. *Rest* is the VRAM that a sum of the engine's log lines misses: context, workspaces, "
        "pools, code. *Whole device* is how much memory in use on the whole device grew. It includes what the driver "
        "charges to no process: the page tables of pinned host memory (load mode none) take 8 bytes for each 4 KiB."
    )
    return _table("memory-parts", rows, records, note)


def _rates(scale: float) -> Show:
    return lambda c: {
        "baseline": stats.estimate(c.baseline, scale),
        "CPU offload": stats.estimate(c.offload, scale),
        "CPU offload / baseline": stats.estimate(c.ratio),
    }


def speed_table(results: Results, workload: str) -> Table:
    note = "Decode rate in tokens/s, geometric mean [95 % interval]; ratios are paired within rounds."
    return _compared(f"speed-{workload}", results, analyse.tokens_per_s(workload), _rates(1), note)


def ttft_table(results: Results, workload: str, warm: bool) -> Table:
    which = "warm" if warm else "first"
    what = "**Warm requests**" if warm else "**The first request of a fresh server**"
    note = f"{what}: TTFT in ms, from request sent to first token; geometric mean [95 % interval]."
    return _compared(f"ttft-{which}-{workload}", results, analyse.ttft(workload, warm), _rates(1000), note)


def load_table(results: Results) -> Table:
    note = "Load time in ms, from process start until the server accepts requests; geometric mean [95 % interval]."
    return _compared("load", results, analyse.load_time, _rates(1000), note)


def load_mode_table(results: Results) -> Table:
    """The same placement with its host weights copied to memory of their own, against mapped from the file."""
    last = results.study.workloads[-1]
    quantities = {f"tokens/s, {neutral(w)}": analyse.tokens_per_s(w) for w in results.study.workloads}
    quantities[f"TTFT, {neutral(last)}, first request"] = analyse.ttft(last, warm=False)
    quantities[f"TTFT, {neutral(last)}, warm"] = analyse.ttft(last, warm=True)
    quantities |= {
        "load time": analyse.load_time,
        "VRAM": analyse.vram,
        "host RSS": analyse.host_peak,
    }
    compared = {name: analyse.compare(results, q, analyse.load_modes) for name, q in quantities.items()}
    rows, records = [], []
    for cells in zip(*compared.values(), strict=True):
        row = {"model": neutral(cells[0].model), "quant": cells[0].quant, "placement": cells[0].arm.placement}
        rows.append(row | {k: stats.estimate(c.ratio) for k, c in zip(compared, cells, strict=True)})
        records.append({r.run_id: r for c in cells for r in c.records}.values())
    note = (
        "Load mode *none* / *mmap*, ratios [95 % interval] paired within rounds: above 1 is more tokens/s, time or "
        "memory."
    )
    return _table("load-mode", rows, records, note, "the study has no placement in both load modes.")


def bound_table(results: Results, workload: str) -> Table:
    """tokens/s against the upper bound set by reading the weights alone."""
    rate = analyse.summarise(results, analyse.tokens_per_s(workload))
    rows, records = [], []
    for share, speed in zip(analyse.summarise(results, analyse.bound(workload)), rate, strict=True):
        if share.value is None:
            continue
        p = share.records[0].observed.placement
        tokens = speed.value.value
        rows.append(
            {
                **_where(share, results),
                "read from VRAM per token": size(p.device_read_bytes),
                "read from host RAM per token": size(p.host_read_bytes),
                "GB/s from VRAM": stats.number(tokens * p.device_read_bytes / 1e9),
                "GB/s from host RAM": stats.number(tokens * p.host_read_bytes / 1e9),
                "share of the bound": _percents(share.value),
            }
        )
        records.append(share.records)
    speeds = {f"{r.device.bandwidth_bytes_per_s / 1e9:.0f}" for s in records for r in s}
    hosts = sorted(r.host.ram_read_bytes_per_s / 1e9 for s in records for r in s)
    note = (
        "Weights read for one token, and tokens/s as a share of what reading them at full bandwidth would allow, mean "
        f"[95 % interval]. Full bandwidth: {' or '.join(sorted(speeds)) or stats.NONE} GB/s of VRAM (clock and bus "
        f"width by the driver), {stats.span(hosts, stats.number) if hosts else stats.NONE} GB/s of host RAM (measured)."
    )
    return _table(f"bound-{workload}", rows, records, note, "the bandwidth of the device's memory is not known.")


def _percents(e: stats.Estimate) -> str:
    return stats.estimate(e, 100) + " %"


def energy_table(results: Results, workload: str) -> Table:
    note = (
        "Joules of the GPU board per generated token, prompt included, geometric mean [95 % interval]; the energy of "
        "the CPU is not included."
    )
    why = _absent(results, "energy_joule")
    return _compared(f"energy-{workload}", results, analyse.energy_per_token(workload), _rates(1), note, why)


def host_table(results: Results) -> Table:
    """Host memory, page faults, PCIe traffic, clock and power of a run."""
    last = results.study.workloads[-1]
    columns = {
        "host RSS, peak": (analyse.host_peak, stats.sizes),
        "major page faults": (analyse.major_faults, lambda e: stats.estimate(e)),
        f"PCIe traffic for a {neutral(last)} prompt": (analyse.received(last), stats.sizes),
        "GPU clock, MHz": (analyse.sm_clock, lambda e: stats.estimate(e)),
        "board power, W": (analyse.power, lambda e: stats.estimate(e)),
        "monitoring, of one CPU": (analyse.monitoring, _percents),
    }
    summaries = {name: analyse.summarise(results, quantity) for name, (quantity, _) in columns.items()}
    rows, records = [], []
    for cells in zip(*summaries.values(), strict=True):
        values = {name: columns[name][1](c.value) for name, c in zip(summaries, cells, strict=True)}
        rows.append(_where(cells[0], results) | values)
        records.append({r.run_id: r for c in cells for r in c.records}.values())
    note = (
        "Mean [95 % interval]. RSS and page faults are those of a whole run, load and all requests; mapped pages of "
        "the file count as RSS. PCIe traffic is what the GPU received for one prompt, by its own counter, which wraps "
        "at 4 GiB, in a request apart from the timed ones: n/a where a wrap may have been missed, or nothing was "
        "read. The clock is the mean of a run's readings; board power is energy over the time of the requests. "
        "*Monitoring* is the share of one CPU that this program's readings took; how much it slows a run is shown "
        "under measurement overhead."
    )
    return _table("host", rows, records, note)
