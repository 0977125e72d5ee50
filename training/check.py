"""Whether a trained model is what it should be, by llama.cpp: `python training/check.py phi|deepseek`.

Of the F16 file that export.py wrote: llama.cpp makes the same token ids as the tokenizer, and the same
log-probabilities as torch; the model beats a bigram model by far; no expert is dead; quantising damages it in the order
that it should.
Writes check.json beside the file, which the card is made of. Ends with 1 if something does not hold.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bigram
import export
import measure
import numpy as np
import pieces
import prepare
import yaml
from recipes import BEGIN, MODELS, Model

from moelib.base.bar import tqdm
from moelib.engine import engine
from moelib.gguf import gguf_file

QUANTS = ("Q8_0", "Q4_K_M", "Q2_K")
"""From the least damage to the most."""
LOGIT_WINDOWS = 16
PROMPTS = ("The", "It was a", "Mr. Speaker,")
LIMITS = {
    "nmse": 1e-3,  # of log-probabilities, torch against llama.cpp
    "of_bigram": 0.5,  # the model's perplexity, of the bigram model's: "by far"
    "least_load": 0.05,  # of the even share: below it an expert counts as dead
    "file_bytes": 25_000_000,
}


def torch_windows(model: Model, weights: pieces.Weights, tokens: measure.Ids, every: int) -> tuple[Any, Any]:
    """Log-probabilities (windows, window, vocab) after each token of `tokens` (windows, window) by torch, of the first
    `every` windows, and the load of each layer's experts over all of them."""
    import torch
    from model import Transformer

    net = Transformer(model.shape)
    net.load_state_dict({name: torch.from_numpy(np.asarray(w, np.float32)) for name, w in weights.items()})
    net.eval()
    ids = torch.from_numpy(tokens.astype(np.int64))
    ids[:, 0] = BEGIN
    found, loads = [], []
    with torch.no_grad():
        for i, one in enumerate(tqdm(ids, desc="torch", unit="window", disable=None)):
            logits, routed = net(one[None])
            loads.append(torch.stack([r["load"] for r in routed]).numpy())
            if i < every:
                found.append(logits[0].double().log_softmax(-1).numpy())
    return np.array(found), np.mean(loads, 0)


def nmse(found: measure.Floats, known: measure.Floats) -> float:
    """Squared error of `found`, of the variance of `known`."""
    return float(((found - known) ** 2).sum() / ((known - known.mean()) ** 2).sum())


def against_torch(model: Model, weights: pieces.Weights, base: measure.Logits) -> tuple[dict[str, Any], Any]:
    """How far llama.cpp's log-probabilities are from torch's, and the experts' load on the whole text."""
    every = min(LOGIT_WINDOWS, len(base.tokens))
    ours, load = torch_windows(model, weights, base.tokens, every)
    ours = ours[:, base.first : -1]
    theirs = np.array([w for w, _ in zip(base.windows(), range(every), strict=False)])
    ours = np.maximum(ours, theirs.min(-1, keepdims=True))  # the file's floor
    same = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    said = {"nmse": nmse(theirs, ours), "rows": ours.shape[0] * ours.shape[1], "same_top": same}
    return {**said, "largest_difference_nats": float(np.abs(ours - theirs).max())}, load


def types(path: Path) -> dict[str, dict[str, int]]:
    """Tensors of a file by kind (its name without the layer) and type."""
    kinds: dict[str, Counter[str]] = {}
    for t in gguf_file.read_header(path).tensors:
        kind = t.name.split(".", 2)[-1] if t.name.startswith("blk.") else t.name
        kinds.setdefault(kind, Counter())[t.type] += 1
    return {kind: dict(sorted(c.items())) for kind, c in sorted(kinds.items())}


def quality(file: Path, corpora: dict[str, Path], scratch: Path, windows: int | None) -> tuple[dict[str, Any], Any]:
    """Perplexity, divergence and agreement of the file and its quants on each corpus; and the first corpus's logits."""
    paths = {"F16": file}
    for quant in QUANTS:
        paths[quant] = scratch / f"{quant}.gguf"
        measure.call(measure.tool("llama-quantize"), str(file), str(paths[quant]), quant)
    files = {q: {"bytes": p.stat().st_size, "sha256": pieces.sha256(p), "types": types(p)} for q, p in paths.items()}
    said: dict[str, Any] = {}
    kept = None
    bar = tqdm(total=len(corpora) * len(paths), desc="llama.cpp", unit="text", disable=None)
    for corpus, text in corpora.items():
        base = measure.logits(file, text, scratch / f"{corpus}.F16", windows)
        kept = kept or base
        known = measure.compare(base, base)
        said[corpus] = {"windows": len(base.tokens), "scored_tokens": int(base.targets.size), "quants": {}}
        above = np.zeros(len(base.tokens))
        for quant, path in paths.items():
            into = scratch / "other"
            other = base if quant == "F16" else measure.logits(path, text, into, windows)
            d = measure.compare(base, other)
            row: dict[str, Any] = {name: measure.mean(getattr(d, name)) for name in ("nats", "kld", "same_top")}
            row["perplexity"] = float(np.exp(d.nats.mean()))
            row["nats_above_f16"] = measure.mean(d.nats - known.nats)
            row["kld_above_quant_before"] = measure.mean(d.kld - above)
            above = d.kld
            said[corpus]["quants"][quant] = row
            bar.update()
    bar.close()
    return {"files": files, "corpora": said}, kept


