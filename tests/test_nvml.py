"""moelib.nvml against a driver library of our own, through the real ctypes path: what each oddity of a driver becomes.

pynvml finds the library by LD_LIBRARY_PATH, which is read when a process starts: this file, run as a program, plays all
scenarios in one process and prints the readings. What a run's memory is by its readings is tested in test_memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from pynvml import nvmlClocksEventReasonSwPowerCap as POWER_CAP

from moelib.machine.gpus import Shown
from moelib.measure.memory import Reading
from moelib.measure.nvml import NO_GPU, Counters, Gpu, Traffic, slowed

MIB, GIB = 1 << 20, 1 << 30
TOTAL, RESERVED = 80 * GIB, 615 * MIB
PEAK = 5 * GIB  # of the run's process
SERVER, CHILD, HOST_PID, FOREIGN, DESKTOP = 411, 412, 70411, 90, 77
UUIDS = ("GPU-263da6ff-9608-67cf-9bce-a8c85c7c1cd0", "GPU-99999999-9608-67cf-9bce-a8c85c7c1cd0")
NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, GPU_IS_LOST, UNKNOWN = 3, 4, 13, 15, 999
MIG = "MIG-41f1b9a8-0000-5c7e-9f3a-77a1c20c7f3e"


def card(used: int = 0, *lines: str, gpu: int = 0) -> str:
    """A GPU's part of the world: what is in use on the device, and further lines, which stand before the usual ones."""
    usual = [f"uuid {UUIDS[gpu]}", f"name H{gpu}", "driver 580.1", "limit 700000"]
    memory = f"memory {TOTAL} {RESERVED} {TOTAL - RESERVED - used} {used}"
    return "".join(f"{gpu} {line}\n" for line in (*lines, memory, *usual))


def listing(*processes: tuple[int, int | str], kind: str = "compute") -> tuple[str, ...]:
    return tuple(f"{kind} {pid} {size}" for pid, size in processes)


def full(*processes: tuple[int, int | str], lines: tuple[str, ...] = (), gpu: int = 0) -> str:
    """A GPU with PEAK in use and these processes in its list of computing ones."""
    return card(PEAK, *lines, *listing(*processes), gpu=gpu)


def instance(*processes: tuple[int, int]) -> str:
    """A card with MIG on, whose own memory may not be asked for, and an instance of it, which is in no row of cards.

    The card's list has what its instances run.
    """
    whole = card(0, "mig 1", *listing(*processes), f"memory error {NO_PERMISSION}")
    world = card(PEAK, "parent 0", f"uuid {MIG}", *listing(*processes))
    return whole + "".join(f"7{line[1:]}\n" for line in world.splitlines())


def reading(
    process: int | None, device: int | None = PEAK, *errors: str, listed: bool = True, others=(), drawing=()
) -> Reading:
    return Reading(0.5, process, device, listed, others, errors, drawing)


def unread(process: int | None, *errors: str, listed: bool = True) -> Reading:
    return reading(process, None, *errors, listed=listed)


IDLE, OURS, LOST = card(), (SERVER, PEAK), f"0 handle error {GPU_IS_LOST}\n"
IDLE_BOTH = IDLE + card(gpu=1)
NO_MEMORY, NO_LIST = "memory-unsupported", "list-unsupported"


@dataclass
class Scenario:
    """What the driver says, and the reading that it becomes."""

    world: str
    expected: Reading
    start: str = IDLE
    """The world in which the GPU is opened."""
    ours: tuple[int, ...] = (SERVER,)
    first: str | None = UUIDS[0]
    """The device that CUDA counts first."""
    shared: bool = False


def half_full() -> str:
    """An older driver's memory struct on a card that a run fills to half: total = reserved, free = used = 0 adds up."""
    total = 2 * (RESERVED + PEAK)
    return card(0, "old-memory on", f"memory {total} {RESERVED} {total - RESERVED - PEAK} {PEAK}", *listing(OURS))


