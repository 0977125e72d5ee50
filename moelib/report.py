"""A study's tables and sentences as Markdown: what `analysis.ipynb` and `run.ipynb` show.

Every table carries the ids of the records that its numbers came from; they become the document's provenance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from moelib import analyse, files, units
from moelib.record import Record
from moelib.study import Results

WEIGHTS = {
    "twin": "The weights are **geometry twins**: random numbers in the shapes of the models named. Device memory, load "
    "time and speed depend on shapes and types, so they stand for files of this size; text, quality and the choice "
    "of experts do not, and nothing is said of them."
}


@dataclass(frozen=True)
class Table:
    """A Markdown table with its name and its records."""

    name: str
    rows: Sequence[dict[str, Any]]
    records: dict[str, str] = field(default_factory=dict)
    """Run id -> digest of every record that a number here came from."""
    note: str = ""
    numbers: tuple[str, ...] = ()
    """Columns to set flush right."""

    def markdown(self) -> str:
        if not self.rows:
            return f"*{self.name}: nothing to show.*"
        frame = pd.DataFrame(self.rows).map(lambda v: str(v).replace("|", "\\|"))
        align = ["right" if c in self.numbers else "left" for c in frame.columns]
        text = frame.to_markdown(index=False, colalign=align, disable_numparse=True)
        return f"{text}\n\n{self.source()}"

    def source(self) -> str:
        """Where the numbers came from, and how to see that they still do."""
        cited = f"Table `{self.name}`: {len(self.records)} records, set digest `{files.digest(self.records)[:12]}`."
        found = cited if self.records else ""
        text = " ".join(t for t in (self.note, found) if t)
        return f"*{text}*" if text else ""

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        provenance = {"table": self.name, "records": self.records}
        return {"text/markdown": self.markdown(), "text/plain": self.name}, {"moelib": provenance}


def _cite(records: Iterable[Record], ids: Iterable[str] | None = None) -> dict[str, str]:
    wanted = None if ids is None else set(ids)
    return {r.run_id: r.digest for r in records if wanted is None or r.run_id in wanted}


def headline(results: Results) -> str:
    """What was measured on what, in the document's first lines."""
    runs = [r for r in results.records if r.done]
    machines = sorted({_machine(r) for r in runs})
    where = "; ".join(machines)
    return (
        f"Study **{results.name}**: {results.study.title}. "
        f"{len(runs)} valid runs of {sum(s.planned for s in results.statuses.values())} planned, on {where}.\n\n"
        f"{WEIGHTS[results.study.weights]}"
    )


def _machine(r: Record) -> str:
    if r.device["kind"] == "loopback":
        return f"the *loopback* device ({r.device['name']}): no GPU took part, and no number here is one of a GPU"
    return r.device["name"] or f"no device ({r.host['cpu']})"


def answer(results: Results) -> str:
    """The study in three sentences, from the same comparisons as the tables."""
    memory = [c for c in analyse.compare(results, analyse.device_memory()) if c.ratio]
    speed = [c for w in results.study.workloads for c in analyse.compare(results, analyse.decode_rate(w)) if c.ratio]
    if not memory or not speed:
        return "No whole block holds both a baseline and an offload run, so nothing can be compared."
    cuts = [1 - c.ratio.value for c in memory]
    kept = [c.ratio.value for c in speed]
    return (
        f"Keeping the experts on the CPU took {units.percent(min(cuts))} to {units.percent(max(cuts))} off device "
        f"memory, by model and quant. Decoding then ran at {units.percent(min(kept))} to "
        f"{units.percent(max(kept))} of the baseline's rate. Both ranges are over cells; the intervals of each cell "
        "are in the tables."
    )


