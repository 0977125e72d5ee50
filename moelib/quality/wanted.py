"""Which comparisons a study asks for, by its parameters and the headers of its files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moelib.catalogue import corpora, params
from moelib.catalogue.placement import Placement
from moelib.gguf.gguf_header import Header
from moelib.quality.comparison import Side, Spec

SOURCE = "F16"
"""The name that the unquantised file has as a side, whether it is F16 or BF16."""
OTHER_BATCH = 8
"""Tokens of a ubatch, instead of 512, by which rounding alone is shown: other kernels take them, in another order. With
64, which older comparisons have too, it was less in all of 26 cases, on a CPU and on an H100."""
TWIN = (
    "what quantising costs is not measured on geometry twins: their weights are random, and so is what they say; it is "
    "measured on real weights, and on the small trained models"
)


def none(study: params.Study) -> str:
    """Why a study has nothing to compare, with what to do."""
    return (
        f"study {study.name} names no texts to compare over: give it `quality: {{corpora: [NAME]}}` in "
        f"params/studies/{study.name}.yaml under another name; params/corpora.yaml has the texts"
    )


def of(study: params.Study, model: str, quants: Sequence[str], header: Header) -> list[Spec]:
    """The comparisons of some quants of a model, those of one base together; `header`: of any of its files.

    Empty where the study asks for none. Raises ParamsError for an unknown corpus.
    """
    asked = study.quality
    if asked is None:
        return []
    at = Placement.parse(asked.placement)
    texts = [corpora.corpus(name) for name in asked.corpora]
    found: list[Spec] = []

    def add(text: corpora.Corpus, chunks: int, base: Side, others: Iterator[Side]) -> None:
        for other in others:
            found.append(
                Spec(
                    study=study.name,
                    model=model,
                    weights=study.weights,
                    scale=study.scale,
                    corpus=text.name,
                    corpus_sha256=text.sha256,
                    context=asked.context,
                    chunks=chunks,
                    device=study.device,
                    base=base,
                    other=other,
                )
            )

    if study.weights == "real" and not params.model(model).file:
        for text in texts:
            add(text, asked.chunks, _side(SOURCE, at), (_side(q, at) for q in quants))
    unquantised = [SOURCE] if study.twins != "direct" and not params.model(model).file else []
    for quant in (*unquantised, *quants):
        add(texts[0], asked.placement_chunks, _side(quant, at), _alike(quant, at, header))
    return found


def _side(quant: str, placed: Placement) -> Side:
    return Side(quant, str(placed), placed.load_mode)


def _alike(quant: str, base: Placement, header: Header) -> Iterator[Side]:
    """The same file in other batches and, where it is all on the device, with all its experts on the CPU, with those
    of half of its layers, and with all computed there.

    A GPU copies the experts of a batch of 32 tokens or more and computes them itself, the same at all placements; those
    of a generated token are computed by the CPU, as are those of large batches without op-offload.
    """
    yield _side(quant, Placement.parse(f"{base},ubatch={OTHER_BATCH}"))
    if base.is_baseline:
        layers = header.expert_layers
        yield _side(quant, Placement.parse("cpu-moe"))
        if len(layers) > 1:
            yield _side(quant, Placement.parse(f"n-cpu-moe={layers[len(layers) // 2 - 1] + 1}"))
        yield _side(quant, Placement.parse("cpu-moe,op-offload=off"))
