"""The only reader of `params/`: models, workloads, studies and cards as frozen, schema-checked objects.

Unknown keys and names are refused with the allowed values, before any work starts.
"""

import io
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

QUANTS = ("Q4_K_M", "Q2_K", "Q8_0")
"""llama-quantize type names that a study may ask for."""


class UserError(Exception):
    """Raised with a message meant for people: the command line shows it without a traceback."""


class ParamsError(UserError, ValueError):
    """A name or a file in `params/` is wrong; the message lists what is allowed."""


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Geometry(Strict):
    """Shape of a model, in llama.cpp's GGUF terms (lengths in elements)."""

    architecture: Literal["phimoe", "deepseek"]
    block_count: PositiveInt
    leading_dense_block_count: int = Field(0, ge=0)
    """The first blocks have one dense feed-forward network instead of experts."""
    embedding_length: PositiveInt
    feed_forward_length: PositiveInt
    expert_feed_forward_length: PositiveInt
    expert_count: PositiveInt
    expert_used_count: PositiveInt
    expert_shared_count: int = Field(0, ge=0)
    head_count: PositiveInt
    head_count_kv: PositiveInt
    vocab_size: int = Field(ge=320)
    """At least the special and byte tokens and the words of the plan's prompt."""
    context_length: PositiveInt
    original_context_length: PositiveInt | None = None

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.embedding_length % self.head_count or self.head_count % self.head_count_kv:
            raise ValueError("embedding_length must divide by head_count, and head_count by head_count_kv")
        if self.expert_used_count > self.expert_count:
            raise ValueError("expert_used_count is more than expert_count")
        if self.leading_dense_block_count > self.block_count:
            raise ValueError("leading_dense_block_count is more than block_count")
        return self

    def scaled(self, factor: float) -> Self:
        """Blocks, widths and vocabulary times `factor` (0 < factor <= 1); experts, head size and quirks stay.

        A width that k-quants (rows of 256) cannot take stays one that they cannot take.
        """
        if not 0 < factor <= 1:
            raise ParamsError(f"scale {factor} is not in (0, 1]")
        if factor == 1:
            return self

        def times(n: int, step: int, least: int) -> int:
            return max(least, round(n * factor / step) * step)

        heads = times(self.head_count, 2, 2)
        heads_kv = max(1, round(heads * self.head_count_kv / self.head_count))
        while heads % heads_kv:
            heads_kv -= 1
        changed = {"head_count": heads, "head_count_kv": heads_kv, "vocab_size": times(self.vocab_size, 32, 512)}
        changed["block_count"] = times(self.block_count, 1, self.leading_dense_block_count + 1)
        changed["embedding_length"] = heads * (self.embedding_length // self.head_count)
        for name in ("feed_forward_length", "expert_feed_forward_length"):
            step = 32 if getattr(self, name) % 256 else 256
            width = times(getattr(self, name), step, step)
            changed[name] = width + 32 if step == 32 and width % 256 == 0 else width
        return self.model_copy(update=changed)


class SourceFile(Strict):
    bytes: PositiveInt
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Upstream(Strict):
    """Where a model's F16 GGUF is published; what nobody looked up yet is null, and `moelib fetch --pin` fills it."""

    publisher: str
    """Whose F16 files the study's plan names."""
    original: str
    """Repository of the safetensors that they were converted from."""
    repository: str | None = None
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """A commit: a branch moves."""
    files: dict[Annotated[str, Field(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*\.gguf$")], SourceFile] = {}
    """Path in the repository -> what must arrive; all files of a split model, in order."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if len({bool(self.repository), bool(self.revision), bool(self.files)}) > 1:
            raise ValueError("repository, revision and files are pinned together, by `moelib fetch MODEL --pin`")
        return self


class Model(Strict):
    name: str
    title: str
    upstream: Upstream | None = None
    geometry: Geometry | None = None
    scales: dict[str, dict[str, int]] = {}
    excluded: str | None = None
    """Why no quants of this model can be made; such a model can be named but not used."""

    def at_scale(self, scale: str) -> Geometry:
        """Geometry at `full`, at a named scale, or at a factor such as `0.25`. Raises ParamsError."""
        if self.geometry is None:
            raise ParamsError(f"{self.name} is excluded: {self.excluded}")
        scales = {"full": {}, **self.scales}
        if scale not in scales and re.fullmatch(r"[0-9]*\.?[0-9]+", scale):
            return self.geometry.scaled(float(scale))
        _known("scale", scale, list(scales), also=", a factor in (0, 1]")
        return Geometry.model_validate({**self.geometry.model_dump(), **scales[scale]})


class Workload(Strict):
    name: str
    title: str
    text: str = Field(min_length=1)
    prompt_tokens: PositiveInt | None = None
    generate_tokens: int = Field(ge=2)


class Arm(Strict):
    """One way to run a file; a block runs every arm of its study once."""

    placement: str = Field(pattern=r"^(baseline|cpu-moe|n-cpu-moe=[1-9][0-9]*)$")
    load_mode: Literal["mmap", "none"] = "mmap"

    @property
    def label(self) -> str:
        return f"{self.placement}/{self.load_mode}"


class Study(Strict):
    name: str
    title: str
    models: tuple[str, ...] = Field(min_length=1)
    weights: Literal["twin", "real"]
    scale: str = "full"
    quants: tuple[Literal[QUANTS], ...] = Field(min_length=1)
    arms: tuple[Arm, ...] = Field(min_length=1)
    workloads: tuple[str, ...] = Field(min_length=1)
    requests: PositiveInt = 2
    """Requests of each workload in a run, in order; the first is flagged as first."""
    blocks: PositiveInt = 5
    context: PositiveInt = 1024
    device: Literal["auto", "cuda", "loopback", "none"] = "auto"
    seed: int = Field(ge=0)

    @model_validator(mode="after")
    def _unique(self) -> Self:
        for field in ("models", "quants", "workloads", "arms"):
            values = getattr(self, field)
            if len(set(values)) != len(values):
                raise ValueError(f"{field} names something twice")
        if [a.placement == "baseline" for a in self.arms] != [True] + [False] * max(1, len(self.arms) - 1):
            raise ValueError("the first arm, and it alone, must be a baseline, with at least one to compare with it")
        if self.weights == "real" and self.scale != "full":
            raise ValueError("real weights have one scale: full")
        return self


class Card(Strict):
    """What people own of a model's card on the Hugging Face Hub."""

    name: str
    repository: str = Field(pattern=r"^[\w][\w.-]*$")
    base_model: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    license: str = Field(min_length=1)
    """The Hub's identifier; `other` needs a name and a link."""
    license_name: str | None = None
    license_link: str | None = Field(None, pattern=r"^https://")
    license_note: str
    languages: tuple[str, ...] = Field(min_length=1)
    tags: tuple[str, ...] = ()
    summary: str
    prompt: str | None
    """A whole prompt in the model's format; None for a base model, which continues a text."""
    prompt_note: str
    credits: tuple[str, ...] = Field(min_length=1)
    quantized_by: str | None = None
    """Default: the namespace that the card is made for."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.license == "other" and not (self.license_name and self.license_link):
            raise ValueError("license other needs license_name and license_link")
        return self


def root() -> Path:
    """Folder that holds `params/` and `outputs/`: $MOELIB_HOME, or the clone this package is installed from."""
    return Path(os.environ.get("MOELIB_HOME") or Path(__file__).resolve().parent.parent)


def _known(kind: str, name: str, allowed: Sequence[str], also: str = "") -> str:
    if name not in allowed:
        raise ParamsError(f"unknown {kind} {name!r}; allowed: {', '.join(allowed)}{also}")
    return name


T = TypeVar("T", bound=Strict)


def _build(cls: type[T], where: str, data: Any, name: str) -> T:
    if not isinstance(data, dict):
        raise ParamsError(f"{where}: expected a mapping, found {type(data).__name__}")
    try:
        return cls.model_validate({**data, "name": name})
    except ValidationError as err:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'entry'}: {e['msg']}" for e in err.errors()]
        raise ParamsError(f"{where}: " + "; ".join(lines)) from None


@cache
def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path.name} is missing from {path.parent}; run from a clone or set MOELIB_HOME") from None
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ParamsError(f"{path.name} is not YAML: {err}") from None


def _entry(cls: type[T], kind: str, file: str, name: str) -> T:
    entries = _yaml(root() / "params" / file)
    return _build(cls, f"params/{file}, {name}", entries[_known(kind, name, sorted(entries))], name)


def model(name: str) -> Model:
    """The catalogue's entry. Raises ParamsError for a name that is not in it."""
    return _entry(Model, "model", "models.yaml", name)


def model_changed(name: str, key: str, value: Any) -> tuple[Path, bytes]:
    """(path, content) of the catalogue with one key of one model changed, comments and order kept; not written."""
    from ruamel.yaml import YAML

    path, text = root() / "params" / "models.yaml", io.BytesIO()
    book = YAML()
    book.width = 1000
    book.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    entries = book.load(path)
    entries[name][key] = value
    book.dump(entries, text)
    _yaml.cache_clear()
    return path, text.getvalue()


def workload(name: str) -> Workload:
    return _entry(Workload, "workload", "workloads.yaml", name)


def card(name: str) -> Card:
    """What people own of the card of model `name`. Raises ParamsError."""
    return _entry(Card, "model with a card", "cards.yaml", name)


def quant(name: str) -> str:
    """`name` itself, if a study may ask for it."""
    return _known("quant", name, QUANTS)


def study_names() -> list[str]:
    return sorted(p.stem for p in (root() / "params" / "studies").glob("*.yaml"))


def study(name: str) -> Study:
    """The study `params/studies/<name>.yaml` with every name in it checked. Raises ParamsError."""
    path = f"params/studies/{_known('study', name, study_names())}.yaml"
    found = _build(Study, path, _yaml(root() / path), name)
    for m in found.models:
        model(m).at_scale(found.scale)
    for w in found.workloads:
        workload(w)
    return found
