"""A study's tables and sentences as Markdown: what `analysis.ipynb` and `run.ipynb` show.

Every table carries the ids of the records that its numbers came from; they become the document's provenance.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from moelib import analyse, audit, files, stats
from moelib.record import Record
from moelib.stats import number, percent, size
from moelib.study import Results

WEIGHTS = {
    "twin": "The weights are **geometry twins**: random numbers in the shapes of the models named, at scale {scale} "
    "({parameters} parameters). Device memory, load time and speed depend on shapes and types, so they stand for files "
    "of this size; text, quality and the choice of experts do not, and nothing is said of them."
}


@dataclass(frozen=True)
class Table:
    """A Markdown table with its name and its records."""

    name: str
    rows: Sequence[dict[str, Any]]
    records: dict[str, str] = field(default_factory=dict)
    """Run id -> digest of every record that a number here came from."""
    note: str = ""
    """What the table shows, said above it."""
    numbers: tuple[str, ...] = ()
    """Columns to set flush right."""

    def markdown(self) -> str:
        """The table, then where its numbers came from: the digest shows whether they still do."""
        if not self.rows:
            return f"*{self.name}: nothing to show.*"
        frame = pd.DataFrame(self.rows).map(lambda v: str(v).replace("|", "\\|"))
        align = ["right" if c in self.numbers else "left" for c in frame.columns]
        text = frame.to_markdown(index=False, colalign=align, disable_numparse=True)
        about = f"{self.note}\n\n" if self.note else ""
        cited = f"Table `{self.name}`: {len(self.records)} records, set digest `{files.digest(self.records)[:12]}`."
        return f"{about}{text}" + (f"\n\n*{cited}*" if self.records else "")

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        provenance = {"table": self.name, "records": self.records}
        return {"text/markdown": self.markdown(), "text/plain": self.name}, {"moelib": provenance}


def _cite(records: Iterable[Record]) -> dict[str, str]:
    return {r.run_id: r.digest for r in records}


def _done(results: Results) -> list[Record]:
    return [r for r in results.records if r.done]


def _facts(name: str, facts: dict[str, str], records: Iterable[Record] = ()) -> Table:
    return Table(name, [{"what": k, "value": v} for k, v in facts.items()], _cite(records))


def headline(results: Results) -> str:
    """What was measured on what, in the document's first lines."""
    runs = _done(results)
    parameters = " and ".join(f"{n / 1e6:,.0f} M" for n in sorted({s["parameters"] for s in results.sheets}))
    weights = WEIGHTS[results.study.weights].format(scale=results.study.scale, parameters=parameters)
    return (
        f"Study **{results.name}**: {results.study.title}. "
        f"{len(runs)} valid runs of {sum(s.planned for s in results.statuses.values())} planned, on "
        f"{'; '.join(sorted({_machine(r) for r in runs}))}.\n\n{weights}"
    )


def _machine(r: Record) -> str:
    if r.device["kind"] == "loopback":
        return f"the *loopback* device ({r.device['name']}): no GPU took part, and no number here is one of a GPU"
    return r.device["name"] or f"no device ({r.host['cpu']})"


def answer(results: Results) -> str:
    """The study in three sentences, from the same comparisons as the tables."""
    rates = [analyse.decode_rate(w) for w in results.study.workloads]
    cuts = [1 - c.ratio.value for c in analyse.compare(results, analyse.device_memory) if c.ratio]
    kept = [c.ratio.value for rate in rates for c in analyse.compare(results, rate) if c.ratio]
    if not cuts or not kept:
        return "No whole block holds both a baseline and an offload run, so nothing can be compared."
    return (
        f"Keeping the experts on the CPU took {percent(min(cuts))} to {percent(max(cuts))} off device memory, by model "
        f"and quant. Decoding then ran at {percent(min(kept))} to {percent(max(kept))} of the baseline's rate. Both "
        "ranges are over cells; the intervals of each cell are in the tables."
    )


def files_table(results: Results) -> Table:
    models, quants = results.study.models, results.study.quants
    rows = [
        {
            "model": s["model"],
            "quant": s["quant"],
            "file": size(s["file_bytes"]),
            "bits/weight": f"{s['bits_per_weight']:.2f}",
            "experts": size(s["expert_bytes"]),
            "expert tensor types": ", ".join(f"{n}x{t}" for t, n in s["expert_types"].items()),
            "fallbacks": len(s["fallbacks"]),
            "SHA-256": f"`{s['sha256'][:12]}`",
        }
        for s in sorted(results.sheets, key=lambda s: (models.index(s["model"]), quants.index(s["quant"])))
    ]
    note = "A fallback is a tensor whose rows k-quants cannot take; the sheets in `quants/` list them."
    return Table("files", rows, note=note, numbers=("file", "bits/weight", "experts", "fallbacks"))


