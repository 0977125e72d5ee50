"""The cluster of other tests does what a real one does: it requeues, signals, loses nodes; and it leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import cluster
import machines
import pytest
from cluster import Cluster
from machines import MachineError, until

if why := cluster.missing():
    pytest.skip(why, allow_module_level=True)

KILL_WAIT_S = 3
SIGNALLED = """
import os, signal, subprocess, sys, time
role, folder, ends = sys.argv[1], sys.argv[2], sys.argv[3] == "ends"
if os.path.exists(os.path.join(folder, role)):
    sys.exit(print(role, "again", flush=True))
def on(*_):
    print(role, "SIGTERM", flush=True)
    if role == "leader" and ends:
        time.sleep(0.5)
        print(role, "ends", flush=True)
        sys.exit(75)
signal.signal(signal.SIGTERM, on)
if role == "leader":
    subprocess.Popen([sys.executable, __file__, "child", *sys.argv[2:]], start_new_session=True)
open(os.path.join(folder, role), "w").close()
while True:
    time.sleep(0.1)
"""
"""The job's process, which ends after SIGTERM if told so, and a child in a session of its own, which never does."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory):
    with Cluster(tmp_path_factory.mktemp("slurm"), kill_wait_s=KILL_WAIT_S) as c:
        yield c
    assert left(c) == []


@pytest.fixture(autouse=True)
def idle(slurm: Cluster):
    """Each test begins without jobs, whatever has failed before it."""
    yield
    slurm.run(["scancel", "--partition=main"])
    until(lambda: not slurm.run(["squeue", "--noheader"]), 30, lambda: slurm.run(["squeue"]))


def left(c: Cluster) -> list[Path]:
    """What of the cluster is left of namespaces and cgroups."""
    mine = f"moelib-{os.getpid()}-*"
    return [*machines.NETNS.glob(mine), *machines.FREEZER.glob(mine)]


def program(folder: Path, then: str, start: str = "exec") -> str:
    """The lines of a script that start SIGNALLED."""
    folder.mkdir()
    path = folder / "signalled.py"
    path.write_text(SIGNALLED, encoding="utf-8")
    return f"{start} {sys.executable} {path} leader {folder} {then}"


def started(folder: Path) -> None:
    until((folder / "child").exists, 20, lambda: "the job's processes have not started")


def told(slurm: Cluster, job: int, role: str) -> list[str]:
    """What a process of the job wrote."""
    return [line for line in slurm.output(job).splitlines() if line.startswith(role)]


def test_two_jobs_run_at_once_on_two_machines_that_share_a_folder(slurm, tmp_path):
    job = f"""#!{sys.executable}
import os, pathlib, socket, time
name = socket.gethostname()
server = socket.create_server(("127.0.0.1", 8080))  # the same port on each, as each has its loopback device
boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
pathlib.Path({str(tmp_path)!r}, name).touch()
while len(os.listdir({str(tmp_path)!r})) < 2:
    time.sleep(0.1)
print(name, socket.gethostbyname(name), boot)
"""
    jobs = [slurm.submit(job) for _ in range(2)]
    assert [slurm.wait(j, {"COMPLETED", "FAILED"}, 20) for j in jobs] == ["COMPLETED"] * 2
    first, second = (slurm.output(j).split() for j in jobs)
    assert {first[0], second[0]} == {"node1", "node2"}
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_exit_code_75_and_scontrol_requeue_start_a_job_again(slurm, tmp_path):
    by_code = slurm.submit(f"test -e {tmp_path}/once || {{ touch {tmp_path}/once; exit 75; }}; exit 3")
    by_command = slurm.submit(f"test -e {tmp_path}/two && exit 0; touch {tmp_path}/two; exec sleep 60")
    until((tmp_path / "two").exists, 20, lambda: slurm.output(by_command))
    slurm.run(["scontrol", "requeue", str(by_command)])
    assert slurm.wait(by_code, {"COMPLETED", "FAILED"}, 30, restarts=1) == "FAILED"
    assert slurm.show(by_code)["ExitCode"] == "3:0"
    assert slurm.wait(by_command, {"COMPLETED", "FAILED"}, 30, restarts=1) == "COMPLETED"


def test_a_job_of_a_node_that_dies_runs_on_the_other(slurm, tmp_path):
    job = slurm.submit(f"hostname; test -e {tmp_path}/once && exit 0; touch {tmp_path}/once; exec sleep 300")
    until((tmp_path / "once").exists, 20, lambda: slurm.output(job))
    lost = int(slurm.show(job)["BatchHost"].removeprefix("node"))
    assert slurm.pids(lost)
    slurm.kill_node(lost)
    assert not slurm.pids(lost)
    assert slurm.wait(job, {"COMPLETED", "FAILED"}, 60, restarts=1) == "COMPLETED"
    assert slurm.output(job).split() == [f"node{lost}", f"node{3 - lost}"]
    assert slurm.node(lost)["State"].startswith("DOWN")
    slurm.start_node(lost)
    assert slurm.node(lost)["State"] == "IDLE"


