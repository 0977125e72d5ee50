"""Read `params/`: models, workloads, studies and cards as frozen, schema-checked objects.

No other module reads that folder. Unknown keys and names are refused with the allowed values before any work starts.
"""

import itertools
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, AliasChoices, Field, PositiveInt, model_validator

from moelib.base import yaml_file
from moelib.base.schema import ParamsError, Strict, T, build, closest
from moelib.base.schema import UserError as UserError
from moelib.catalogue import sizes
from moelib.catalogue.placement import REFERENCE, Placement
from moelib.catalogue.upstream import Card as Card
from moelib.catalogue.upstream import Held, Upstream
from moelib.catalogue.upstream import Pin as Pin
from moelib.catalogue.upstream import SourceFile as SourceFile

Quant = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$")]
"""llama-quantize's name of a type; which there are is known by the engine (`engine.quants`)."""
QUANTS = ("Q4_K_M", "Q2_K", "Q8_0")
"""Those of a study, or of a plan, that names none."""
FITTING = "fitting"
"""What a study has for placements that are planned where it runs."""
AS_IS = "as-is"
"""The quant of a model that is a file."""
IMATRIX = "-imatrix"
"""At the end of a quant's name: made with an importance matrix of the study's own text."""

# Limits are far above any real model or study and far below what would exhaust memory: a larger value is a mistake.
Width = Annotated[PositiveInt, Field(le=1 << 20)]
Heads = Annotated[PositiveInt, Field(le=4096)]
Experts = Annotated[PositiveInt, Field(le=4096)]
Blocks = Annotated[PositiveInt, Field(le=1000)]
Tokens = Annotated[PositiveInt, Field(le=1 << 24)]
MAX_RUNS = 200_000
MAX_NAMES = 100  # models, placements or workloads of a study


class Geometry(Strict):
    """Shape of a model, in llama.cpp's GGUF terms (lengths in elements)."""

    architecture: Literal["phimoe", "deepseek"]
    block_count: Blocks
    leading_dense_block_count: Annotated[int, Field(ge=0, le=1000)] = 0
    """The first layers have one dense feed-forward network instead of experts."""
    embedding_length: Width
    feed_forward_length: Width
    expert_feed_forward_length: Width
    expert_count: Experts
    expert_used_count: Experts
    expert_shared_count: Annotated[int, Field(ge=0, le=64)] = 0
    head_count: Heads
    head_count_kv: Heads
    vocab_size: Annotated[int, Field(ge=320, le=1 << 22)]
    """The minimum covers the special and byte tokens and the words of the plan's prompt."""
    context_length: Tokens
    original_context_length: Tokens | None = None

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.embedding_length % self.head_count or self.head_count % self.head_count_kv:
            raise ValueError("embedding_length must divide by head_count, and head_count by head_count_kv")
        if self.expert_used_count > self.expert_count:
            raise ValueError("expert_used_count is more than expert_count")
        if self.leading_dense_block_count > self.block_count:
            raise ValueError("leading_dense_block_count is more than block_count")
        return self


