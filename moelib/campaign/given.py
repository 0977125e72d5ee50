"""Any GGUF as a file to measure: with the manifest that moelib made it with, or as it is, with one from its header."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moelib.base import files
from moelib.catalogue import corpora, params
from moelib.catalogue.placement import Placement
from moelib.engine.engine import Engine
from moelib.gguf import gguf_file, imatrix
from moelib.measure import device
from moelib.models import models, quantize, remote, sources, weights
from moelib.models.quantize import Quantised, QuantizeError
from moelib.routing.passes import How, count
from moelib.study.plan import Cell
from moelib.study.study import Study

MATRIX_CONTEXT, MATRIX_CHUNKS = 512, 100
"""Of the text that an importance matrix is made of, which must have as much."""
CACHED = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})/(.+)$")
"""Where the Hub's own cache has a file of a repository."""


def measurable(file: Path, llama: Engine) -> Quantised:
    """The file with its manifest: the one that it was made with, if moelib made it, else `as_it_is`.

    Raises QuantizeError if it was changed since it was made, or the engine cannot load it; GGUFError.
    """
    if remote.is_address(str(file)):
        raise QuantizeError(
            f"{file} is on the Hub, and what is measured must be here: download it, for instance with `hf download "
            f"OWNER/REPO PATH`, and give the file; `moelib plan {file}` tells what it needs without a download"
        )
    if "quant" in (models.noted(file) or {}):
        return quantize.made(file)
    header = gguf_file.read_header(file)
    quantize.refuse_senseless(header, ())
    with TemporaryDirectory(prefix="moelib-given-") as scratch:
        quantize.refuse_unloadable(llama, header, Path(scratch))
    return as_it_is(header)


def catalogued(path: Path, cell: Cell, llama: Engine) -> Quantised:
    """The file of a model of the catalogue, under the names that its cell has in the study."""
    found = measurable(path, llama)
    names = {"model": cell.model, "quant": cell.quant, "scale": "full"}
    if source := sources.fetched(cell.model):
        names["origin"] = source.origin
    return replace(found, manifest=found.manifest | names)


def of_cell(study: Study, cell: Cell, llama: Engine, work: Path) -> Quantised:
    """The file of a cell, made if it is not there."""
    if path := sources.file_of(cell.model):
        return catalogued(path, cell, llama)
    p = study.parameters
    if p.twins == "direct":
        return quantize.twin(*quantize.outline_of(cell.model, p.scale), cell.quant, scale=p.scale)
    source = sources.obtain(cell.model, p.weights, p.scale, needed=False)
    if p.imatrix is None or cell.quant == (quant := params.plain(cell.quant)):
        return quantize.make(source, cell.quant, llama, work)
    matrix = imatrix.read(_matrix(source, p.imatrix, llama, device.choose(p.device, llama), work))
    found = quantize.make(source, quant, llama, work, matrix)
    return replace(found, manifest=found.manifest | {"quant": cell.quant})


def source_of(study: Study, model: str) -> Path | None:
    """What a model's files are quantised from, whole on the disk; None where its files are twins of their own, or made
    by somebody else. Raises SourceError, HubError."""
    p = study.parameters
    if p.twins == "direct" or params.model(model).file:
        return None
    return sources.whole(sources.obtain(model, p.weights, p.scale)).path


def _matrix(source: models.Source, corpus: str, llama: Engine, where: device.Device, work: Path) -> Path:
    """The importance matrix of a source over a text, made unless it is there.

    Raises ParamsError for a text that matrices are not made of, RunError where llama-imatrix fails, SourceError.
    """
    text = corpora.corpus(corpus)
    if not text.calibration:
        raise params.ParamsError(
            f"{corpus} is a text to measure on, by params/corpora.yaml: a matrix made of it would be tried on what it "
            "was made of; name one with `calibration: true`"
        )
    path = source.path.with_name(f"{source.model}-{corpus}.imatrix.gguf")
    expected = {"source_sha256": source.sha256, "corpus_sha256": text.sha256, "engine_build": llama.build}
    expected |= {"context": MATRIX_CONTEXT, "chunks": MATRIX_CHUNKS}

    def make() -> dict[str, Any]:
        whole = sources.whole(source)
        with where.session(llama, work) as session, files.replacing(path) as partial:
            how = How(text.verified(), Placement.parse("baseline"), session, where.threads, work)
            count(llama, whole.header, how, MATRIX_CONTEXT, MATRIX_CHUNKS, name="imatrix", keep=partial)
            sha256 = files.sha256(partial)
        return expected | {"sha256": sha256}

    models.once(path, expected, make)
    return path


def refuse_other(header: gguf_file.Header, cell: Cell, weights: str) -> None:
    """Raise QuantizeError unless a file is what a study says of it in its cell, by its header."""
    path, quant = header.path, cell.quant
    if quant not in (params.AS_IS, header.label):
        raise QuantizeError(f"{path.name} is {header.label}, not {quant}: write `quants: [{params.AS_IS}]`")
    if header.is_twin != (weights == "twin"):
        holds = "twin" if header.is_twin else "real"
        raise QuantizeError(f"{path.name} says that its weights are {holds}: write `weights: {holds}`")
    quantize.refuse_senseless(header, dict.fromkeys(s.placement for s in cell.specs))


def as_it_is(header: gguf_file.Header) -> Quantised:
    """A model's file, or all its files, as somebody else made them. Nothing is written beside them.

    Raises FileError if one changes while it is hashed.
    """
    parts = gguf_file.split_paths(header.path)
    sha256 = files.joint_sha256({p.name: _sha256(p) for p in parts})
    manifest = quantize.told(header, header.label, sha256) | {
        "model": header.model_name,
        "quant": header.label,
        "scale": "full",
        "weights": "twin" if header.is_twin else "real",
        "origin": origin(header.path),
        "file_name": header.path.name,
        **dict.fromkeys(("predicted_bytes", "source_sha256", "engine_build", "engine_version", "quantize_s")),
    }
    return Quantised(header, manifest, files.Hashed(*parts, known=sha256))


def origin(path: Path) -> str:
    """Where a file came from: its address on the Hub, if it lies in the Hub's cache; its name alone otherwise."""
    if m := CACHED.search(path.absolute().as_posix()):
        return f"hf:{m[1]}/{m[2]}/{m[4]}@{m[3]}"
    return f"local file {path.name}"


def _sha256(path: Path) -> str:
    """The SHA-256 of a file, from its note if size and times are those of the note; else read, with a progress bar."""
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    kept = models.folder() / "given" / key / path.name
    with models.keeping(kept.parent), models.alone(kept):
        before = files.state(path)
        known = models.noted(kept) or {}
        if known.get("file") == before:
            return str(known["sha256"])
        sha256 = weights.digest(path)
        facts = {"sha256": sha256, "file": before}
        if files.state(path) != before:
            raise files.FileError(f"{path.name} was changed while it was read: give it again when it is complete")
        files.write_json(models.note(kept), {"facts": facts, "digest": files.digest(facts)})
        return sha256
