"""What a GGUF says of itself: its kind, tensors, types and exact bytes, and what a placement moves of them."""

import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from gguf import LlamaFileType

from moelib.catalogue.placement import Placement
from moelib.gguf.gguf_reader import GGUFError

EXPERT_TENSOR = re.compile(r"^blk\.(\d{1,9})\.ffn_(up|down|gate|gate_up)_(ch|)exps\.(weight|bias|scale)$")
"""What `--cpu-moe` overrides: llama.cpp's `\\.ffn_(up|down|gate|gate_up)_(ch|)exps`."""

LONE_EXPERT = re.compile(r"^blk\.\d+\.ffn_(up|down|gate)\.\d+\.(weight|bias)$")
"""One expert in its own tensor, as in files from before April 2024."""

SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
"""End of the name of one file of a split model; llama.cpp is given the first and finds the others."""

UNQUANTISED = {"F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"}
TWIN_NAME = "geometry twin"
"""general.name of a file with random weights that moelib wrote, and of its quants."""

ON_CPU = {"token_embd.weight", "per_layer_token_embd.weight", "position_embd.weight", "token_types.weight"}
"""Look-up tables of the input layer, which llama.cpp keeps on the CPU."""

DRAFTS = {"eagle3", "dflash"}
"""Architectures of draft heads, which predict tokens for another model and cannot run alone."""

NAMES_OF = {
    "adapter": re.compile(r"\.lora_[ab]$"),
    "control vector": re.compile(r"^direction\."),
    "imatrix": re.compile(r"\.(in_sum2|counts)$"),
}
"""Kind of a file that is not a model -> the names that all its tensors have."""


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    """Elements along each dimension, fastest first (ggml's `ne`)."""
    type: str
    nbytes: int
    offset: int
    """From the start of the file."""

    @property
    def block(self) -> int | None:
        """Index of the transformer layer that the tensor belongs to; None if it belongs to none."""
        m = re.match(r"blk\.(\d{1,9})\.", self.name)
        return int(m.group(1)) if m else None

    @property
    def is_expert(self) -> bool:
        return EXPERT_TENSOR.match(self.name) is not None


