"""The columns of a study's data frames, each declared once: label, unit, which direction is better, source, and how it
is read from a record. SI units, nothing rounded; a value that was not measured is None."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from moelib.audit.bounds import PACKETS, copied_bytes
from moelib.audit.record import Record
from moelib.engine.client import WARM_UP

Quantity = Callable[[Record], float | None]
"""A quantity with one value for each run."""
Better = Literal["more", "less"] | None


@dataclass(frozen=True)
class Column:
    """What a column of the runs' frame holds. `get` is the record's attribute, or reads it from a record, or, where
    `by_workload`, is given a workload's name first; the column is then called `name/workload`."""

    name: str
    label: str
    unit: str
    better: Better
    """Whether more or less of it is better; None where neither is."""
    source: str
    """Where the value comes from."""
    get: str | Callable[..., Any]
    by_workload: bool = False

    def of(self, workload: str) -> Callable[[Record], Any]:
        """How its value is read from a record."""
        if isinstance(self.get, str):
            return attrgetter(self.get)
        return self.get(workload) if self.by_workload else self.get


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def tokens_per_s(workload: str) -> Quantity:
    """Decode rate: the mean of tokens/s over all requests of the workload in a run."""
    return lambda r: _mean(q.tps for q in r.observation.requests if q.workload == workload)


def ttft_first(workload: str) -> Quantity:
    """Time to first token of the server's first request of a workload, s."""
    return lambda r: _mean(q.ttft_s for q in r.observation.requests if q.workload == workload and not q.index)


def ttft_warm(workload: str) -> Quantity:
    """Time to first token, s: the mean of the later requests of a workload."""
    return lambda r: _mean(q.ttft_s for q in r.observation.requests if q.workload == workload and q.index)


def vram_needed(r: Record) -> float | None:
    """VRAM that must be free for the run: how much use of the whole GPU grew, else the VRAM of the processes."""
    memory = r.observation.memory
    known = [n for n in (memory.value_bytes, memory.growth_bytes) if n is not None]
    return max(known) if memory.value_bytes is not None else None


def energy_per_token(workload: str) -> Quantity:
    """Joules of the GPU's board for each token generated, prompt included. The counter moves every 100 ms or so, so a
    run's requests are added up; None without a counter, or if it did not move."""

    def per_token(r: Record) -> float | None:
        requests = [q for q in r.observation.requests if q.workload == workload]
        joules = [q.energy_joule for q in requests if q.energy_joule is not None]
        tokens = [q.predicted_n for q in requests if q.predicted_n is not None]
        total = sum(joules) if len(joules) == len(tokens) == len(requests) else None
        return total / sum(tokens) if total else None

    return per_token


def power(r: Record) -> float | None:
    """Watts of the GPU's board during requests: their energy over their time."""
    pairs = [(q.energy_joule, q.total_s) for q in r.observation.requests]
    if not pairs or None in itertools.chain(*pairs):
        return None
    joules, seconds = map(sum, zip(*pairs, strict=True))
    return joules / seconds


def bandwidth_share(workload: str) -> Quantity:
    """tokens/s as a share of the upper bound: reading each active weight once per token at the full bandwidth of the
    memory it is in. The GPU's bandwidth follows from clock and bus width by its driver, the host's is measured."""
    rate = tokens_per_s(workload)

    def share(r: Record) -> float | None:
        device, host = r.device.bandwidth_bytes_per_s, r.host.ram_read_bytes_per_s
        placement, tokens = r.observation.placement, rate(r)
        if not device or not host or tokens is None:
            return None
        return tokens * (placement.device_read_bytes / device + placement.host_read_bytes / host)

    return share


def bus_received(workload: str) -> Quantity:
    """Bytes that the GPU receives over the bus while the warm server processes the workload's prompt."""
    return lambda r: _mean(m.received_bytes for m in r.observation.prompt_traffic if m.workload == workload)


def experts_over_bus(workload: str) -> Quantity:
    """Bytes that crossed the bus for the workload's prompt, of those of all experts to copy and the heads of their
    packets: about 1 for a prompt that needs all of them."""

    def share(r: Record) -> float | None:
        found = [m for m in r.observation.prompt_traffic if m.workload == workload and m.received_bytes is not None]
        most = [copied_bytes(r, m.prompt_tokens) for m in found]
        return _mean(m.received_bytes / n for m, n in zip(found, most, strict=True) if n and m.received_bytes)

    return share


