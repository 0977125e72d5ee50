"""GGUF files as publishers lay them out beside each other: a model in every type and cut, and what is no model."""

import tempfile
from pathlib import Path

import numpy as np
import yaml
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quant_shape_to_byte_shape

from moelib.catalogue import params
from moelib.gguf import twin

LLAMA_KEYS = "block_count context_length embedding_length feed_forward_length expert_count expert_used_count".split()


def catalogued(home, title="T", publisher="a", original="a/t"):
    """Put a model `toy` into the home's catalogue, the smallest that it can have of its kind; returns its geometry."""
    geometry = params.model("deepseek-moe-16b").at_scale("nano")
    upstream = {"publisher": publisher, "original": original}
    entry = {"toy": {"title": title, "geometry": geometry.model_dump(), "upstream": upstream}}
    path = home / "params/models.yaml"
    path.write_text(path.read_text(encoding="utf-8") + yaml.safe_dump(entry), encoding="utf-8")
    params._yaml.cache_clear()
    return geometry


def gguf(geometry, kind="F16", arch=None, keep=lambda name: True, filling=1, general=None, **keys):
    """The bytes of a GGUF of `geometry` with matrices of type `kind`, whose values are all the same.

    `keep`: which tensors there are. `general`, `keys`: metadata instead of what there would be, the latter below the
    architecture's name; None leaves one out.
    """
    arch = arch or geometry.architecture
    metadata = {f"general.{k}": v for k, v in ({"name": "Toy", "type": "model"} | (general or {})).items()}
    metadata |= {f"{arch}.{k}": v for k, v in ({k: getattr(geometry, k) for k in LLAMA_KEYS} | keys).items()}
    nameless = metadata.get("general.architecture", arch) is None
    return _file(
        None if nameless else arch, metadata, [t for t in twin.tensors(geometry) if keep(t.name)], kind, filling
    )


def twin_as_a_model(path, geometry):
    """Write a twin under another name, as if its weights were somebody's: it has a vocabulary, and runs."""
    twin.write(path, geometry, title="Toy")
    with path.open("r+b") as f:
        head = f.read(1 << 20)
        for old in ("geometry twin", twin.DESCRIPTION):
            assert head.count(old.encode()) == 1
            head = head.replace(old.encode(), old.upper().encode())
        f.seek(0)
        f.write(head)


def split(geometry, count, kind="F16", filling=1):
    """The bytes of a model's files, the first without tensors, as llama.cpp's tool cuts it."""
    tensors = twin.tensors(geometry)
    parts = [[], *(tensors[i :: count - 1] for i in range(count - 1))]
    metadata = {"general.name": "Toy", **{f"{geometry.architecture}.{k}": getattr(geometry, k) for k in LLAMA_KEYS}}
    numbers = {"split.count": count, "split.tensors.count": len(tensors)}
    return [
        _file(
            geometry.architecture if not i else None,
            {**(metadata if not i else {}), **numbers, "split.no": i},
            p,
            kind,
            filling,
        )
        for i, p in enumerate(parts)
    ]


def _file(arch, keys, tensors, kind, filling):
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "x.gguf"
        w = GGUFWriter(path, arch or "none")
        if arch is None:
            del w.kv_data[0]["general.architecture"]
        for key, value in keys.items():
            if isinstance(value, str):
                w.add_string(key, value)
            elif isinstance(value, list):
                w.add_array(key, value)
            elif value is not None:
                w.add_uint32(key, value)
        for t in tensors:
            matrix = len(t.shape) > 1 and not t.name.endswith("ffn_gate_inp.weight")
            type_ = GGMLQuantizationType[kind if matrix and t.shape[0] % 32 == 0 else "F32"]
            if type_.name in ("F16", "F32"):
                dtype = {"F16": np.float16, "F32": np.float32}[type_.name]
                w.add_tensor(t.name, np.full(t.shape[::-1], filling / 64, dtype))
            else:
                shape = quant_shape_to_byte_shape(t.shape[::-1], type_)
                w.add_tensor(t.name, np.full(shape, filling, np.uint8), raw_dtype=type_)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        return path.read_bytes()
