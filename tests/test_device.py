"""A session's look at its device before and after a run, and the measured size of an empty context."""

import sys
from pathlib import Path

import pytest

from moelib import cuda, device, doctor, engine, gpus, measure, visible
from moelib.device import Cuda, Session
from moelib.memory import SETTLED_BYTES, Reading

MIB, GIB = 1 << 20, 1 << 30


def session(*readings, **change):
    """A session whose device is read from a list; the last reading stays."""
    left = list(readings)
    return Session([], lambda pid, t_s: left.pop(0) if len(left) > 1 else left[0], shared=True, **change)


def idle(nbytes, listed=False):
    return Reading(0.0, None, nbytes, listed)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(device, "IDLE_S", 0.0)
    monkeypatch.setattr(device, "SAMPLE_S", 0.0)
    monkeypatch.setattr(device, "SETTLE_S", 0.2)


def test_a_shared_device_is_read_several_times_before_and_one_of_its_own_once():
    assert len(session(idle(0)).idle()) == device.IDLE_READINGS
    assert len(Session([]).idle()) == 1


@pytest.mark.parametrize(
    ("after", "looks"),
    [
        ([idle(GIB)], 1),
        ([idle(GIB + SETTLED_BYTES)], 1),
        ([idle(GIB + SETTLED_BYTES + 1), idle(GIB)], 2),
        ([idle(GIB, listed=True), idle(GIB)], 2),  # the driver still lists the process
        ([idle(None)], 1),  # a total that cannot be read is not waited for
        ([idle(None, listed=True), idle(None)], 2),
    ],
)
def test_the_end_of_a_run_is_waited_for(after, looks):
    assert len(session(*after).settled((idle(GIB),), 1, lambda: 0.0)) == looks


def test_a_device_that_never_comes_back_is_not_waited_for_without_end():
    readings = session(idle(9 * GIB)).settled((idle(GIB),), 1, lambda: 0.0)
    assert readings[-1].device_bytes == 9 * GIB


def says(*lines):
    """A process that says these lines and stays."""
    return [sys.executable, "-c", f"import time\nfor line in {lines}: print(line, flush=True)\ntime.sleep(60)"]


class Card:
    """Memory before and with the context of an empty program."""

    def __init__(self, *readings):
        self.left = list(readings)

    def read(self, ours, t_s):
        return self.left.pop(0)


@pytest.mark.parametrize(
    ("with_context", "context"),
    [
        (Reading(0.0, 500 * MIB, 1600 * MIB), 500 * MIB),  # the list is ours, what grew may be another's
        (Reading(0.0, None, 1600 * MIB), 600 * MIB),
        (Reading(0.0, None, 1000 * MIB), None),
        (Reading(0.0, None, 900 * MIB), None),  # another went, and what is less than nothing is no context
        (Reading(0.0, None, 1063 * MIB), None),
        (Reading(0.0, None, 1064 * MIB), 64 * MIB),
        (Reading(0.0, None, None), None),
    ],
)
def test_an_empty_context_is_measured(tmp_path, monkeypatch, with_context, context):
    monkeypatch.setattr(cuda, "HOLD", says("device 0 0 GPU-1 shared 0", "context 0 0"))
    card = Cuda.__new__(Cuda)
    card.gpu, card.uuid = Card(Reading(0.0, None, 1000 * MIB), with_context), "GPU-1"
    card.calibrate(tmp_path)
    assert card.context_bytes == context


def test_where_no_context_can_be_made_its_size_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "HOLD", [sys.executable, "-c", "print('context', 100, 0)"])  # cuInit found no device
    card = Cuda.__new__(Cuda)
    card.gpu, card.uuid = Card(Reading(0.0, None, 1000)), "GPU-1"
    card.calibrate(tmp_path)
    assert card.context_bytes is None


class Listing:
    """A GPU that lists processes, and a system that knows their parents."""

    def __init__(self, monkeypatch):
        self.processes, self.tree, self.looks = {}, {}, 0
        monkeypatch.setattr(device.host, "tree", self.look)

    def look(self, pid):
        self.looks += 1
        return {pid, *self.tree.get(pid, ())}

    def read(self, ours, t_s):
        mine = [n for pid, n in self.processes.items() if pid in ours]
        others = tuple(sorted((pid, n) for pid, n in self.processes.items() if pid not in ours))
        return Reading(t_s, sum(mine) or None, sum(self.processes.values()), bool(mine), others)


def test_all_processes_are_gone_through_only_when_somebody_came(monkeypatch):
    gpu = Listing(monkeypatch)
    family = device.Family(gpu)
    gpu.processes = {7: 100}  # a desktop, before the run
    assert family.read(None, 0.0).others == ((7, 100),)
    assert gpu.looks == 0
    assert family.read(50, 0.1).process_bytes is None
    gpu.processes |= {50: 1000}
    for t in (0.2, 0.3, 60.0):
        assert family.read(50, t).process_bytes == 1000
    assert gpu.looks == 0
    gpu.tree, gpu.processes = {50: [51]}, gpu.processes | {51: 10}  # the server's child
    for t in (60.1, 60.2):
        reading = family.read(50, t)
        assert (reading.process_bytes, reading.others) == (1010, ((7, 100),))
    assert gpu.looks == 1
    gpu.processes |= {99: 5}  # a stranger
    for t in (60.3, 60.4):
        reading = family.read(50, t)
        assert (reading.process_bytes, reading.others) == (1010, ((7, 100), (99, 5)))
    assert gpu.looks == 2
    gpu.processes = {7: 100}  # it ended
    assert not family.read(50, 60.5).listed


