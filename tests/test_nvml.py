"""moelib.nvml against a driver library of our own, through the real ctypes path: what each oddity of a driver becomes.

pynvml finds the library by LD_LIBRARY_PATH, which is read when a process starts: this file, run as a program, plays all
scenarios in one process and prints what came out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import pytest

from moelib.buffers import Buffer, Report
from moelib.memory import LEAST_CONTEXT_BYTES, Trace, reconcile
from moelib.nvml import NO_GPU, POWER_CAP, Counters, Gpu, Traffic, slowed

MIB, GIB = 1 << 20, 1 << 30
TOTAL, RESERVED = 80 * GIB, 615 * MIB
CONTEXT, ENGINE, WEIGHTS = 500 * MIB, 4 * GIB, 3 * GIB
PEAK = ENGINE + 620 * MIB  # of the run's processes
OVERHEAD = 9 * MIB  # what a process costs the device beyond what the list says, as recorded on an H200
SERVER, CHILD, HOST_PID, FOREIGN = 411, 412, 70411, 90
UUIDS = ("GPU-263da6ff-9608-67cf-9bce-a8c85c7c1cd0", "GPU-99999999-9608-67cf-9bce-a8c85c7c1cd0")
NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, GPU_IS_LOST, UNKNOWN = 3, 4, 13, 15, 999
MIG = "MIG-41f1b9a8-0000-5c7e-9f3a-77a1c20c7f3e"
DESK = (77, 300 * MIB)


def card(used: int = 0, *lines: str, gpu: int = 0) -> str:
    """A GPU's part of the world: what is in use on the device, and further lines, which stand before the usual ones."""
    usual = [f"uuid {UUIDS[gpu]}", f"name H{gpu}", "driver 580.1", "limit 700000"]
    memory = f"memory {TOTAL} {RESERVED} {TOTAL - RESERVED - used} {used}"
    return "".join(f"{gpu} {line}\n" for line in (*lines, memory, *usual))


def listing(*processes: tuple[int, int | str], kind: str = "compute") -> tuple[str, ...]:
    return tuple(f"{kind} {pid} {size}" for pid, size in processes)


def busy(*processes: tuple[int, int], lines: tuple[str, ...] = (), gpu: int = 0) -> str:
    """A GPU with these processes on it, listed as they are."""
    return card(sum(n for _, n in processes) + OVERHEAD * len(processes), *listing(*processes), *lines, gpu=gpu)


IDLE, RUN = card(), busy((SERVER, PEAK))
LOADING = busy((SERVER, CONTEXT))
ALONE = (FOREIGN, 2 * GIB)


@dataclass
class Scenario:
    """Worlds before, during and after a run, and what its memory must come to: value, status, reasons."""

    during: list[str]
    expect: tuple[int | None, str, tuple[str, ...]]
    before: list[str] = field(default_factory=lambda: [IDLE, IDLE])
    after: list[str] = field(default_factory=lambda: [IDLE])
    ours: tuple[int, ...] = (SERVER,)
    which: str = "0"


def everywhere(during: list[str], expect: tuple, *lines: str, idle: str = IDLE) -> Scenario:
    """The same lines in all of a run's worlds: what this driver cannot do."""
    worlds = [[*("0 " + line + "\n" for line in lines), world] for world in (idle, *during)]
    texts = ["".join(parts) for parts in worlds]
    return Scenario(texts[1:], expect, before=texts[:1] * 2, after=texts[:1])


def skewed(*processes: tuple[int, int]) -> str:
    return busy(*processes, lines=("old-list on",))


def beside(*worlds: str) -> str:
    return "".join(worlds)


BOTH_IDLE = beside(IDLE, card(gpu=1))