SCENARIOS = {
    "own process": Scenario(full(OURS), reading(PEAK)),
    "server and child": Scenario(full((SERVER, 4 * GIB), (CHILD, GIB)), reading(PEAK), ours=(SERVER, CHILD)),
    "server, and child on both GPUs": Scenario(
        full((SERVER, 4 * GIB), (CHILD, GIB)) + card(GIB, *listing((CHILD, GIB)), gpu=1),
        reading(PEAK + GIB),
        start=IDLE_BOTH,
        ours=(SERVER, CHILD),
    ),
    "child on another GPU, its bytes not given": Scenario(
        full(OURS) + card(GIB, *listing((CHILD, "n/a")), gpu=1),
        reading(None),
        start=IDLE_BOTH,
        ours=(SERVER, CHILD),
    ),
    "another process": Scenario(full((FOREIGN, GIB), OURS), reading(PEAK, others=((FOREIGN, GIB),))),
    "another GPU busy": Scenario(full(OURS) + card(GIB, *listing((FOREIGN, GIB)), gpu=1), reading(PEAK), IDLE_BOTH),
    "another GPU lost during the run": Scenario(
        full(OURS) + card(0, f"handle error {GPU_IS_LOST}", gpu=1), reading(PEAK), IDLE_BOTH
    ),
    "another GPU lost from the start": Scenario(
        LOST + full(OURS, gpu=1), reading(PEAK), start=LOST + card(gpu=1), first=UUIDS[1]
    ),
    "the second GPU": Scenario(IDLE + full(OURS, gpu=1), reading(PEAK), start=IDLE_BOTH, first=UUIDS[1]),
    # the two lists
    "in the compute and the graphics list": Scenario(
        full(OURS, lines=listing((SERVER, PEAK - MIB), kind="graphics")), reading(PEAK)
    ),
    "bytes in one list only": Scenario(full((SERVER, "n/a"), lines=listing(OURS, kind="graphics")), reading(PEAK)),
    "no graphics list": Scenario(full(OURS, lines=(f"graphics error {NOT_SUPPORTED}",)), reading(PEAK)),
    "a desktop": Scenario(
        full(OURS, lines=listing((DESKTOP, MIB), kind="graphics")),
        reading(PEAK, others=((DESKTOP, MIB),), drawing=(DESKTOP,)),
    ),
    "a desktop that computes too": Scenario(
        full(OURS, (DESKTOP, MIB), lines=listing((DESKTOP, MIB), kind="graphics")),
        reading(PEAK, others=((DESKTOP, MIB),)),
    ),
    "the run draws too": Scenario(full(lines=listing(OURS, kind="graphics")), reading(PEAK)),
    # what the list does not tell
    "host's process ids": Scenario(full((HOST_PID, PEAK)), reading(None, listed=False, others=((HOST_PID, PEAK),))),
    "empty list": Scenario(full(), reading(None, listed=False)),
    "bytes not given": Scenario(full((SERVER, "n/a")), reading(None)),
    "0 bytes": Scenario(full((SERVER, 0)), reading(None)),
    **{
        f"list error {code}": Scenario(
            full(lines=(f"compute error {code}",)), reading(None, PEAK, NO_LIST, listed=False)
        )
        for code in (NOT_SUPPORTED, FUNCTION_NOT_FOUND, UNKNOWN)
    },
    "older process struct": Scenario(full(OURS, lines=("old-list on",)), reading(PEAK)),
    # the second one's id is the low half of its bytes and its bytes are the third one's id
    "older process struct, three processes": Scenario(
        full((SERVER, 4 * GIB), (CHILD, GIB + 7), (413, GIB), lines=("old-list on",)),
        reading(4 * GIB, others=((0, None), (GIB + 7, 413))),
        ours=(SERVER, CHILD, 413),
    ),
    # the device's memory
    "older memory struct": Scenario(full(OURS, lines=("old-memory on",)), unread(PEAK, NO_MEMORY)),
    "older memory struct, half full": Scenario(half_full(), reading(PEAK, 0)),  # memory takes 0 for a failed reading
    "all zeros": Scenario(full(OURS, lines=("memory 0 0 0 0",)), unread(PEAK, NO_MEMORY)),
    **{
        f"memory error {code}": Scenario(full(OURS, lines=(f"memory error {code}",)), unread(PEAK, NO_MEMORY))
        for code in (NOT_SUPPORTED, FUNCTION_NOT_FOUND, NO_PERMISSION, UNKNOWN)
    },
    "nothing supported": Scenario(
        card(0, f"memory error {NOT_SUPPORTED}", f"compute error {NOT_SUPPORTED}"),
        unread(None, NO_LIST, NO_MEMORY, listed=False),
    ),
    "the host's RAM as the device's": Scenario(full(OURS), unread(PEAK, "memory-shared"), shared=True),
    "GPU lost": Scenario(LOST + full(OURS), unread(None, "gpu-lost", listed=False)),
    # the card's list has the process too, and it is not counted again
    "an instance of MIG": Scenario(instance(OURS), reading(PEAK), start=instance(), first=MIG),
}
"""Name -> world and reading. `0 handle error` stands before everything else of its GPU."""

