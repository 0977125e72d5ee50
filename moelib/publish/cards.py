"""Model cards for the Hugging Face Hub, made from records, manifests and `params/` alone.

A repository's page on the Hub is its README.md, so each model has that and one linked card for each quant. The same
records give the same bytes. Files of random weights have a card too, so that all of it can be seen and rehearsed; it
says what they are, and nothing in it lists them as files of the model whose shapes they have.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from moelib.base import files, neutral
from moelib.catalogue import params, upstream
from moelib.catalogue.facts import Manifest
from moelib.evidence import appendix, table
from moelib.evidence.table import Table
from moelib.models import hub
from moelib.report import advice, findings, quality, results
from moelib.study.study import Study

ROOT = "README.md"
SUMS = "SHA256SUMS"
PROVENANCE = "provenance.json"
HUB = "https://huggingface.co"
NAME = re.compile(r"[\w.-]+", re.ASCII)


class CardError(params.UserError):
    """No card can be made, or a file is not the one that was measured; the message says why."""


def part(study: Study, model: str, quant: str | None = None) -> Study:
    """What the study holds of one model, or of one quant of it."""
    return study.part(model, (quant,) if quant else study.parameters.quants)


def quants_of(study: Study, model: str) -> dict[str, Manifest]:
    """Quant -> manifest, of the quants of `model` with a complete round and a manifest, in the study's order."""
    manifests = {f"{s.model}/{s.quant}": s for s in study.manifests}
    names = {q: f"{model}/{q}" for q in study.parameters.quants}
    return {q: manifests[n] for q, n in names.items() if n in study.measured and n in manifests}


def repository(study: Study, model: str) -> str:
    """The repository's name in its namespace: random weights never lie in that of the real ones."""
    return f"{model}-random-weights" if study.parameters.weights == "twin" else params.card(model).repository


def build(study: Study, namespace: str) -> dict[str, str]:
    """Path below the folder of cards -> text, for every model with a measured cell.

    Raises CardError if there is no such model or runs shared their host, ParamsError for an invalid namespace.
    """
    upstream.namespace(namespace)
    hub.require()
    if study.host_shared:
        raise CardError(f"{study.name} has runs that shared their host: make cards of a study with `exclusive: host`")
    pages: dict[str, str] = {}
    for model in advice.models(study):
        if quants_of(study, model):
            folder = repository(study, model)
            pages |= {f"{folder}/{name}": text for name, text in _repository(study, model, namespace).items()}
    if not pages:
        raise CardError(f"{study.name} has no complete round, so no card can be made: run the study first")
    return pages


def missing(study: Study) -> list[str]:
    """Models of the study that get no card."""
    return [m for m in study.parameters.models if not quants_of(study, m)]


def write(study: Study, namespace: str, folder: Path) -> list[Path]:
    """Write the cards into `folder`; returns their paths. Raises CardError."""
    pages = build(study, namespace)
    try:
        for name, text in pages.items():
            files.write_bytes(folder / name, text.encode())
    except OSError as err:
        raise CardError(
            f"the cards cannot be written into {folder} ({err.strerror or err}): fix its permissions, or name another "
            "folder with --into"
        ) from None
    return [folder / name for name in pages]


def check(folder: Path, study: Study, namespace: str) -> list[str]:
    """Every file of `folder`, models left out, that is not byte for byte what the records give."""
    pages = build(study, namespace)
    present = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and p.suffix != ".gguf"}
    problems = []
    for name in sorted(pages.keys() | present.keys()):
        if name not in present:
            problems.append(f"{name} is missing: make the cards again")
        elif name not in pages:
            problems.append(f"{name} is not a card of these records: delete it")
        elif not _holds(present[name], pages[name].encode()):
            problems.append(f"{name} differs from what the records give: make the cards again")
    return problems


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False


def planned(study: Study) -> dict[str, str]:
    """Path below the folder of cards -> SHA-256, of the GGUF files that the cards are about."""
    models = study.parameters.models
    return {f"{repository(study, m)}/{s.file_name}": s.sha256 for m in models for s in quants_of(study, m).values()}


def require_measured(study: Study, path: Path) -> str:
    """SHA-256 of the GGUF file at `path`, which must be the one that the records measured. Raises CardError."""
    known = {name.split("/")[1]: sha256 for name, sha256 in planned(study).items()}
    sha256 = files.sha256(path)
    if known.get(path.name) != sha256:
        other = f"measured {known[path.name]}" if path.name in known else "measured no file of this name"
        raise CardError(
            f"{path.name} has SHA-256 {sha256}, but {study.name} {other}: the card would show other numbers; "
            "run the study on this file, or publish the one it measured"
        )
    return sha256


