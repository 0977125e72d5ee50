"""A pass of llama-imatrix over a text, for its counts: how many tokens used each expert of each layer.

The tool cuts the text into chunks of exactly the context asked for, sets the first token of each to BOS where the
vocabulary wants one, and starts each with an empty KV cache. It ends with 0 where the text has fewer chunks than asked
for, and refuses one of less than two: the sums say how many there were.
"""

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from moelib.base.files import stored
from moelib.base.schema import Count, Index
from moelib.catalogue.placement import Placement
from moelib.engine.client import RunError
from moelib.engine.engine import Engine
from moelib.gguf import imatrix
from moelib.gguf.gguf_header import Header
from moelib.gguf.gguf_reader import GGUFError
from moelib.machine import process
from moelib.measure.device import Session
from moelib.measure.llama_server import OUT_OF_MEMORY
from moelib.quality.passes import ending, names_alone

LIMIT_S = 6 * 3600.0  # for one pass: the tool says nothing between chunks
TRIES = 3  # its log is written by a thread that its exit may not wait for: the reason was lost in 1 to 16 of 100 runs
COUNTED = re.compile(r"^blk\.(\d{1,9})\.ffn_(?:gate|up|down|gate_up)_exps\.weight$")
TOO_SHORT = re.compile(r"you need at least|not be enough tokens")
NO_NUMBER = re.compile(r"non-finite values detected in (\S{1,100})")
Selections = tuple[tuple[Count, ...], ...]
"""Of each MoE layer in order, how many tokens used each expert."""


@stored
class Experts:
    """The MoE layers that the engine runs, in order."""

    layers: tuple[Index, ...]
    used: tuple[Count, ...]
    """Of each layer, experts that a token uses."""
    of: tuple[Count, ...]
    """Of each layer, experts that there are."""

    @classmethod
    def in_file(cls, header: Header) -> "Experts":
        """Raises RunError for a model without experts, or one that does not say how many are used."""
        layers = header.expert_layers
        used = [header.number("expert_used_count", n) for n in layers]
        of = [header.number("expert_count", n) for n in layers]
        if not layers:
            raise RunError("no-experts", f"{header.path.name} has no experts: take a mixture-of-experts model")
        known = [(u, n) for u, n in zip(used, of, strict=True) if u and n]
        if len(known) < len(layers):
            raise RunError("no-experts", f"{header.path.name} does not say how many of its experts a token uses")
        return cls(layers, tuple(u for u, _ in known), tuple(n for _, n in known))


@dataclass(frozen=True)
class How:
    """What passes over one text have in common."""

    text: Path
    placed: Placement
    session: Session
    threads: int
    work: Path
    """Scratch, for logs and matrices."""


@dataclass(frozen=True)
class Pass:
    """What a pass came to."""

    selections: Selections
    argv: tuple[str, ...]
    """With names of files alone."""
    log: Path


def argv(llama: Engine, file: Path, how: How, context: int, chunks: int, ubatch: int | None, into: Path) -> list[str]:
    """llama-imatrix's command line. Raises EngineError for a flag that the build does not have."""
    threads = str(how.placed.threads or how.threads)
    placed = replace(how.placed, ubatch=ubatch or how.placed.ubatch)
    args = [llama.tool("llama-imatrix"), "-m", str(file), "-f", str(how.text), "-o", str(into), "--no-ppl"]
    # a batch of one chunk: of a larger one the tool makes several chunks at once
    args += ["-c", str(context), "-b", str(context), "--chunks", str(chunks), "-ngl", "999"]
    args += [llama.need("-fa", "--flash-attn"), "on", "-t", threads, "-tb", threads]
    args += ["--fit", "off"] if "--fit" in llama.help.flags else []
    return args + llama.placement_argv(placed) + how.session.args


