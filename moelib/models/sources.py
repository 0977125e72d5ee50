"""Provide source files: geometry twins, and real weights from the Hub, from a local file, or from safetensors; and
the files of models that the catalogue gives as they are.

Real weights are stored in `models/MODEL/real/`. `source.json` there names the files and their origin; each file has a
note with its SHA-256. A download is accepted only if it has the pinned hash.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from moelib.base import files
from moelib.catalogue import params, pins
from moelib.gguf import gguf_file
from moelib.models import candidates, hub, models, remote, weights
from moelib.models.models import Source
from moelib.models.weights import SourceError

COMMIT = re.compile(r"[0-9a-f]{40}")
PINNED = re.compile(r"\S+/\S+@[0-9a-f]{40}")
"""The origin of a source that can be downloaded from the Hub again."""
LARGEST_HTTP_BYTES = 50_000_000_000
"""Of a file that the Hub gives over plain HTTP; larger ones come by xet alone."""


def obtain(model: str, weights: str, scale: str, needed: bool = True) -> Source:
    """The source of a study's cell: the twin at `scale`, or the real weights, downloaded if they are missing.

    With `needed` false, a file that once existed may be missing. Raises ParamsError, SourceError, HubError, FileError.
    """
    if weights == "twin":
        return models.make_twin(model, scale, needed=needed)
    if params.model(model).held:
        return _held(model)
    chosen = _chosen(model)
    return chosen if chosen and not needed else _restored(chosen) if chosen else fetch(model)


def whole(source: Source) -> Source:
    """`source`, with its files made or downloaded again if they are missing or changed."""
    if source.weights == "twin":
        return models.make_twin(source.model, source.scale)
    return _held(source.model) if _is_held(source.model) else _restored(source)


def _is_held(model: str) -> bool:
    """Whether the repository has the weights of a model; a source may be of one that the catalogue does not have."""
    entry = params.entries("models.yaml").get(model)
    return isinstance(entry, dict) and "held" in entry


def _held(model: str) -> Source:
    """The weights that the repository holds, linked to from where quantised files go. Raises SourceError."""
    held = params.model(model).held
    if held is None:
        raise SourceError(f"this repository does not hold the weights of {model}")
    original, place = params.root() / held.file, folder(model)
    restore = "restore it from the repository (`git checkout` brings it back)"
    if not original.is_file():
        raise SourceError(f"{held.file}, the weights of {model}, is missing: {restore}")
    path = place / original.name

    def link() -> dict[str, Any]:
        if (sha256 := weights.digest(original)) != held.sha256:
            raise SourceError(
                f"{held.file} is not the file that params/models.yaml names ({sha256[:12]}...): {restore}"
            )
        _link(path, original.resolve())
        return held.model_dump()

    with models.keeping(place):
        models.once(path, held.model_dump(), link)
        return _choose(model, {path: held.sha256}, held.origin)


def _restored(source: Source) -> Source:
    """`source`, downloaded again if its files are missing or changed. Raises SourceError if it was a local file."""
    if _intact(source):
        return source
    if not PINNED.fullmatch(source.origin):
        raise SourceError(
            f"the weights of {source.model} are {source.origin}, which is missing or was changed: give it again with "
            f"`moelib fetch {source.model} --from PATH`, or take the pinned ones with `moelib fetch {source.model}`"
        )
    return fetch(source.model)


def folder(model: str) -> Path:
    return models.folder() / model / "real"


def fetched(model: str) -> Source | None:
    """What was fetched of a model that is a file on the Hub, if it is whole, and what is pinned and named now."""
    address, chosen, pin = params.model(model).address, _chosen(model), pins.of(model)
    if address is None or chosen is None or pin is None or not _is_of(pin, address):
        return None
    pinned = {Path(n).name: f.sha256 for n, f in pin.files.items()}
    same = (chosen.path.name, chosen.sha256) == (next(iter(pinned)), files.joint_sha256(pinned))
    return chosen if same and _intact(chosen) else None


def file_of(model: str) -> Path | None:
    """The GGUF of a catalogued model that is a file, downloaded from the Hub if it is not here; None of other models.

    Raises what `fetch` does.
    """
    entry = params.model(model)
    return (fetched(model) or fetch(model)).path if entry.address else entry.path


def any_file_of(model: str) -> str | None:
    """The same without a download: a path, or an address on the Hub of what is not here."""
    entry = params.model(model)
    if entry.address is None:
        return None if entry.path is None else str(entry.path)
    if here := fetched(model):
        return str(here.path)
    pin = pins.of(model)
    return entry.address if pin is None or not _is_of(pin, entry.address) else _origin(pin, entry.address)


def _origin(pin: params.Pin, address: str | None) -> str:
    """Where pinned files come from, as manifests say it: of a file that is measured as it is, its address."""
    return (
        f"hf:{pin.repository}/{next(iter(pin.files))}@{pin.revision}" if address else f"{pin.repository}@{pin.revision}"
    )


def _is_of(pin: params.Pin, address: str) -> bool:
    """Whether a pin is of what an address names; a branch or tag names what it did when it was pinned."""
    repository, path, revision = remote.parse(address)
    fixed = revision is not None and COMMIT.fullmatch(revision)
    return pin.repository == repository and path in pin.files and (not fixed or pin.revision == revision)


def _upstream(model: str) -> params.Upstream:
    entry = params.model(model)
    if entry.held:
        raise SourceError(
            f"the weights of {model} lie in this repository ({entry.held.file}): there is nothing to fetch"
        )
    if entry.file:
        where = f"`moelib fetch {model}` downloads it" if entry.address else "there is nothing to fetch"
        raise SourceError(f"{model} is the file {entry.file}, by params/models.yaml: {where}")
    entry.at_scale("full")  # raises where the model is excluded
    if entry.upstream is None:
        raise SourceError(
            f"params/models.yaml names no publisher of {model}; give a file: `moelib fetch {model} --from PATH`"
        )
    return entry.upstream


def fetch(model: str, endpoint: str | None = None) -> Source:
    """Download the pinned files of `model`, resuming interrupted downloads, and check their hashes.

    Raises SourceError if nothing is pinned or a hash differs, HubError, or FileError if the disk is too small.
    """
    client, address, pin = hub.api(endpoint), params.model(model).address, pins.of(model)
    if address is None:
        upstream = _upstream(model)
    elif pin is None or not _is_of(pin, address):
        pin = candidates.at(address, client)
        with models.keeping(pins.path()):
            pins.write(model, pin)
    if not pin:
        raise SourceError(
            f"no file of {model} is pinned in params/pins.yaml: `moelib fetch {model} --pin OWNER/NAME` pins the F16 "
            f"files of a repository (the plan names the publisher {upstream.publisher}); or convert "
            f"{upstream.original} yourself: `moelib fetch {model} --from FOLDER`"
        )
    place = folder(model)
    with models.keeping(place):
        files.need_space(place, max(0, sum(left for left, _ in _missing(model, pin))), f"fetching {model}")
        hashes = {}
        for name, want in pin.files.items():
            path = place / Path(name).name
            by = _download_large if want.bytes > LARGEST_HTTP_BYTES else _download
            get = partial(by, client, pin, name, want, path)
            hashes[path] = models.once(path, want.model_dump(), get)["sha256"]
        return _choose(model, hashes, _origin(pin, address))


def missing_bytes(model: str) -> int | None:
    """Bytes of the model's real weights that are to be downloaded yet; None where nothing is pinned, nor here."""
    address, chosen, pin = params.model(model).address, _chosen(model), pins.of(model)
    if params.model(model).held or (fetched(model) if address else chosen and _intact(chosen)):
        return 0
    if pin is None or (address and not _is_of(pin, address)):
        return None
    return sum(left for left, _ in _missing(model, pin))


