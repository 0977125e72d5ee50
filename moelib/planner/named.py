"""Headers and outlines by any name: a file, an address on the Hub, or a catalogued model at the quants of studies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from moelib.catalogue import params
from moelib.engine import engine
from moelib.gguf.gguf_header import Header
from moelib.gguf.outline import Outline
from moelib.models import quantize, remote, sources


def headers(what: str | Path, quants: Sequence[str] = params.QUANTS, scale: str = "full") -> list[Header]:
    """The header of a file, or of one on the Hub; of a catalogued model at a scale those that its quants will have.

    A model's come from its geometry and llama-quantize's dry run, without a file. Raises GGUFError, HubError,
    ParamsError, EngineError where there is no llama-quantize for a model.
    """
    if file := _file(what):
        return [remote.any_header(file)]
    name, whole = quantize.outline_of(str(what), scale)
    llama = engine.find()
    with TemporaryDirectory(prefix="moelib-plan-") as scratch:
        made = [quantize.types(llama, whole, quant, Path(scratch)).header for quant in quants]
    return [replace(h, path=Path(f"{name}-{quant}.gguf")) for h, quant in zip(made, quants, strict=True)]


def outline(what: str | Path, quant: str | None = None, scale: str = "full") -> tuple[str, Outline]:
    """(name of the model, the outline of its file): what its twin, or a slice of it, is written from.

    quant: the types that llama-quantize would give; default: a file's own, the first of studies' quants for a model of
    the catalogue. Raises what `headers` does; QuantizeError for a quant of a file that has one.
    """
    if remote.is_address(str(what)):
        whole = remote.outline(str(what))
        name = whole.header.model_name
    else:
        name, whole = quantize.outline_of(str(what), scale)
        quant = quant or (None if _file(what) else params.QUANTS[0])
    if quant is None:
        return name, whole
    with TemporaryDirectory(prefix="moelib-plan-") as scratch:
        return name, quantize.types(engine.find(), whole, quant, Path(scratch))


def _file(what: str | Path) -> str | None:
    """The path or address of what is a file, or of the file that a catalogued model is; None of other models."""
    if remote.is_address(str(what)) or str(what).endswith(".gguf") or Path(what).exists():
        return str(what)
    return sources.any_file_of(str(what))
