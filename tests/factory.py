"""Records made by hand, with the logs that bear them out: valid ones, to be broken in exactly one way."""

from __future__ import annotations

import gzip
import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

from moelib.audit import audit, record
from moelib.audit.invariants import Measured
from moelib.base import files
from moelib.catalogue import params
from moelib.catalogue.facts import DeviceFacts, EngineFacts, HostFacts, Manifest
from moelib.engine import client
from moelib.engine.buffers import Buffer, Report
from moelib.gguf import gguf_file, twin
from moelib.machine import host
from moelib.measure import run
from moelib.measure.memory import Reading, Trace, reconcile
from moelib.measure.nvml import NO_GPU
from moelib.models.quantize import Quantised
from moelib.study import gather, plan
from moelib.study.status import Status
from moelib.study.study import Contents, Study

# What a test's real runs may be flagged with: tests share their machine, so others work, and readings take longer.
SHARED = {"host-quiet", "watched-lightly"}
MIB = 1 << 20
EXPERTS = 30 * MIB
BASE = 40 * MIB
USED, COUNT = 6, 64  # experts of a token, and of a layer
STARTED_S = 0.05  # of the engine's log, after the process


def spec(**change) -> run.Spec:
    usual = run.Spec(
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
    return replace(usual, **change)


def request(index=0, n=5, step=0.01, first=0.02, **change) -> client.Request:
    first += 0.001 * index  # nothing measured is twice the same
    usual = client.Request(
        workload="plan-short",
        index=index,
        prompt_tokens=8,
        generate_tokens=n,
        prompt_n=8,
        cache_n=0,
        predicted_n=n,
        engine_prompt_s=0.018,
        engine_predicted_s=step * (n - 1),
        token_s=tuple(round(first + step * i, 6) for i in range(n)),
        token_n=tuple(range(1, n + 1)),
        tokens=tuple(range(300, 300 + n)),
        finished=True,
        started_s=round(0.12 + 0.15 * index, 6),
        energy_joule=None,
    )
    return replace(usual, **change)


def argv(placement="baseline", context=1024, load_mode="mmap"):
    """The command line of a run on the loopback device, as `engine` makes it."""
    line = f"llama-server -m x.gguf --host 127.0.0.1 --port 0 -ngl 999 -c {context} -np 1 -t 1 -tb 1 -fa on --no-ui"
    line += f" --offline --fit off --cache-ram 0 --ctx-checkpoints 0 --lazy-mode off -lv 4 --load-mode {load_mode}"
    line += {"baseline": "", "cpu-moe": " --cpu-moe"}.get(placement, f" --n-cpu-moe {placement.partition('=')[2]}")
    return tuple(f"{line} --rpc 127.0.0.1:5 --device RPC0".split())


def share(nbytes):
    """Of experts' bytes those that a token reads."""
    return nbytes * USED // COUNT


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
    usual = run.Observation(
        load_s=0.1,
        wall_s=0.5,
        argv=argv(placement),
        env=("HOME", "LLAMA_API_KEY", "PATH"),
        file_sha256="a" * 64,
        device_kind="loopback",
        threads=1,
        build_info="b11434",
        report=report,
        placement=run.Placement(
            *(9, 3) if moved else (0, 0), moved, on_device, BASE - EXPERTS + share(EXPERTS - moved), share(moved)
        ),
        requests=(request(0), request(1)),
        top_logprobs=(-6.5, -6.6),
        memory=reconcile(
            "loopback", trace, report.device_by_kind, report.pinned_bytes, on_device, None, on_device + 12 * MIB
        ),
        counters=(),
        absent=NO_GPU,
        host=host.Use(0.5, 2, 0.6, 0.6, 100, 0, 0.0, 0.0),
        host_rss_peak_bytes=50 * MIB,
        exit_code=0,
        exit_killed=False,
    )
    return replace(usual, **change)


MANIFEST = Manifest(
    model="deepseek-moe-16b",
    quant="Q4_K_M",
    scale="tiny",
    weights="twin",
    origin="made up",
    file_name="x.gguf",
    file_bytes=40 * MIB,
    predicted_bytes=40 * MIB,
    sha256="a" * 64,
    source_sha256="e" * 64,
    parameters=60_000_000,
    bits_per_weight=5.5,
    tensor_types={"F32": 12, "Q4_K": 39},
    expert_types={"Q4_K": 9},
    expert_bytes=EXPERTS,
    fallbacks=(),
    engine_build=11434,
    engine_version="version: test",
    quantize_s=1.0,
)
ENGINE = EngineFacts(build=11434, version="version: test", server_sha256="b" * 64)
DEVICE = DeviceFacts(kind="loopback", name="test device", uuid=None)
HOST = HostFacts(
    cpu="test CPU",
    cpus=2,
    ram_bytes=8 << 30,
    system="Linux test",
    python="3.11",
    moelib="0",
    commit=None,
    dirty=None,
    host_id="d" * 32,
)


def measured(run_spec, observed, sheet=MANIFEST, device=DEVICE, host=HOST):
    return Measured(run_spec, observed, sheet, device, host)


def record_of(observed=None, attempt=1, status=None, reasons=None, **of_spec) -> record.Record:
    """A record of a run of `spec(**of_spec)`; its status follows from the audit unless given."""
    run_spec = spec(**of_spec)
    if observed is None and status != "failed":
        observed = observation(run_spec.placement)
    checks = audit.run(measured(run_spec, observed)) if observed else ()
    verdict = audit.verdict(checks) if observed else ("failed", ("engine-ended",))
    return record.Record(
        run_id=record.run_id(run_spec, attempt),
        attempt=attempt,
        status=status or verdict[0],
        reasons=verdict[1] if reasons is None else reasons,
        message=None,
        spec=run_spec,
        sheet=MANIFEST,
        engine=ENGINE,
        device=DEVICE,
        host=HOST,
        started_utc=f"2026-01-01T00:{run_spec.block:02}:{10 * run_spec.order:02}+00:00",
        observed=observed,
        audit=checks,
        raw={},
    )


def block(**change) -> list[record.Record]:
    """A valid block: baseline and cpu-moe."""
    return [record_of(placement="baseline", **change), record_of(placement="cpu-moe", order=1, **change)]


def with_observed(r: record.Record, **change) -> record.Record:
    """`r` with these parts of its observation changed."""
    return r.model_copy(update={"observed": replace(r.observed, **change)})


def with_spec(r: record.Record, **change) -> record.Record:
    return r.model_copy(update={"spec": replace(r.spec, **change)})


def with_facts(r: record.Record, part: str, **change) -> record.Record:
    """`r` with its manifest, engine, device or host changed: `part` says which."""
    return r.model_copy(update={part: getattr(r, part).model_copy(update=change)})


def log_of(r: record.Record) -> str:
    """What llama-server prints of such a run, in the lines and the format of b11434."""
    o, lines = r.observed, []

    def say(t, text):
        whole = int(t)
        micro = round((t - whole) * 1e6)
        lines.append(f"{whole // 60}.{whole % 60:02}.{micro // 1000:03}.{micro % 1000:03} I {text}")

    say(0.001, f"common_params_print_info: build {o.report.built}")
    say(0.002, f"system_info: n_threads = {o.threads} (n_threads_batch = {o.threads}) / 2")
    for name, n in r.sheet.tensor_types.items():
        say(0.003, f"llama_model_loader: - type {name.lower():>4}: {n:4} tensors")
    say(0.004, f"print_info: file size   = 39.34 MiB ({r.sheet.bits_per_weight:.2f} BPW)")
    say(0.004, f"print_info: model params          = {r.sheet.parameters / 1e6:.2f} M")
    say(0.004, f"print_info: n_expert              = {COUNT}")
    say(0.004, f"print_info: n_expert_used         = {USED}")
    say(0.005, f"load_tensors: loading model tensors, this can take a while... (load_mode = {r.spec.load_mode})")
    say(0.006, f"load_tensors: offloaded {o.report.offloaded_layers}/{o.report.total_layers} layers to GPU")
    for b in o.report.buffers:
        say(0.007, f"load_tensors: {b.name} {b.kind} buffer size = {b.size_bytes / MIB:8.2f} MiB")
    placed = r.spec.placed
    kv, splits = placed.kv or "f16", o.report.graph_splits
    say(0.008, f"llama_context: n_ctx                 = {r.spec.context_tokens}")
    say(0.008, f"llama_context: n_ubatch              = {placed.ubatch or min(512, r.spec.context_tokens)}")
    say(0.008, f"llama_kv_cache: size = 4.00 MiB ( 1024 cells), K ({kv}):    2.00 MiB, V ({kv}):    2.00 MiB")
    said = f"{splits[0]} / {splits[1]}" if len(splits) > 1 else str(splits[0])
    batches = " (pp bs=512, tg bs=1)" if len(splits) > 1 else ""
    say(0.009, f"sched_reserve: graph{batches}: nodes = 95, splits = {said}, input objects = 4")
    say(o.load_s - STARTED_S, "srv  llama_server: listening on http://127.0.0.1:5")
    for i, q in enumerate(o.requests):
        launched = q.started_s - STARTED_S + 0.0003
        say(launched, f"slot launch_slot_: id  0 | task {i} | processing task, is_child = 0")
        ended = launched + (q.total_s or 0)
        slot, prompt, decode = f"slot print_timing: id  0 | task {i} |", q.engine_prompt_s, q.engine_predicted_s
        say(ended, f"{slot} prompt eval time = {prompt * 1e3:10.2f} ms / {q.prompt_n:5} tokens (1 ms per token)")
        say(ended, f"{slot}        eval time = {decode * 1e3:10.2f} ms / {q.predicted_n:5} tokens (1 ms per token)")
    return "\n".join(lines) + "\n"


def keep(folder: Path, r: record.Record, log: str | None = None) -> record.Record:
    """Write a record into a study's folder, and the log of its run; returns it as it stands there."""
    if r.observed is not None:
        name, packed = f"{r.run_id}.server.log.gz", gzip.compress((log or log_of(r)).encode(), mtime=0)
        (folder / "raw").mkdir(parents=True, exist_ok=True)
        (folder / "raw" / name).write_bytes(packed)
        r = r.model_copy(update={"raw": {name: hashlib.sha256(packed).hexdigest()}})
    return record.write(folder, r)


def evidence(records) -> gather.Evidence:
    """Records that lie in no folder, each audited without a log."""
    wrong = {r.run_id: why for r in records if (why := gather.why_not(r))}
    checks = {r.run_id: tuple((c.id, c.passed) for c in gather.audit_today(r)) for r in records}
    return gather.Evidence(list(records), [], wrong, {}, checks=checks)


WORKLOADS = {"plan-short": params.Workload(name="plan-short", title="t", text="x", generate_tokens=5)}
"""As the plan of such a record's study has them."""


def study_of(parameters, cells, records, workloads=None, manifests=(), overhead=None, of=None, name="s") -> Study:
    """A study of these parts that is on no disk; `of`: its evidence, where that is not of the records alone."""
    fields = {"study": parameters, "workloads": WORKLOADS if workloads is None else workloads, "cells": cells}
    the_plan = plan.Plan.model_construct(schema_version=record.SCHEMA_VERSION, **fields)
    return Study(Path(name), the_plan, Contents(of or evidence(records), tuple(manifests), overhead or {}))


GIB = 1 << 30
SWEPT = {"Q2_K": 5, "Q4_K_M": 8, "Q8_0": 14}
"""Quant -> GiB of the experts of a study made up here; of 28 layers, and 1 GiB for the rest."""


def swept(
    quants=tuple(SWEPT), layers=(0, 7, 14, 21, 28), prompts=(8, 512), load_modes=("mmap", "none"), rounds=3, **device
) -> Study:
    """A study of a made-up GPU by exact laws and a scatter of some per cent: `layers` in the first load mode, all of
    them on the CPU in the others; a workload for each length of a prompt, whose experts are copied from 32 tokens on.

    device: what is different of the GPU.
    """
    arms = [("baseline" if not n else "cpu-moe" if n == 28 else f"n-cpu-moe={n}", load_modes[0], n) for n in layers]
    arms += [("cpu-moe", mode, 28) for mode in load_modes[1:]]
    cells = {}
    for quant in quants:
        cells[f"deepseek-moe-16b/{quant}"] = Status(
            tuple(tuple(_swept(quant, n, arm, prompts) for arm in arms) for n in range(rounds)), (), Counter()
        )
    modes = tuple(params.PlacementMode(placement=placement, load_mode=mode) for placement, mode, _ in arms)
    names = tuple(f"prompt-{n}" for n in prompts)
    parameters = params.Study(
        name="swept",
        title="t",
        models=("deepseek-moe-16b",),
        weights="twin",
        quants=quants,
        arms=modes,
        workloads=names,
        blocks=rounds,
        seed=1,
    )
    made = study_of(parameters, [], [])
    facts = DEVICE.model_copy(update={"kind": "cuda", "name": "a GPU", **device})
    made.__dict__["statuses"] = {
        name: replace(s, rounds=tuple(tuple(r.model_copy(update={"device": facts}) for r in b) for b in s.rounds))
        for name, s in cells.items()
    }
    return made


def _swept(quant, n, arm, prompts) -> record.Record:
    placement, load_mode, layers = arm
    scatter = 1 + 0.02 * ((n + layers // 7) % 3 - 1)
    experts = SWEPT[quant] * GIB * layers // 28
    weights, kv, compute = (SWEPT[quant] + 1) * GIB - experts, 224 * MIB, (245 if layers else 81) * MIB
    step = 0.003 + scatter * (layers * 0.0002 + share(experts) / 80e9)
    requests, traffic = [], []
    for i, tokens in enumerate(prompts):
        by_gpu = tokens >= 32
        moved_s = experts / (54e9 if load_mode == "none" else 9e9) if by_gpu else layers * tokens * 0.25e-3
        for index in (0, 1):
            first = 0.01 + tokens * 5e-5 + scatter * moved_s
            change = {"workload": f"prompt-{tokens}", "prompt_tokens": tokens, "prompt_n": tokens}
            requests.append(request(index, step=step, first=first, started_s=0.2 * (2 * i + index), **change))
        traffic.append(run.PromptTraffic(f"prompt-{tokens}", tokens, int(experts * 1.08) if by_gpu else 0, 0))
    base = observation(placement)
    sizes = {"model": weights, "KV": kv, "compute": compute}
    buffers = tuple(Buffer("CUDA0", kind, size) for kind, size in sizes.items())
    memory = replace(base.memory, value_bytes=weights + kv + compute + 700 * MIB, engine_bytes=weights + kv + compute)
    observed = replace(
        base,
        report=replace(base.report, buffers=buffers),
        placement=run.Placement(3 * layers, layers, experts, weights, GIB, share(experts)),
        requests=tuple(requests),
        prompt_traffic=tuple(traffic),
        memory=memory,
    )
    names = {"placement": placement, "load_mode": load_mode, "quant": quant, "block": n}
    made = record_of(observed, status="valid", reasons=(), workloads=tuple(f"prompt-{t}" for t in prompts), **names)
    return with_facts(made, "host", ram_read_bytes_per_s=80e9)


def nano(folder: Path) -> Quantised:
    """The smallest twin, unquantised, with a manifest of its own."""
    path = folder / "x.gguf"
    sha256 = twin.write(path, params.model("deepseek-moe-16b").at_scale("nano"))
    manifest = MANIFEST.model_copy(update={"sha256": sha256, "file_bytes": path.stat().st_size})
    return Quantised(gguf_file.read_header(path), manifest.model_dump(), files.Hashed(path, known=sha256))
