"""Devices: their memory before, in and after a run, an empty context, and why no GPU is used."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from moelib import doctor
from moelib.campaign import campaign
from moelib.engine import engine
from moelib.machine import gpus
from moelib.measure import device
from moelib.measure.device import Cuda, Session
from moelib.measure.memory import SETTLED_BYTES, Reading

MIB, GIB = 1 << 20, 1 << 30


def session(*readings):
    """A session whose device is read from a list; the last reading stays."""
    ahead = list(readings)
    return Session([], lambda pid, t_s: ahead.pop(0) if len(ahead) > 1 else ahead[0], shared=True)


def test_a_runner_without_llama_cpps_tools_has_no_loopback_device(tmp_path):
    with pytest.raises(engine.EngineError, match="made of llama.cpp's tools"):
        device.Loopback().session(None, tmp_path).__enter__()


def idle(nbytes, listed=False):
    return Reading(0.0, None, nbytes, listed)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(device, "IDLE_S", 0.0)
    monkeypatch.setattr(device, "SAMPLE_S", 0.0)
    monkeypatch.setattr(device, "SETTLE_S", 0.2)


def test_a_shared_device_is_read_several_times_before_a_run_and_one_of_its_own_once():
    assert len(session(idle(0)).idle()) == device.IDLE_READINGS
    assert len(Session([]).idle()) == 1


@pytest.mark.parametrize(
    ("usable", "cards", "shown", "threads"),
    [
        (32, 2, 1, 16),  # each process is shown its own GPU, and all CPUs
        (32, 2, 2, 16),
        (16, 2, 1, 16),  # a scheduler has divided the CPUs
        (16, 4, 2, 8),
        (32, 1, 1, 32),
        (1, 2, 2, 1),
    ],
)
def test_who_shares_a_host_takes_its_part_of_the_cpus(monkeypatch, usable, cards, shown, threads):
    """Of a host with 32 CPUs and so many GPUs, of which CUDA shows some."""
    monkeypatch.setattr(device.host, "all_cpus", lambda: 32)
    monkeypatch.setattr(device.host, "usable_cpus", lambda: usable)
    monkeypatch.setattr(gpus, "visible", lambda: [gpus.Shown(str(i), False) for i in range(shown)])
    where = object.__new__(Cuda)
    where.gpu = SimpleNamespace(cards=cards)
    assert where.threads == usable
    where.share()
    assert where.threads == threads


@pytest.mark.parametrize(
    ("after", "count"),
    [
        ([idle(GIB)], 1),
        ([idle(GIB + SETTLED_BYTES)], 1),
        ([idle(GIB + SETTLED_BYTES + 1), idle(GIB)], 2),
        ([idle(GIB, listed=True), idle(GIB)], 2),  # the driver still lists the process
        ([idle(None)], 1),  # a total that cannot be read is not waited for
        ([idle(None, listed=True), idle(None)], 2),
    ],
)
def test_the_memory_is_read_until_it_is_as_before(after, count):
    assert len(session(*after).settled((idle(GIB),), 1, lambda: 0.0)) == count


def test_a_device_that_never_settles_is_not_waited_for_without_end():
    readings = session(idle(9 * GIB)).settled((idle(GIB),), 1, lambda: 0.0)
    assert readings[-1].device_bytes == 9 * GIB


class Memory:
    """A GPU whose memory is read from a list: before, and with an empty context."""

    def __init__(self, *readings):
        self.readings = list(readings)

    def read(self, ours, t_s):
        return self.readings.pop(0)


def calibrated(monkeypatch, folder, with_context, *lines):
    """The device after its calibration by a process that prints `lines` and stays as long as it is read."""
    code = f"import time\nfor line in {lines}: print(line, flush=True)\ntime.sleep(60 if len({lines}) > 1 else 0)"
    monkeypatch.setattr(gpus, "HOLD", [sys.executable, "-c", code])
    card = Cuda.__new__(Cuda)
    card.gpu, card.uuid = Memory(Reading(0.0, None, 1000 * MIB), with_context), "GPU-1"
    card.calibrate(folder)
    return card


@pytest.mark.parametrize(
    ("with_context", "context"),
    [
        (Reading(0.0, 500 * MIB, 1600 * MIB), 500 * MIB),  # the list counts this process, growth may include others
        (Reading(0.0, None, 1600 * MIB), 600 * MIB),
        (Reading(0.0, None, 900 * MIB), None),  # another process ended
        (Reading(0.0, None, 1063 * MIB), None),
        (Reading(0.0, None, 1064 * MIB), 64 * MIB),
        (Reading(0.0, None, None), None),
    ],
)
def test_an_empty_context_is_measured(tmp_path, monkeypatch, with_context, context):
    card = calibrated(monkeypatch, tmp_path, with_context, "device 0 0 GPU-1 shared 0", "context 0 0")
    assert card.context_bytes == context


def test_the_size_of_a_context_that_cannot_be_made_is_unknown(tmp_path, monkeypatch):
    assert calibrated(monkeypatch, tmp_path, None, "context 100 0").context_bytes is None  # cuInit found no device


class Listing:
    """A GPU that lists `processes`, and a host that knows the `children` of each; `searches` counts its searches."""

    def __init__(self, monkeypatch):
        self.processes, self.children, self.searches = {}, {}, 0
        monkeypatch.setattr(device.host, "tree", self.tree)

    def tree(self, pid):
        self.searches += 1
        return {pid, *self.children.get(pid, ())}

    def read(self, ours, t_s):
        mine = [n for pid, n in self.processes.items() if pid in ours]
        others = tuple(sorted((pid, n) for pid, n in self.processes.items() if pid not in ours))
        return Reading(t_s, sum(mine) or None, sum(self.processes.values()), bool(mine), others)


def test_a_runs_processes_are_searched_only_when_an_unknown_one_is_listed(monkeypatch):
    """The server is 50, a desktop 7, the server's child 51, another process 99."""
    gpu = Listing(monkeypatch)
    family = device.Family(gpu)
    for listed, server, process_bytes, others, searches in (
        ({7: 100}, None, None, ((7, 100),), 0),  # before the run
        ({7: 100}, 50, None, ((7, 100),), 0),
        ({7: 100, 50: 1000}, 50, 1000, ((7, 100),), 0),
        ({7: 100, 50: 1000, 51: 10}, 50, 1010, ((7, 100),), 1),
        ({7: 100, 50: 1000, 51: 10, 99: 5}, 50, 1010, ((7, 100), (99, 5)), 2),
        ({7: 100}, 50, None, ((7, 100),), 2),
    ):
        gpu.processes, gpu.children = listed, {50: [51]}
        for _ in range(2):
            reading = family.read(server, 0.0)
            assert (reading.process_bytes, reading.others, gpu.searches) == (process_bytes, others, searches)


