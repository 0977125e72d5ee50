"""What `import moelib` offers: studies as data frames, comparisons, records and headers. Nothing here writes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from moelib import frames, gguf_file, params, plan
from moelib.errors import near
from moelib.placement import REFERENCE
from moelib.record import Record as Record
from moelib.study import Study, UnknownName


def _folders() -> dict[str, Path]:
    """Name -> folder of every study that has a plan: in outputs/ (or $MOELIB_OUTPUTS), then the committed example."""
    places = (plan.outputs(), params.root() / "docs" / "example")
    folders = [p.parent for place in places for p in sorted(place.glob("*/plan.json"))]
    return {folder.name: folder for folder in reversed(folders)}


def studies() -> pd.DataFrame:
    """Every study that can be loaded, by name: its title, weights, models, quants, records and folder."""
    rows = {}
    for name, folder in sorted(_folders().items()):
        parameters = plan.read(folder / "plan.json").study
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
    folders = _folders()
    if name not in folders:
        raise UnknownName(f"no study {name!r} was measured here{near(name, sorted(folders))}")
    return Study.read(folders[name])


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each record that holds an observation; units in the columns' names. See `columns` of a study."""
    return frames.runs(records)


def compare(runs: pd.DataFrame, column: str, baseline: str = REFERENCE) -> pd.DataFrame:
    """`column` of every placement against `baseline`, paired within rounds: ratio, low and high (95 %), n.

    runs: a frame of runs, such as `load("h100-twins").runs`. Raises FrameError where they cannot be compared.
    """
    return frames.compare(runs, column, baseline)


def header(path: str | Path) -> gguf_file.Header:
    """The header of a GGUF file (of all its parts, given the first): metadata, tensors, experts' and other bytes.

    Weights are not read. Raises GGUFError for what is no whole GGUF of a model.
    """
    return gguf_file.read_header(path)
