"""Source files by one door: geometry twins, and real weights from the Hub, from a file, or from safetensors.

Real weights lie in `models/MODEL/real/`. `source.json` there says which files they are and where they came from; every
file has a note with its SHA-256, and what the Hub sends is believed only if it has the hash that was pinned.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from moelib import candidates, convert, files, gguf_file, hub, models, params, pins, weights
from moelib.models import Source
from moelib.weights import SourceError

PINNED = re.compile(r"\S+/\S+@[0-9a-f]{40}")
"""The origin of what the Hub can give again."""


def obtain(model: str, weights: str, scale: str, needed: bool = True) -> Source:
    """The source of a study's cell: the twin at `scale`, or the real weights, fetched if they are not there.

    A file that is not `needed` may be gone, if it once was there. Raises ParamsError, SourceError, HubError, FileError.
    """
    if weights == "twin":
        return models.make_twin(model, scale, needed=needed)
    chosen = _chosen(model)
    return chosen if chosen and not needed else _had_again(chosen) if chosen else fetch(model)


def whole(source: Source) -> Source:
    """`source`, if its files hold what they held; had again if they are gone or were changed."""
    if source.weights == "twin":
        return models.twin_whole(source)
    return _had_again(source)


def _had_again(source: Source) -> Source:
    """`source` if its files hold what they held, else fetched again. Raises SourceError where only its owner has it."""
    if _intact(source):
        return source
    if not PINNED.fullmatch(source.origin):
        raise SourceError(
            f"the weights of {source.model} are {source.origin}, and that is gone or was changed: give it again, "
            f"`moelib fetch {source.model} --from PATH`; or take the pinned ones, `moelib fetch {source.model}`"
        )
    return fetch(source.model)


def folder(model: str) -> Path:
    return models.folder() / model / "real"


def _upstream(model: str) -> params.Upstream:
    entry = params.model(model)
    entry.at_scale("full")  # raises where the model is excluded
    if entry.upstream is None:
        raise SourceError(f"params/models.yaml names no publisher of {model}; give a file: moelib fetch {model} --from")
    return entry.upstream


@contextmanager
def _keeping(where: Path) -> Iterator[None]:
    """Turn what a folder refuses into one sentence."""
    try:
        yield
    except OSError as err:
        if err.errno in files.NO_SPACE:
            raise files.FileError(f"{where.name} cannot be written: {files.full(where)}") from None
        raise files.FileError(
            f"{err.filename or where} cannot be read or written ({err.strerror or err}): mend its rights, or set "
            "MOELIB_MODELS to a folder of your own"
        ) from None


def fetch(model: str, endpoint: str | None = None) -> Source:
    """Download the pinned files of `model`, going on where an earlier try ended, and check their hashes.

    Raises SourceError if nothing is pinned or what came is not what was pinned, HubError, FileError without room.
    """
    upstream, pin = _upstream(model), pins.of(model)
    if not pin:
        raise SourceError(
            f"no file of {model} is pinned in params/pins.yaml: `moelib fetch {model} --pin OWNER/NAME` pins the F16 "
            f"files of a repository (the plan names the publisher {upstream.publisher}); or convert "
            f"{upstream.original} yourself: `moelib fetch {model} --from FOLDER`"
        )
    client, place = hub.api(endpoint), folder(model)
    from huggingface_hub import constants

    with _keeping(place):
        missing = sum(f.bytes - _arrived(_begun(place / Path(n).name, f)) for n, f in pin.files.items())
        missing -= sum(f.bytes for n, f in pin.files.items() if (place / Path(n).name).exists())
        files.need_space(place, max(0, missing), f"fetching {model}")
        hashes = {}
        for name, want in pin.files.items():
            path = place / Path(name).name
            by = _download_large if want.bytes > constants.MAX_HTTP_DOWNLOAD_SIZE else _download
            get = partial(by, client, pin, name, want, path)
            hashes[path] = models.once(path, want.model_dump(), get)["sha256"]
        return _choose(model, hashes, f"{pin.repository}@{pin.revision}")


def _begun(path: Path, want: params.SourceFile) -> Path:
    return path.with_name(f".{path.name}.{want.sha256[:12]}.part")  # bytes of another pin are never gone on with


def _arrived(begun: Path) -> int:
    return begun.stat().st_size if begun.exists() else 0


def _download(client: Any, pin: params.Pin, name: str, want: params.SourceFile, path: Path) -> dict[str, Any]:
    """Get one file by ranges: the library's own download begins anew with every call."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get

    begun, what = _begun(path, want), f"fetching {name} of {pin.repository}"
    if _arrived(begun) > want.bytes:
        begun.unlink()
    begun.touch()
    url = hf_hub_url(pin.repository, name, revision=pin.revision, endpoint=client.endpoint)
    with hub.asking(what, receives=want.bytes), begun.open("r+b") as f:
        at, headers = hub.located(client, url)
        had = f.seek(0, os.SEEK_END)
        shown = {"expected_size": want.bytes, "displayed_filename": path.name}
        http_get(at, f, resume_size=had, headers=headers, **shown)
    return _keep(begun, path, want, what)


def _download_large(client: Any, pin: params.Pin, name: str, want: params.SourceFile, path: Path) -> dict[str, Any]:
    """Get one file that is too large for plain HTTP, by xet, which keeps what it has in a cache of its own."""
    what = f"fetching {name} of {pin.repository}"
    with hub.asking(what, receives=want.bytes):
        got = client.hf_hub_download(pin.repository, name, revision=pin.revision, local_dir=path.parent / ".hub")
    begun = _begun(path, want)
    os.replace(got, begun)
    shutil.rmtree(path.parent / ".hub", ignore_errors=True)
    return _keep(begun, path, want, what)


