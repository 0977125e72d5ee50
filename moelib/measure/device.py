"""The device that a model is offloaded from: a GPU (`cuda`), a second process (`loopback`), or none (`none`).

Each kind opens a session for one run, which says how llama-server reaches the device and reads its memory and, on a
GPU, its counters.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from moelib.catalogue import params
from moelib.engine.engine import Engine, EngineError
from moelib.machine import gpus, host, process
from moelib.measure.memory import LEAST_CONTEXT_BYTES, SETTLED_BYTES, Reading
from moelib.measure.nvml import NO_GPU, Counters, Gpu, Traffic

SAMPLE_S = 0.1  # between readings of the memory: the last one holds the peak, as pools never shrink
# Monitoring takes CPU time from experts that are computed on all CPUs, whose threads wait for the slowest one: on an
# H200 with 16 busy CPUs, monitors that listed all processes at each reading and read clocks and power five times a
# second slowed decoding to 0.862 [0.813, 0.913] of its rate. So only the memory is read during a request, which takes
# 26 us; clocks and power, which take the driver 4 ms, are read after it.
BUS_S = 0.01  # between readings of the bus: its counter wraps in 68 ms on an H200's link, and a reading takes 1 ms
IDLE_READINGS, IDLE_S = 5, 0.02  # enough to notice that an idle device's memory changes
LISTEN_S = 30.0  # for the loopback device's process to listen
PORTS = 5  # ports tried for it
RPC = (
    "install its other packages (Debian: `apt-get install llama.cpp-tools-extra libggml0-backend-rpc`), or set "
    "MOELIB_LLAMA_CPP to a build with -DGGML_RPC=ON"
)
SETTLE_S = 10.0  # for a driver to give back an ended process's memory


class DeviceError(params.UserError):
    """The requested device cannot be used; the message says what to do."""


class NoDriver(DeviceError):
    """No NVIDIA driver answers: this machine may have no NVIDIA GPU."""


@dataclass
class Session:
    """A device during one run."""

    args: list[str]
    """Arguments of llama-server that select the device."""
    read: Callable[[int | None, float], Reading] = lambda server_pid, t_s: Reading(t_s, None, None)
    """Reads the memory, given the server's process id and the seconds since the run's start."""
    counters: Callable[[float], Counters] | None = None
    """Reads clocks, energy and the like, given the seconds since the run's start."""
    energy: Callable[[], float | None] = lambda: None
    """Reads the energy counter alone, in joules."""
    traffic: Callable[[], Traffic] | None = None
    """Starts to count the bytes that go over the bus."""
    env: dict[str, str] = field(default_factory=dict)
    cpus: tuple[int, ...] = ()
    """The only CPUs that llama-server may use; empty for all."""
    pid: int | None = None
    """Process id of a loopback device."""
    shared: bool = False
    """Whether the device exists before and after the run, so that its idle state can be read."""

    def peak_bytes(self) -> int | None:
        return process.peak_rss(self.pid) if self.pid else None

    def idle(self) -> tuple[Reading, ...]:
        """Readings before the run."""
        readings = [self.read(None, 0.0)]
        while self.shared and len(readings) < IDLE_READINGS:
            time.sleep(IDLE_S)
            readings.append(self.read(None, 0.0))
        return tuple(readings)

    def settled(self, idle: Sequence[Reading], server_pid: int | None, now: Callable[[], float]) -> tuple[Reading, ...]:
        """Readings after the run's end, until the memory in use is as before or SETTLE_S have passed."""
        readings, deadline = [], time.monotonic() + process.patience(SETTLE_S)
        while self.shared:
            readings.append(self.read(server_pid, now()))
            before, after = idle[-1].device_bytes, readings[-1].device_bytes
            back = before is None or after is None or abs(after - before) <= SETTLED_BYTES
            if (back and not readings[-1].listed) or time.monotonic() > deadline:
                break
            time.sleep(SAMPLE_S)
        return tuple(readings)


class Device(ABC):
    """Common to all kinds."""

    kind = "none"
    name: str | None = None
    uuid: str | None = None
    context_bytes: int | None = None
    """An empty context on the device, where one was measured."""
    absent: dict[str, str] = NO_GPU
    """Counters that this device does not have -> why."""
    note: str | None = None
    """Why this device was chosen instead of a GPU, where the study did not name it."""

    @property
    def usable_bytes(self) -> int | None:
        """The memory that programs may have together; None where the device has no memory of its own, or its driver
        does not say."""
        return None

    @cached_property
    def threads(self) -> int:
        """Threads of llama-server."""
        return host.usable_cpus()

    def share(self) -> None:  # noqa: B027  # most kinds are the only one of their host
        """Take this device's part of the host's CPUs, and leave the rest to who measures on its other GPUs."""

    def identity(self) -> dict[str, Any]:
        """The device's facts for a record."""
        return {"kind": self.kind, "name": self.name, "uuid": self.uuid}

    def calibrate(self, work: Path) -> None:  # noqa: B027  # most kinds have none
        """Measure an empty context, while no run is in progress. Logs go to `work`."""

    @abstractmethod
    def session(self, engine: Engine | None, work: Path) -> AbstractContextManager[Session]:
        """Hold the device for one run. Raises EngineError, DeviceError or ProcessError if it cannot be used."""


