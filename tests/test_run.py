"""Single runs of the real llama-server on the loopback device, and of servers that misbehave."""

import itertools
import json
import mmap
from contextlib import contextmanager

import pytest
from conftest import need_disk
from factory import SHARED, measured, spec

from moelib.audit import audit
from moelib.catalogue import params
from moelib.catalogue.facts import Manifest
from moelib.gguf import twin
from moelib.machine import pagecache
from moelib.measure import device, run
from moelib.measure.llama_server import LlamaServer, Serving, read_stream
from moelib.measure.nvml import Counters, Traffic
from moelib.models import models, quantize

pytestmark = pytest.mark.engine


@pytest.fixture
def loopback():
    return device.Loopback()


@pytest.fixture
def quantised(home, engine, tmp_path):
    source = models.make_twin("deepseek-moe-16b", "tiny")
    return quantize.make(source, "Q4_K_M", engine, tmp_path / "q")


def spec_of(**change):
    return spec(**{"workloads": ("plan-short", "long-512"), **change})


def execute(engine, quantised, where, tmp_path, **change):
    run_spec = spec_of(**change)
    outcome = run.execute(run_spec, quantised, LlamaServer(engine), where, tmp_path / "work")
    assert outcome.reason is None, outcome.message
    return outcome.observation, audit.run(measured(run_spec, outcome.observation, Manifest(**quantised.manifest)))


def failed(checks):
    """What failed, but for what comes of sharing the machine."""
    return {c.id for c in checks if not c.passed} - SHARED


def verdict(checks):
    return audit.verdict([c for c in checks if c.id not in SHARED])


def test_a_block_is_valid_and_memory_falls_by_the_experts(engine, quantised, loopback, tmp_path):
    base, checks = execute(engine, quantised, loopback, tmp_path)
    assert failed(checks) == set()
    moe, checks = execute(engine, quantised, loopback, tmp_path, placement="cpu-moe")
    assert failed(checks) == set()
    saved = base.memory.value_bytes - moe.memory.value_bytes
    assert saved >= moe.placement.moved_bytes == quantised.manifest["expert_bytes"]
    assert max(moe.report.graph_splits) > max(base.report.graph_splits)
    assert {b.name.partition("[")[0] for b in base.report.buffers if b.on_device} <= {"RPC0", "RPC"}
    for observed in (base, moe):
        assert [(r.workload, r.index, r.prompt_n, r.predicted_n) for r in observed.requests] == [
            ("plan-short", 0, 8, 100),
            ("plan-short", 1, 8, 100),
            ("long-512", 0, 512, 100),
            ("long-512", 1, 512, 100),
        ]
        assert all(0 < r.ttft_s < 10 and 1 < r.tps < 1e5 for r in observed.requests)
        assert observed.engine_s < observed.wall_s
        assert observed.exit_code == 0
    # the same weights on either side compute the same tokens, almost always: kernels differ in rounding
    assert base.requests[0].tokens[0] == moe.requests[0].tokens[0]


def test_n_cpu_moe_moves_the_first_blocks_only(engine, quantised, loopback, tmp_path):
    observed, checks = execute(engine, quantised, loopback, tmp_path, placement="n-cpu-moe=2", workloads=("smoke",))
    assert failed(checks) == set()
    assert (observed.placement.moved_blocks, observed.placement.moved_tensors) == (1, 3)  # block 0 is dense


def test_a_placements_settings_reach_the_engine(engine, quantised, loopback, tmp_path):
    """A smaller batch takes a smaller compute buffer, another type a smaller KV cache; the log has the threads."""
    plain, _ = execute(engine, quantised, loopback, tmp_path, placement="cpu-moe", workloads=("smoke",))
    placement = "cpu-moe,ubatch=32,op-offload=off,kv=q8_0,threads=1"
    observed, checks = execute(engine, quantised, loopback, tmp_path, placement=placement, workloads=("smoke",))
    assert failed(checks) == set()
    assert observed.threads == 1
    assert observed.report.device_bytes("compute") < plain.report.device_bytes("compute")
    smaller = plain.report.device_bytes("KV") * 34 / 64  # q8_0 takes 34 bytes for 32 numbers, f16 64
    assert abs(observed.report.device_bytes("KV") - smaller) < 0.01 * (1 << 20)  # as printed
    assert observed.placement == plain.placement


def test_load_mode_none_is_obeyed(engine, quantised, loopback, tmp_path):
    observed, checks = execute(
        engine, quantised, loopback, tmp_path, placement="cpu-moe", load_mode="none", workloads=("smoke",)
    )
    assert failed(checks) == set()
    assert "CPU_Mapped" not in {b.name for b in observed.report.buffers}


