"""What the planner says from a header, against what the engine's buffers and the driver say when it runs.

    python benchmarks/plan_residuals.py measure FOLDER [--models qwen3-30b-a3b,...] [--layers 8] [--device cuda]
    python benchmarks/plan_residuals.py show FOLDER

Each model is the header of a published one (`shapes.py`) or a catalogued geometry at Q4_K_M, cut to its first layers
and filled with random blocks; each setting is one audited run, whose record is kept in FOLDER. `measure` goes on where
it was stopped; `show` makes the document from the records alone. Nothing in the planner was fitted to these settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import shapes

from moelib.audit import record
from moelib.base.bar import tqdm
from moelib.campaign import bench
from moelib.catalogue.placement import Placement
from moelib.engine import engine
from moelib.gguf.gguf_header import Header
from moelib.models import quantize
from moelib.planner import memory

SETTINGS = {  # placement -> context
    "baseline": 1024,
    "cpu-moe": 8192,
    "n-cpu-moe=5,ubatch=1024": 4096,
    "cpu-moe,ubatch=128,kv=q8_0": 16384,
    "cpu-moe,op-offload=off": 4096,
    "n-cpu-moe=4,ubatch=2048": 2048,
    "baseline,ubatch=256,kv=q4_0": 32768,
}
WHOLE = {"deepseek-v2-lite"}
"""Models that the engine tells by their number of layers: they are not cut."""
CATALOGUED = ("phi-3.5-moe", "deepseek-moe-16b")
QUANT = "Q4_K_M"
MIB = 1 << 20


def measure(folder: Path, models: list[str], layers: int, device: str) -> None:
    known = {(r.spec.model, r.spec.placement) for r in record.read_all(folder)[0]}
    todo = [(m, p) for m in models for p in SETTINGS if (m, p) not in known]
    for model in tqdm(dict.fromkeys(m for m, _ in todo), desc="models", disable=None):
        whole, quant = shapes.outline_of(model, QUANT)
        try:
            file = quantize.twin(model, whole, quant, None if model in WHOLE else layers).path
        except quantize.QuantizeError as err:  # this build of the engine does not load it
            print(f"{model}: {err}", file=sys.stderr)
            continue
        for placement in [p for m, p in todo if m == model]:
            context = SETTINGS[placement]
            most = whole.header.number("context_length") or context
            r = bench.one(file, placement, "mmap", ["long-512"], 1, min(context, most), device, folder)
            print(f"{model} {placement}: {r.status} {' '.join(r.reasons)}", file=sys.stderr)
        file.unlink()


def rows(folder: Path) -> Iterator[dict[str, object]]:
    """One row for each record: terms in MiB as reported, and how far the plan is from them."""
    headers: dict[str, Header] = {}
    for r in sorted(record.read_all(folder)[0], key=lambda r: (r.spec.model, list(SETTINGS).index(r.spec.placement))):
        if r.observed is None:
            continue
        model, report = r.spec.model, r.observed.report
        if model not in headers:
            headers[model] = header_of(r)
        cuda = r.device.kind == "cuda"
        beside = memory.CONTEXT_BYTES if cuda else 0
        plan = memory.need(headers[model], Placement.parse(r.spec.placement), r.spec.context, beside, cuda)
        buffers, vram = report.device_bytes(), r.observed.memory.value_bytes
        kinds = report.device_by_kind
        yield {
            "model": model,
            "architecture": headers[model].architecture,
            "placement": r.spec.placement,
            "context": r.spec.context,
            "weights, MiB": round((kinds.get("model") or 0) / MIB, 2),
            "KV, MiB": round(((kinds.get("KV") or 0) + (kinds.get("RS") or 0)) / MIB, 2),
            "compute, MiB": round((kinds.get("compute") or 0) / MIB, 2),
            "planned compute, MiB": round(plan.compute_bytes / MIB, 2),
            "buffers off, %": None if not buffers else round(100 * (plan.buffers_bytes / buffers - 1), 3),
            "VRAM, MiB": None if vram is None else round(vram / MIB, 1),
            "planned VRAM, MiB": round(plan.vram_bytes / MIB, 1),
            "VRAM off, %": None if not vram else round(100 * (plan.vram_bytes / vram - 1), 2),
            "run": r.status,
        }


def header_of(r: record.Record) -> Header:
    """The header that a record's file had, made again; its digest is the record's."""
    cut, quant = shapes.outline_of(r.spec.model, QUANT)
    if r.spec.model not in WHOLE:
        cut = cut.first_layers(int(r.spec.scale.rpartition("-")[2]))
    if quant:
        with TemporaryDirectory() as scratch:
            cut = quantize.types(engine.find(), cut, quant, Path(scratch))
    return cut.header


def document(folder: Path) -> str:
    """The residuals as a document in Markdown, from the records alone."""
    records = [r for r in record.read_all(folder)[0] if r.observed is not None]
    table = pd.DataFrame(rows(folder))
    measured = sorted({f"{r.device.name}, driver {r.device.driver}; llama.cpp {r.engine.version}" for r in records})
    commits = sorted({f"{(r.host.commit or 'unknown')[:12]}{' with changes' if r.host.dirty else ''}" for r in records})
    parts = [
        "# What the planner says, and what was measured",
        "`moelib plan` reads a header; here the same files were run. Each row is one audited run: of a published "
        "model's first layers in its shapes and types, or of a catalogued geometry at "
        f"{QUANT}, with random weights. Nothing in the planner was fitted to these settings: its compute buffers "
        "follow llama.cpp's allocator, and the GPU's own context is one number, from the committed studies. "
        "One rule was read in llama.cpp's source only after two of these rows (GLM-4.5-Air's baselines, 0.54 %) had "
        "shown that it was missing: CUDA computes a shared expert with the others where they are alike.",
        f"Measured on: {'; '.join(measured)}; moelib {', '.join(commits)}. "
        f"Records: `{folder.as_posix()}`; made by `python benchmarks/plan_residuals.py`.",
    ]
    for column, what in (("buffers off, %", "the engine's buffers"), ("VRAM off, %", "VRAM by the driver")):
        off = table[column].abs()
        parts.append(
            f"- {what}: {off.median():.3f} % off in the median of {off.notna().sum()} runs, {off.max():.3f} % at most"
        )
    return "\n\n".join(parts).replace("\n\n- VRAM", "\n- VRAM") + "\n\n" + table.to_markdown(index=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "show"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default=",".join([*shapes.MODELS, *CATALOGUED]))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "loopback"))
    given = parser.parse_args()
    if given.what == "measure":
        measure(given.folder, given.models.split(","), given.layers, given.device)
    print(document(given.folder), end="")


if __name__ == "__main__":
    main()
