"""Servers that run already: attached to by their address, asked, believed as far as they can be, and left running."""

import importlib.util
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from conftest import REPO
from factory import nano, record_of, spec, with_facts
from openai_stub import Stub

from moelib.audit import audit, record
from moelib.campaign import bench, campaign
from moelib.catalogue import params
from moelib.catalogue.facts import ENDPOINT, LLAMA_SERVER
from moelib.cli import main
from moelib.machine import process
from moelib.measure import device, memory, run
from moelib.measure.memory import Reading, Trace
from moelib.report import document
from moelib.runners import endpoint, pick, tokens
from moelib.runners.endpoint import Address, EndpointError
from moelib.study import plan
from moelib.study.study import Study

MODEL = REPO / "training/models/trained-phimoe/trained-phimoe-F16.gguf"
SMOKE = {"workloads": ("smoke",), "requests": 2, "context": 256, "device": "none"}
LLAMA = SimpleNamespace(tool=lambda name: name)


@pytest.mark.parametrize(
    ("text", "url", "port"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080", 8080),
        ("http://127.0.0.1:8080/v1/", "http://127.0.0.1:8080", 8080),
        ("http://localhost:8080/", "http://localhost:8080", 8080),
        ("http://[::1]:8080", "http://[::1]:8080", 8080),
        ("http://127.0.0.1:80", "http://127.0.0.1", 80),
    ],
)
def test_an_address_is_a_servers(text, url, port):
    found = Address.of(text)
    assert (found.url, found.port, found.here) == (url, port, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("127.0.0.1:8080", "no server's address"),
        ("http://", "no server's address"),
        ("ftp://127.0.0.1:8080", "no server's address"),
        ("http://127.0.0.1:8080/other", "no server's address"),
        ("http://user:secret@127.0.0.1:8080", "no server's address"),
        ("http://127.0.0.1:port", "is no address"),
        ("http://192.0.2.1:8080", "--beyond-loopback"),
        ("http://localhost.example:8080", "--beyond-loopback"),
    ],
)
def test_what_is_none_is_refused_in_a_sentence(text, words):
    with pytest.raises(EndpointError, match=words) as caught:
        Address.of(text)
    assert "\n" not in str(caught.value)


def test_another_machine_is_measured_if_that_is_asked_for():
    assert not Address.of("http://192.0.2.1:8080", beyond=True).here
    beyond = endpoint.Endpoint({"": Address.of("http://192.0.2.1:8080", beyond=True)}, LLAMA)
    assert pick.device_for(beyond, "auto", LLAMA).kind == "none", "the GPU here is not the one that it has"


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    return nano(tmp_path_factory.mktemp("model"))


@pytest.fixture
def count(monkeypatch):
    """Words instead of tokens, for tests without an engine; what `count.off` is set to is added."""

    def words(llama, file, text, begin):
        return len(text.split()) + words.off

    words.off = 0
    monkeypatch.setattr(tokens, "count", words)
    return words


def execute(quantised, work, stub=None, url=None, placement="baseline"):
    server = endpoint.Endpoint({"": Address.of(url or f"http://127.0.0.1:{stub.port}")}, LLAMA)
    return run.execute(spec(**SMOKE, placement=placement), quantised, server, device.NoDevice(), work)


def test_its_count_is_believed_where_it_counts_the_prompt_as_the_tokenizer_does(quantised, tmp_path, count):
    with Stub() as stub:
        outcome = execute(quantised, tmp_path, stub)
        assert outcome.reason is None, outcome.message
        for q in outcome.observation.requests:
            assert (q.prompt_tokens, q.prompt_n, q.predicted_n, q.counted_n) == (6, 6, 8, None)
            assert 0 < q.ttft_s < q.total_s
            assert q.tps > 0
        count.off = 1  # as of a server that counts words
        for q in execute(quantised, tmp_path, stub).observation.requests:
            assert (q.prompt_tokens, q.prompt_n, q.predicted_n, q.counted_n) == (7, None, None, 9)
    with Stub(usage=False) as stub:
        count.off = 0
        for q in execute(quantised, tmp_path, stub).observation.requests:
            assert (q.prompt_n, q.predicted_n, q.counted_n, q.text) == (None, None, 8, " t" * 8)


