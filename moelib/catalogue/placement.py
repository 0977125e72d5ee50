"""A placement: where a run keeps the model's weights, with which settings of llama.cpp, its file cached or cold.

Written as `baseline`, `cpu-moe` or `n-cpu-moe=12`, with settings after commas: `cpu-moe,ubatch=64,kv=q8_0`. The load
mode (mmap, none or mlock) stands beside it in a study and in a record.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container
from dataclasses import dataclass
from functools import cache
from typing import Any

from moelib.base.schema import near

REFERENCE = "baseline"
"""What the other placements of a round are compared with: all on the GPU, llama.cpp's own settings. Where a study has
none, as no card that it is for holds one, the placement with most on the GPU takes its part."""
MAX_LAYERS = 9999
UBATCH, KV = 512, "f16"
"""llama.cpp's defaults."""
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
LOAD_MODES = ("mmap", "none", "mlock")
SETTINGS = {
    "ubatch": f"tokens of a prompt computed at once, llama.cpp's physical batch ({UBATCH} by default)",
    "op-offload": "off: large batches are computed where their weights are, not copied to the GPU",
    "kv": f"type of the KV cache ({KV} by default)",
    "threads": "CPU threads (all usable CPUs by default)",
    "context": "tokens of prompt and answer that there is room for (the study's by default)",
    "cache": "cold: the file is dropped from the system's page cache before the server starts (else it is read in)",
}
"""Setting -> its meaning; one text for each placement, so that defaults are left out."""
MOST = {"ubatch": 1 << 16, "threads": 1 << 16, "context": 1 << 24}
"""Setting that is a number -> the largest one that is taken."""
EXAMPLES = "baseline, cpu-moe, n-cpu-moe=12, cpu-moe,ubatch=64"


class PlacementError(ValueError):
    """The text names no placement; the message says what is wrong and what would do."""


