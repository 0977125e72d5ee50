"""Machines within this one, by namespaces: each has a network, process ids and ids of its own; files are shared.

Nothing of their network is outside the namespaces, so that two networks may have the same addresses and do not meet.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from moelib.locks import claim

TOOLS = ("ip", "nsenter", "setpriv", "unshare")
FREEZER = Path("/sys/fs/cgroup/freezer")  # of cgroup version 1
NETNS = Path("/run/netns")
COMMAND_S, END_S = 30.0, 15.0
POLL_S = 0.1
# The shell stays as process 1, so that orphans are reaped; it ends with the daemons, and all other processes with it.
INIT = """\
set -e
hostname {name}
mount -t tmpfs -o mode=1777 shm /dev/shm
mkdir -p -m 700 {locks}
mount -t tmpfs -o mode=700 locks {locks}
mount --bind {hosts} /etc/hosts
mount --bind {home}/boot_id /proc/sys/kernel/random/boot_id
if test -e /etc/machine-id; then mount --bind {home}/machine-id /etc/machine-id; fi
if test -d {freezer}; then mount --bind {cgroup} {freezer}; fi
{daemon} &
wait
"""


class MachineError(RuntimeError):
    """A command failed, or what was waited for did not come; the text says what was seen last."""


def missing() -> str | None:
    """Why there can be no machines here, with the fix; None if there can."""
    if os.geteuid() != 0:
        return "namespaces need root: run the tests as root"
    if lost := [tool for tool in TOOLS if not found(tool)]:
        return f"no {', '.join(lost)}: apt-get install iproute2 util-linux"
    probe = f"moelib-probe-{os.getpid()}-{secrets.token_hex(2)}"
    made = _run("ip", "netns", "add", probe)
    _run("ip", "netns", "del", probe)
    return f"namespaces are refused ({made.stderr.strip()}): run with CAP_SYS_ADMIN" if made.returncode else None


def found(program: str) -> bool:
    """True if the program is installed, perhaps in a folder that only root's PATH has."""
    return shutil.which(program, path=environment()["PATH"]) is not None


def environment() -> dict[str, str]:
    """The environment with the folders of root's tools, and without what belongs to a job that the tests run in."""
    outer = ("SLURM", "SBATCH_", "SRUN_", "SQUEUE_", "SCONTROL_", "SALLOC_")
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return {k: v for k, v in os.environ.items() if not k.startswith(outer)} | {"PATH": path}


def until(true: Callable[[], bool], timeout_s: float, otherwise: Callable[[], str]) -> None:
    """Wait until `true()`; after `timeout_s` raise with what `otherwise()` says."""
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise MachineError(f"{otherwise()} (waited {timeout_s:g} s)")
        time.sleep(POLL_S)


def command(*argv: str, within_s: float = COMMAND_S, **variables: str) -> str:
    """The output of a command that must succeed in that time."""
    done = _run(*argv, within_s=within_s, **variables)
    if done.returncode:
        raise MachineError(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _run(*argv: str, within_s: float = COMMAND_S, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, env=environment() | variables, capture_output=True, encoding="utf-8", timeout=within_s)


class Machine:
    """A machine `name`, whose files are in `home`; `hosts` is its /etc/hosts.

    What is started on it ends with the thread that starts it, even if that is killed; only the name of its network and
    its cgroup stay then, which hold nothing.
    """

    def __init__(self, name: str, home: Path, hosts: Path) -> None:
        self.name, self.home, self.hosts = name, home, hosts
        self.unique = f"moelib-{os.getpid()}-{secrets.token_hex(2)}-{name}"
        self.cgroup = FREEZER / self.unique
        self._started: list[subprocess.Popen[bytes]] = []
        home.mkdir(parents=True, exist_ok=True)
        (home / "machine-id").write_text(f"{uuid.uuid4().hex}\n", encoding="ascii")
        command("ip", "netns", "add", self.unique)
        self.ip("link", "set", "lo", "up")
        if FREEZER.is_dir():
            self.cgroup.mkdir()

    def ip(self, *words: str) -> str:
        """Run ip(8) in the machine's network."""
        return command("ip", "-n", self.unique, *words)

    def bridge(self, address: str) -> None:
        """Become the network that other machines join."""
        self.ip("link", "add", "bridge", "type", "bridge")
        self.ip("address", "add", address, "dev", "bridge")
        self.ip("link", "set", "bridge", "up")

    def join(self, network: Machine, address: str) -> None:
        """Join the network of a machine that has a bridge."""
        network.ip("link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", self.unique)
        network.ip("link", "set", self.name, "master", "bridge", "up")
        self.ip("address", "add", address, "dev", "eth0")
        self.ip("link", "set", "eth0", "up")

    def run(self, *argv: str, within_s: float = COMMAND_S, **variables: str) -> str:
        """The output of a command that only uses the machine's network."""
        return command("nsenter", f"--net={NETNS / self.unique}", *argv, within_s=within_s, **variables)

    def start(self, daemon: str, up: Callable[[], bool], timeout_s: float) -> None:
        """Start a daemon that stays in the foreground, with a new boot id, and wait until `up()`."""
        (self.home / "boot_id").write_text(f"{uuid.uuid4()}\n", encoding="ascii")
        # what measures on a machine is noted there: each has its own, as it has its own abstract sockets
        places = {
            "locks": claim.ROOT / f"moelib-{os.getuid()}",
            "home": self.home,
            "hosts": self.hosts,
            "cgroup": self.cgroup,
            "freezer": FREEZER,
        }
        argv = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "nsenter",
            f"--net={NETNS / self.unique}",
            "unshare",
            "--uts",
            "--ipc",
        ]
        argv += ["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
        argv += [INIT.format(name=self.name, daemon=daemon, **places)]
        console = self.home / "console"
        with console.open("ab") as out:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment())
        self._started.append(process)
        until(
            lambda: process.poll() is not None or up(),
            timeout_s,
            lambda: f"{daemon} is not up: {console.read_text(encoding='utf-8')}",
        )
        if process.poll() is not None:
            raise MachineError(f"{daemon} has ended: {console.read_text(encoding='utf-8')}")

    def pids(self) -> list[int]:
        """Every process on the machine, by the ids that they have outside."""
        return list(map(int, command("ip", "netns", "pids", self.unique).split()))

    def kill(self) -> None:
        """End every process at once, as if the power were cut; what they have written stays."""

        def ended() -> bool:
            left = self.pids()
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            return not left

        until(ended, END_S, lambda: f"{self.name} still has processes {self.pids()}")
        for process in self._started:
            process.wait(timeout=END_S)
        self._started.clear()

    def remove(self) -> None:
        """Kill it and take its namespaces away; safe to call again. Its files stay."""
        if (NETNS / self.unique).exists():
            self.kill()
            command("ip", "netns", "del", self.unique)
        # from the innermost: a cgroup without processes is removed with its files, which themselves cannot be
        argv = ("find", str(self.cgroup), "-depth", "-type", "d", "-delete")
        until(lambda: not self.cgroup.exists() or not _run(*argv).returncode, END_S, lambda: f"{self.cgroup} is in use")