def test_a_stranger_of_before_stays_one(monkeypatch):
    gpu = Listing(monkeypatch)
    family = device.Family(gpu)
    gpu.processes = {50: 1000}
    family.read(None, 0.0)
    assert family.read(60, 0.1).others == ((50, 1000),)


@pytest.mark.parametrize(("line", "shared"), [("shared 1", True), ("shared 0", False), ("shared -1", False)])
def test_a_device_whose_memory_is_the_hosts_is_known_by_its_driver(tmp_path, monkeypatch, line, shared):
    monkeypatch.setattr(cuda, "HOLD", says(f"device 0 0 GPU-1 {line}", "context 0 0"))
    card = Cuda.__new__(Cuda)
    card.gpu, card.uuid = Card(Reading(0.0, None, 0), Reading(0.0, 500 * MIB, None)), "GPU-1"
    card.calibrate(tmp_path)
    assert card.gpu.shared is shared


@pytest.mark.parametrize(
    ("line", "first_uuid"),
    [
        ("device 0 0 GPU-263da6ff-9608-67cf-9bce-a8c85c7c1cd0 shared 0", "GPU-263da6ff-9608-67cf-9bce-a8c85c7c1cd0"),
        ("device 100 101 GPU-00000000-0000-0000-0000-000000000000 shared -1", None),
        ("", None),
    ],
)
def test_cuda_is_asked_which_device_it_counts_first(monkeypatch, line, first_uuid):
    monkeypatch.setattr(cuda, "FIRST", [sys.executable, "-c", f"print({line!r})"])
    assert cuda.first_id() == first_uuid


def test_where_there_is_no_cuda_it_says_nothing():
    """The script itself, on a machine without libcuda or without a GPU; with one, it names one."""
    first_uuid = cuda.first_id()
    assert first_uuid is None or first_uuid.startswith("GPU-")


NO_DRIVER = device.NoDriver(
    "no NVIDIA GPU can be used: NVML Shared Library Not Found; check the driver with nvidia-smi"
)
HIDDEN = device.DeviceError("no NVIDIA GPU can be used: CUDA_VISIBLE_DEVICES='' hides every GPU")


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
    """A machine: what its driver answers, and the files by which its GPUs are known."""
    monkeypatch.setattr(gpus, "ROOT", tmp_path)
    monkeypatch.setattr(gpus.sys, "platform", "linux")

    def has(cuda_answers, *files):
        def answer():
            if isinstance(cuda_answers, Exception):
                raise cuda_answers
            return cuda_answers

        monkeypatch.setattr(device, "Cuda", answer)
        for name, text in files:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")

    return has


def pci(vendor, address="0000:01:00.0", kind="0x030000", **more):
    return [(f"sys/bus/pci/devices/{address}/{n}", t) for n, t in {"vendor": vendor, "class": kind, **more}.items()]


