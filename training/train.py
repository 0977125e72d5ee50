"""Train one of the two models from its token ids: `python training/train.py phi|deepseek`.

Needs torch and numpy alone, so that this folder's *.py, data/train.npy, data/valid.npy and data/meta.json are all that
a machine with a GPU must have. Ctrl-C loses nothing, a kill at most SAVE_S seconds; the same command goes on, and does
nothing once it is done. Batches and dropout depend on the seed and the step alone, so that a run with interruptions is
the run without. What is kept are the weights with the lowest loss on `valid`.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pieces
import torch
from model import Transformer, loss
from recipes import BEGIN, MODELS, Model, Recipe

HERE = Path(__file__).resolve().parent
SAVE_S = 60.0
VALID_BATCH = 16
Ids = npt.NDArray[np.uint16]


class TrainError(Exception):
    """Training cannot go on; the message says what to do."""


def window(ids: Ids, starts: npt.NDArray[np.int64], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (windows, length) at `starts`. Every window begins with BEGIN, as llama-perplexity's do."""
    rows = ids[starts[:, None] + np.arange(length + 1)].astype(np.int64)
    rows[:, 0] = BEGIN
    both = torch.from_numpy(rows)
    return both[:, :-1], both[:, 1:]


def batch_at(ids: Ids, step: int, recipe: Recipe, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows of a step: drawn anew by seed and step, so that nothing about them need be kept."""
    draw = np.random.Generator(np.random.Philox(key=[recipe.seed, step]))
    return window(ids, draw.integers(0, len(ids) - length, recipe.batch), length)


def rate(step: int, recipe: Recipe) -> float:
    """The learning rate of a step: a line up, then a cosine down to a fiftieth."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def optimizer(net: Transformer, recipe: Recipe, device: str) -> torch.optim.AdamW:
    """AdamW; vectors and embeddings do not decay."""
    named = dict(net.named_parameters())
    vectors = [n for n, p in named.items() if p.ndim < 2 or n == "token_embd.weight"]
    groups = [
        {"params": [p for n, p in named.items() if n not in vectors], "weight_decay": recipe.weight_decay},
        {"params": [named[n] for n in vectors], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=device == "cuda" or None)


def precision(device: str) -> Any:
    """bf16 products on a GPU; float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


@torch.no_grad()
def validate(net: Transformer, ids: Ids, device: str) -> tuple[float, list[list[float]]]:
    """Loss in nats a token over all whole windows of `ids`, and each layer's load: every expert's share of it."""
    length = net.shape.context_length
    starts = np.arange(0, len(ids) - length, length)
    net.eval()
    total, loads = 0.0, []
    for at in range(0, len(starts), VALID_BATCH):
        x, y = (t.to(device) for t in window(ids, starts[at : at + VALID_BATCH], length))
        with precision(device):
            logits, routed = net(x)
        total += float(loss(logits, y)) * len(x)
        loads.append(torch.stack([r["load"] for r in routed]) * len(x))
    net.train()
    mean = torch.stack(loads).sum(0) / len(starts)
    return total / len(starts), mean.cpu().tolist()


class Run:
    """A run in its folder: settings, state, log. Settings are compared, so that no run goes on as another."""

    def __init__(self, model: Model, data: Path, out: Path, device: str, compiled: bool = False):
        self.model, self.out, self.device = model, out, device
        try:
            meta = json.loads((data / "meta.json").read_text(encoding="utf-8"))
            self.train, self.valid = (np.load(data / f"{part}.npy", allow_pickle=False) for part in ("train", "valid"))
        except OSError as err:
            raise TrainError(f"{err.filename} cannot be read: run `python training/prepare.py`") from None
        for part in ("train", "valid"):
            if pieces.sha256(data / f"{part}.npy") != meta[part]["sha256"]:
                raise TrainError(f"{part}.npy is not the one that meta.json is of: copy all of {data}, or prepare anew")
        keys = ("train", "valid", "tokenizer_sha256")
        self.settings = {**model.facts(), "data": {k: meta[k] for k in keys}}
        self.net = Transformer(model.shape, model.recipe.dropout)
        self.net.begin(model.recipe.seed)
        self.net.to(device)
        self.forward = torch.compile(self.net) if compiled else self.net
        self.optimizer = optimizer(self.net, model.recipe, device)
        self.step, self.seconds = 0, 0.0
        self.best: dict[str, Any] = {"step": None, "valid_nats": None, "weights": None, "load": None}

    @property
    def state(self) -> Path:
        return self.out / "checkpoint.pt"

    @property
    def log(self) -> Path:
        return self.out / "log.jsonl"

    def done(self) -> bool:
        """Whether this folder holds this run's result, whole. Raises TrainError if it is another run's."""
        path = self.out / "run.json"
        if not path.exists():
            return False
        facts = json.loads(path.read_text(encoding="utf-8"))
        self._same(facts["settings"])
        try:
            pieces.load(self.out, facts["weights"])
        except ValueError:
            return False
        return True

    def _same(self, settings: dict[str, Any]) -> None:
        if settings != self.settings:
            raise TrainError(f"{self.out} holds a run with other settings or data: name another --out, or remove it")

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one, and drop what the log says of later steps."""
        if not self.state.exists():
            self.log.unlink(missing_ok=True)
            return
        saved = torch.load(self.state, map_location="cpu", weights_only=True)
        self._same(json.loads(saved["settings"]))
        self.net.load_state_dict(saved["net"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds, self.best = saved["step"], saved["seconds"], saved["best"]
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
        with pieces.replacing(self.log) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def save(self) -> None:
        """Write the checkpoint, in place of the last one once it is whole."""
        state = {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "best": self.best}
        state |= {"step": self.step, "seconds": self.seconds, "settings": json.dumps(self.settings)}
        with pieces.replacing(self.state) as partial:
            torch.save(state, partial)

    def one(self) -> dict[str, torch.Tensor]:
        """Take a step; return its losses, left on the device until they are noted."""
        recipe = self.model.recipe
        torch.manual_seed(recipe.seed * 1_000_003 + self.step)  # of dropout
        ids, targets = batch_at(self.train, self.step, recipe, self.model.shape.context_length)
        x, y = (t.to(self.device, non_blocking=True) for t in (ids, targets))
        with precision(self.device):
            logits, routed = self.forward(x)
        nats = loss(logits, y)
        balance, z = (torch.stack([r[k] for r in routed]).mean() for k in ("balance", "z"))
        (nats + recipe.balance * balance + recipe.z * z).backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.step, recipe)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"train_nats": nats.detach(), "balance": balance.detach()}

    def note(self, losses: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Measure on `valid`, keep the weights if they are the best yet, and add a line to the log."""
        nats, load = validate(self.net, self.valid, self.device)
        if not math.isfinite(nats):
            raise TrainError(f"the loss is {nats} at step {self.step}: start anew with a lower learning rate")
        if self.best["valid_nats"] is None or nats < self.best["valid_nats"]:
            kept = {name: p.detach().cpu().clone() for name, p in self.net.named_parameters()}
            self.best = {"step": self.step, "valid_nats": nats, "weights": kept, "load": load}
        line = {"step": self.step, "valid_nats": nats, **{k: float(v) for k, v in losses.items()}}
        line |= {"learning_rate": rate(self.step - 1, self.model.recipe), "seconds": round(self.seconds, 2)}
        line["least_load"] = min(min(layer) * len(layer) for layer in load)
        with self.log.open("a", encoding="utf-8") as f:
            f.write(json.dumps(line, allow_nan=False) + "\n")
        return line

    def finish(self) -> dict[str, Any]:
        """Write the best weights in pieces, and what made them. `run.json` is written last: with it, a run is done."""
        weights = {name: p.float().numpy() for name, p in self.best["weights"].items()}
        facts = {
            "settings": self.settings,
            "steps_done": self.step,
            "seconds": round(self.seconds, 1),
            "best_step": self.best["step"],
            "best_valid_nats": self.best["valid_nats"],
            "parameters": sum(w.size for w in weights.values()),
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "torch": str(torch.__version__),
            "weights": pieces.save(self.out, weights),
        }
        pieces.write_json(self.out / "run.json", facts)
        return facts


def progress(run: Run) -> Any:
    """A bar of the run's steps; None where there is no tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=run.model.recipe.steps, initial=run.step, desc=run.model.name, unit="step", disable=None)


def go(run: Run, minutes: float | None) -> bool:
    """Train until the last step, a signal, or `minutes` are over; whether it is done. Saves in any case."""
    stop: list[int] = []
    before = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    steps, every = run.model.recipe.steps, run.model.recipe.valid_every
    began = saved = last = time.monotonic()
    bar = progress(run)
    try:
        while run.step < steps and not stop and (minutes is None or time.monotonic() - began < 60 * minutes):
            losses = run.one()
            at_note = run.step % every == 0 or run.step == steps
            now = time.monotonic()
            run.seconds, last = run.seconds + now - last, now
            if at_note:
                line = run.note(losses)
                said = f"train {line['train_nats']:.3f}, valid {line['valid_nats']:.3f} nats"
                if bar:
                    bar.set_postfix_str(said)
                if not bar or bar.disable:
                    print(f"{run.model.name}: step {run.step} of {steps}, {said}, {run.seconds:.0f} s", flush=True)
            if bar:
                bar.update()
            if now - saved > SAVE_S:
                run.save()
                saved = time.monotonic()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if bar:
            bar.close()
    run.save()
    if stop:
        print(f"interrupted at step {run.step} of {steps}; run the same command to go on", file=sys.stderr)
        sys.exit(128 + stop[0])
    return run.step >= steps


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is one")
    parser.add_argument("--minutes", type=float, help="stop after so many, to be continued by the same command")
    parser.add_argument("--steps", type=int, help="length of the whole schedule, in place of the recipe's")
    parser.add_argument("--batch", type=int, help="windows a step, in place of the recipe's")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--balance", type=float, help="weight of the load-balancing loss: more if an expert is dead")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--valid-every", type=int, help="steps between two points of the curve")
    parser.add_argument("--compile", action="store_true", help="with torch.compile: a minute's start, faster steps")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--out", type=Path, help="folder of the run; training/runs/MODEL")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    a = arguments(argv)
    given = {name: getattr(a, name) for name in asdict(Recipe()) if hasattr(a, name)}
    model = MODELS[a.model].using(**given)
    device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainError("torch sees no GPU: use --device cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # sums in one order, as far as there is a choice
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_float32_matmul_precision("high")
    run = Run(model, a.data, a.out or HERE / "runs" / model.name, device, a.compile)
    if run.done():
        print(f"{run.out} is done already")
        return
    run.out.mkdir(parents=True, exist_ok=True)
    run.resume()
    if not go(run, a.minutes):
        print(f"{a.minutes} minutes are over at step {run.step} of {model.recipe.steps}; the same command goes on")
        return
    facts = run.finish()
    print(f"{model.name}: {facts['parameters'] / 1e6:.2f} M parameters, best at step {facts['best_step']}", end=", ")
    print(f"{facts['best_valid_nats']:.4f} nats a token on valid; {len(facts['weights'])} files in {run.out}")


if __name__ == "__main__":
    try:
        main()
    except (TrainError, ValueError) as err:
        sys.exit(f"train: {err}")
