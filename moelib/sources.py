"""Source files by one door: geometry twins, and real weights from the Hub, from a file, or from safetensors.

Real weights lie in `models/MODEL/real/`. `source.json` there says which files they are and where they came from; every
file has a note with its SHA-256, and what the Hub sends is believed only if it has the hash that was pinned.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from moelib import engine, files, gguf_file, hub, models, params, process
from moelib.models import Source

F16 = re.compile(r"(?i)(?<![a-z0-9])(fp?16|bf16)(?![a-z0-9])")
CONVERTER = "convert_hf_to_gguf.py"
CONVERT_S, CONVERT_BYTES_PER_S = 600.0, 5e6  # far slower than any machine seen, so that only a hang is ended


class SourceError(params.UserError):
    """A model's source cannot be had, or is not what it should be; the message says why and what to do."""


def obtain(model: str, weights: str, scale: str, needed: bool = True) -> Source:
    """The source of a study's cell: the twin at `scale`, or the real weights, fetched if they are not there.

    A file that is not `needed` may be gone, if it once was there. Raises ParamsError, SourceError, HubError, FileError.
    """
    if weights == "twin":
        return models.make_twin(model, scale, needed=needed)
    chosen = _chosen(model)
    return chosen if chosen and (not needed or _there(chosen)) else fetch(model)


def whole(source: Source) -> Source:
    """`source`, if its files hold what they held; had again if they are gone or were changed."""
    if source.weights == "twin":
        return models.twin_whole(source)
    return source if _there(source) else fetch(source.model)


def folder(model: str) -> Path:
    return models.folder() / model / "real"


def _upstream(model: str) -> params.Upstream:
    entry = params.model(model)
    entry.at_scale("full")  # raises where the model is excluded
    if entry.upstream is None:
        raise SourceError(f"params/models.yaml names no publisher of {model}; give a file: moelib fetch {model} --from")
    return entry.upstream


def fetch(model: str, endpoint: str | None = None) -> Source:
    """Download the pinned files of `model`, going on where an earlier try ended, and check their hashes.

    Raises SourceError if nothing is pinned or what came is not what was pinned, HubError, FileError without room.
    """
    from huggingface_hub import constants

    told = _upstream(model)
    if not told.files:
        raise SourceError(
            f"no file of {model} is pinned in params/models.yaml: `moelib fetch {model} --pin OWNER/NAME` pins the F16 "
            f"files of a repository (the plan names the publisher {told.publisher}); or convert {told.original} "
            f"yourself: `moelib fetch {model} --from FOLDER`"
        )
    client, place = hub.api(endpoint), folder(model)
    missing = sum(f.bytes - _arrived(_begun(place / Path(n).name, f)) for n, f in told.files.items())
    missing -= sum(f.bytes for n, f in told.files.items() if (place / Path(n).name).exists())
    files.need_space(place, max(0, missing), f"fetching {model}")
    hashes = {}
    for name, want in told.files.items():
        path = place / Path(name).name
        by = _download_large if want.bytes > constants.MAX_HTTP_DOWNLOAD_SIZE else _download
        get = partial(by, client, told, name, want, path)
        hashes[path] = models.once(path, want.model_dump(), get)["sha256"]
    return _choose(model, hashes, f"{told.repository}@{told.revision}")


def _begun(path: Path, want: params.SourceFile) -> Path:
    return path.with_name(f".{path.name}.{want.sha256[:12]}.part")  # bytes of another pin are never gone on with


def _arrived(begun: Path) -> int:
    return begun.stat().st_size if begun.exists() else 0