COUNTERS = (
    *("energy 123456", "power 350500", "clock1 1980", "clock2 2619", "field198 1000", "field197 2000"),
    *("buswidth 6144", "maxclock1 1980", "maxclock2 3201"),
    f"events {0x8 | 0x40 | POWER_CAP}",
)
STARTS = {
    "all counters": (card(0, *COUNTERS), UUIDS[0]),
    "few counters": (card(0, "power 350500", f"energy error {FUNCTION_NOT_FOUND}"), UUIDS[0]),
    "older memory struct": (card(0, "old-memory on"), UUIDS[0]),
    "hidden from CUDA": (IDLE, None),
    "no GPU": ("", None),
    "divided by MIG": (card(0, "mig 1"), UUIDS[0]),
    "unknown instance": (IDLE, MIG),
    **{
        f"link {generation} x{width}": (
            card(0, f"maxgen {generation}", f"maxwidth {width}", "nowgen 1", "nowwidth 8"),
            UUIDS[0],
        )
        for generation, width in (*((g, 16) for g in range(9)), (4, 8))
    },
}
"""Name -> the world in which a GPU is opened, and the device that CUDA counts first."""


def play(world: Path) -> dict:
    """Play everything against the library that pynvml finds; `world` is the file that it reads."""

    def start(text: str, first: str | None, shared: bool = False) -> Gpu:
        world.write_text(text, encoding="utf-8")
        return Gpu(lambda: first and Shown(first.partition("-")[2], shared))

    def scenario(s: Scenario) -> dict:
        gpu = start(s.start, s.first, s.shared)
        world.write_text(s.world, encoding="utf-8")
        return asdict(gpu.read(set(s.ours), 0.5))

    def started(text: str, first: str | None) -> dict:
        try:
            gpu = start(text, first)
        except Gpu.errors as err:
            return {"error": str(err)}
        values = {name: getattr(gpu, name) for name in ("uuid", "name", "absent", "usable_bytes")}
        return {**values, "facts": gpu.facts(), "energy": gpu.energy(), "counters": asdict(gpu.counters(1.5))}

    return {
        "scenarios": {name: scenario(s) for name, s in SCENARIOS.items()},
        "starts": {name: started(*s) for name, s in STARTS.items()},
    }


