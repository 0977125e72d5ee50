"""Invariants of a run: what must hold for its numbers to be believed.

Each is a small pure function with an id, a limit and, as its docstring, the reason. One that fails makes its run
invalid, or only degraded where it says so; one that cannot be checked makes it degraded.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, cast

from moelib.catalogue.facts import LLAMA_SERVER, DeviceFacts, HostFacts, Manifest
from moelib.engine.client import Request
from moelib.machine import process
from moelib.measure import memory, nvml
from moelib.measure.run import Observation, Spec
from moelib.measure.runner import QUANTITIES, untold
from moelib.runners import command

TTFT_SHARE, TTFT_S = 0.05, 0.025  # sampling, HTTP and scheduling: 0.7 to 15 ms seen
RATE_SHARE, RATE_S = 0.01, 0.020  # client against engine over a whole decode: 0.1 to 14 ms seen
ROUNDING = 1e-4  # times are kept to microseconds
COUNT_SHARE = 0.05  # events against tokens of their text: a text may have other tokens than those that made it
CLOCK_S = 0.1  # a slewed clock moves by 10 ms in 20 s, a stepped one by anything
FOREIGN_SHARE = 0.10  # of the host's CPU time
# Of one CPU. At 1.3 % no effect could be shown (0.993 [0.979, 1.006] of the rate, on an H100's host), and
# within cells the rate does not follow the share. Where all CPUs decode, a percent may cost two at the very most: below
# this limit that is less than machines of one kind differ by.
WATCH_SHARE = 0.05
WATCH_ONCE_S = 0.1  # beside it: a look waits in the driver, for 33 to 53 ms of CPU, while the run's context is made


class Measured(NamedTuple):
    """What a run's invariants look at."""

    spec: Spec
    observation: Observation
    sheet: Manifest
    device: DeviceFacts
    host: HostFacts
    runner: str = LLAMA_SERVER

    def lacks(self, quantity: str) -> bool:
        return lacks(self.runner, self.observation, quantity)


HELD: dict[str, Callable[[Observation], object]] = {
    "timings": lambda o: any((r.engine_prompt_s, r.engine_predicted_s) != (None, None) for r in o.requests),
    "usage": lambda o: any((r.prompt_n, r.predicted_n) != (None, None) for r in o.requests),
    "cache": lambda o: any(r.cache_n is not None for r in o.requests),
    "tokens": lambda o: any(r.token_n or r.tokens for r in o.requests),
    "buffers": lambda o: o.report.buffers or o.report.graph_splits or o.report.total_layers is not None,
    "build": lambda o: o.report.built is not None,
    "likeliest": lambda o: o.top_logprobs,
    "command": lambda o: o.argv or o.env,
    "process": lambda o: (o.load_s, o.exit_code) != (None, None),
    "owner": lambda o: o.host_rss_peak_bytes is not None,
}
"""Quantity -> whether a run's record has some of it."""


def lacks(runner: str, observation: Observation, quantity: str) -> bool:
    """Whether the runner does not report this quantity and its record has none of it. What a record has is judged,
    whoever reported it: under another runner's name it is still the same value."""
    return quantity in untold(runner) and not (quantity in HELD and HELD[quantity](observation))


def silence(runs: Sequence[tuple[str, Observation]], quantities: Sequence[str]) -> str:
    """Which quantities are lacking and whose they are, as a reason; empty where none is."""
    silent = {(runner, q): None for q in quantities for runner, observation in runs if lacks(runner, observation, q)}
    return "; ".join(f"{runner} does not report {QUANTITIES[q]}" for runner, q in silent)


Finding = tuple[bool | None, str]
"""Whether it holds, None where that cannot be checked; and the evidence, or why there is none."""
Faults = Generator[str, None, str]
"""Yields what is wrong, if anything is, and returns the evidence where nothing is."""
SHOWN = 4  # faults in a finding


@dataclass(frozen=True)
class Invariant:
    id: str
    scope: str
    """run, log, block, cell or study."""
    limit: str
    reason: str
    find: Callable[..., Finding]
    degrades: bool
    """Whether failing it leaves the numbers standing, with a flag."""
    needs: Sequence[str]
    """Quantities of `runner.QUANTITIES` that all of it rests on: without one it is not tried."""
    partly: Sequence[str]
    """Quantities that a part of it rests on: without one it may still fail, but not pass."""


Find = Callable[..., Finding]
INVARIANTS: dict[str, Invariant] = {}
KINDS = ("run", "log", "block", "cell", "study")
"""What an invariant is of, from the smallest to the whole."""


