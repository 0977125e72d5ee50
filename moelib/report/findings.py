"""The results of a study as tables and sentences, for `analysis.ipynb` and cards. Units and rounding are set here."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pandas as pd

from moelib.audit.record import Record
from moelib.base import files, stats
from moelib.base.neutral import markdown as neutral
from moelib.base.stats import percent, size
from moelib.catalogue.placement import Placement
from moelib.evidence.table import (
    Sources,
    Table,
    Text,
    cite,
    heading,
    merged,
    reference,
    several_load_modes,
)
from moelib.machine import pagecache
from moelib.study import frames
from moelib.study.frames import Comparison, Pairs, Summary
from moelib.study.study import Study

WEIGHTS = {
    "twin": "The weights are **geometry twins**: random numbers in the tensor shapes of the models named, at scale "
    "{scale} ({parameters} parameters). VRAM, load time, tokens/s and time to first token (TTFT) depend on shapes and "
    "types, so these numbers stand for files of the real models at this size. Text, quality and which experts are "
    "chosen depend on the values of the weights; nothing is said of them.",
    "real": "The weights are **real** ({parameters} parameters): {origins}. VRAM, load time, tokens/s and time to "
    "first token (TTFT) are those of these files. {quality}",
}
JUDGED = "What quantising changes in what they say was measured over the texts named below."
UNJUDGED = "Their text was not evaluated, and nothing is said of quality."


def headline(study: Study) -> Text:
    """What was measured and on what machine: the first lines of the document."""
    runs = study.done
    parameters = " and ".join(f"{n / 1e6:,.0f} M" for n in sorted({s.parameters for s in study.manifests}))
    origins = "; ".join(sorted({neutral(s.origin) for s in study.manifests if s.origin})) or "of unknown origin"
    values = {"scale": neutral(study.parameters.scale), "parameters": parameters or "unknown", "origins": origins}
    values["quality"] = JUDGED if study.parameters.quality else UNJUDGED
    text = (
        f"{WEIGHTS[study.parameters.weights].format(**values)}\n\nStudy **{neutral(study.name)}**: "
        f"{neutral(study.parameters.title)}. {neutral(study.summary())}. Measured on "
        f"{'; '.join(sorted({machine(r) for r in runs})) or 'no machine yet'}."
    )
    if any(r.device.kind == "loopback" for r in runs):
        text += " VRAM here is the resident memory of the process that acts as the device."
    if unmeasured := [name for name in study.statuses if name not in study.measured]:
        tried = {f"{r.spec.model}/{r.spec.quant}" for r in study.records}
        for name, why in (("Not measured yet", set(unmeasured) - tried), ("Without a whole round", tried)):
            if of := [cell for cell in unmeasured if cell in why]:
                text += f"\n\n**{name}**, and in no table below: {', '.join(map(neutral, of))}."
    if study.host_shared:
        text += (
            "\n\n**Runs shared their host** with runs on its other GPUs (`exclusive: device`). tokens/s, TTFT and load "
            "times below are what others left them, so nothing is advised or answered by them; VRAM is their own."
        )
    if not study.measured:
        text += "\n\n**Nothing is compared here**: no round is complete. The reasons are listed below."
    return Text("headline", text, cite(runs))


def machine(r: Record) -> str:
    name = neutral(r.device.name or "")
    if r.device.kind == "loopback":
        return f"the *loopback* device ({name}): no GPU took part, and no number here is that of a GPU"
    return name or f"no device ({neutral(r.host.cpu or 'CPU unknown')})"


WHERE = ("model", "quant", "placement", "load mode", "page cache")
"""Columns that say what a row is about; the others are values."""
Show = Callable[[Comparison], dict[str, str]]


def _where(row: Comparison | Summary, study: Study) -> dict[str, str]:
    """What a row is about; the load mode only where the study has several."""
    placement, load_mode = row.side
    modes = {"load mode": load_mode} if several_load_modes(study.parameters.arms) else {}
    return {"model": neutral(row.model), "quant": row.quant, "placement": placement} | modes


def _compared(
    name: str, study: Study, column: str, show: Show, note: str, why_empty: str = "", pairs: Pairs = frames.ends
) -> Table:
    comparisons = frames.comparisons(study.runs, column, pairs)
    rows = [{**_where(c, study), **show(c), "rounds": c.difference.n if c.difference else 0} for c in comparisons]
    return _table(name, rows, [c.sources for c in comparisons], note, why_empty)


def _table(
    name: str, rows: list[dict[str, Any]], row_sources: Iterable[Sources], note: str, why_empty: str = ""
) -> Table:
    """A table of what each row is about, then its values; without any record it says why instead."""
    sources = list(row_sources)
    if why_empty and not any(sources):
        rows, sources = [], []
    values = tuple(k for k in rows[0] if k not in WHERE) if rows else ()
    return Table(name, rows, sources, note, values, why_empty or "no round is complete.")


def said_once(table: Table, *columns: str) -> Table:
    """The table without those of the columns that are the same in every row, of which its note then tells: so that it
    fits a narrow page."""
    same = {c: table.rows[0][c] for c in columns if len(table.rows) > 1 and len({row[c] for row in table.rows}) == 1}
    if not same:
        return table
    rows = [{k: v for k, v in row.items() if k not in same} for row in table.rows]
    note = f"{table.note} In every row: {', '.join(f'*{name}* {value}' for name, value in same.items())}."
    return replace(table, rows=rows, note=note, numbers=tuple(c for c in table.numbers if c not in same))


def _absent(study: Study, *counters: str) -> str:
    """Why the runs have no value of a counter."""
    why = {r.observed.absent.get(c) for c in counters for r in study.done if r.observed} - {None}
    return f"not measured: {'; '.join(sorted(map(neutral, why))) or 'no run has a value'}."


def planned(study: Study) -> list[Table | Text]:
    """What was planned for the card before anything was run, beside what was measured; empty where nothing was."""
    card, plan = study.plan.card, study.plan
    if card is None:
        return []
    vram, rss = (
        {(s.model, s.quant, "/".join(s.side)): s for s in frames.summaries(study.runs, column)}
        for column in ("vram_bytes", "host_rss_peak_bytes")
    )
    rows, sources, of_plan = [], [], {"plan.json": files.digest(plan.model_dump(mode="json", exclude_unset=True))}
    for cell, foreseen in plan.foreseen.items():
        model, _, quant = cell.partition("/")
        for label, need in foreseen.items():
            took, peak = (known.get((model, quant, label)) for known in (vram, rss))
            value = took.value if took else None
            rows.append(
                {
                    "model": neutral(model),
                    "quant": quant,
                    "placement": Placement.parse(*label.split("/")).label,
                    "VRAM, planned": size(need.vram_bytes),
                    "VRAM, measured": stats.sizes(value),
                    "off": percent(need.vram_bytes / value.value - 1) if value else stats.NONE,
                    "RAM, planned": size(need.ram_bytes),
                    "RAM at its peak": stats.sizes(peak.value if peak else None),
                    "runs": len(took.runs) if took else 0,
                }
            )
            sources.append((took.sources if took else {}) | of_plan)
    note = (
        f"Placements were planned from headers alone, before anything was run, for {size(card.vram_bytes)} of VRAM"
        f"{f' ({neutral(card.name)})' if card.name else ''} and {size(card.ram_bytes)} of RAM: the fewest layers' "
        "experts on the CPU that fit, and all of them. Measured: mean [95 % interval]; RAM at its peak counts pages "
        "of a mapped file that were only read to be copied to the GPU, which the system may drop."
    )
    return [heading("h-planned", "Planned and measured"), _table("planned", rows, sources, note)]


def _rates(study: Study, scale: float) -> Show:
    base = reference(study)
    return lambda c: {
        base: stats.estimate(c.baseline, scale),
        "CPU offload": stats.estimate(c.value, scale),
        f"CPU offload / {base}": stats.estimate(c.ratio),
    }


def between(study: Study) -> list[Table | Text]:
    """Load times of the placements between the ends, which the document leaves out; empty without any."""
    table = load_table(study, frames.between)
    return [heading("h-between", "Load time between the ends", 2), table] if table.rows else []


def load_table(study: Study, pairs: Pairs = frames.ends) -> Table:
    """With where each file was when its load began, where a record of the study says it."""
    name = "load" if pairs is frames.ends else "load-between"
    elsewhere = pairs is frames.ends and frames.comparisons(study.runs, "load_s", frames.between)
    note = "Load time in ms, from process start until the server accepts requests; geometric mean [95 % interval]."
    if elsewhere:
        note += " Placements between these are in `EVIDENCE.md`."
    rates = _rates(study, 1000)
    if not cache_known(study):
        return _compared(name, study, "load_s", rates, note, pairs=pairs)
    base = {cache(c.before) for c in frames.comparisons(study.runs, "load_s")}
    note += (
        " *Page cache*: where the file was when the server was started. *cached*: in RAM, as after a load before "
        f"({percent(pagecache.CACHED)} of it or more); *cold*: not in RAM ({percent(pagecache.COLD)} at most), so that "
        "it was read from the disk, which may have a cache of its own, or a host that has one. The file of "
        f"{reference(study)} was {' or '.join(sorted(base))}."
    )

    def show(c: Comparison) -> dict[str, str]:
        return {"page cache": cache(c.after)} | rates(c)

    return said_once(_compared(name, study, "load_s", show, note, pairs=pairs), "page cache")


def cache_known(study: Study) -> bool:
    """Whether any run says where its file was; those of earlier code do not."""
    return bool(study.runs["cached_share"].notna().any())


def cache(runs: pd.DataFrame) -> str:
    """Where the file was when the loads of some runs began, in words."""
    return ", ".join(sorted(set(map(pagecache.state, runs["cached_share"])))) or stats.NONE


def load_mode_table(study: Study) -> Table:
    """The same placement with its host weights copied to memory of their own, against mapped from the file."""
    last = study.parameters.workloads[-1]
    columns = {"tokens/s": f"tokens_per_s/{last}", "TTFT, first": f"ttft_first_s/{last}"}
    columns |= {"TTFT, warm": f"ttft_warm_s/{last}", "load time": "load_s"}
    columns |= {"VRAM": "vram_bytes", "host RSS": "host_rss_peak_bytes"}
    compared = {name: frames.comparisons(study.runs, c, frames.load_modes) for name, c in columns.items()}
    rows, sources = [], []
    for cells in zip(*compared.values(), strict=True):
        row = {"model": neutral(cells[0].model), "quant": cells[0].quant, "placement": cells[0].side[0]}
        rows.append(row | {k: stats.estimate(c.ratio) for k, c in zip(compared, cells, strict=True)})
        sources.append(merged(c.sources for c in cells))
    note = (
        "Load mode *none* / *mmap*, ratios [95 % interval] paired within rounds: above 1 is more tokens/s, time or "
        f"memory. tokens/s and TTFT of {neutral(last)}."
    )
    if any(mode.load_mode == "mlock" for mode in study.parameters.arms):
        note += " *mlock*, *none* with its memory locked, is in the other tables."
    if cache_known(study):
        note += " Files were cached, or cold, as the table of load times says."
    table = _table("load-mode", rows, sources, note, "the study has no placement in both load modes.")
    return said_once(table, "placement")


def bound_table(study: Study, workload: str) -> Table:
    """tokens/s against the upper bound set by reading the weights alone."""
    columns = (f"bandwidth_share/{workload}", f"tokens_per_s/{workload}")
    known = [
        (share, rate)
        for share, rate in zip(*(frames.summaries(study.runs, c) for c in columns), strict=True)
        if share.value and rate.value
    ]
    rows = []
    for share, rate in known:
        from_vram, from_ram = (share.runs[c].iloc[0] for c in ("vram_read_bytes", "ram_read_bytes"))
        tokens = rate.value.value
        rows.append(
            {
                **_where(share, study),
                "read from VRAM per token": size(from_vram),
                "read from host RAM per token": size(from_ram),
                "GB/s from VRAM": stats.number(tokens * from_vram / 1e9),
                "GB/s from host RAM": stats.number(tokens * from_ram / 1e9),
                "share of the bound": _percents(share.value),
            }
        )
    speeds = {f"{n / 1e9:.0f}" for share, _ in known for n in share.runs["vram_bytes_per_s"]}
    hosts = sorted(n / 1e9 for share, _ in known for n in share.runs["ram_bytes_per_s"])
    note = (
        "Weights read for one token, and tokens/s as a share of what reading them at full bandwidth would allow, mean "
        f"[95 % interval]. Full bandwidth: {' or '.join(sorted(speeds)) or stats.NONE} GB/s of VRAM (clock and bus "
        f"width by the driver), {stats.span(hosts, stats.number) if hosts else stats.NONE} GB/s of host RAM (measured)."
    )
    sources = [share.sources for share, _ in known]
    return _table(f"bound-{workload}", rows, sources, note, "the bandwidth of the device's memory is not known.")


def _percents(e: stats.Estimate) -> str:
    return stats.estimate(e, 100) + " %"


def energy_table(study: Study, workload: str) -> Table:
    note = (
        "Joules of the GPU board per generated token, prompt included, geometric mean [95 % interval]; the energy of "
        "the CPU is not included. The board's counter moves about ten times a second."
    )
    why = _absent(study, "energy_joule")
    return _compared(
        f"energy-{workload}", study, f"joule_per_token/{workload}", _rates(study, 1), note, why, frames.EVERY
    )


def host_table(study: Study) -> Table:
    """Host memory, page faults, PCIe traffic, clock and power of a run."""
    last = study.parameters.workloads[-1]
    columns = {
        "host RSS, peak": ("host_rss_peak_bytes", stats.sizes),
        "major page faults": ("major_faults", stats.estimate),
        f"PCIe traffic for a {neutral(last)} prompt": (f"bus_received_bytes/{last}", stats.sizes),
        "GPU clock, MHz": ("gpu_clock_mhz", stats.estimate),
        "board power, W": ("board_watt", stats.estimate),
        "monitoring, of one CPU": ("monitor_cpu_share", _percents),
    }
    summaries = {name: frames.summaries(study.runs, column) for name, (column, _) in columns.items()}
    rows, sources = [], []
    for cells in zip(*summaries.values(), strict=True):
        values = {name: columns[name][1](c.value) for name, c in zip(summaries, cells, strict=True)}
        rows.append(_where(cells[0], study) | values)
        sources.append(merged(c.sources for c in cells))
    note = (
        "Mean [95 % interval]. RSS and page faults are those of a whole run, load and all requests; mapped pages of "
        "the file count as RSS. PCIe traffic is what the GPU received for one prompt, heads of packets included, by "
        "its own counter, which wraps at 4 GiB, in a request apart from the timed ones: n/a where a wrap may have been "
        "missed, or nothing was read. The clock is the mean of a run's readings; board power is energy over the time "
        "of the requests. *Monitoring* is the share of one CPU that this program's readings took; how much it slows a "
        "run is shown under measurement overhead."
    )
    return _table("host", rows, sources, note)
