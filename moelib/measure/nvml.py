"""NVIDIA GPUs by NVML: memory of processes and devices, clocks, energy, traffic. Unknown is None, never 0.

Every counter that can be missing (old driver, container, card without it) is read once at the start; `Gpu.absent` says
why it is missing.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pynvml

from moelib.base.files import stored
from moelib.base.schema import Bits, Bytes, Joules, Megahertz, Seconds, Watts
from moelib.machine import gpus
from moelib.measure.memory import Reading

SLOWED = {
    "hw-slowdown": pynvml.nvmlClocksEventReasonHwSlowdown,
    "hw-thermal": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "hw-power-brake": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
    "sw-thermal": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
}
"""Clock-event reasons that mean a throttled card. A power cap is not one of them: cards are built to reach it."""

TURN_BYTES = 1 << 32
# Transfers per second times the line code's efficiency: 8 of 10 bits, then 128 of 130, then 242 of a FLIT's 256 bytes
# (PCI Express base specifications 1.0 to 7.0).
LANE_BYTES_PER_S = {
    **{g: rate * 1e9 / 8 * 8 / 10 for g, rate in ((1, 2.5), (2, 5))},
    **{g: rate * 1e9 / 8 * 128 / 130 for g, rate in ((3, 8), (4, 16), (5, 32))},
    **{g: rate * 1e9 / 8 * 242 / 256 for g, rate in ((6, 64), (7, 128))},
}
# total = reserved + free + used, exactly on all cards seen: anything else is a struct of another version
ADDS_UP_BYTES = 64 << 20


@stored
class Counters:
    """One reading of a GPU's clocks and running totals, `t_s` seconds after the run's start."""

    t_s: Seconds
    energy_joule: Joules | None = None
    """Energy of the GPU's board since the driver was loaded; it does not include the CPU's."""
    pcie_rx_bytes: Bytes | None = None
    """Received by the GPU, modulo 2^32: the driver's counter has 32 bits (seen on an H200)."""
    pcie_tx_bytes: Bytes | None = None
    sm_clock_mhz: Megahertz | None = None
    memory_clock_mhz: Megahertz | None = None
    power_watt: Watts | None = None
    events: Bits | None = None
    """Bits of the clock-event (throttle) reasons."""


NO_GPU = dict.fromkeys((f for f in Counters.__dataclass_fields__ if f != "t_s"), "no NVIDIA GPU took part")