def _missing(model: str, pin: params.Pin) -> Iterator[tuple[int, Path]]:
    """(bytes to be downloaded yet, path) of each pinned file that is not here."""
    for name, want in pin.files.items():
        path = folder(model) / Path(name).name
        if not path.exists():
            yield want.bytes - _arrived(_begun(path, want)), path


def _begun(path: Path, want: params.SourceFile) -> Path:
    return path.with_name(f".{path.name}.{want.sha256[:12]}.part")  # the hash keeps downloads of different pins apart


def _arrived(begun: Path) -> int:
    return begun.stat().st_size if begun.exists() else 0


def _download(client: Any, pin: params.Pin, name: str, want: params.SourceFile, path: Path) -> dict[str, Any]:
    """Download one file, resuming an earlier attempt."""
    begun, operation = _begun(path, want), f"fetching {name} of {pin.repository}"
    if _arrived(begun) > want.bytes:
        begun.unlink()
    with hub.asking(operation, receives=want.bytes), begun.open("ab") as f:
        location = hub.locate(client, pin.repository, name, pin.revision)
        f.writelines(hub.download(*location, f.tell(), want.bytes, path.name))
    return _keep(begun, path, want, operation)


def _download_large(client: Any, pin: params.Pin, name: str, want: params.SourceFile, path: Path) -> dict[str, Any]:
    """Download one file that is too large for plain HTTP, by xet, which has its own cache for resuming."""
    begun, operation = _begun(path, want), f"fetching {name} of {pin.repository}"
    with hub.asking(operation, receives=want.bytes):
        arrived = client.hf_hub_download(pin.repository, name, revision=pin.revision, local_dir=path.parent / ".hub")
    os.replace(arrived, begun)
    shutil.rmtree(path.parent / ".hub", ignore_errors=True)
    return _keep(begun, path, want, operation)