def test_memory_and_cpu_time_are_those_of_the_process_that_listens(quantised, tmp_path, count):
    with Stub() as stub:
        assert endpoint.owner(stub.port) == os.getpid()
        seen = execute(quantised, tmp_path, stub).observation
    assert seen.host_rss_peak_bytes == process.peak_rss(os.getpid())
    assert (seen.load_s, seen.exit_code, seen.argv) == (None, None, ())
    assert seen.host.own_s <= 3 * seen.host.elapsed_s * os.cpu_count(), "not what it had spent before"
    assert endpoint.owner(process.free_port()) is None


@pytest.mark.parametrize(
    ("of_stub", "reason", "words"),
    [
        ({"defect": "no-models"}, "not-a-language-model", "is no server of a language model: /v1/models gives 404"),
        ({"defect": "embeds"}, "not-a-language-model", "completes no text: /v1/completions gives 400"),
        ({"defect": "nonsense"}, "answer-unreadable", "is no server of OpenAI's interface"),
        ({"defect": "negative"}, "answer-unreadable", "is no server of OpenAI's interface"),
        ({"defect": "key"}, "request-refused", "asks for a key: set MOELIB_ENDPOINT_KEY"),
        ({"names": ("a", "b")}, "not-our-model", "does not have x, but "),
        ({"names": ()}, "not-our-model", "does not have x, but "),
        ({"defect": "switches"}, "model-switched", "went from model m to other while it was measured"),
        ({"defect": "cut"}, "connection-lost", "cannot be reached, or stopped"),
        ({"defect": "late"}, "request-failed", "an event came after the end of the stream"),
        ({"defect": "error"}, "request-failed", "no slot is free"),
    ],
)
def test_what_is_wrong_with_a_server_is_said_in_a_sentence(quantised, tmp_path, count, of_stub, reason, words):
    with Stub(**of_stub) as stub:
        outcome = execute(quantised, tmp_path, stub)
    assert (outcome.observation, outcome.reason) == (None, reason)
    assert words in outcome.message
    assert "\n" not in outcome.message


def test_nobody_there_is_said_too(quantised, tmp_path, count):
    outcome = execute(quantised, tmp_path, url=f"http://127.0.0.1:{process.free_port()}")
    assert outcome.reason == "connection-lost"
    assert "cannot be reached" in outcome.message
    assert "see that it runs" in outcome.message


def test_of_several_models_the_one_that_is_called_as_the_file_is(quantised, tmp_path, count):
    with Stub(names=("other", "models/x.gguf")) as stub:
        assert execute(quantised, tmp_path, stub).reason is None


def test_a_process_that_has_another_model_open_is_refused(quantised, tmp_path, count):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    with Stub() as stub, other.open("rb"):
        outcome = execute(quantised, tmp_path, stub)
        assert outcome.reason == "not-our-model"
        assert "has other.gguf open, and not x.gguf" in outcome.message
        with quantised.path.open("rb"):
            assert execute(quantised, tmp_path, stub).reason is None, "it has both"


def test_a_placement_without_a_server_is_said(quantised, tmp_path, count):
    with Stub() as stub:
        server = endpoint.Endpoint({"baseline": Address.of(f"http://127.0.0.1:{stub.port}")}, LLAMA)
        outcome = run.execute(spec(**SMOKE, placement="cpu-moe"), quantised, server, device.NoDevice(), tmp_path)
    assert (outcome.reason, outcome.message) == (
        "no-endpoint",
        "no endpoint is named for cpu-moe: name its server's address",
    )
    with pytest.raises(EndpointError, match="give its address"):
        pick.of(ENDPOINT, LLAMA)


def test_prompts_are_texts_of_about_the_length_that_is_asked(count, tmp_path):
    long = params.workload("long-512")
    (found,) = tokens.prompts(LLAMA, tmp_path, [long], 4096)
    assert found.tokens == 512 == len(found.content.split())
    with pytest.raises(process.ProcessError, match="mixed-512 is of token ids"):
        tokens.prompts(LLAMA, tmp_path, [params.workload("mixed-512")], 4096)
    with pytest.raises(process.ProcessError, match="needs 512"):
        tokens.prompts(LLAMA, tmp_path, [long], 512)


GIB = 1 << 30


def on_a_card(used, weights=3 * GIB):
    during = (Reading(1.0, used, 9 * GIB, True), Reading(2.0, used, 9 * GIB, True))
    return memory.reconcile("cuda", Trace((), during), {}, 0, weights, 600 << 20)


