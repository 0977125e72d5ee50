"""`make shimmy`: fetch shimmy's crate by cargo, and build it with llama.cpp in it, once a machine.

Version 1.9.0 was withdrawn by its author: cargo installs it no longer, but still fetches what a lock file names. The
lock that is written here names it by its checksum; what it is built from is the lock file of the crate itself.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from build_engine import compiler, has_cuda, jobs

from moelib.base.bar import tqdm
from moelib.catalogue import params
from moelib.engine import archive
from moelib.machine import process
from moelib.runners import shimmy
from moelib.runners.shimmy import VERSION, ShimmyError

CRATE_SHA256 = "10de0fc6741dba684633fc364478c72e48bc658c2509e78bc06850657805118d"
PROJECT = '[package]\nname = "fetch"\nversion = "0.0.0"\nedition = "2021"\n[dependencies]\n'
ANY = 'cfg-if = "1"\n'  # any crate: its entry in a lock file has the name that cargo has for its registry
ONE = f'shimmy = {{ version = "={VERSION}", default-features = false, features = ["llama"] }}\n'
LOCKED = """version = 3
[[package]]
name = "fetch"
version = "0.0.0"
dependencies = ["shimmy"]
[[package]]
name = "shimmy"
version = "{version}"
source = "{source}"
checksum = "{checksum}"
"""
IS_LIBCLANG = re.compile(r"libclang(-[\d.]+)?\.so(\.[\d.]+)?")
FETCH_S, BUILD_S, LOG_BYTES = 600.0, 3600.0, 1 << 28
CRATES = 320  # that are compiled, about: for the bar


def libclang(lib: Path = Path("/usr/lib")) -> str | None:
    """The folder of libclang, which writes the bindings to llama.cpp; None where it is not found.

    Its C++ sister `libclang-cpp`, which many systems have alone, and the runtimes `libclang_rt` do not serve.
    """
    if named := os.environ.get("LIBCLANG_PATH"):
        return named
    folders = [*sorted(lib.glob("*-linux-gnu")), *sorted(lib.glob("llvm-*/lib"))]
    found = [f for f in folders if any(IS_LIBCLANG.fullmatch(p.name) for p in f.glob("libclang*"))]
    return str(found[-1]) if found else None


class LackingTools(ShimmyError):
    """Programs that building takes are not here."""


def require_tools() -> None:
    """Raise LackingTools naming what is missing, with the packages that have it."""
    missing = {
        "cargo (Rust 1.85 or newer: rustup, or a distribution's `cargo`)": shutil.which("cargo") is None,
        "cmake (`apt-get install cmake`)": shutil.which("cmake") is None,
        "libclang (`apt-get install libclang-dev`)": libclang() is None,
        "a C++ compiler (`apt-get install g++ make`)": compiler() is None,
    }
    if lacking := [name for name, lacks in missing.items() if lacks]:
        raise LackingTools(f"building shimmy needs {', '.join(lacking)}")


def cargo(folder: Path, *arguments: str) -> str:
    """Raises ShimmyError with the end of what cargo says."""
    argv = ["cargo", *arguments, "--manifest-path", str(folder / "Cargo.toml")]
    done = subprocess.run(argv, capture_output=True, encoding="utf-8", errors="replace", timeout=FETCH_S)
    if done.returncode:
        raise ShimmyError(f"cargo {arguments[0]} failed: {done.stderr[-600:].strip()}")
    return done.stdout


def fetch(folder: Path) -> Path:
    """The unpacked crate. Raises ShimmyError where cargo cannot fetch it."""
    (folder / "src").mkdir(parents=True)
    (folder / "src/lib.rs").touch()
    (folder / "Cargo.toml").write_text(PROJECT + ANY, encoding="utf-8")
    cargo(folder, "generate-lockfile")
    source = re.search(r'^source = "(.+)"$', (folder / "Cargo.lock").read_text(encoding="utf-8"), re.M)
    if source is None:
        raise ShimmyError("cargo's lock file names no registry")
    (folder / "Cargo.toml").write_text(PROJECT + ONE, encoding="utf-8")
    lock = LOCKED.format(version=VERSION, source=source[1], checksum=CRATE_SHA256)
    (folder / "Cargo.lock").write_text(lock, encoding="utf-8")
    cargo(folder, "fetch")
    packages = json.loads(cargo(folder, "metadata", "--format-version", "1"))["packages"]
    (manifest,) = (p["manifest_path"] for p in packages if (p["name"], p["version"]) == ("shimmy", VERSION))
    return Path(manifest).parent


def build(target: Path) -> None:
    """Build the program at `target`. Raises ShimmyError if that fails, with the end of the build's log."""
    with tempfile.TemporaryDirectory(prefix="moelib-shimmy-") as scratch:
        source = Path(shutil.copytree(fetch(Path(scratch) / "fetch"), Path(scratch) / "source"))
        features = "llama,llama-cuda" if has_cuda() else "llama"
        argv = [shutil.which("cargo") or "cargo", "build", "--release", "--locked"]  # the launcher has no PATH
        argv += ["--no-default-features", "--features", features]
        argv += ["--bin", "shimmy", "--jobs", str(jobs()), "--target-dir", f"{scratch}/target"]
        argv += ["--manifest-path", str(source / "Cargo.toml")]
        log, started = target.parent.with_name(f"{target.parent.name}.log"), time.monotonic()
        env = {**os.environ, "LIBCLANG_PATH": libclang() or "", "CARGO_TERM_PROGRESS_WHEN": "never"}
        bar = tqdm(total=CRATES, unit="crate", mininterval=1, desc="building shimmy")
        with process.Child(argv, log, env, log_bytes=LOG_BYTES) as child, bar:
            while child.running():
                if time.monotonic() - started > BUILD_S:
                    raise ShimmyError(f"the build did not end in {BUILD_S / 60:.0f} minutes; its log: {log}")
                bar.update(min(CRATES - 1, child.text().count("Compiling ")) - bar.n)
                time.sleep(0.5)
            code = child.stop().code
            bar.update(CRATES - bar.n if code == 0 else 0)
        if code:
            raise ShimmyError(f"shimmy could not be built; {log} ends:\n{child.tail(25)}")
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".partial")
        shutil.copy2(Path(scratch) / "target/release/shimmy", part)
        os.replace(part, target)


def main() -> None:
    try:
        print(f"using {(found := shimmy.find())}, {found.path}")
        return
    except ShimmyError:
        if os.environ.get(shimmy.VARIABLE):
            raise
    require_tools()
    print(f"building shimmy {VERSION}; about 4 minutes on 2 cores, once a machine", flush=True)
    with archive.alone(shimmy.cached().parent, "shimmy's build"):
        build(shimmy.cached())
    print(f"built {shimmy.find()}")


if __name__ == "__main__":
    try:
        main()
    except LackingTools as err:
        if sys.argv[1:] != ["--where-possible"]:
            sys.exit(f"moelib: {err}")
        print(f"no shimmy, so its tests skip: {err}")
    except params.UserError as err:
        sys.exit(f"moelib: {err}")
    except KeyboardInterrupt:
        print("\nmoelib: interrupted; run the same command to go on", file=sys.stderr)
        sys.exit(130)
