"""Whether a file holds a model's published weights, by its header, never its name; and such a file from safetensors."""

import hashlib
import os
import shlex
import shutil
import sys
from collections import Counter
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moelib.base import files
from moelib.base.bar import tqdm
from moelib.catalogue import params
from moelib.engine import engine
from moelib.gguf import gguf_file, gguf_header, twin
from moelib.machine import process

UNQUANTISED = ("F16", "BF16", "F32")
"""In order of preference: the type that the plan names, one as good, and one that is larger than necessary."""
SHAPE = ("block_count", "embedding_length", "feed_forward_length", "expert_count", "expert_used_count")
ABOUT = 0.02  # publishers pad vocabularies by a few percent; an incomplete model lacks far more
CONVERTER = "convert_hf_to_gguf.py"
CONVERT_S, CONVERT_BYTES_PER_S = 600.0, 5e6  # far slower than any machine measured, so that only a hang is ended


class SourceError(params.UserError):
    """A model's source cannot be obtained or is not valid; the message says why and what to do."""


def require(model: str, header: gguf_file.Header, name: str = "") -> None:
    """Raise SourceError unless the file holds the model's weights, complete and unquantised."""
    if why := why_not(model, header):
        raise SourceError(f"{name or header.path.name} is not {model}: {'; '.join(why)}. Give its F16 GGUF")


def digest(path: Path) -> str:
    """SHA-256 of a large file, with a progress bar."""
    digest = hashlib.sha256()
    bar: dict[str, Any] = {"total": path.stat().st_size, "desc": f"checking {path.name}"}
    bar |= {"unit": "B", "unit_scale": True}
    with path.open("rb") as f, tqdm(**bar, disable=None, leave=False) as shown:
        while chunk := f.read(1 << 24):
            digest.update(chunk)
            shown.update(len(chunk))
    return digest.hexdigest()


def kind(header: gguf_file.Header) -> str:
    """The unquantised type of most of the file's bytes."""
    nbytes: Counter[str] = Counter()
    for t in header.tensors:
        nbytes[t.type] += t.nbytes
    return max(UNQUANTISED, key=lambda k: nbytes[k])


def least_bytes(model: str) -> int:
    """The fewest bytes that the unquantised model could have."""
    return twin.nbytes(params.model(model).at_scale("full")) // 2


def why_not(model: str, header: gguf_file.Header) -> list[str]:
    """Why the file does not hold the model's published weights, complete and unquantised; empty if it does."""
    geometry, metadata = params.model(model).at_scale("full"), header.metadata
    if header.kind != "model":
        return [f"it is {gguf_file.NOT_MODELS[header.kind][0]}"]
    general_type, arch = metadata.get("general.type", "model"), metadata.get("general.architecture")
    wrong = [f"it is of type {general_type!r:.40}, not a model"] if general_type != "model" else []
    if arch != geometry.architecture:
        return [*wrong, f"architecture {arch!s:.40}, not {geometry.architecture}"]
    shape = {k: metadata.get(f"{arch}.{k}") for k in SHAPE}
    wrong += [
        f"{k} {v!s:.40}, not {getattr(geometry, k)}" for k, v in shape.items() if not _same(v, getattr(geometry, k))
    ]
    if header.is_twin or str(metadata.get("general.description")).startswith(twin.DESCRIPTION):
        wrong.append("its weights are random: it is a geometry twin")
    if others := {t: n for t, n in header.type_counts.items() if t not in UNQUANTISED}:
        wrong.append(f"it is quantised ({', '.join(f'{n} tensors {t}' for t, n in others.items())})")
    return wrong or _lacks(geometry, header)


def _same(value: Any, expected: int) -> bool:
    return type(value) is int and value == expected  # True must not count as 1


def _lacks(geometry: params.Geometry, header: gguf_file.Header) -> list[str]:
    """What a file of the right shape lacks of the model; one with only a vocabulary or a draft has the same shape."""
    planned = twin.tensors(geometry)
    experts: Counter[int | None] = Counter()
    for t in planned:
        if m := gguf_header.EXPERT_TENSOR.match(t.name):
            experts[int(m[1])] += prod(t.shape)
    for tensor in header.tensors:
        if tensor.is_expert and tensor.name.endswith(".weight"):
            experts[tensor.block] -= prod(tensor.shape)
    if differing := [str(block) for block, n in sorted(experts.items(), key=str) if n]:
        layers = f"{len(differing)} layer(s), the first of them layer {differing[0]}"
        return [f"it is not whole: the expert tensors differ from the model's in {layers}"]
    share = header.parameters / sum(prod(t.shape) for t in planned)
    return [f"it is not whole: it has {share:.1%} of the model's weights"] if abs(share - 1) > ABOUT else []


def _converter() -> list[str]:
    """Command of llama.cpp's converter: $MOELIB_CONVERTER, or the script above the engine's folder. Raises SourceError.

    The variable holds the script's path, or a command such as "/its/python /its/convert_hf_to_gguf.py" to run the
    script with another Python that has its requirements.
    """
    setting = os.environ.get("MOELIB_CONVERTER", "")
    try:
        named = shlex.split(setting)
    except ValueError as err:
        raise SourceError(
            f"MOELIB_CONVERTER is {setting!r}, which is not a command ({err}): set it to the script's path"
        ) from None
    if named[:-1] and not shutil.which(named[0]):
        raise SourceError(
            f"MOELIB_CONVERTER names {named[0]}, which is not a program: set it to the script's path alone"
        )
    build = engine.find().folder if not named else Path()
    for path in [Path(named[-1])] if named else [p / CONVERTER for p in (build, *build.parents[:3])]:
        if path.is_file():
            return [*(named[:-1] or [sys.executable]), str(path)]
    raise SourceError(
        f"safetensors are converted by llama.cpp's {CONVERTER}, which was not found"
        f"{' at ' + named[-1] if named else ''}: take it and its folder from the source of the llama.cpp in use, "
        "install its requirements, and set MOELIB_CONVERTER to its path"
    )


def safetensors(given: Path) -> dict[str, list[int]]:
    """Name -> size and time of each file of a folder of safetensors. Raises SourceError."""
    shards = {p.name: p.stat() for p in sorted(given.glob("*.safetensors")) if p.is_file()}
    config = given / "config.json"
    if not sum(s.st_size for s in shards.values()) or not config.is_file():
        raise SourceError(f"{given} lacks config.json or *.safetensors: give a folder with a model from the Hub")
    return {name: [s.st_size, s.st_mtime_ns] for name, s in {**shards, config.name: config.stat()}.items()}


def convert(model: str, given: Path, path: Path) -> str:
    """Convert the folder `given` to `path`; return its SHA-256. Raises SourceError if the result is not the model."""
    nbytes = sum(size for size, _ in safetensors(given).values())
    command = _converter()
    files.need_space(path.parent, nbytes, f"converting {given.name}")
    limit_s = process.patience(CONVERT_S + nbytes / CONVERT_BYTES_PER_S)
    with files.replacing(path) as partial, TemporaryDirectory() as scratch:
        argv = [*command, str(given.resolve()), "--outtype", "f16", "--outfile", str(partial)]
        with process.Child(argv, Path(scratch) / "convert.log", process.environment(Path(scratch))) as child:
            child.wait_end(limit_s)
            log_tail = child.tail()
        if (code := child.stop().code) or not partial.exists():
            raise SourceError(f"{CONVERTER} ended with {code} on {given.name}; its log ends:\n{log_tail}")
        require(model, gguf_file.read_header(partial), f"the GGUF converted from {given.name}")
        return digest(partial)
