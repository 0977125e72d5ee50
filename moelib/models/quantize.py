"""Quantise a source file, or write the twin of a header as if it had been quantised: a verified file and its manifest.

llama-quantize writes to its output path directly and returns 1 for every failure, so it is given a temporary name; the
result is checked against the source's header, hashed and only then renamed. The manifest lists the tensor types that
the file really holds, which a quant's label does not tell.
"""

import hashlib
import re
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moelib.base import files
from moelib.base.bar import tqdm
from moelib.base.schema import near
from moelib.catalogue import params
from moelib.catalogue.facts import Manifest
from moelib.engine import engine, quants
from moelib.engine.engine import Engine
from moelib.gguf import fill, gguf_file, imatrix, outline
from moelib.gguf.gguf_header import UNQUANTISED
from moelib.gguf.imatrix import Imatrix
from moelib.gguf.outline import Outline
from moelib.machine import host, process
from moelib.models import models, remote, sources

HEADER_S = 60.0  # limit for llama.cpp to read a header, which usually takes 0.02 s
LOG_BYTES = 32 << 20  # limit of a tool's log: 65,536 tensors with a line each take 10 MB
TAIL_BYTES = 1 << 14
NEEDY = re.compile(r"require an imatrix|requires an importance matrix|Missing importance matrix")
SUPER_BLOCK = 256  # k-quants work on rows of whole super-blocks
READY_S = 600.0
SLOWEST_BYTES_PER_S = 2e6  # of source; far slower than any machine measured (25e6 on one core), to end only a hang


class QuantizeError(params.UserError):
    """A file could not be made or is not valid; the message says why and what to do."""


@dataclass(frozen=True)
class Quantised:
    """A quantised file and its manifest."""

    header: gguf_file.Header
    manifest: dict[str, Any]
    content: files.Hashed
    """The hash of the file's present content; the manifest holds that of the file as it was made."""

    @property
    def path(self) -> Path:
        return self.header.path


def refuse_quantised(source: gguf_file.Header) -> None:
    """Raise QuantizeError if the source's weights are already quantised."""
    if source.is_quantised:
        types = sorted(set(source.type_counts) - UNQUANTISED)
        raise QuantizeError(
            f"{source.path.name} is already quantised ({', '.join(types)}); quantising again adds error that no record "
            "could separate, and llama-quantize refuses to: start from an F16 or BF16 file"
        )


def refuse_senseless(source: gguf_file.Header, placements: Iterable[str]) -> None:
    """Raise QuantizeError if, by its header, the file could not be run at `placements`."""
    if why := source.fault(placements):
        raise QuantizeError(f"{source.path.name}: {why}")


def fallbacks(header: gguf_file.Header, quant: str) -> list[dict[str, Any]]:
    """Tensors that got another type than the k-quant's because their rows are not a multiple of a super-block."""
    fell = [t for t in header.tensors if t.shape[0] % SUPER_BLOCK and t.type not in UNQUANTISED and "_K" in quant]
    return [{"tensor": t.name, "columns": t.shape[0], "type": t.type} for t in fell]


def _refuse_needy(output: str, quant: str, source: gguf_file.Header) -> None:
    """Raise QuantizeError if llama-quantize says that it needs an importance matrix."""
    if NEEDY.search(output):
        raise QuantizeError(
            f"{quant} of {source.path.name} needs an importance matrix: make one with `llama-imatrix -m "
            f"{source.path.name} -f TEXT -o FILE.gguf` and give it with `--imatrix FILE.gguf`"
        )


def predict_bytes(
    engine: Engine, source: gguf_file.Header, quant: str, scratch: Path, matrix: Imatrix | None = None
) -> int | None:
    """File size predicted by `llama-quantize --dry-run` and the source's header; None if the build has no dry run.

    Raises QuantizeError if it cannot be quantised, with `matrix` or without one.
    """
    dry = ["--dry-run", *(["--imatrix", str(matrix.path)] if matrix else [])]
    args = [engine.tool("llama-quantize"), *dry, str(source.path), quant]
    _, output = _run(args, scratch / f"dry-run-{quant}.log", READY_S)
    if unknown := re.search(r"unknown model architecture: '[^'\n]{0,100}'", output):
        raise QuantizeError(f"{engine} cannot quantise {source.path.name}: {unknown[0]}; a newer build may know it")
    _refuse_needy(output, quant, source)
    m = re.search(r"quant size\s*=\s*(\d{1,12}(?:\.\d{1,9})?) MiB", output)
    return round(float(m[1]) * 2**20) + source.file_bytes - source.tensor_bytes if m else None


