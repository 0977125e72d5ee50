"""A committed study as if its weights were the published ones, and as if it had measured more placements: the cards of
such a study are tested, and no such study is committed yet. None of it is written anywhere."""

from dataclasses import replace

from moelib.audit import record
from moelib.catalogue.params import PlacementMode
from moelib.study.study import Study

ORIGIN = "publisher/model-GGUF, model-F16.gguf of commit 0123abc"


def real(study):
    """`study` with every sign that its weights are a twin's removed."""

    def spec(s):
        return replace(s, weights="real")

    def manifest(m):
        return m.model_copy(update={"weights": "real", "origin": ORIGIN})

    cells = [replace(c, blocks=tuple(tuple(map(spec, b)) for b in c.blocks)) for c in study.cells]
    records = [_changed(r, spec=spec(r.spec), sheet=manifest(r.sheet)) for r in study.records]
    parameters = study.parameters.model_copy(update={"weights": "real"})
    return _with(study, parameters, cells, records, manifests=tuple(map(manifest, study.manifests)))


def also(study, n, load_mode="mmap"):
    """`study` with a placement n-cpu-moe=N in every round, made of its cpu-moe's runs: what it moves, takes and needs
    is N's part of that. The audit of rounds and cells would find it out."""
    cells, records = [], list(study.records)
    by_spec = {record.run_id(r.spec, 1): r for r in study.records}
    for cell in study.cells:
        blocks = []
        for block in cell.blocks:
            by_label = {s.label: s for s in block}
            base, whole = by_label["baseline/mmap"], by_label[f"cpu-moe/{load_mode}"]
            spec = replace(whole, placement=f"n-cpu-moe={n}", load_mode=load_mode, order=len(block))
            blocks.append((*block, spec))
            made = _part(by_spec[record.run_id(base, 1)], by_spec[record.run_id(whole, 1)], n)
            records.append(_changed(made, spec=spec, run_id=record.run_id(spec, 1)))
        cells.append(replace(cell, blocks=tuple(blocks)))
    mode = PlacementMode(placement=f"n-cpu-moe={n}", load_mode=load_mode)
    parameters = study.parameters.model_copy(update={"arms": (*study.parameters.arms, mode)})
    return _with(study, parameters, cells, records)


def _part(base, whole, n):
    before, o = base.observed, whole.observed
    layers = o.placement.moved_blocks
    dense = {27: 1, 32: 0}[layers]  # the models of the study
    share = (n - dense) / layers
    vram = round(before.memory.value_bytes + share * (o.memory.value_bytes - before.memory.value_bytes))
    line = " ".join(o.argv).replace("--cpu-moe", f"--n-cpu-moe {n}")
    moved = {"moved_blocks": n - dense, "moved_tensors": 3 * (n - dense)}
    requests = tuple(replace(q, token_s=tuple(t * share for t in q.token_s)) for q in o.requests)
    observed = replace(
        o,
        argv=tuple(line.split()),
        memory=replace(o.memory, value_bytes=vram, growth_bytes=vram),
        placement=replace(o.placement, **moved, moved_bytes=round(share * o.placement.moved_bytes)),
        requests=requests,
    )
    return _changed(whole, observed=observed)


def _changed(r, **change):
    copy = r.model_copy(update=change)
    copy.__dict__.pop("key", None)  # computed of the spec as it was, and copied too
    return copy


def _with(study, parameters, cells, records, **contents):
    plan = study.plan.model_copy(update={"study": parameters, "cells": cells})
    evidence = replace(study.evidence, records=records)
    return Study(study.path, plan, replace(study.contents, evidence=evidence, **contents))
