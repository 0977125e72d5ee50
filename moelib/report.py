"""What a study found, as tables and sentences: what `analysis.ipynb` shows. Units and rounding appear here."""

from collections.abc import Callable, Iterable

from moelib import analyse, harness, stats, words
from moelib.neutral import markdown as neutral
from moelib.params import Arm
from moelib.record import Record
from moelib.stats import percent, size
from moelib.study import Results
from moelib.table import Table, Text, cite, cite_harness

WEIGHTS = {
    "twin": "The weights are **geometry twins**: random numbers in the shapes of the models named, at scale {scale} "
    "({parameters} parameters). What depends on shapes and types stands for the real models' files of this size: "
    "device memory, load time, speed, time to first token. What depends on the weights' values does not, and nothing "
    "is said of it: text, quality, and which experts are chosen (here nearly evenly).",
    "real": "The weights are the **published ones** ({parameters} parameters): {origins}. Device memory, load time, "
    "speed and time to first token are of these files; their text was not judged, and nothing is said of quality.",
}


def headline(results: Results) -> Text:
    """What was measured on what, in the document's first lines."""
    runs = results.done
    parameters = " and ".join(f"{n / 1e6:,.0f} M" for n in sorted({s.parameters for s in results.manifests}))
    origins = "; ".join(sorted({neutral(s.origin) for s in results.manifests if s.origin})) or "of unknown origin"
    told = {"scale": neutral(results.study.scale), "parameters": parameters or "unknown", "origins": origins}
    text = (
        f"{WEIGHTS[results.study.weights].format(**told)}\n\nStudy **{neutral(results.name)}**: "
        f"{neutral(results.study.title)}. {neutral(words.summary(results))}. Measured on "
        f"{'; '.join(sorted({machine(r) for r in runs})) or 'no machine yet'}."
    )
    if gone := [name for name in results.statuses if name not in results.measured]:
        text += f"\n\n**Not measured yet**, and in no table below: {', '.join(map(neutral, gone))}."
    if not results.measured:
        text += "\n\n**Nothing is compared here**: no block is whole. What stands in its way is listed below."
    return Text("headline", text, cite(runs))


def machine(r: Record) -> str:
    name = neutral(r.device.name or "")
    if r.device.kind == "loopback":
        return f"the *loopback* device ({name}): no GPU took part, and no number here is one of a GPU"
    return name or f"no device ({neutral(r.host.cpu or 'CPU unknown')})"


def answer(results: Results) -> Text:
    """The study in a few sentences, from the same comparisons as the tables."""
    rates = [c for w in results.study.workloads for c in analyse.compare(results, analyse.tokens_per_s(w)) if c.ratio]
    memory = [c for c in analyse.compare(results, analyse.vram) if c.ratio]
    if not rates or not memory:
        text = "No whole block holds a baseline and an offload run of known memory and rate: nothing can be compared."
        return Text("answer", text, cite(r for b in results.blocks for r in b))
    saved = stats.span([1 - c.ratio.value for c in memory], percent)
    kept = stats.span([c.ratio.value for c in rates], percent)
    told = [f"Keeping the experts on the CPU took {saved} off device memory."]
    told.append(f"Decoding then ran at {kept} of the baseline's rate.")
    used = [*rates, *memory]
    for workload in results.study.workloads:
        found = analyse.compare(results, analyse.ttft(workload, warm=True))
        for mode in dict.fromkeys(arm.load_mode for arm in results.study.arms[1:]):
            here = [c for c in found if c.ratio and c.arm.load_mode == mode]
            if here:
                times = stats.span([c.ratio.value for c in here], stats.number)
                what = f"The first token of a warm {neutral(workload)} request"
                told.append(f"{what} took {times} times as long (load mode {mode}).")
                used += here
    rest = [s for s in analyse.summarise(results, analyse.residual) if s.value]
    if rest:
        more = stats.span([s.value.value for s in rest], size)
        told.append(f"Device memory was {more} more than the engine's own buffers add up to.")
    told.append("Ranges are over models, quants and arms; the interval of each is in the tables.")
    sources = cite(r for c in [*used, *rest] for r in c.records)
    if slowed := harness.bias(results.accuracy.values()):
        told.append(slowed)
        sources |= cite_harness(results.accuracy)
    return Text("answer", "\n".join(f"- {t}" for t in told), sources)


Show = Callable[[analyse.Comparison], dict[str, str]]


def _label(arm: Arm, many: bool) -> str:
    return arm.label if many else arm.placement


def _where(row: analyse.Comparison | analyse.Summary, many: bool) -> dict[str, str]:
    return {"model": neutral(row.model), "quant": row.quant, "arm": _label(row.arm, many)}