class Gpu:
    """The first GPU that CUDA shows and nobody else measures; processes are looked up on all GPUs."""

    errors = (pynvml.NVMLError, gpus.NotVisible)
    no_driver = (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded)

    def __init__(self, first: Callable[[], gpus.Shown | None] = gpus.first_free) -> None:
        """first: asks for the device. Raises pynvml.NVMLError or gpus.NotVisible."""
        pynvml.nvmlInit()
        handles = {}
        for i in range(pynvml.nvmlDeviceGetCount()):
            with contextlib.suppress(pynvml.NVMLError):  # a lost card is none that CUDA shows
                handle = pynvml.nvmlDeviceGetHandleByIndex(i)
                handles[_text(pynvml.nvmlDeviceGetUUID(handle))] = handle
        if (shown := first()) is None:
            raise gpus.none_visible(handles)
        if (whole := f"GPU-{shown.id}") in handles:
            self.uuid, self.handle = whole, handles[whole]
            self._refuse_divided()
        else:
            self.uuid = f"MIG-{shown.id}"
            self.handle, whole = _instance(self.uuid)
        self._elsewhere = [handle for uuid, handle in handles.items() if uuid != whole]
        self.cards = len(handles)
        self.name = _text(pynvml.nvmlDeviceGetName(self.handle))
        self.shared = shown.shared
        self.questions, self.absent = self._questions(), {}
        for name, ask_it in self.questions.items():
            try:
                ask_it()
            except pynvml.NVMLError as err:
                self.absent[name] = str(err)

    def _refuse_divided(self) -> None:
        """Raise NotVisible for a card divided by MIG: CUDA would show one instance, and NVML would read the card."""
        now, _ = _ask(lambda: pynvml.nvmlDeviceGetMigMode(self.handle)) or (0, 0)
        if now:
            raise gpus.NotVisible(
                f"{self.uuid} is divided into MIG instances: name one of those that nvidia-smi -L lists, "
                f"{gpus.VARIABLE}=MIG-..."
            )

    def facts(self) -> dict[str, Any]:
        """Size, driver, highest clock and power limit; None for what the driver does not report."""

        def bandwidth() -> float:
            """Memory clock x 2 transfers x bus width, as the driver reports them."""
            clock = pynvml.nvmlDeviceGetMaxClockInfo(self.handle, pynvml.NVML_CLOCK_MEM)
            return clock * 1e6 * 2 * pynvml.nvmlDeviceGetMemoryBusWidth(self.handle) / 8

        return {
            "bandwidth_bytes_per_s": _ask(bandwidth),
            "pcie_bytes_per_s": self._pcie(),
            "pcie_link": self._link("Max"),
            "pcie_link_now": self._link("Curr"),
            "total_bytes": _ask(lambda: int(self._memory().total)),
            "driver": _ask(lambda: _text(pynvml.nvmlSystemGetDriverVersion())),
            "max_sm_clock_mhz": _ask(lambda: pynvml.nvmlDeviceGetMaxClockInfo(self.handle, pynvml.NVML_CLOCK_SM)),
            "power_limit_watt": _ask(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(self.handle) / 1000),
        }

    @property
    def usable_bytes(self) -> int | None:
        """The memory that programs may have together: the driver keeps some for itself. None if it does not say."""
        memory = _ask(self._memory)
        return None if memory is None else int(memory.total - memory.reserved)

    def _link(self, which: str) -> tuple[int, int] | None:
        """(generation, lanes) of the link: `Max`, what card and board support; `Curr`, now (idle links slow down)."""
        generation, width = (
            _ask(partial(getattr(pynvml, f"nvmlDeviceGet{which}PcieLink{part}"), self.handle))
            for part in ("Generation", "Width")
        )
        return (int(generation), int(width)) if generation and width else None

    def _pcie(self) -> float | None:
        """The link's maximum rate one way in bytes per second; None for an unknown link."""
        generation, width = self._link("Max") or (0, 0)
        lane = LANE_BYTES_PER_S.get(generation)
        return lane * width if lane else None

    def _memory(self) -> Any:
        # the first version's `used` includes what the driver reserves
        memory = pynvml.nvmlDeviceGetMemoryInfo(self.handle, version=pynvml.nvmlMemory_v2)
        if memory.total == 0:  # reported as a success, but no data
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_DATA)
        if abs(memory.total - memory.reserved - memory.free - memory.used) > ADDS_UP_BYTES:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH)
        return memory

    def read(self, ours: set[int], t_s: float) -> Reading:
        """The device's memory, and that of the processes `ours` on all GPUs."""
        errors: set[str] = set()

        def ask(question: Callable[[], Any], failed: str) -> Any:
            try:
                return question()
            except pynvml.NVMLError_GpuIsLost:
                errors.add("gpu-lost")
            except pynvml.NVMLError:
                errors.add(failed)
            return None

        listed, drawing = ask(lambda: _processes(self.handle), "list-unsupported") or ({}, set())
        mine = {pid: n for pid, n in listed.items() if pid in ours}
        for handle in self._elsewhere:
            # failures and other processes of another card do not concern this run
            with contextlib.suppress(pynvml.NVMLError):
                elsewhere, _ = _processes(handle)
                for pid in ours & elsewhere.keys():
                    before, more = mine.get(pid, 0), elsewhere[pid]
                    mine[pid] = None if before is None or more is None else before + more
        sizes = [n for n in mine.values() if n is not None]
        memory = None if self.shared else ask(self._memory, "memory-unsupported")
        if self.shared:
            errors.add("memory-shared")
        return Reading(
            t_s=t_s,
            process_bytes=sum(sizes) if mine and len(sizes) == len(mine) else None,
            device_bytes=int(memory.used) if memory else None,
            listed=bool(mine),
            others=tuple(sorted((pid, n) for pid, n in listed.items() if pid not in ours)),
            drawing=tuple(sorted(drawing - ours)),
            errors=tuple(sorted(errors)),
        )

    def _questions(self) -> dict[str, Callable[[], Any]]:
        def field(name: str) -> int:
            value = pynvml.nvmlDeviceGetFieldValues(self.handle, [getattr(pynvml, f"NVML_FI_DEV_{name}")])[0]
            if value.nvmlReturn != pynvml.NVML_SUCCESS:
                raise pynvml.NVMLError(value.nvmlReturn)
            return int(value.value.ullVal)

        def clock(kind: str) -> int:
            return pynvml.nvmlDeviceGetClockInfo(self.handle, getattr(pynvml, f"NVML_CLOCK_{kind}"))

        return {
            "energy_joule": lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1000,
            "pcie_rx_bytes": lambda: field("PCIE_COUNT_RX_BYTES"),
            "pcie_tx_bytes": lambda: field("PCIE_COUNT_TX_BYTES"),
            "sm_clock_mhz": lambda: clock("SM"),
            "memory_clock_mhz": lambda: clock("MEM"),
            "power_watt": lambda: pynvml.nvmlDeviceGetPowerUsage(self.handle) / 1000,
            "events": lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(self.handle),
        }

    def _now(self, name: str) -> Any:
        return None if name in self.absent else _ask(self.questions[name])

    def counters(self, t_s: float) -> Counters:
        """All counters of this GPU, read now; None for those that cannot be read."""
        return Counters(t_s, **{name: self._now(name) for name in self.questions})

    def energy(self) -> float | None:
        return self._now("energy_joule")

    def traffic(self) -> "Traffic":
        return Traffic(self._pcie(), lambda: [self._now(f"pcie_{way}_bytes") for way in ("rx", "tx")])


