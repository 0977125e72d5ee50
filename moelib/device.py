"""What holds the offloaded part of a model: a GPU (`cuda`), a second process (`loopback`), or nothing (`none`).

Each kind opens a session for one run, which says how llama-server reaches the device and reads its memory.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from moelib import params, process
from moelib.engine import Engine, EngineError
from moelib.memory import Reading

SAMPLE_S = 0.05  # between readings of the memory


class DeviceError(params.UserError):
    """The device that was asked for is not there; the message says what to do."""


@dataclass
class Session:
    """A device during one run."""

    args: list[str]
    """What llama-server must be told."""
    read: Callable[[int | None, float], Reading] = lambda server_pid, t_s: Reading(t_s, None, None)
    """Reads the memory, given the server's process id and the seconds since the run's start."""
    env: dict[str, str] = field(default_factory=dict)
    cpus: tuple[int, ...] = ()
    """The only CPUs that llama-server may use; empty for all."""
    pid: int | None = None
    """The process that plays the device, where one does."""

    def peak_bytes(self) -> int | None:
        return process.peak_rss(self.pid) if self.pid else None


class Device:
    """What the kinds have in common; each adds `session`, which holds the device for one run."""

    kind = "none"
    name: str | None = None
    uuid: str | None = None
    threads = process.usable_cpus()
    """Threads of llama-server."""

    def identity(self) -> dict[str, Any]:
        """What a record says of the device."""
        return {"kind": self.kind, "name": self.name, "uuid": self.uuid}


class NoDevice(Device):
    """llama.cpp on the CPU alone: runs, but has nothing to offload from."""

    @contextmanager
    def session(self, engine: Engine, work: Path) -> Iterator[Session]:
        yield Session(["--device", "none"])


class Loopback(Device):
    """llama.cpp's RPC server as a device: a real one to the engine, and its memory is that process's RSS.

    The cores are divided between the two processes: their threads spin while they wait, and on shared cores each
    would take the other's time (seen on 2 cores: 64 tok/s shared, 440 divided; not pinned, 350 or 900 by chance).
    """

    kind = "loopback"

    def __init__(self) -> None:
        cpus = process.usable_cpus()
        self.threads = max(1, cpus // 2)
        self.device_threads = max(1, cpus - self.threads)
        ids = tuple(process.cpu_ids())
        divided = len(ids) > 1 and len(ids) == cpus  # under a quota the scheduler does it
        self.cpus, self.device_cpus = (ids[: self.threads], ids[self.threads :]) if divided else ((), ())
        self.name = f"ggml-rpc-server, {self.device_threads} threads on {process.facts()['cpu']}"

    @contextmanager
    def session(self, engine: Engine, work: Path) -> Iterator[Session]:
        port, log = process.free_port(), work / "device.log"
        argv = [engine.tool("rpc-server"), "-H", "127.0.0.1", "-p", str(port), "-t", str(self.device_threads)]
        with process.Child(argv, log, process.environment(work), self.device_cpus) as child:
            child.wait_listening(port, 30)
            address = f"127.0.0.1:{port}"
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


class Cuda(Device):
    """One NVIDIA GPU, addressed by its UUID and alone visible to the engine. Memory by NVML."""

    kind = "cuda"

    def __init__(self) -> None:
        import pynvml

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
            if visible.startswith("GPU-"):
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(visible)
            else:
                self._handle = pynvml.nvmlDeviceGetHandleByIndex(int(visible) if visible.isdigit() else 0)
            self.uuid = pynvml.nvmlDeviceGetUUID(self._handle)
            self.name = pynvml.nvmlDeviceGetName(self._handle)
        except pynvml.NVMLError as err:
            raise DeviceError(f"no NVIDIA GPU can be used: {err}; check the driver with nvidia-smi") from None

    def identity(self) -> dict[str, Any]:
        return {
            **super().identity(),
            "total_bytes": self._ask(lambda: self._memory().total),
            "driver": self._ask(self._nvml.nvmlSystemGetDriverVersion),
            "power_limit_watt": self._ask(lambda: self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1000),
        }

    def _memory(self) -> Any:
        # the first version's `used` includes what the driver reserves
        return self._nvml.nvmlDeviceGetMemoryInfo(self._handle, version=self._nvml.nvmlMemory_v2)

    def _ask(self, question: Any) -> Any:
        try:
            return question()
        except self._nvml.NVMLError:
            return None

    def read(self, server_pid: int | None, t_s: float) -> Reading:
        used: dict[int, int | None] = {}
        for listed in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
            for p in self._ask(lambda f=listed: getattr(self._nvml, f)(self._handle)) or []:
                used[p.pid] = max(used.get(p.pid) or 0, p.usedGpuMemory or 0) or None
        ours = _tree(server_pid)
        mine = [b for pid, b in used.items() if pid in ours and b]
        device = self._ask(lambda: self._memory().used)
        return Reading(t_s, sum(mine) if mine else None, device, sum(pid not in ours for pid in used))

    @contextmanager
    def session(self, engine: Engine, work: Path) -> Iterator[Session]:
        yield Session(["--device", "CUDA0"], self.read, {"CUDA_VISIBLE_DEVICES": self.uuid})


def _tree(pid: int | None) -> set[int]:
    try:
        return {pid, *(c.pid for c in psutil.Process(pid).children(recursive=True))} if pid else set()
    except psutil.NoSuchProcess:
        return {pid}


def choose(kind: str, engine: Engine) -> Device:
    """The device for `kind`; `auto` takes a GPU that the engine can use, else loopback, else none.

    Raises DeviceError if the kind that was named is not there.
    """
    if kind == "none":
        return NoDevice()
    if kind in ("auto", "cuda"):
        try:
            gpu = Cuda()
            if any(name.startswith("CUDA") for name in engine.devices()):
                return gpu
            raise DeviceError(f"{engine} has no CUDA device; use a CUDA build or `device: loopback`")
        except DeviceError:
            if kind == "cuda":
                raise
    if "--rpc" in engine.help.flags and "rpc-server" in engine.tools:
        return Loopback()
    if kind == "auto":
        return NoDevice()
    raise DeviceError(f"{engine} has no RPC; run `make engine` or set MOELIB_LLAMA_CPP to one that has")