def files_table(results: Results) -> Table:
    rows = []
    study = results.study
    for s in sorted(results.sheets, key=lambda s: (study.models.index(s["model"]), study.quants.index(s["quant"]))):
        types = ", ".join(f"{n}x{t}" for t, n in s["expert_types"].items())
        rows.append(
            {
                "model": s["model"],
                "quant": s["quant"],
                "file": units.size(s["file_bytes"]),
                "bits/weight": f"{s['bits_per_weight']:.2f}",
                "experts": units.size(s["expert_bytes"]),
                "expert tensor types": types,
                "fallbacks": len(s["fallbacks"]),
                "SHA-256": f"`{s['sha256'][:12]}`",
            }
        )
    note = "A fallback is a tensor whose rows k-quants cannot take; the sheets in `quants/` list them."
    return Table("files", rows, note=note, numbers=("file", "bits/weight", "experts", "fallbacks"))


def _compared(name: str, results: Results, quantity: analyse.Quantity, show: Any, note: str) -> Table:
    comparisons = analyse.compare(results, quantity)
    many = len({c.load_mode for c in comparisons}) > 1
    rows = [
        {
            "model": c.model,
            "quant": c.quant,
            "placement": c.placement + (f"/{c.load_mode}" if many else ""),
            **show(c),
            "blocks": c.ratio.n if c.ratio else 0,
        }
        for c in comparisons
    ]
    numbers = tuple(k for k in (rows[0] if rows else ()) if k not in ("model", "quant", "placement"))
    return Table(name, rows, _cite(results.records, (i for c in comparisons for i in c.records)), note, numbers)


def memory_table(results: Results) -> Table:
    expert_bytes = {(s["model"], s["quant"]): s["expert_bytes"] for s in results.sheets}

    def show(c: analyse.Comparison) -> dict[str, str]:
        return {
            "baseline": units.sizes(c.baseline),
            "offloaded": units.sizes(c.offload),
            "saved": units.sizes(c.difference),
            "saved, share": units.percent(1 - c.ratio.value if c.ratio else None),
            "experts in the file": units.size(expert_bytes.get((c.model, c.quant))),
        }

    note = "Peak of the run's processes, mean [95 % interval]."
    return _compared("device-memory", results, analyse.device_memory(), show, note)


def _rates(scale: float) -> Any:
    return lambda c: {
        "baseline": units.estimate(c.baseline, scale),
        "offloaded": units.estimate(c.offload, scale),
        "offloaded / baseline": units.estimate(c.ratio),
    }


def speed_table(results: Results, workload: str) -> Table:
    note = "Tokens per second, geometric mean [95 % interval]; the ratio is paired within blocks."
    return _compared(f"speed-{workload}", results, analyse.decode_rate(workload), _rates(1), note)


def first_token_table(results: Results, workload: str, warm: bool) -> Table:
    which = "warm" if warm else "first"
    note = f"Milliseconds from request to first token, {which} request of a server; geometric mean [95 % interval]."
    return _compared(f"ttft-{which}-{workload}", results, analyse.first_token(workload, warm), _rates(1000), note)


def load_table(results: Results) -> Table:
    note = "Milliseconds from the start of the server process until it takes requests; geometric mean [95 % interval]."
    return _compared("load", results, analyse.load_time(), _rates(1000), note)


def ledger_table(blocks: Iterable[analyse.Block]) -> Table:
    """Placement proof of every block: header against engine."""
    blocks = list(blocks)
    rows = analyse.ledger(blocks)
    shown = [
        {
            "model": r.model,
            "quant": r.quant,
            "arm": r.arm,
            "block": r.block + 1,
            "expert tensors moved": f"{r.moved_tensors} in {r.moved_blocks} blocks",
            "by the header": units.size(r.header_bytes),
            "off the device (engine)": units.size(r.engine_bytes),
            "off the device (memory)": units.size(r.memory_bytes),
            "weights on the host in": r.host_buffers,
            "graph splits": f"{r.splits[0]} -> {r.splits[1]}",
        }
        for r in rows
    ]
    numbers = ("block", "by the header", "off the device (engine)", "off the device (memory)", "graph splits")
    return Table("placement", shown, _cite(r for b in blocks for r in b), numbers=numbers)


