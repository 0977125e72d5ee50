"""What `moelib preview` predicts from two slices of a model, against runs of the whole of it on the same machine.

    python benchmarks/preview_residuals.py measure FOLDER [--models deepseek-moe-16b] [--quants Q4_K_M] [--device cuda]
    python benchmarks/preview_residuals.py show FOLDER

`measure` runs the slices, then the whole twin in five placements, at load mode none as a preview does; all records are
kept in FOLDER, and it goes on where it was stopped. `show` makes the document from the records alone: the slices' runs
are fitted as in a preview, and nothing of the whole's runs is used for it.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import pandas as pd

from moelib.audit import record
from moelib.audit.record import Record
from moelib.base import stats
from moelib.base.bar import tqdm
from moelib.campaign import bench
from moelib.catalogue.placement import Placement
from moelib.engine import engine
from moelib.forecast import predict, slices
from moelib.forecast.slices import LOAD_MODE, REQUESTS, RUN_CONTEXT, WORKLOAD, Model
from moelib.measure import device
from moelib.models import models, quantize
from moelib.planner import memory, named

CATALOGUED = ("deepseek-moe-16b", "phi-3.5-moe")
QUANTS = ("Q4_K_M", "Q8_0")
ROUNDS = 3
BETWEEN = (0.25, 0.5, 0.75)
"""Of the layers with experts: placements of the whole between both ends."""


def placements(model: Model) -> list[Placement]:
    """Of the whole: both ends, and three between them."""
    first, count = model.header.expert_layers[0], len(model.header.expert_layers)
    between = [float(first + round(share * count)) for share in BETWEEN]
    return [Placement(n, LOAD_MODE) for n in (0.0, *between, float("inf"))]


def is_slice(r: Record) -> bool:
    return "-first-" in r.spec.scale


def measure(folder: Path, names: Sequence[str], quants: Sequence[str], scale: str, rounds: int, kind: str) -> None:
    """Every run that FOLDER has no record of; what does not fit this machine is said and left out."""
    where = device.choose(kind, engine.find())
    for name in names:
        for quant in quants:
            model = Model(*named.outline(name, quant, scale))
            done = [r for r in record.read_all(folder)[0] if (r.spec.model, r.spec.quant) == (name, quant)]
            parts = [r for r in done if is_slice(r)]
            best, at = slices.choose(model, Placement(0), where.kind)
            lengths = sorted({slices.length(r) for r in parts}) or best
            slices.measure(model, lengths, at, rounds, where.kind, folder, parts)
            known = {(r.spec.placement, r.spec.block) for r in done if not is_slice(r)}
            whole(folder, model, rounds, where.kind, known)


def whole(folder: Path, model: Model, rounds: int, kind: str, known: set[tuple[str, int]]) -> None:
    """Run the whole twin in every placement that fits, once a round, in random order."""
    room = device.card_bytes() if kind == "cuda" else None
    needs = {p: memory.need(model.header, p, RUN_CONTEXT).vram_bytes for p in placements(model)}
    fitting = [p for p, vram in needs.items() if room is None or vram < room]
    order, todo = random.Random(1), []
    for block in range(rounds):
        shuffled = order.sample(fitting, len(fitting))
        todo += [(p, block, i) for i, p in enumerate(shuffled) if (str(p), block) not in known]
    if not todo:
        return
    models.folder().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="whole-", dir=models.folder()) as scratch:
        path = quantize.twin(model.name, model.outline, out=Path(scratch) / f"{model.name}.gguf").path
        for placement, block, i in tqdm(todo, desc=f"runs of {model.name}", unit="run", disable=None):
            at = str(placement), LOAD_MODE, [WORKLOAD], REQUESTS, RUN_CONTEXT, kind, folder, block, i
            print(bench.one(path, *at).line, file=sys.stderr)


def rows(folder: Path, scale: str) -> Iterator[dict[str, object]]:
    """One row for each placement of a whole: predicted from the slices' records, and measured."""
    records = record.read_all(folder)[0]
    for name, quant in sorted({(r.spec.model, r.spec.quant) for r in records}):
        own = [r for r in records if (r.spec.model, r.spec.quant) == (name, quant)]
        model = Model(*named.outline(name, quant, scale))
        fits = slices.fits(model, [r for r in own if is_slice(r)])
        wholes = [r for r in own if not is_slice(r) and r.done]
        for placement in sorted({r.spec.placed for r in wholes}, key=lambda p: p.order):
            row: dict[str, object] = {"model": name, "quant": quant, "placement": str(placement)}
            layers = model.counted(model.header, placement)
            times = [slices.measured(r) for r in wholes if r.spec.placed == placement]
            for i, (what, fit) in enumerate(zip(("ms a token", "TTFT, ms"), fits, strict=True)):
                told, seen = fit.at(layers), [t[i] for t in times]
                row[f"{what}, predicted"] = stats.estimate(told, 1000)
                row[f"{what}, measured"] = stats.number(fmean(seen), 1000)
                row[f"{what}, off, %"] = None if told is None else round(100 * predict.off(told.value, seen), 1)
                if told is not None:
                    inside = sum((told.low or 0) <= s <= (told.high or 0) for s in seen)
                    row[f"{what}, runs in the interval"] = f"{inside} of {len(seen)}"
            yield row


def document(folder: Path, scale: str) -> str:
    """The residuals as a document in Markdown, from the records alone."""
    records = [r for r in record.read_all(folder)[0] if r.done]
    table = pd.DataFrame(rows(folder, scale))
    machines = sorted({f"{r.device.name}, {r.host.cpus} CPUs ({r.host.cpu})" for r in records})
    loopback = any(r.device.kind == "loopback" for r in records)
    said = " **Rehearsed on the loopback device: these are no speeds of a GPU.**" if loopback else ""
    lengths = sorted({slices.length(r) for r in records if is_slice(r)})
    engines = ", ".join(sorted({r.engine.version for r in records}))
    parts = [
        "# What a preview predicts, and what was measured",
        f"Twins cut to their first {', '.join(map(str, lengths))} layers predict the whole twin on the same machine, "
        f"load mode {LOAD_MODE}, workload {WORKLOAD}. Intervals are for one run (95 %). Nothing of the whole's runs is "
        f"used for a prediction.{said}",
        f"Measured on: {'; '.join(machines)}; llama.cpp {engines}. Records: `{folder.as_posix()}`, {len(records)} "
        "used; made by `python benchmarks/preview_residuals.py`.",
    ]
    for what in ("ms a token", "TTFT, ms"):
        off = table[f"{what}, off, %"].astype(float).abs()
        count, median = off.notna().sum(), off.median()
        parts.append(f"- {what}: {median:.1f} % off in the median of {count} placements, {off.max():.1f} % at most")
    return "\n\n".join(parts).replace("\n\n- TTFT", "\n- TTFT") + "\n\n" + table.to_markdown(index=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "show"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default=",".join(CATALOGUED))
    parser.add_argument("--quants", default=",".join(QUANTS))
    parser.add_argument("--scale", default="full", help="full, or one that models.yaml names")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "loopback"))
    given = parser.parse_args()
    if given.what == "measure":
        at = given.models.split(","), given.quants.split(","), given.scale, given.rounds, given.device
        measure(given.folder, *at)
    print(document(given.folder, given.scale), end="")


if __name__ == "__main__":
    main()
