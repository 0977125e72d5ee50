"""Invariants of a run and of a block, each a small function: what must hold for a number to be believed.

A check that fails makes its run (or every run of its block) invalid, or only degraded where `DEGRADES` says so.
"""

from collections.abc import Callable, Sequence
from typing import Any

from moelib.record import Check, Record
from moelib.run import Observation, Request, Spec

PLACEMENT_SHARE, PLACEMENT_BYTES = 0.001, 1 << 20
"""Header and engine must agree on device weights to 0.1 % + 1 MiB: the engine prints MiB with two decimals and pads
tensors; the smallest expert share worth moving is far above it."""


def _each(requests: Sequence[Request], wrong: Callable[[Request], str | None]) -> tuple[bool, str]:
    if not requests:
        return False, "no requests"
    found = [f"{r.workload}[{r.index}]: {text}" for r in requests if (text := wrong(r))]
    return not found, "; ".join(found) or f"{len(requests)} requests"


def counts_exact(spec: Spec, seen: Observation) -> tuple[bool, str]:
    """The engine processed and generated what was asked, by its own counts, and streamed no more than that.

    It may stream less: an incomplete character at the end has no event.
    """

    def wrong(r: Request) -> str | None:
        last = r.token_n[-1] if r.token_n else 0
        got, want = (r.prompt_n, r.predicted_n), (r.prompt_tokens, r.generate_tokens)
        fits = got == want and 2 <= last <= r.generate_tokens and len(r.tokens) <= last
        return None if fits else f"prompt, predicted {got}, asked {want}; streamed {last}, {len(r.tokens)} ids"

    return _each(seen.requests, wrong)


def requests_complete(spec: Spec, seen: Observation) -> tuple[bool, str]:
    """Every workload was asked as often as the study says, in its order."""
    want = [(w, i) for w in spec.workloads for i in range(spec.requests)]
    got = [(r.workload, r.index) for r in seen.requests]
    return got == want, f"{len(got)} of {len(want)} requests"


def stream_finished(spec: Spec, seen: Observation) -> tuple[bool, str]:
    """The engine's own final event arrived: the end of a stream alone proves nothing."""
    return _each(seen.requests, lambda r: None if r.finished else "no final event")


def cache_not_hit(spec: Spec, seen: Observation) -> tuple[bool, str]:
    """No part of a prompt came from a cache."""
    return _each(seen.requests, lambda r: None if r.cache_n == 0 else f"cache_n {r.cache_n}")


def times_ordered(spec: Spec, seen: Observation) -> tuple[bool, str]:
    """Tokens arrived after the request was sent and one after another, the first alone."""

    def wrong(r: Request) -> str | None:
        if not r.token_s or r.token_s[0] <= 0:
            return "no first token"
        if any(b < a for a, b in zip(r.token_s, r.token_s[1:], strict=False)):
            return "an earlier time after a later one"
        return None if r.token_n[0] == 1 else f"the first event carried {r.token_n[0]} tokens"

    return _each(seen.requests, wrong)


def layers_offloaded(spec: Spec, seen: Observation) -> tuple[bool, str]:
    """All layers went to the device: otherwise the baseline is not one. Without a device there are none."""
    on, of = seen.report.offloaded_layers, seen.report.total_layers
    if seen.memory.reasons == ("no-device",):
        return True, "no device"
    return on is not None and on == of, f"{on} of {of}"


def placement_moves(spec: Spec, seen: Observation) -> tuple[bool, str]:
    """An offload placement moves expert weights: on a dense model the flag is accepted and does nothing."""
    moved = seen.placement.moved_bytes
    if spec.placement == "baseline":
        return moved == 0, f"{moved} bytes moved"
    if seen.memory.reasons == ("no-device",):
        return False, "there is no device to move experts from"
    return moved > 0, f"{moved} bytes in {seen.placement.moved_tensors} tensors moved"


def agrees(measured: int, expected: int) -> bool:
    return abs(measured - expected) <= PLACEMENT_SHARE * expected + PLACEMENT_BYTES


def placement_on_device(spec: Spec, seen: Observation) -> tuple[bool, str]:
    """The weights on the device by the engine's report are those that the file's header says must be there."""
    if seen.memory.reasons == ("no-device",):
        return True, "no device"
    engine, header = seen.report.device_bytes("model"), seen.placement.device_bytes
    return engine is not None and agrees(engine, header), f"engine {engine}, header {header} bytes"


