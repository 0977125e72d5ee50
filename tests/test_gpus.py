"""GPUs: CUDA's own answers, why it shows none, and the engine's devices of other kinds."""

import subprocess
import sys
import uuid
from types import SimpleNamespace

import pytest

from moelib.base import files
from moelib.campaign import bench
from moelib.locks import claim
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
        (f"device 0 0 {A} shared 0", [gpus.Shown(A, False)]),
        (f"device 0 0 {A} shared 1", [gpus.Shown(A, True)]),
        (f"device 0 0 {A} shared -1", [gpus.Shown(A, False)]),  # CUDA did not say
        ("device 100 101 00000000-0000-0000-0000-000000000000 shared -1", []),  # cuInit finds no device
        (f"device 0 0 {A} shared 0\ndevice 0 0 {B} shared 0", [gpus.Shown(A, False), gpus.Shown(B, False)]),
        ("", []),
    ],
)
def test_the_devices_that_cuda_shows_are_read_from_its_answer(monkeypatch, line, shown):
    monkeypatch.setattr(gpus, "VISIBLE", [sys.executable, "-c", f"print({line!r})"])
    assert gpus.visible() == shown
    assert gpus.first_free() == (shown[0] if shown else None)


def test_the_query_itself_runs_with_and_without_cuda():
    assert all(len(shown.id) == len(A) for shown in gpus.visible())


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """Two of them by a library with CUDA's functions; names of the test's own, as others measure on this host."""
    monkeypatch.setattr(claim, "PREFIX", f"moelib-test-{uuid.uuid4().hex}-")
    ids = [uuid.uuid4(), uuid.uuid4()]
    library, code = tmp_path / "libcuda.so.1", tmp_path / "cuda.c"
    rows = ", ".join("{" + ", ".join(map(str, i.bytes)) + "}" for i in ids)
    code.write_text(
        "#include <string.h>\n"
        f"static const unsigned char ids[2][16] = {{{rows}}};\n"
        "int cuInit(unsigned flags) { return 0; }\n"
        "int cuDeviceGetCount(int *n) { *n = 2; return 0; }\n"
        "int cuDeviceGet(int *device, int i) { *device = i; return i < 2 ? 0 : 101; }\n"
        "int cuDeviceGetUuid_v2(unsigned char *id, int i) { memcpy(id, ids[i], 16); return 0; }\n"
        "int cuDeviceGetAttribute(int *value, int which, int i) { *value = which == 18 ? 0 : -1; return 0; }\n",
        encoding="utf-8",
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(code)], check=True, timeout=60)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    return [str(i) for i in ids]


def test_of_two_gpus_the_first_that_nobody_measures_is_taken(two_gpus):
    a, b = two_gpus
    assert [s.id for s in gpus.visible()] == [a, b]
    assert gpus.first_free().id == a
    with claim.device(f"GPU-{a}", "device cuda", 0, shared=True):
        assert gpus.first_free().id == b
        with claim.device(f"GPU-{b}", "device cuda", 0, shared=True):
            assert gpus.first_free().id == a, "who waits for one says who has it"
    with claim.device(f"GPU-{b}", "device cuda", 0):
        assert gpus.first_free().id == a


def test_who_comes_second_takes_another_gpu_or_says_who_has_it(two_gpus, monkeypatch):
    """Both saw the first one free, as several begin at once."""
    a, b = (SimpleNamespace(uuid=f"GPU-{i}", kind="cuda", share=lambda: None) for i in two_gpus)
    monkeypatch.setattr(bench, "LOCK_S", 0.1)

    def choose():
        return next(d for d in (a, b) if d.uuid == f"GPU-{gpus.first_free().id}")

    with bench.held(a, choose, shared=True) as first:
        with bench.held(a, choose, shared=True) as second:
            assert (first, second) == (a, b)
            with pytest.raises(files.InUse, match="device cuda is in use by process"):
                with bench.held(b, choose, shared=True):
                    pass
        with bench.held(b, choose, shared=True) as third:
            assert third == b
        with pytest.raises(files.InUse, match="device cuda is in use by process"), bench.held(b, choose):
            pass  # which wants the host, too


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
