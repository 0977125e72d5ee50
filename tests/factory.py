"""Records made by hand: valid ones, to be broken in exactly one way."""

from __future__ import annotations

from dataclasses import replace

from moelib import audit, client, host, record, run
from moelib.engine import Buffer, Report
from moelib.memory import Reading, Trace, reconcile
from moelib.nvml import NO_GPU

# What a test's real runs may be flagged with: tests share their machine, so others work, and readings take longer.
SHARED = {"host-quiet", "watched-lightly"}
MIB = 1 << 20
EXPERTS = 30 * MIB
BASE = 40 * MIB


def spec(**change) -> run.Spec:
    made = run.Spec(
        study="s",
        model="deepseek-moe-16b",
        weights="twin",
        scale="tiny",
        quant="Q4_K_M",
        placement="baseline",
        load_mode="mmap",
        block=0,
        order=0,
        workloads=("plan-short",),
        requests=2,
        context=1024,
        device="loopback",
        seed=1,
    )
    return replace(made, **change)


def request(index=0, n=5, step=0.01, first=0.02, **change) -> client.Request:
    first += 0.001 * index  # nothing measured is twice the same
    made = client.Request(
        workload="plan-short",
        index=index,
        prompt_tokens=8,
        generate_tokens=n,
        prompt_n=8,
        cache_n=0,
        predicted_n=n,
        engine_prompt_s=0.015,
        engine_predicted_s=step * (n - 1),
        token_s=tuple(round(first + step * i, 6) for i in range(n)),
        token_n=tuple(range(1, n + 1)),
        tokens=tuple(range(300, 300 + n)),
        finished=True,
        started_s=0.1,
        energy_joule=None,
    )
    return replace(made, **change)


def observation(placement="baseline", **change) -> run.Observation:
    moved = 0 if placement == "baseline" else EXPERTS
    on_device = BASE - moved
    buffers = (
        Buffer("RPC0[127.0.0.1:5]", "model", on_device),
        Buffer("RPC0[127.0.0.1:5]", "KV", 4 * MIB),
        Buffer("CPU_Mapped", "model", MIB + moved),
    )
    report = Report(buffers, 5, 5, (8,) if moved else (2,), "11434 (b11434) with GNU for Linux")
    trace = Trace(
        before=(Reading(0.0, 8 * MIB, None),),
        during=(Reading(0.1, on_device, None), Reading(0.2, on_device + 12 * MIB, None)),
    )
    argv = ("llama-server", "-m", "x.gguf", "-ngl", "999", "-c", "1024", "--fit", "off", "--load-mode", "mmap")
    made = run.Observation(
        load_s=0.1,
        wall_s=0.5,
        argv=argv + (() if placement == "baseline" else ("--cpu-moe",)),
        env=("HOME", "LLAMA_API_KEY", "PATH"),
        file_sha256="a" * 64,
        device_kind="loopback",
        threads=1,
        build_info="b11434",
        report=report,
        placement=run.Placement(9 if moved else 0, 3 if moved else 0, moved, on_device, on_device // 4, moved // 4),
        requests=(request(0), request(1)),
        top_logprobs=(-6.5, -6.6),
        memory=reconcile("loopback", trace, report, on_device, None, on_device + 12 * MIB),
        counters=(),
        absent=NO_GPU,
        host=host.Use(0.5, 2, 0.6, 0.6, 100, 0, 0.0, 0.0),
        host_rss_peak_bytes=50 * MIB,
        exit_code=0,
        exit_killed=False,
    )
    return replace(made, **change)


SHEET = {
    "model": "deepseek-moe-16b",
    "quant": "Q4_K_M",
    "sha256": "a" * 64,
    "file_bytes": 42 * MIB,
    "bits_per_weight": 5.5,
    "expert_bytes": EXPERTS,
    "expert_types": {"Q4_K": 9},
    "fallbacks": [],
}


def made(observed=None, attempt=1, status=None, reasons=None, **of_spec) -> record.Record:
    """A record of a run of `spec(**of_spec)`; its status follows from the audit unless given."""
    asked = spec(**of_spec)
    if observed is None and status != "failed":
        observed = observation(asked.placement)
    checks = audit.run(asked, observed, SHEET) if observed else ()
    found = audit.verdict(checks) if observed else ("failed", ("engine-ended",))
    return record.Record(
        run_id=record.run_id(asked, attempt),
        attempt=attempt,
        status=status or found[0],
        reasons=found[1] if reasons is None else reasons,
        message=None,
        spec=asked,
        sheet=SHEET,
        engine={"build": 11434, "version": "version: test", "server_sha256": "b" * 64},
        device={"kind": "loopback", "name": "test device", "uuid": None},
        host={
            "cpu": "test CPU",
            "cpus": 2,
            "ram_bytes": 8 << 30,
            "system": "Linux test",
            "python": "3.11",
            "moelib": "0",
            "commit": None,
            "dirty": None,
        },
        started_utc="2026-01-01T00:00:00+00:00",
        observed=observed,
        audit=checks,
        raw={},
    )


def block(**change) -> list[record.Record]:
    """A valid block: baseline and cpu-moe."""
    return [made(placement="baseline", **change), made(placement="cpu-moe", order=1, **change)]