NO_DRIVER = device.NoDriver(
    "no NVIDIA GPU can be used: NVML Shared Library Not Found; check the driver with nvidia-smi"
)
HIDDEN = device.DeviceError("no NVIDIA GPU can be used: CUDA_VISIBLE_DEVICES='' shows CUDA no GPU")


class Build:
    """An engine that lists these devices."""

    def __init__(self, *names, rpc=True):
        self.names = names
        self.help, self.tools = engine.Help("  --rpc SERVERS" if rpc else ""), {"rpc-server": Path("r")} if rpc else {}

    def devices(self):
        return {name: f"a {name} device" for name in self.names}

    def __str__(self):
        return "llama.cpp b1 (PATH)"


class Nvidia:
    kind, name, uuid = "cuda", "H100", "GPU-1"

    def identity(self):
        return {"total_bytes": 80 << 30}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes a machine: the GPU or the error of its driver, and the files by which its GPUs are known."""
    monkeypatch.setattr(gpus, "ROOT", tmp_path)
    monkeypatch.setattr(gpus.sys, "platform", "linux")

    def make(cuda, *files):
        def open_gpu():
            if isinstance(cuda, Exception):
                raise cuda
            return cuda

        monkeypatch.setattr(device, "Cuda", open_gpu)
        for name, text in files:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")

    return make


def pci(vendor, address="0000:01:00.0", kind="0x030000", **more):
    return [(f"sys/bus/pci/devices/{address}/{n}", t) for n, t in {"vendor": vendor, "class": kind, **more}.items()]


LOOPBACK = "measures on loopback, in a second process on this machine's CPU, because "
NO_CUDA = (
    "llama.cpp b1 (PATH) has no CUDA device for the H100; take a build with CUDA: `make engine` where nvcc is, or "
    "MOELIB_LLAMA_CPP, or name `device: loopback`"
)
OTHER = "moelib measures NVIDIA GPUs alone, and "
SILENT = "the driver of the NVIDIA GPU ({}) does not answer: " + str(NO_DRIVER)
DRM = [("sys/class/drm/card0/device/vendor", "0x1002"), ("sys/class/drm/card0/device/class", "0x030000")]
OWN = gpus.INTEL_INTEGRATED


class Machine(NamedTuple):
    because: str
    """The reason in the note."""
    faulty: str | None = None
    """The item that doctor cures."""
    files: Sequence[tuple[str, str]] = ()
    """The system's, by which GPUs are known."""
    build: Build = Build()
    cuda: object = NO_DRIVER
    """The GPU, or what its driver answers."""