def holds(
    scope: str, limit: str, degrades: bool = False, needs: str = "", partly: str = ""
) -> Callable[[Callable[..., Finding | Faults]], Find]:
    """Register the function below as an invariant of a run, its log, a block, a cell or a study."""

    def register(look: Callable[..., Finding | Faults]) -> Find:
        name = look.__name__.replace("_", "-")
        reason = " ".join((look.__doc__ or "").split())

        @wraps(look)
        def find(subject: Any) -> Finding:
            looked = look(subject)
            return looked if isinstance(looked, tuple) else _gathered(looked)

        INVARIANTS[name] = Invariant(name, scope, limit, reason, find, degrades, needs.split(), partly.split())
        return find

    return register


def _gathered(looking: Faults) -> Finding:
    faults: list[str] = []
    while True:
        try:
            faults.append(next(looking))
        except StopIteration as end:
            return not faults, "; ".join(faults[:SHOWN]) or cast(str, end.value)


def each_request(fault: Callable[[Measured, Request], str | None]) -> Find:
    """A run's invariant, of what is wrong with one of its requests."""

    @wraps(fault)
    def find(run: Measured) -> Finding:
        requests = run.observation.requests
        faults = [f"{r.workload}[{r.index}]: {text}" for r in requests if (text := fault(run, r))]
        return bool(requests) and not faults, "; ".join(faults) or f"{len(requests)} requests"

    return find


@holds("run", "exact")
def requests_complete(run: Measured) -> Finding:
    """Every workload was asked as often as the study says, in its order."""
    expected = [(w, i) for w in run.spec.workloads for i in range(run.spec.requests)]
    actual = [(r.workload, r.index) for r in run.observation.requests]
    return bool(expected) and actual == expected, f"{len(actual)} of {len(expected)} requests"


@holds("run", "exact", partly="usage tokens")
@each_request
def counts_exact(run: Measured, r: Request) -> str | None:
    """The engine processed and generated what was asked, by its own counts, and streamed no more than that: it may
    stream less, as an incomplete character at the end has no event."""
    last = r.token_n[-1] if r.token_n else 0
    actual, expected = (r.prompt_n, r.predicted_n), (r.prompt_tokens, r.generate_tokens)
    n, most = len(r.token_s), r.counted_n or 0  # an answer may come in one piece
    counted = abs(most - n) <= max(2, COUNT_SHARE * most) if r.counted_n and n > 1 else most <= r.generate_tokens + 2
    if run.lacks("tokens"):  # no event without a token
        fits = counted and len(r.token_s) <= r.generate_tokens
        fits = fits and (run.lacks("usage") or 0 < (r.predicted_n or 0) <= r.generate_tokens)  # it may come to its end
        fits = fits and (None in (r.prompt_n, r.prompt_tokens) or r.prompt_n == r.prompt_tokens)
    else:
        fits = run.lacks("usage") or actual == expected
        fits = fits and 2 <= last <= r.generate_tokens and 0 < len(r.tokens) <= last
    return None if fits else f"prompt, predicted {actual}, asked {expected}; streamed {last}, {len(r.tokens)} ids"


@holds("run", "the engine's final event")
@each_request
def stream_finished(run: Measured, r: Request) -> str | None:
    """The end of a stream alone proves nothing: a server that dies closes it too."""
    return None if r.finished else "no final event"


@holds("run", "0 tokens", needs="cache")
@each_request
def cache_not_hit(run: Measured, r: Request) -> str | None:
    """No part of a prompt may come from a cache, or the time to first token is another one's."""
    return None if r.cache_n == 0 else f"cache_n {r.cache_n}"


@holds("run", "each at or after the one before, the first alone", partly="tokens")
@each_request
def times_ordered(run: Measured, r: Request) -> str | None:
    """Tokens arrive after the request was sent and one after another."""
    uncounted = run.lacks("tokens")
    if not r.token_s or (len(r.token_s) != len(r.token_n) and not uncounted) or r.token_s[0] <= 0:
        return "no first token"
    if any(list(times) != sorted(times) for times in (r.token_s, r.token_n)):
        return "an earlier one after a later one"
    return None if uncounted or r.token_n[0] == 1 else f"the first event carried {r.token_n[0]} tokens"


@holds("run", f"the engine's prompt time, and at most {TTFT_SHARE:.0%} + {TTFT_S * 1000:g} ms more", needs="timings")
@each_request
def ttft_bounded(run: Measured, r: Request) -> str | None:
    """The first token comes after the prompt was processed, and soon after."""
    first, prompt = r.token_s[0] if r.token_s else None, r.engine_prompt_s
    if first is None or prompt is None:
        return None if first is None else "the engine reported no prompt time"
    fits = prompt * (1 - ROUNDING) <= first <= prompt * (1 + TTFT_SHARE) + TTFT_S
    return None if fits else f"first token after {first:.4f} s, the prompt took {prompt:.4f} s"


