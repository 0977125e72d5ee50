"""Beside a study's runs: comparing what its files say, base by base, and following which experts they use; what has a
valid record is not done again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import TypeVar

from moelib.campaign import given
from moelib.campaign.bench import alone, held, scratch
from moelib.catalogue import corpora, params
from moelib.catalogue.facts import DeviceFacts, HostFacts
from moelib.engine import engine
from moelib.gguf import outline
from moelib.machine import host
from moelib.measure import device
from moelib.models import quantize, remote, sources
from moelib.models.quantize import Quantised
from moelib.quality import checks as quality_checks
from moelib.quality import comparison, wanted
from moelib.quality.comparison import Comparison, Spec
from moelib.quality.desk import Desk, Place
from moelib.routing import checks, routed
from moelib.routing import desk as routing
from moelib.routing.routed import Routed
from moelib.study.plan import Cell, StudyError
from moelib.study.study import Study

P = TypeVar("P", bound=Place)


def planned(study: Study, cells: Sequence[Cell]) -> list[Spec]:
    """The comparisons of some cells, model by model. Raises ParamsError, and what reading a header does."""
    specs: list[Spec] = []
    for model in dict.fromkeys(c.model for c in cells):
        quants = [q for q in study.parameters.quants if (model, q) in {(c.model, c.quant) for c in cells}]
        file = sources.any_file_of(model)
        header = remote.any_header(file) if file else quantize.outline_of(model, study.parameters.scale)[1].header
        specs += wanted.of(study.parameters, model, quants, header)
    return specs


def missing(study: Study, cells: Sequence[Cell]) -> list[str]:
    """Every planned comparison without a valid record, with the reason."""
    specs = planned(study, cells)
    standing = _standing(study) if specs else {}
    problems = []
    for spec in specs:
        c = standing.get(comparison.spec_key(spec))
        if c is None or not c.done:
            why = "not done" if c is None else f"{c.status} ({', '.join(c.reasons)}) {c.message or ''}".rstrip()
            problems.append(f"{spec.model}, {spec.corpus}, {spec.base} against {spec.other}: {why}")
    return problems


def _standing(study: Study) -> dict[str, Comparison]:
    """The record that stands for each comparison and holds by the checks of today."""
    held = [c for c in comparison.read_all(study.path)[0] if not c.done or not quality_checks.again(study.path, c)]
    return comparison.standing(held)


def require_complete(study: Study, cells: Sequence[Cell]) -> None:
    """Raise StudyError naming every planned comparison without a valid record."""
    if problems := missing(study, cells):
        raise StudyError("not every comparison is valid; run again to retry:\n" + "\n".join(problems))


def assess(study: Study, cells: Sequence[Cell]) -> Iterator[Comparison]:
    """Do every comparison of some cells that has no valid record; yield each as it stands.

    One that fails is recorded, and the next one goes on. Raises what stands in the way of all: no engine, no device, no
    source, no disk; InUse where another process measures or compares one of the cells.
    """
    specs = planned(study, cells)
    texts = {name: corpora.corpus(name).verified() for name in dict.fromkeys(s.corpus for s in specs)}
    done, left = _parted(study, specs)
    yield from done
    if not left:
        return
    with alone(study, cells), _ready(study, "llama-perplexity", Desk) as desk:
        done, left = _parted(study, left)  # another process may have done some until now
        yield from done
        for (model, corpus, _, base), group in groupby(left, key=lambda s: (s.model, s.corpus, s.chunks, s.base)):
            cells_of = {c.quant: c for c in cells if c.model == model}

            def file(quant: str, cells_of: dict[str, Cell] = cells_of, model: str = model) -> Quantised:
                if quant == wanted.SOURCE:
                    return _source(study, model)
                return given.of_cell(study, cells_of[quant], desk.llama, desk.work)

            attempts = [(spec, comparison.next_attempt(study.path, spec)) for spec in group]
            yield from desk.compare(base, attempts, file, texts[corpus])


def _parted(study: Study, specs: Sequence[Spec]) -> tuple[list[Comparison], list[Spec]]:
    """The comparisons that have a valid record, and those that have none."""
    standing, done, left = _standing(study) if specs else {}, list[Comparison](), list[Spec]()
    for spec in specs:
        c = standing.get(comparison.spec_key(spec))
        if c is not None and c.done:
            done.append(c)
        else:
            left.append(spec)
    return done, left


@contextmanager
def _ready(study: Study, tool: str, kind: type[P]) -> Iterator[P]:
    """A desk of that kind: the engine, the device, held, and a folder for scratch.

    Raises EngineError where the build lacks the tool, DeviceError, FileError where another process has the device.
    """
    llama = engine.find()
    llama.tool(tool)
    choose = partial(device.choose, study.parameters.device, llama)
    study.begin()
    study.work.mkdir(parents=True, exist_ok=True)
    with held(choose(), choose) as where, scratch(study) as work:
        facts = HostFacts(**host.facts(), host_id=host.identity())
        yield kind(study.path, llama, where, DeviceFacts(**where.identity()), facts, work)


def first_quants(study: Study) -> list[Cell]:
    """A cell of each model: that of the first quant that the study names."""
    order = study.parameters.quants.index
    return [
        min((c for c in study.cells if c.model == m), key=lambda c: order(c.quant)) for m in study.parameters.models
    ]


def routes(study: Study, cells: Sequence[Cell], tokens: int, twins: bool = False) -> list[tuple[Cell, routed.Spec]]:
    """What is asked to follow the experts of some cells' files over the study's first text, `tokens` tokens one by one;
    with `twins` also of each one's twin. Empty where the study names no text. Raises ParamsError for an unknown one."""
    asked, p = study.parameters.quality, study.parameters
    if asked is None:
        return []
    text = corpora.corpus(asked.corpora[0])
    every = dict.fromkeys([p.weights, *(["twin"] if twins else [])])
    return [
        (
            c,
            routed.Spec(
                study=p.name,
                model=c.model,
                quant=c.quant,
                weights=weights,
                scale=p.scale,
                corpus=text.name,
                corpus_sha256=text.sha256,
                context=asked.context,
                chunks=asked.chunks,
                tokens=tokens,
                device=p.device,
                placement=asked.placement,
                load_mode="mmap",
            ),
        )
        for weights in every
        for c in cells
    ]


