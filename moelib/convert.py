"""Convert a folder of safetensors to one F16 GGUF with llama.cpp's converter."""

import os
import shlex
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from moelib import engine, files, gguf_file, process, weights
from moelib.weights import SourceError

CONVERTER = "convert_hf_to_gguf.py"
CONVERT_S, CONVERT_BYTES_PER_S = 600.0, 5e6  # far slower than any machine measured, so that only a hang is ended


def converter() -> list[str]:
    """Command of llama.cpp's converter: $MOELIB_CONVERTER, or the script above the engine's folder. Raises SourceError.

    The variable holds the script's path, or a command such as "/its/python /its/convert_hf_to_gguf.py" to run the
    script with another Python that has its requirements.
    """
    setting = os.environ.get("MOELIB_CONVERTER", "")
    try:
        named = shlex.split(setting)
    except ValueError as err:
        raise SourceError(
            f"MOELIB_CONVERTER is {setting!r}, which is not a command ({err}): set it to the script's path"
        ) from None
    if named[:-1] and not shutil.which(named[0]):
        raise SourceError(
            f"MOELIB_CONVERTER names {named[0]}, which is not a program: set it to the script's path alone"
        )
    build = engine.find().folder if not named else Path()
    for path in [Path(named[-1])] if named else [p / CONVERTER for p in (build, *build.parents[:3])]:
        if path.is_file():
            return [*(named[:-1] or [sys.executable]), str(path)]
    raise SourceError(
        f"safetensors are converted by llama.cpp's {CONVERTER}, which was not found"
        f"{' at ' + named[-1] if named else ''}: take it and its folder from the source of the llama.cpp in use, "
        "install its requirements, and set MOELIB_CONVERTER to its path"
    )


def inputs(given: Path) -> dict[str, list[int]]:
    """Name -> size and time of each file of a folder of safetensors. Raises SourceError."""
    shards = {p.name: p.stat() for p in sorted(given.glob("*.safetensors")) if p.is_file()}
    config = given / "config.json"
    if not sum(s.st_size for s in shards.values()) or not config.is_file():
        raise SourceError(f"{given} lacks config.json or *.safetensors: give a folder with a model from the Hub")
    return {name: [s.st_size, s.st_mtime_ns] for name, s in {**shards, config.name: config.stat()}.items()}


def run(model: str, given: Path, path: Path) -> str:
    """Convert the folder `given` to `path`; return its SHA-256. Raises SourceError if the result is not the model."""
    nbytes = sum(size for size, _ in inputs(given).values())
    command = converter()
    files.need_space(path.parent, nbytes, f"converting {given.name}")
    limit_s = process.patience(CONVERT_S + nbytes / CONVERT_BYTES_PER_S)
    with files.replacing(path) as partial, TemporaryDirectory() as scratch:
        argv = [*command, str(given.resolve()), "--outtype", "f16", "--outfile", str(partial)]
        with process.Child(argv, Path(scratch) / "convert.log", process.environment(Path(scratch))) as child:
            child.wait_end(limit_s)
            log_tail = child.tail()
        if child.exit.code or not partial.exists():
            raise SourceError(f"{CONVERTER} ended with {child.exit.code} on {given.name}; its log ends:\n{log_tail}")
        weights.require(model, gguf_file.read_header(partial), f"the GGUF converted from {given.name}")
        return weights.digest(partial)