def refuse_unloadable(engine: Engine, source: gguf_file.Header, scratch: Path) -> None:
    """Raise QuantizeError if the engine cannot load a model with the source's header and tensors.

    Checked with llama-fit-params, which reads no weights and uses no device; skipped if the build lacks it.
    """
    tool = engine.folder / "llama-fit-params"
    if not tool.is_file():
        return
    argv = [str(tool), "--device", "none", "-lv", "4", "--fit-print", "on", "-m", str(source.path)]
    for attempt in range(3):  # the tool sometimes loses the last lines of its log
        code, output = _run(argv, scratch / f"loads-{attempt}.log", HEADER_S)
        why = re.search(r"error loading model: (.{1,300})|GGML_ASSERT\((.{1,200})\) failed", output)
        if code and why:
            raise QuantizeError(
                f"{engine} cannot load {source.path.name}: {(why[1] or why[2]).strip()}; take another conversion of "
                "the model, or another build of llama.cpp"
            )
        if not code:
            return


def _run(
    argv: list[str], log: Path, limit_s: float, tensors: int = 0, cwd: Path | None = None
) -> tuple[int | None, str]:
    """Run a tool to its end; return its exit code and log. With `tensors`, its `[ 12/ 51]` lines move a progress bar.

    Raises QuantizeError, and ends the tool, if it takes too long or writes too much.
    """
    deadline = time.monotonic() + limit_s
    bar = tqdm(total=tensors, desc=log.stem, unit="tensor", disable=None if tensors else True, leave=False)
    with process.Child(argv, log, process.environment(log.parent), cwd=cwd) as child, bar:
        while child.running():
            if time.monotonic() > deadline:
                raise QuantizeError(f"{child.name} did not end in {limit_s:.0f} s; its log ends:\n{_end(log)}")
            if log.stat().st_size > LOG_BYTES:
                limit = f"more than {LOG_BYTES >> 20} MiB"
                raise QuantizeError(f"{child.name} wrote {limit} to its log; use another build. It ends:\n{_end(log)}")
            if tensors and (done := re.findall(r"\[ *(\d{1,9})/ *\d+\]", _end(log))):
                bar.update(int(done[-1]) - bar.n)
            time.sleep(0.02)
    with log.open("rb") as f:
        return child.stop().code, f.read(LOG_BYTES).decode("utf-8", errors="replace")


def _end(log: Path, lines: int = 8) -> str:
    """The last lines of a log, however long it is."""
    with log.open("rb") as f:
        f.seek(max(0, f.seek(0, 2) - TAIL_BYTES))
        return "\n".join(f.read(TAIL_BYTES).decode("utf-8", errors="replace").splitlines()[-lines:])[-2000:]


def make(source: models.Source, quant: str, engine: Engine, scratch: Path, matrix: Imatrix | None = None) -> Quantised:
    """The quantised file of `source`, made unless it exists with the hash in its note.

    matrix: importance of the source's weights; the file's name then says so. The tool's logs go to `scratch`. Raises
    QuantizeError, files.FileError or gguf_file.GGUFError.
    """
    quants.check(engine, [quant])
    if source.path.exists():
        refuse_quantised(source.header)
    path = source.path.with_name(f"{source.model}-{quant}{'-imatrix' if matrix else ''}.gguf")
    expected: dict[str, Any] = {"model": source.model, "quant": quant, "source_sha256": source.sha256}
    expected |= {"engine_build": engine.build}
    expected |= {"imatrix": matrix.facts} if matrix else {}
    return _kept(path, expected, lambda: _make(source, quant, engine, scratch, path, matrix))


def _kept(path: Path, expected: dict[str, Any], make: Callable[[], dict[str, Any]]) -> Quantised:
    """The file at `path`, if its manifest includes `expected` and its hash; else made, with the rest of its manifest.

    Raises QuantizeError if it reads back differently than written.
    """
    content = files.Hashed(path)

    def write() -> dict[str, Any]:
        nonlocal content
        manifest = expected | make()
        content = files.Hashed(path, known=manifest["sha256"])  # computed just now
        return manifest

    for _ in range(2):
        manifest = models.once(path, expected, write)
        if content.sha256() == manifest["sha256"]:
            return Quantised(gguf_file.read_header(path), manifest, content)
        models.forget(path)
    raise QuantizeError(f"{path.name} reads back differently than written: check this machine's disk and memory")


def from_source(model: str, quant: str, scale: str, weights: str, matrix: Path | None = None) -> Quantised:
    """The file of a model at `quant`, with the engine that is found here; its source is obtained first.

    weights: twin or real. matrix: a file of llama-imatrix. Raises ParamsError before anything is written, also where
    the quant needs a matrix, and what `imatrix.read`, `sources.obtain`, `engine.find` and `make` raise.
    """
    llama = engine.find()
    quants.check(llama, [quant])
    read = imatrix.read(matrix) if matrix else None
    with TemporaryDirectory(prefix="moelib-quantize-") as scratch:
        shape = outline_of(model, scale)[1]
        if read and weights == "twin":
            read.refuse_other(shape.header)
        if not read and quant not in params.QUANTS:
            hollow = replace(shape.header, path=_hollow(shape, Path(scratch)))
            predict_bytes(llama, hollow, quant, Path(scratch))
        source = sources.obtain(model, weights, scale, needed=False)
        return make(source, quant, llama, Path(scratch), read)