class Model(Strict):
    name: str
    title: str
    upstream: Upstream | None = None
    geometry: Geometry | None = None
    scales: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Name -> what a smaller twin changes of the geometry."""
    excluded: str | None = None
    """Why this model cannot be quantised; such a model can be named but not used."""
    held: Held | None = None
    """Its weights, where this repository has them."""
    file: str | None = Field(None, pattern=r"^hf:|\.gguf$")
    """A GGUF that is measured as it is: a path, where a relative one begins where params/ lies, or its address on the
    Hub, hf:OWNER/REPO/PATH[@REVISION]."""

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        if self.file and (self.geometry or self.upstream or self.scales or self.excluded or self.held):
            raise ValueError("a model that is a file has no geometry, scales, upstream, held weights or exclusion")
        if self.held and (self.geometry is None or self.upstream):
            raise ValueError("a model whose weights are held here has a geometry, and no upstream")
        return self

    @property
    def address(self) -> str | None:
        """Where its file is on the Hub; None of a model that is no such file."""
        return self.file if self.file and self.file.startswith("hf:") else None

    @property
    def path(self) -> Path | None:
        """Where its file is here; None of a model that is no file, or one on the Hub."""
        return None if self.file is None or self.address else root() / self.file

    def refuse_unusable(self, scale: str, quants: Sequence[str]) -> None:
        """Raise ParamsError unless a study of `scale` and `quants` may use this model, as far as its entry tells."""
        if self.file is None:
            self.at_scale(scale)
            if AS_IS in quants:
                raise ParamsError(f"{self.name} is no file, so it has no quant {AS_IS}: name quants to make")
        elif len(quants) > 1 or scale != "full":
            raise ParamsError(
                f"{self.name} is a file, which is measured as it is: make a study of it with `quants: [{AS_IS}]` and "
                "without a scale"
            )

    def at_scale(self, scale: str) -> Geometry:
        """The geometry at scale `full` or at one of `scales`. Raises ParamsError."""
        if self.file:
            raise ParamsError(f"{self.name} is a file, which is measured as it is, and neither quantised nor scaled")
        if self.geometry is None:
            raise ParamsError(f"{self.name} is excluded: {self.excluded}")
        scales: dict[str, dict[str, int]] = {"full": {}, **self.scales}
        _known("scale", scale, list(scales))
        return build(Geometry, f"scale {scale} of {self.name}", {**self.geometry.model_dump(), **scales[scale]})


class Workload(Strict):
    """A prompt, and how many tokens are generated after it: a text, or ids drawn from the whole vocabulary."""

    name: str
    title: str
    text: str | None = Field(None, min_length=1)
    drawn: Annotated[int, Field(ge=0, le=(1 << 63) - 1)] | None = None
    """Seed of a prompt of `prompt_tokens` ids, all different where the vocabulary has as many."""
    prompt_tokens: Tokens | None = None
    generate_tokens: Annotated[int, Field(ge=2, le=1 << 20)]

    @model_validator(mode="after")
    def _is_one_prompt(self) -> Self:
        if (self.text is None) == (self.drawn is None):
            raise ValueError("a prompt is a text, or drawn: give one of them")
        if self.drawn is not None and self.prompt_tokens is None:
            raise ValueError("a drawn prompt needs its prompt_tokens")
        return self

    @property
    def repeats(self) -> bool:
        """Whether its text is repeated to fill its tokens: such a prompt needs few of the experts."""
        return self.text is not None and self.prompt_tokens is not None


Placed = Annotated[str, AfterValidator(lambda text: str(Placement.parse(text)))]


class PlacementMode(Strict):
    """A placement and a load mode; each round of a study runs every one of them once, of all files or of some."""

    placement: Placed
    load_mode: Literal["mmap", "none", "mlock"] = "mmap"
    models: tuple[str, ...] | None = None
    """Of which models it is run; None: of all."""
    quants: tuple[Quant, ...] | None = None
    rounds: PositiveInt | None = None
    """In how many rounds, the first ones; None: in all."""

    @property
    def placed(self) -> Placement:
        return Placement.parse(self.placement, self.load_mode)

    @property
    def label(self) -> str:
        return f"{self.placement}/{self.load_mode}"

    @property
    def is_limited(self) -> bool:
        return (self.models, self.quants, self.rounds) != (None, None, None)

    def is_of(self, model: str, quant: str) -> bool:
        """Whether it is run of a file."""
        return model in (self.models or [model]) and quant in (self.quants or [quant])

    def is_in(self, block: int) -> bool:
        """Whether it is run in a round, counted from 0."""
        return self.rounds is None or block < self.rounds


def plain(quant: str) -> str:
    """The quant that llama-quantize knows, with an importance matrix or without."""
    return quant.removesuffix(IMATRIX)


class Quality(Strict):
    """What a study compares token by token, beside its runs."""

    corpora: tuple[str, ...] = Field(min_length=1, max_length=MAX_NAMES)
    context: Annotated[int, Field(ge=64, le=1 << 16)] = 512
    chunks: Annotated[PositiveInt, Field(le=10_000)] = 32
    """Pieces of `context` tokens; each is one observation."""
    placement_chunks: Annotated[PositiveInt, Field(le=10_000)] = 4
    """The same for placements, whose results should not differ."""
    placement: Placed = "baseline"
    """Where all files are compared, the unquantised one too: cpu-moe where the card does not hold that."""


class Study(Strict):
    name: str
    title: str
    models: tuple[str, ...] = Field(min_length=1, max_length=MAX_NAMES)
    weights: Literal["twin", "real"]
    scale: str = "full"
    quants: tuple[Quant, ...] = Field(QUANTS, min_length=1, max_length=MAX_NAMES)
    arms: tuple[PlacementMode, ...] = Field(
        (), max_length=MAX_NAMES, validation_alias=AliasChoices("placements", "arms")
    )
    """Placements with their load modes; people write `placements`, committed plans have `arms`."""
    fitting: bool = False
    """Whether they are planned for each file where the study is begun (`placements: fitting`); only a plan has them."""
    vram: str | None = None
    """What may be used of the card, such as 12GiB, where placements are planned; default: all of it but 3 %."""
    twins: Literal["quantised", "direct"] = "quantised"
    """How twins get a quant's types: by llama-quantize from an F16 file, or written with them: header and buffers are
    the same, and no F16 file is needed."""
    workloads: tuple[str, ...] = Field(min_length=1, max_length=MAX_NAMES)
    requests: Annotated[PositiveInt, Field(le=1000)] = 2
    """Requests of each workload in a run, in order; records mark the first one."""
    blocks: Annotated[PositiveInt, Field(le=10_000, validation_alias=AliasChoices("rounds", "blocks"))] = 5
    """Rounds; people write `rounds`, committed plans have `blocks`."""
    interleaved: bool = False
    """Whether the quants of a model take turns, round by round, so that they are compared on one machine at about the
    same time; else one is finished after the other."""
    context: Tokens = 1024
    imatrix: str | None = None
    """The corpus of importance matrices, for quants such as `Q2_K-imatrix`."""
    quality: Quality | None = None
    """None: neither what quantising costs nor whether placements change what a model says is measured."""
    device: Literal["auto", "cuda", "loopback", "none"] = "auto"
    runner: Literal["llama-server", "shimmy", "shimmy-generate", "endpoint"] = "llama-server"
    """What serves the model; a study has one."""
    endpoints: dict[str, str] = Field(default_factory=dict, max_length=MAX_NAMES)
    """Placement -> the address of the server that runs with it, where the runner is `endpoint`."""
    exclusive: Literal["host", "device"] | None = None
    """Whether a run has the whole host to itself, or its device alone, while others are measured on the host's other
    GPUs. By default the host, where a placement keeps experts on the CPU: they are read from RAM, which a host's runs
    share."""
    beside: str | None = None
    """The study of another runner that its document shows it beside."""
    small_studies: tuple[str, ...] = Field(default=(), max_length=MAX_NAMES)
    """Studies of one question each, whose answers its document tells in a line each."""
    seed: Annotated[int, Field(ge=0, le=(1 << 63) - 1)]

    @model_validator(mode="before")
    @classmethod
    def _planned(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("placements") != FITTING:
            return data
        return {k: v for k, v in data.items() if k != "placements"} | {"fitting": True}

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if not self.arms and not self.fitting:
            raise ValueError(f"placements: name at least two, or write `placements: {FITTING}`")
        if self.vram is not None:
            sizes.parse(self.vram)
            if not self.fitting:
                raise ValueError(f"vram is what placements are planned for: write `placements: {FITTING}`")
        if any(q.endswith(IMATRIX) for q in self.quants) != (self.imatrix is not None):
            raise ValueError(f"quants that end in {IMATRIX} and `imatrix: CORPUS`, of which it is made, go together")
        if (self.runner == "endpoint") != bool(self.endpoints):
            raise ValueError("`runner: endpoint` and `endpoints: {PLACEMENT: http://127.0.0.1:PORT}` go together")
        if self.endpoints and {a.placement for a in self.arms} != set(self.endpoints):
            raise ValueError("endpoints: name one for each of the placements, and no others")
        if self.twins == "direct" and self.imatrix:
            raise ValueError("twins: direct is of types alone, which an importance matrix does not change")
        if self.twins == "direct" and self.weights == "real":
            raise ValueError("twins: direct is for `weights: twin`")
        return self

    @model_validator(mode="after")
    def _unique(self) -> Self:
        for field in ("models", "quants", "workloads"):
            values = getattr(self, field)
            if len(set(values)) != len(values):
                raise ValueError(f"{field} names something twice")
        ranks = [a.placed.rank for a in self.arms]
        if ranks and (
            len(ranks) < 2 or ranks[0] != min(ranks) or [a.placement for a in self.arms].count(REFERENCE) > 1
        ):
            raise ValueError(
                "the first of the placements is what the others are compared with, and at least one must follow it: "
                "it must be the only baseline or, where no card holds one, what has most on the GPU"
            )
        if self.arms and self.arms[0].is_limited:
            raise ValueError("the first of the placements is what the others are compared with: of all, in all rounds")
        for mode in self.arms:
            for field, listed in (("models", self.models), ("quants", self.quants)):
                if other := sorted(set(getattr(mode, field) or ()) - set(listed)):
                    raise ValueError(f"placements: {mode.label} is for {', '.join(other)}, not of the study's {field}")
        for model, quant in itertools.product(self.models, self.quants):
            labels = [m.label for m in self.placements_of(model, quant)]
            if len(set(labels)) != len(labels):
                raise ValueError(f"placements names something twice for {model}/{quant}")
            if labels and sum(m.rounds is None for m in self.placements_of(model, quant)) < 2:
                raise ValueError(f"placements: {model}/{quant} needs two that are run in all rounds")
        if self.weights == "real" and self.scale != "full":
            raise ValueError("real weights have only the scale full")
        runs = len(self.models) * len(self.quants) * max(2, len(self.arms)) * self.blocks
        if runs > MAX_RUNS:
            raise ValueError(
                f"models x quants x placements x rounds is {runs} runs, more than {MAX_RUNS}: make two studies"
            )
        return self

    @property
    def shares_host(self) -> bool:
        """Whether runs may be made beside each other on a host's GPUs."""
        every_on_gpu = bool(self.arms) and all(a.placed.is_baseline for a in self.arms)
        return self.exclusive == "device" or (self.exclusive is None and every_on_gpu)

    def placements_of(self, model: str, quant: str) -> tuple[PlacementMode, ...]:
        """Those that are run of a file."""
        return tuple(mode for mode in self.arms if mode.is_of(model, quant))


