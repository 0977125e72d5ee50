"""What `moelib preview` predicts from two slices of a model, against runs of the whole of it on the same machine.

    python benchmarks/preview_residuals.py measure FOLDER [--cells deepseek-moe-16b/Q4_K_M] [--device cuda]
    python benchmarks/preview_residuals.py show FOLDER

A model is one of the catalogue, or a published one whose header `shapes.py` has. `measure` runs the slices, and the
whole twin in five placements, at load mode none as a preview does; all records are kept in FOLDER, and it goes on where
it was stopped. `show` makes the document from the records alone: the slices' runs are fitted as in a preview, and
nothing of the whole's runs is used for it. It also compares with a committed study of another machine of that kind.
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
import shapes

import moelib
from moelib.audit import record
from moelib.audit.record import Record
from moelib.base import stats
from moelib.base.bar import tqdm
from moelib.campaign import bench
from moelib.catalogue.placement import Placement
from moelib.engine import engine
from moelib.engine.client import WARM_UP
from moelib.forecast import predict, slices
from moelib.forecast.slices import LOAD_MODE, REQUESTS, RUN_CONTEXT, WORKLOAD, Model
from moelib.measure import device
from moelib.models import models, quantize
from moelib.planner import memory, named

CELLS = (
    "deepseek-moe-16b/Q4_K_M",
    "qwen3-30b-a3b/Q4_K_M",
    "phi-3.5-moe/Q4_K_M",
    "deepseek-moe-16b/Q8_0",
    "gpt-oss-20b/MXFP4_MOE",
    "deepseek-moe-16b/Q2_K",
    "phi-3.5-moe/Q2_K",
    "phi-3.5-moe/Q8_0",
)
ROUNDS, WHOLE_ROUNDS = 3, 2
BETWEEN = (0.25, 0.5, 0.75)
"""Of the layers with experts: placements of the whole between both ends."""
COMMITTED, OF_COMMITTED = "h100-twins", "long-512"
"""A study, and the workload of it that is compared: the text of its prompt repeats, so slices are asked for it too."""
WHOLE = 0
"""What stands for all layers of a model, where a slice has its number."""
HISTORY = (
    "Prompts of different tokens, medians and the lengths of slices were chosen after two earlier series, which "
    "are not kept: tokens/s was 8.5 % and 6.0 % off in the median there. After the runs below one rule was taken back: "
    "that a prompt's last layer, of which the engine computes one token, does not count. The slices of all four models "
    "spread less without it; with it TTFT was 8.0 % off in the median, 21 % at most."
)
BOTH = ("ms a token", "TTFT, ms")


def model_of(name: str, quant: str, scale: str) -> Model:
    """A published model in its own types, or one of the catalogue at a quant and scale."""
    if name in shapes.MODELS:
        return Model(name, shapes.outline_of(name, quant)[0])
    return Model(*named.outline(name, quant, scale))


def placements(model: Model) -> list[Placement]:
    """Of the whole: both ends, and three between them."""
    first, count = model.header.expert_layers[0], len(model.header.expert_layers)
    between = [float(first + round(share * count)) for share in BETWEEN]
    return [Placement(n, LOAD_MODE) for n in (0.0, *between, float("inf"))]


def is_slice(r: Record) -> bool:
    return "-first-" in r.spec.scale


def measure(folder: Path, cells: Sequence[str], scale: str, rounds: int, whole_rounds: int, kind: str) -> None:
    """Every run that FOLDER has no record of: slices and whole of a model in random order, round by round, so that a
    machine that changes does so for both. A placement of the whole that does not fit this machine is left out."""
    where = device.choose(kind, engine.find())
    for cell in cells:
        name, _, quant = cell.partition("/")
        model = model_of(name, quant, scale)
        done = [r for r in record.read_all(folder)[0] if r.cell == f"{name}/{model.header.label}"]
        best, at = slices.choose(model, Placement(0), where.kind)
        lengths = sorted({slices.length(r) for r in done if is_slice(r)}) or best
        parts = [(n, p) for n in lengths for p in at]
        whole = [(WHOLE, p) for p in fitting(model, where.kind)]
        known = {(slices.length(r) if is_slice(r) else WHOLE, str(r.spec.placed), r.spec.block) for r in done}
        order, todo = random.Random(1), []
        for block in range(max(rounds, whole_rounds)):
            asked = (parts if block < rounds else []) + (whole if block < whole_rounds else [])
            shuffled = order.sample(asked, len(asked))
            todo += [(n, p, block, i) for i, (n, p) in enumerate(shuffled) if (n, str(p), block) not in known]
        if todo:
            run(folder, model, todo, where.kind)


def run(folder: Path, model: Model, todo: Sequence[tuple[int, Placement, int, int]], kind: str) -> None:
    """Write the files, do the runs, and remove the files."""
    models.folder().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="residuals-", dir=models.folder()) as scratch:
        files = {n: written(model, n, Path(scratch)) for n in sorted({n for n, *_ in todo})}
        with bench.opened(list(files.values()), kind) as ready:
            benches = dict(zip(files, ready, strict=True))
            for n, placement, block, i in tqdm(todo, desc=f"runs of {model.name}", unit="run", disable=None):
                too = (OF_COMMITTED,) if n != WHOLE and model.name not in shapes.MODELS else ()
                at = str(placement), LOAD_MODE, (WORKLOAD, *too), REQUESTS, RUN_CONTEXT, folder, block, i
                print(benches[n].measure(*at).line, file=sys.stderr)


def written(model: Model, layers: int, folder: Path) -> Path:
    if layers != WHOLE:
        return slices.written(model, layers, folder)
    return quantize.twin(model.name, model.outline, out=folder / f"{model.name}.gguf").path


def fitting(model: Model, kind: str) -> list[Placement]:
    """The placements of the whole that the card here holds."""
    room = device.card_bytes() if kind == "cuda" else None
    needs = {p: memory.need(model.header, p, RUN_CONTEXT).vram_bytes for p in placements(model)}
    return [p for p, vram in needs.items() if room is None or vram < room]


def predictions(
    folder: Path, scale: str, workload: str = WORKLOAD
) -> Iterator[tuple[Model, tuple[predict.Fit, predict.Fit], list[Record]]]:
    """(model, what its slices tell of a token and of a prompt, the usable runs of the whole), a cell at a time, of
    those whose slices have the workload."""
    records = record.read_all(folder)[0]
    for name, quant in sorted({(r.spec.model, r.spec.quant) for r in records}):
        own = [r for r in records if (r.spec.model, r.spec.quant) == (name, quant)]
        model = model_of(name, quant, scale)
        parts = [r for r in own if is_slice(r) and workload in r.spec.workloads]
        if parts:
            yield model, slices.fits(model, parts, workload), [r for r in own if not is_slice(r) and r.done]


def compared(
    model: Model, fits: Sequence[predict.Fit], placement: Placement, runs: Sequence[Record], workload: str = WORKLOAD
) -> dict[str, object]:
    """A row: one placement as predicted, and as the runs of the whole were."""
    row: dict[str, object] = {"model": model.name, "quant": model.header.label, "placement": str(placement)}
    layers, times = model.counted(model.header, placement), [slices.measured(r, workload) for r in runs]
    for i, (what, fit) in enumerate(zip(BOTH, fits, strict=True)):
        told, seen = fit.at(layers), [t[i] for t in times]
        row[f"{what}, predicted"] = stats.estimate(told, 1000)
        row[f"{what}, measured"] = stats.number(fmean(seen), 1000)
        row[f"{what}, off, %"] = None if told is None else round(100 * predict.off(told.value, seen), 1)
        if told is not None:
            inside = sum((told.low or 0) <= s <= (told.high or 0) for s in seen)
            row[f"{what}, runs in the interval"] = f"{inside} of {len(seen)}"
    return row


def same_machine(folder: Path, scale: str) -> pd.DataFrame:
    """One row for each placement of each whole."""
    rows = []
    for model, fits, wholes in predictions(folder, scale):
        for placement in sorted({r.spec.placed for r in wholes}, key=lambda p: p.order):
            rows.append(compared(model, fits, placement, [r for r in wholes if r.spec.placed == placement]))
    return pd.DataFrame(rows)


def committed(folder: Path, scale: str) -> pd.DataFrame:
    """One row for each placement of the committed study that loads as slices do, or has nothing to load to the CPU."""
    used, rows = moelib.load(COMMITTED).used, []
    for model, fits, _ in predictions(folder, scale, OF_COMMITTED):
        own = [r for r in used if r.cell == f"{model.name}/{model.header.label}"]
        for label, placement in (("baseline/mmap", Placement(0)), ("cpu-moe/none", Placement(float("inf"), LOAD_MODE))):
            if runs := [r for r in own if r.spec.label == label]:
                rows.append(compared(model, fits, placement, runs, OF_COMMITTED))
    return pd.DataFrame(rows)


def durations(folder: Path) -> pd.DataFrame:
    """How long the runs of each model's slices took."""
    parts = [r for r in record.read_all(folder)[0] if is_slice(r) and r.observed is not None]
    rows = []
    for cell in sorted({r.cell for r in parts}):
        own = [r for r in parts if r.cell == cell]
        lengths = " and ".join(map(str, sorted({slices.length(r) for r in own})))
        took = round(sum(r.observation.wall_s for r in own))
        usable = sum(r.done for r in own)
        rows.append({"model": cell, "layers of the slices": lengths, "runs": len(own), "usable": usable, "s": took})
    return pd.DataFrame(rows)


