"""What llama.cpp reports of loading a model: its buffers, by its own names for them, layers and graph splits."""

import re
from functools import lru_cache

from moelib.base.files import stored
from moelib.base.schema import Bytes, Index

HOST = re.compile(
    r"CPU|CPU_(Mapped|REPACK|AARCH64|HBM|KLEIDIAI|RISCV64_SPACEMIT)|AMX|BLAS|(CUDA|ROCm|MUSA|Vulkan|SYCL|CANN)_Host"
)
"""llama.cpp's names of buffer types in host memory; `_Host` is pinned memory, which a device can read."""

DEVICE = re.compile(
    r"((CUDA|ROCm|MUSA|SYCL)(\d+|\d*_Split)|(Vulkan|CANN|Kompute|OPENVINO)\d+|HTP\d+(-REPACK)?"
    r"|(Metal|MTL\d+)(_Mapped|_Private)?|OpenCL|WebGPU|zDNN|RPC\d+|RPC(?=\[))(\[\S+\])?"
)
"""Its names of buffer types in device memory, with the address of a remote device. A name that matches neither pattern
is unknown, and its bytes are not counted."""


@lru_cache(1024)
def _side(name: str) -> str:
    return "device" if DEVICE.fullmatch(name) else "host" if HOST.fullmatch(name) else "unknown"


@stored
class Buffer:
    """One buffer from the engine's report."""

    name: str
    """Buffer type: `CUDA0`, `RPC0[...]` on a device; `CPU`, `CPU_Mapped`, `CPU_REPACK`, `CUDA_Host` on the host."""
    kind: str
    """model, KV, compute, output, RS, LoRA, or another word of the engine."""
    size_bytes: Bytes
    """From MiB with two decimals: exact to 5 KiB."""

    @property
    def place(self) -> str:
        """device, host, or unknown for a name of neither."""
        return _side(self.name)

    @property
    def on_device(self) -> bool:
        """Whether the name is that of a device's buffer."""
        return self.place == "device"


@stored
class Report:
    """What llama-server reports about loading the model: buffers, layers, graph splits."""

    buffers: tuple[Buffer, ...]
    offloaded_layers: Index | None
    total_layers: Index | None
    graph_splits: tuple[Index, ...]
    """Splits of the large batch's graph, then of the single token's if the build prints both."""
    built: str | None = None
    """The build's description: number, compiler, target, and `(debug)` for a debug build."""
    unused_tensors: tuple[str, ...] | None = None
    """Tensors that the engine reported as unused, such as those of a NextN layer; None if it reported no load, and in
    records made before this field existed."""
    overridden: tuple[str, ...] | None = None
    """Tensors that were put elsewhere than their layer, as offload does it with experts; None where nobody reads that,
    as the buffers show it."""

    def device_bytes(self, kind: str | None = None) -> int | None:
        """Bytes in device buffers of `kind` (default: all kinds); None if the engine reported no buffers, or one of
        that kind with an unknown name."""
        matching = [b for b in self.buffers if kind in (None, b.kind)]
        if not self.buffers or any(b.place == "unknown" for b in matching):
            return None
        return sum(b.size_bytes for b in matching if b.on_device)

    @property
    def device_by_kind(self) -> dict[str, int | None]:
        """Kind of buffer -> `device_bytes` of it; empty if the engine reported no buffers."""
        return {b.kind: self.device_bytes(b.kind) for b in self.buffers}

    @property
    def pinned_bytes(self) -> int:
        """Bytes in pinned host buffers, which the device reads directly."""
        return sum(b.size_bytes for b in self.buffers if b.place == "host" and b.name.endswith("_Host"))
