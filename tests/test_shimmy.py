"""shimmy as a runner: what it is asked, what is believed of it, and a build that takes the flags and ignores them."""

import gzip
from dataclasses import replace
from pathlib import Path

import build_shimmy
import pytest
from conftest import REPO

from moelib.audit import record, witness
from moelib.campaign import bench, campaign
from moelib.catalogue import params
from moelib.catalogue.facts import LLAMA_SERVER, SHIMMY, SHIMMY_GENERATE
from moelib.catalogue.placement import Placement
from moelib.engine import engine as engines
from moelib.engine.client import RunError
from moelib.machine.mapped import NotListed
from moelib.measure import device
from moelib.runners import pick, shimmy, tokens
from moelib.runners.shimmy import ShimmyError
from moelib.study.study import Study

MODEL = REPO / "training/models/trained-phimoe/trained-phimoe-F16.gguf"
LOG = gzip.decompress((REPO / "tests/fixtures/shimmy/serve.log.gz").read_bytes()).decode()
SERVED = Path("trained-phimoe-Q2_K.gguf")
UNTOLD = {
    *("counts-exact", "cache-not-hit", "times-ordered", "ttft-bounded", "clocks-agree", "build-optimised"),
    *("output-alive", "below-memory-bound", "log-kept"),
}
"""What cannot be told of a run by shimmy 1.9.0."""
IGNORED = "0 tensors were put on the CPU, the header moves 12"
SHARED = {"host-quiet", "watched-lightly"}  # of a machine that tests share


def lines(*texts, step=0.01):
    return [(step * (i + 1), t.encode()) for i, t in enumerate(texts)]


def test_a_stream_of_text_is_read_event_by_event():
    read = shimmy.pieces_of(lines("data: Once", "", "data:  upon", "", "data: ", "data: ", "", "data: [DONE]", "", ""))
    assert read == ([(0.02, "Once"), (0.04, " upon"), (0.07, "\n")], True)
    assert shimmy.pieces_of(lines("data: Once", "")) == ([(0.02, "Once")], False), "it ends without its end"
    with pytest.raises(RunError, match="text came after the end"):
        shimmy.pieces_of(lines("data: [DONE]", "", "data: more", ""))
    with pytest.raises(RunError, match="no slot"):
        shimmy.pieces_of(lines('data: {"error": "no slot"}', ""))


def test_what_it_loaded_is_read_from_its_log_load_by_load():
    report = shimmy.report_of(LOG, SERVED)
    assert {(b.name, b.kind) for b in report.buffers} >= {
        ("CPU_Mapped", "model"),
        ("CPU_REPACK", "model"),
        ("CPU", "KV"),
    }
    assert len(report.overridden) == 12
    assert {name.split(".")[2] for name in report.overridden} == {"ffn_gate_exps", "ffn_down_exps", "ffn_up_exps"}
    assert LOG.count(shimmy.LOADED) == 4, "anew for each request: the buffers of one load count, not those of four"
    model = sum(b.size_bytes for b in report.buffers if b.kind == "model")
    assert model == pytest.approx(6.02 * 2**20, rel=0.01)
    assert shimmy.report_of("nothing", SERVED).buffers == ()
    with pytest.raises(RunError, match="shimmy loaded trained-phimoe-Q2_K.gguf, not other.gguf") as caught:
        shimmy.report_of(LOG, Path("other.gguf"))
    assert caught.value.reason == "not-our-model"
    head, _, last = LOG.rpartition(shimmy.LOADED)
    with pytest.raises(RunError, match="4 times, and not each time the same way"):
        shimmy.report_of(head + shimmy.LOADED + last.replace("overridden to CPU", "left on CPU", 1), SERVED)


def test_the_committed_negative_control_is_invalid_wherever_it_should_have_moved_something():
    """shimmy 2.6.5 takes --cpu-moe and ignores it: its own runs, kept as evidence."""
    control = Study.read(REPO / "outputs/demo-shimmy-2")
    assert (control.tally["degraded"], control.tally["invalid"], control.tally["missing"]) == (4, 4, 0)
    for r in record.read_all(control.path)[0]:
        (moves,) = (c for c in r.audit if c.id == "placement-moves")
        told = ("0 bytes moved", True) if r.spec.placed.is_baseline else (IGNORED, False)
        assert (moves.measured, moves.passed, r.status) == (*told, "degraded" if told[1] else "invalid")
        assert (r.engine.version, r.host.dirty) == ("shimmy 2.6.5", False)


@pytest.mark.parametrize(
    ("text", "flags"),
    [("baseline", []), ("cpu-moe", ["--cpu-moe"]), ("n-cpu-moe=3", ["--n-cpu-moe", "3"])],
)
def test_a_placement_is_its_flags(text, flags):
    assert shimmy.placement_flags(Placement.parse(text), shimmy.CONTEXT) == flags