def runs_table(records: Sequence[Record]) -> Table:
    """One row a run: what was read of its memory, and what its requests gave."""
    shown = []
    for r in sorted(records, key=lambda r: (r.spec.block, r.spec.order)):
        seen = r.observed
        memory = seen.memory if seen else None
        row = {"block": r.spec.block + 1, "arm": r.spec.arm, "status": r.status, "why": ", ".join(r.reasons) or "-"}
        row["device memory"] = units.size(memory.value_bytes) if memory else units.NONE
        row["engine's buffers"] = units.size(memory.engine_bytes) if memory else units.NONE
        row["rest"] = units.size(memory.residual_bytes) if memory else units.NONE
        row["load, s"] = units.number(seen.load_s) if seen else units.NONE
        for q in seen.requests if seen else ():
            tps = units.number(q.tps) if q.tps else units.NONE
            ttft = units.number(q.ttft_s * 1000) if q.ttft_s else units.NONE
            row[f"{q.workload} #{q.index + 1}"] = f"{tps} tok/s, {ttft} ms"
        shown.append(row)
    numbers = ("block", "device memory", "engine's buffers", "rest", "load, s")
    return Table("runs", shown, _cite(records), numbers=numbers)


def completeness_table(results: Results) -> Table:
    rows = []
    for name, s in results.statuses.items():
        count = Counter(r.status for r in results.records if f"{r.spec.model}/{r.spec.quant}" == name)
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
    runs = [r for r in results.records if r.done]
    facts: dict[str, set[str]] = {}
    for r in runs:
        commit = f"{r.host['commit'] or 'no git clone'}{' with local changes' if r.host['dirty'] else ''}"
        row = {
            "engine": r.engine["version"],
            "llama-server SHA-256": f"`{r.engine['server_sha256'][:12]}`",
            "device": f"{r.device['kind']}: {r.device['name']}",
            "CPU": f"{r.host['cpu']}, {r.host['cpus']} usable",
            "RAM": units.size(r.host["ram_bytes"]),
            "system": f"{r.host['system']}, Python {r.host['python']}",
            "moelib": f"{r.host['moelib']}, commit {commit}",
            "llama-server threads": str(r.observed.threads),
        }
        for k, v in row.items():
            facts.setdefault(k, set()).add(v)
    rows = [{"what": k, "value": "; ".join(sorted(v))} for k, v in facts.items()]
    return Table("environment", rows, _cite(runs))


def workloads_table(results: Results) -> Table:
    rows = []
    for name, w in results.workloads.items():
        asked = {q.prompt_n for r in results.records if r.done for q in r.observed.requests if q.workload == name}
        rows.append(
            {
                "workload": name,
                "what": w.title,
                "prompt tokens": ", ".join(str(n) for n in sorted(asked)),
                "tokens generated": w.generate_tokens,
            }
        )
    return Table("workloads", rows, _cite(r for r in results.records if r.done))


def records_table(results: Results) -> Table:
    """Every record by id, status and digest: what the set digests of the other tables stand for."""
    rows = [{"record": f"`{r.run_id}`", "status": r.status, "digest": f"`{r.digest[:12]}`"} for r in results.records]
    return Table("records", rows, _cite(results.records))


def sheet_table(sheet: dict[str, Any]) -> Table:
    """A quantised file's sheet."""
    types = ", ".join(f"{n} x {t}" for t, n in sheet["tensor_types"].items())
    fell = [f"{f['tensor']} ({f['columns']} columns) -> {f['type']}" for f in sheet["fallbacks"]]
    rows = {
        "file": sheet["file_name"],
        "size": units.size(sheet["file_bytes"]),
        "parameters": f"{sheet['parameters']:,}",
        "bits per weight": f"{sheet['bits_per_weight']:.2f}",
        "tensor types": types,
        "expert tensors": ", ".join(f"{n} x {t}" for t, n in sheet["expert_types"].items()),
        "expert bytes": units.size(sheet["expert_bytes"]),
        "fallbacks": "; ".join(fell) or "none",
        "SHA-256": f"`{sheet['sha256']}`",
        "made by": f"{sheet['engine_version']} in {units.number(sheet['quantize_s'])} s",
        "weights": f"{sheet['weights']}, scale {sheet['scale']}",
    }
    return Table("sheet", [{"what": k, "value": v} for k, v in rows.items()])