def route(study: Study, asked: Sequence[tuple[Cell, routed.Spec]]) -> Iterator[Routed]:
    """Follow the experts of every file that has no record that holds; yield each record as it stands.

    Raises what stands in the way of all: no engine, no device, no source, no disk; InUse where another process has one
    of the cells.
    """
    done, left = _followed(study, asked)
    yield from done
    if not left:
        return
    text = corpora.corpus(left[0][1].corpus).verified()
    with alone(study, {c.name: c for c, _ in left}.values()), _ready(study, "llama-imatrix", routing.Desk) as desk:
        done, left = _followed(study, left)  # another process may have done some until now
        yield from done
        for cell, spec in left:
            other = spec.weights != study.parameters.weights
            file = _twin(study, cell) if other else given.of_cell(study, cell, desk.llama, desk.work)
            yield desk.follow(spec, routed.next_attempt(study.path, spec), file, text)


def _followed(
    study: Study, asked: Sequence[tuple[Cell, routed.Spec]]
) -> tuple[list[Routed], list[tuple[Cell, routed.Spec]]]:
    """The records that hold, and the files that have none."""
    standing, done, left = routed.standing(routed.read_all(study.path)[0]), list[Routed](), []
    for cell, spec in asked:
        r = standing.get(routed.spec_key(spec))
        if r is not None and not checks.again(study.path, r):
            done.append(r)
        else:
            left.append((cell, spec))
    return done, left


def _twin(study: Study, cell: Cell) -> Quantised:
    """A file with the header of the cell's, its tokenizer too, and random weights."""
    p = study.parameters
    if path := sources.file_of(cell.model):
        return quantize.twin(cell.model, outline.read(path))
    source = sources.whole(sources.obtain(cell.model, p.weights, p.scale))
    return quantize.twin(cell.model, outline.read(source.path), params.plain(cell.quant), scale=p.scale)


def _source(study: Study, model: str) -> Quantised:
    """The unquantised file of a model."""
    p = study.parameters
    return quantize.unquantised(sources.whole(sources.obtain(model, p.weights, p.scale)))
