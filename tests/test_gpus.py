"""GPUs: CUDA_VISIBLE_DEVICES as CUDA reads it, CUDA's own answers, and the engine's devices of other kinds.

CUDA's reading was asked of a driver (580.159.04, two H100s that are alike).
"""

import sys

import pytest

from moelib.machine import gpus
from moelib.machine.gpus import Card, NotVisible, first_visible

A, B = "GPU-4c183a5c-a1fd-f2b1-bb8a-298146543654", "GPU-78d2cc5c-5130-6c53-9001-d3b92f3bf6b2"
ALIKE = (Card(A, "H100"), Card(B, "H100"))
TWINS = (Card("GPU-263da6ff-1111", "H100"), Card("GPU-263da6ff-2222", "H100"))
UNLIKE = (Card(A, "GT 1030"), Card(B, "RTX 4090"))
LOST_FIRST = (Card(None, None), ALIKE[1])
MIG = "MIG-41f1b9a8-0000-5c7e-9f3a-77a1c20c7f3e"


def never():
    raise AssertionError("CUDA need not be asked")


@pytest.mark.parametrize(
    ("value", "place"),
    [
        *((value, 0) for value in (None, "0", "0, 1", A, "GPU-4c18")),
        *((value, 1) for value in ("1", "1,0", " 1", "1 ", "+1", "01", B, "GPU-78", "GPU-7", B.upper(), f"{B},{A}")),
        *((value, 1) for value in (f"{B}ff", f"{B} ", "GPU-78d2cc5c-,GPU-4c183a5c-")),
        # an entry that names nothing ends the list
        *((value, 0) for value in ("0,nope,1", "0,2,1", "0,,1")),
        ("1,-1,0", 1),
        # so does one of another form: it is no second naming of the first
        *((value, 0) for value in (f"0,{B}", f"0,{A}")),
        (f"{B},0", 1),
        *((value, value.split(",")[0]) for value in (MIG, f"{MIG},0", f"MIG-{A}/7/0")),
    ],
)
def test_the_first_gpu_that_is_named_is_the_one_that_cuda_shows_first(value, place):
    assert first_visible(value, ALIKE, None, never) == place


NO_FORM = "names no GPU as CUDA reads it"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *((value, "hides every GPU") for value in ("", "-1", "NoDevFiles", ",0", "-1,0")),
        *((value, f"'{value}' is for NVIDIA_VISIBLE_DEVICES") for value in ("all", "void", "none")),
        *((value, "names a GPU twice") for value in ("0,0", "1,1,0", f"{A},{A}", f"{A},GPU-4c18")),
        ("2", "there is no GPU 2"),
        ("99999999999999999999", "there is no GPU 9"),
        ("GPU-", "fits 2 GPUs"),
        ("GPU-00000000", "is the id of none"),
        *((value, NO_FORM) for value in ("nope", B.lower(), B.removeprefix("GPU-"), f" {B}")),
        # CUDA takes the digits at the start of these for an index, which nobody means who writes them
        *((value, NO_FORM) for value in ("00000000:01:00.0", "0x1", "1.5", "1;0", "0 1", "1a")),
    ],
)
def test_where_none_is_named_a_sentence_says_what_to_write(value, words):
    with pytest.raises(NotVisible, match=words) as caught:
        first_visible(value, ALIKE, None, never)
    assert len(str(caught.value).splitlines()) == 1


def test_without_a_card_none_is_named():
    with pytest.raises(NotVisible, match="the driver lists no GPU"):
        first_visible(None, (), None, never)


def test_the_start_of_an_id_must_fit_one_card_alone():
    with pytest.raises(NotVisible, match="fits 2 GPUs"):
        first_visible("GPU-263da6ff", TWINS, None, never)
    assert first_visible("GPU-263da6ff-2", TWINS, None, never) == 1


@pytest.mark.parametrize(
    ("value", "cards", "order", "first_uuid", "place"),
    [
        ("0", UNLIKE, None, B, 1),  # the fastest first, as CUDA counts unless told otherwise
        ("1", UNLIKE, "FASTEST_FIRST", A, 0),
        (None, UNLIKE, None, B, 1),
        (None, UNLIKE, None, None, 0),  # any GPU will do
        ("1", UNLIKE, "PCI_BUS_ID", "not asked", 1),
        (B, UNLIKE, None, "not asked", 1),
        ("1", LOST_FIRST, None, "not asked", 1),  # a card that does not answer keeps its number
        (B, LOST_FIRST, None, "not asked", 1),
    ],
)
def test_cuda_is_asked_what_an_index_means_among_unlike_cards_alone(value, cards, order, first_uuid, place):
    ask = never if first_uuid == "not asked" else lambda: first_uuid
    assert first_visible(value, cards, order, ask) == place


@pytest.mark.parametrize("first_uuid", [None, "GPU-of-nobody"])
def test_an_index_of_unknown_meaning_is_refused_with_the_ids(first_uuid):
    with pytest.raises(NotVisible, match="not alike.*GT 1030 is GPU-4c.*RTX 4090 is GPU-78.*PCI_BUS_ID"):
        first_visible("0", UNLIKE, None, lambda: first_uuid)


@pytest.mark.parametrize(
    ("line", "first_uuid"),
    [
        (f"device 0 0 {A} shared 0", A),
        ("device 100 101 GPU-00000000-0000-0000-0000-000000000000 shared -1", None),  # cuInit finds no device
        ("", None),
    ],
)
def test_the_device_that_cuda_counts_first_is_read_from_its_answer(monkeypatch, line, first_uuid):
    monkeypatch.setattr(gpus, "FIRST", [sys.executable, "-c", f"print({line!r})"])
    assert gpus.first_id() == first_uuid


def test_the_query_itself_runs_with_and_without_cuda():
    first_uuid = gpus.first_id()
    assert first_uuid is None or first_uuid.startswith("GPU-")


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