Columns = dict[str, Callable[[analyse.Comparison], str]]


def _compared(name: str, results: Results, quantity: analyse.Quantity, columns: Columns, note: str) -> Table:
    comparisons = analyse.compare(results, quantity)
    many = len({c.load_mode for c in comparisons}) > 1
    rows = []
    for c in comparisons:
        row = {"model": c.model, "quant": c.quant, "placement": c.placement + (f"/{c.load_mode}" if many else "")}
        row |= {column: show(c) for column, show in columns.items()}
        rows.append({**row, "blocks": c.ratio.n if c.ratio else 0})
    return Table(name, rows, _cite(r for c in comparisons for r in c.records), note, (*columns, "blocks"))


def memory_table(results: Results) -> Table:
    expert_bytes = {(s["model"], s["quant"]): s["expert_bytes"] for s in results.sheets}
    columns = {
        "baseline": lambda c: stats.sizes(c.baseline),
        "offloaded": lambda c: stats.sizes(c.offload),
        "saved": lambda c: stats.sizes(c.difference),
        "saved, share": lambda c: percent(1 - c.ratio.value if c.ratio else None),
        "experts in the file": lambda c: size(expert_bytes.get((c.model, c.quant))),
    }
    note = "Peak device memory of the run's processes, mean [95 % interval]; saved is taken within blocks."
    return _compared("device-memory", results, analyse.device_memory, columns, note)


def _rates(scale: float) -> Columns:
    return {
        "baseline": lambda c: stats.estimate(c.baseline, scale),
        "offloaded": lambda c: stats.estimate(c.offload, scale),
        "offloaded / baseline": lambda c: stats.estimate(c.ratio),
    }


def speed_table(results: Results, workload: str) -> Table:
    note = "Tokens per second, geometric mean [95 % interval]; ratios are taken within blocks."
    return _compared(f"speed-{workload}", results, analyse.decode_rate(workload), _rates(1), note)


def first_token_table(results: Results, workload: str, warm: bool) -> Table:
    which = "warm" if warm else "first"
    what = "**Warm requests**" if warm else "**The first request of a fresh server**"
    note = f"{what}: milliseconds from request to first token, geometric mean [95 % interval]."
    return _compared(f"ttft-{which}-{workload}", results, analyse.first_token(workload, warm), _rates(1000), note)


def load_table(results: Results) -> Table:
    note = "Milliseconds from the start of the server process until it takes requests; geometric mean [95 % interval]."
    return _compared("load", results, analyse.load_time, _rates(1000), note)


def ledger_table(blocks: Sequence[Sequence[Record]]) -> Table:
    """Placement proof of every block: what left the device by the header and by the engine's buffers."""
    rows = []
    for base, r in ((audit.baseline(b), r) for b in blocks for r in b if r.spec.placement != "baseline"):
        before, after = base.observed, r.observed
        memory = [seen.memory.value_bytes for seen in (before, after)]
        weights = [seen.report.device_bytes("model") or 0 for seen in (before, after)]
        splits = [max(seen.report.graph_splits, default=0) for seen in (before, after)]
        hosts = {b.name for b in after.report.buffers if b.kind == "model" and not b.on_device}
        moved = after.placement
        rows.append(
            {
                "model": r.spec.model,
                "quant": r.spec.quant,
                "arm": r.spec.arm,
                "block": r.spec.block + 1,
                "expert tensors moved": f"{moved.moved_tensors} in {moved.moved_blocks} blocks",
                "by the header": size(moved.moved_bytes),
                "off the device (engine)": size(weights[0] - weights[1]),
                "off the device (memory)": size(None if None in memory else memory[0] - memory[1]),
                "weights on the host in": ", ".join(sorted(hosts)),
                "graph splits": f"{splits[0]} -> {splits[1]}",
            }
        )
    numbers = ("block", "by the header", "off the device (engine)", "off the device (memory)", "graph splits")
    return Table("placement", rows, _cite(r for b in blocks for r in b), numbers=numbers)