class NoDevice(Device):
    """llama.cpp on the CPU alone: models run, but there is no device to offload from."""

    @contextmanager
    def session(self, engine: Engine | None, work: Path) -> Iterator[Session]:
        yield Session(["--device", "none"])


class Loopback(Device):
    """llama.cpp's RPC server as a device. The engine treats it like any other; its memory is the RSS of its process.

    The cores are divided between the two processes: their threads spin while they wait, and on shared cores each
    would take the other's time (on 2 cores: 64 tok/s shared, 440 divided; not pinned, 350 or 900 by chance).
    """

    kind = "loopback"

    def __init__(self) -> None:
        cpus = host.usable_cpus()
        self.threads = max(1, cpus // 2)
        self.device_threads = max(1, cpus - self.threads)
        ids = tuple(host.cpu_ids())
        divided = len(ids) > 1 and len(ids) == cpus  # under a CPU quota, the scheduler divides them
        self.cpus, self.device_cpus = (ids[: self.threads], ids[self.threads :]) if divided else ((), ())
        self.name = f"ggml-rpc-server, {self.device_threads} threads on {host.cpu_name()}"

    @contextmanager
    def _serving(self, engine: Engine, work: Path) -> Iterator[tuple[process.Child, str]]:
        """The device's process and its address."""
        for tries_left in reversed(range(PORTS)):
            port = process.free_port()
            argv = [engine.tool("rpc-server"), "-H", "127.0.0.1", "-p", str(port), "-t", str(self.device_threads)]
            with process.Child(argv, work / "device.log", process.environment(work), self.device_cpus) as child:
                try:
                    child.wait_listening(port, process.patience(LISTEN_S))
                except process.ProcessError:
                    if tries_left and not child.running():
                        continue  # another process took the port first: try the next one
                    raise
                yield child, f"127.0.0.1:{port}"
                return

    @contextmanager
    def session(self, engine: Engine | None, work: Path) -> Iterator[Session]:
        if engine is None:
            raise EngineError("a loopback device is made of llama.cpp's tools, which this runner has none of")
        with self._serving(engine, work) as (child, address):
            rpc = [engine.need("--rpc"), address]
            names = [n for n, text in engine.devices(*rpc).items() if address in (n + text)]
            if not names:
                raise EngineError(f"{engine} does not list the RPC device at {address}; use a build with RPC")
            device = psutil.Process(child.pid)

            def read(server_pid: int | None, t_s: float) -> Reading:
                try:
                    return Reading(t_s, device.memory_info().rss, None)
                except psutil.Error:
                    return Reading(t_s, None, None)

            yield Session([*rpc, "--device", names[0]], read, cpus=self.cpus, pid=child.pid)


def no_loopback(engine: Engine) -> str | None:
    """Why this build has no loopback device, and how to get one; None where it works. A distribution may ship RPC in
    separate packages: llama-server's help then lists the flag, but using it fails."""
    try:
        with TemporaryDirectory(prefix="moelib-") as work, Loopback().session(engine, Path(work)):
            return None
    except (EngineError, process.ProcessError) as err:
        return f"{engine} has no RPC that works: {RPC}\n{err}"


class Family:
    """Reads the memory of a run's processes. Child processes are searched only when the driver lists an unknown one."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._ours: set[int] = set()
        self._strangers: set[int] = set()

    def read(self, server_pid: int | None, t_s: float) -> Reading:
        ours = set() if server_pid is None else {server_pid, *self._ours}
        reading = self._gpu.read(ours, t_s)
        others = {pid for pid, _ in reading.others}
        if server_pid is not None and others - self._strangers:
            self._ours = host.tree(server_pid)
            if self._ours != ours:
                reading = self._gpu.read(self._ours, t_s)
                others = {pid for pid, _ in reading.others}
        self._strangers |= others
        return reading


class Cuda(Device):
    """One NVIDIA GPU, addressed by its UUID and alone visible to the engine. Memory and counters by NVML."""

    kind = "cuda"
    uuid: str

    def __init__(self) -> None:
        try:
            self.gpu = Gpu()
        except gpus.NotVisible as err:
            raise DeviceError(f"no NVIDIA GPU can be used: {err}") from None
        except Gpu.errors as err:
            kind = NoDriver if isinstance(err, Gpu.no_driver) else DeviceError
            raise kind(f"no NVIDIA GPU can be used: {err}; check the driver with nvidia-smi") from None
        self.uuid, self.name, self.absent = self.gpu.uuid, self.gpu.name, self.gpu.absent

    @property
    def usable_bytes(self) -> int | None:
        return self.gpu.usable_bytes

    def share(self) -> None:
        # llama.cpp's threads spin while they wait: two servers with a thread for every CPU had 1 to 2 % of their speed
        confined = host.usable_cpus() < host.all_cpus()
        devices = len(gpus.visible()) if confined else self.gpu.cards
        self.threads = max(1, host.usable_cpus() // max(1, devices))

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), **self.gpu.facts(), "context_bytes": self.context_bytes}

    def calibrate(self, work: Path) -> None:
        idle_bytes = self.gpu.read(set(), 0.0).device_bytes
        env = process.environment(work, {"CUDA_VISIBLE_DEVICES": self.uuid})
        try:
            with process.Child(gpus.HOLD, work / "context.log", env) as child:
                child.wait_for(r"context 0 0", process.patience(gpus.ANSWER_S))
                reading = self.gpu.read({child.pid}, 0.0)
        except process.ProcessError:
            return  # memory is then checked against a wide bound, with the reason context-unmeasured
        held_bytes = reading.device_bytes
        growth = None if idle_bytes is None or held_bytes is None else held_bytes - idle_bytes
        context = reading.process_bytes or growth  # the list counts this process alone, growth may include others
        self.context_bytes = context if context and context >= LEAST_CONTEXT_BYTES else None

    @contextmanager
    def session(self, engine: Engine | None, work: Path) -> Iterator[Session]:
        env = {"CUDA_VISIBLE_DEVICES": self.uuid}
        read, has_bus_counters = Family(self.gpu).read, not self.absent.keys() & {"pcie_rx_bytes", "pcie_tx_bytes"}
        traffic = self.gpu.traffic if has_bus_counters else None
        yield Session(["--device", "CUDA0"], read, self.gpu.counters, self.gpu.energy, traffic, env, shared=True)


CUDA_BUILD = "take a build with CUDA: `make engine` where nvcc is, or MOELIB_LLAMA_CPP"
ALONE = "moelib measures NVIDIA GPUs alone"
INSTEAD = {
    "loopback": "measures on loopback, in a second process on this machine's CPU",
    "none": "measures on the CPU alone, with nothing to offload from",
}


def choose(kind: str, engine: Engine) -> Device:
    """The device for `kind`; `auto` takes a GPU that the engine can use, else loopback, else none, and notes why.

    Raises DeviceError if `kind` is named and not available.
    """
    why = None
    if kind in ("auto", "cuda"):
        try:
            return _cuda(engine)
        except DeviceError as err:
            if kind == "cuda":
                raise
            why = passed_over(engine, err)
    if kind != "none" and "--rpc" in engine.help.flags and "rpc-server" in engine.tools:
        device: Device = Loopback()
    elif kind == "loopback":
        raise DeviceError(f"{engine} has no RPC; run `make engine` or set MOELIB_LLAMA_CPP to one that has")
    else:
        device = NoDevice()
    device.note = why and f"{INSTEAD[device.kind]}, because {why}"
    return device


def _cuda(engine: Engine) -> Cuda:
    gpu = Cuda()
    if not uses_cuda(engine):
        raise DeviceError(f"{engine} has no CUDA device for the {gpu.name}; {CUDA_BUILD}, or name `device: loopback`")
    return gpu


def uses_cuda(engine: Engine) -> bool:
    return any(name.startswith("CUDA") for name in engine.devices())


def of_other_kinds(engine: Engine) -> list[str]:
    """GPUs that the engine lists and moelib cannot measure."""
    try:
        return [f"{name}: {text}" for name, text in gpus.others(engine.devices()).items()]
    except EngineError:  # an engine that cannot list devices is reported when it is used
        return []


def passed_over(engine: Engine, err: DeviceError) -> str:
    """Why no GPU is used, in one sentence: the GPUs of this machine, and the reason."""
    if not isinstance(err, NoDriver):
        return str(err)
    listed = gpus.present()
    if nvidia := [str(f) for f in listed if f.vendor == "NVIDIA"]:
        return f"the driver of the {', '.join(nvidia)} does not answer: {err}"
    if unmeasured := of_other_kinds(engine):
        return f"{ALONE}, and the engine lists {', '.join(unmeasured)}"
    return f"{ALONE}, and here is {', '.join(map(str, listed))}" if listed else "there is no GPU here"


def card_bytes() -> int:
    """Memory that programs may have of the NVIDIA GPU that a run here would use. Raises DeviceError, with what to give
    instead."""
    try:
        usable = Cuda().usable_bytes
    except DeviceError as err:
        raise DeviceError(f"{err}; or say what card it is for: --vram 12GiB") from None
    if usable is None:
        raise DeviceError("the driver does not say how much memory the GPU has; say it: --vram 12GiB")
    return usable