def made(path: Path) -> Quantised:
    """The quantised file at `path` with its manifest. Raises QuantizeError if `make` has not made it, or it was changed
    since."""
    manifest = models.noted(path)
    content = files.Hashed(path, known=(manifest or {}).get("sha256") if models.untouched(path) else None)
    if not path.is_file() or manifest is None or "quant" not in manifest or content.sha256() != manifest["sha256"]:
        raise QuantizeError(
            f"{path} is not the file of the manifest beside it: delete {models.note(path).name} to measure it as it "
            "is, or make it again with `moelib quantize MODEL QUANT` or `moelib twin`"
        )
    return Quantised(gguf_file.read_header(path), manifest, content)


def place(manifest: Manifest) -> Path:
    """The path of the file that a manifest describes."""
    real, model = manifest.weights == "real", manifest.model
    return (sources.folder(model) if real else models.twin_folder(model, manifest.scale)) / manifest.file_name


def _make(
    source: models.Source, quant: str, engine: Engine, scratch: Path, path: Path, matrix: Imatrix | None
) -> dict[str, Any]:
    source = sources.whole(source)
    refuse_quantised(source.header)
    refuse_senseless(source.header, ())
    if matrix:
        matrix.refuse_other(source.header)
    refuse_unloadable(engine, source.header, scratch)
    predicted = predict_bytes(engine, source.header, quant, scratch, matrix)
    files.need_space(path.parent, predicted or source.header.file_bytes, f"quantising to {path.name}")
    with files.replacing(path) as partial:
        args, log = [str(source.path.absolute()), str(partial.absolute()), quant], scratch / f"{path.stem}.quantize.log"
        if matrix:  # by its name alone: the path as given is written into the file
            link = scratch / matrix.path.name
            link.unlink(missing_ok=True)
            link.symlink_to(matrix.path.absolute())
            args = ["--imatrix", link.name, *args]
        limit_s = READY_S + source.header.file_bytes / SLOWEST_BYTES_PER_S
        started = time.monotonic()
        argv = [engine.tool("llama-quantize"), *args, str(host.usable_cpus())]
        code, output = _run(argv, log, limit_s, len(source.header.tensors), scratch if matrix else None)
        seconds = time.monotonic() - started
        if "iostream error" in output or code == -signal.SIGXFSZ:  # from writing; it does not read with iostream
            raise files.FileError(f"{path.name} cannot be written: {files.full(path.parent)}")
        if code:
            _refuse_needy(output, quant, source.header)
            raise QuantizeError(f"llama-quantize ended with {code} on {path.name}; its log ends:\n{_end(log)}")
        header = gguf_file.read_header(partial)
        if {t.name: t.shape for t in source.header.tensors} != {t.name: t.shape for t in header.tensors}:
            raise QuantizeError(f"the {quant} file does not hold the source's tensors: use another build of llama.cpp")
        widest = max(header.tensors, key=lambda t: t.nbytes).type
        if widest in UNQUANTISED:
            raise QuantizeError(
                f"the {quant} file is not quantised, its largest tensor is {widest}: use another build of llama.cpp"
            )
        sha256 = files.sha256(partial)
    told = _told(header, quant, engine, predicted, sha256, seconds)
    return told | {"weights": source.weights, "origin": source.origin, "scale": source.scale, "file_name": path.name}


def _told(
    header: gguf_file.Header, quant: str, engine: Engine, predicted: int | None, sha256: str, seconds: float
) -> dict[str, Any]:
    """What a manifest says of a file that was just made, by its header."""
    made = {"predicted_bytes": predicted, "engine_version": engine.version, "quantize_s": round(seconds, 3)}
    return told(header, quant, sha256) | made


def told(header: gguf_file.Header, quant: str, sha256: str) -> dict[str, Any]:
    """What a manifest says of any file, by its header."""
    return {
        "file_bytes": header.file_bytes,
        "sha256": sha256,
        "parameters": header.parameters,
        "bits_per_weight": round(header.bits_per_weight, 4),
        "tensor_types": header.type_counts,
        "expert_types": header.expert_types,
        "expert_bytes": header.moved_bytes("cpu-moe"),
        "fallbacks": fallbacks(header, quant),
    }


