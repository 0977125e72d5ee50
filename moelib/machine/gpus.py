"""GPUs of this machine: all that are present, so that none is ignored silently, and the NVIDIA GPU that CUDA would use.

moelib measures NVIDIA GPUs, by CUDA and NVML. All others are reported as present and not used.

Which GPU `CUDA_VISIBLE_DEVICES` means is asked of CUDA itself, in a separate process: in this one, it would keep a
context on the GPU.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pynvml

from moelib.base.schema import UserError
from moelib.locks import claim
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

VARIABLE = "CUDA_VISIBLE_DEVICES"


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
    vendor = VENDORS.get(process.system_text(path / "vendor"))
    if vendor is None or not process.system_text(path / "class").startswith(DISPLAYS):
        return None
    own = process.system_text(path / "mem_info_vram_total")  # amdgpu's
    small = vendor == "AMD" and own.isdigit() and int(own) < SMALL_BYTES
    address = path.resolve().name
    return DetectedGpu(vendor, f"PCI {address}", small or (vendor == "Intel" and address == INTEL_INTEGRATED))


def others(devices: Mapping[str, str]) -> dict[str, str]:
    """Those of the engine's devices that are GPUs of another kind: ROCm, Vulkan, SYCL, Metal and the like."""
    return {n: text for n, text in devices.items() if not NO_GPU.match(n) and not SOFTWARE.search(text)}


# libcuda's functions are those of its header; 18 is CU_DEVICE_ATTRIBUTE_INTEGRATED.
_ASK = """
import ctypes, time, uuid
cuda, context, device, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
name, started = (ctypes.c_ubyte * 16)(), cuda.cuInit(0)
counted = cuda.cuDeviceGetCount(ctypes.byref(count))
for i in range(count.value if counted == 0 else 0):
    shared = ctypes.c_int(-1)
    looked_up = cuda.cuDeviceGet(ctypes.byref(device), i) or cuda.cuDeviceGetUuid_v2(name, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(shared), 18, device)
    print("device", started, looked_up, uuid.UUID(bytes=bytes(name)), "shared", shared.value, flush=True)
"""
_HOLD = """
cuda.cuDeviceGet(ctypes.byref(device), 0)
print("context", started, cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), flush=True)
time.sleep(60)
"""
VISIBLE = [sys.executable, "-c", _ASK]
HOLD = [sys.executable, "-c", _ASK + _HOLD]
"""Holds an empty context on the first visible device until it is ended."""


class Shown(NamedTuple):
    """A device that CUDA shows: a card, or an instance of MIG."""

    id: str
    """Without `GPU-` or `MIG-`."""
    shared: bool
    """Whether its memory is the host's RAM, whose total says nothing about the device."""


def visible() -> list[Shown]:
    """The devices that CUDA shows with the present environment, as it counts them."""
    limit = process.patience(ANSWER_S)
    try:
        done = subprocess.run(VISIBLE, env=process.inherited(), capture_output=True, timeout=limit, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    listed = re.findall(r"device 0 0 (\S+) shared (\S+)", done.stdout.decode("utf-8", "replace"))
    return [Shown(uuid, shared == "1") for uuid, shared in listed]


def first_free() -> Shown | None:
    """The first device that CUDA shows and no other process measures; the first one where all are taken, so that who
    wants it can say who has it; None where CUDA shows none."""
    shown = visible()
    if len(shown) < 2:
        return shown[0] if shown else None
    return next((s for s in shown if claim.is_free(f"GPU-{s.id}")), shown[0])


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the NVIDIA driver supports; None without a driver."""
    try:
        pynvml.nvmlInit()
        number = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        pynvml.nvmlShutdown()
    except (pynvml.NVMLError, OSError, AttributeError):
        return None
    return number // 1000, number % 1000 // 10


class NotVisible(UserError):
    """CUDA shows no GPU, or one that cannot be measured; the message says what to write."""


def none_visible(ids: Iterable[str]) -> NotVisible:
    """Why CUDA shows none of the cards with these ids."""
    if not (listed := ", ".join(ids)):
        return NotVisible("the driver lists no GPU")
    value = os.environ.get(VARIABLE)
    if value is None:
        return NotVisible(f"CUDA gives none of {listed}; check the driver with nvidia-smi")
    return NotVisible(f"{VARIABLE}={value!r} shows CUDA no GPU (here are {listed}); unset it, or name one by its id")