def verdicts(said: dict[str, Any]) -> dict[str, bool]:
    """What must hold, each by its own figures."""
    texts = said["quality"]["corpora"].values()
    steps = [c["quants"][q]["kld_above_quant_before"] for c in texts for q in QUANTS]
    prose = said["quality"]["corpora"]["prose"]["quants"]["F16"]["perplexity"]
    return {
        "llama.cpp makes the tokenizer's ids": all(t["equal"] for t in said["tokenizer"].values()),
        "llama.cpp computes what torch does": said["logits"]["nmse"] < LIMITS["nmse"],
        "better than a bigram model by far": prose < LIMITS["of_bigram"] * said["bigram"]["perplexity"],
        "no dead expert": said["least_load"] >= LIMITS["least_load"],
        "each quant damages more than the one before": all(s["mean"] > 2 * (s["standard_error"] or 0.0) for s in steps),
        "small enough to keep": said["file"]["bytes"] <= LIMITS["file_bytes"],
    }


def check(model: Model, folder: Path, run: Path, data: Path, windows: int | None = None) -> dict[str, Any]:
    """All that is said of the model in `folder`. Raises export.ExportError, measure.MeasureError."""
    facts = export.run_facts(run, model)
    weights = pieces.load(run, facts["weights"])
    made = prepare.load(export.tokenizer_of(facts, data))
    file = folder / f"{model.name}-F16.gguf"
    known = yaml.safe_load((prepare.CORPORA / "corpora.yaml").read_text(encoding="utf-8"))
    corpora = {name: prepare.CORPORA / entry["file"] for name, entry in known.items()}
    said: dict[str, Any] = {"model": model.name, "title": model.title, "shape": asdict(model.shape)}
    said["run"] = {k: facts[k] for k in ("best_step", "best_valid_nats", "steps_done", "seconds", "device", "torch")}
    said["run"] |= {"recipe": facts["settings"]["recipe"], "data": facts["settings"]["data"]}
    said["file"] = {"name": file.name, "bytes": file.stat().st_size, "sha256": pieces.sha256(file)}
    said["parameters"], said["engine_build"] = facts["parameters"], engine.find().build
    said["corpora"] = {n: {k: known[n][k] for k in ("title", "bytes", "sha256", "licence")} for n in known}
    said["tokenizer"] = {}
    for name, text in corpora.items():
        ids, own = measure.token_ids(file, text), made.encode(text.read_text(encoding="utf-8")).ids
        said["tokenizer"][name] = {"equal": ids == own, "tokens": len(own), "bytes": text.stat().st_size}
    with tempfile.TemporaryDirectory(prefix="training-") as scratch:
        said["quality"], base = quality(file, corpora, Path(scratch), windows)
        said["logits"], load = against_torch(model, weights, base)
        pairs = base.tokens[:, base.first : -1].ravel(), base.targets.ravel()
    baseline = bigram.fit(np.load(data / "train.npy"), model.shape.vocab_size)
    nats = -float(baseline.log_probs(*pairs).mean())
    said["bigram"] = {"perplexity": float(np.exp(nats)), "nats": nats, "discount": baseline.discount}
    said["load"] = np.round(load * model.shape.expert_count, 4).tolist()
    said["least_load"] = float(np.min(load) * model.shape.expert_count)
    said["text"] = {prompt: measure.continuation(file, prompt, 120, 1) for prompt in PROMPTS}
    said["windows_limited_to"], said["limits"], said["verdicts"] = windows, LIMITS, verdicts(said)
    return said


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--data", type=Path, default=export.HERE / "data")
    parser.add_argument("--run", type=Path, help="folder of the run; training/runs/MODEL")
    parser.add_argument("--out", type=Path, help="folder of the file; training/models/MODEL")
    parser.add_argument("--windows", type=int, help="of each corpus, for a quick look; all of them")
    a = parser.parse_args(argv)
    model = MODELS[a.model]
    out = a.out or export.HERE / "models" / model.name
    said = check(model, out, a.run or export.HERE / "runs" / model.name, a.data, a.windows)
    pieces.write_json(out / "check.json", said)
    for sentence, holds in said["verdicts"].items():
        print(f"{'holds' if holds else 'FAILS'}  {sentence}")
    print(json.dumps({k: said[k] for k in ("logits", "bigram", "least_load")}))
    return 0 if all(said["verdicts"].values()) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (export.ExportError, measure.MeasureError, engine.EngineError, ValueError) as err:
        sys.exit(f"check: {err}")
