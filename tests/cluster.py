"""A real Slurm on this machine: a controller and nodes, each a machine of its own by namespaces, all in one folder.

    with Cluster(tmp_path) as c:
        job = c.submit("exec moelib study run smoke", "--time=10")
        c.wait(job, {"COMPLETED"}, 60)

Needs root and Debian's packages: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Literal

import machines
from machines import COMMAND_S, FREEZER, Machine, MachineError, until

Tracking = Literal["linuxproc", "pgid", "cgroup"]

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SUBNET = "10.77.0"
START_S = 30.0
UNIX_PATH = 105  # sun_path of unix(7), less its final zero and the two characters that munge adds
CLOCK_OFF = Path(__file__).with_name("clock_off.c")

# cred_expire is how long a requeued job waits; with a MessageTimeout of 10, a dead node is seen after 30 s at best
CONF = """\
ClusterName=moelib
SlurmctldHost=hub({hub})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={cred_s}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmdLogFile={folder}/%n/slurmd.log
SlurmdSpoolDir={folder}/%n/spool
SlurmdParameters=config_overrides
SlurmdTimeout={down_s}
KillWait={kill_wait_s}
MessageTimeout=4
TCPTimeout=1
ReturnToService=2
RequeueExit=75
MailProg=/bin/true
ProctrackType=proctrack/{tracking}
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
TaskPlugin=task/none
TaskProlog={folder}/task_prolog
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverTimeLimit=0
"""
CGROUP_CONF = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
"""
# What a node's file `environment` says is exported to the tasks there.
TASK_PROLOG = """\
#!/bin/sh
cat "{folder}/$SLURMD_NODENAME/environment"
"""


def missing() -> str | None:
    """Why a cluster cannot run here, with the fix; None if it can."""
    if lost := [p for p in PROGRAMS if not machines.found(p)]:
        return f"no {', '.join(lost)}: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
    return machines.missing()


def usual() -> Tracking:
    """How Slurm is to know a job's processes: by cgroups, as most clusters do, where those of version 1 are mounted."""
    return "cgroup" if FREEZER.is_dir() else "linuxproc"