@pytest.mark.parametrize("load_mode", ["mmap", "none"])
def test_a_cold_run_reads_its_file_from_the_disk_and_any_other_finds_it_cached(
    engine, quantised, loopback, tmp_path, load_mode
):
    need_disk(quantised.path.parent)
    how = {"load_mode": load_mode, "workloads": ("smoke",)}
    size = quantised.header.file_bytes
    for _ in range(2):  # each of them after the other
        cold, checks = execute(engine, quantised, loopback, tmp_path, placement="cpu-moe,cache=cold", **how)
        assert failed(checks) == set()
        assert cold.cached_bytes <= pagecache.COLD * size
        assert size <= cold.disk_read_bytes
        pagecache.drop([quantised.path])
        cached, checks = execute(engine, quantised, loopback, tmp_path, placement="cpu-moe", **how)
        assert failed(checks) == set()
        # the system may take back a page at any time: what counts as cached is what the word says, not every page
        assert pagecache.CACHED * size <= cached.cached_bytes <= size
        assert cached.disk_read_bytes < size
    assert cold.report.device_by_kind == cached.report.device_by_kind
    assert {a for a in cold.argv if ":" not in a} == {a for a in cached.argv if ":" not in a}  # but for the port


def test_a_cold_run_of_a_file_that_somebody_holds_fails_with_what_to_do(engine, quantised, loopback, tmp_path):
    with quantised.path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as held:
        assert sum(held[i] for i in range(0, len(held), mmap.PAGESIZE))
        outcome = run.execute(
            spec_of(placement="baseline,cache=cold"), quantised, LlamaServer(engine), loopback, tmp_path / "work"
        )
    assert (outcome.observation, outcome.reason) == (None, "file-not-cold")
    assert "put $MOELIB_MODELS on a disk" in outcome.message
    assert "no other process has the file mapped" in outcome.message
    assert not outcome.logs[0].exists()  # no server was started for it


def test_where_the_system_does_not_tell_a_run_says_why_and_a_cold_one_fails(
    engine, quantised, loopback, tmp_path, monkeypatch
):
    monkeypatch.setattr(pagecache, "_untold", lambda path: f"nobody tells of {path.name}")
    observed, checks = execute(engine, quantised, loopback, tmp_path, workloads=("smoke",))
    assert failed(checks) == set()
    assert (observed.cached_bytes, observed.absent["cached_bytes"]) == (None, f"nobody tells of {quantised.path.name}")
    cold = spec_of(placement="baseline,cache=cold")
    outcome = run.execute(cold, quantised, LlamaServer(engine), loopback, tmp_path / "work")
    assert outcome.reason == "file-not-cold"
    assert outcome.message.startswith("cache=cold cannot be shown here, leave it out: nobody tells")


def test_the_bus_is_watched_through_each_prompt_or_the_record_says_why_not(engine, quantised, tmp_path):
    class WithBus(device.Loopback):
        """The loopback device with counters that move by 1000 and 10 a look, in a link of so many bytes a second."""

        @contextmanager
        def session(self, *args):
            received, sent = itertools.count(2**32 - 5000, 1000), itertools.count(7, 10)
            with super().session(*args) as session:
                session.traffic = lambda: Traffic(self.link, lambda: [next(received) % 2**32, next(sent)])
                yield session

    where = WithBus()
    where.link = 2**32 / 60  # a turn takes a minute
    observed, checks = execute(engine, quantised, where, tmp_path)
    assert [(t.workload, t.prompt_tokens) for t in observed.prompt_traffic] == [("plan-short", 8), ("long-512", 512)]
    for t in observed.prompt_traffic:
        looks, rest = divmod(t.received_bytes, 1000)
        assert (rest, t.sent_bytes) == (0, 10 * looks)
        assert 1 <= looks <= observed.wall_s / device.BUS_S + 2
    assert "received_bytes" not in observed.absent
    assert failed(checks) == set()  # and the timed requests are as they were
    where.link = 2**32 / 0.001
    observed, _ = execute(engine, quantised, where, tmp_path)
    assert {t.received_bytes for t in observed.prompt_traffic} == {None}
    assert "the counter can turn over in 1 ms" in observed.absent["received_bytes"]


def test_clocks_and_power_are_asked_for_between_requests(engine, quantised, tmp_path):
    class WithCounters(device.Loopback):
        @contextmanager
        def session(self, *args):
            with super().session(*args) as session:
                session.counters = lambda t_s: Counters(t_s, events=0)
                yield session

    observed, _ = execute(engine, quantised, WithCounters(), tmp_path, workloads=("plan-short",))
    first, *after = [c.t_s for c in observed.counters]
    assert (
        first < observed.requests[0].started_s - observed.load_s / 2
    )  # before half of the load, which has a clock of its own
    ends = [r.started_s + r.total_s for r in observed.requests]
    assert all(end <= t for end, t in zip(ends, after, strict=True))
    assert all(t <= r.started_s for t, r in zip(after, observed.requests[1:], strict=False))