def _many(results: Results) -> bool:
    """Whether an arm's name needs its load mode."""
    return len({arm.load_mode for arm in results.study.arms}) > 1


def _compared(
    name: str, results: Results, quantity: analyse.Quantity, show: Show, note: str, why_empty: str = ""
) -> Table:
    found = analyse.compare(results, quantity)
    many = _many(results)
    rows = [{**_where(c, many), **show(c), "blocks": c.difference.n if c.difference else 0} for c in found]
    return _table(name, rows, [c.records for c in found], note, why_empty)


def _table(
    name: str, rows: list[dict[str, str]], records: Iterable[Iterable[Record]], note: str, why_empty: str = ""
) -> Table:
    """A table whose rows say where and then how much; one without any record at all says why instead."""
    sources = [cite(r) for r in records]
    if why_empty and not any(sources):
        rows, sources = [], []
    return Table(name, rows, sources, note, tuple(rows[0])[3:] if rows else (), why_empty or "no block is whole.")


def _absent(results: Results, *counters: str) -> str:
    """Why the runs have none of a counter."""
    why = {r.observed.absent.get(c) for c in counters for r in results.done if r.observed} - {None}
    return f"not measured: {'; '.join(sorted(map(neutral, why))) or 'no run told it'}."


def memory_table(results: Results) -> Table:
    expert_bytes = {(s.model, s.quant): s.expert_bytes for s in results.manifests}

    def show(c: analyse.Comparison) -> dict[str, str]:
        return {
            "baseline": stats.sizes(c.baseline),
            "offloaded": stats.sizes(c.offload),
            "saved": stats.sizes(c.difference),
            "saved, share": percent(1 - c.ratio.value if c.ratio else None),
            "experts in the file": size(expert_bytes.get((c.model, c.quant))),
        }

    note = "Peak device memory of the run's processes, mean [95 % interval]; saved is taken within blocks."
    return _compared("device-memory", results, analyse.vram, show, note)


def memory_parts_table(results: Results) -> Table:
    """Device memory against what the engine says it holds."""
    quantities = (analyse.vram, analyse.engine_buffers, analyse.residual, analyse.growth)
    parts = zip(*(analyse.summarise(results, q) for q in quantities), strict=True)
    rows, records = [], []
    for whole, engine, rest, grown in parts:
        contexts = {r.device.context_bytes for r in whole.records} - {None}
        share = rest.value.value / whole.value.value if rest.value and whole.value else None
        rows.append(
            {
                **_where(whole, _many(results)),
                "device memory": stats.sizes(whole.value),
                "engine's buffers": stats.sizes(engine.value),
                "rest": stats.sizes(rest.value),
                "rest, share": percent(share),
                "of it an empty context": ", ".join(size(c) for c in sorted(contexts)) or stats.NONE,
                "device in all": size(grown.value.value if grown.value else None),
            }
        )
        records.append(whole.records)
    note = (
        "Mean [95 % interval]. *Rest* is what a sum of the engine's log lines misses: context, workspaces, pools, "
        "code. *Device in all* is what the whole device lost to the run, in bytes that the driver charges to no "
        "process too: the page tables of pinned host memory (load mode none) take 8 bytes for each 4 KiB."
    )
    return _table("memory-parts", rows, records, note)


def _rates(scale: float) -> Show:
    return lambda c: {
        "baseline": stats.estimate(c.baseline, scale),
        "offloaded": stats.estimate(c.offload, scale),
        "offloaded / baseline": stats.estimate(c.ratio),
    }


def speed_table(results: Results, workload: str) -> Table:
    note = "Tokens per second, geometric mean [95 % interval]; ratios are taken within blocks."
    return _compared(f"speed-{workload}", results, analyse.tokens_per_s(workload), _rates(1), note)


def ttft_table(results: Results, workload: str, warm: bool) -> Table:
    which = "warm" if warm else "first"
    what = "**Warm requests**" if warm else "**The first request of a fresh server**"
    note = f"{what}: milliseconds from request to first token, geometric mean [95 % interval]."
    return _compared(f"ttft-{which}-{workload}", results, analyse.ttft(workload, warm), _rates(1000), note)


def load_table(results: Results) -> Table:
    note = "Milliseconds from the start of the server process until it takes requests; geometric mean [95 % interval]."
    return _compared("load", results, analyse.load_time, _rates(1000), note)


