"""The planner against the engine: buffers of the committed GPU studies, and of a real server here."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ggufs import build, moe, write_nextn
from hypothesis import given
from hypothesis import strategies as st

from moelib.catalogue import params, sizes
from moelib.catalogue.placement import Placement
from moelib.gguf import gguf_file, twin
from moelib.gguf.gguf_header import Header, Tensor
from moelib.gguf.gguf_reader import tensor_bytes
from moelib.machine import process
from moelib.measure import device
from moelib.measure.llama_server import LlamaServer
from moelib.measure.runner import Job
from moelib.models import models, quantize
from moelib.planner import budget, cache, memory, named
from moelib.planner.allocate import ALIGNMENT, HOST, Free, peaks
from moelib.planner.allocate import Tensor as Node
from moelib.study.study import Study

REPO = Path(__file__).parent.parent
MIB = 1 << 20
EXPERTS = {  # the quants of the committed studies: types of gate and up, and the largest of down
    "Q4_K_M": {"deepseek-moe-16b": ("Q4_K", "Q8_0"), "phi-3.5-moe": ("Q4_K", "Q6_K")},
    "Q2_K": {"deepseek-moe-16b": ("Q2_K", "Q4_0"), "phi-3.5-moe": ("Q2_K", "Q3_K")},
    "Q8_0": {"deepseek-moe-16b": ("Q8_0", "Q8_0"), "phi-3.5-moe": ("Q8_0", "Q8_0")},
}


def catalogued(model: str, quant: str) -> Header:
    """The header of a model at full size, experts in the quant's types and all else in Q8_0."""
    geometry = params.model(model).at_scale("full")
    inner, down = EXPERTS[quant][model]
    tensors, at = [], 0
    for t in twin.tensors(geometry):
        kind = "F32" if len(t.shape) == 1 else down if "down_exps" in t.name else inner if "exps" in t.name else "Q8_0"
        size = tensor_bytes(t.shape, kind)
        tensors.append(Tensor(t.name, t.shape, kind, size, at))
        at += size
    arch = geometry.architecture
    facts = {k: v for k, v in geometry.model_dump().items() if isinstance(v, int)}
    facts |= {"attention.head_count": geometry.head_count, "attention.head_count_kv": geometry.head_count_kv}
    metadata = {"general.architecture": arch} | {f"{arch}.{k}": v for k, v in facts.items()}
    return Header(Path(f"{model}-{quant}.gguf"), at, metadata, tuple(tensors))


@pytest.mark.parametrize("study", ["h100-twins", "h200-twins"])
def test_the_engines_buffers_of_the_committed_gpu_runs_are_predicted(study):
    """Caches to the byte, compute buffers to the engine's two decimals of a MiB: nothing was fitted to them."""
    seen = set()
    for r in Study.read(REPO / "outputs" / study).done:
        key = r.spec.model, r.spec.quant, r.spec.label
        if key in seen:
            continue
        seen.add(key)
        predicted = memory.need(catalogued(r.spec.model, r.spec.quant), r.spec.placed, r.spec.context_tokens)
        found = r.observation.report.device_by_kind
        assert predicted.cache_bytes == found["KV"], key
        assert abs(predicted.compute_bytes - found["compute"]) < 0.02 * MIB, key
        host = next(b.size_bytes for b in r.observation.report.buffers if b.kind == "compute" and not b.on_device)
        assert abs(predicted.host_buffers_bytes - host) < 0.02 * host, key
        whole = predicted.vram_bytes - predicted.weights_bytes + r.observation.placement.device_bytes
        assert whole == pytest.approx(r.observation.memory.value_bytes, rel=0.012), key
    assert len(seen) >= 15


def served(engine, file: Path, placement: Placement, context: int, work: Path):
    """The real server's report of loading a file on the loopback device."""
    with device.Loopback().session(engine, work) as session:
        job = Job(file, placement, context, 2)
        with LlamaServer(engine).start(job, session, work) as server:
            with server.serving(process.patience(60)):
                pass
            server.stop()
            return server.report()


PLACEMENTS = {
    "baseline": 1024,
    "cpu-moe": 2048,
    "n-cpu-moe=2,ubatch=128": 3000,
    "cpu-moe,kv=q8_0": 1024,
    "baseline,ubatch=1024,kv=q8_0": 4096,
}


