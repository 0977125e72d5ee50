"""The machine and the code, as every record names them."""

import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from moelib import __version__, params, process


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=params.root(), capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def facts() -> dict[str, Any]:
    """CPU, RAM, system and moelib's commit. `commit` is None outside a git clone; `dirty` says whether tracked files
    differ from it."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": _cpu_model(),
        "cpus": process.usable_cpus(),
        "ram_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "moelib": __version__,
        "commit": commit,
        "dirty": None if commit is None or changed is None else bool(changed),
    }
