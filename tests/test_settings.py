"""Each setting of a placement is proven active by what the engine prints, or the run is invalid with the reason."""

import re
from dataclasses import replace
from unittest import mock

import pytest
import stub_server
from conftest import FIXTURES
from factory import MIB, SHARED, log_of, observation, record_of, with_facts, with_observed
from hypothesis import given, settings
from hypothesis import strategies as st

import moelib
from moelib.audit import audit, witness
from moelib.engine import engine as engines
from moelib.engine import logs
from moelib.engine.buffers import Buffer
from moelib.measure.run import Placement

CHECK = "log-tells-the-settings"
RANK = ("valid", "degraded", "invalid")


def check_of(r, text):
    """(whether it holds, the finding) of a record beside a log's text."""
    (check,) = [c for c in audit.log(witness.Witnessed(r, logs.parse(text.encode()), ())) if c.id == CHECK]
    return check.passed, check.measured


def locked_run(host_locked_bytes, system="Linux test"):
    """A run of load mode mlock, and its log: 31 MiB of weights in RAM."""
    buffers = (*observation("cpu-moe").report.buffers[:2], Buffer("CPU", "model", 31 * MIB))
    observed = observation("cpu-moe", report=replace(observation("cpu-moe").report, buffers=buffers))
    r = record_of(
        observed=replace(observed, host_locked_bytes=host_locked_bytes), placement="cpu-moe", load_mode="mlock"
    )
    return with_facts(r, "host", system=system)


def on_a_gpu(placement, splits, moved=30 * MIB):
    o = observation("cpu-moe" if moved else "baseline")
    report = replace(o.report, graph_splits=splits)
    return record_of(observed=replace(o, device_kind="cuda", report=report), placement=placement)


@pytest.mark.parametrize(
    ("change", "old", "new", "says"),
    [
        (
            {},
            "n_ubatch              = 512",
            "n_ubatch              = 256",
            "ubatch: 512 is not active, the engine has 256",
        ),
        ({}, "n_ubatch", "n_other", "ubatch: 512 is not active, the engine has None"),
        ({"placement": "cpu-moe,ubatch=64"}, "n_ubatch              = 64", "n_ubatch              = 512", "ubatch: 64"),
        ({"placement": "baseline,ubatch=4096"}, "= 4096", "= 1024", "the engine has 1024 (it takes 2048 at most"),
        ({}, "K (f16)", "K (q8_0)", "kv: f16 is not active, the engine has f16, q8_0"),
        ({"placement": "cpu-moe,kv=q8_0"}, "V (q8_0)", "V (f16)", "kv: q8_0 is not active, the engine has f16, q8_0"),
        ({"placement": "cpu-moe,kv=q8_0"}, ", K (q8_0)", "", "kv: q8_0 is not active, the engine has no such cache"),
        ({}, "n_ctx                 = 1024", "n_ctx                 = 512", "context: 1024 is not active"),
        (
            {"placement": "cpu-moe,context=4096"},
            "n_ctx                 = 4096",
            "n_ctx                 = 1024",
            "context: 4096 is not active, the engine has 1024",
        ),
        ({}, "llama_context: n_ctx ", "", "context: 1024 is not active, the engine has None"),
        ({}, "n_threads = 1 ", "n_threads = 2 ", "threads: 1 is not active, the engine has 2"),
        ({}, "n_threads_batch = 1", "n_threads_batch = 2", "threads for prompts: 1 is not active, the engine has 2"),
        ({}, "system_info", "", "threads: 1 is not active, the engine has None"),
        ({"placement": "cpu-moe,threads=8"}, "", "", "threads: 8 is not active, the engine has 1"),
        ({}, "load_mode = mmap", "load_mode = none", "load mode: mmap is not active, the engine has none, with mapped"),
        ({}, "CPU_Mapped", "CPU", "load mode: mmap is not active, the engine has mmap, without mapped buffers"),
        ({"load_mode": "none"}, "", "", "load mode: none is not active, the engine has none, with mapped buffers"),
        ({}, "(load_mode = mmap)", "", "load mode: mmap is not active"),
        ({}, "(load_mode = mmap)", "(mmap = false)", "load mode: mmap is not active, the engine has another one"),
    ],
)
def test_a_setting_that_is_not_active_is_named_with_what_the_engine_has(change, old, new, says):
    r = record_of(**change)
    text = log_of(r)
    assert old in text
    passed, finding = check_of(r, text.replace(old, new))
    assert passed is False
    assert says in finding


