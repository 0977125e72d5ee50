import re

import pytest

from moelib.catalogue import params, upstream
from moelib.gguf import twin


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: params.model("phi"), "unknown model 'phi'; allowed: .*phi-3.5-moe"),
        (lambda: params.study("dmeo"), "unknown study 'dmeo'; did you mean 'demo'.; allowed: demo"),
        (
            lambda: params.workload("short"),
            "unknown workload 'short'; did you mean 'plan-short'.; allowed: .*plan-short",
        ),
        (lambda: params.card("gpt-oss-20b"), "unknown model with a card 'gpt-oss-20b'; allowed: .*phi-3.5-moe"),
        (lambda: params.model("phi-3.5-moe").at_scale("0.25"), "unknown scale '0.25'; allowed: full, tiny, nano"),
        (lambda: params.model("gpt-oss-20b").at_scale("full"), "gpt-oss-20b is excluded: .*MXFP4"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_with_the_reason(call, message):
    with pytest.raises(params.ParamsError, match=message):
        call()


def test_every_committed_study_loads():
    assert "demo" in params.study_names()
    for name in params.study_names():
        assert params.study(name).name == name


def test_the_demo_has_the_plans_36_runs():
    demo = params.study("demo")
    cells = [(m, q) for m in demo.models for q in demo.quants]
    placements = [mode.placement for cell in cells for mode in demo.placements_of(*cell) if mode.rounds is None]
    assert sum(p in ("baseline", "cpu-moe") for p in placements) * demo.blocks == 36


# GiB in F16, as llama.cpp's converter writes the originals
@pytest.mark.parametrize(("name", "gib"), [("phi-3.5-moe", 78.0), ("deepseek-moe-16b", 30.5)])
def test_full_geometry_has_the_published_size(name, gib):
    assert twin.nbytes(params.model(name).at_scale("full")) / 2**30 == pytest.approx(gib, abs=0.05)


def hundred(kind: str) -> str:
    return f"{kind}: [{', '.join(f'x{i}' for i in range(100))}]"


MISTAKES = [
    ("- a list", "not usable YAML"),
    ("quant: Q2_K", "quant: Extra inputs"),
    ("quants: [Q2_K, Q2_K]", "quants names something twice"),
    ("quants: [../Q3_K]", "quants.0: String should match"),
    ("models: [nobody]", "unknown model"),
    ("models: [gpt-oss-20b]", "excluded"),
    ("workloads: [nothing]", "unknown workload"),
    ("scale: huge", "unknown scale"),
    ("weights: real", "real weights have only the scale full"),
    ("placements: [{placement: cpu-moe}]", "at least one must follow it"),
    ("placements: [{placement: cpu-moe}, {placement: n-cpu-moe=3}]", "what has most on the GPU"),
    ("placements: [{placement: cpu-moe}, {placement: baseline}]", "must be the only baseline"),
    ("placements: [{placement: baseline}]", "at least one must follow it"),
    ("placements: [{placement: baseline}, {placement: baseline, load_mode: none}]", "must be the only baseline"),
    ("placements: [{placement: baseline}, {placement: n-cpu-moe=0}]", "placements.1.placement: .*N from 1 to 9999"),
    ("placements: [{placement: baseline}, {placement: 'cpu-moe,ubatsh=9'}]", r"did you mean 'ubatch'\?"),
    (
        "placements: [{placement: baseline}, {placement: cpu-moe}, {placement: cpu-moe, quants: [Q8_0]}]",
        "placements names something twice for deepseek-moe-16b/Q8_0",
    ),
    (
        "placements: [{placement: baseline}, {placement: cpu-moe}, {placement: n-cpu-moe=2, models: [phi-3.5-moe]}]",
        "n-cpu-moe=2/mmap is for phi-3.5-moe, not of the study's models",
    ),
    ("placements: [{placement: baseline, rounds: 1}, {placement: cpu-moe}]", "what the others are compared with: of"),
    ("placements: [{placement: baseline}, {placement: cpu-moe, rounds: 1}]", "needs two that are run in all rounds"),
    ("rounds: 0", "rounds: Input should be greater than 0"),
    ("rounds: 10001", "rounds: Input should be less than or equal to 10000"),
    ("requests: 1001", "requests: Input should be less than or equal to 1000"),
    ("requests: .inf", "requests: Input should be a finite number"),
    ("requests: 1.5", "requests: Input should be a valid integer"),
    ("requests: null", "requests: Input should be a valid integer"),
    ("context: 16777217", "context: Input should be less than or equal to 16777216"),
    ("seed: 9223372036854775808", "seed: Input should be less than or equal to 9223372036854775807"),
    ("seed: -1", "seed: Input should be greater than or equal to 0"),
    (hundred("models")[:-1] + ", y]", "models: Tuple should have at most 100 items"),
    (hundred("workloads")[:-1] + ", y]", "workloads: Tuple should have at most 100 items"),
    (hundred("models") + "\nquants: [Q4_K_M, Q2_K, Q8_0]\nrounds: 1000", "is 600000 runs, more than 200000"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=lambda text: text[:40])
def test_a_study_with_a_mistake_is_refused_with_the_field_and_its_limit(home, change, message):
    path = home / "params/studies/smoke.yaml"
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{change}\n", encoding="utf-8")
    with pytest.raises(params.ParamsError, match=message):
        params.study("smoke")


def test_the_largest_numbers_that_are_allowed_are_allowed(home):
    path = home / "params/studies/smoke.yaml"
    largest = "requests: 1000\nrounds: 10000\ncontext: 16777216\nseed: 9223372036854775807\n"
    path.write_text(path.read_text(encoding="utf-8") + largest, encoding="utf-8")
    assert params.study("smoke").blocks == 10_000


def rewrite(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    params._yaml.cache_clear()


@pytest.mark.parametrize(
    ("workload", "old", "new", "message"),
    [
        (
            "smoke",
            "generate_tokens: 8",
            "generate_tokens: 1048577",
            "generate_tokens: .* equal to 1048576",
        ),
        ("smoke", "generate_tokens: 8", "generate_tokens: 1", "generate_tokens: .* greater than or equal to 2"),
        (
            "long-512",
            "prompt_tokens: 512",
            "prompt_tokens: 16777217",
            "prompt_tokens: .* equal to 16777216",
        ),
    ],
)
def test_numbers_of_workloads_have_limits(home, workload, old, new, message):
    rewrite(home / "params/workloads.yaml", old, new)
    with pytest.raises(params.ParamsError, match=f"params/workloads.yaml, {workload}: {message}"):
        params.workload(workload)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    block_count: 32", "    block_count: 1001", "geometry.block_count: .* less than or equal to 1000"),
        ("vocab_size: 32064", "vocab_size: 10000000000", "geometry.vocab_size: .* less than or equal to 4194304"),
        ("expert_count: 16", "expert_count: 0", "geometry.expert_count: .* greater than 0"),
        ("expert_used_count: 2", "expert_used_count: 17", "geometry: .*expert_used_count is more than expert_count"),
        ("head_count_kv: 8", "head_count_kv: 7", "geometry: .*must divide by"),
        ("head_count: 32", "head_count: 32\n    leading_dense_block_count: 33", "block_count is more than block_count"),
        ("      block_count: 4", "      block_count: 5000", "scale tiny of phi-3.5-moe: block_count: "),
        ("      head_count: 4", "      head_count: 3", "scale tiny of phi-3.5-moe: entry: .*must divide by"),
    ],
)
def test_numbers_of_models_have_limits(home, old, new, message):
    rewrite(home / "params/models.yaml", f"{old}\n", f"{new}\n")
    with pytest.raises(params.ParamsError, match=message):
        params.model("phi-3.5-moe").at_scale("tiny")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xfe", "models.yaml is not usable YAML: byte 0 is not UTF-8"),
        (b"- a\n- b\n", "models.yaml: expected a mapping of names, found list"),
        (b"1: {}\n", "models.yaml: expected a mapping of names"),
        (b"", "models.yaml: expected a mapping of names, found NoneType"),
        (b"phi-3.5-moe: 5\n", "models.yaml, phi-3.5-moe: expected a mapping, found int"),
        (b"phi-3.5-moe: {1: 2}\n", "models.yaml, phi-3.5-moe: "),
        (b"[" * 9000, "is not usable YAML: it is nested"),
    ],
)
def test_a_damaged_catalogue_is_one_sentence(home, data, message):
    (home / "params/models.yaml").write_bytes(data)
    params._yaml.cache_clear()
    with pytest.raises(params.ParamsError, match=message) as caught:
        params.model("phi-3.5-moe")
    assert "\n" not in str(caught.value)