@pytest.mark.parametrize("name", ["deepseek", "phimoe", "glm4moe"])
def test_the_engines_buffers_here_are_predicted(name, engine, home, tmp_path):
    """On settings of all kinds. The loopback device takes no copies of experts: op-offload is off there."""
    if name == "glm4moe":
        path = write_nextn(tmp_path / "glm4moe.gguf")
    else:
        model = {"deepseek": "deepseek-moe-16b", "phimoe": "phi-3.5-moe"}[name]
        path = quantize.make(models.make_twin(model, "tiny"), "Q4_K_M", engine, tmp_path / "q").path
    header = gguf_file.read_header(path)
    for i, (text, context) in enumerate(PLACEMENTS.items()):
        placed = Placement.parse(text)
        work = tmp_path / str(i)
        work.mkdir()
        report = served(engine, path, placed, context, work)
        predicted = memory.need(header, placed, context, cuda=False)
        found = report.device_by_kind
        assert abs(predicted.weights_bytes - found["model"]) < 0.02 * MIB, text
        assert abs(predicted.cache_bytes - found["KV"]) < 0.02 * MIB, text
        assert predicted.compute_bytes == pytest.approx(found["compute"], rel=0.01, abs=0.15 * MIB), text
        assert predicted.buffers_bytes == pytest.approx(report.device_bytes(), rel=0.01), text


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40), st.randoms())
def test_free_blocks_are_never_given_twice(wanted, chance):
    free, held = Free(), []
    for nbytes in wanted:
        at, size = free.take(nbytes)
        assert size >= nbytes
        assert at % ALIGNMENT == 0
        assert all(at + size <= other or other + length <= at for other, length in held)
        held.append((at, size))
        if chance.random() < 0.5:
            free.give(*held.pop(chance.randrange(len(held))))
    assert free.peak >= sum(size for _, size in held)
    for block in held:
        free.give(*block)
    assert free.take(free.peak)[0] == 0  # all of it is one block again