def unquantised(source: models.Source) -> Quantised:
    """A source as a file that is compared with others, with a manifest. Raises QuantizeError if it is quantised."""
    refuse_quantised(source.header)
    names = {"model": source.model, "quant": source.header.label, "scale": source.scale, "weights": source.weights}
    manifest = (
        told(source.header, source.header.label, source.sha256)
        | names
        | {
            "origin": source.origin,
            "file_name": source.path.name,
            **dict.fromkeys(("predicted_bytes", "source_sha256", "engine_build", "engine_version", "quantize_s")),
        }
    )
    return Quantised(source.header, manifest, files.Hashed(*gguf_file.split_paths(source.path), known=source.sha256))


def types(engine: Engine, shape: Outline, quant: str, scratch: Path) -> Outline:
    """An unquantised outline with the types, and the order of tensors, that `llama-quantize` gives it at `quant`.

    They are those of its dry run, which reads the header alone. Raises QuantizeError.
    """
    refuse_quantised(shape.header)
    if quant not in (known := quants.offered(engine)):
        raise params.ParamsError(f"{engine} makes no {quant!r}{near(quant.upper(), list(known))}")
    path = _hollow(shape, scratch)
    code, output = _run([engine.tool("llama-quantize"), "--dry-run", str(path), quant], scratch / "types.log", READY_S)
    listed = re.findall(
        r"^\[ *\d+/ *\d+\] +(\S+) +- \[.*\], type = +(\w+), size = +[\d.]+ MiB(?:.*\((\w+)\))?", output, re.M
    )
    if code or len(listed) != len(shape.tensors):
        raise QuantizeError(
            f"{engine} tells no types for {shape.name} at {quant}: use a build whose llama-quantize has --dry-run, or "
            f"make the F16 twin and quantise it. Its log ends:\n{_end(scratch / 'types.log')}"
        )
    return shape.with_types({name: (to or kept).upper() for name, kept, to in listed}, known[quant])


def _hollow(shape: Outline, scratch: Path) -> Path:
    """A file that the engine reads as a whole one, with the header of an outline and nothing in it."""
    path = scratch / Path(shape.name).name
    with path.open("wb") as f:
        f.write(shape.to_bytes())
        f.truncate(shape.file_bytes)
    return path


def twin(
    model: str,
    whole: Outline,
    quant: str | None = None,
    layers: int | None = None,
    scale: str = "full",
    seed: int = 0,
    out: Path | None = None,
) -> Quantised:
    """The twin of a header: its metadata, tokenizer, tensors and types, with random blocks, made unless it exists.

    quant: types that llama-quantize would give, for an outline that is not quantised; None: the header's own. layers:
    only the first so many. What it takes is the disk's sequential write. Raises GGUFError, QuantizeError, FileError,
    EngineError.
    """
    llama, shape = engine.find(), whole.as_twin()
    label, made_from = quant or shape.header.label, hashlib.sha256(whole.to_bytes()).hexdigest()
    if layers is not None:
        shape, scale = whole.first_layers(layers), f"{scale}-first-{layers}"
    path = out or models.twin_folder(model, scale) / f"{model}-{label}-twin.gguf"
    expected: dict[str, Any] = {"model": model, "quant": label, "scale": scale, "weights": "twin"}
    origin = f"geometry twin written by moelib, seed {seed}, embeddings x {fill.LOUD}, from the header of {whole.name}"
    expected |= {"origin": origin, "file_name": path.name, "source_sha256": made_from, "engine_build": llama.build}

    def make() -> dict[str, Any]:
        if quant:
            refuse_quantised(shape.header)
        with TemporaryDirectory(prefix="moelib-twin-") as scratch:
            try:
                typed = types(llama, shape, quant, Path(scratch)) if quant else shape
                refuse_senseless(typed.header, ())
                refuse_unloadable(llama, replace(typed.header, path=_hollow(typed, Path(scratch))), Path(scratch))
            except QuantizeError as err:
                if layers is None:
                    raise
                other = "another number of layers may be a model"
                raise QuantizeError(f"with its first {layers} layers alone, {err}; {other}") from None
        started = time.monotonic()
        sha256 = fill.write(path, typed, llama.library("libggml-base"), seed)
        header = gguf_file.read_header(path)
        return _told(header, label, llama, typed.file_bytes, sha256, time.monotonic() - started)

    return _kept(path, expected, make)


def outline_of(what: str, scale: str = "full") -> tuple[str, Outline]:
    """(name of the model, its outline): of a catalogued model at `scale`, or of a local GGUF, split or not.

    Raises ParamsError, GGUFError.
    """
    if not what.endswith(".gguf"):
        if file := sources.any_file_of(what):
            return what, remote.outline(file) if remote.is_address(file) else outline.read(file)
        entry = params.model(what)
        return what, outline.of_geometry(entry.at_scale(scale), entry.title, f"{what}-F16.gguf")
    whole = outline.read(what)
    return whole.header.model_name, whole
