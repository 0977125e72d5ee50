import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelib import params, twin


@pytest.mark.parametrize(
    ("call", "allowed"),
    [
        (lambda: params.model("phi"), "phi-3.5-moe"),
        (lambda: params.quant("q2_k"), "Q4_K_M, Q2_K, Q8_0"),
        (lambda: params.study("dmeo"), "demo"),
        (lambda: params.workload("short"), "plan-short"),
        (lambda: params.model("phi-3.5-moe").at_scale("small"), "tiny"),
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
        ("\narms: [{placement: baseline}]\n", "at least one to compare"),
        ("\narms: [{placement: baseline}, {placement: baseline, load_mode: none}]\n", "it alone"),
        ("\narms: [{placement: baseline}, {placement: n-cpu-moe=0}]\n", r"baseline\|cpu-moe\|n-cpu-moe="),
        ("\nmodels: [nobody]\n", "unknown model"),
        ("\nmodels: [gpt-oss-20b]\n", "excluded"),
        ("\n- a list\n", "not YAML"),
    ],
)
def test_a_study_with_a_mistake_is_refused(home, change, complaint):
    path = home / "params/studies/smoke.yaml"
    path.write_text(path.read_text() + change)
    with pytest.raises(params.ParamsError, match=complaint):
        params.study("smoke")


FULL_BYTES = {
    "phi-3.5-moe": 78.0,
    "deepseek-moe-16b": 30.5,
}  # GiB in F16, as llama.cpp's converter writes the originals


@pytest.mark.parametrize("name", FULL_BYTES)
def test_full_geometry_has_the_published_size(name):
    assert twin.nbytes(params.model(name).at_scale("full")) / 2**30 == pytest.approx(FULL_BYTES[name], abs=0.05)


@given(st.sampled_from(list(FULL_BYTES)), st.floats(0.01, 1))
def test_a_scaled_geometry_is_valid_and_keeps_its_quirks(name, factor):
    full = params.model(name).at_scale("full")
    small = full.scaled(factor)
    params.Geometry.model_validate(small.model_dump())
    for length in ("feed_forward_length", "expert_feed_forward_length"):
        assert (getattr(small, length) % 256 == 0) == (getattr(full, length) % 256 == 0)
        assert getattr(small, length) % 32 == 0
    assert small.leading_dense_block_count == full.leading_dense_block_count < small.block_count
    assert small.expert_count == full.expert_count
    assert twin.nbytes(small) <= max(twin.nbytes(full) * 1.01, 64 << 20)
