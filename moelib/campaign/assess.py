"""Comparing what a study's files say: the comparisons that have no valid record, base by base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from moelib.campaign import given
from moelib.campaign.bench import held, scratch
from moelib.catalogue import corpora
from moelib.catalogue.facts import DeviceFacts, HostFacts
from moelib.engine import engine
from moelib.machine import host, process
from moelib.measure import device
from moelib.models import quantize, remote, sources
from moelib.models.quantize import Quantised
from moelib.quality import comparison, wanted
from moelib.quality.comparison import Comparison, Spec
from moelib.quality.desk import Desk
from moelib.study.plan import Cell, StudyError
from moelib.study.study import Study


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
    standing = comparison.standing(comparison.read_all(study.path)[0]) if specs else {}
    problems = []
    for spec in specs:
        c = standing.get(comparison.spec_key(spec))
        if c is None or not c.done:
            why = "not done" if c is None else f"{c.status} ({', '.join(c.reasons)}) {c.message or ''}".rstrip()
            problems.append(f"{spec.model}, {spec.corpus}, {spec.base} against {spec.other}: {why}")
    return problems


def require_complete(study: Study, cells: Sequence[Cell]) -> None:
    """Raise StudyError naming every planned comparison without a valid record."""
    if problems := missing(study, cells):
        raise StudyError("not every comparison is valid; run again to retry:\n" + "\n".join(problems))


def assess(study: Study, cells: Sequence[Cell]) -> Iterator[Comparison]:
    """Do every comparison of some cells that has no valid record; yield each as it stands.

    One that fails is recorded, and the next one goes on. Raises what stands in the way of all: no engine, no device, no
    source, no disk.
    """
    specs = planned(study, cells)
    texts = {name: corpora.corpus(name).verified() for name in dict.fromkeys(s.corpus for s in specs)}
    known = comparison.read_all(study.path)[0] if specs else []
    standing, left = comparison.standing(known), []
    for spec in specs:
        c = standing.get(comparison.spec_key(spec))
        if c is not None and c.done:
            yield c
        else:
            left.append(spec)
    if not left:
        return
    llama = engine.find()
    llama.tool("llama-perplexity")
    where = device.choose(study.parameters.device, llama)
    study.begin()
    study.work.mkdir(parents=True, exist_ok=True)
    last: Counter[str] = Counter()
    for c in known:
        last[c.key] = max(last[c.key], c.attempt)
    with held(where), scratch(study) as work:
        process.sweep(study.work)
        facts = HostFacts(**host.facts(), host_id=host.identity())
        desk = Desk(study.path, llama, where, DeviceFacts(**where.identity()), facts, work)
        for (model, corpus, _, base), group in groupby(left, key=lambda s: (s.model, s.corpus, s.chunks, s.base)):
            cells_of = {c.quant: c for c in cells if c.model == model}

            def file(quant: str, cells_of: dict[str, Cell] = cells_of, model: str = model) -> Quantised:
                if quant == wanted.SOURCE:
                    return _source(study, model)
                return given.of_cell(study, cells_of[quant], llama, work)

            attempts = [(spec, 1 + last[comparison.spec_key(spec)]) for spec in group]
            yield from desk.compare(base, attempts, file, texts[corpus])


def _source(study: Study, model: str) -> Quantised:
    """The unquantised file of a model."""
    p = study.parameters
    return quantize.unquantised(sources.whole(sources.obtain(model, p.weights, p.scale)))
