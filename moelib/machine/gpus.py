"""GPUs of this machine: all that are present, so that none is ignored silently, and the NVIDIA GPU that CUDA would use.

moelib measures NVIDIA GPUs, by CUDA and NVML. All others are reported as present and not used.

CUDA itself is asked in a separate process: in this one, it would keep a context on the GPU. `CUDA_VISIBLE_DEVICES` is
read as CUDA reads it, by rules that were checked with a driver (580.159, two H100s): an entry that names no GPU ends
the list, and those before it count; all entries must have the form of the first (index or id), one of the other form
ends the list; if a GPU is named twice, none is visible; the first digits of an id are enough, in upper or lower case,
but `GPU-` must be in capitals.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pynvml

from moelib.base.schema import UserError
from moelib.machine import process

ROOT = Path("/")
DISPLAYS = ("0x0300", "0x0302", "0x0380")  # classes of PCI: VGA, 3D, another display controller
VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
"""Vendors of GPUs that can compute; display controllers of servers and virtual machines have other vendors."""
INTEL_INTEGRATED = "0000:00:02.0"  # where Intel puts it
SMALL_BYTES = 2 << 30  # memory of its own: AMD's integrated GPUs reserve less
DRIVER_FILES = ("proc/driver/nvidia", "dev/nvidia0", "dev/nvidiactl", "usr/lib/wsl/lib/libcuda.so.1")
SOFTWARE = re.compile("llvmpipe|lavapipe|swiftshader", re.I)  # Vulkan on the CPU
NO_GPU = re.compile(r"CUDA|RPC|BLAS|CPU", re.I)  # devices of the engine that are no other kind's GPU

ANSWER_S = 30.0  # a driver may have to be loaded first
SHARED = "shared 1"
"""Printed by the process for a device whose memory is the host's RAM."""

VARIABLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
BY_ADDRESS = "PCI_BUS_ID"
_INDEX = re.compile(r"\s*\+?(\d+)\s*")
_GPU = re.compile(r"GPU-[0-9a-fA-F-]*\s*")
_OF_CONTAINERS = ("all", "void", "none")
UUID_LENGTH = len("GPU-263da6ff-9608-67cf-9bce-a8c85c7c1cd0")


class DetectedGpu(NamedTuple):
    vendor: str
    how: str
    """How it was detected: its PCI address or a file of its driver."""
    integrated: bool = False
    """Part of the CPU's package: it shares the CPU's memory, so there is nothing to offload from."""

    def __str__(self) -> str:
        return f"{self.vendor} GPU ({self.how})"


def present() -> list[DetectedGpu]:
    """GPUs by their PCI devices, by the driver's files, and Apple's by the platform."""
    pci = [f for path in sorted((ROOT / "sys/bus/pci/devices").glob("*")) if (f := _pci(path))]
    drm = sorted((ROOT / "sys/class/drm").glob("card*/device"))  # of GPUs that are on no PCI bus that is shown
    pci += [f for path in drm if not pci and (f := _pci(path))]
    files = [f"/{name}" for name in DRIVER_FILES if (ROOT / name).exists()]
    if files and not any(f.vendor == "NVIDIA" for f in pci):
        pci.append(DetectedGpu("NVIDIA", files[0]))
    if sys.platform == "darwin":
        pci.append(DetectedGpu("Apple", "Metal", integrated=True))
    return pci


def _pci(path: Path) -> DetectedGpu | None:
    vendor = VENDORS.get(_text(path / "vendor"))
    if vendor is None or not _text(path / "class").startswith(DISPLAYS):
        return None
    own = _text(path / "mem_info_vram_total")  # amdgpu's
    small = vendor == "AMD" and own.isdigit() and int(own) < SMALL_BYTES
    address = path.resolve().name
    return DetectedGpu(vendor, f"PCI {address}", small or (vendor == "Intel" and address == INTEL_INTEGRATED))


def _text(path: Path) -> str:
    """The text of a system file; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def others(devices: Mapping[str, str]) -> dict[str, str]:
    """Those of the engine's devices that are GPUs of another kind: ROCm, Vulkan, SYCL, Metal and the like."""
    return {n: text for n, text in devices.items() if not NO_GPU.match(n) and not SOFTWARE.search(text)}


# libcuda's functions are those of its header; 18 is CU_DEVICE_ATTRIBUTE_INTEGRATED.
_ASK = """
import ctypes, time, uuid
cuda, context, device = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_int()
name, shared, started = (ctypes.c_ubyte * 16)(), ctypes.c_int(-1), cuda.cuInit(0)
looked_up = cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceGetUuid(name, device)
cuda.cuDeviceGetAttribute(ctypes.byref(shared), 18, device)
print("device", started, looked_up, f"GPU-{uuid.UUID(bytes=bytes(name))}", "shared", shared.value, flush=True)
"""
_HOLD = """
print("context", started, cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), flush=True)
time.sleep(60)
"""
FIRST = [sys.executable, "-c", _ASK]
HOLD = [sys.executable, "-c", _ASK + _HOLD]
"""Holds an empty context on the first visible device until it is ended."""


def first_id() -> str | None:
    """The id of the device that CUDA counts first with the present environment; None where CUDA gives none."""
    limit = process.patience(ANSWER_S)
    try:
        done = subprocess.run(FIRST, env=process.inherited(), capture_output=True, timeout=limit, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    m = re.search(r"device 0 0 (GPU-\S+)", done.stdout.decode("utf-8", "replace"))
    return m[1] if m else None


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the NVIDIA driver supports; None without a driver."""
    try:
        pynvml.nvmlInit()
        number = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        pynvml.nvmlShutdown()
    except (pynvml.NVMLError, OSError, AttributeError):
        return None
    return number // 1000, number % 1000 // 10


class Card(NamedTuple):
    """A GPU as the driver lists it, in the order of its PCI address."""

    uuid: str | None
    """None for a GPU that does not answer."""
    name: str | None


class NotVisible(UserError):
    """The variable names no GPU, or it is not clear which; the message says what to write."""


def first_visible(
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
        return f"{VARIABLE}={value!r} hides every GPU (here are {listed}); unset it, or name one"
    if entry.strip() in _OF_CONTAINERS:
        return f"{entry.strip()!r} is for NVIDIA_VISIBLE_DEVICES: in {VARIABLE} it hides every GPU; here are {listed}"
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