def root() -> Path:
    """The folder with `params/` and `outputs/`: $MOELIB_HOME, or the clone that this package is installed from."""
    return Path(os.environ.get("MOELIB_HOME") or Path(__file__).resolve().parents[2])


def _known(kind: str, name: str, allowed: Sequence[str]) -> str:
    if name not in allowed:
        raise ParamsError(f"unknown {kind} {name!r}{closest(name, allowed)}; allowed: {', '.join(allowed)}")
    return name


@cache
def _yaml(path: Path) -> Any:
    try:
        return yaml_file.load(path)
    except FileNotFoundError:
        raise ParamsError(f"{path.name} is missing from {path.parent}; run from a clone or set MOELIB_HOME") from None
    except yaml_file.YamlError as err:
        raise ParamsError(f"{path} is not usable YAML: {err}") from None


def entries(file: str) -> dict[str, Any]:
    """Name -> its entry in `params/FILE`, unchecked. Raises ParamsError."""
    mapping = _yaml(root() / "params" / file)
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping):
        raise ParamsError(f"params/{file}: expected a mapping of names, found {type(mapping).__name__}")
    return mapping


def entry(cls: type[T], kind: str, file: str, name: str) -> T:
    """The entry `name` of `params/FILE`, checked. Raises ParamsError for an unknown name, or a wrong entry."""
    listed = entries(file)
    return build(cls, f"params/{file}, {name}", listed[_known(kind, name, sorted(listed))], name=name)


def model(name: str) -> Model:
    """The entry of a model in the catalogue. Raises ParamsError for an unknown name."""
    return entry(Model, "model", "models.yaml", name)


def workload(name: str) -> Workload:
    return entry(Workload, "workload", "workloads.yaml", name)


def card(name: str) -> Card:
    """The hand-written part of the card of model `name`. Raises ParamsError."""
    return entry(Card, "model with a card", "cards.yaml", name)


def study_names() -> list[str]:
    return sorted(p.stem for p in (root() / "params" / "studies").glob("*.yaml"))


def study(name: str) -> Study:
    """The study in `params/studies/<name>.yaml`, every name in it checked. Raises ParamsError."""
    if not (names := study_names()):
        raise ParamsError(f"{root()} holds no params/studies/*.yaml: run from a clone or set MOELIB_HOME")
    path = f"params/studies/{_known('study', name, names)}.yaml"
    loaded = build(Study, path, _yaml(root() / path), name=name)
    for m in loaded.models:
        model(m).refuse_unusable(loaded.scale, loaded.quants)
    for w in loaded.workloads:
        workload(w)
    for small in loaded.small_studies:
        _known("study", small, names)
    return loaded
