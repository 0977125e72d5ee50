"""Headers by any name: a file, an address on the Hub, or a catalogued model at the quants of studies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from moelib.catalogue import params
from moelib.engine import engine
from moelib.gguf.gguf_header import Header
from moelib.models import quantize, remote


def headers(what: str | Path, quants: Sequence[str] = params.QUANTS) -> list[Header]:
    """The header of a file, or of one on the Hub; of a catalogued model those that its quants will have.

    A model's come from its geometry and llama-quantize's dry run, without a file. Raises GGUFError, HubError,
    ParamsError, EngineError where there is no llama-quantize for a model.
    """
    if remote.is_address(str(what)) or str(what).endswith(".gguf") or Path(what).exists():
        return [remote.any_header(what)]
    name, whole = quantize.outline_of(str(what))
    llama = engine.find()
    with TemporaryDirectory(prefix="moelib-plan-") as scratch:
        made = [quantize.types(llama, whole, quant, Path(scratch)).header for quant in quants]
    return [replace(h, path=Path(f"{name}-{quant}.gguf")) for h, quant in zip(made, quants, strict=True)]
