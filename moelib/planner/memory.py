"""VRAM and RAM of a placement, by term, from the header alone."""

from __future__ import annotations

from dataclasses import dataclass

from moelib.catalogue.placement import KV, UBATCH, Placement
from moelib.gguf.gguf_header import Header
from moelib.gguf.gguf_reader import GGUFError
from moelib.planner import cache
from moelib.planner.allocate import DEVICE, HOST, peaks
from moelib.planner.graph import Graph

MIB = 1 << 20
CONTEXT_BYTES = 715 * MIB
"""What a process holds on the GPU beside the engine's buffers: the CUDA context, kernels, cuBLAS. Between 699 and
716 MiB in the committed runs (H100 and H200, CUDA 13); other cards and drivers differ."""
LOOPBACK_BYTES = 20 * MIB
"""What the loopback device's process holds beside the buffers: 7 to 19 MiB seen."""
PROCESS_BYTES = 512 * MIB
"""What the server holds in RAM beside weights and buffers: 247 to 512 MiB in the committed runs with a GPU."""


@dataclass(frozen=True)
class Need:
    """What one placement needs, in bytes."""

    placement: Placement
    weights_bytes: int
    """Weights on the device."""
    cache_bytes: int
    """Keys and values of the whole context, and states of recurrent layers."""
    compute_bytes: int
    """The device's compute buffer, with the expert tensor that is copied into it where a prompt's experts are on the
    CPU (op-offload)."""
    context_bytes: int
    """Of the GPU: see `CONTEXT_BYTES`."""
    host_weights_bytes: int
    """Weights in RAM: moved experts and the input layer's tables."""
    host_buffers_bytes: int
    process_bytes: int = PROCESS_BYTES

    @property
    def buffers_bytes(self) -> int:
        """The engine's own buffers on the device."""
        return self.weights_bytes + self.cache_bytes + self.compute_bytes

    @property
    def vram_bytes(self) -> int:
        return self.buffers_bytes + self.context_bytes

    @property
    def ram_bytes(self) -> int:
        return self.host_weights_bytes + self.host_buffers_bytes + self.process_bytes


def need(
    header: Header, placement: Placement | str, context: int, context_bytes: int = CONTEXT_BYTES, cuda: bool = True
) -> Need:
    """What `placement` of the file needs for one sequence of `context` tokens, or of as many as it says itself.

    cuda: on a GPU with CUDA; else on a device without its peculiarities, such as the loopback one. Raises UnknownCache
    where the header does not tell how large the cache is, GGUFError where it lacks a tensor that the model must have.
    """
    placed, outer = Placement.of(placement), header.of_layer(None)
    context = placed.context or context
    try:
        graph = Graph(header, placed, context, cuda)
        tied = 0 if "output.weight" in outer else outer["token_embd.weight"].nbytes
    except KeyError as err:
        raise GGUFError(
            f"{header.path.name} has no tensor {err.args[0]} where this {header.architecture} model needs one, so what "
            "it takes cannot be told from its header; where the engine loads it, `moelib.run` measures it"
        ) from None
    compute = peaks(graph.nodes, graph.inputs)
    on_device = header.device_bytes(placed)
    loaded = sum(t.nbytes for t in header.loaded)
    return Need(
        placed,
        on_device,
        cache.nbytes(header, context, placed.kv or KV, placed.ubatch or UBATCH),
        compute[DEVICE],
        context_bytes,
        loaded + tied - on_device,
        compute[HOST],
    )