def _repository(study: Study, model: str, namespace: str) -> dict[str, str]:
    card, manifests = params.card(model), quants_of(study, model)
    geometry = params.model(model).at_scale(study.parameters.scale)
    sums = "".join(f"{s.sha256}  {neutral.plain(s.file_name)}\n" for s in manifests.values())
    context = {
        "advice": advice,
        "appendix": appendix,
        "findings": findings,
        "quality": quality,
        "results": results,
        "whole": study,
        "model": model,
        "card": card,
        "twin": study.parameters.weights == "twin",
        "held": params.model(model).held is not None,
        "title": params.model(model).title,
        "original": f"[{card.base_model}]({HUB}/{card.base_model})" if card.base_model else params.model(model).title,
        "geometry": geometry,
        "between": _between(geometry),
        "repository": f"{namespace}/{repository(study, model)}",
        "absent": [q for q in study.parameters.quants if q not in manifests],
        "sums": SUMS,
        "sums_text": sums,
    }
    texts, provenance = {}, {}
    for name, template, of in [
        (ROOT, "root.md.j2", part(study, model)),
        *((f"{q}.md", "card.md.j2", part(study, model, q)) for q in manifests),
    ]:
        text, shown = _render(template, {**context, "study": of, "manifest": of.manifests[0], "argv": _argv(of)})
        texts[name] = f"---\n{_metadata(of, card, namespace)}\n---\n\n{text}\n"
        provenance[name] = table.collect(s.provenance() for s in shown)
    return texts | {SUMS: sums, PROVENANCE: files.pretty(provenance).decode()}


def _between(geometry: params.Geometry) -> dict[str, int]:
    """An N half way, by the layers that hold experts: those before them count among the N, and move nothing."""
    dense, layers = geometry.leading_dense_block_count, geometry.block_count
    moved = max(1, (layers - dense) // 2)
    return {"n": dense + moved, "moved": moved, "holding": layers - dense, "dense": dense}


def _argv(of: Study) -> str:
    """The command line of the last run of the first file; names of files, not of folders."""
    return " ".join([r for r in of.used if r.spec.quant == of.manifests[0].quant][-1].observation.argv)


def _of(t: Table, model: str, quant: str | None = None) -> Table:
    """A table of the document without the rows of other models, or of other quants."""
    about = {"model": neutral.markdown(model)} | ({"quant": neutral.markdown(quant)} if quant else {})
    pairs = zip(t.rows, t.row_sources, strict=True)
    kept = [pair for pair in pairs if all(pair[0].get(k, v) == v for k, v in about.items())]
    return replace(t, rows=[row for row, _ in kept], row_sources=[cited for _, cited in kept])


def _without(t: Table, *columns: str) -> Table:
    """A table without columns that its page has elsewhere."""
    rows = [{k: v for k, v in row.items() if k not in columns} for row in t.rows]
    return replace(t, rows=rows, numbers=tuple(n for n in t.numbers if n not in columns))


def _linked(t: Table, of: Study) -> Table:
    """The table of files with their names, and links to them and to their cards; the largest first."""
    files_by_quant = {neutral.markdown(s.quant): s for s in of.manifests}

    def linked(row: dict[str, Any]) -> dict[str, Any]:
        quant, name = row["quant"], files_by_quant[row["quant"]].file_name
        link = f"[{name}]({name})" if NAME.fullmatch(name) else neutral.markdown(name)
        return {"file": link, **row, "quant": f"[{quant}]({quant}.md)"}

    pairs = list(zip(t.rows, t.row_sources, strict=True))
    pairs.sort(key=lambda pair: -files_by_quant[pair[0]["quant"]].file_bytes)
    rows, sources = [linked(row) for row, _ in pairs], [cited for _, cited in pairs]
    return replace(t, rows=rows, row_sources=sources, note=appendix.untold(rows))


def _render(template: str, context: dict[str, Any]) -> tuple[str, list[Any]]:
    """The page, and the tables and sentences that it shows."""
    shown: list[Any] = []

    def show(thing: Any) -> str:
        shown.append(thing)
        return thing.markdown()

    templates = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=templates, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "hub": f"{HUB}/{{}}".format,
        "of": _of,
        "without": _without,
        "linked": _linked,
        "show": show,
    }
    environment.filters |= {"plain": neutral.markdown, "word": neutral.word}
    environment.filters |= {"code": lambda text: neutral.code(text, 4000), "raw": lambda text: text.replace("`", "'")}
    return re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(context)).strip(), shown


def _metadata(of: Study, card: params.Card, namespace: str) -> str:
    """The card's frontmatter, in the Hub's terms: the Hub lists a repository by it. Of random weights it says what they
    are, and names no model, licence, language or task."""
    from huggingface_hub import ModelCardData

    if of.parameters.weights == "twin":
        return ModelCardData(library_name="gguf", tags=["gguf", "geometry-twin", "random-weights"]).to_yaml()
    return ModelCardData(
        **card.model_dump(include={"base_model", "license", "license_name", "license_link"}),
        base_model_relation="quantized" if card.base_model else None,
        library_name="gguf",
        pipeline_tag="text-generation",
        language=list(card.languages),
        quantized_by=card.quantized_by or namespace,
        tags=["gguf", "moe", "cpu-offload", *card.tags],
    ).to_yaml()