def test_an_operation_works_in_place_only_where_nobody_else_reads():
    def chain(op: str, shared: bool) -> int:
        x = Node((1000,), "input")
        a = Node((1000,), "mul_mat", (x,))
        b = Node((1000,), op, (a,))
        nodes = [a, b, Node((1000,), "mul_mat", (a, b) if shared else (b,))]
        return peaks(nodes)["device"]

    size = -(-4000 // ALIGNMENT) * ALIGNMENT
    assert chain("add", shared=False) == 2 * size  # b over a, and the last over x's free place
    assert chain("flash_attn", shared=False) == 2 * size
    assert chain("add", shared=True) == 3 * size


def test_a_weight_on_the_host_is_copied_and_its_place_used_again():
    def layer(x: Node) -> Node:
        weight = Node((1,), "weight", (), HOST, external=True, size=10_000_000)
        return Node((1000,), "mul_mat", (weight, x))

    x = Node((1000,), "input")
    one = layer(x)
    two = layer(one)
    assert 10_000_000 < peaks([one, two])["device"] < 10_050_000


def small(**change: object) -> Header:
    metadata, tensors = moe(layers=4, dense=1, embedding_length=32, context_length=4096, **change)
    arch = metadata["general.architecture"]
    metadata |= {f"{arch}.attention.head_count": 2, f"{arch}.attention.head_count_kv": 2}
    for i in range(4):
        tensors |= {f"blk.{i}.attn_{n}.weight": (32, 32) for n in ("q", "k", "v", "output")}
        tensors |= {f"blk.{i}.attn_norm.weight": (32,), f"blk.{i}.ffn_norm.weight": (32,)}
        if i:
            tensors[f"blk.{i}.ffn_gate_inp.weight"] = (32, 4)
        else:
            tensors |= {f"blk.{i}.ffn_{n}.weight": (32, 32) for n in ("gate", "up", "down")}
    data = build(metadata, tensors)
    return gguf_file.from_bytes(data, "small.gguf", len(data))


def test_the_cache_counts_windows_latents_and_states():
    assert cache.nbytes(small(), 1000) == 4 * 1024 * (32 + 32) * 2  # 1,000 tokens are 1,024
    assert cache.nbytes(small(), 1024, "q8_0") == 4 * 1024 * (32 + 32) // 32 * 34
    windowed = small(arch="gpt-oss", **{"attention.sliding_window": 128})
    assert cache.nbytes(windowed, 4096, ubatch=512) == 2 * (4096 + 768) * 64 * 2
    assert cache.nbytes(windowed, 512, ubatch=512) == 4 * 512 * 64 * 2  # a window is no longer than the context
    latent = small(**{"attention.key_length_mla": 24, "attention.value_length_mla": 16})
    assert cache.nbytes(latent, 1024) == 4 * 1024 * 32 * 2  # no values of their own
    with pytest.raises(cache.UnknownCache, match="of its own kind"):
        cache.nbytes(small(arch="deepseek4"), 1024)
    with pytest.raises(cache.UnknownCache, match="take f16"):
        cache.nbytes(small(**{"attention.key_length": 24}), 1024, "q8_0")


@pytest.mark.parametrize("lacking", ["blk.0.ffn_up.weight", "blk.2.attn_output.weight"])
def test_a_header_that_lacks_a_tensor_is_refused_in_a_sentence(lacking):
    whole = small()
    part = replace(whole, tensors=tuple(t for t in whole.tensors if t.name != lacking))
    message = rf"small\.gguf has no tensor {lacking.rpartition('.weight')[0].split('.', 2)[-1]}\.weight where this"
    with pytest.raises(gguf_file.GGUFError, match=message):
        memory.need(part, "cpu-moe", 1024)


def test_a_plan_takes_the_fewest_layers_that_fit():
    header = catalogued("phi-3.5-moe", "Q4_K_M")
    sizes_ = [n.vram_bytes for n in budget.plan(header, 12 << 30).needs]
    assert len(sizes_) == 33
    assert sizes_[1:] == sorted(sizes_[1:], reverse=True)
    for vram in (8, 12, 16, 24, 32):
        made = budget.plan(header, vram << 30)
        at = made.needs.index(made.chosen)
        assert made.chosen.vram_bytes <= vram << 30 < made.needs[max(0, at - 1)].vram_bytes or at == 0
        assert f"-c {made.budget.context}" in made.command
    assert budget.plan(header, 32 << 30).chosen.placement.is_baseline
    tight = budget.plan(header, 8 << 30, ubatch=1024, kv="q8_0", context=16384)
    assert "-ub 1024 -ctk q8_0 -ctv q8_0" in tight.command
    assert "-c 16384" in tight.command
    assert tight.frame.fits.sum() == len(tight.needs) - tight.needs.index(tight.chosen)
    first, command, *_ = tight.lines()
    assert first.startswith("phi-3.5-moe-Q4_K_M.gguf fits 8.00 GiB of VRAM with the experts of the first ")
    assert command == tight.command
    assert "predicted" in repr(tight)
    assert "n-cpu-moe" in tight._repr_html_()


def test_a_dense_first_layer_is_no_choice():
    placements = [n.placement for n in budget.plan(catalogued("deepseek-moe-16b", "Q2_K"), 12 << 30).needs]
    assert str(placements[1]) == "n-cpu-moe=2"
    assert math.isinf(placements[-1].cpu_layers)
    assert len(placements) == 28


@pytest.mark.parametrize(
    ("dense_layers", "placements"),
    [
        ({2}, ["baseline", "n-cpu-moe=2", "cpu-moe"]),  # n-cpu-moe=3 would move what n-cpu-moe=2 does
        ({2, 3}, ["baseline", "cpu-moe"]),
    ],
)
def test_every_choice_moves_something_more(dense_layers, placements):
    whole, tensors = small(), []
    for t in whole.tensors:
        if t.block not in dense_layers:
            tensors.append(t)
        elif "gate_inp" not in t.name:
            shape = t.shape[:2] if t.is_expert else t.shape
            tensors.append(replace(t, name=t.name.replace("_exps", ""), shape=shape))
    header = replace(whole, tensors=tuple(tensors))
    needs = budget.plan(header, 12 << 30).needs
    assert [str(n.placement) for n in needs] == placements
    weights = [n.weights_bytes for n in needs]
    assert weights == sorted(set(weights), reverse=True)


def dense() -> Header:
    data = build({"general.architecture": "llama", "llama.block_count": 1}, {"blk.0.ffn_up.weight": (32, 8)})
    return gguf_file.from_bytes(data, "dense.gguf", len(data))


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ({"vram_bytes": 13 << 28}, "even cpu-moe needs 3.56 GiB; it fits with --kv q8_0$"),
        ({"vram_bytes": 3 << 30, "context": 65536}, "it fits with --kv q8_0 --context 4096$"),
        ({"vram_bytes": 2500 << 20}, "--kv q8_0 --context 1024 --ubatch 31, at which prompts are computed where"),
        ({"vram_bytes": 1 << 30}, "take a smaller quant or model$"),
        ({"vram_bytes": 8 << 30, "ram_bytes": 4 << 30}, "of RAM beside the card: .* take a smaller quant$"),
        ({"vram_bytes": 8 << 30, "context": 200_000}, "take --context 131072 or less"),
        ({"vram_bytes": 8 << 30, "kv": "q9"}, "take one of f32, f16"),
        ({"vram_bytes": 8 << 30, "ubatch": 0}, "take 32 or more"),
    ],
)
def test_what_cannot_be_gets_one_sentence_and_the_nearest_that_can(question, answer):
    with pytest.raises(budget.PlanError, match=answer):
        budget.plan(catalogued("phi-3.5-moe", "Q4_K_M"), **question).chosen  # noqa: B018
    with pytest.raises(budget.PlanError, match="is a dense model"):
        budget.plan(dense(), 8 << 30)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("12GiB", 12 << 30),
        ("12 GiB", 12 << 30),
        ("24GB", 24 * 10**9),
        ("24g", 24 << 30),
        ("1.5G", 3 << 29),
        ("512MiB", 512 << 20),
    ],
)
def test_sizes_are_read_as_people_write_them(text, nbytes):
    assert sizes.parse(text) == nbytes