def count(
    llama: Engine,
    header: Header,
    how: How,
    context: int,
    chunks: int = 1,
    ubatch: int | None = None,
    name: str = "",
    keep: Path | None = None,
) -> Pass:
    """How often each expert was used over the first chunks of a text. ubatch: tokens that are computed at once. keep:
    where the importance matrix goes, which is removed otherwise.

    Raises RunError: text-too-short, no-counts, counts-misfit, not-a-number, out-of-memory, engine-ended; and
    ProcessError, EngineError.
    """
    into, log = how.work / "counts.gguf", how.work / f"{name or 'counts'}.log"
    into.unlink(missing_ok=True)
    args = argv(llama, header.path, how, context, chunks, ubatch, into)
    try:
        for attempt in range(TRIES):
            code, text = _once(args, how, log)
            _refuse_said(text, header, how, context)
            if not code:
                break
            if code < 0 or attempt == TRIES - 1:
                raise RunError("engine-ended", f"llama-imatrix ended with {code}; its log ends:\n{ending(text)}")
        found = _selections(into, Experts.in_file(header))
        _refuse_misfit(found, Experts.in_file(header), how, context, chunks)
        if keep:
            shutil.copyfile(into, keep)
    finally:
        into.unlink(missing_ok=True)
    return Pass(found, names_alone(args), log)


def _refuse_said(text: str, header: Header, how: How, context: int) -> None:
    """Raise RunError for what the tool's log says went wrong."""
    if TOO_SHORT.search(text):
        raise RunError("text-too-short", f"{_least(how, context, 2)}; its log ends:\n{ending(text)}")
    if m := NO_NUMBER.search(text):
        raise RunError("not-a-number", f"{header.path.name} computes what is no number in {m[1]}: it is damaged")
    if OUT_OF_MEMORY.search(text):
        hint = "set `placement: cpu-moe` under `quality` in the study"
        raise RunError("out-of-memory", f"{header.path.name} does not fit at {how.placed}: {hint}")


def _selections(path: Path, experts: Experts) -> Selections:
    """Raises RunError unless the matrix counts every expert of every MoE layer, and each of a layer's tensors alike."""
    try:
        counts = imatrix.counts(path)
    except GGUFError as err:
        raise RunError("no-counts", f"llama-imatrix left no counts: {err}") from None
    of_layer: dict[int, set[tuple[int, ...]]] = {}
    for name, values in counts.items():
        if m := COUNTED.match(name):
            of_layer.setdefault(int(m[1]), set()).add(values)
    lacking = [n for n in experts.layers if n not in of_layer]
    if lacking or of_layer.keys() - set(experts.layers):
        other = sorted(of_layer.keys() ^ set(experts.layers))
        raise RunError("no-counts", f"llama-imatrix and the header disagree on whether layers {other} have experts")
    found = []
    for layer, n in zip(experts.layers, experts.of, strict=True):
        if len(of_layer[layer]) != 1 or any(len(values) != n for values in of_layer[layer]):
            raise RunError("counts-misfit", f"the expert tensors of layer {layer} were not used alike, or are not {n}")
        found.append(of_layer[layer].pop())
    return tuple(found)


def _refuse_misfit(found: Selections, experts: Experts, how: How, context: int, chunks: int) -> None:
    """Raise RunError unless every token used as many experts in every layer as the model says."""
    chosen = [sum(values) for values in found]
    wanted = [context * chunks * used for used in experts.used]
    if chosen == wanted:
        return
    held = {n // (context * used) for n, used in zip(chosen, experts.used, strict=True) if n % (context * used) == 0}
    if len(held) == 1 and (n := held.pop()) < chunks:
        raise RunError("text-too-short", f"{_least(how, context, chunks)}; it has {n}: ask for fewer `chunks`")
    raise RunError("counts-misfit", f"experts were used {chosen[:8]} times by layer, not {wanted[:8]}")


def _least(how: How, context: int, chunks: int) -> str:
    return f"{how.text.name} must have {chunks} chunks of {context} tokens by the model's vocabulary"


def _once(args: list[str], how: How, log: Path) -> tuple[int | None, str]:
    with process.Child(args, log, process.environment(how.work, dict(how.session.env)), how.session.cpus) as child:
        child.wait_end(process.patience(LIMIT_S))
        return child.stop().code, child.text()


def total(every: Iterable[Selections]) -> int:
    """Uses of experts, over all layers."""
    return sum(n for one in every for layer in one for n in layer)