def _download(client: Any, told: params.Upstream, name: str, want: params.SourceFile, path: Path) -> dict[str, Any]:
    """Get one file by ranges: the library's own download begins anew with every call."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get

    begun, what = _begun(path, want), f"fetching {name} of {told.repository}"
    if _arrived(begun) > want.bytes:
        begun.unlink()
    begun.touch()
    url = hf_hub_url(told.repository, name, revision=told.revision, endpoint=client.endpoint)
    try:
        with hub.asking(what), begun.open("r+b") as f:
            at, headers = hub.located(client, url)
            had = f.seek(0, os.SEEK_END)
            shown = {"expected_size": want.bytes, "displayed_filename": path.name}
            http_get(at, f, resume_size=had, headers=headers, **shown)
    except OSError as err:
        if err.errno in files.NO_SPACE:
            raise files.FileError(f"{path.name} cannot be written: {files.full(path.parent)}") from None
        raise
    return _keep(begun, path, want, what)


def _download_large(
    client: Any, told: params.Upstream, name: str, want: params.SourceFile, path: Path
) -> dict[str, Any]:
    """Get one file that is too large for plain HTTP, by xet, which keeps what it has in a cache of its own."""
    what = f"fetching {name} of {told.repository}"
    with hub.asking(what):
        got = client.hf_hub_download(told.repository, name, revision=told.revision, local_dir=path.parent / ".hub")
    begun = _begun(path, want)
    os.replace(got, begun)
    shutil.rmtree(path.parent / ".hub", ignore_errors=True)
    return _keep(begun, path, want, what)


def _keep(begun: Path, path: Path, want: params.SourceFile, what: str) -> dict[str, Any]:
    """Give a file that came its name, if it is the one that was pinned."""
    sha256 = _hash(begun)
    if sha256 != want.sha256:
        begun.unlink()
        raise SourceError(
            f"{what}: what came has SHA-256 {sha256[:12]}..., pinned is {want.sha256[:12]}...; nothing of it was kept. "
            "Run again; if it stays so, the pin in params/models.yaml is not of this file"
        )
    with files.replacing(path) as final:
        os.replace(begun, final)
    return want.model_dump()


def _hash(path: Path) -> str:
    """SHA-256 of a large file, with progress."""
    digest = hashlib.sha256()
    bar = {"total": path.stat().st_size, "desc": f"checking {path.name}", "unit": "B", "unit_scale": True}
    with path.open("rb") as f, tqdm(**bar, disable=None, leave=False) as shown:
        while chunk := f.read(1 << 24):
            digest.update(chunk)
            shown.update(len(chunk))
    return digest.hexdigest()


def adopt(model: str, given: Path) -> Source:
    """Use what the user has: an F16 GGUF, its first file where it is split, or a folder of safetensors to convert.

    The GGUF stays where it is, and is linked to. Raises SourceError, GGUFError.
    """
    told, place = _upstream(model), folder(model)
    place.mkdir(parents=True, exist_ok=True)
    if given.is_dir():
        path = place / f"{model}-F16.gguf"
        origin = f"{told.original}, converted by {CONVERTER} from {given.resolve().name}"
        made = models.once(path, {"origin": origin}, lambda: _convert(given, path, origin))
        return _choose(model, {path: made["sha256"]}, origin)
    hashes = {}
    for part in gguf_file.split_paths(given):
        if not part.is_file():
            raise SourceError(f"{part.name} is not in {given.parent}: give a GGUF file or a folder of safetensors")
        path = place / part.name
        if part.resolve() != path.resolve():
            path.unlink(missing_ok=True)
            path.symlink_to(part.resolve())
        hashes[path] = models.once(path, {}, lambda p=path: {"sha256": _hash(p)})["sha256"]
    return _choose(model, hashes, f"local file {given.name}")


def converter() -> list[str]:
    """Command of llama.cpp's converter: $MOELIB_CONVERTER, or the script above the engine's folder. Raises SourceError.

    The variable is the script's path, or a command: "/its/python /its/convert_hf_to_gguf.py" where another Python has
    what the script imports.
    """
    named = shlex.split(os.environ.get("MOELIB_CONVERTER", ""))
    build = engine.find().folder if not named else Path()
    for path in [Path(named[-1])] if named else [p / CONVERTER for p in (build, *build.parents[:3])]:
        if path.is_file():
            return [*(named[:-1] or [sys.executable]), str(path)]
    raise SourceError(
        f"safetensors are converted by llama.cpp's {CONVERTER}, which was not found"
        f"{' at ' + named[-1] if named else ''}: take it with its folder from the source of the llama.cpp in use, "
        "install its requirements, and set MOELIB_CONVERTER to its path"
    )


def _convert(given: Path, path: Path, origin: str) -> dict[str, Any]:
    weights = sum(p.stat().st_size for p in given.glob("*.safetensors"))
    if not weights or not (given / "config.json").is_file():
        raise SourceError(f"{given} holds no config.json and *.safetensors: it is not a model as the Hub publishes it")
    command = converter()
    files.need_space(path.parent, weights, f"converting {given.name}")
    limit_s = process.patience(CONVERT_S + weights / CONVERT_BYTES_PER_S)
    with files.replacing(path) as made, TemporaryDirectory() as scratch:
        argv = [*command, str(given.resolve()), "--outtype", "f16", "--outfile", str(made)]
        with process.Child(argv, Path(scratch) / "convert.log", process.environment(Path(scratch))) as child:
            child.wait_end(limit_s)
            told = child.tail()
        if child.exit.code or not made.exists():
            raise SourceError(f"{CONVERTER} ended with {child.exit.code} on {given.name}; its log ends:\n{told}")
        return {"origin": origin, "sha256": _hash(made)}


def _choose(model: str, hashes: dict[Path, str], origin: str) -> Source:
    """Note which files, by path, are the model's source, after a look at what they hold."""
    first = next(iter(hashes))
    header = gguf_file.read_header(first)
    _is_the_model(model, header)
    sha256 = hashes[first] if len(hashes) == 1 else files.digest({p.name: h for p, h in hashes.items()})
    told = {"file": first.name, "sha256": sha256, "origin": origin}
    files.write_json(folder(model) / "source.json", told)
    return _source(model, told)