def load_mode_table(results: Results) -> Table:
    """The same placement with its host weights mapped from the file and copied to memory of their own."""
    last = results.study.workloads[-1]
    quantities = {f"tokens/s, {neutral(w)}": analyse.tokens_per_s(w) for w in results.study.workloads}
    quantities[f"first token, {neutral(last)}, first"] = analyse.ttft(last, warm=False)
    quantities[f"first token, {neutral(last)}, warm"] = analyse.ttft(last, warm=True)
    quantities |= {
        "load time": analyse.load_time,
        "device memory": analyse.vram,
        "host RSS": analyse.host_peak,
    }
    found = {name: analyse.compare(results, q, analyse.load_modes) for name, q in quantities.items()}
    rows, records = [], []
    for cells in zip(*found.values(), strict=True):
        row = {"model": neutral(cells[0].model), "quant": cells[0].quant, "arm": cells[0].arm.placement}
        rows.append(row | {k: stats.estimate(c.ratio) for k, c in zip(found, cells, strict=True)})
        records.append({r.run_id: r for c in cells for r in c.records}.values())
    note = "Load mode *none* over *mmap*, ratios [95 % interval] within blocks: above 1 is more tokens, time or memory."
    return _table("load-mode", rows, records, note, "no placement was run in both load modes.")


def bound_table(results: Results, workload: str) -> Table:
    """How near decoding comes to what reading the weights alone allows."""
    rate = analyse.summarise(results, analyse.tokens_per_s(workload))
    rows, records = [], []
    for share, speed in zip(analyse.summarise(results, analyse.bound(workload)), rate, strict=True):
        if share.value is None:
            continue
        p = share.records[0].observed.placement
        tps = speed.value.value
        rows.append(
            {
                **_where(share, _many(results)),
                "read on the device per token": size(p.device_read_bytes),
                "read on the host per token": size(p.host_read_bytes),
                "GB/s on the device": stats.number(tps * p.device_read_bytes / 1e9),
                "GB/s on the host": stats.number(tps * p.host_read_bytes / 1e9),
                "share of the bound": _percents(share.value),
            }
        )
        records.append(share.records)
    speeds = {f"{r.device.bandwidth_bytes_per_s / 1e9:.0f}" for s in records for r in s}
    hosts = sorted(r.host.ram_read_bytes_per_s / 1e9 for s in records for r in s)
    note = (
        "Weights that one token must read, and the share of the rate that reading them at full speed would allow, mean "
        f"[95 % interval]. Full speed: {' or '.join(sorted(speeds)) or stats.NONE} GB/s on the device (clock and bus "
        f"width by its driver), {stats.span(hosts, stats.number) if hosts else stats.NONE} GB/s on the host (measured)."
    )
    return _table(f"bound-{workload}", rows, records, note, "the speed of the device's memory is not known.")


def _percents(e: stats.Estimate) -> str:
    return stats.estimate(e, 100) + " %"


def energy_table(results: Results, workload: str) -> Table:
    note = (
        "Joules of the GPU's board for each token generated, prompt included, geometric mean [95 % interval]; the "
        "CPU's energy is not in it."
    )
    why = _absent(results, "energy_joule")
    return _compared(f"energy-{workload}", results, analyse.energy_per_token(workload), _rates(1), note, why)


def host_table(results: Results) -> Table:
    """What a run takes of the host and of the bus, and the GPU's state meanwhile."""
    last = results.study.workloads[-1]
    columns = {
        "host RSS, peak": (analyse.host_peak, stats.sizes),
        "major page faults": (analyse.major_faults, lambda e: stats.estimate(e)),
        f"over PCIe for a prompt of {neutral(last)}": (analyse.received(last), stats.sizes),
        "GPU clock, MHz": (analyse.sm_clock, lambda e: stats.estimate(e)),
        "board, W": (analyse.power, lambda e: stats.estimate(e)),
        "watching, of one CPU": (analyse.monitoring, _percents),
    }
    found = {name: analyse.summarise(results, quantity) for name, (quantity, _) in columns.items()}
    rows, records = [], []
    for cells in zip(*found.values(), strict=True):
        told = {name: columns[name][1](c.value) for name, c in zip(found, cells, strict=True)}
        rows.append(_where(cells[0], _many(results)) | told)
        records.append({r.run_id: r for c in cells for r in c.records}.values())
    note = (
        "Mean [95 % interval]. RSS and faults are of a whole run, load and all requests; mapped pages of the file "
        "count in RSS. What the GPU receives for a prompt is read from its own counter, which turns over at 4 GiB, in "
        "a request apart from the timed ones: n/a where a turn may have gone unseen, or nobody looked. The clock is "
        "the mean of a run's readings; the board's power is its energy over the time of the requests. *Watching* is "
        "the share of one CPU that this program's readings took; how that slows a run is told under the harness's "
        "accuracy."
    )
    return _table("host", rows, records, note)