@holds("run", f"{RATE_SHARE:.0%} + {RATE_S * 1000:g} ms", needs="timings", partly="tokens")
@each_request
def clocks_agree(run: Measured, r: Request) -> str | None:
    """The decode lasted as long by the engine's clock as by ours: neither was stopped, and nothing was buffered."""
    if len(r.token_s) < 2 or not r.whole or r.predicted_n is None or r.predicted_n < 2:
        return None
    ours, engine = r.token_s[-1] - r.token_s[0], r.engine_predicted_s
    # engines count the first token's sampling in or out: a step more or less
    step = ours / (r.predicted_n - 1)
    fits = engine is not None and abs(ours - engine) <= RATE_SHARE * engine + RATE_S + step
    return None if fits else f"{ours:.4f} s here, {engine} s by the engine"


@holds("run", "all layers", needs="buffers")
def layers_offloaded(run: Measured) -> Finding:
    """All layers went to the device, or the baseline is not one. Without a device there are none."""
    on, of = run.observation.report.offloaded_layers, run.observation.report.total_layers
    if run.observation.device_kind == "none":
        return True, "no device"
    return on is not None and on == of, f"{on} of {of}"


@holds("run", "buffers named after the device", needs="buffers")
def device_is_the_one(run: Measured) -> Finding:
    """Weights on the device are on that kind of device: a build without a GPU only warns and serves from the CPU."""
    name = {"cuda": "CUDA", "loopback": "RPC"}.get(run.observation.device_kind)
    names = {b.name for b in run.observation.report.buffers if b.on_device and b.kind == "model"}
    if name is None:
        return not names, f"no device, buffers {sorted(names)}"
    return bool(names) and all(n.startswith(name) for n in names), ", ".join(sorted(names)) or "none"


@holds("run", "more than 0 bytes, none for a baseline")
def placement_moves(run: Measured) -> Finding:
    """An offload placement moves expert weights: on a dense model the flag is accepted and does nothing."""
    moved = run.observation.placement.moved_bytes
    if run.spec.placed.is_baseline:
        return moved == 0, f"{moved} bytes moved"
    tensors, overridden = run.observation.placement.moved_tensors, run.observation.report.overridden
    if overridden is not None:
        told = f"{len(overridden)} tensors were put on the CPU, the header moves {tensors}"
        return moved > 0 and len({*overridden}) == tensors and all("_exps." in name for name in overridden), told
    if run.observation.device_kind == "none":
        untold = run.lacks("buffers")  # where its server put them
        return None if untold else False, "there is no device to move experts from" + ", that is known" * untold
    return moved > 0, f"{moved} bytes in {tensors} tensors moved"


def agrees(measured: int, expected: int) -> bool:
    return abs(measured - expected) <= memory.HEADER_SHARE * expected + memory.HEADER_BYTES


@holds("run", "0.1 % + 1 MiB", needs="buffers")
def placement_on_device(run: Measured) -> Finding:
    """The weights on the device by the engine's report are those that the file's header says must be there."""
    if run.observation.device_kind == "none":
        return True, "no device"
    engine, header = run.observation.report.device_bytes("model"), run.observation.placement.device_bytes
    return engine is not None and agrees(engine, header), f"engine {engine}, header {header} bytes"


