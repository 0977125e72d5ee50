"""GGUF files as publishers lay them out beside each other: a model in every type and cut, and what is no model."""

import ggufs
import yaml

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
    """The bytes of a GGUF of `geometry` with matrices of type `kind`, whose bytes are all the same.

    `keep`: which tensors there are. `general`, `keys`: metadata instead of what there would be, the latter below the
    architecture's name; None leaves one out.
    """
    arch = arch or geometry.architecture
    facts = {"architecture": arch, "name": "Toy", "type": "model"} | (general or {})
    counts = {k: getattr(geometry, k) for k in LLAMA_KEYS} | keys
    metadata = {f"general.{k}": v for k, v in facts.items()} | {f"{arch}.{k}": v for k, v in counts.items()}
    return _file(metadata, [t for t in twin.tensors(geometry) if keep(t.name)], kind, filling)


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
    arch = geometry.architecture
    metadata = {"general.architecture": arch, **{f"{arch}.{k}": getattr(geometry, k) for k in LLAMA_KEYS}}
    numbers = {"split.count": count, "split.tensors.count": len(tensors)}
    facts = [{**({} if i else metadata), **numbers, "split.no": i} for i in range(count)]
    return [_file(f, p, kind, filling) for f, p in zip(facts, parts, strict=True)]


def _file(metadata, tensors, kind, filling):
    def typed(name, shape):
        matrix = len(shape) > 1 and not name.endswith("ffn_gate_inp.weight")
        return kind if matrix and shape[0] % 32 == 0 else "F32"

    known = {k: v for k, v in metadata.items() if v is not None}
    return ggufs.build(known, {t.name: t.shape for t in tensors}, typed, filling)