@dataclass(frozen=True)
class Placement:
    """How many layers' experts the CPU keeps, and what else of a run differs from its defaults."""

    cpu_layers: float
    """The experts of so many first layers are on the CPU: 0 in a baseline, infinity for all."""
    load_mode: str = "mmap"
    """mmap: host weights are mapped from the file; none: copied to memory of their own (pinned, with CUDA); mlock: as
    none, and locked, so that the system cannot swap them out."""
    ubatch: int | None = None
    op_offload: bool = True
    kv: str | None = None
    threads: int | None = None
    context: int | None = None
    cold: bool = False
    """Whether the file is loaded from the disk, not from the page cache: the run's affair, not the engine's."""

    @classmethod
    @cache
    def parse(cls, text: str, load_mode: str = "mmap") -> Placement:
        """The placement that `text` names. Raises PlacementError."""
        name, *settings = text.split(",")
        if load_mode not in LOAD_MODES:
            raise PlacementError(f"load mode {load_mode!r}: take one of {', '.join(LOAD_MODES)}")
        values: dict[str, int | str | bool] = {}
        for setting in settings:
            key, _, value = setting.partition("=")
            if key not in SETTINGS:
                raise PlacementError(f"{text!r} has a setting {key!r}, which is none{near(key, SETTINGS)}")
            if key in values:
                raise PlacementError(f"{text!r} gives {key} twice")
            values[key] = _value(text, key, value)
        known: dict[str, Any] = {key: values.get(key) for key in ("ubatch", "kv", "threads", "context")}
        known |= {"op_offload": "op-offload" not in values, "cold": "cache" in values}
        placement = cls(_cpu_layers(text, name), load_mode, **known)
        if str(placement) != text:
            raise PlacementError(f"{text!r}: write it as {placement}, so that one placement has one name")
        return placement

    @classmethod
    def of(cls, placement: Placement | str) -> Placement:
        """`placement`, or the one that a text names. Raises PlacementError."""
        return placement if isinstance(placement, Placement) else cls.parse(placement)

    def __str__(self) -> str:
        n = self.cpu_layers
        parts = ["baseline" if n == 0 else "cpu-moe" if math.isinf(n) else f"n-cpu-moe={n:.0f}"]
        parts += [f"ubatch={self.ubatch}"] if self.ubatch else []
        parts += [] if self.op_offload else ["op-offload=off"]
        parts += [f"kv={self.kv}"] if self.kv else []
        parts += [f"threads={self.threads}"] if self.threads else []
        parts += [f"context={self.context}"] if self.context else []
        parts += ["cache=cold"] if self.cold else []
        return ",".join(parts)

    @property
    def label(self) -> str:
        """Placement and load mode, as people read them: `cpu-moe, mmap`."""
        return f"{self}, {self.load_mode}"

    @property
    def is_baseline(self) -> bool:
        """Whether all that can be on the GPU is there, whatever the settings."""
        return self.cpu_layers == 0

    @property
    def is_whole(self) -> bool:
        """Whether all experts are on the CPU."""
        return math.isinf(self.cpu_layers)

    @property
    def is_between(self) -> bool:
        """Whether it names a number of layers."""
        return not self.is_baseline and not self.is_whole

    @property
    def order(self) -> tuple[float, str, str]:
        """Sorts placements from the one with most on the GPU to the one with least."""
        return self.cpu_layers, str(self), self.load_mode

    @property
    def rank(self) -> tuple[bool, float, str, str]:
        """The least of a round's placements is the one that the others are compared with."""
        return str(self) != REFERENCE, *self.order

    def moves(self, layer: int) -> bool:
        """Whether the experts of `layer`, from 0, stay on the CPU."""
        return layer < self.cpu_layers

    def flags(self) -> dict[str, str | None]:
        """llama-server's flags for it, without threads, context and load mode; None for a flag without a value."""
        flags: dict[str, str | None] = {}
        if self.is_whole:
            flags["--cpu-moe"] = None
        elif not self.is_baseline:
            flags["--n-cpu-moe"] = f"{self.cpu_layers:.0f}"
        if self.ubatch:
            flags["-ub"] = str(self.ubatch)
        if not self.op_offload:
            flags["--no-op-offload"] = None
        if self.kv:
            flags |= {"-ctk": self.kv, "-ctv": self.kv}
        return flags

    def load_flags(self, known: Container[str]) -> dict[str, str | None]:
        """The load mode's flags for a build that has the flags `known`: older ones say --no-mmap."""
        if "--load-mode" in known:
            return {"--load-mode": self.load_mode}
        flags: dict[str, str | None] = {} if self.load_mode == "mmap" else {"--no-mmap": None}
        return flags | ({"--mlock": None} if self.load_mode == "mlock" else {})

    def fault(self, layers: int, expert_layers: Collection[int], trained: float | None = None) -> str | None:
        """Why it makes no sense for a model of `layers` layers, of which `expert_layers` have experts, that was trained
        for `trained` tokens, with what would; None if it does."""
        if trained is not None and self.context is not None and self.context > trained:
            return f"{self} goes beyond the {trained:.0f} tokens of the model's training; take context={trained:.0f}"
        if self.is_baseline:
            return None
        if not expert_layers:
            return f"{self} moves nothing: the model is dense; take a mixture-of-experts model"
        if self.is_whole:
            return None
        first = min(expert_layers)
        good = "take cpu-moe" if first + 1 >= layers else f"take n-cpu-moe={first + 1} to {layers}, or cpu-moe for all"
        if self.cpu_layers <= first:
            dense = "layer 0 is" if first == 1 else f"layers 0 to {first - 1} are"
            return f"{self} moves nothing: {dense} dense; {good}"
        return f"{self} goes beyond the model's {layers} layers; {good}" if self.cpu_layers > layers else None


def _cpu_layers(text: str, name: str) -> float:
    if name in ("baseline", "cpu-moe"):
        return 0 if name == "baseline" else math.inf
    kind, _, n = name.partition("=")
    if kind == "n-cpu-moe" and n.isascii() and n.isdigit() and 1 <= int(n) <= MAX_LAYERS:
        return int(n)
    raise PlacementError(f"{text!r} is no placement; examples: {EXAMPLES} (N from 1 to {MAX_LAYERS})")


def _value(text: str, key: str, value: str) -> int | str | bool:
    if key == "kv":
        if value not in KV_TYPES:
            raise PlacementError(f"{text!r}: kv is one of {', '.join(KV_TYPES)}")
        return value
    if key == "op-offload":
        if value != "off":
            raise PlacementError(f"{text!r}: op-offload=off turns it off; it is on by default, and then left out")
        return False
    if key == "cache":
        if value != "cold":
            raise PlacementError(f"{text!r}: cache=cold drops the file from the cache; else it is there, and left out")
        return True
    most = MOST[key]
    if not (value.isascii() and value.isdigit() and len(value) <= len(str(most)) and 1 <= int(value) <= most):
        raise PlacementError(f"{text!r}: {key} is a number from 1 to {most}")
    return int(value)
