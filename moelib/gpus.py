"""GPUs that the system shows, whatever the engine can do with them: none is passed over in silence.

moelib measures NVIDIA GPUs, by CUDA and NVML. Of all others it says that they are there and are not used.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
DISPLAYS = ("0x0300", "0x0302", "0x0380")  # classes of PCI: VGA, 3D, another display controller
VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
"""Of GPUs that can compute; the display controllers of servers and virtual machines are others'."""
INTEL_INTEGRATED = "0000:00:02.0"  # where Intel puts it
SMALL_BYTES = 2 << 30  # of memory of its own: what AMD's integrated ones set aside
DRIVER_FILES = ("proc/driver/nvidia", "dev/nvidia0", "dev/nvidiactl", "usr/lib/wsl/lib/libcuda.so.1")
SOFTWARE = re.compile("llvmpipe|lavapipe|swiftshader", re.I)  # Vulkan on the CPU
NO_GPU = re.compile(r"CUDA|RPC|BLAS|CPU", re.I)  # devices of the engine that are no other kind's GPU


class Found(NamedTuple):
    vendor: str
    how: str
    """By what it is known."""
    integrated: bool = False
    """A part of the CPU's package, which shares its memory and is no device to offload from."""

    def __str__(self) -> str:
        return f"{self.vendor} GPU ({self.how})"


def present() -> list[Found]:
    """By PCI, by the driver's files, and Apple's."""
    pci = [f for path in sorted((ROOT / "sys/bus/pci/devices").glob("*")) if (f := _pci(path))]
    drm = sorted((ROOT / "sys/class/drm").glob("card*/device"))  # of GPUs that are on no PCI bus that is shown
    pci += [f for path in drm if not pci and (f := _pci(path))]
    files = [f"/{name}" for name in DRIVER_FILES if (ROOT / name).exists()]
    if files and not any(f.vendor == "NVIDIA" for f in pci):
        pci.append(Found("NVIDIA", files[0]))
    if sys.platform == "darwin":
        pci.append(Found("Apple", "Metal", integrated=True))
    return pci


def _pci(path: Path) -> Found | None:
    vendor = VENDORS.get(_text(path / "vendor"))
    if vendor is None or not _text(path / "class").startswith(DISPLAYS):
        return None
    own = _text(path / "mem_info_vram_total")  # amdgpu's
    small = vendor == "AMD" and own.isdigit() and int(own) < SMALL_BYTES
    address = path.resolve().name
    return Found(vendor, f"PCI {address}", small or (vendor == "Intel" and address == INTEL_INTEGRATED))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def others(devices: Mapping[str, str]) -> dict[str, str]:
    """Of the engine's devices those that are another kind's GPU: ROCm, Vulkan, SYCL, Metal and the like."""
    return {n: text for n, text in devices.items() if not NO_GPU.match(n) and not SOFTWARE.search(text)}