def beside_a_desktop(ours: int = 0, moved: int = 0, *further: tuple[int, int]) -> str:
    """A GPU that draws a desktop, with the run's process on it if that holds something."""
    drawing = ((DESK[0], DESK[1] + moved * MIB), *further)
    mine = listing((SERVER, ours)) if ours else ()
    used = ours + sum(n for _, n in drawing)
    return card(used, *mine, *listing(*drawing, kind="graphics"))


def divided(*processes: tuple[int, int]) -> str:
    """A card with MIG on, whose own memory may not be asked for; its list has what its instances run."""
    return card(0, "mig 1", *listing(*processes), f"memory error {NO_PERMISSION}")


def instance(*processes: tuple[int, int]) -> str:
    """An instance of it, which is in no row of cards."""
    world = card(sum(n for _, n in processes), "parent 0", f"uuid {MIG}", *listing(*processes))
    return "".join(f"7{line[1:]}\n" for line in world.splitlines())


def half_full(used: int) -> str:
    """An older driver's memory struct on a card that a run fills to half: total = reserved, free = used = 0 adds up."""
    total = 2 * (RESERVED + PEAK + OVERHEAD)
    return card(0, "old-memory on", f"memory {total} {RESERVED} {total - RESERVED - used} {used}")


WSL = listing((SERVER, "n/a"))
SCENARIOS = {
    "own process": Scenario([LOADING, RUN], (PEAK, "valid", ())),
    "server and child, the child also a little on a second GPU": Scenario(
        [beside(busy((SERVER, PEAK - GIB), (CHILD, GIB)), busy((CHILD, 40 * MIB), gpu=1))],
        (PEAK + 40 * MIB, "valid", ()),
        before=[BOTH_IDLE] * 2,
        after=[BOTH_IDLE],
        ours=(SERVER, CHILD),
    ),
    # the sum is right and the growth of one GPU cannot confirm it
    "server and child, the child on a second GPU": Scenario(
        [beside(busy((SERVER, PEAK)), busy((CHILD, GIB), gpu=1))],
        (None, "invalid", ("accounts-disagree", "above-ceiling")),
        before=[BOTH_IDLE] * 2,
        after=[BOTH_IDLE],
        ours=(SERVER, CHILD),
    ),
    "in the compute and the graphics list": Scenario(
        [card(PEAK + OVERHEAD, *listing((SERVER, PEAK)), *listing((SERVER, PEAK - MIB), kind="graphics"))],
        (PEAK, "valid", ()),
    ),
    "bytes in one list only": Scenario(
        [card(PEAK + OVERHEAD, *listing((SERVER, "n/a")), *listing((SERVER, PEAK), kind="graphics"))],
        (PEAK, "valid", ()),
    ),
    "no graphics list": everywhere([RUN], (PEAK, "valid", ()), f"graphics error {NOT_SUPPORTED}"),
    "host's process ids": Scenario(
        [busy((HOST_PID, CONTEXT)), busy((HOST_PID, PEAK))], (PEAK, "degraded", ("host-pid",))
    ),
    "host's process ids, two processes": Scenario(
        [busy((HOST_PID, PEAK), (HOST_PID + 1, GIB))], (None, "invalid", ("foreign-changed", "process-not-listed"))
    ),
    "empty list": Scenario([card(PEAK + OVERHEAD)], (None, "degraded", ("process-not-listed",))),
    "bytes not told": Scenario(
        [card(PEAK + OVERHEAD, *listing((SERVER, "n/a")))], (PEAK + OVERHEAD, "degraded", ("bytes-not-listed",))
    ),
    "bytes not told, another process there": Scenario(
        [card(PEAK + 2 * GIB, *listing((SERVER, "n/a"), (FOREIGN, "n/a")))],
        (None, "degraded", ("bytes-not-listed", "foreign-process")),
        before=[card(2 * GIB, *listing((FOREIGN, "n/a")))] * 2,
        after=[card(2 * GIB, *listing((FOREIGN, "n/a")))],
    ),
    "0 bytes told": Scenario(
        [card(PEAK + OVERHEAD, *listing((SERVER, 0)))], (PEAK + OVERHEAD, "degraded", ("bytes-not-listed",))
    ),
    "list not supported": everywhere(
        [RUN], (None, "degraded", ("list-unsupported",)), f"compute error {NOT_SUPPORTED}"
    ),
    "a driver without the list's function": everywhere(
        [RUN], (None, "degraded", ("list-unsupported",)), f"compute error {FUNCTION_NOT_FOUND}"
    ),
    "list failing once": Scenario(
        [busy(ALONE, (SERVER, PEAK)), card(0, f"compute error {UNKNOWN}"), busy(ALONE, (SERVER, PEAK))],
        (PEAK, "degraded", ("foreign-process",)),
        before=[busy(ALONE)] * 2,
        after=[busy(ALONE)],
    ),
    "older process struct, ours first": Scenario([skewed((SERVER, PEAK))], (PEAK, "valid", ())),
    "older process struct, ours second": Scenario(
        [skewed(ALONE, (SERVER, PEAK))],
        (None, "invalid", ("foreign-changed", "process-not-listed")),
        before=[skewed(ALONE)] * 2,
        after=[skewed(ALONE)],
    ),
    # the second one's id is the low half of its bytes and its bytes are the third one's id
    "older process struct, three of ours": Scenario(
        [skewed((SERVER, PEAK - 2 * GIB), (CHILD, GIB + 7), (413, GIB))],
        (None, "invalid", ("foreign-changed", "accounts-disagree", "below-engine-buffers", "below-header-weights")),
        ours=(SERVER, CHILD, 413),
    ),
    "older process struct, host's ids and no bytes elsewhere": Scenario(
        [skewed((HOST_PID, PEAK - GIB), (HOST_PID + 1, GIB), (HOST_PID + 2, 7))],
        (None, "invalid", ("foreign-changed", "process-not-listed")),
    ),
    "older memory struct": everywhere([LOADING, RUN], (PEAK, "degraded", ("device-total-unknown",)), "old-memory on"),
    "older memory struct, half full": Scenario(
        [beside(*(f"0 {line}\n" for line in listing((SERVER, PEAK))), half_full(PEAK + OVERHEAD))],
        (PEAK, "degraded", ("device-total-unknown",)),
        before=[half_full(0)] * 2,
        after=[half_full(0)],
    ),
    "memory not supported": everywhere(
        [RUN], (PEAK, "degraded", ("device-total-unknown",)), f"memory error {NOT_SUPPORTED}"
    ),
    "a driver without the memory's function": everywhere(
        [RUN], (PEAK, "degraded", ("device-total-unknown",)), f"memory error {FUNCTION_NOT_FOUND}"
    ),
    "nothing supported": everywhere(
        [RUN],
        (None, "degraded", ("list-unsupported", "device-total-unknown")),
        f"memory error {NOT_SUPPORTED}",
        f"compute error {NOT_SUPPORTED}",
    ),
    "another process joining to stay": Scenario(
        [RUN, busy((SERVER, PEAK), ALONE)], (PEAK, "degraded", ("foreign-process",)), after=[busy(ALONE)]
    ),
    "another process joining, its bytes not told": Scenario(
        [RUN, card(PEAK + 2 * GIB, *listing((SERVER, PEAK), (FOREIGN, "n/a")))],
        (None, "invalid", ("foreign-changed", "accounts-disagree")),
    ),
    "another process on a visit": Scenario(
        [RUN, busy((SERVER, PEAK), ALONE)], (PEAK, "degraded", ("foreign-process",))
    ),
    "another process growing": Scenario(
        [busy((SERVER, PEAK), ALONE), busy((SERVER, PEAK), (FOREIGN, 3 * GIB))],
        (PEAK, "degraded", ("foreign-process",)),
        before=[busy(ALONE)] * 2,
        after=[busy((FOREIGN, 3 * GIB))],
    ),
    "another process keeping still": Scenario(
        [busy(ALONE, (SERVER, CONTEXT)), busy((SERVER, PEAK), ALONE)],
        (PEAK, "degraded", ("foreign-process",)),
        before=[busy(ALONE)] * 2,
        after=[busy(ALONE)],
    ),
    "another process leaving": Scenario(
        [busy(ALONE, (SERVER, CONTEXT)), RUN],
        (PEAK, "degraded", ("foreign-process",)),
        before=[busy(ALONE)] * 2,
    ),
    "GPU lost": Scenario(
        [LOADING, RUN, beside(f"0 handle error {GPU_IS_LOST}\n", RUN)],
        (None, "invalid", ("gpu-lost",)),
        after=[beside(f"0 handle error {GPU_IS_LOST}\n", IDLE)],
    ),
    "unstable baseline": Scenario([RUN], (PEAK, "degraded", ("unseen-change",)), before=[IDLE, card(100 * MIB)]),
    "unstable baseline, and a peak that it does not explain": Scenario(
        [card(PEAK + 200 * MIB, *listing((SERVER, PEAK)))],
        (None, "invalid", ("unstable-baseline",)),
        before=[IDLE, card(100 * MIB)],
    ),
    "memory kept after the end": Scenario([RUN], (PEAK, "degraded", ("unseen-change",)), after=[card(GIB)]),
    "memory kept after the end, list without bytes": Scenario(
        [card(PEAK + OVERHEAD, *listing((SERVER, "n/a")))],
        (PEAK + OVERHEAD, "degraded", ("bytes-not-listed", "unseen-change")),
        after=[card(120 * MIB)],
    ),
    "memory kept after the end, empty list": Scenario(
        [card(PEAK)], (None, "invalid", ("not-returned", "process-not-listed")), after=[card(GIB)]
    ),
    # seen under WSL2: no bytes, and the programs of Windows are not on the list
    "WSL2, a program of Windows on a visit": Scenario(
        [card(900 * MIB + PEAK + 100 * MIB, *listing((SERVER, "n/a"))), card(900 * MIB + PEAK, *WSL)],
        (PEAK + 100 * MIB, "degraded", ("bytes-not-listed",)),
        before=[card(900 * MIB)] * 2,
        after=[card(900 * MIB)],
    ),
    "WSL2, the desktop moving before the run": Scenario(
        [card(900 * MIB + PEAK, *WSL)],
        (PEAK - 20 * MIB, "degraded", ("bytes-not-listed", "unseen-change")),
        before=[card(900 * MIB), card(920 * MIB)],
        after=[card(900 * MIB)],
    ),
    "the host's RAM as the device's": Scenario(
        [card(6 * GIB + PEAK + 9 * GIB, *listing((SERVER, PEAK)))],
        (PEAK, "degraded", ("unseen-change",)),
        before=[card(6 * GIB)] * 2,
        after=[card(15 * GIB)],
    ),
    "memory not told, list without bytes": Scenario(
        [card(0, *WSL, f"memory error {NOT_SUPPORTED}")],
        (None, "degraded", ("bytes-not-listed", "device-total-unknown")),
        before=[card(0, f"memory error {NOT_SUPPORTED}")] * 2,
        after=[card(0, f"memory error {NOT_SUPPORTED}")],
    ),
    "all zeros": Scenario(
        [card(0, *listing((SERVER, PEAK)), "memory 0 0 0 0")],
        (PEAK, "degraded", ("device-total-unknown",)),
        before=[card(0, "memory 0 0 0 0")] * 2,
        after=[card(0, "memory 0 0 0 0")],
    ),
    "all zeros, and an empty list": Scenario(
        [card(0, "memory 0 0 0 0")],
        (None, "degraded", ("process-not-listed", "device-total-unknown")),
        before=[card(0, "memory 0 0 0 0")] * 2,
        after=[card(0, "memory 0 0 0 0")],
    ),
    "a total that stays 0": Scenario(
        [card(0, *listing((SERVER, PEAK)))], (PEAK, "degraded", ("device-total-unknown",))
    ),
    "managed memory: the list knows the context alone": Scenario(
        [card(PEAK, *listing((SERVER, CONTEXT)))],
        (None, "invalid", ("accounts-disagree", "below-engine-buffers", "below-header-weights")),
    ),
    "MIG: the whole card's memory not permitted": everywhere(
        [RUN], (PEAK, "degraded", ("device-total-unknown",)), f"memory error {NO_PERMISSION}"
    ),
    "MPS: its server's process stays": Scenario(
        [busy((500, 30 * MIB), (SERVER, PEAK))],
        (PEAK, "degraded", ("foreign-process",)),
        before=[busy((500, 30 * MIB))] * 2,
        after=[busy((500, 30 * MIB))],
    ),
    **{
        f"a desktop that moves by {moved} MiB": Scenario(
            [beside_a_desktop(PEAK), beside_a_desktop(PEAK, moved), beside_a_desktop(PEAK)],
            (PEAK, "valid", ()),
            before=[beside_a_desktop()] * 2,
            after=[beside_a_desktop()],
        )
        for moved in (0, 20, 60, 2000)
    },
    "a desktop that computes too": Scenario(
        [card(300 * MIB + PEAK, *listing((SERVER, PEAK), DESK), *listing(DESK, kind="graphics"))],
        (PEAK, "degraded", ("foreign-process",)),
        before=[card(300 * MIB, *listing(DESK), *listing(DESK, kind="graphics"))] * 2,
        after=[card(300 * MIB, *listing(DESK), *listing(DESK, kind="graphics"))],
    ),
    "a browser's process comes and goes": Scenario(
        [beside_a_desktop(PEAK), beside_a_desktop(PEAK, 0, (78, 40 * MIB))],
        (PEAK, "valid", ()),
        before=[beside_a_desktop()] * 2,
        after=[beside_a_desktop()],
    ),
    "an instance of MIG": Scenario(
        [beside(divided((SERVER, PEAK)), instance((SERVER, PEAK)))],
        (PEAK, "valid", ()),
        before=[beside(divided(), instance())] * 2,
        after=[beside(divided(), instance())],
        which=MIG,
    ),
    "memory unknown after the end": Scenario(
        [RUN], (PEAK, "degraded", ("device-total-unknown",)), after=[card(0, f"memory error {UNKNOWN}")]
    ),
    "another GPU busy": Scenario(
        [beside(RUN, busy((FOREIGN, 9 * GIB), gpu=1))],
        (PEAK, "valid", ()),
        before=[BOTH_IDLE] * 2,
        after=[beside(IDLE, busy((FOREIGN, GIB), gpu=1))],
    ),
    "another GPU lost on the way": Scenario(
        [beside(RUN, card(0, f"handle error {GPU_IS_LOST}", gpu=1))],
        (PEAK, "valid", ()),
        before=[BOTH_IDLE] * 2,
        after=[beside(IDLE, card(0, f"handle error {GPU_IS_LOST}", gpu=1))],
    ),
    "another GPU lost from the start": Scenario(
        [beside(card(0, f"handle error {GPU_IS_LOST}"), busy((SERVER, PEAK), gpu=1))],
        (PEAK, "valid", ()),
        before=[beside(card(0, f"handle error {GPU_IS_LOST}"), card(gpu=1))] * 2,
        after=[beside(card(0, f"handle error {GPU_IS_LOST}"), card(gpu=1))],
        which="1",
    ),
    "the second GPU by the start of its id": Scenario(
        [beside(IDLE, busy((SERVER, PEAK), gpu=1))],
        (PEAK, "valid", ()),
        before=[BOTH_IDLE] * 2,
        after=[BOTH_IDLE],
        which="GPU-9999",
    ),
}
"""Name -> worlds and outcome. `0 handle error` stands before everything else of its GPU."""