@pytest.mark.parametrize("text", ["12", "", "GiB", "-1GiB", "0GiB", "12 GiB of VRAM", "1e3GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(params.ParamsError, match="write it with its unit"):
        sizes.parse(text)


@pytest.mark.parametrize("quant", params.QUANTS)
@pytest.mark.parametrize("model", EXPERTS["Q4_K_M"])
def test_a_catalogued_model_is_planned_as_its_files_were(model, quant, engine):
    """The committed studies' files had these types and sizes; here there is no file."""
    (header,) = named.headers(model, [quant])
    manifest = next(
        m for m in Study.read(REPO / "outputs/h100-twins").manifests if (m.model, m.quant) == (model, quant)
    )
    assert header.type_counts == manifest.tensor_types
    assert header.moved_bytes("cpu-moe") == manifest.expert_bytes
    assert header.file_bytes == pytest.approx(manifest.file_bytes, rel=1e-5)


def test_a_models_quants_are_compared_a_line_each(engine):
    title, *lines = budget.compared([budget.plan(h, 3 << 30) for h in named.headers("deepseek-moe-16b")])
    assert title.startswith("on 3.00 GiB of VRAM")
    assert [line.split("-")[3].split(".")[0] for line in lines] == list(params.QUANTS)
    assert lines[0].endswith("n-cpu-moe=27") or lines[0].endswith("cpu-moe")
    assert "does not fit 3.00 GiB" in lines[2]


def test_a_name_that_is_nothing_gets_the_nearest(home):
    with pytest.raises(params.ParamsError, match="did you mean 'phi-3.5-moe'"):
        named.headers("phi-3.5")
    with pytest.raises(gguf_file.GGUFError, match="cannot be read"):
        named.headers("phi-3.5.gguf")


def test_the_committed_residuals_are_those_of_their_records(engine):
    """docs/PLANNER.md is what the planner of this commit says of the committed runs, and within the aims."""
    argv = [sys.executable, "benchmarks/plan_residuals.py", "show", "outputs/planner"]
    shown = subprocess.run(argv, cwd=REPO, capture_output=True, encoding="utf-8", check=True, timeout=300).stdout
    assert shown == (REPO / "docs/PLANNER.md").read_text(encoding="utf-8")
    lines = re.findall(r"^- .*: ([\d.]+) % off in the median of (\d+) runs, ([\d.]+) % at most$", shown, re.M)
    (_, runs, buffers), (_, _, vram) = lines
    assert int(runs) == 60
    assert float(buffers) <= 1
    assert float(vram) <= 3