@pytest.mark.parametrize(
    ("change", "old", "new"),
    [
        ({}, "", ""),
        ({"placement": "cpu-moe,ubatch=64,kv=q8_0"}, "", ""),
        ({"context": 1000}, "n_ctx                 = 1000", "n_ctx                 = 1024"),  # newer builds round up
        ({"context": 300}, "n_ubatch              = 300", "n_ubatch              = 512"),
        ({}, "(load_mode = mmap)", "(mmap = true)"),  # of older builds
        ({}, "(load_mode = mmap)", "(mmap = true, direct_io = false)"),
    ],
)
def test_what_is_active_passes_in_the_words_of_any_build(change, old, new):
    r = record_of(**change)
    assert check_of(r, log_of(r).replace(old, new))[0] is True


@pytest.mark.parametrize(
    ("locked_mib", "system", "warning", "passed", "says"),
    [
        (31, "Linux 6", "", True, "is active"),
        (32, "Linux 6", "", True, "is active"),
        (1, "Linux 6", "", False, "1048576 bytes are locked of"),
        (0, "Linux 6", "", False, "0 bytes are locked of"),
        (None, "Linux 6", "", False, "does not say what was locked"),
        (None, "Darwin 24", "", None, "this system does not say"),
        (0, "Linux 6", "warning: failed to mlock 9-byte buffer: Cannot allocate memory", False, "raise `ulimit -l`"),
    ],
)
def test_locked_means_that_all_weights_in_ram_are_locked(locked_mib, system, warning, passed, says):
    r = locked_run(locked_mib and locked_mib * MIB if locked_mib is not None else None, system)
    found, finding = check_of(r, f"0.00.000.500 W {warning}\n{log_of(r)}")
    assert found is passed
    assert says in finding


def test_pinned_memory_need_not_be_locked_and_repacked_weights_are_not():
    r = locked_run(0)
    pinned = log_of(r).replace(" CPU model buffer", " CUDA_Host model buffer")
    assert check_of(r, pinned)[0] is True
    passed, finding = check_of(r, log_of(r).replace(" CPU model buffer", " CPU_REPACK model buffer"))
    assert passed is False
    assert "does not lock weights that it repacks for the CPU, take none" in finding


@pytest.mark.parametrize(
    ("placement", "splits", "passed"),
    [
        ("cpu-moe", (82, 56), True),
        ("cpu-moe", (56, 56), False),
        ("cpu-moe", (56,), False),
        ("cpu-moe,op-offload=off", (56,), True),
        ("cpu-moe,op-offload=off", (82, 56), False),
        ("cpu-moe,ubatch=31", (56,), True),  # too few tokens for copies
        ("cpu-moe,ubatch=31,op-offload=off", (56,), None),
    ],
)
def test_op_offload_shows_in_the_splits_of_a_prompts_graph(placement, splits, passed):
    r = on_a_gpu(placement, splits)
    assert check_of(r, log_of(r))[0] is passed
    if passed is False:
        assert "op-offload" in check_of(r, log_of(r))[1]
        older = re.sub(r"splits = (\d+) / (\d+)", r"splits = \1 (with bs=512), \2 (with bs=1)", log_of(r))
        assert check_of(r, older)[0] is False


def test_where_op_offload_shows_nowhere_the_run_is_degraded_with_the_reason():
    r = record_of(placement="cpu-moe,op-offload=off")
    assert check_of(r, log_of(r)) == (
        None,
        "op-offload: off shows nowhere, as this device never gets copies of weights",
    )
    nothing = replace(observation().placement, moved_bytes=0)
    r = with_observed(on_a_gpu("baseline,op-offload=off", (2,)), placement=nothing)
    assert check_of(r, log_of(r)) == (None, "op-offload: off shows nowhere, as no weights would be copied for a batch")
    assert isinstance(nothing, Placement)


@pytest.mark.parametrize("name", ["b6666", "b11434", "b11669"])
def test_the_settings_of_a_builds_log_are_read(name):
    log = logs.parse((FIXTURES / f"llama-server-log-{name}.txt").read_bytes())
    assert (log.context, log.ubatch, log.kv_types) == (1024, 512, {"f16"})
    assert log.threads == log.batch_threads is not None
    assert (log.load_mode, log.mapped) == ((None, True) if name == "b6666" else ("mmap", None))
    assert log.unlocked is None
    assert log.splits == (8, 8)