def token_diversity(workload: str) -> Quantity:
    """Different tokens generated, as a share of all: a model that repeats itself keeps few experts busy."""
    return lambda r: _mean(
        len(set(q.tokens)) / len(q.tokens) for q in r.observation.requests if q.workload == workload and q.tokens
    )


def prompt_tokens(workload: str) -> Quantity:
    """Tokens of the workload's prompt, by the engine's count."""
    return lambda r: _mean(q.prompt_n for q in r.observation.requests if q.workload == workload)


def device_buffers(*kinds: str) -> Quantity:
    """Bytes of the engine's buffers of these kinds on the device; None where none are known or no device is."""

    def total(r: Record) -> float | None:
        if r.device.kind == "none":
            return None
        sizes = [r.observation.report.device_bytes(kind) for kind in kinds]
        return None if None in sizes else sum(n for n in sizes if n is not None)

    return total


def machine(r: Record) -> str:
    """Tells machines apart: the first digits of the host's identity, or in older records of the GPU's."""
    return (r.host.host_id or r.device.uuid or "unknown")[:12]


def cached_share(r: Record) -> float | None:
    """Share of the file that was in the system's page cache as the server was started: 1 cached, 0 cold."""
    cached = r.observation.cached_bytes
    return None if cached is None else cached / r.sheet.file_bytes


def monitoring(r: Record) -> float | None:
    """Share of one CPU that monitoring the run took; None in records of earlier code."""
    spent = r.observation.watch_cpu_s
    return None if spent is None or not r.observation.host.elapsed_s else spent / r.observation.host.elapsed_s


WHERE: dict[str, Callable[[Record], object]] = {
    "study": attrgetter("spec.study"),
    "model": attrgetter("spec.model"),
    "quant": attrgetter("spec.quant"),
    "placement": attrgetter("spec.placement"),
    "load_mode": attrgetter("spec.load_mode"),
    "round": lambda r: r.spec.block + 1,
    "machine": machine,
    "status": attrgetter("status"),
    "run_id": attrgetter("run_id"),
    "digest": attrgetter("digest"),
}
"""Columns that say which run it is, and lead to its record; the runs of a `round` are compared with each other."""

SETUP: dict[str, Callable[[Record], object]] = {
    "weights": attrgetter("spec.weights"),
    "scale": attrgetter("spec.scale"),
    "context": attrgetter("spec.context"),
    "device": attrgetter("device.kind"),
    "gpu": lambda r: r.device.name,
    "engine": attrgetter("engine.version"),
    "host_shared": lambda r: bool(r.host.shared),
}
"""Columns that must agree for runs to be compared."""