if __name__ == "__main__":
    print(json.dumps(play(Path(os.environ["FAKE_NVML"]))))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("nvml")
    compiler = next(filter(None, map(shutil.which, ("cc", "c++", "g++"))), None)
    if compiler is None:
        pytest.fail("no C or C++ compiler (cc, c++, g++): the fake driver cannot be built; apt-get install g++")
    source, library = Path(__file__).with_name("fake_nvml.c"), folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    env = {**os.environ, "LD_LIBRARY_PATH": str(folder), "FAKE_NVML": str(folder / "world"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=60, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_oddity_of_a_driver_becomes_a_reading_without_a_guess(played, name):
    assert TypeAdapter(Reading).validate_python(played["scenarios"][name]) == SCENARIOS[name].expected


def test_counters_are_in_the_units_of_their_names(played):
    values = played["starts"]["all counters"]
    assert values["counters"] == {
        "t_s": 1.5,
        "energy_joule": 123.456,
        "pcie_rx_bytes": 1000,
        "pcie_tx_bytes": 2000,
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": 2619,
        "power_watt": 350.5,
        "events": 0x8 | 0x40 | POWER_CAP,
    }
    assert values["absent"] == {}
    assert values["usable_bytes"] == TOTAL - RESERVED
    assert values["energy"] == 123.456
    assert (values["uuid"], values["name"]) == (UUIDS[0], "H0")
    assert values["facts"] == {
        "total_bytes": TOTAL,
        "driver": "580.1",
        "power_limit_watt": 700.0,
        "max_sm_clock_mhz": 1980,
        "bandwidth_bytes_per_s": 4_916_736_000_000.0,  # 3201 MHz, 2 transfers, 6144 bit
        "pcie_bytes_per_s": None,  # this driver does not say
        "pcie_link": None,
        "pcie_link_now": None,
    }


def test_a_counter_that_is_not_there_is_none_and_says_why(played):
    values = played["starts"]["few counters"]
    expected = {"power_watt": 350.5, "t_s": 1.5}
    assert values["counters"] == {f.name: expected.get(f.name) for f in fields(Counters)}
    assert values["absent"] == {
        name: "Function Not Found" if name == "energy_joule" else "Not Supported"
        for name in NO_GPU
        if name != "power_watt"
    }
    assert values["energy"] is None


def test_a_size_from_another_versions_struct_is_not_believed(played):
    assert played["starts"]["older memory struct"]["facts"]["total_bytes"] is None
    assert played["starts"]["older memory struct"]["usable_bytes"] is None


@pytest.mark.parametrize(
    ("link", "gigabytes_per_s"),
    [
        # 8 of 10 bits up to generation 2, 128 of 130 from 3 on, 242 of 256 bytes from 6 on
        ("1 x16", 4.0),
        ("2 x16", 8.0),
        ("3 x16", 15.754),
        ("4 x16", 31.508),
        ("4 x8", 15.754),
        ("5 x16", 63.015),
        ("6 x16", 121.0),
        ("7 x16", 242.0),
        ("8 x16", None),  # not known is not guessed
        ("0 x16", None),
    ],
)
def test_a_link_carries_what_its_line_code_leaves(played, link, gigabytes_per_s):
    facts = played["starts"][f"link {link}"]["facts"]
    generation, width = map(int, link.split(" x"))
    assert facts["pcie_bytes_per_s"] == (gigabytes_per_s and pytest.approx(gigabytes_per_s * 1e9, rel=1e-4))
    assert facts["pcie_link"] == ([generation, width] if generation else None)
    assert facts["pcie_link_now"] == [1, 8]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (
            "hidden from CUDA",
            f"CUDA_VISIBLE_DEVICES='' shows CUDA no GPU (here are {UUIDS[0]}); unset it, or name one by its id",
        ),
        ("no GPU", "the driver lists no GPU"),
        (
            "divided by MIG",
            f"{UUIDS[0]} is divided into MIG instances: name one of those that nvidia-smi -L lists, "
            "CUDA_VISIBLE_DEVICES=MIG-...",
        ),
        ("unknown instance", f"{MIG} is no MIG instance here (Not Found); nvidia-smi -L lists them"),
    ],
)
def test_a_gpu_that_is_not_there_is_an_error_that_says_so(played, name, error):
    assert played["starts"][name] == {"error": error}


def test_a_power_cap_is_no_slowdown_and_heat_is_one():
    assert slowed(0x8 | 0x40 | POWER_CAP) == ("hw-slowdown", "hw-thermal")
    assert slowed(0x80 | 0x20) == ("hw-power-brake", "sw-thermal")
    assert slowed(POWER_CAP) == slowed(0) == slowed(None) == ()


def test_a_counter_that_turns_over_is_followed_as_long_as_no_turn_can_be_missed():
    values = iter([[2**32 - 5, 0], [10, 7], [2**31, 7], [0, 8], [1, 9]])
    traffic = Traffic(2**32, lambda: next(values))  # a turn takes a second at least
    for t_s in (0.0, 0.5, 0.9):
        traffic.look(t_s)
    assert traffic.totals == [15 + 2**31 - 10, 7]
    assert traffic.absent() == {}
    for t_s in (2.0, 2.1):
        traffic.look(t_s)
        assert traffic.totals is None
    assert "ms apart, and the counter can turn over in 1000 ms" in traffic.absent()["received_bytes"]


@pytest.mark.parametrize(
    ("bytes_per_s", "value", "totals", "reason"),
    [
        (1.0, [1, 1], [0, 0], None),
        (1.0, [None, 3], None, "the driver did not answer"),
        (None, [1, 1], None, "two looks were 10 ms apart"),  # of an unknown link, any gap is too long
        (0.0, [1, 1], None, "two looks were 10 ms apart"),
    ],
)
def test_one_reading_counts_nothing_which_is_not_0(bytes_per_s, value, totals, reason):
    traffic = Traffic(bytes_per_s, lambda: value)
    assert traffic.absent()["sent_bytes"] == "it was looked at only once"
    traffic.look(0.0)
    assert traffic.totals is None
    traffic.look(0.01)
    assert traffic.totals == totals
    assert traffic.absent().get("sent_bytes", "").startswith(reason or "")
