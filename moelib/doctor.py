"""What is installed, what is missing, and the command that fixes it."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator

import psutil

from moelib.base.stats import size
from moelib.catalogue import params
from moelib.engine import engine
from moelib.machine import gpus, host
from moelib.measure import device
from moelib.models import models

PACKAGES = ("jupyterlab", "papermill", "nbconvert", "pandas", "seaborn", "nvidia-ml-py", "huggingface_hub", "gguf")
BUILD = "make engine"

Finding = tuple[str, str, str | None]
"""Item, its value, and how to fix it: None where nothing is wrong."""


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name), None
        except importlib.metadata.PackageNotFoundError:
            yield name, "missing", f"{sys.executable} -m pip install {name}"


def _engine(llama: engine.Engine) -> Iterator[Finding]:
    old = llama.build is not None and llama.build < engine.OLDEST_BUILD
    yield "engine", f"{llama}, {llama.version}", f"use b{engine.OLDEST_BUILD} or newer: {BUILD}" if old else None
    for tool in engine.TOOLS:
        cure = device.RPC if tool == "rpc-server" else BUILD
        yield tool, str(llama.tools.get(tool, "missing")), None if tool in llama.tools else cure
    needed = ("--cpu-moe", "--n-cpu-moe", "--list-devices")
    for flag in (*needed, "--rpc", "--fit", "--load-mode"):
        known = flag in llama.help.flags
        yield flag, "yes" if known else "no", BUILD if flag in needed and not known else None


def _gpus(llama: engine.Engine | None) -> Iterator[Finding]:
    """Every GPU that the system or the engine shows; a fault where a GPU cannot be used for measuring."""
    present, nvidia = gpus.present(), None
    try:
        gpu = device.Cuda()
        lacks = llama and not device.uses_cuda(llama)
        nvidia = f"{gpu.name}, {size(gpu.identity()['total_bytes'])}, {gpu.uuid}"
        yield "GPU", f"{nvidia}{f'; {llama} has no CUDA device' if lacks else ''}", device.CUDA_BUILD if lacks else None
    except device.DeviceError as err:
        unusable = [g for g in present if g.vendor == "NVIDIA"]
        if unusable or not isinstance(err, device.NoDriver):
            names = ", ".join(map(str, unusable)) or "NVIDIA GPU"
            yield "GPU", f"{names}: {err}", "fix what the message names, or set `device: loopback` in the study"
        else:
            yield "GPU", f"no NVIDIA GPU ({err})", None
    other = device.of_other_kinds(llama) if llama else []
    other += [str(g) for g in present if g.vendor != "NVIDIA" and not (g.integrated or other)]
    if other:
        cure = None if nvidia else f"{device.ALONE}; set `device: loopback` in the study, or use a machine with one"
        yield "other GPU", f"{', '.join(other)}, not used", cure
    elif integrated := [str(g) for g in present if g.integrated]:
        yield "other GPU", f"{', '.join(integrated)}, integrated: it shares the CPU's memory, and is not used", None


def examine(explicit: str | None = None) -> Iterator[Finding]:
    """Everything a study needs: its value, or how to fix it."""
    facts, studies, llama = host.facts(), params.study_names(), None
    try:
        llama = engine.find(explicit)
    except engine.EngineError as err:
        missing = ("engine", f"missing: {err}", BUILD)
    yield "moelib", f"{facts['moelib']}, commit {facts['commit'] or 'unknown (no git clone)'}", None
    yield "python", platform.python_version(), None
    yield from _packages()
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "c++", "g++", "clang++"))), None)
    builds = None if compiler or llama else "apt-get install g++ make"
    yield "C++ compiler", f"{compiler or 'none'} (to build the engine)", builds
    places = "; ".join(f"{how}: {folder or 'no'}" for how, folder in engine.candidates(explicit))
    yield "engine search path", places, None
    yield from _engine(llama) if llama else (missing,)
    yield from _gpus(llama)
    if llama:
        where = device.choose("auto", llama)
        lacks = device.no_loopback(llama) if where.kind != "cuda" else None
        yield "device of a study", f"{where.kind}: {where.identity()['name']}", lacks
        if where.note:
            yield "why this one", where.note, None
    yield "CPU", f"{facts['cpu']}, {facts['cpus']} usable", None
    yield "RAM", f"{size(psutil.virtual_memory().available)} of {size(facts['ram_bytes'])} available", None
    folder = models.folder()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    yield f"disk at {folder}", f"{size(free)} free", None if free > 2 << 30 else "free 2 GiB"
    yield "studies", ", ".join(studies) or "none", None if studies else "run in a clone, or set MOELIB_HOME"