COUNTERS = (
    *("energy 123456", "power 350500", "clock1 1980", "clock2 2619", "field198 1000", "field197 2000"),
    *("buswidth 6144", "maxclock1 1980", "maxclock2 3201"),
    f"events {0x8 | 0x40 | POWER_CAP}",
)
STARTS = {
    "all counters": (card(0, *COUNTERS), "0"),
    "few counters": (card(0, "power 350500", f"energy error {FUNCTION_NOT_FOUND}"), "0"),
    "older memory struct": (card(0, "old-memory on"), "0"),
    "unknown id": (IDLE, "GPU-00000000"),
    "unknown index": (IDLE, "2"),
    "hidden from CUDA": (IDLE, ""),
    "lost": (card(0, f"handle error {GPU_IS_LOST}"), "0"),
    "no GPU": ("", "0"),
    "divided by MIG": (card(0, "mig 1"), "0"),
    "unknown instance": (IDLE, MIG),
    **{
        f"link {generation} x{width}": (
            card(0, f"maxgen {generation}", f"maxwidth {width}", "nowgen 1", "nowwidth 8"),
            "0",
        )
        for generation, width in (
            (1, 16),
            (2, 16),
            (3, 16),
            (4, 16),
            (4, 8),
            (5, 16),
            (6, 16),
            (7, 16),
            (8, 16),
            (0, 16),
        )
    },
}
"""Name -> the world in which a GPU is asked for, and which."""


