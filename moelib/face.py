"""What `import moelib` offers: studies as data frames, comparisons, records, files, single runs. It writes no study."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from moelib.audit.record import Record as Record
from moelib.campaign import bench
from moelib.catalogue import params, sizes
from moelib.catalogue.facts import LLAMA_SERVER
from moelib.catalogue.placement import REFERENCE
from moelib.forecast import preview as previews
from moelib.gguf import gguf_file
from moelib.models import quantize as quantize_file
from moelib.models import remote
from moelib.planner import budget, named
from moelib.study import frames
from moelib.study import plan as plans
from moelib.study import study as studies_on_disk
from moelib.study.study import Study
from moelib.study.study import UnknownName as UnknownName


def studies() -> pd.DataFrame:
    """Every study that can be loaded, by name: its title, weights, models, quants, records and folder."""
    rows = {}
    for name, folder in sorted(plans.measured().items()):
        parameters = plans.read(folder / "plan.json").study
        rows[name] = {
            "title": parameters.title,
            "weights": parameters.weights,
            "models": ", ".join(parameters.models),
            "quants": ", ".join(parameters.quants),
            "records": sum(1 for _ in (folder / "records").glob("*.json")),
            "folder": str(folder),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("study")


def load(name: str) -> Study:
    """The study `name`, read, verified and audited with its logs. Raises UnknownName, or StudyError without records."""
    return studies_on_disk.load(name)


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each record that holds an observation; units in the columns' names. See `columns` of a study."""
    return frames.runs(records)


def compare(runs: pd.DataFrame, column: str, baseline: str | None = None) -> pd.DataFrame:
    """`column` of every placement against `baseline`, paired within rounds: ratio, low and high (95 %), n.

    low, high: NaN where there is one round alone, and where nothing varies: there is no interval then.

    baseline: by default the placement `baseline` or, where there is none, the one with most on the GPU.

    runs: a frame of runs, such as `load("h200").runs`. Raises FrameError where they cannot be compared.
    """
    return frames.compare(runs, column, baseline)


def quantize(
    model: str, quant: str, scale: str = "full", weights: str = "twin", imatrix: str | Path | None = None
) -> Path:
    """The file of `model` at `quant`, made with its manifest unless it is there and unchanged.

    quant: any type that `llama-quantize --help` lists. weights: `twin` (random weights in the model's shape, at
    `scale`) or `real` (what `moelib fetch` brought). imatrix: a file of llama-imatrix for this model, which IQ1 and
    IQ2 need; its SHA-256 is in the manifest. A file of full size takes minutes and tens of GiB. Raises ParamsError,
    GGUFError, SourceError, QuantizeError, FileError, EngineError.
    """
    return quantize_file.from_source(model, quant, scale, weights, Path(imatrix) if imatrix else None).path


def twin(model: str, quant: str | None = None, layers: int | None = None, scale: str = "full", seed: int = 0) -> Path:
    """The geometry twin of a catalogued model, or of the header of a local GGUF (split or not), with its manifest.

    It has the header's metadata, tokenizer, tensors and types, and random weights; nothing is quantised, so it takes
    what the disk takes. quant: the types that llama-quantize would give (default: the header's own). layers: only the
    first so many. Raises ParamsError, GGUFError, QuantizeError, FileError, EngineError.
    """
    return quantize_file.twin(*quantize_file.outline_of(model, scale), quant, layers, scale, seed).path


def run(
    file: str | Path,
    placement: str = REFERENCE,
    *,
    load_mode: str = "mmap",
    workloads: Sequence[str] = bench.WORKLOADS,
    requests: int = 2,
    context: int = 1024,
    device: str = "auto",
    runner: str = LLAMA_SERVER,
    endpoint: str | None = None,
) -> Record:
    """One run of a GGUF in one placement: measured and audited as in a study.

    file: what `quantize` or `twin` made, or any local GGUF, split or not, which is measured as it is; its SHA-256 is
    noted under models/, so that it is computed once. Nothing else is kept on disk, and nothing beside the file.
    placement: `baseline`, `cpu-moe`, `n-cpu-moe=12`, with settings after commas. context: tokens. requests: of each
    workload; the first one is a fresh server's. device: auto, cuda or loopback. runner: what serves it, llama-server or
    shimmy, whose context is of 4,096 tokens. endpoint: http://127.0.0.1:PORT, a server that runs already with the file
    in this placement and is left running; its workloads are texts, such as plan-short. A run that fails is a record
    too, with its reason. That what left the GPU is what the file's header says is proven within a round of a study,
    which has a baseline beside it. Raises PlacementError, GGUFError, QuantizeError, EngineError, ShimmyError,
    EndpointError, DeviceError, and FileError while another process measures on the device.
    """
    return bench.one(
        Path(file), placement, load_mode, workloads, requests, context, device, runner=runner, endpoint=endpoint
    )


def plan(
    file: str | Path,
    vram: str,
    *,
    quant: str = params.QUANTS[0],
    ram: str | None = None,
    context: int | None = None,
    ubatch: int | None = None,
    kv: str | None = None,
) -> budget.Plan:
    """Which placement of a GGUF fits a card, told from its header in a fraction of a second; nothing is run.

    file: a path, hf:OWNER/REPO/PATH on the Hub, or a model of the catalogue at `quant`. vram, ram: sizes such as
    `12GiB`. context: tokens of prompt and answer, 8,192 or the model's by default. ubatch, kv: settings of llama.cpp.
    The plan has `.chosen` (bytes by term), `.command`, and `.frame`, a row for each number of layers. Raises PlanError
    where nothing fits, with what would; GGUFError, HubError, ParamsError, EngineError.
    """
    ram_bytes = None if ram is None else sizes.parse(ram)
    return budget.plan(named.headers(file, [quant])[0], sizes.parse(vram), ram_bytes, context, ubatch, kv)


def preview(
    file: str | Path,
    vram: str | None = None,
    *,
    quant: str | None = None,
    ram: str | None = None,
    context: int | None = None,
    ubatch: int | None = None,
    kv: str | None = None,
    scale: str = "full",
    rounds: int = previews.ROUNDS,
    device: str = "auto",
) -> previews.Preview:
    """What every placement of a model will give on this machine, predicted from audited runs of two slices of its twin.

    file: a path, hf:OWNER/REPO/PATH on the Hub, or a model of the catalogue at `quant` and `scale`; only its header is
    read. vram: of the card it is for, by default this machine's; ram, context, ubatch, kv: as in `plan`. rounds: how
    often each slice is run in each placement, 2 at least. The slices take some GiB of disk in models/ and are removed.
    The preview has `.chosen`, `.frame` (a row for each number of layers, with 95 % intervals), `.records` and
    `.evidence` (the slices' runs), `.notes` (what is not predicted, and why). Raises PreviewError, PlanError, and what
    `plan`, `twin` and `run` raise.
    """
    vram_bytes, ram_bytes = (None if size is None else sizes.parse(size) for size in (vram, ram))
    return previews.preview(file, vram_bytes, ram_bytes, context, ubatch, kv, quant, scale, rounds, device)


def header(path: str | Path) -> gguf_file.Header:
    """The header of a GGUF (of all its parts, given any of them): metadata, tensors, experts' and other bytes.

    path: a file, or hf:OWNER/REPO/PATH[@REVISION], of which only the header is downloaded, a few MB. In JupyterLab it
    shows what `moelib header` prints. Raises GGUFError for what is no whole GGUF of a model; HubError.
    """
    return remote.any_header(path)
