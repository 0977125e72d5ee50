"""Which GPU `CUDA_VISIBLE_DEVICES` names, read as CUDA reads it.

Each rule was checked with a driver (580.159, two H100s): an entry that names no GPU ends the list, and those before it
count; all entries must have the form of the first (index or id), one of the other form ends the list; if a GPU is named
twice, none is visible; the first digits of an id are enough, in upper or lower case, but `GPU-` must be in capitals.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moelib.params import UserError

VARIABLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
BY_ADDRESS = "PCI_BUS_ID"
HIDES = "hides every GPU"
_INDEX = re.compile(r"\s*\+?(\d+)\s*")
_GPU = re.compile(r"GPU-[0-9a-fA-F-]*\s*")
_OF_CONTAINERS = ("all", "void", "none")
UUID_LENGTH = len("GPU-263da6ff-9608-67cf-9bce-a8c85c7c1cd0")


class Card(NamedTuple):
    """A GPU as the driver lists it, in the order of its PCI address."""

    uuid: str | None
    """None for a GPU that does not answer."""
    name: str | None


class NotVisible(UserError):
    """The variable names no GPU, or it is not clear which; the message says what to write."""


def first(
    value: str | None, cards: Sequence[Card], order: str | None, ask: Callable[[], str | None] | None
) -> int | str:
    """The first GPU that `value` names: its place in `cards`, or the id of a MIG instance.

    value: the variable's value, None where it is not set. order: the value of CUDA_DEVICE_ORDER. ask: asks CUDA itself
    for the id of its first device; it is called only where the cards are of different models, as CUDA then counts the
    fastest one first. Raises NotVisible.
    """
    entries = ["0"] if value is None else value.split(",")
    if any(e.startswith("MIG-") for e in entries[:1]):
        return entries[0].strip()
    places = _places(entries, cards)
    if not places:
        raise NotVisible(_no_gpu(value, cards))
    if len(set(places)) < len(places):
        raise NotVisible(f"{VARIABLE}={value!r} names a GPU twice, and CUDA then shows none; name it once")
    by_index = not entries[0].startswith("GPU-")
    if by_index and order != BY_ADDRESS and len({c.name for c in cards if c.name}) > 1:
        return _by_cuda(value, places[0], cards, ask() if ask else None)
    return places[0]


def _places(entries: Sequence[str], cards: Sequence[Card]) -> list[int]:
    """Places in `cards`, up to the first entry that names nothing or is of another form than the first."""
    by_id = entries[0].startswith("GPU-")
    places = []
    for entry in entries:
        fits = _by_id(entry, cards) if by_id else _by_index(entry, cards)
        if fits is None:
            break
        places.append(fits)
    return places


def _by_index(entry: str, cards: Sequence[Card]) -> int | None:
    m = _INDEX.fullmatch(entry)
    return int(m[1]) if m and len(m[1]) < 10 and int(m[1]) < len(cards) else None


def _by_id(entry: str, cards: Sequence[Card]) -> int | None:
    """The card whose id begins with `entry`, if there is exactly one; characters after a whole id are ignored."""
    start = entry.strip().lower()[:UUID_LENGTH] if _GPU.fullmatch(entry) else None
    fits = [i for i, c in enumerate(cards) if start and c.uuid and c.uuid.lower().startswith(start)]
    return fits[0] if len(fits) == 1 else None


def _by_cuda(value: str | None, place: int, cards: Sequence[Card], first_uuid: str | None) -> int:
    """The card that CUDA itself counts first, where the cards are of different models."""
    if first_uuid is not None and (fits := _by_id(first_uuid, cards)) is not None:
        return fits
    if value is None:  # any GPU will do, and the record names the one that is used
        return place
    listed = ", ".join(f"{c.name} is {c.uuid}" for c in cards if c.uuid)
    raise NotVisible(
        f"{VARIABLE}={value!r} counts GPUs that are not alike, and CUDA, which may count the fastest first, did not "
        f"say which one it means; name it by its id ({listed}), or set {ORDER}={BY_ADDRESS} to count as nvidia-smi does"
    )


def _no_gpu(value: str | None, cards: Sequence[Card]) -> str:
    """Why no GPU is named, and what to write."""
    entry = (value or "").split(",")[0]
    listed = ", ".join(f"{i}: {c.uuid or 'does not answer'}" for i, c in enumerate(cards))
    if not cards:
        return "the driver lists no GPU"
    if value is not None and entry.strip() in ("", "-1", "NoDevFiles"):
        return f"{VARIABLE}={value!r} {HIDES} (here are {listed}); unset it, or name one"
    if entry.strip() in _OF_CONTAINERS:
        return f"{entry.strip()!r} is for NVIDIA_VISIBLE_DEVICES: in {VARIABLE} it {HIDES}; here are {listed}"
    if _INDEX.fullmatch(entry):
        return f"{VARIABLE}={value!r}: there is no GPU {entry.strip()}; here are {listed}"
    if _GPU.fullmatch(entry):
        fits = [c.uuid for c in cards if c.uuid and c.uuid.lower().startswith(entry.strip().lower())]
        count = f"fits {len(fits)} GPUs" if fits else "is the id of none"
        return f"{VARIABLE}={value!r}: {entry.strip()} {count} (here are {listed})"
    return (
        f"{VARIABLE}={value!r} names no GPU as CUDA reads it: an index, GPU- and the first digits of an id, or MIG- "
        f"and an instance's id; here are {listed}"
    )