@pytest.mark.parametrize(
    ("text", "mode", "context", "words"),
    [
        ("cpu-moe", "none", 4096, "no load mode none"),
        ("cpu-moe", "mmap", 1024, "set `context: 4096`"),
        ("cpu-moe,kv=q8_0", "mmap", 4096, "shimmy has no -ctk, -ctv"),
        ("baseline,threads=4", "mmap", 4096, "leave that out of baseline,threads=4"),
    ],
)
def test_what_it_has_no_setting_for_is_refused(text, mode, context, words):
    with pytest.raises(RunError, match=words):
        shimmy.placement_flags(Placement.parse(text, mode), context)


def program(folder, says, name="shimmy"):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{says}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (None, "there is no shimmy here: run `make shimmy`"),
        ("echo shimmy 1.2.0", "shimmy 1.2.0 has no --cpu-moe"),
        ("echo hello", "does not say that it is shimmy"),
    ],
)
def test_a_binary_that_is_missing_too_old_or_another_one(says, words, tmp_path, monkeypatch):
    monkeypatch.delenv(shimmy.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    if says:
        program(tmp_path / "bin", says)
    with pytest.raises(ShimmyError, match=words):
        shimmy.find()
    monkeypatch.setenv(shimmy.VARIABLE, str(tmp_path))
    with pytest.raises(ShimmyError, match="which is no program"):
        shimmy.find()


def test_each_runner_has_its_devices(monkeypatch):
    for cuda in (False, True):
        runner = shimmy.ShimmyServe(shimmy.Shimmy(Path("shimmy"), "1.9.0"), None)
        runner.shimmy.__dict__["has_cuda"] = cuda
        with pytest.raises(device.DeviceError, match="cannot use a loopback device"):
            pick.device_for(runner, "loopback", None)
        assert pick.device_for(runner, "none", None).kind == "none"
    runner.shimmy.__dict__["has_cuda"] = False
    with pytest.raises(device.DeviceError, match="built without CUDA"):
        pick.device_for(runner, "cuda", None)
    where = pick.device_for(runner, "auto", None)
    assert (where.kind, "in RAM alone at any placement" in where.note) == ("none", True)


def test_a_study_has_one_runner_and_another_one_has_its_own_study():
    assert campaign.served_by("demo", "") == campaign.served_by("demo", LLAMA_SERVER) == "demo"
    assert campaign.served_by("demo", SHIMMY) == campaign.served_by("demo-shimmy", SHIMMY) == "demo-shimmy"
    with pytest.raises(params.ParamsError, match="write params/studies/h100-shimmy.yaml with `runner: shimmy`"):
        campaign.served_by("h100", SHIMMY)


@pytest.fixture(scope="module")
def built():
    try:
        return shimmy.find()
    except ShimmyError as err:
        pytest.skip(str(err))


def once(placement, keep, runner=SHIMMY, context=shimmy.CONTEXT):
    return bench.one(MODEL, placement, workloads=["prose"], context=context, keep=keep, runner=runner)


def failed(r, passed=False):
    return {c.id for c in r.audit if c.passed is passed}


@pytest.mark.engine
def test_the_real_shimmy_is_degraded_by_what_it_does_not_tell(built, tmp_path):
    r = once("cpu-moe", tmp_path)
    assert (r.status, r.engine.runner, r.engine.version) == ("degraded", SHIMMY, str(built))
    assert failed(r, None) == UNTOLD
    assert failed(r) - SHARED == {"memory-undoubted", "clean-end"}, "no device; SIGTERM ends it by its default"
    assert r.observed.argv[:2] == ("shimmy", "serve")
    assert r.observed.argv[-3:] == ("--model-path", MODEL.name, "--cpu-moe")
    moved = r.observed.placement.moved_tensors
    assert {c.id: c.measured for c in r.audit}["placement-moves"] == (
        f"{moved} tensors were put on the CPU, the header moves {moved}"
    )
    for q in r.observed.requests:
        assert (q.finished, q.predicted_n, len(q.token_s)) == (True, None, 64)
        assert abs(q.counted_n - 64) <= 3, "by the model's own tokenizer"
        assert (q.is_live, q.ttft_s, q.tps) == (False, None, None), "it sends all tokens when the last one is made"
        assert q.total_s > 0
    assert r.observed.memory.value_bytes is None
    assert r.observed.host_rss_peak_bytes > 0
    assert set(r.observed.engine_files) == {"shimmy"}
    again = record.read(tmp_path / "records" / f"{r.run_id}.json")
    assert witness.call(tmp_path, again).problems == ()
    forged = replace(again.observed.report, overridden=again.observed.report.overridden[1:])
    lied = again.model_copy(update={"observed": replace(again.observed, report=forged)})
    assert "tells of another load" in witness.call(tmp_path, lied).problems[0]


@pytest.mark.engine
def test_the_plans_command_has_no_stream_and_so_no_first_token(built, tmp_path):
    with bench.opened([MODEL], runner=SHIMMY_GENERATE) as (ready,):
        for placement in ("baseline", "cpu-moe"):  # each run has a log of its own
            r = ready.measure(placement, workloads=["prose"], context=shimmy.CONTEXT, keep=tmp_path)
    assert (r.status, r.engine.runner) == ("degraded", SHIMMY_GENERATE)
    prompt = params.workload("prose").text
    asked = ("shimmy", "generate", "phi3-lora", "--prompt", prompt, "--max-tokens", "64", "--cpu-moe")
    assert r.observed.argv == asked
    assert "SHIMMY_BASE_GGUF" in r.observed.env
    assert failed(r) - SHARED == {"memory-undoubted"}
    assert failed(r, None) >= {"ttft-bounded", "counts-exact", "clean-end"}
    texts = {q.text for q in r.observed.requests}
    assert len(texts) == 1, "it chooses the likeliest token"
    for q in r.observed.requests:
        assert (len(q.token_s), q.ttft_s, q.tps) == (1, None, None)
        assert 50 < q.counted_n <= 66
    assert len(r.observed.report.overridden) == r.observed.placement.moved_tensors
    assert witness.call(tmp_path, r).problems == ()


@pytest.mark.engine
def test_both_runners_say_the_same_at_temperature_0(built, tmp_path):
    mine = once("baseline", tmp_path / "mine")
    its = once("baseline", tmp_path / "its", LLAMA_SERVER, context=1024)
    texts = [[q.text for q in r.observed.requests] for r in (mine, its)]
    assert texts[0] == texts[1]
    assert [q.counted_n for q in its.observed.requests] == [None, None], "llama-server counts by itself"


@pytest.mark.engine
def test_a_build_that_takes_the_flags_and_ignores_them_is_invalid(built, tmp_path, monkeypatch):
    """As version 2 does; its buffers are those of a real baseline."""
    drop = 'for a; do shift; [ "$a" = --cpu-moe ] || set -- "$@" "$a"; done'
    stub = program(tmp_path, f'[ "$1" = --version ] && echo shimmy 2.0.0 && exit\n{drop}\nexec {built.path} "$@"')
    monkeypatch.setenv(shimmy.VARIABLE, str(stub))
    baseline, moe = once("baseline", tmp_path / "a"), once("cpu-moe", tmp_path / "b")
    assert (baseline.status, moe.status) == ("degraded", "invalid")
    assert moe.engine.version == "shimmy 2.0.0"
    assert failed(moe) - failed(baseline) - SHARED == {"placement-moves"}
    told = {c.id: c.measured for c in moe.audit}["placement-moves"]
    assert told == f"0 tensors were put on the CPU, the header moves {moe.observed.placement.moved_tensors}"


@pytest.mark.engine
def test_a_server_that_ends_while_it_answers_is_a_failed_run(built, tmp_path, monkeypatch):
    ends = f'{built.path} "$@" & sleep 0.7; kill -9 $!; exit 3'
    stub = program(tmp_path, f'[ "$1" = serve ] || exec {built.path} "$@"\n{ends}')
    monkeypatch.setenv(shimmy.VARIABLE, str(stub))
    long = params.workload("prose").model_copy(update={"generate_tokens": 3500})
    monkeypatch.setattr(params, "workload", lambda name: long)
    r = once("cpu-moe", tmp_path)
    assert r.observed is None
    assert r.reasons == ("engine-ended",)


@pytest.mark.engine
def test_tokens_are_counted_by_the_models_own_tokenizer(tmp_path):
    llama = engines.find()
    text = "It was late in the evening when she came back to the house, and"
    with_begin, without = (tokens.count(llama, MODEL, text, begin) for begin in (True, False))
    assert with_begin == without + 1
    with pytest.raises(RunError, match="no count of"):
        tokens.count(llama, tmp_path / "no.gguf", text, begin=True)


def test_what_a_program_has_mapped_may_be_unknown(monkeypatch):
    def unlisted(*_):
        raise NotListed("not here")

    monkeypatch.setattr(shimmy.mapped, "look", unlisted)
    runner = shimmy.ShimmyServe(shimmy.Shimmy(Path("shimmy"), "1.9.0"), None)
    child = type("Child", (), {"pid": 1, "argv": ["/x/shimmy", "serve"]})()
    _, untold = shimmy.Serving(runner, child, MODEL, {}, 1).files(None, 0.0)
    assert untold == {"engine_files": "not here"}


@pytest.mark.parametrize(
    ("names", "serves"),
    [
        (["libclang-cpp.so.14", "libclang_rt.asan-x86_64.so"], False),
        (["libclang.so"], True),
        (["libclang-14.so.1"], True),
        (["libclang.so.1", "libclang-cpp.so.14"], True),
        (["libclangBasic.a"], False),
    ],
)
def test_libclang_is_not_taken_for_its_sister(tmp_path, monkeypatch, names, serves):
    """Many systems have libclang-cpp alone, of which bindgen says after a minute that it is none."""
    monkeypatch.delenv("LIBCLANG_PATH", raising=False)
    folder = tmp_path / "llvm-14/lib"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    assert build_shimmy.libclang(tmp_path) == (str(folder) if serves else None)