HERE = f"{OTHER}here is"
MACHINES = {
    "no GPU": Machine("there is no GPU here"),
    "display of a server and of a virtual machine": Machine(
        "there is no GPU here", files=[*pci("0x1a03"), *pci("0x1af4", "0000:00:03.0")]
    ),
    "engine without CUDA": Machine(NO_CUDA, "GPU", build=Build("Vulkan0"), cuda=Nvidia()),
    "GPU without its driver": Machine(SILENT.format("PCI 0000:01:00.0"), "GPU", pci("0x10de", kind="0x030200")),
    "driver that does not answer": Machine(SILENT.format("/proc/driver/nvidia"), "GPU", [("proc/driver/nvidia", "")]),
    "container without the library": Machine(SILENT.format("/dev/nvidia0"), "GPU", [("dev/nvidia0", "")]),
    "hidden GPU": Machine(str(HIDDEN), "GPU", build=Build("CUDA0"), cuda=HIDDEN),
    "AMD": Machine(f"{HERE} AMD GPU (PCI 0000:01:00.0)", "other GPU", pci("0x1002", mem_info_vram_total=str(24 << 30))),
    "AMD, listed by the engine": Machine(
        f"{OTHER}the engine lists ROCm0: a ROCm0 device", "other GPU", pci("0x1002"), Build("ROCm0")
    ),
    "Apple": Machine(f"{OTHER}the engine lists MTL0: a MTL0 device", "other GPU", build=Build("MTL0", "BLAS")),
    "Intel, beside an integrated GPU": Machine(
        f"{HERE} Intel GPU (PCI {OWN}), Intel GPU (PCI 0000:03:00.0)",
        "other GPU",
        [*pci("0x8086", OWN), *pci("0x8086", "0000:03:00.0", "0x038000")],
    ),
    "integrated Intel": Machine(f"{HERE} Intel GPU (PCI {OWN})", files=pci("0x8086", OWN)),
    "integrated AMD": Machine(
        f"{HERE} AMD GPU (PCI 0000:01:00.0)", files=pci("0x1002", mem_info_vram_total=str(512 << 20))
    ),
    "GPU that no PCI bus shows": Machine(f"{HERE} AMD GPU (PCI device)", "other GPU", DRM),
}


@pytest.mark.parametrize("name", MACHINES)
def test_a_gpu_is_never_passed_over_in_silence(machine, name):
    this = MACHINES[name]
    machine(this.cuda, *this.files)
    where = device.choose("auto", this.build)
    assert (where.kind, where.note) == ("loopback", LOOPBACK + this.because)
    rows = list(doctor._gpus(this.build))
    assert [item for item, _, cure in rows if cure] == ([this.faulty] if this.faulty else [])
    assert all(cure is None or "\n" not in cure for _, _, cure in rows)


def test_a_gpu_that_is_used_has_no_note_and_no_cure(machine):
    machine(Nvidia(), *pci("0x10de"), *pci("0x1002", "0000:02:00.0"))
    assert device.choose("auto", Build("CUDA0", "CUDA1")).kind == "cuda"
    rows = list(doctor._gpus(Build("CUDA0")))
    assert rows == [
        ("GPU", "H100, 80.00 GiB, GPU-1", None),
        ("other GPU", "AMD GPU (PCI 0000:02:00.0), not used", None),
    ]


def test_a_device_that_was_named_has_no_note(machine):
    machine(NO_DRIVER, *pci("0x1002"))
    assert device.choose("loopback", Build()).note is None
    assert device.choose("none", Build()).note is None
    with pytest.raises(device.DeviceError, match="check the driver"):
        device.choose("cuda", Build())


def test_without_rpc_the_note_says_that_nothing_is_offloaded(machine):
    machine(NO_DRIVER)
    where = device.choose("auto", Build(rpc=False))
    assert where.note == "measures on the CPU alone, with nothing to offload from, because there is no GPU here"
    with pytest.raises(device.DeviceError, match="has no RPC; run `make engine`"):
        device.choose("loopback", Build(rpc=False))


def test_the_note_is_that_of_a_study_on_auto_with_an_engine(monkeypatch, machine):
    machine(NO_DRIVER)
    monkeypatch.setattr(campaign.engine, "find", Build)

    class Auto:
        class parameters:
            device, runner, endpoints = "auto", "llama-server", {}

    assert campaign.device_note(Auto) == f"{LOOPBACK}there is no GPU here"
    Auto.parameters.device = "loopback"
    assert campaign.device_note(Auto) is None
    Auto.parameters.device = "auto"
    monkeypatch.setattr(campaign.engine, "find", lambda: (_ for _ in ()).throw(engine.EngineError("none")))
    assert campaign.device_note(Auto) is None


def test_a_variable_that_names_no_gpu_is_not_a_missing_driver(monkeypatch):
    class Hidden:
        errors = ()

        def __init__(self):
            raise gpus.none_visible(["GPU-1"])

    monkeypatch.setattr(device, "Gpu", Hidden)
    with pytest.raises(device.DeviceError, match="no NVIDIA GPU can be used: CUDA gives none of GPU-1") as caught:
        Cuda()
    assert not isinstance(caught.value, device.NoDriver)


def test_threads_are_counted_when_a_device_is_made(monkeypatch):
    """And not when the library is imported."""
    monkeypatch.setattr(device.host, "usable_cpus", lambda: 7)
    assert device.NoDevice().threads == 7