def test_without_a_bus_no_prompt_is_asked_again(engine, quantised, loopback, tmp_path, monkeypatch):
    lengths, ask = [], Serving.ask
    monkeypatch.setattr(Serving, "ask", lambda server, content, n: lengths.append(n) or ask(server, content, n))
    observed, _ = execute(engine, quantised, loopback, tmp_path, workloads=("smoke",))
    assert observed.prompt_traffic == ()
    assert lengths == [r.generate_tokens for r in observed.requests]
    assert 0 < observed.watch_cpu_s < observed.wall_s


def test_without_a_device_the_record_says_so(engine, quantised, tmp_path):
    observed, checks = execute(engine, quantised, device.NoDevice(), tmp_path, workloads=("smoke",))
    assert (observed.memory.value_bytes, observed.memory.reasons) == (None, ("no-device",))
    assert verdict(checks) == ("degraded", ("memory-undoubted",))
    observed, checks = execute(
        engine, quantised, device.NoDevice(), tmp_path, placement="cpu-moe", workloads=("smoke",)
    )
    assert "placement-moves" in failed(checks)


def test_a_dense_model_makes_cpu_moe_invalid(engine, home, loopback, tmp_path):
    """llama.cpp accepts the flag on a model without experts, and nothing moves."""
    geometry = params.model("deepseek-moe-16b").at_scale("nano")
    dense = geometry.model_copy(update={"leading_dense_block_count": geometry.block_count})
    path = tmp_path / "dense-F16.gguf"
    sha256 = models.once(path, {}, lambda: {"sha256": twin.write(path, dense)})["sha256"]
    source = models.Source("dense", "real", "full", path, sha256, "written by this test")
    file = quantize.make(source, "Q8_0", engine, tmp_path / "q")
    base, checks = execute(engine, file, loopback, tmp_path, workloads=("smoke",))
    assert failed(checks) == set()
    moe, checks = execute(engine, file, loopback, tmp_path, placement="cpu-moe", workloads=("smoke",))
    assert verdict(checks) == ("invalid", ("placement-moves",))
    assert moe.report.device_bytes("model") == base.report.device_bytes("model")


def test_no_key_on_the_command_line_or_in_a_log(engine, quantised, loopback, tmp_path, monkeypatch):
    monkeypatch.setattr(run.process, "new_key", lambda: "sesame-open-0123456789")
    observed, _ = execute(engine, quantised, loopback, tmp_path, workloads=("smoke",))
    assert not any("sesame" in a for a in observed.argv)
    for log in (tmp_path / "work").glob("*.log"):
        assert "sesame" not in log.read_text(errors="replace", encoding="utf-8")


def test_an_environment_that_would_turn_a_baseline_into_an_offload_is_kept_out(
    engine, quantised, loopback, tmp_path, monkeypatch
):
    monkeypatch.setenv("LLAMA_ARG_CPU_MOE", "1")
    _, checks = execute(engine, quantised, loopback, tmp_path, workloads=("smoke",))
    assert failed(checks) == set()


def test_a_stream_is_read_by_the_engines_counts_not_by_events():
    """Two tokens in one event, as when a character's bytes come in two tokens."""
    workload = params.workload("smoke")

    def event(**data):
        return b"data: " + json.dumps(data).encode()

    lines = [
        (0.1, event(tokens=[5], stop=False, timings={"predicted_n": 1})),
        (0.1, b""),
        (0.3, event(tokens=[6, 7], stop=False, timings={"predicted_n": 3})),
        (0.31, event(tokens=[], stop=True, timings={"prompt_n": 4, "cache_n": 0, "predicted_n": 3, "prompt_ms": 90.0})),
    ]
    r = read_stream(lines, workload.generate_tokens)
    assert (r.token_n, r.token_s, r.tokens, r.finished) == ((1, 3), (0.1, 0.3), (5, 6, 7), True)
    assert (r.engine_prompt_s, r.engine_predicted_s) == (0.09, None)
    cut = read_stream(lines[:3], workload.generate_tokens)
    assert (cut.finished, cut.prompt_n, cut.predicted_n) == (False, None, None)


def test_what_was_generated_is_kept_as_text(engine, quantised, loopback, tmp_path):
    observed, _ = execute(engine, quantised, loopback, tmp_path, workloads=("smoke", "code"))
    texts = {(q.workload, q.index): q.text for q in observed.requests}
    assert set(texts) == {(w, i) for w in ("smoke", "code") for i in (0, 1)}
    assert all(isinstance(t, str) for t in texts.values())
    assert texts["code", 0] == texts["code", 1]  # the likeliest token each time
    assert any(texts.values())