def test_a_catalogue_that_is_no_file_is_one_sentence(home, monkeypatch, tmp_path):
    (home / "params/models.yaml").unlink()
    params._yaml.cache_clear()
    with pytest.raises(params.ParamsError, match="models.yaml is missing from .*set MOELIB_HOME"):
        params.model("phi-3.5-moe")
    (home / "params/models.yaml").mkdir()
    params._yaml.cache_clear()
    with pytest.raises(params.ParamsError, match="cannot be read: Is a directory"):
        params.model("phi-3.5-moe")
    monkeypatch.setenv("MOELIB_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(params.ParamsError, match=r"nowhere holds no params/studies/\*.yaml: .*set MOELIB_HOME"):
        params.study("demo")


@pytest.mark.parametrize("name", ["acme", "A-b_c.d", "a", "x" * 96, "_a_"])
def test_a_namespace_of_the_hub(name):
    assert upstream.namespace(name) == name


NO_NAMESPACES = [*". .. a/b ../x <b> a&b [a](b) -a a- .a a..b a--b ä a\\b a|b $(x)".split(), "", "a b", "x" * 97]
NO_NAMESPACES += ["a\nb", "a\x1b", "acme\n"]


@pytest.mark.parametrize("name", NO_NAMESPACES)
def test_a_name_that_can_be_no_namespace_is_refused_in_a_printable_sentence(name):
    with pytest.raises(params.ParamsError, match="is not a namespace of the Hub: give the name") as caught:
        upstream.namespace(name)
    assert not re.search(r"[\n\x1b]", str(caught.value))


@pytest.mark.parametrize(
    ("placements", "exclusive", "shares"),
    [
        (("baseline", "cpu-moe"), None, False),
        (("baseline", "n-cpu-moe=2"), "host", False),
        (("baseline", "cpu-moe"), "device", True),
        (("baseline", "baseline,ubatch=64"), None, True),
        (("baseline", "baseline,ubatch=64"), "host", False),
    ],
)
def test_a_host_is_shared_where_no_experts_are_on_its_cpu_or_the_study_says_so(placements, exclusive, shares):
    study = params.study("demo")
    arms = tuple(params.PlacementMode(placement=p) for p in placements)
    assert study.model_copy(update={"arms": arms, "exclusive": exclusive}).shares_host == shares
    assert not study.model_copy(update={"arms": (), "fitting": True}).shares_host