def test_a_job_has_time_to_end_after_a_time_limit_and_scancel(slurm, tmp_path):
    """A child is signalled by linuxproc alone. Exit code 75 requeues after a time limit, and not after scancel."""
    limited, cancelled = tmp_path / "limited", tmp_path / "cancelled"
    at_limit, by_scancel = (slurm.submit(program(f, "ends"), "--time=10") for f in (limited, cancelled))
    started(limited)
    started(cancelled)
    slurm.expire(at_limit)
    slurm.run(["scancel", str(by_scancel)])
    assert slurm.wait(by_scancel, {"CANCELLED", "FAILED", "PENDING"}, 20) == "CANCELLED"
    assert slurm.wait(at_limit, {"COMPLETED", "FAILED", "TIMEOUT"}, 60, restarts=1) == "COMPLETED"
    assert told(slurm, by_scancel, "leader") == ["leader SIGTERM", "leader ends"]
    assert told(slurm, at_limit, "leader") == ["leader SIGTERM", "leader ends", "leader again"]
    for job in (by_scancel, at_limit):
        assert told(slurm, job, "child") == (["child SIGTERM"] if slurm.tracking == "linuxproc" else [])


def test_what_ignores_sigterm_is_killed_after_the_grace(slurm, tmp_path):
    job = slurm.submit(program(tmp_path / "job", "stays"))
    started(tmp_path / "job")
    begun = time.monotonic()
    slurm.run(["scancel", str(job)])
    assert slurm.wait(job, {"CANCELLED"}, 30) == "CANCELLED"
    assert KILL_WAIT_S - 1 < time.monotonic() - begun < KILL_WAIT_S + 15
    assert told(slurm, job, "leader") == ["leader SIGTERM"]


def test_scancel_with_a_signal_reaches_steps_and_with_batch_the_script_alone(slurm, tmp_path):
    script = slurm.submit(program(tmp_path / "script", "stays"))
    step = slurm.submit(f"trap '' TERM\n{program(tmp_path / 'step', 'stays', 'srun')}")
    started(tmp_path / "script")
    started(tmp_path / "step")
    for job, unheard, heard in ((script, [], ["--batch"]), (step, ["--batch"], [])):
        slurm.run(["scancel", "--signal=TERM", *unheard, str(job)])
        time.sleep(1)
        assert told(slurm, job, "leader") == []
        slurm.run(["scancel", "--signal=TERM", *heard, str(job)])
        until(lambda j=job: told(slurm, j, "leader") == ["leader SIGTERM"], 10, lambda j=job: slurm.output(j))
        assert slurm.state(job) == "RUNNING"


@pytest.mark.parametrize("seconds", [3600, -3600])
def test_a_nodes_jobs_see_a_clock_that_is_off_and_wait_as_long_as_they_ask(slurm, seconds):
    code = (
        "import subprocess, threading, time; a = time.monotonic(); time.sleep(0.2); threading.Event().wait(0.2);"
        "print(time.time(), time.monotonic() - a, subprocess.check_output(['date', '+%s'], text=True))"
    )
    slurm.shift_clock(2, seconds)
    try:
        jobs = [slurm.submit(f'exec {sys.executable} -c "{code}"', f"--nodelist=node{n}") for n in (1, 2)]
        assert [slurm.wait(j, {"COMPLETED", "FAILED"}, 20) for j in jobs] == ["COMPLETED"] * 2
    finally:
        slurm.shift_clock(2, 0)
    true, shifted = (list(map(float, slurm.output(j).split())) for j in jobs)
    for clock in (0, 2):
        assert shifted[clock] - true[clock] == pytest.approx(seconds, abs=15)
    assert 0.4 <= shifted[1] < 5


def gone(pids: Iterable[object]) -> None:
    """What is killed is listed until its parent or its namespace has taken note."""
    until(lambda: not any(Path(f"/proc/{p}").exists() for p in pids), 10, lambda: f"some of {pids} are left")


def test_two_clusters_run_at_once_and_one_that_is_left_is_gone(slurm, tmp_path):
    before = left(slurm)
    with Cluster(tmp_path, nodes=1) as other:
        job = other.submit("sleep 300 & exec sleep 300")
        other.wait(job, {"RUNNING"}, 20)
        pids = other.pids(1)
        assert len(left(other)) > len(before)
        assert "node2" not in other.run(["sinfo", "--Node", "--noheader"])
        assert "node2" in slurm.run(["sinfo", "--Node", "--noheader"])
    other.clean()
    assert left(other) == before
    gone(pids)


def test_the_daemons_end_with_the_process_that_started_them(tmp_path):
    code = "import time\nfrom pathlib import Path\nfrom cluster import Cluster\n"
    code += f"with Cluster(Path({str(tmp_path)!r}), nodes=1) as c:\n print(*c.pids(1), flush=True)\n time.sleep(60)"
    here = Path(__file__).parent
    with subprocess.Popen([sys.executable, "-c", code], cwd=here, stdout=subprocess.PIPE, encoding="utf-8") as child:
        try:
            pids = child.stdout.readline().split()
        finally:
            child.send_signal(signal.SIGKILL)
    assert pids
    gone(pids)
    for name in machines.NETNS.glob(f"moelib-{child.pid}-*"):
        machines.command("ip", "netns", "del", name.name)
    for folder in machines.FREEZER.glob(f"moelib-{child.pid}-*"):
        machines.command("find", str(folder), "-depth", "-type", "d", "-delete")


def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing(slurm, tmp_path):
    before = left(slurm)
    with pytest.raises(MachineError, match="short, plain path"):
        Cluster(tmp_path / "a b").__enter__()
    (tmp_path / "state").write_text("in the way", encoding="utf-8")
    with pytest.raises(OSError, match="state"):
        Cluster(tmp_path).__enter__()
    assert left(slurm) == before


def test_what_is_missing_is_named_with_its_fix(monkeypatch):
    assert cluster.missing() is None
    monkeypatch.setattr(cluster, "PROGRAMS", ("slurmctld", "no-such-daemon"))
    assert cluster.missing().startswith("no no-such-daemon: apt-get install")
    monkeypatch.setattr(cluster, "PROGRAMS", ())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in cluster.missing()
