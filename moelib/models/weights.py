"""Whether a file holds a model's published weights, by its header, never its name."""

import hashlib
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from moelib.base.bar import tqdm
from moelib.catalogue import params
from moelib.gguf import gguf_file, gguf_header, twin

UNQUANTISED = ("F16", "BF16", "F32")
"""In order of preference: the type that the plan names, one as good, and one that is larger than necessary."""
SHAPE = ("block_count", "embedding_length", "feed_forward_length", "expert_count", "expert_used_count")
ABOUT = 0.02  # publishers pad vocabularies by a few percent; an incomplete model lacks far more
CONVERT = "convert_hf_to_gguf.py FOLDER --outtype f16 --outfile FILE"
"""The command of llama.cpp that makes a GGUF from a folder of safetensors."""


class SourceError(params.UserError):
    """A model's source cannot be obtained or is not valid; the message says why and what to do."""


def require(model: str, header: gguf_file.Header) -> None:
    """Raise SourceError unless the file holds the model's weights, complete and unquantised."""
    if why := why_not(model, header):
        raise SourceError(f"{header.path.name} is not {model}: {'; '.join(why)}. Give its F16 GGUF")


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