def _source(model: str, told: dict[str, str]) -> Source:
    return Source(model, "real", "full", folder(model) / told["file"], told["sha256"], told["origin"])


def _chosen(model: str) -> Source | None:
    try:
        return _source(model, json.loads((folder(model) / "source.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _there(source: Source) -> bool:
    """Whether every file of the source is what its note says."""
    return all(models.kept(p) for p in gguf_file.split_paths(source.path))


SHAPE = ("block_count", "embedding_length", "feed_forward_length", "expert_count", "expert_used_count")


def _is_the_model(model: str, header: gguf_file.Header) -> None:
    """Raise SourceError unless the file is of the model's architecture and shape."""
    geometry = params.model(model).at_scale("full")
    arch = header.metadata["general.architecture"]
    wrong = [f"architecture {arch}, not {geometry.architecture}"] if arch != geometry.architecture else []
    found = {k: header.metadata.get(f"{arch}.{k}") for k in SHAPE}
    wrong += [f"{k} {v}, not {getattr(geometry, k)}" for k, v in found.items() if v != getattr(geometry, k)]
    if wrong:
        raise SourceError(f"{header.path.name} is not {model}: {'; '.join(wrong)}. Give its F16 GGUF")


def pin(model: str, repository: str, revision: str = "main", endpoint: str | None = None) -> params.Upstream:
    """Ask the Hub for the F16 files of `repository` and write them into `params/models.yaml`.

    Raises SourceError if it has none, or several kinds without a way to choose; HubError.
    """
    told = _upstream(model)
    with hub.asking(f"pinning {repository}"):
        info = hub.api(endpoint).model_info(repository, revision=revision, files_metadata=True)
    ggufs = {s.rfilename: s for s in info.siblings or () if s.rfilename.endswith(".gguf")}
    kinds: dict[str, list[str]] = {}
    for name in sorted(ggufs):
        if m := F16.search(Path(name).name):
            kinds.setdefault("BF16" if m[1].lower() == "bf16" else "F16", []).append(name)
    names = kinds.get("F16") or kinds.get("BF16") or []
    if not names or [Path(n) for n in names] != gguf_file.split_paths(Path(names[0])):
        raise SourceError(
            f"{repository} has no single F16 or BF16 model; its GGUF files are: {', '.join(sorted(ggufs)) or 'none'}"
        )
    if unknown := [n for n in names if ggufs[n].lfs is None]:
        raise SourceError(f"{repository} tells no SHA-256 of {', '.join(unknown)}; it cannot be pinned")
    found = {n: {"bytes": ggufs[n].size, "sha256": ggufs[n].lfs.sha256} for n in names}
    pinned = told.model_dump() | {"repository": repository, "revision": info.sha, "files": found}
    files.write_bytes(*params.model_changed(model, "upstream", pinned))
    return params.model(model).upstream
