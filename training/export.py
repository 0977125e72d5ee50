"""From a run's weights to an F16 GGUF: `python training/export.py phi|deepseek`.

Tensors are those that a twin of the same geometry has, by name, shape and type; the tokenizer is written as llama.cpp's
"gpt-2" reads it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pieces
from gguf import GGUFWriter, LlamaFileType, TokenType
from recipes import BEGIN, MODELS, RMS_EPS, ROPE_BASE, Model, Shape

from moelib.catalogue.params import Geometry
from moelib.gguf import twin

HERE = Path(__file__).resolve().parent
DESCRIPTION = (
    "A few million parameters trained from scratch on public-domain English by moelib's training/, to measure what "
    "quantisation does to quality. For no other use."
)


class ExportError(Exception):
    """A run cannot be exported; the message says what to do."""


def geometry(shape: Shape) -> Geometry:
    """The same shape as moelib has it."""
    known = {name: getattr(shape, name) for name in Geometry.model_fields}
    return Geometry(**known)


def vocabulary(path: Path) -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and merges of a `tokenizer.json` of byte-level BPE. Raises ExportError for another kind."""
    made = json.loads(path.read_text(encoding="utf-8"))
    model, pre = made["model"], made["pre_tokenizer"]
    if (model["type"], pre["type"], pre["use_regex"]) != ("BPE", "ByteLevel", True) or made["normalizer"]:
        raise ExportError(f"{path.name} is no byte-level BPE as prepare.py trains it")
    ids = sorted(model["vocab"].items(), key=lambda item: item[1])
    special = {t["id"] for t in made["added_tokens"]}
    types = [int(TokenType.CONTROL if i in special else TokenType.NORMAL) for _, i in ids]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return [token for token, _ in ids], types, merges


def write(path: Path, model: Model, weights: pieces.Weights, tokenizer: Path) -> str:
    """Write the model's F16 GGUF to `path`, atomically; return its SHA-256.

    Raises ExportError if the weights are not those of the model's shape, or the tokenizer is not of its size.
    """
    shape = model.shape
    plan = twin.tensors(geometry(shape))
    wanted = {t.name: t.shape[::-1] for t in plan}
    if wanted != (held := {name: values.shape for name, values in weights.items()}):
        other = sorted({*wanted.items()} ^ {*held.items()})[0]
        raise ExportError(f"the weights are not those of {model.name}: see {other[0]}, {other[1]}")
    tokens, types, merges = vocabulary(tokenizer)
    if len(tokens) != shape.vocab_size:
        raise ExportError(f"{tokenizer.name} has {len(tokens)} tokens, {model.name} {shape.vocab_size}")
    facts: dict[str, Any] = {
        "name": model.title,
        "description": DESCRIPTION,
        "license": "mit",
        "file_type": LlamaFileType.MOSTLY_F16,
        "quantization_version": 2,
        "block_count": shape.block_count,
        "context_length": shape.context_length,
        "embedding_length": shape.embedding_length,
        "feed_forward_length": shape.feed_forward_length,
        "head_count": shape.head_count,
        "head_count_kv": shape.head_count_kv,
        "layer_norm_rms_eps": RMS_EPS,
        "rope_dimension_count": shape.head_length,
        "rope_freq_base": ROPE_BASE,
        "expert_count": shape.expert_count,
        "expert_used_count": shape.expert_used_count,
        "vocab_size": shape.vocab_size,
    }
    if shape.original_context_length:
        facts["rope_scaling_orig_ctx_len"] = shape.original_context_length
    if shape.architecture == "deepseek":
        facts["leading_dense_block_count"] = shape.leading_dense_block_count
        facts["expert_feed_forward_length"] = shape.expert_feed_forward_length
        facts["expert_shared_count"] = shape.expert_shared_count
        facts["expert_weights_scale"] = 1.0
    facts |= {"tokenizer_model": "gpt2", "tokenizer_pre": "gpt-2", "token_list": tokens, "token_types": types}
    facts |= {"token_merges": merges, "bos_token_id": BEGIN, "eos_token_id": BEGIN}
    facts |= {"add_bos_token": True, "add_eos_token": False}
    with pieces.replacing(path) as partial:
        writer = GGUFWriter(partial, shape.architecture)
        for name, value in facts.items():
            getattr(writer, f"add_{name}")(value)
        for t in plan:
            writer.add_tensor(t.name, pieces.stored(t.name, weights[t.name]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return pieces.sha256(path)


def run_facts(folder: Path, model: Model) -> dict[str, Any]:
    """`run.json` of a run that is done. Raises ExportError if there is none, or if it is of another shape."""
    path = folder / "run.json"
    if not path.exists():
        raise ExportError(f"{folder} has no run.json: train first, or copy it and the weights from where it was made")
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if facts["settings"]["shape"] != model.facts()["shape"]:
        raise ExportError(f"{folder} holds a model of another shape than {model.name} has now")
    return facts


def tokenizer_of(facts: dict[str, Any], data: Path) -> Path:
    """The tokenizer that the run's ids were made with. Raises ExportError if it is not there."""
    path = data / "tokenizer.json"
    if not path.exists() or pieces.sha256(path) != facts["settings"]["data"]["tokenizer_sha256"]:
        raise ExportError(f"{path} is not the run's tokenizer: run `python training/prepare.py`")
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--run", type=Path, help="folder of the run; training/runs/MODEL")
    parser.add_argument("--out", type=Path, help="folder of the file; training/models/MODEL")
    a = parser.parse_args(argv)
    model = MODELS[a.model]
    run, out = a.run or HERE / "runs" / model.name, a.out or HERE / "models" / model.name
    facts = run_facts(run, model)
    path = out / f"{model.name}-F16.gguf"
    digest = write(path, model, pieces.load(run, facts["weights"]), tokenizer_of(facts, a.data))
    for name in ("run.json", "log.jsonl"):
        if (run / name).exists():
            with pieces.replacing(out / name) as partial:
                partial.write_bytes((run / name).read_bytes())
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, SHA-256 {digest}")


if __name__ == "__main__":
    try:
        main()
    except (ExportError, ValueError) as err:
        sys.exit(f"export: {err}")
