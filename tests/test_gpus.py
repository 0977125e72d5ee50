"""GPUs: CUDA's own answers, why it shows none, and the engine's devices of other kinds."""

import sys

import pytest

from moelib.machine import gpus

A, B = "4c183a5c-a1fd-f2b1-bb8a-298146543654", "78d2cc5c-5130-6c53-9001-d3b92f3bf6b2"


@pytest.mark.parametrize(
    ("value", "cards", "words"),
    [
        (
            "7",
            [f"GPU-{A}", f"GPU-{B}"],
            f"CUDA_VISIBLE_DEVICES='7' shows CUDA no GPU (here are GPU-{A}, GPU-{B})",
        ),
        (None, [f"GPU-{A}"], f"CUDA gives none of GPU-{A}"),
        ("0", [], "the driver lists no GPU"),
    ],
)
def test_where_cuda_shows_none_a_sentence_says_what_to_write(monkeypatch, value, cards, words):
    monkeypatch.delenv(gpus.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(gpus.VARIABLE, value)
    message = str(gpus.none_visible(cards))
    assert message.startswith(words)
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (f"device 0 0 {A} shared 0", gpus.Shown(A, False)),
        (f"device 0 0 {A} shared 1", gpus.Shown(A, True)),
        (f"device 0 0 {A} shared -1", gpus.Shown(A, False)),  # CUDA did not say
        ("device 100 101 00000000-0000-0000-0000-000000000000 shared -1", None),  # cuInit finds no device
        ("", None),
    ],
)
def test_the_device_that_cuda_counts_first_is_read_from_its_answer(monkeypatch, line, shown):
    monkeypatch.setattr(gpus, "FIRST", [sys.executable, "-c", f"print({line!r})"])
    assert gpus.first() == shown


def test_the_query_itself_runs_with_and_without_cuda():
    shown = gpus.first()
    assert shown is None or len(shown.id) == len(A)


@pytest.mark.parametrize(
    ("devices", "others"),
    [
        ({"CUDA0": "H100", "RPC0[127.0.0.1:5]": "r", "BLAS": "OpenBLAS", "CPU": "c"}, set()),
        ({"Vulkan0": "llvmpipe (LLVM 15)"}, set()),
        (devices := {"ROCm0": "gfx1100", "Vulkan0": "RADV", "SYCL0": "Arc", "MTL0": "M2"}, set(devices)),
    ],
)
def test_devices_of_other_kinds_are_told_from_cuda_rpc_and_the_cpu(devices, others):
    assert gpus.others(devices).keys() == others