ENVIRONMENT = {*process.ENV_ALLOWED, "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "LLAMA_API_KEY", "SHIMMY_BASE_GGUF"}


@holds("run", "names on the allow-list", needs="command")
def environment_clean(run: Measured) -> Finding:
    """llama.cpp applies LLAMA_ARG_* and GGML_* variables silently: one turns a baseline into an offload run."""
    foreign = sorted(set(run.observation.env) - ENVIRONMENT)
    return bool(run.observation.env) and not foreign, ", ".join(foreign) or f"{len(run.observation.env)} allowed"


@holds("run", "no `(debug)`", needs="build")
def build_optimised(run: Measured) -> Finding:
    """A debug build runs many times slower."""
    built = run.observation.report.built
    return built is not None and "(debug)" not in built, built or "the engine's log names no build"


@holds("run", "finite, and not all equal", needs="likeliest")
def output_alive(run: Measured) -> Finding:
    """Weights that are not numbers, or zero, serve happily: the likeliest next tokens' log-probabilities show it."""
    top = run.observation.top_logprobs
    finite = [p for p in top if p is not None and math.isfinite(p)]
    alive = len(top) > 1 and len(finite) == len(top) and max(finite) > min(finite)
    return alive, ", ".join(map(str, top)) or "no log-probabilities"


@holds("run", "SHA-256", partly="file")
def file_is_its_sheet(run: Measured) -> Finding:
    """The file that was run is the one that its sheet describes: a flipped bit shows nowhere else."""
    loaded, written = run.observation.file_sha256, run.sheet.sha256
    return loaded == written, f"file {loaded[:12]}, sheet {written[:12]}"


@holds("run", "not invalid")
def memory_known(run: Measured) -> Finding:
    """No account of device memory contradicts another, or what the engine and the header say must be there."""
    account = run.observation.memory
    contradictions = [r for r in account.reasons if r in memory.INVALID]
    return account.status != "invalid" and not contradictions, ", ".join(contradictions) or str(account.status)


def reconciled(observation: Observation) -> memory.Memory:
    """Device memory by the present rules, from the readings that a run kept."""
    m, report = observation.memory, observation.report
    peak, weights = m.process_bytes if m.method == "rss-peak" else None, observation.placement.device_bytes
    buffers = report.device_by_kind, report.pinned_bytes
    return memory.reconcile(observation.device_kind, m.trace, *buffers, weights, m.context_bytes, peak)


@holds("run", "equal")
def memory_follows(run: Measured) -> Finding:
    """The value of device memory is the one that its readings give."""
    m, recomputed = run.observation.memory, reconciled(run.observation)
    return recomputed == m, f"{m.value_bytes}, its readings give {recomputed.value_bytes}"


@holds("run", "a value from two accounts", degrades=True)
def memory_undoubted(run: Measured) -> Finding:
    """All accounts of device memory could be taken."""
    doubts = [r for r in run.observation.memory.reasons if r not in memory.INVALID]
    undoubted = not doubts and run.observation.memory.status in ("valid", "invalid")
    return undoubted, ", ".join(doubts) or "all accounts taken"


@holds("run", "no thermal, power-brake or hardware slowdown", degrades=True)
def not_slowed(run: Measured) -> Finding:
    """The GPU's clocks were its own while it worked, by what its driver says."""
    readings = [c.events for c in run.observation.counters if c.events is not None]
    slowdowns = sorted({name for events in readings for name in nvml.slowed(events)})
    unslowed = not slowdowns and bool(readings or run.observation.device_kind != "cuda")
    return unslowed, ", ".join(slowdowns) or f"{len(readings)} readings"


def strained(observation: Observation) -> bool:
    """Whether others worked on the host: then processes wait for each other, here and there by tens of milliseconds."""
    return observation.host.foreign_share > FOREIGN_SHARE


@holds("run", f"{FOREIGN_SHARE:.0%} of the host's CPU time", degrades=True, needs="owner")
def host_quiet(run: Measured) -> Finding:
    """Nobody else worked on the host: experts on the CPU share it with everything."""
    return not strained(run.observation), f"{run.observation.host.foreign_share:.1%} by others"


@holds("run", f"{WATCH_SHARE:.0%} of one CPU + {WATCH_ONCE_S * 1000:g} ms", degrades=True)
def watched_lightly(run: Measured) -> Finding:
    """Watching took no time from experts that are computed on all CPUs. Records of earlier code do not say."""
    spent, lasted = run.observation.watch_cpu_s, run.observation.host.elapsed_s
    return spent is None or spent <= WATCH_SHARE * lasted + WATCH_ONCE_S, f"{spent} CPU seconds of {lasted:.2f} s"


@holds("run", f"{CLOCK_S * 1000:g} ms", degrades=True)
def clock_steady(run: Measured) -> Finding:
    """The wall clock was not set and the host did not sleep while the run lasted."""
    step, slept = run.observation.host.clock_step_s, run.observation.host.suspended_s
    return max(abs(step), abs(slept)) <= CLOCK_S, f"step {step:.3f} s, sleep {slept:.3f} s"


@holds("run", "exit 0 within the grace time", degrades=True, needs="process")
def clean_end(run: Measured) -> Finding:
    """The server ended by itself when it was asked to end."""
    return run.observation.exit_code == 0 and not run.observation.exit_killed, f"exit {run.observation.exit_code}"


@holds("run", "these flags and no others", needs="command")
def command_as_asked(run: Measured) -> Finding:
    """The command line has the placement of this run, and nothing that moves, fits, caches or splits by itself."""
    wrong = command.wrong(run.runner, run.spec, run.observation)
    return not wrong, f"wrong: {', '.join(wrong)}" if wrong else "as asked"
