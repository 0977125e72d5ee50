"""Names on the Hugging Face Hub, which of its files are a model's weights, and what a card there says of a model."""

import re
from pathlib import PurePosixPath
from typing import Annotated, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from moelib.base.schema import ParamsError, Sha256, Strict

NAMESPACE = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")


def namespace(name: str) -> str:
    """Return `name` if it is a valid user or organisation name on the Hub. Raises ParamsError."""
    if not NAMESPACE.fullmatch(name) or ".." in name or "--" in name:
        raise ParamsError(
            f"{name[:100]!r} is not a namespace of the Hub: give the name of a user or an organisation, at most 96 "
            "letters and digits with single - _ . between them"
        )
    return name


def repository_name(name: str) -> str:
    """Return `name` if it is a valid OWNER/NAME of a repository on the Hub. Raises ParamsError."""
    owner, _, own = name.partition("/")
    if len(name) > 96 or not NAMESPACE.fullmatch(own) or ".." in own or "--" in own or own.endswith(".git"):
        raise ParamsError(f"{name[:100]!r} is not a repository name of the Hub: give OWNER/NAME")
    namespace(owner)
    return name


class SourceFile(Strict):
    bytes: Annotated[PositiveInt, Field(le=1 << 44)]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def hub_path(name: str) -> str:
    """Return `name` if it is a path in a repository whose last part is a safe local file name. Raises ValueError."""
    parts = PurePosixPath(name).parts
    if "/".join(parts) != name or {"..", "/"} & set(parts) or not name.isprintable() or "\\" in name:
        raise ValueError("it is not a valid path in a repository")
    if parts[-1][0] in ".-" or not parts[-1].endswith(".gguf") or len(parts[-1].encode()) > 200:
        raise ValueError("a GGUF's name must end in .gguf, not begin with a dot or a dash, and have at most 200 bytes")
    return name


HubPath = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(hub_path)]
Repository = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}$")]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


def _distinct(files: dict[str, SourceFile]) -> dict[str, SourceFile]:
    if len({PurePosixPath(name).name for name in files}) < len(files):
        raise ValueError("two files have the same name, but all files of a model are stored in one folder")
    return files


Files = Annotated[dict[HubPath, SourceFile], Field(min_length=1, max_length=1000), AfterValidator(_distinct)]


class Pin(Strict):
    """The files of one commit that hold a model's weights, with the sizes and hashes that the Hub reported."""

    repository: Repository
    revision: Commit
    """A commit, because a branch moves."""
    files: Files
    """Path in the repository -> the expected size and hash; all files of a split model, in order."""


class Upstream(Strict):
    """Who publishes a model's F16 GGUF, from params/models.yaml."""

    publisher: str
    """The publisher of the F16 files that the study's plan names."""
    original: str
    """Repository of the safetensors that they were converted from."""


class Held(Strict):
    """An unquantised file that lies in this repository, such as that of a model that was trained for it."""

    file: Annotated[str, Field(pattern=r"^[\w./-]+\.gguf$")]
    """Its path, from where params/ lies."""
    sha256: Sha256
    origin: str = Field(min_length=1)


class Card(Strict):
    """The hand-written part of a model's card on the Hugging Face Hub."""

    name: str
    repository: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}$")
    base_model: Repository | None = None
    """None: of a model that was made for this project."""
    license: str = Field(min_length=1)
    """The Hub's identifier; `other` needs a name and a link."""
    license_name: str | None = None
    license_link: str | None = Field(None, pattern=r"^https://")
    license_note: str
    languages: tuple[str, ...] = Field(min_length=1)
    tags: tuple[str, ...] = ()
    summary: str
    prompt: str | None
    """A complete prompt in the model's format; None for a base model, which continues a text."""
    prompt_note: str
    credits: tuple[str, ...] = Field(min_length=1)
    quantized_by: str | None = None
    """Default: the namespace that publishes the card."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.license == "other" and not (self.license_name and self.license_link):
            raise ValueError("license other needs license_name and license_link")
        return self