def runs_table(records: Sequence[Record]) -> Table:
    """One row a run: what was read of its memory, and what its requests gave."""
    rows, sizes = [], {"device memory": "value_bytes", "engine's buffers": "engine_bytes", "rest": "residual_bytes"}
    for r in sorted(records, key=lambda r: (r.spec.block, r.spec.order)):
        seen = r.observed
        row = {"block": r.spec.block + 1, "arm": r.spec.arm, "status": r.status, "why": ", ".join(r.reasons) or "-"}
        row |= {k: size(getattr(seen.memory, name) if seen else None) for k, name in sizes.items()}
        row["load, s"] = number(seen.load_s if seen else None)
        for q in seen.requests if seen else ():
            row[f"{q.workload} #{q.index + 1}"] = f"{number(q.tps)} tok/s, {number(q.ttft_s, 1000)} ms"
        rows.append(row)
    return Table("runs", rows, _cite(records), numbers=("block", *sizes, "load, s"))


def completeness_table(results: Results) -> Table:
    rows = []
    for name, s in results.statuses.items():
        count = Counter(r.status for r in results.records if r.cell == name)
        valid = sum(len(b) for b in s.blocks)
        row = {"cell": name, "planned runs": s.planned, "in whole, valid blocks": valid, "missing": s.planned - valid}
        rows.append({**row, **{f"{k} records": count[k] for k in ("valid", "degraded", "invalid", "failed")}})
    return Table("completeness", rows, _cite(results.records), numbers=tuple(rows[0])[1:])


def problems(results: Results) -> str:
    """Every planned run without a valid result, as a list."""
    if not results.problems:
        return "Every planned run has a valid record."
    return "Missing or not valid:\n\n" + "\n".join(f"- {p}" for p in results.problems)


def environment_table(results: Results) -> Table:
    """Every distinct value of what the valid runs say of engine, device, host and code."""

    def facts(r: Record) -> dict[str, str]:
        host, device = r.host, r.device
        commit = f"{host['commit'] or 'no git clone'}{' with local changes' if host['dirty'] else ''}"
        return {
            "engine": r.engine["version"],
            "llama-server SHA-256": f"`{r.engine['server_sha256'][:12]}`",
            "device": f"{device['kind']}: {device['name']}",
            "CPU": f"{host['cpu']}, {host['cpus']} usable",
            "RAM": size(host["ram_bytes"]),
            "system": f"{host['system']}, Python {host['python']}",
            "moelib": f"{host['moelib']}, commit {commit}",
            "llama-server threads": str(r.observed.threads),
        }

    told = pd.DataFrame([facts(r) for r in _done(results)])
    return _facts("environment", {k: "; ".join(sorted(set(told[k]))) for k in told}, _done(results))


def workloads_table(results: Results) -> Table:
    rows = []
    for name, w in results.workloads.items():
        asked = {q.prompt_n for r in _done(results) for q in r.observed.requests if q.workload == name}
        counts = {"prompt tokens": ", ".join(map(str, sorted(asked))), "tokens generated": w.generate_tokens}
        rows.append({"workload": name, "what": w.title, **counts})
    return Table("workloads", rows, _cite(_done(results)))


def records_table(results: Results) -> Table:
    """Every record by id, status and digest: what the set digests of the other tables stand for."""
    rows = [{"record": f"`{r.run_id}`", "status": r.status, "digest": f"`{r.digest[:12]}`"} for r in results.records]
    return Table("records", rows, _cite(results.records))


def sheet_table(sheet: dict[str, Any]) -> Table:
    """A quantised file's sheet."""
    types, experts = (", ".join(f"{n} x {t}" for t, n in sheet[k].items()) for k in ("tensor_types", "expert_types"))
    fell = [f"{f['tensor']} ({f['columns']} columns) -> {f['type']}" for f in sheet["fallbacks"]]
    facts = {
        "file": sheet["file_name"],
        "size": size(sheet["file_bytes"]),
        "parameters": f"{sheet['parameters']:,}",
        "bits per weight": f"{sheet['bits_per_weight']:.2f}",
        "tensor types": types,
        "expert tensors": experts,
        "expert bytes": size(sheet["expert_bytes"]),
        "fallbacks": "; ".join(fell) or "none",
        "SHA-256": f"`{sheet['sha256']}`",
        "made by": f"{sheet['engine_version']} in {number(sheet['quantize_s'])} s",
        "weights": f"{sheet['weights']}, scale {sheet['scale']}",
    }
    return _facts("sheet", facts)