def _keep(begun: Path, path: Path, want: params.SourceFile, operation: str) -> dict[str, Any]:
    """Rename a finished download to its final name, if its hash is the pinned one. Raises SourceError."""
    sha256 = weights.digest(begun)
    if sha256 != want.sha256:
        begun.unlink()
        raise SourceError(
            f"{operation}: the download has SHA-256 {sha256[:12]}..., but {want.sha256[:12]}... is pinned; it was "
            "deleted. Run again; if this repeats, the pin is of another file: pin again"
        )
    with files.replacing(path) as final:
        os.replace(begun, final)
    return want.model_dump()


def adopt(model: str, given: Path) -> Source:
    """Use local weights: an F16 GGUF, any file of it if it is split, or a folder of safetensors to convert.

    The GGUF is not copied but linked to. A file that is not the model is refused before anything is replaced. Raises
    SourceError, GGUFError, FileError.
    """
    upstream, place = _upstream(model), folder(model)
    with models.keeping(place):
        if given.is_dir():
            path = place / f"{model}-F16.gguf"
            origin = f"{upstream.original}, converted by {weights.CONVERTER} from {given.resolve().name}"
            facts = {"origin": origin, "of": weights.safetensors(given)}
            note = models.once(path, facts, lambda: facts | {"sha256": weights.convert(model, given, path)})
            return _choose(model, {path: note["sha256"]}, origin)
        if given.suffix != ".gguf":
            raise SourceError(f"{given.name} does not end in .gguf: give a GGUF file or a folder of safetensors")
        parts = gguf_file.split_paths(given)
        before = [files.state(p) for p in parts if p.exists()]
        weights.require(model, gguf_file.read_header(parts[0]))
        place.mkdir(parents=True, exist_ok=True)
        digests = {part: weights.digest(part) for part in parts}
        if [files.state(p) for p in parts] != before:
            raise SourceError(f"{given.name} was changed while it was read: give it again when it is complete")
        hashes = {}
        for part, sha256 in digests.items():
            path = place / part.name
            if part.resolve() != path.resolve():
                _link(path, part.resolve())
            hashes[path] = models.once(path, {"sha256": sha256}, partial(dict, sha256=sha256))["sha256"]
        return _choose(model, hashes, f"local file {given.name}")


def _link(path: Path, target: Path) -> None:
    """Make `path` a link to `target`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    link = path.with_name(f".{path.name}.{files.node()}.{os.getpid()}.partial")
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    os.replace(link, path)


def _choose(model: str, hashes: dict[Path, str], origin: str) -> Source:
    """Check the files and record them as the model's source. Raises SourceError."""
    first = next(iter(hashes))
    header = gguf_file.read_header(first)
    if params.model(model).file is None:
        weights.require(model, header)
    sha256 = files.joint_sha256({p.name: h for p, h in hashes.items()})
    chosen = {"file": first.name, "sha256": sha256, "origin": origin}
    files.write_json(folder(model) / "source.json", chosen)
    return _source(model, chosen)


def _source(model: str, chosen: dict[str, str]) -> Source:
    path = folder(model) / chosen["file"]
    return Source(model, "real", "full", path, chosen["sha256"], chosen["origin"])


def _chosen(model: str) -> Source | None:
    """The source that was recorded last; None without one, or if the record is damaged."""
    try:
        chosen = json.loads((folder(model) / "source.json").read_text(encoding="utf-8"))
        good = all(isinstance(chosen[k], str) for k in ("file", "sha256", "origin"))
        return _source(model, chosen) if good and Path(chosen["file"]).name == chosen["file"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _intact(source: Source) -> bool:
    """Whether every file of the source agrees with its note, and they are the recorded files."""
    noted = {p: models.noted(p) for p in gguf_file.split_paths(source.path)}
    hashes = {p.name: facts["sha256"] for p, facts in noted.items() if facts and models.kept(p)}
    return len(hashes) == len(noted) and files.joint_sha256(hashes) == source.sha256


def pin(
    model: str, repository: str, revision: str = "main", endpoint: str | None = None, named: str | None = None
) -> params.Pin:
    """Choose the unquantised files of `model` in `repository` on the Hub, or the one `named`, and pin them in
    params/pins.yaml.

    Raises ChoiceError if there are none, or several equally good; HubError, PinsError.
    """
    _upstream(model)
    pins.read()  # report a damaged file of pins before any request to the Hub
    pinned = candidates.choose(model, repository, revision, hub.api(endpoint), named)
    with models.keeping(pins.path()):
        pins.write(model, pinned)
    return pinned