def test_vram_of_a_server_that_ran_before_is_the_drivers_list_held_against_the_header():
    found = on_a_card(4 * GIB)
    assert (found.value_bytes, found.status, found.method) == (4 * GIB, "degraded", "nvml-process")
    assert found.reasons == ("running-before", "engine-silent")
    assert found.growth_bytes is None
    low = on_a_card(2 * GIB)
    assert (low.value_bytes, low.status) == (None, "invalid")
    assert "below-header-weights" in low.reasons
    assert on_a_card(None).value_bytes is None


def test_no_record_of_llama_server_gains_by_losing_its_idle_readings():
    """Taken out of a valid record, they leave a flag or make it invalid."""
    r = record_of()
    trace = replace(r.observed.memory.trace, before=())
    buffers = r.observed.report.device_by_kind, r.observed.report.pinned_bytes
    m = memory.reconcile("cuda", trace, *buffers, r.observed.placement.device_bytes, r.observed.memory.context_bytes)
    emptied = r.model_copy(update={"observed": replace(r.observed, memory=m, device_kind="cuda")})
    emptied = with_facts(emptied, "device", kind="cuda")
    assert audit.verdict(audit.run(audit.measured(emptied)))[0] != "valid"
    assert m.status != "valid"


@contextmanager
def serving(name, engine, file, tmp_path, placement=()):
    """(address, process) of a real server that is up."""
    if name == LLAMA_SERVER:
        port = process.free_port()
        argv = [engine.tool("llama-server"), "-m", str(file), "--port", str(port), "--host", "127.0.0.1", "-c", "4096"]
        argv += ["-np", "1", *placement]
    else:
        if importlib.util.find_spec("xllamacpp") is None:
            pytest.skip("xllamacpp is not installed: its wheels are for Linux and macOS")
        argv = [sys.executable, str(REPO / "tests/endpoint_server.py"), str(file)]
    with process.Child(argv, tmp_path / "own.log", process.environment(tmp_path)) as child:
        if name == LLAMA_SERVER:
            child.wait_for("listening", 60)
            yield f"http://127.0.0.1:{port}", child
        else:
            yield child.wait_for(r"address (http://\S+)", 60)[1], child


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELIB_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path


@pytest.mark.alone  # beside others, all answers of so small a model may come in bursts
@pytest.mark.parametrize("name", [LLAMA_SERVER, "xllamacpp"])
def test_a_real_server_is_measured_and_left_running(name, engine, home):
    said = []
    with serving(name, engine, MODEL, home) as (url, child):
        path = bench.at_endpoint(MODEL, url, "baseline", rounds=2, say=said.append)
        runs = record.read_all(path.parent)[0]
        again = bench.at_endpoint(MODEL, url, "baseline", rounds=2, say=said.append)
        assert again == path
        assert record.read_all(path.parent)[0] == runs, "what is done is not done again"
        assert child.running()
    assert [s.split(" ")[3] for s in said] == ["degraded"] * 4
    for r in runs:
        assert (r.engine.runner, r.observed.load_s) == (ENDPOINT, None)
        assert "counts-exact" in r.reasons
        assert "file-is-its-sheet" in r.reasons
        assert r.observed.host_rss_peak_bytes > 0
        short, _, long, _ = r.observed.requests
        assert (long.prompt_tokens, short.cache_n) == (512, 0)
        assert short.prompt_n == short.prompt_tokens, "the tokenizer counts as the server does"
        assert {q.predicted_n - q.generate_tokens for q in r.observed.requests} == {0}
        live = [
            q for q in r.observed.requests if q.is_live
        ]  # of so small a model some come in bursts, and have no rate
        assert len(live) >= 2
        assert min(min(q.ttft_s, q.tps) for q in live) > 0
    text = path.read_text(encoding="utf-8")
    assert "| long-512   |      512 |" in text
    assert "VRAM: n/a; RAM" in text
    assert "- endpoint does not report its buffers, layers and graph splits (layers-offloaded" in text


def test_its_text_is_the_one_of_llama_server_by_the_other_door(engine, home):
    own = bench.one(MODEL, "baseline", workloads=("plan-short",), context=4096, device_kind="none")
    with serving(LLAMA_SERVER, engine, MODEL, home) as (url, _):
        other = bench.one(MODEL, "baseline", workloads=("plan-short",), context=4096, device_kind="none", endpoint=url)
    assert [q.text for q in own.observed.requests] == [q.text for q in other.observed.requests]
    assert [q.prompt_tokens for q in own.observed.requests] == [q.prompt_tokens for q in other.observed.requests]