class Traffic:
    """Bytes over PCIe since the first reading. The driver's counters wrap at 4 GiB, so no two readings may be so far
    apart that a wrap could be missed."""

    def __init__(self, bytes_per_s: float | None, read: Callable[[], list[int | None]]):
        self.gap_s = TURN_BYTES / bytes_per_s if bytes_per_s else 0.0  # with an unknown link, any gap is too long
        self._read = read
        self._last: tuple[float, list[int]] | None = None
        self.totals: list[int] | None = None
        """Received and sent; None before the second reading, and once a wrap may have been missed."""
        self.lost: str | None = None
        """Why there is no total."""

    def look(self, t_s: float) -> None:
        readings = self._read()
        now = [n for n in readings if n is not None]
        if len(now) < len(readings):
            self.lost = self.lost or "the driver did not answer"
        elif self._last and (gap := t_s - self._last[0]) >= self.gap_s:
            self.lost = self.lost or (
                f"two looks were {gap * 1000:.0f} ms apart, and the counter can turn over in {self.gap_s * 1000:.0f} ms"
            )
        if self.lost:
            self.totals = None
            return
        if self._last:
            moved = [(b - a) % TURN_BYTES for a, b in zip(self._last[1], now, strict=True)]
            self.totals = [a + b for a, b in zip(self.totals or (0, 0), moved, strict=True)]
        self._last = (t_s, now)

    def absent(self) -> dict[str, str]:
        """The counters that have no total -> why."""
        why = self.lost or "it was looked at only once"
        return {} if self.totals else dict.fromkeys(("received_bytes", "sent_bytes"), why)


def _ask(question: Callable[[], Any]) -> Any:
    """The driver's answer, None if it has none."""
    try:
        return question()
    except pynvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _instance(uuid: str) -> tuple[Any, str]:
    """The handle of a MIG instance, and the id of the card that it is a part of. Raises gpus.NotVisible."""
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        whole = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        return handle, _text(pynvml.nvmlDeviceGetUUID(whole))
    except pynvml.NVMLError as err:
        raise gpus.NotVisible(f"{uuid} is no MIG instance here ({err}); nvidia-smi -L lists them") from None


def _processes(handle: Any) -> tuple[dict[int, int | None], set[int]]:
    """Process id -> bytes, and the ids that are in the graphics list alone.

    A process in both of the driver's lists holds one context, so the larger counts.
    """
    # by version: where an old driver lacks the function, the unversioned names raise what is no NVMLError
    compute, graphics = pynvml.nvmlDeviceGetComputeRunningProcesses_v3(handle), []
    with contextlib.suppress(pynvml.NVMLError_NotSupported):  # cards without graphics
        graphics = pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3(handle)
    listed: dict[int, int | None] = {}
    for p in (*compute, *graphics):
        listed[p.pid] = max(listed.get(p.pid) or 0, p.usedGpuMemory or 0) or None
    return listed, listed.keys() - {p.pid for p in compute}


def slowed(events: int | None) -> tuple[str, ...]:
    """Names of the throttle reasons among the bits `events`."""
    return tuple(name for name, bit in SLOWED.items() if (events or 0) & bit)