def play(world: Path) -> dict:
    """Play everything against the library that pynvml finds; `world` is the file that it reads."""

    def start(text: str, which: str) -> Gpu:
        world.write_text(text, encoding="utf-8")
        return Gpu(which)

    def scenario(s: Scenario) -> dict:
        gpu = start(s.before[0], s.which)

        def look(texts: list[str], ours: tuple[int, ...]) -> tuple:
            return tuple((world.write_text(text, encoding="utf-8"), gpu.read(set(ours), 0.5))[1] for text in texts)

        trace = Trace(look(s.before, ()), look(s.during, s.ours), look(s.after, s.ours))
        report = Report((Buffer("CUDA0", "model", WEIGHTS), Buffer("CUDA0", "KV", ENGINE - WEIGHTS)), 1, 1, (2,))
        return asdict(reconcile("cuda", trace, report.device_by_kind, report.pinned_bytes, WEIGHTS, CONTEXT))

    def started(text: str, which: str) -> dict:
        try:
            gpu = start(text, which)
        except Gpu.errors as err:
            return {"error": str(err)}
        values = {
            "uuid": gpu.uuid,
            "name": gpu.name,
            "absent": gpu.absent,
            "facts": gpu.facts(),
            "energy": gpu.energy(),
        }
        return {**values, "counters": asdict(gpu.counters(1.5))}

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
    env = {**os.environ, "LD_LIBRARY_PATH": str(folder), "FAKE_NVML": str(folder / "world")}
    done = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=60, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_oddity_of_a_driver_comes_to_what_can_be_proven(played, name):
    m, (value, status, reasons) = played["scenarios"][name], SCENARIOS[name].expect
    assert (m["value_bytes"], m["status"], tuple(m["reasons"])) == (value, status, reasons)