LOOPBACK = "measures on loopback, in a second process on this machine's CPU, because "
MACHINES = {
    "no GPU": (NO_DRIVER, [], Build(), "there is no GPU here", None),
    "a server's and a virtual machine's display": (
        NO_DRIVER,
        [*pci("0x1a03"), *pci("0x1af4", "0000:00:03.0")],
        Build(),
        "there is no GPU here",
        None,
    ),
    "an engine without CUDA": (
        Nvidia(),
        [],
        Build(),
        "llama.cpp b1 (PATH) has no CUDA device for the H100; take a build with CUDA: `make engine` where nvcc is, or "
        "MOELIB_LLAMA_CPP, or name `device: loopback`",
        "GPU",
    ),
    "a GPU that the engine has by Vulkan alone": (
        Nvidia(),
        [],
        Build("Vulkan0"),
        "llama.cpp b1 (PATH) has no CUDA device for the H100; take a build with CUDA: `make engine` where nvcc is, or "
        "MOELIB_LLAMA_CPP, or name `device: loopback`",
        "GPU",
    ),
    "a GPU without its driver": (
        NO_DRIVER,
        pci("0x10de", kind="0x030200"),
        Build(),
        f"the driver of the NVIDIA GPU (PCI 0000:01:00.0) does not answer: {NO_DRIVER}",
        "GPU",
    ),
    "a driver that does not answer": (
        NO_DRIVER,
        [("proc/driver/nvidia", "")],
        Build(),
        f"the driver of the NVIDIA GPU (/proc/driver/nvidia) does not answer: {NO_DRIVER}",
        "GPU",
    ),
    "a device file in a container without the library": (
        NO_DRIVER,
        [("dev/nvidia0", "")],
        Build(),
        f"the driver of the NVIDIA GPU (/dev/nvidia0) does not answer: {NO_DRIVER}",
        "GPU",
    ),
    "a GPU that is hidden": (HIDDEN, [], Build("CUDA0"), str(HIDDEN), "GPU"),
    "a GPU of AMD": (
        NO_DRIVER,
        pci("0x1002", mem_info_vram_total=str(24 << 30)),
        Build(),
        "moelib measures NVIDIA GPUs alone, and here is AMD GPU (PCI 0000:01:00.0)",
        "other GPU",
    ),
    "a GPU of AMD that the engine lists": (
        NO_DRIVER,
        pci("0x1002"),
        Build("ROCm0"),
        "moelib measures NVIDIA GPUs alone, and the engine lists ROCm0: a ROCm0 device",
        "other GPU",
    ),
    "a GPU of Apple": (
        NO_DRIVER,
        [],
        Build("MTL0", "BLAS"),
        "moelib measures NVIDIA GPUs alone, and the engine lists MTL0: a MTL0 device",
        "other GPU",
    ),
    "a GPU of Intel beside the CPU's": (
        NO_DRIVER,
        [*pci("0x8086", gpus.INTEL_INTEGRATED), *pci("0x8086", "0000:03:00.0", "0x038000")],
        Build(),
        "moelib measures NVIDIA GPUs alone, and here is Intel GPU (PCI 0000:00:02.0), Intel GPU (PCI 0000:03:00.0)",
        "other GPU",
    ),
    "the CPU's own GPU alone": (
        NO_DRIVER,
        pci("0x8086", gpus.INTEL_INTEGRATED),
        Build(),
        "moelib measures NVIDIA GPUs alone, and here is Intel GPU (PCI 0000:00:02.0)",
        None,
    ),
    "AMD's own GPU alone": (
        NO_DRIVER,
        pci("0x1002", mem_info_vram_total=str(512 << 20)),
        Build(),
        "moelib measures NVIDIA GPUs alone, and here is AMD GPU (PCI 0000:01:00.0)",
        None,
    ),
    "a GPU that no PCI bus shows": (
        NO_DRIVER,
        [("sys/class/drm/card0/device/vendor", "0x1002"), ("sys/class/drm/card0/device/class", "0x030000")],
        Build(),
        "moelib measures NVIDIA GPUs alone, and here is AMD GPU (PCI device)",
        "other GPU",
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_a_gpu_is_never_passed_over_in_silence(machine, name):
    answers, files, build, because, faulty = MACHINES[name]
    machine(answers, *files)
    where = device.choose("auto", build)
    assert (where.kind, where.note) == ("loopback", LOOPBACK + because)
    rows = list(doctor._gpus(build))
    assert [what for what, _, mend in rows if mend] == ([faulty] if faulty else [])
    assert all(mend is None or "\n" not in mend for _, _, mend in rows)


def test_a_gpu_that_is_used_needs_no_note_and_no_cure(machine):
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


def test_the_study_says_it_on_its_first_line(monkeypatch, machine):
    machine(NO_DRIVER)
    monkeypatch.setattr(measure.engine, "find", Build)

    class Auto:
        class parameters:
            device = "auto"

    assert measure.device_note(Auto) == f"{LOOPBACK}there is no GPU here"
    Auto.parameters.device = "loopback"
    assert measure.device_note(Auto) is None
    Auto.parameters.device = "auto"
    monkeypatch.setattr(measure.engine, "find", lambda: (_ for _ in ()).throw(engine.EngineError("none")))
    assert measure.device_note(Auto) is None


@pytest.mark.parametrize(
    ("listed", "others"),
    [
        ({"CUDA0": "H100", "RPC0[127.0.0.1:5]": "r", "BLAS": "OpenBLAS", "CPU": "c"}, set()),
        ({"Vulkan0": "llvmpipe (LLVM 15)"}, set()),
        ({"ROCm0": "gfx1100", "Vulkan0": "RADV", "SYCL0": "Arc", "MTL0": "M2", "CANN0": "910"}, None),
    ],
)
def test_devices_of_other_kinds_are_told_from_cuda_rpc_and_the_cpu(listed, others):
    assert gpus.others(listed).keys() == (listed.keys() if others is None else others)


@pytest.mark.parametrize("text", ["", "-1", "nope"])
def test_a_variable_that_names_nothing_is_said_with_the_cure(monkeypatch, text):
    monkeypatch.setenv(visible.VARIABLE, text)
    monkeypatch.setattr(device, "Gpu", Fails(text))
    with pytest.raises(device.DeviceError, match="no NVIDIA GPU can be used: CUDA_VISIBLE_DEVICES=") as caught:
        Cuda()
    assert not isinstance(caught.value, device.NoDriver)


class Fails:
    """A driver with one card."""

    errors = (visible.NotVisible,)

    def __init__(self, expected):
        self.expected = expected

    def __call__(self, which, ask):
        assert which == self.expected
        visible.first(which, [visible.Card("GPU-1", "H100")], None, ask)


def test_threads_are_counted_when_a_device_is_made(monkeypatch):
    """And not when the library is imported."""
    monkeypatch.setattr(device.process, "usable_cpus", lambda: 7)
    assert device.NoDevice().threads == 7
