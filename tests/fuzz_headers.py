"""A fuzz campaign on GGUF headers: mutated ones end in a header or in GGUFError, soon and in little memory.

    python tests/fuzz_headers.py --rounds 250000 [--seed 1]

Prints how many were read and refused, what else was raised (nothing should be), the slowest, and the memory's peak.
"""

from __future__ import annotations

import argparse
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import ggufs
from gguf.constants import GGMLQuantizationType

from moelib import gguf_file
from moelib.gguf_header import Header

LENGTHS = (
    0,
    1,
    7,
    31,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 62,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
KEYS = ("block_count", "expert_count", "expert_used_count", "nextn_predict_layers")
GENERAL = ("general.architecture", "general.type", "general.alignment", "general.name", "split.count", "split.no")
PLACEMENTS = ("baseline", "cpu-moe", "n-cpu-moe=1", "n-cpu-moe=2", "n-cpu-moe=99")
NAMES = (
    "blk.0.ffn_up_exps.weight",
    "blk.999999999999999999999.ffn_up_exps.weight",
    "blk.1.ffn_gate.0.weight",
    "blk.0.ffn_up_chexps.weight",
    "token_embd_norm.weight",
    "blk.0.x.lora_a",
    "",
    "x" * 64,
)


@dataclass
class Tally:
    read: int = 0
    refused: Counter = field(default_factory=Counter)
    other: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    peak_growth_bytes: int = 0


def odd(r: random.Random) -> object:
    """A value that a key may have in a file that nobody checked."""
    return r.choice(
        [
            lambda: r.choice((0, 1, 2, 3, 4, 32, -1, 1 << 31, 1 << 40)),
            lambda: r.choice((True, False, 0.5, float("nan"), "4", "", "clip", "adapter", b"\xff\xfe")),
            lambda: [r.randrange(5) for _ in range(r.choice((0, 1, 3, 5)))],
            lambda: ["a"] * r.choice((1, 1025)),
            lambda: [0] * 1025,
            lambda: ggufs.Typed(r.choice((ggufs.U64, ggufs.I64, ggufs.I32)), r.randrange(1 << 30)),
        ]
    )()


def structured(r: random.Random) -> bytes:
    """A well-formed file with odd facts in it."""
    metadata, tensors = ggufs.moe(
        r.choice(("qwen3moe", "glm4moe", "clip")), r.randrange(1, 4), r.randrange(2), r.randrange(2), r.choice((1, 4))
    )
    arch = metadata["general.architecture"]
    for _ in range(r.choice((0, 0, 1, 1, 2))):
        metadata[r.choice([*(f"{arch}.{k}" for k in KEYS), *GENERAL])] = odd(r)
    if r.random() < 0.3:
        metadata.pop(r.choice(list(metadata)))
    if r.random() < 0.3:
        tensors[r.choice(NAMES)] = tuple(r.choice((1, 4, 32)) for _ in range(r.randrange(1, 5)))
    return ggufs.build(metadata, tensors, r.choice(("F16", "F32")))


def mutated(data: bytes, end: int, r: random.Random) -> bytes:
    """`data` with a few changes in its first `end` bytes."""
    out = bytearray(data)
    for _ in range(r.randrange(1, 4)):
        at, how = r.randrange(min(end, len(out)) or 1), r.randrange(6)
        if how == 0:
            out[at : at + 1] = bytes([r.randrange(256)])
        elif how == 1:
            out[at : at + 8] = struct.pack("<Q", r.choice(LENGTHS))
        elif how == 2:
            out[at : at + 4] = struct.pack("<I", r.choice((*range(14), *LENGTHS[:9], *GGMLQuantizationType)))
        elif how == 3:
            del out[at : at + r.randrange(1, 64)]
        elif how == 4:
            out[at:at] = out[(k := r.randrange(len(out) or 1)) : k + r.randrange(1, 64)]
        else:
            del out[at:]
    return bytes(out)


def look(h: Header) -> None:
    """Ask a header everything that it can be asked."""
    _ = (h.kind, h.layers, h.is_quantised, h.is_twin, h.type_counts, h.expert_types, h.parameters, h.tensor_bytes)
    if h.kind == "model":
        _ = (h.bits_per_weight, h.fault(PLACEMENTS))
    for p in PLACEMENTS:
        assert 0 <= h.moved_bytes(p) <= h.tensor_bytes
        assert 0 <= h.device_bytes(p) <= h.tensor_bytes
    for p in PLACEMENTS:
        assert min(h.read_bytes(p)) >= 0


def campaign(rounds: int, seed: int, folder: Path) -> Tally:
    """Read `rounds` headers: half of them whole files with odd facts, half those with their bytes changed."""
    r, tally, path = random.Random(seed), Tally(), folder / "x.gguf"
    data = structured(r)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for k in range(rounds):
        if k % 2 == 0:
            data = structured(r)
        here = data if k % 2 == 0 else mutated(data, 1500, r)
        on_disk = k % 20 < 2  # opening a file takes longer than reading its header
        if on_disk:
            path.write_bytes(here)
        started = time.perf_counter()
        try:
            if on_disk:
                look(gguf_file.read_header(path, any_kind=r.random() < 0.5))
            else:
                look(gguf_file.from_bytes(here, path.name, len(here)))
            tally.read += 1
        except gguf_file.GGUFError as err:
            tally.refused[str(err).removeprefix(path.name).lstrip(": ").split(" ")[0]] += 1
        except Exception as err:  # the defect that is looked for
            tally.other.append(f"{type(err).__name__}: {err} (round {k}, seed {seed})")
        tally.slowest_s = max(tally.slowest_s, time.perf_counter() - started)
    tally.peak_growth_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=250_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        t = campaign(asked.rounds, asked.seed, Path(folder))
    print(f"{asked.rounds} headers, seed {asked.seed}, {time.monotonic() - started:.0f} s")
    print(f"read {t.read}, refused {t.refused.total()}, raised anything else {len(t.other)}")
    print(f"slowest {t.slowest_s * 1000:.1f} ms, memory grew by {t.peak_growth_bytes / 2**20:.1f} MiB at most")
    print(*t.other[:20], sep="\n")
    return bool(t.other)


if __name__ == "__main__":
    sys.exit(main())