def test_a_server_that_stops_fails_the_run_in_a_sentence(engine, home, monkeypatch):
    ask = endpoint.Attached.ask
    with serving(LLAMA_SERVER, engine, MODEL, home) as (url, child):

        def stopping(self, content, n):
            child.stop()
            return ask(self, content, n)

        monkeypatch.setattr(endpoint.Attached, "ask", stopping)
        r = bench.one(MODEL, "baseline", context=4096, device_kind="none", endpoint=url)
    assert (r.status, r.reasons) == ("failed", ("connection-lost",))
    assert "cannot be reached, or stopped" in r.message
    assert "\n" not in r.message


def test_a_study_has_a_server_for_each_placement(engine, home, monkeypatch):
    asked = params.Study(
        name="two-servers",
        title="Two servers",
        models=("trained-phimoe",),
        weights="real",
        quants=("F16",),
        arms=({"placement": "baseline"}, {"placement": "cpu-moe"}),
        workloads=("plan-short",),
        requests=2,
        blocks=2,
        context=4096,
        runner="endpoint",
        endpoints={"baseline": "http://127.0.0.1:1", "cpu-moe": "http://127.0.0.1:2"},
        seed=1,
    )
    (home / "a").mkdir()
    (home / "b").mkdir()
    with (
        serving(LLAMA_SERVER, engine, MODEL, home / "a") as (first, _),
        serving(LLAMA_SERVER, engine, MODEL, home / "b", ["--cpu-moe"]) as (second, _),
    ):
        asked = asked.model_copy(update={"endpoints": {"baseline": first, "cpu-moe": second}})
        study = Study(plan.outputs() / asked.name, plan.of(asked))
        quantised = bench.given.measurable(MODEL, engine)
        manifest = quantised.manifest | {"model": "trained-phimoe", "quant": "F16", "scale": "full", "weights": "real"}
        (cell,) = study.cells
        runs = list(campaign.measure(study, [cell], lambda *_: replace(quantised, manifest=manifest)))
    assert {r.status for r in runs} == {"degraded"}, [(r.status, r.message, r.reasons) for r in runs]
    assert len(runs) == 4
    document.report(study.name, study.path, progress=False)
    text = (study.path / "MOE-TECHNICAL-VALIDATION.md").read_text(encoding="utf-8")
    assert "4 of 4 runs usable: 0 valid, 4 degraded" in text


def test_a_study_names_endpoints_for_its_placements_and_no_others():
    of = {"name": "x", "title": "x", "models": ("deepseek-moe-16b",), "weights": "twin", "workloads": ("plan-short",)}
    of |= {"seed": 1, "placements": [{"placement": "baseline"}, {"placement": "cpu-moe"}]}
    with pytest.raises(ValueError, match="go together"):
        params.Study(**of, runner="endpoint")
    with pytest.raises(ValueError, match="go together"):
        params.Study(**of, endpoints={"baseline": "http://127.0.0.1:1"})
    with pytest.raises(ValueError, match="one for each of the placements"):
        params.Study(**of, runner="endpoint", endpoints={"baseline": "http://127.0.0.1:1"})


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--endpoint", "http://127.0.0.1:1"], "--endpoint and --placement go together"),
        (["--placement", "cpu-moe"], "--endpoint and --placement go together"),
        (["--beyond-loopback"], "--endpoint and --placement go together"),
        (["--endpoint", "http://127.0.0.1:1", "--placement", "cpu-moe", "--vram", "8GiB"], "cannot be set here"),
    ],
)
def test_the_command_refuses_what_cannot_be(argv, words):
    done = CliRunner().invoke(main, ["measure", str(MODEL), *argv])
    assert done.exit_code == 2
    assert words in done.output


def test_the_stub_is_like_a_real_server_in_what_the_runner_reads(engine, home, quantised, monkeypatch):
    """Contract: the same fields of the same types come of both."""
    with serving(LLAMA_SERVER, engine, MODEL, home) as (url, _):
        real = bench.one(MODEL, "baseline", workloads=("smoke",), context=256, device_kind="none", endpoint=url)
    monkeypatch.setattr(tokens, "count", lambda llama, file, text, begin: len(text.split()))
    with Stub() as stub:
        ours = execute(quantised, home, stub)

    def shapes(requests):
        keys = ("prompt_n", "predicted_n", "counted_n", "token_s", "token_n", "tokens", "finished", "text")
        return [{k: type(getattr(q, k)) for k in keys} for q in requests]

    assert shapes(real.observed.requests) == shapes(ours.observation.requests)