def test_a_handful_of_bytes_or_zero_never_comes_out_as_the_runs_memory(played):
    for m in played["scenarios"].values():
        values = [r["process_bytes"] for phase in ("before", "during", "after") for r in m["trace"][phase]]
        assert all(n is None or n >= LEAST_CONTEXT_BYTES for n in values)
        assert m["value_bytes"] is None or m["value_bytes"] >= ENGINE + LEAST_CONTEXT_BYTES
        assert (m["status"] == "valid") == (not m["reasons"])
        assert m["status"] != "invalid" or m["value_bytes"] is None


def test_the_list_sums_the_process_tree_over_all_gpus(played):
    m = played["scenarios"]["server and child, the child on a second GPU"]
    assert (m["process_bytes"], m["growth_bytes"]) == (PEAK + GIB, PEAK + OVERHEAD)


def test_readings_tell_others_apart_from_ours_and_what_failed(played):
    during = {name: m["trace"]["during"][-1] for name, m in played["scenarios"].items()}
    assert during["another process keeping still"]["others"] == [[FOREIGN, 2 * GIB]]
    assert during["another GPU busy"]["others"] == []
    assert during["older process struct, three of ours"]["others"] == [[0, None], [GIB + 7, 413]]  # a handful
    assert during["older memory struct"]["errors"] == ["memory-unsupported"]
    assert during["older memory struct"]["device_bytes"] is None
    assert during["GPU lost"]["errors"] == ["gpu-lost"]
    assert during["another GPU lost on the way"]["errors"] == []
    assert during["list not supported"]["errors"] == ["list-unsupported"]


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
        ("unknown id", f"CUDA_VISIBLE_DEVICES='GPU-00000000': GPU-00000000 is the id of none (here are 0: {UUIDS[0]})"),
        ("unknown index", f"CUDA_VISIBLE_DEVICES='2': there is no GPU 2; here are 0: {UUIDS[0]}"),
        (
            "hidden from CUDA",
            f"CUDA_VISIBLE_DEVICES='' hides every GPU (here are 0: {UUIDS[0]}); unset it, or name one",
        ),
        ("lost", "GPU is lost"),
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


