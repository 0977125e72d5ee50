import re

import pytest

from moelib import params, twin, upstream


@pytest.mark.parametrize(
    ("call", "allowed"),
    [
        (lambda: params.model("phi"), "phi-3.5-moe"),
        (lambda: params.quant("q2_k"), "Q4_K_M, Q2_K, Q8_0"),
        (lambda: params.study("dmeo"), "demo"),
        (lambda: params.workload("short"), "plan-short"),
        (lambda: params.model("phi-3.5-moe").at_scale("small"), "full, tiny, nano"),
        (lambda: params.model("phi-3.5-moe").at_scale("0.25"), "full, tiny, nano"),
    ],
)
def test_an_unknown_name_is_refused_with_the_allowed_ones(call, allowed):
    with pytest.raises(params.ParamsError, match=allowed):
        call()


def test_every_committed_study_loads():
    assert "demo" in params.study_names()
    for name in params.study_names():
        assert params.study(name).name == name


def test_the_demo_is_the_plans_36_runs():
    demo = params.study("demo")
    assert len(demo.models) * len(demo.quants) * len(demo.arms) * demo.blocks == 36


def test_an_excluded_model_says_why():
    with pytest.raises(params.ParamsError, match="MXFP4"):
        params.model("gpt-oss-20b").at_scale("full")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("\nquant: Q2_K\n", "Extra inputs"),
        ("\nblocks: 0\n", "greater than 0"),
        ("\nquants: [Q2_K, Q2_K]\n", "names something twice"),
        ("\nquants: [Q3_K]\n", "Q4_K_M"),
        ("\narms: [{placement: cpu-moe}]\n", "must be a baseline"),
        ("\narms: [{placement: baseline}]\n", "at least one must follow it"),
        (
            "\narms: [{placement: baseline}, {placement: baseline, load_mode: none}]\n",
            "and no other, must be a baseline",
        ),
        ("\narms: [{placement: baseline}, {placement: n-cpu-moe=0}]\n", "N from 1 to 9999"),
        ("\narms: [{placement: baseline}, {placement: 'cpu-moe,ubatsh=9'}]\n", r"did you mean ubatch\?"),
        ("\nmodels: [nobody]\n", "unknown model"),
        ("\nmodels: [gpt-oss-20b]\n", "excluded"),
        ("\n- a list\n", "not usable YAML"),
    ],
)
def test_a_study_with_a_mistake_is_refused(home, change, complaint):
    path = home / "params/studies/smoke.yaml"
    path.write_text(path.read_text(encoding="utf-8") + change, encoding="utf-8")
    with pytest.raises(params.ParamsError, match=complaint):
        params.study("smoke")


FULL_BYTES = {
    "phi-3.5-moe": 78.0,
    "deepseek-moe-16b": 30.5,
}  # GiB in F16, as llama.cpp's converter writes the originals


@pytest.mark.parametrize("name", FULL_BYTES)
def test_full_geometry_has_the_published_size(name):
    assert twin.nbytes(params.model(name).at_scale("full")) / 2**30 == pytest.approx(FULL_BYTES[name], abs=0.05)


LIMITS = [
    ("requests: 1000000000000", "requests: Input should be less than or equal to 1000"),
    ("requests: 1001", "requests: Input should be less than or equal to 1000"),
    ("blocks: 1000000", "blocks: Input should be less than or equal to 10000"),
    ("context: 99999999999", "context: Input should be less than or equal to 16777216"),
    ("seed: 9223372036854775808", "seed: Input should be less than or equal to 9223372036854775807"),
    ("seed: -1", "seed: Input should be greater than or equal to 0"),
    ("requests: .inf", "requests: Input should be a finite number"),
    ("requests: 1.5", "requests: Input should be a valid integer"),
    ("requests: [1]", "requests: Input should be a valid integer"),
    ("requests: null", "requests: Input should be a valid integer"),
    (
        "arms: [{placement: baseline}, {placement: n-cpu-moe=99999999}]",
        "arms.1.placement: Value error, 'n-cpu-moe=99999999' is no placement",
    ),
    (f"models: [{', '.join(f'm{i}' for i in range(101))}]", "models: Tuple should have at most 100 items"),
    (f"workloads: [{', '.join(f'w{i}' for i in range(101))}]", "workloads: Tuple should have at most 100 items"),
    (
        f"models: [{', '.join(f'm{i}' for i in range(100))}]\nblocks: 10001",
        "blocks: Input should be less than or equal to",
    ),
    (
        f"models: [{', '.join(f'm{i}' for i in range(100))}]\nquants: [Q4_K_M, Q2_K, Q8_0]\nblocks: 1000",
        "is 600000 runs, more than 200000",
    ),
]


