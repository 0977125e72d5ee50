"""CUDA_VISIBLE_DEVICES as CUDA reads it. What stands below as CUDA's answer was asked of a driver (580.159.04 with two
H100s), where two cards are alike."""

import pytest

from moelib.visible import Card, NotVisible, first

A, B = "GPU-4c183a5c-a1fd-f2b1-bb8a-298146543654", "GPU-78d2cc5c-5130-6c53-9001-d3b92f3bf6b2"
ALIKE = (Card(A, "H100"), Card(B, "H100"))
TWINS = (Card("GPU-263da6ff-1111", "H100"), Card("GPU-263da6ff-2222", "H100"))
UNLIKE = (Card(A, "GT 1030"), Card(B, "RTX 4090"))
MIG = "MIG-41f1b9a8-0000-5c7e-9f3a-77a1c20c7f3e"


def never():
    raise AssertionError("CUDA need not be asked")


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (None, 0),
        ("0", 0),
        ("1", 1),
        ("1,0", 1),
        ("1,-1,0", 1),
        ("0,nope,1", 0),
        ("0,2,1", 0),
        ("0,,1", 0),
        (" 1", 1),
        ("1 ", 1),
        ("0, 1", 0),
        ("+1", 1),
        ("01", 1),
        (A, 0),
        (B, 1),
        ("GPU-78", 1),
        ("GPU-7", 1),
        ("GPU-4c18", 0),
        ("GPU-78D2CC5C-5130-6C53-9001-D3B92F3BF6B2", 1),
        (f"{B},{A}", 1),
        (f"{B},0", 1),
        (f"0,{B}", 0),
        (f"0,{A}", 0),  # the second is of another form, so it is not read, and is no second naming of the first
        (f"{B}ff", 1),
        (f"{B} ", 1),
        ("GPU-78d2cc5c-,GPU-4c183a5c-", 1),
    ],
)
def test_the_first_gpu_that_is_named_is_the_one_that_cuda_shows_first(value, place):
    assert first(value, ALIKE, None, never) == place


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "hides every GPU"),
        ("-1", "hides every GPU"),
        ("NoDevFiles", "hides every GPU"),
        (",0", "hides every GPU"),
        ("-1,0", "hides every GPU"),
        ("all", "'all' is for NVIDIA_VISIBLE_DEVICES"),
        ("void", "'void' is for NVIDIA_VISIBLE_DEVICES"),
        ("none", "'none' is for NVIDIA_VISIBLE_DEVICES"),
        ("nope", "names no GPU as CUDA reads it"),
        ("2", "there is no GPU 2"),
        ("99999999999999999999", "there is no GPU 9"),
        ("0,0", "names a GPU twice"),
        ("1,1,0", "names a GPU twice"),
        (f"{A},{A}", "names a GPU twice"),
        (f"{A},GPU-4c18", "names a GPU twice"),
        ("gpu-78d2cc5c-5130-6c53-9001-d3b92f3bf6b2", "names no GPU as CUDA reads it"),
        ("78d2cc5c-5130-6c53-9001-d3b92f3bf6b2", "names no GPU as CUDA reads it"),
        (f" {B}", "names no GPU as CUDA reads it"),
        ("GPU-", "fits 2 GPUs"),
        ("GPU-00000000", "is the id of none"),
        # CUDA takes the digits at the start of these for an index, which nobody means who writes them
        ("00000000:01:00.0", "names no GPU as CUDA reads it"),
        ("0x1", "names no GPU as CUDA reads it"),
        ("1.5", "names no GPU as CUDA reads it"),
        ("1;0", "names no GPU as CUDA reads it"),
        ("0 1", "names no GPU as CUDA reads it"),
        ("1a", "names no GPU as CUDA reads it"),
    ],
)
def test_where_none_is_named_a_sentence_says_what_to_write(value, words):
    with pytest.raises(NotVisible, match=words) as caught:
        first(value, ALIKE, None, never)
    assert len(str(caught.value).splitlines()) == 1


def test_without_a_card_none_is_named():
    with pytest.raises(NotVisible, match="the driver lists no GPU"):
        first(None, (), None, never)


def test_the_start_of_an_id_must_fit_one_card_alone():
    with pytest.raises(NotVisible, match="fits 2 GPUs"):
        first("GPU-263da6ff", TWINS, None, never)
    assert first("GPU-263da6ff-2", TWINS, None, never) == 1


@pytest.mark.parametrize("value", [MIG, f"{MIG},0", f"MIG-{A}/7/0"])
def test_an_instance_of_mig_is_looked_up_by_its_id(value):
    assert first(value, ALIKE, None, never) == value.split(",")[0]


@pytest.mark.parametrize(
    ("value", "order", "first_uuid", "place"),
    [
        ("0", None, B, 1),  # the fastest first, as CUDA counts unless told otherwise
        ("0", "FASTEST_FIRST", B, 1),
        ("1", "FASTEST_FIRST", A, 0),
        (None, None, B, 1),
        (None, None, None, 0),  # nobody asked for one in particular
    ],
)
def test_among_unlike_cards_an_index_means_what_cuda_says(value, order, first_uuid, place):
    assert first(value, UNLIKE, order, lambda: first_uuid) == place


def test_among_unlike_cards_an_id_or_the_order_of_addresses_needs_no_asking():
    assert first("1", UNLIKE, "PCI_BUS_ID", never) == 1
    assert first(B, UNLIKE, None, never) == 1


@pytest.mark.parametrize("first_uuid", [None, "GPU-of-nobody"])
def test_an_index_that_nobody_can_tell_is_refused_with_the_ids(first_uuid):
    with pytest.raises(NotVisible, match="not alike.*GT 1030 is GPU-4c.*RTX 4090 is GPU-78.*PCI_BUS_ID"):
        first("0", UNLIKE, None, lambda: first_uuid)


def test_a_card_that_does_not_answer_keeps_its_number():
    assert first("1", (Card(None, None), ALIKE[1]), None, never) == 1
    assert first(B, (Card(None, None), ALIKE[1]), None, never) == 1
