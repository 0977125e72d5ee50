"""Choose the files of a Hub repository that hold a model's unquantised weights, from their headers.

Headers are read with range requests. Names are not reliable: a vision projector, a draft head or a quantised file may
have F16 in its name, and the model may not. Sizes only tell which files are too small.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from moelib.base import neutral
from moelib.base.bar import tqdm
from moelib.base.schema import build
from moelib.catalogue import params
from moelib.catalogue.upstream import Pin, SourceFile, hub_path, repository_name
from moelib.gguf import gguf_file
from moelib.models import hub, remote, weights

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAX_BYTES = 1 << 30  # read for all headers together
MAX_LOOKED_AT = 40  # models whose headers are read
MAX_PARTS = 500  # files of one model
PIECE = re.compile(r"(?i)\.(gguf\.\S*part\S*|gguf-split-\w+|part\d\S*)$")


class ChoiceError(params.UserError):
    """A repository has no file to pin, or several; the message gives the reason for each, and the next step."""


@dataclass(frozen=True)
class Candidate:
    """One model of a repository: a file, or all files of a split model, in order."""

    names: tuple[str, ...]
    files: tuple[SourceFile, ...]

    @property
    def nbytes(self) -> int:
        return sum(f.bytes for f in self.files)


@dataclass
class Listing:
    """The files of a repository at one commit."""

    repository: str
    commit: str
    files: dict[str, SourceFile]
    others: list[str]
    """Names of files that are not GGUF."""
    unfit: dict[str, str] = field(default_factory=dict)
    """GGUF -> why it cannot be pinned."""


def choose(model: str, repository: str, revision: str, client: "HfApi", named: str | None = None) -> Pin:
    """The unquantised weights of `model` in `repository`, preferring F16, then BF16, then F32; or the one with the
    file `named`.

    Raises ChoiceError, HubError.
    """
    repository_name(repository)
    listing = _listing(client, repository, revision)
    models = _candidates(listing)
    looked_at = [_named(listing, models, named)] if named else _large_enough(model, listing, models)
    fit: dict[str, list[Candidate]] = {}
    reader = remote.Reader(client, repository, listing.commit, MAX_BYTES)
    for one in tqdm(looked_at, desc="reading headers", disable=None, leave=False):
        try:
            header = reader.header({n: f.bytes for n, f in zip(one.names, one.files, strict=True)})
            why = weights.why_not(model, header)
        except gguf_file.GGUFError as err:
            why = [str(err).removeprefix(f"{PurePosixPath(one.names[0]).name}: ")]
        if why:
            listing.unfit[one.names[0]] = "; ".join(why)
        else:
            fit.setdefault(weights.kind(header), []).append(one)
    best = next((fit[k] for k in weights.UNQUANTISED if k in fit), [])
    if len(best) != 1:
        raise ChoiceError(_none(model, listing, best, looked_at[0].names[0] if named else None))
    (one,) = best
    return _pin(listing, one.names)


def at(address: str, client: "HfApi") -> Pin:
    """The files of the model at an address, whatever their types: nothing of them is read.

    Raises AddressError, which says what there is; ChoiceError, HubError.
    """
    repository, path, revision = remote.parse(address)
    listing = _listing(client, repository, revision or "main")
    sizes = {name: f.bytes for name, f in listing.files.items()}
    if path in listing.unfit:
        raise ChoiceError(f"{neutral.plain(path)} of {repository} cannot be pinned: {listing.unfit[path]}")
    return _pin(listing, remote.files_of(path, sizes, repository, revision))


def _pin(listing: Listing, names: Iterable[str]) -> Pin:
    files = {name: listing.files[name].model_dump() for name in names}
    facts = {"repository": listing.repository, "revision": listing.commit, "files": files}
    return build(Pin, f"the listing of {listing.repository}", facts)


def _listing(client: "HfApi", repository: str, revision: str) -> Listing:
    with hub.asking(f"pinning {repository}"):
        commit, siblings = remote.listed(client, repository, revision)
        listing = Listing(repository, commit, {}, [])
        for name in sorted(siblings):
            if not name.lower().endswith(".gguf"):
                listing.others.append(name)
                continue
            try:
                hub_path(name)
                lfs = siblings[name].lfs
                if lfs is None:
                    raise ValueError("the Hub lists no SHA-256 for it")
                listing.files[name] = build(
                    SourceFile, "the Hub's listing", {"bytes": siblings[name].size, "sha256": lfs.sha256}
                )
            except ValueError as err:
                listing.unfit[name] = str(err)
    return listing


def _candidates(listing: Listing) -> list[Candidate]:
    """The models of a repository, from the names of their files; incomplete ones are noted in `listing.unfit`."""
    split: dict[tuple[str, int], dict[int, str]] = {}
    whole = []
    for name in listing.files:
        if not (m := gguf_file.SPLIT.search(name)):
            whole.append([name])
        elif not 1 <= int(m[1]) <= int(m[2]) <= MAX_PARTS:
            listing.unfit[name] = f"its name says file {int(m[1])} of {int(m[2])}, which is impossible"
        else:
            split.setdefault((name[: m.start()], int(m[2])), {})[int(m[1])] = name
    for (_, count), parts in split.items():
        names = [parts[i] for i in sorted(parts)]
        if missing := sorted(set(range(1, count + 1)) - parts.keys()):
            listing.unfit[names[0]] = f"its name says one of {count} files, but file {missing[0]} is missing"
        else:
            whole.append(names)
    return [Candidate(tuple(names), tuple(listing.files[n] for n in names)) for names in whole]


def _large_enough(model: str, listing: Listing, models: list[Candidate]) -> list[Candidate]:
    """The candidates that are large enough to be the model. Raises ChoiceError if there are too many to read."""
    least = weights.least_bytes(model)
    for one in models:
        if one.nbytes < least:
            listing.unfit[one.names[0]] = f"{one.nbytes:,} bytes, but the unquantised model has about {2 * least:,}"
    large = [one for one in models if one.nbytes >= least]
    if len(large) > MAX_LOOKED_AT:
        raise ChoiceError(
            f"{listing.repository} has {len(large)} models that may be {model}, too many to read: name its file with "
            "--file PATH"
        )
    return large


def _named(listing: Listing, models: list[Candidate], name: str) -> Candidate:
    """The model that the file `name` belongs to. Raises ChoiceError."""
    for one in models:
        if name in one.names:
            return one
    why = listing.unfit.get(name, f"it is no file of a whole model there; it has {_some(sorted(listing.files))}")
    raise ChoiceError(f"{neutral.plain(name)} of {listing.repository} cannot be pinned: {why}")


def _some(names: list[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(neutral.plain, names[:most])) + more if names else "none"


def _none(model: str, listing: Listing, best: list[Candidate], named: str | None) -> str:
    """Why nothing was chosen, with the reason for each file, and the next step."""
    if best:
        several = _some([one.names[0] for one in best])
        return (
            f"{listing.repository} has {model} unquantised {len(best)} times, in {several}: name one with --file PATH"
        )
    if named:
        why = neutral.plain(listing.unfit[named])
        return f"{neutral.plain(named)} of {listing.repository} is not {model} unquantised: {why}"
    steps = f"pin another repository, or give local files: `moelib fetch {model} --from PATH`"
    if pieces := [n for n in listing.others if PIECE.search(n)]:
        steps = (
            f"{_some(pieces)} are pieces of one file: download them, join them with `cat`, and give the result: "
            f"`moelib fetch {model} --from FILE`"
        )
    elif any(n.endswith(".safetensors") for n in listing.others):
        steps = (
            f"it holds safetensors: run `hf download {listing.repository} --local-dir FOLDER`, then convert them with "
            f"`moelib fetch {model} --from FOLDER`"
        )
    reasons = [f"{neutral.plain(n)}: {neutral.plain(why)}" for n, why in sorted(listing.unfit.items())]
    more = f"; and {len(reasons) - 12} more" if len(reasons) > 12 else ""
    listed = "; ".join(reasons[:12]) + more if reasons else "it holds no GGUF file"
    return f"{listing.repository} has no file that is {model} unquantised and whole ({listed}); next: {steps}"