COLUMNS = (
    Column(
        "vram_bytes",
        "VRAM",
        "bytes",
        "less",
        "peak of the run's processes: driver, engine, header",
        "observed.memory.value_bytes",
    ),
    Column(
        "vram_engine_bytes",
        "engine's buffers",
        "bytes",
        None,
        "llama.cpp's load report",
        "observed.memory.engine_bytes",
    ),
    Column(
        "vram_rest_bytes",
        "VRAM beyond them",
        "bytes",
        None,
        "difference of these two",
        "observed.memory.residual_bytes",
    ),
    Column(
        "vram_growth_bytes",
        "whole device",
        "bytes",
        "less",
        "growth of the whole GPU's use",
        "observed.memory.growth_bytes",
    ),
    Column(
        "vram_weights_bytes",
        "weights in VRAM",
        "bytes",
        "less",
        "header of the file",
        "observed.placement.device_bytes",
    ),
    Column(
        "vram_cache_bytes",
        "KV cache in VRAM",
        "bytes",
        "less",
        "llama.cpp's load report, with states of recurrent layers",
        device_buffers("KV", "RS"),
    ),
    Column(
        "vram_compute_bytes",
        "compute buffer in VRAM",
        "bytes",
        "less",
        "llama.cpp's load report",
        device_buffers("compute"),
    ),
    Column("vram_needed_bytes", "VRAM needed", "bytes", "less", "the larger of VRAM and that growth", vram_needed),
    Column("empty_context_bytes", "empty context", "bytes", None, "measured before the runs", "device.context_bytes"),
    Column("context_tokens", "context", "", None, "the placement's own, else the study's", "spec.context_tokens"),
    Column(
        "moved_layers",
        "layers with experts on the CPU",
        "",
        None,
        "header of the file",
        "observed.placement.moved_blocks",
    ),
    Column("moved_bytes", "experts on the CPU", "bytes", None, "header of the file", "observed.placement.moved_bytes"),
    Column("cpu_threads", "CPU threads", "", None, "llama-server's command line", "observed.threads"),
    Column(
        "host_rss_peak_bytes",
        "host RSS, peak",
        "bytes",
        "less",
        "VmHWM of the server",
        "observed.host_rss_peak_bytes",
    ),
    Column("load_s", "load time", "s", "less", "start of the process to the first request taken", "observed.load_s"),
    Column("cached_share", "file in the page cache", "", None, "mincore, as the server was started", cached_share),
    Column("disk_read_bytes", "read from disks", "bytes", "less", "/proc of the server", "observed.disk_read_bytes"),
    Column("wall_s", "whole run", "s", "less", "this program's clock", "observed.wall_s"),
    Column("engine_s", "load and requests", "s", None, "the engine's timings", "observed.engine_s"),
    Column("major_faults", "major page faults", "", "less", "/proc of the server", "observed.host.major_faults"),
    Column(
        "gpu_clock_mhz",
        "GPU clock",
        "MHz",
        None,
        "mean of NVML's readings",
        lambda r: _mean(c.sm_clock_mhz for c in r.observation.counters),
    ),
    Column("board_watt", "board power", "W", "less", "energy of the requests over their time", power),
    Column("monitor_cpu_share", "monitoring, of one CPU", "", "less", "CPU time of its thread", monitoring),
    Column(
        "vram_read_bytes",
        "read from VRAM per token",
        "bytes",
        None,
        "header of the file",
        "observed.placement.device_read_bytes",
    ),
    Column(
        "ram_read_bytes",
        "read from host RAM per token",
        "bytes",
        None,
        "header of the file",
        "observed.placement.host_read_bytes",
    ),
    Column(
        "vram_bytes_per_s",
        "VRAM bandwidth",
        "bytes/s",
        "more",
        "clock and bus width by the driver",
        "device.bandwidth_bytes_per_s",
    ),
    Column(
        "ram_bytes_per_s",
        "host RAM bandwidth",
        "bytes/s",
        "more",
        "measured before the runs",
        "host.ram_read_bytes_per_s",
    ),
    Column("prompt_tokens", "prompt", "tokens", None, "the engine's count", prompt_tokens, True),
    Column("tokens_per_s", "tokens/s", "1/s", "more", f"as they arrive, after {WARM_UP}", tokens_per_s, True),
    Column(
        "ttft_first_s",
        "TTFT, first request",
        "s",
        "less",
        "request sent to first token, of a fresh server",
        ttft_first,
        True,
    ),
    Column(
        "ttft_warm_s",
        "TTFT, warm requests",
        "s",
        "less",
        "request sent to first token, mean of the later requests",
        ttft_warm,
        True,
    ),
    Column("joule_per_token", "energy per token", "J", "less", "NVML's counter", energy_per_token, True),
    Column("bus_received_bytes", "over PCIe, per prompt", "bytes", "less", "NVML's counter", bus_received, True),
    Column(
        "experts_over_bus",
        "over PCIe, of all experts to copy",
        "",
        None,
        f"counter over {PACKETS:g} times header",
        experts_over_bus,
        True,
    ),
    Column("token_diversity", "different tokens generated", "", None, "ids as streamed", token_diversity, True),
    Column("bandwidth_share", "share of the memory bound", "", "more", "rate over bandwidths", bandwidth_share, True),
)
"""Measured columns of the runs' frame, in order."""

REQUESTS: dict[str, str] = {
    "workload": "workload",
    "request": "index",
    "prompt_tokens": "prompt_n",
    "generated_tokens": "predicted_n",
    "ttft_s": "ttft_s",
    "tokens_per_s": "tps",
    "total_s": "total_s",
    "energy_joule": "energy_joule",
}
"""Column of the requests' frame -> the request's attribute. Request 0 is the first of a fresh server."""


def columns(workloads: Iterable[str]) -> dict[str, Column]:
    """Name of each measured column of the runs' frame -> what it holds."""
    names = tuple(workloads)
    return {name: c for c in COLUMNS for name in ([f"{c.name}/{w}" for w in names] if c.by_workload else [c.name])}