def _keep(begun: Path, path: Path, want: params.SourceFile, what: str) -> dict[str, Any]:
    """Give a file that came its name, if it is the one that was pinned."""
    sha256 = weights.digest(begun)
    if sha256 != want.sha256:
        begun.unlink()
        raise SourceError(
            f"{what}: what came has SHA-256 {sha256[:12]}..., pinned is {want.sha256[:12]}...; nothing of it was kept. "
            "Run again; if it stays so, pin again: the pin is not of this file"
        )
    with files.replacing(path) as final:
        os.replace(begun, final)
    return want.model_dump()


def adopt(model: str, given: Path) -> Source:
    """Use what the user has: an F16 GGUF, its first file where it is split, or a folder of safetensors to convert.

    The GGUF stays where it is, and is linked to. What is not the model is refused before anything is replaced. Raises
    SourceError, GGUFError, FileError.
    """
    upstream, place = _upstream(model), folder(model)
    with _keeping(place):
        if given.is_dir():
            path = place / f"{model}-F16.gguf"
            origin = f"{upstream.original}, converted by {convert.CONVERTER} from {given.resolve().name}"
            facts = {"origin": origin, "of": convert.inputs(given)}
            made = models.once(path, facts, lambda: facts | {"sha256": convert.run(model, given, path)})
            return _choose(model, {path: made["sha256"]}, origin)
        parts = _parts(given)
        weights.require(model, gguf_file.read_header(parts[0]))
        place.mkdir(parents=True, exist_ok=True)
        before = [files.state(p) for p in parts]
        digests = {part: weights.digest(part) for part in parts}
        weights.require(model, gguf_file.read_header(parts[0]))  # it may be another file by now
        if [files.state(p) for p in parts] != before:
            raise SourceError(f"{given.name} was changed while it was read: give it again once it is whole")
        hashes = {}
        for part, sha256 in digests.items():
            path = place / part.name
            if part.resolve() != path.resolve():
                _link(path, part.resolve())
            hashes[path] = models.once(path, {"sha256": sha256}, lambda s=sha256: {"sha256": s})["sha256"]
        return _choose(model, hashes, f"local file {given.name}")


def _parts(given: Path) -> list[Path]:
    """All files of the model that `given` is a file of. Raises SourceError."""
    if given.suffix != ".gguf":
        raise SourceError(f"{given.name} has no name that ends in .gguf: give it one, or a folder of safetensors")
    parts = gguf_file.split_paths(given)  # raises where the name is none that a split has
    if gone := [p.name for p in parts if not p.is_file()]:
        more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
        raise SourceError(
            f"{', '.join(gone[:3])}{more} is not in {given.parent}: give a GGUF file with all its parts beside it, or "
            "a folder of safetensors"
        )
    return parts


def _link(path: Path, target: Path) -> None:
    """Have `path` lead to `target`, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    link = path.with_name(f".{path.name}.{os.getpid()}.partial")
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    os.replace(link, path)


def _choose(model: str, hashes: dict[Path, str], origin: str) -> Source:
    """Note which files, by path, are the model's source, after a look at what they hold."""
    first = next(iter(hashes))
    weights.require(model, gguf_file.read_header(first))
    sha256 = _sum({p.name: h for p, h in hashes.items()})
    chosen = {"file": first.name, "sha256": sha256, "origin": origin}
    files.write_json(folder(model) / "source.json", chosen)
    return _source(model, chosen)


def _sum(hashes: dict[str, str]) -> str:
    """The digest of a source: its file's, or one of the digests of its files."""
    return next(iter(hashes.values())) if len(hashes) == 1 else files.digest(hashes)


def _source(model: str, chosen: dict[str, str]) -> Source:
    path = folder(model) / chosen["file"]
    return Source(model, "real", "full", path, chosen["sha256"], chosen["origin"])


def _chosen(model: str) -> Source | None:
    """What was chosen last; None if nothing was, or what says so is damaged."""
    try:
        chosen = json.loads((folder(model) / "source.json").read_text(encoding="utf-8"))
        good = all(isinstance(chosen[k], str) for k in ("file", "sha256", "origin"))
        return _source(model, chosen) if good and Path(chosen["file"]).name == chosen["file"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _intact(source: Source) -> bool:
    """Whether every file of the source is what its note says, and they are the ones that were chosen."""
    paths = gguf_file.split_paths(source.path)
    return all(models.kept(p) for p in paths) and _sum({p.name: _noted(p) for p in paths}) == source.sha256


def _noted(path: Path) -> str:
    return json.loads(models.note(path).read_text(encoding="utf-8"))["facts"]["sha256"]


def pin(
    model: str, repository: str, revision: str = "main", endpoint: str | None = None, named: Sequence[str] = ()
) -> params.Pin:
    """Ask the Hub for the unquantised files of `model` in `repository`, or for those `named`, and write down which they
    are, in params/pins.yaml.

    Raises ChoiceError if it has none, or several without a way to choose; HubError, PinsError.
    """
    _upstream(model)
    pins.read()  # a damaged file of pins is found before the Hub is asked
    pinned = candidates.choose(model, repository, revision, hub.api(endpoint), named)
    with _keeping(pins.path()):
        pins.write(model, pinned)
    return pinned