def errors(table: pd.DataFrame) -> str:
    """How far the predictions of a table are off, a line for each of what is predicted."""
    lines = []
    for what in BOTH:
        off = table[f"{what}, off, %"].astype(float).abs()
        lines.append(
            f"- {what}: {off.median():.1f} % off in the median of {off.notna().sum()} placements, {off.max():.1f} % "
            "at most"
        )
    return "\n".join(lines)


def document(folder: Path, scale: str) -> str:
    """The residuals as a document in Markdown, from the records alone."""
    records = [r for r in record.read_all(folder)[0] if r.done]
    same = same_machine(folder, scale)
    machines = sorted({f"{r.device.name}, {r.host.cpus} CPUs ({r.host.cpu})" for r in records})
    hosts = len({r.host.host_id for r in records})
    loopback = any(r.device.kind == "loopback" for r in records)
    said = " **Rehearsed on the loopback device: these are no speeds of a GPU.**" if loopback else ""
    engines = ", ".join(sorted({r.engine.version for r in records}))
    commits = sorted({f"{(r.host.commit or 'unknown')[:12]}{' with changes' if r.host.dirty else ''}" for r in records})
    parts = [
        "# What a preview predicts, and what was measured",
        f"Twins cut to their first layers predict the whole twin on the same machine, load mode {LOAD_MODE}, workload "
        f"{WORKLOAD}, random weights. A token's time is the median after the first {WARM_UP}; TTFT is that of warm "
        "requests; slices and whole were run in random order. "
        f"Intervals are for one run (95 %). Nothing of the whole's runs is used for a prediction.{said}",
        HISTORY,
        f"Measured on: {'; '.join(machines)} ({hosts} machine{'s' * (hosts > 1)}); llama.cpp {engines}; moelib "
        f"{', '.join(commits)}. Records: `{folder.as_posix()}`, {len(records)} used; made by `python "
        "benchmarks/preview_residuals.py`.",
        errors(same),
        same.to_markdown(index=False),
        "## What a preview costs",
        "The runs of the slices together, those of models of the catalogue with a second workload; writing the slices "
        "comes before it.",
        durations(folder).to_markdown(index=False),
    ]
    other = committed(folder, scale) if scale == "full" and not loopback else pd.DataFrame()
    if len(other):
        parts += [
            f"## Against the committed study {COMMITTED}",
            f"Predictions for its workload {OF_COMMITTED}, whose prompt repeats one sentence, against its runs: made "
            "days before on another machine of that kind, with an earlier version of moelib and with twins whose "
            "embeddings were smaller. Machines of that kind differ by some 10 % among themselves.",
            errors(other),
            other.to_markdown(index=False),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "show"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", default=",".join(CELLS), help="MODEL/QUANT,MODEL/QUANT")
    parser.add_argument("--scale", default="full", help="full, or one that models.yaml names")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the slices")
    parser.add_argument("--whole-rounds", type=int, default=WHOLE_ROUNDS)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "loopback"))
    given = parser.parse_args()
    if given.what == "measure":
        at = given.scale, given.rounds, given.whole_rounds, given.device
        measure(given.folder, given.cells.split(","), *at)
    print(document(given.folder, given.scale), end="")


if __name__ == "__main__":
    main()
