"""GPUs of this machine, whether the engine can use them or not, so that none is ignored silently.

moelib measures NVIDIA GPUs, by CUDA and NVML. All others are reported as present and not used.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
DISPLAYS = ("0x0300", "0x0302", "0x0380")  # classes of PCI: VGA, 3D, another display controller
VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
"""Vendors of GPUs that can compute; display controllers of servers and virtual machines have other vendors."""
INTEL_INTEGRATED = "0000:00:02.0"  # where Intel puts it
SMALL_BYTES = 2 << 30  # memory of its own: AMD's integrated GPUs reserve less
DRIVER_FILES = ("proc/driver/nvidia", "dev/nvidia0", "dev/nvidiactl", "usr/lib/wsl/lib/libcuda.so.1")
SOFTWARE = re.compile("llvmpipe|lavapipe|swiftshader", re.I)  # Vulkan on the CPU
NO_GPU = re.compile(r"CUDA|RPC|BLAS|CPU", re.I)  # devices of the engine that are no other kind's GPU


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
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def others(devices: Mapping[str, str]) -> dict[str, str]:
    """Those of the engine's devices that are GPUs of another kind: ROCm, Vulkan, SYCL, Metal and the like."""
    return {n: text for n, text in devices.items() if not NO_GPU.match(n) and not SOFTWARE.search(text)}