class Cluster:
    """A controller and `nodes` nodes of one CPU each, node1, node2, ..., in the partition `main`.

    `kill_wait_s` is Slurm's KillWait, from SIGTERM to SIGKILL; `down_s` its SlurmdTimeout, after which a silent node is
    down and its jobs are requeued; `cred_s` how long a requeued job waits, by Slurm's default 120. `tracking` is its
    ProctrackType, which decides who of a job is signalled, and who is ended with it.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 2,
        *,
        kill_wait_s: int = 30,
        down_s: int = 10,
        cred_s: int = 5,
        tracking: Tracking | None = None,
    ) -> None:
        self.folder = folder.resolve()
        self.conf = self.folder / "slurm.conf"
        self.tracking = tracking or usual()
        self._names = [f"node{n + 1}" for n in range(nodes)]
        self._addresses = {name: f"{SUBNET}.{n + 1}" for n, name in enumerate(["hub", *self._names])}
        self._settings = {"kill_wait_s": kill_wait_s, "down_s": down_s, "cred_s": cred_s}
        self._machines: dict[str, Machine] = {}

    def __enter__(self) -> Cluster:
        try:
            self._write()
            for name, address in self._addresses.items():
                self._machines[name] = machine = Machine(name, self.folder / name, self.folder / "hosts")
                if name == "hub":
                    machine.bridge(f"{address}/24")
                else:
                    machine.join(self._machines["hub"], f"{address}/24")
            hub = self._machines["hub"]
            hub.start(self._munged(), (self.folder / "munge.socket").exists, START_S)
            hub.start(f"slurmctld -D -i -f {self.conf}", self._answers, START_S)
            for n in range(len(self._names)):
                self.start_node(n + 1)
        except BaseException:
            self.clean()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.clean()

    def clean(self) -> None:
        """End all that was started, and take the namespaces away; safe to call again. The folder's files stay."""
        for name in reversed(list(self._machines)):
            self._machines[name].remove()
            del self._machines[name]

    def run(self, command: Sequence[str], within_s: float = COMMAND_S, **variables: str) -> str:
        """The output of a command of Slurm's, or that submits, run beside the controller; it raises if that fails."""
        return self._machines["hub"].run(*command, within_s=within_s, SLURM_CONF=str(self.conf), **variables)

    def submit(self, script: str, *options: str) -> int:
        """Submit a batch script and return its job's id; without a first line `#!` it is one of sh."""
        path = self.folder / f"script-{secrets.token_hex(4)}"
        path.write_text(script if script.startswith("#!") else f"#!/bin/sh\n{script}\n", encoding="utf-8")
        fixed = ["--parsable", f"--output={self.folder}/%j.out", "--open-mode=append"]
        return int(self.run(["sbatch", *fixed, *options, str(path)]))

    def output(self, job: int) -> str:
        """What the job wrote so far, with what its earlier starts wrote."""
        path = self.folder / f"{job}.out"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def show(self, job: int) -> dict[str, str]:
        """What `scontrol show job` tells: JobState, Reason, Restarts, ExitCode, BatchHost, and so on."""
        return _fields(self.run(["scontrol", "--oneliner", "show", "job", str(job)]))

    def state(self, job: int) -> str:
        """The job's state: PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, TIMEOUT, CANCELLED, and so on."""
        return self.show(job)["JobState"]

    def wait(self, job: int, states: Collection[str], timeout_s: float, restarts: int = 0) -> str:
        """Wait until the job is in one of `states`, having been requeued `restarts` times or more; return its state."""
        told: dict[str, str] = {}

        def there() -> bool:
            told.update(self.show(job))
            return told["JobState"] in states and int(told["Restarts"]) >= restarts

        until(there, timeout_s, lambda: f"job {job} is not {', '.join(states)}, but {told}")
        return told["JobState"]

    def expire(self, job: int) -> None:
        """Let the running job reach its time limit now, as limits are whole minutes; Slurm looks at them each 30 s."""
        self.run(["scontrol", "update", f"JobId={job}", "EndTime=now+1"])

    def node(self, n: int) -> dict[str, str]:
        """What `scontrol show node` tells: State, Reason, SlurmdStartTime, and so on."""
        return _fields(self.run(["scontrol", "--oneliner", "show", "node", f"node{n}"]))

    def pids(self, n: int) -> list[int]:
        """Every process on node `n`, by the ids that they have outside."""
        return self._machines[f"node{n}"].pids()

    def kill_node(self, n: int) -> None:
        """End everything on node `n` at once, as if its power were cut."""
        self._machines[f"node{n}"].kill()

    def start_node(self, n: int) -> None:
        """Boot node `n`, and wait until Slurm would start a job there."""
        since = datetime.now().replace(microsecond=0).isoformat()

        def joined() -> bool:
            node = self.node(n)  # until a crash is seen, the state is still the one before it
            return node["SlurmdStartTime"] >= since and node["State"] in {"IDLE", "ALLOCATED", "MIXED"}

        # where a job's own commands look: srun of the workflow's jobs is not given SLURM_CONF
        daemon = f"(mount --bind {self.folder} /etc/slurm && exec slurmd -D -f {self.conf} -N node{n})"
        self._machines[f"node{n}"].start(daemon, joined, START_S)

    def shift_clock(self, n: int, seconds: int) -> None:
        """Let each job that starts on node `n` from now on see a wall clock that is `seconds` off; 0 ends that.

        Only jobs see it, as munge refuses a daemon whose clock is off. Monotonic clocks stay, and so do the times of
        files, as those of a file server.
        """
        library = self.folder / "clock_off.so"
        if not library.exists():
            if not machines.found("cc"):
                raise MachineError("no cc to build clock_off.c with: apt-get install gcc libc6-dev")
            argv = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(CLOCK_OFF), "-ldl"]
            subprocess.run(argv, check=True, timeout=COMMAND_S)
        lines = f"export LD_PRELOAD={library}\nexport CLOCK_OFF={seconds}\n" if seconds else ""
        (self.folder / f"node{n}" / "environment").write_text(lines, encoding="ascii")

    def _write(self) -> None:
        socket = f"{self.folder}/munge.socket"
        if len(socket) > UNIX_PATH or set(socket) & set(" ,#'\"%$"):
            raise MachineError(f"{socket} does for no socket and no slurm.conf: give a folder with a short, plain path")
        for name in ["state", *(f"{name}/spool" for name in self._names)]:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key, prolog = self.folder / "munge.key", self.folder / "task_prolog"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        prolog.write_text(TASK_PROLOG.format(folder=self.folder), encoding="utf-8")
        prolog.chmod(0o755)
        hosts = ["127.0.0.1 localhost", "::1 localhost", *(f"{a} {name}" for name, a in self._addresses.items())]
        (self.folder / "hosts").write_text("\n".join([*hosts, ""]), encoding="ascii")
        for name in self._names:
            (self.folder / name / "environment").touch()
        nodes = "\n".join(f"NodeName={n} NodeAddr={self._addresses[n]} CPUs=1 RealMemory=100000" for n in self._names)
        places = {"folder": self.folder, "hub": self._addresses["hub"], "nodes": nodes, "tracking": self.tracking}
        self.conf.write_text(CONF.format(**places, **self._settings), encoding="utf-8")
        (self.folder / "cgroup.conf").write_text(CGROUP_CONF, encoding="utf-8")

    def _munged(self) -> str:
        """Munge with all its files in the folder; --force lets that be one that only root can enter, as pytest's is."""
        files = " ".join(f"--{file}-file={self.folder}/munge.{file}" for file in ("key", "pid", "seed"))
        return f"munged --foreground --force {files} --socket={self.folder}/munge.socket --origin={SUBNET}.1"

    def _answers(self) -> bool:
        try:
            return "UP" in self.run(["scontrol", "ping"])
        except MachineError:
            return False


def _fields(told: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in told.split() if "=" in word)
