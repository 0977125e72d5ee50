"""NVIDIA GPUs by NVML: memory of processes and devices, clocks, energy, traffic. Unknown is None, never 0.

Whatever can be missing (an old driver, a container, a card without the counter) is asked for once; why it is missing
stands in `Gpu.absent`.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pynvml

from moelib.files import stored
from moelib.memory import Reading

SLOWED = {
    "hw-slowdown": pynvml.nvmlClocksEventReasonHwSlowdown,
    "hw-thermal": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "hw-power-brake": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
    "sw-thermal": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
}
"""Clock-event reasons with which a card is not itself. A power cap is not one: the card is built to reach it."""
POWER_CAP = pynvml.nvmlClocksEventReasonSwPowerCap

TURN_BYTES = 1 << 32
# total = reserved + free + used, exact where seen: anything else is a struct of another version
ADDS_UP_BYTES = 64 << 20


@stored
class Counters:
    """One look at a GPU's clocks and running totals, `t_s` seconds after the run's start."""

    t_s: float
    energy_joule: float | None = None
    """Of the board since the driver was loaded; the CPU's is not in it."""
    pcie_rx_bytes: int | None = None
    """Received by the GPU, modulo 2^32: the driver's counter has 32 bits (seen on an H200)."""
    pcie_tx_bytes: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    power_watt: float | None = None
    events: int | None = None
    """Bits of the clock-event (throttle) reasons."""


NO_GPU = dict.fromkeys((f for f in Counters.__dataclass_fields__ if f != "t_s"), "no NVIDIA GPU took part")


class Gpu:
    """One GPU by index or UUID; processes are looked for on all of them."""

    errors = (pynvml.NVMLError,)

    def __init__(self, which: str) -> None:
        """Raises pynvml.NVMLError."""
        pynvml.nvmlInit()
        by_uuid, found = {}, None
        for i in range(pynvml.nvmlDeviceGetCount()):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(i)
                uuid = _text(pynvml.nvmlDeviceGetUUID(handle))
            except pynvml.NVMLError:
                if which == str(i):
                    raise
                continue  # another card that is lost is no matter of this one
            by_uuid[uuid] = handle
            if found is None and (which == str(i) or (which.startswith("GPU-") and uuid.startswith(which))):
                found = uuid
        if found is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        self.uuid, self.handle = found, by_uuid.pop(found)
        self._elsewhere = list(by_uuid.values())
        self.name = _text(pynvml.nvmlDeviceGetName(self.handle))
        self.questions, self.absent = self._questions(), {}
        for name, ask in self.questions.items():
            try:
                ask()
            except pynvml.NVMLError as err:
                self.absent[name] = str(err)

    def facts(self) -> dict[str, Any]:
        """Size, driver and power limit; None for what the driver does not say."""

        def bandwidth() -> float:
            """Clock x 2 transfers x bus width, as the driver tells them."""
            clock = pynvml.nvmlDeviceGetMaxClockInfo(self.handle, pynvml.NVML_CLOCK_MEM)
            return clock * 1e6 * 2 * pynvml.nvmlDeviceGetMemoryBusWidth(self.handle) / 8

        return {
            "bandwidth_bytes_per_s": _ask(bandwidth),
            "pcie_bytes_per_s": _ask(self._pcie),
            "total_bytes": _ask(lambda: int(self._memory().total)),
            "driver": _ask(lambda: _text(pynvml.nvmlSystemGetDriverVersion())),
            "power_limit_watt": _ask(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(self.handle) / 1000),
        }

    def _pcie(self) -> float:
        """The most that the card's link can carry one way: 2.5 GT/s, then 5, then twice as much each generation."""
        generation = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(self.handle)
        rate = 2.5e9 if generation == 1 else 5e9 * 2 ** (generation - 2)
        return rate / 8 * pynvml.nvmlDeviceGetMaxPcieLinkWidth(self.handle)

    def _memory(self) -> Any:
        # the first version's `used` includes what the driver reserves
        memory = pynvml.nvmlDeviceGetMemoryInfo(self.handle, version=pynvml.nvmlMemory_v2)
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

        here = ask(lambda: _processes(self.handle), "list-unsupported") or {}
        mine = {pid: n for pid, n in here.items() if pid in ours}
        for handle in self._elsewhere:
            # another card's faults and other processes are no matter of this run
            with contextlib.suppress(pynvml.NVMLError):
                there = _processes(handle)
                for pid in ours & there.keys():
                    mine[pid] = None if None in (n := (mine.get(pid, 0), there[pid])) else sum(n)
        known = bool(mine) and None not in mine.values()
        memory = ask(self._memory, "memory-unsupported")
        return Reading(
            t_s=t_s,
            process_bytes=sum(mine.values()) if known else None,
            device_bytes=int(memory.used) if memory else None,
            listed=bool(mine),
            others=tuple(sorted((pid, n) for pid, n in here.items() if pid not in ours)),
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
        """Everything that is there, now."""
        return Counters(t_s, **{name: self._now(name) for name in self.questions})

    def energy(self) -> float | None:
        return self._now("energy_joule")

    def traffic(self) -> "Traffic":
        return Traffic(_ask(self._pcie), lambda: [self._now(f"pcie_{way}_bytes") for way in ("rx", "tx")])


class Traffic:
    """Bytes over PCIe from the first look on: the driver's counters turn over at 4 GiB, so each turn must be seen."""

    def __init__(self, bytes_per_s: float | None, read: Callable[[], list[int | None]]):
        self.gap_s = TURN_BYTES / bytes_per_s if bytes_per_s else 0.0  # of a link not known, any gap is too long
        self._read = read
        self._last: tuple[float, list[int]] | None = None
        self.totals: list[int] | None = None
        """Received and sent; None before the second look, and once a turn may have gone unseen."""
        self.lost: str | None = None
        """Why there is no total."""

    def look(self, t_s: float) -> None:
        now = self._read()
        if None in now:
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


def _processes(handle: Any) -> dict[int, int | None]:
    """Process id -> bytes; a process in both of the driver's lists holds one context, so the larger counts."""
    found: dict[int, int | None] = {}
    # by version: where an old driver lacks the function, the unversioned names raise what is no NVMLError
    lists = [pynvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)]
    with contextlib.suppress(pynvml.NVMLError_NotSupported):  # cards without graphics
        lists.append(pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3(handle))
    for p in (p for every in lists for p in every):
        found[p.pid] = max(found.get(p.pid) or 0, p.usedGpuMemory or 0) or None
    return found


def slowed(events: int | None) -> tuple[str, ...]:
    """Names of the reasons for which the clocks were not the card's own."""
    return tuple(name for name, bit in SLOWED.items() if (events or 0) & bit)