def test_a_counter_that_turns_over_is_followed_as_long_as_no_turn_can_go_unseen():
    values = iter([[2**32 - 5, 0], [10, 7], [2**31, 7], [0, 8], [1, 9]])
    traffic = Traffic(2**32, lambda: next(values))  # a turn takes a second at the very least
    for t in (0.0, 0.5, 0.9):
        traffic.look(t)
    assert traffic.totals == [15 + 2**31 - 10, 7]
    assert traffic.absent() == {}
    traffic.look(2.0)
    assert traffic.totals is None
    assert "ms apart, and the counter can turn over in 1000 ms" in traffic.absent()["received_bytes"]
    traffic.look(2.1)
    assert traffic.totals is None


def test_a_counter_that_is_not_there_counts_nothing():
    traffic = Traffic(1.0, lambda: [None, 3])
    assert traffic.absent()["sent_bytes"] == "it was looked at only once"
    traffic.look(0.0)
    assert traffic.totals is None
    assert traffic.absent() == dict.fromkeys(("received_bytes", "sent_bytes"), "the driver did not answer")


@pytest.mark.parametrize("bytes_per_s", [None, 0.0])
def test_of_a_link_that_is_not_known_nothing_is_counted(bytes_per_s):
    traffic = Traffic(bytes_per_s, lambda: [1, 1])
    for t in (0.0, 0.01):
        traffic.look(t)
    assert traffic.totals is None


def test_one_look_counts_nothing_and_that_is_not_0():
    traffic = Traffic(1.0, lambda: [1, 1])
    assert traffic.totals is None
    traffic.look(0.0)
    assert traffic.totals is None
    traffic.look(1.0)
    assert traffic.totals == [0, 0]


def test_of_an_instance_of_mig_the_whole_cards_list_is_not_counted_again(played):
    m = played["scenarios"]["an instance of MIG"]
    assert m["process_bytes"] == PEAK


def test_what_may_be_off_says_by_how_much(played):
    for name, m in played["scenarios"].items():
        if m["bound_bytes"] is not None:
            assert abs(m["value_bytes"] - PEAK) <= m["bound_bytes"], name
        assert (m["bound_bytes"] is None) == (m["value_bytes"] is None or m["method"] != "nvml-growth")