ASKED = ("baseline", "cpu-moe,ubatch=64", "cpu-moe,kv=q8_0", "cpu-moe,threads=2", "cpu-moe,op-offload=off")
LINES = range(24)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(ASKED), st.sampled_from(ASKED), st.sets(st.sampled_from(LINES)))
def test_no_line_can_be_left_out_of_a_log_to_a_better_verdict(asked, active, left_out):
    """Of a run as asked, and of one in which something else was active."""
    r, ran = record_of(placement=asked), record_of(placement=active)
    lines = log_of(ran).splitlines()
    ranks = []
    for kept in (lines, [line for n, line in enumerate(lines) if n not in left_out]):
        checks = audit.log(witness.Witnessed(r, logs.parse("\n".join(kept).encode()), ()))
        ranks.append(RANK.index(audit.verdict(checks)[0]))
    assert ranks[1] >= ranks[0]


@pytest.fixture
def file(home, engine):
    return moelib.quantize("deepseek-moe-16b", "Q8_0", scale="nano")


SHORT = {"workloads": ["smoke"], "device": "loopback"}


def flagged(r):
    """What a run is flagged with, but for what comes of sharing the machine, and what the check says."""
    assert r.observed is not None, r.message
    found = {c.id: c.measured for c in r.audit if not c.passed}
    return {name for name in found if name not in SHARED}, found.get(CHECK, "")


@pytest.mark.engine
@pytest.mark.parametrize(
    ("placement", "load_mode", "context"),
    [
        ("cpu-moe", "mmap", 256),
        ("cpu-moe", "mmap", 300),
        ("cpu-moe,ubatch=64", "mmap", 256),
        ("cpu-moe,kv=q8_0", "mmap", 256),
        ("cpu-moe,threads=1,context=512", "mmap", 256),
        ("cpu-moe", "none", 256),
        ("cpu-moe", "mlock", 256),
        ("baseline", "mlock", 256),
    ],
)
def test_the_engine_is_proven_to_do_what_was_asked(file, placement, load_mode, context):
    r = moelib.run(file, placement, load_mode=load_mode, context=context, **SHORT)
    assert flagged(r) == (set(), "")
    if load_mode == "mlock":
        assert r.observed.host_locked_bytes >= file_bytes_in_ram(r)


def file_bytes_in_ram(r):
    return sum(b.size_bytes for b in r.observed.report.buffers if b.kind == "model" and not b.on_device)


@pytest.mark.engine
def test_op_offload_on_loopback_cannot_be_told(file):
    names, says = flagged(moelib.run(file, "cpu-moe,op-offload=off", context=256, **SHORT))
    assert names == {CHECK}
    assert "never gets copies of weights" in says


@pytest.mark.engine
@pytest.mark.parametrize(
    ("placement", "load_mode", "defect", "says"),
    [
        ("cpu-moe,ubatch=64", "mmap", {"drop": ["-ub", "64"]}, "ubatch: 64 is not active, the engine has 256"),
        ("cpu-moe,ubatch=4096", "mmap", {}, "ubatch: 4096 is not active, the engine has 256 (it takes 2048 at most"),
        ("cpu-moe,kv=q8_0", "mmap", {"drop": ["-ctk", "-ctv", "q8_0"]}, "kv: q8_0 is not active, the engine has f16"),
        ("cpu-moe", "mmap", {"add": ["-ctk", "q8_0"]}, "kv: f16 is not active, the engine has f16, q8_0"),
        ("cpu-moe,threads=1", "mmap", {"add": ["-t", "2"]}, "threads: 1 is not active, the engine has 2"),
        ("cpu-moe,threads=1", "mmap", {"add": ["-tb", "2"]}, "threads for prompts: 1 is not active, the engine has 2"),
        ("cpu-moe", "mmap", {"add": ["-c", "512"]}, "context: 256 is not active, the engine has 512"),
        ("cpu-moe,context=1024", "mmap", {"drop": ["-c", "1024"]}, "context: 1024 is not active, the engine has"),
        ("cpu-moe", "none", {"drop": ["--load-mode", "none"]}, "load mode: none is not active, the engine has mmap"),
        ("cpu-moe", "mlock", {"drop": ["--load-mode", "mlock"]}, "load mode: mlock is not active, the engine has mmap"),
        ("cpu-moe", "mlock", {"memlock": 65536}, "load mode: mlock is not active, failed to mlock"),
    ],
)
def test_an_engine_that_ignores_a_setting_is_found_out(file, engine, tmp_path, placement, load_mode, defect, says):
    deaf = stub_server.install(tmp_path / "deaf", engine)
    stub_server.script(deaf, real=True, **defect)
    with mock.patch.object(engines, "find", return_value=deaf):
        r = moelib.run(file, placement, load_mode=load_mode, context=256, **SHORT)
    names, found = flagged(r)
    assert CHECK in names
    assert says in found
    assert r.status == "invalid"
