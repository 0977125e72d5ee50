"""A study's runs as a table, used or not; and of one of them what its record says, and every check with its verdict."""

from __future__ import annotations

import pandas as pd

from moelib.base.stats import NONE, number, size
from moelib.explore.view import GB, View
from moelib.study import frames

VERDICTS = {True: "passed", False: "FAILED", None: "cannot tell"}


def table(view: View) -> pd.DataFrame:
    """A row for each record of the model and quants, by its run: status, and VRAM, tokens/s, TTFT where measured."""
    records = [r for r in view.study.records if r.spec.model == view.model and r.spec.quant in view.quants]
    seen = frames.runs(records).set_index("run_id")
    rate, ttft = f"tokens_per_s/{view.workload}", f"ttft_warm_s/{view.workload}"
    rows = []
    for r in records:
        values = seen.loc[r.run_id] if r.run_id in seen.index else {}
        rows.append(
            {
                "quant": r.spec.quant,
                "placement": r.spec.placement,
                "load mode": r.spec.load_mode,
                "round": r.spec.block + 1,
                "status": r.status,
                "tokens/s": _rounded(values.get(rate), 1),
                "VRAM, GB": _rounded(values.get("vram_bytes"), 3, GB),
                "TTFT, ms": _rounded(values.get(ttft), 1, 0.001),
                "run": r.run_id,
            }
        )
    return pd.DataFrame(rows)


def facts(view: View, run_id: str) -> pd.DataFrame:
    """What the record of a run says in short: `fact` and `value`. Raises UnknownName."""
    r = view.study.record(run_id)
    told = {
        "run": r.run_id,
        "status": ", ".join([r.status, *r.reasons]),
        "message": r.message or NONE,
        "started": r.started_utc,
        "file": f"{r.sheet.file_name}, SHA-256 {r.sheet.sha256[:12]}…, {size(r.sheet.file_bytes)}",
        "engine": r.engine.version,
        "GPU": f"{r.device.name} ({r.device.kind})",
        "host": f"{r.host.cpu}, {r.host.cpus} CPUs, RAM {number(r.host.ram_read_bytes_per_s, 1 / GB)} GB/s",
        "record": f"{view.study.name}/records/{r.run_id}.json",
        "digest": r.digest,
    }
    if r.observed:
        told |= {
            "VRAM": size(r.observed.memory.value_bytes),
            "load time": f"{number(r.observed.load_s)} s",
            "CPU threads": str(r.observed.threads),
        }
        for q in r.observed.requests:
            told[f"{q.workload} #{q.index + 1}"] = f"{number(q.tps)} tokens/s, TTFT {number(q.ttft_s, 1000)} ms"
    return pd.DataFrame(told.items(), columns=["fact", "value"])


def checks(view: View, run_id: str) -> pd.DataFrame:
    """Every check of a run's record, failed ones first: its id, verdict and finding. Raises UnknownName."""
    r = view.study.record(run_id)
    rows = [{"check": c.id, "verdict": VERDICTS[c.passed], "finding": c.measured} for c in r.audit]
    return pd.DataFrame(
        sorted(rows, key=lambda row: row["verdict"] == "passed"), columns=["check", "verdict", "finding"]
    )


def _rounded(value: float | None, digits: int, unit: float = 1) -> float | None:
    return None if value is None or pd.isna(value) else round(value / unit, digits)