@dataclass(frozen=True)
class Header:
    """What a GGUF says of itself."""

    path: Path
    file_bytes: int
    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]
    unused: frozenset[str] | None = None
    """Names of the tensors that the engine reported as unused; None without a report, then those of NextN layers."""

    def as_loaded(self, unused: Iterable[str] | None) -> "Header":
        """This header with the tensors that the engine reported as unused; unchanged if it reported nothing (None)."""
        return self if unused is None else replace(self, unused=frozenset(unused))

    @property
    def kind(self) -> str:
        """model, adapter, control vector, imatrix, projector, draft, vocabulary or unknown."""
        arch, general = self.metadata.get("general.architecture"), self.metadata.get("general.type")
        keys, names = self.metadata.keys(), [t.name for t in self.tensors]
        only_named = {kind for kind, name in NAMES_OF.items() if names and all(map(name.search, names))}
        if general == "adapter" or any(k.startswith("adapter.") for k in keys) or "adapter" in only_named:
            return "adapter"
        if arch == "controlvector" or "control vector" in only_named:
            return "control vector"
        if general == "imatrix" or "imatrix.datasets" in keys or "imatrix" in only_named:
            return "imatrix"
        if general == "mmproj" or arch == "clip" or any(k.startswith("clip.") for k in keys):
            return "projector"
        if not self.tensors:
            return "vocabulary"
        if not isinstance(arch, str) or not arch:
            return "unknown"
        blocks = {t.block for t in self.tensors if t.block is not None}
        head = self.layers is not None and blocks and min(blocks) >= self.layers  # a NextN layer, published separately
        return "draft" if arch in DRAFTS or head else "model"

    @property
    def label(self) -> str:
        """The quant that the file says it is; the type that most of its bytes have, if it does not say."""
        with suppress(ValueError):
            if (kind := LlamaFileType(self.metadata.get("general.file_type", -1))) != LlamaFileType.GUESSED:
                return kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        sizes: Counter[str] = Counter()
        for t in self.tensors:
            sizes[t.type] += t.nbytes
        return sizes.most_common(1)[0][0]

    @property
    def model_name(self) -> str:
        """The model's name by that of its file, without quant and number of the part."""
        stem = SPLIT.sub("", self.path.name).removesuffix(".gguf")
        stem = re.sub(rf"[-._]{re.escape(self.label)}$", "", stem, flags=re.IGNORECASE)
        return re.sub(r"[^\w.-]+", "-", stem, flags=re.ASCII).strip("-.") or "model"

    @property
    def is_quantised(self) -> bool:
        return any(t.type not in UNQUANTISED for t in self.tensors)

    def __repr__(self) -> str:
        experts = sum(t.nbytes for t in self.tensors if t.is_expert)
        return (
            f"<Header {self.path.name}: {self.metadata.get('general.architecture')}, {self.layers} layers, "
            f"{len(self.tensors)} tensors, {self.file_bytes / 2**20:,.0f} MiB, experts {experts / 2**20:,.0f} MiB>"
        )

    @property
    def is_twin(self) -> bool:
        """Whether the file is a geometry twin or was made from one: its weights are random."""
        return self.metadata.get("general.name") == TWIN_NAME

    @property
    def type_counts(self) -> dict[str, int]:
        """Number of tensors by type; a quant's label does not tell these."""
        return dict(sorted(Counter(t.type for t in self.tensors).items()))

    @property
    def expert_types(self) -> dict[str, int]:
        return dict(sorted(Counter(t.type for t in self.moved("cpu-moe")).items()))

    @property
    def parameters(self) -> int:
        return sum(prod(t.shape) for t in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.tensor_bytes / self.parameters

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def number(self, key: str, block: int | None = None) -> int | None:
        """A count in the architecture's metadata, of layer `block` if the file lists one per layer; None if missing."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, list):
            value = value[block] if block is not None and block < len(value) else None
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @cached_property
    def _by_layer(self) -> dict[int | None, dict[str, Tensor]]:
        layers: dict[int | None, dict[str, Tensor]] = {}
        for t in self.loaded:
            layers.setdefault(t.block, {})[t.name if t.block is None else t.name.split(".", 2)[2]] = t
        return layers

    def of_layer(self, layer: int | None) -> dict[str, Tensor]:
        """The loaded tensors of a layer by their names in it, such as `attn_q.weight`; None: those of no layer."""
        return self._by_layer.get(layer, {})

    @property
    def layers(self) -> int | None:
        """Layers of the model itself, without those that only predict further tokens (NextN, MTP)."""
        count = self.number("block_count")
        return None if count is None else count - (self.number("nextn_predict_layers") or 0)

    @cached_property
    def loaded(self) -> tuple[Tensor, ...]:
        """Tensors that the engine loads."""
        if self.unused is not None:
            return tuple(t for t in self.tensors if t.name not in self.unused)
        if not self.number("nextn_predict_layers") or self.layers is None:
            return self.tensors
        return tuple(t for t in self.tensors if t.block is None or t.block < self.layers)

    def moved(self, placement: Placement | str) -> tuple[Tensor, ...]:
        """Expert tensors that `placement` keeps on the CPU: none for baseline, those of the first N blocks for
        `n-cpu-moe=N`. Dense first blocks count among the N and move nothing."""
        placed = Placement.of(placement)
        return tuple(t for t in self.loaded if t.is_expert and placed.moves(t.block or 0))

    @cached_property
    def expert_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts, in order."""
        return tuple(sorted({t.block or 0 for t in self.moved("cpu-moe")}))

    def moved_bytes(self, placement: Placement | str) -> int:
        return sum(t.nbytes for t in self.moved(placement))

    def device_bytes(self, placement: Placement | str) -> int:
        """Bytes of the weights that llama.cpp puts on the device with all layers offloaded: everything that it loads
        but its input layer (always on the CPU; the token embedding is copied to the device where it is also the
        output) and what was moved."""
        sizes = {t.name: t.nbytes for t in self.loaded}
        host = ON_CPU | ({"token_embd_norm.weight"} if "output_norm.weight" in sizes else set())
        tied = sizes.get("token_embd.weight", 0) if "output.weight" not in sizes else 0
        return sum(n for name, n in sizes.items() if name not in host) + tied - self.moved_bytes(placement)

    def read_bytes(self, placement: Placement | str) -> tuple[int, int]:
        """(device, host) bytes of the weights that decoding one token must read: all of a dense tensor, the used
        share of an expert tensor; the one row of the token embedding is neglected.

        Raises GGUFError if the file does not say how many experts are used.
        """
        moved = set(self.moved(placement))
        device: Counter[tuple[int, int]] = Counter()
        host: Counter[tuple[int, int]] = Counter()
        for t in self.moved("cpu-moe"):
            (host if t in moved else device)[self._share(t)] += t.nbytes
        on_device, on_host = (sum(n * used // of for (used, of), n in share.items()) for share in (device, host))
        return self.device_bytes("cpu-moe") + on_device, on_host

    def _share(self, t: Tensor) -> tuple[int, int]:
        """(used, all) experts of a tensor, whose slowest dimension is their number.

        Raises GGUFError if the metadata disagrees.
        """
        used, count, of = self.number("expert_used_count", t.block), self.number("expert_count", t.block), t.shape[-1]
        if "_chexps" in t.name:  # chunks that several experts share
            used, count = used and min(used, of), of
        holds = f"{t.name} has {of} experts; take another conversion of the model"
        if used is None or not 1 <= used <= of:
            raise GGUFError(f"{self.path.name}: corrupt: expert_used_count is {used}, {holds}")
        if count != of:
            raise GGUFError(f"{self.path.name}: corrupt: expert_count is {count}, {holds}")
        return used, of

    def fault(self, placements: Iterable[Placement | str] = ()) -> str | None:
        """Why the file cannot be run at `placements`, as one sentence with the next step; None if it can.

        Only the header is needed, so it is known before hours of quantising.
        """
        if lone := next((t.name for t in self.tensors if LONE_EXPERT.match(t.name)), None):
            return f"each expert has its own tensor ({lone}), which llama.cpp no longer loads; convert the model again"
        try:
            for t in self.moved("cpu-moe"):
                self._share(t)
        except GGUFError as err:
            return str(err).removeprefix(f"{self.path.name}: ")
        if self.layers is None:
            return "corrupt: it has no block_count; take another conversion of the model"
        faults = (
            Placement.of(p).fault(self.layers, self.expert_layers, self.number("context_length")) for p in placements
        )
        return next(filter(None, faults), None)