def memory_known(spec: Spec, seen: Observation) -> tuple[bool, str]:
    """Device memory has a value; why not stands in its reasons."""
    return seen.memory.status != "invalid", ", ".join(seen.memory.reasons) or f"{seen.memory.value_bytes} bytes"


def memory_undoubted(spec: Spec, seen: Observation) -> tuple[bool, str]:
    """All accounts of device memory could be taken and agree."""
    return seen.memory.status == "valid", ", ".join(seen.memory.reasons) or str(seen.memory.method)


def clean_end(spec: Spec, seen: Observation) -> tuple[bool, str]:
    """The server ended by itself when told to."""
    return seen.exit_code == 0 and not seen.exit_killed, f"exit {seen.exit_code}, killed {seen.exit_killed}"


_ON_RUNS = [requests_complete, counts_exact, stream_finished, cache_not_hit, times_ordered, layers_offloaded]
_ON_RUNS += [placement_moves, placement_on_device, memory_known, memory_undoubted, clean_end]
RUN_CHECKS = {check.__name__.replace("_", "-"): check for check in _ON_RUNS}
DEGRADES = {"memory-undoubted", "clean-end"}


def run(spec: Spec, seen: Observation) -> tuple[Check, ...]:
    """Every run check, in order."""
    return tuple(Check(name, *check(spec, seen)) for name, check in RUN_CHECKS.items())


def verdict(checks: Sequence[Check]) -> tuple[str, tuple[str, ...]]:
    """(valid, degraded or invalid; the ids of the checks that failed). No checks at all is invalid."""
    failed = tuple(c.id for c in checks if not c.passed)
    if not checks:
        return "invalid", ("nothing-checked",)
    return "invalid" if set(failed) - DEGRADES else "degraded" if failed else "valid", failed


def baseline(runs: Sequence[Record]) -> Record:
    """The run that the others of its block are compared with."""
    return next(r for r in runs if r.spec.placement == "baseline")


def block_complete(runs: Sequence[Record]) -> tuple[bool, str]:
    """One baseline and something to compare with it, each measured once."""
    arms = [r.spec.arm for r in runs]
    bases = [r for r in runs if r.spec.placement == "baseline"]
    whole = len(bases) == 1 < len(runs) and len(set(arms)) == len(arms) and all(r.observed for r in runs)
    return whole, ", ".join(arms) or "no runs"


def block_alike(runs: Sequence[Record]) -> tuple[bool, str]:
    """Nothing but placement and load mode differs: same file, build, device, threads, requests."""

    def common(r: Record) -> dict[str, Any]:
        seen = r.observed
        return {
            "file": r.sheet.get("sha256"),
            "engine": r.engine.get("server_sha256"),
            "device": (r.device.get("kind"), r.device.get("name"), r.device.get("uuid")),
            "threads": seen.threads,
            "context": r.spec.context,
            "prompts": [(q.workload, q.index, q.prompt_tokens, q.generate_tokens) for q in seen.requests],
        }

    first = common(runs[0])
    differs = sorted({k for r in runs[1:] for k, v in common(r).items() if v != first[k]})
    return not differs, f"differ in {', '.join(differs)}" if differs else f"{len(runs)} runs alike"


def block_placement(runs: Sequence[Record]) -> tuple[bool, str]:
    """What left the device between baseline and offload is what the header says the placement moves, and the graph
    was cut where the experts went."""
    base = baseline(runs).observed
    if base.memory.reasons == ("no-device",):
        return True, "no device"
    found = []
    for r in (r for r in runs if r.spec.placement != "baseline"):
        seen = r.observed
        on, off = base.report.device_bytes("model"), seen.report.device_bytes("model")
        if on is None or off is None or not agrees(on - off, seen.placement.moved_bytes):
            found.append(f"{r.spec.arm}: device weights {on} -> {off}, header moves {seen.placement.moved_bytes}")
        if not seen.report.graph_splits or max(seen.report.graph_splits) <= max(base.report.graph_splits, default=0):
            found.append(f"{r.spec.arm}: graph splits {base.report.graph_splits} -> {seen.report.graph_splits}")
    return not found, "; ".join(found) or "header and engine agree"


_ON_BLOCKS = (block_complete, block_alike, block_placement)
BLOCK_CHECKS = {check.__name__.replace("_", "-"): check for check in _ON_BLOCKS}


def block(runs: Sequence[Record]) -> tuple[Check, ...]:
    """Every block check; the later ones only of a complete block, as they compare its runs."""
    checks = []
    for name, check in BLOCK_CHECKS.items():
        checks.append(Check(name, *check(runs)))
        if not checks[0].passed:
            break
    return tuple(checks)