@pytest.mark.parametrize(("change", "complaint"), LIMITS)
def test_a_number_beyond_any_study_is_named_with_its_limit(home, change, complaint):
    path = home / "params/studies/smoke.yaml"
    path.write_text(path.read_text(encoding="utf-8") + change + "\n", encoding="utf-8")
    with pytest.raises(params.ParamsError, match=re.escape(complaint)) as caught:
        params.study("smoke")
    assert str(caught.value).startswith("params/studies/smoke.yaml: ")


def test_the_largest_that_is_allowed_is_allowed(home):
    path = home / "params/studies/smoke.yaml"
    path.write_text(
        path.read_text(encoding="utf-8")
        + "requests: 1000\nblocks: 10000\ncontext: 16777216\nseed: 9223372036854775807\n",
        encoding="utf-8",
    )
    assert params.study("smoke").blocks == 10_000


@pytest.mark.parametrize(
    ("file", "old", "new", "ask", "complaint"),
    [
        (
            "workloads.yaml",
            "generate_tokens: 8\n",
            "generate_tokens: 10000000\n",
            lambda: params.workload("smoke"),
            "generate_tokens: Input should be less than or equal to 1048576",
        ),
        (
            "workloads.yaml",
            "prompt_tokens: 512\n",
            "prompt_tokens: 1000000000\n",
            lambda: params.workload("long-512"),
            "prompt_tokens: Input should be less than or equal to 16777216",
        ),
        (
            "workloads.yaml",
            "generate_tokens: 8\n",
            "generate_tokens: 1\n",
            lambda: params.workload("smoke"),
            "generate_tokens: Input should be greater than or equal to 2",
        ),
        (
            "models.yaml",
            "    block_count: 32\n",
            "    block_count: 1001\n",
            lambda: params.model("phi-3.5-moe"),
            "geometry.block_count: Input should be less than or equal to 1000",
        ),
        (
            "models.yaml",
            "    vocab_size: 32064\n",
            "    vocab_size: 10000000000\n",
            lambda: params.model("phi-3.5-moe"),
            "geometry.vocab_size: Input should be less than or equal to 4194304",
        ),
        (
            "models.yaml",
            "    expert_count: 16\n",
            "    expert_count: 0\n",
            lambda: params.model("phi-3.5-moe"),
            "geometry.expert_count: Input should be greater than 0",
        ),
        (
            "models.yaml",
            "      block_count: 4\n",
            "      block_count: 5000\n",
            lambda: params.model("phi-3.5-moe").at_scale("tiny"),
            "scale tiny of phi-3.5-moe: block_count: Input should be",
        ),
        (
            "models.yaml",
            "      head_count: 4\n",
            "      head_count: 3\n",
            lambda: params.model("phi-3.5-moe").at_scale("tiny"),
            "scale tiny of phi-3.5-moe: entry: .*must divide by",
        ),
    ],
)
def test_numbers_of_models_and_workloads_have_limits(home, file, old, new, ask, complaint):
    path = home / "params" / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    params._yaml.cache_clear()
    with pytest.raises(params.ParamsError, match=complaint):
        ask()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"\xff\xfe", "models.yaml is not usable YAML: byte 0 is not UTF-8"),
        (b"- a\n- b\n", "models.yaml: expected a mapping of names, found list"),
        (b"1: {}\n", "models.yaml: expected a mapping of names"),
        (b"", "models.yaml: expected a mapping of names, found NoneType"),
        (b"phi-3.5-moe: 5\n", "models.yaml, phi-3.5-moe: expected a mapping, found int"),
        (b"phi-3.5-moe: {1: 2}\n", "models.yaml, phi-3.5-moe: "),
        (b"phi-3.5-moe: [\n", "is not usable YAML"),
        (b"[" * 9000, "is not usable YAML: it is nested"),
    ],
)
def test_a_damaged_catalogue_is_one_sentence(home, data, complaint):
    (home / "params/models.yaml").write_bytes(data)
    params._yaml.cache_clear()
    with pytest.raises(params.ParamsError, match=complaint) as caught:
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


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "../x",
        "a b",
        "a\nb",
        "<b>",
        "a&b",
        "[a](b)",
        "-a",
        "a-",
        ".a",
        "a..b",
        "a--b",
        "x" * 97,
        "ä",
        "a\\b",
        "a\x1b",
        "a|b",
        "$(x)",
        "acme\n",
    ],
)
def test_what_can_be_no_namespace(name):
    with pytest.raises(params.ParamsError, match="is not a namespace of the Hub: give the name") as caught:
        upstream.namespace(name)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
