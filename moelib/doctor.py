"""What is installed here, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass

import psutil

from moelib import build, device, engine, host, models, params, stats

PACKAGES = ("jupyterlab", "papermill", "nbconvert", "pandas", "seaborn", "nvidia-ml-py", "huggingface_hub", "gguf")


@dataclass(frozen=True)
class Finding:
    what: str
    found: str
    mend: str | None = None
    """What to do about it; None where nothing is wrong."""


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding("python", platform.python_version(), None if ok else "install Python 3.11 or newer")


def _packages() -> list[Finding]:
    found = []
    for name in PACKAGES:
        try:
            found.append(Finding(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, "missing", f"{sys.executable} -m pip install {name}"))
    return found


def _engine(explicit: str | None) -> tuple[list[Finding], engine.Engine | None]:
    found = [Finding("engine looked for", "; ".join(f"{how}: {f or 'no'}" for how, f in engine.candidates(explicit)))]
    try:
        llama = engine.find(explicit)
    except engine.EngineError as err:
        return [*found, Finding("engine", f"missing: {err}", "moelib engine build")], None
    old = llama.build is not None and llama.build < engine.OLDEST_BUILD
    mend = f"use b{engine.OLDEST_BUILD} or newer: moelib engine build" if old else None
    found.append(Finding("engine", f"{llama}, {llama.version}", mend))
    for tool in engine.TOOLS:
        here = llama.tools.get(tool)
        found.append(Finding(tool, str(here) if here else "missing", None if here else "moelib engine build"))
    for flag in ("--cpu-moe", "--n-cpu-moe", "--list-devices", "--rpc", "--fit", "--load-mode"):
        known = flag in llama.help.flags
        needed = flag in ("--cpu-moe", "--n-cpu-moe", "--list-devices")
        found.append(Finding(flag, "yes" if known else "no", "moelib engine build" if needed and not known else None))
    return found, llama


def _devices(llama: engine.Engine | None) -> list[Finding]:
    try:
        gpu = device.Cuda()
        found = [Finding("GPU", f"{gpu.name}, {stats.size(gpu.identity()['total_bytes'])}, {gpu.uuid}")]
    except device.DeviceError as err:
        found = [Finding("GPU", f"none ({err})")]
    if llama:
        where = device.choose("auto", llama)
        missing = None if where.kind != "none" else "a build with RPC or CUDA: moelib engine build"
        found.append(Finding("device of a study", f"{where.kind}: {where.identity()['name']}", missing))
    return found


def _disk() -> Finding:
    folder = models.folder("x", "twin", "tiny").parent.parent
    place = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(place).free
    return Finding(f"disk at {folder}", f"{stats.size(free)} free", None if free > 2 << 30 else "free 2 GiB")


def examine(explicit: str | None = None) -> list[Finding]:
    """Everything a study needs, found or with what mends it."""
    tools, llama = _engine(explicit)
    compiler = next((c for n in (os.environ.get("CXX"), "c++", "g++") if n and (c := shutil.which(n))), None)
    builds = None if compiler or llama else "apt-get install g++ make"
    cuda = "GPU driver and nvcc found" if build.has_cuda() else "no GPU driver with nvcc"
    facts, studies = host.facts(), params.study_names()
    ram = f"{stats.size(psutil.virtual_memory().available)} of {stats.size(facts['ram_bytes'])} available"
    return [
        Finding("moelib", f"{facts['moelib']}, commit {facts['commit'] or 'unknown (no git clone)'}"),
        _python(),
        *_packages(),
        Finding("C++ compiler", f"{compiler or 'none'} (to build the engine; {cuda})", builds),
        *tools,
        *_devices(llama),
        Finding("CPU", f"{facts['cpu']}, {facts['cpus']} usable"),
        Finding("RAM", ram),
        _disk(),
        Finding("studies", ", ".join(studies) or "none", None if studies else "run in a clone, or set MOELIB_HOME"),
    ]
