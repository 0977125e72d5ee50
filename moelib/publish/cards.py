"""Model cards for the Hugging Face Hub, made from records, manifests and `params/cards.yaml` alone.

A repository's page on the Hub is its README.md, so each model has that and one linked card for each quant. The same
records give the same bytes.
"""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from moelib.base import files, neutral, stats
from moelib.catalogue import params, upstream
from moelib.catalogue.facts import Manifest
from moelib.models import hub
from moelib.report import advice, appendix, findings, table
from moelib.report.table import Table
from moelib.study import frames
from moelib.study.study import Study

ROOT = "README.md"
SUMS = "SHA256SUMS"
PROVENANCE = "provenance.json"
HUB = "https://huggingface.co"


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


def build(study: Study, namespace: str) -> dict[str, str]:
    """Path below the folder of cards -> text, for every model with a measured cell.

    Raises CardError if there is no such model, ParamsError for an invalid namespace.
    """
    upstream.namespace(namespace)
    hub.require()
    pages: dict[str, str] = {}
    for model in advice.models(study):
        if quants_of(study, model):
            repository = params.card(model).repository
            pages |= {f"{repository}/{name}": text for name, text in _repository(study, model, namespace).items()}
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
    manifests = [(params.card(m).repository, s) for m in study.parameters.models for s in quants_of(study, m).values()]
    return {f"{repository}/{s.file_name}": s.sha256 for repository, s in manifests}


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
    context = {
        "advice": advice,
        "appendix": appendix,
        "findings": findings,
        "model": model,
        "card": card,
        "title": params.model(model).title,
        "geometry": params.model(model).at_scale(study.parameters.scale),
        "repository": f"{namespace}/{card.repository}",
        "absent": [q for q in study.parameters.quants if q not in manifests],
        "sums": SUMS,
    }
    texts, provenance = {}, {}
    for name, template, of in [
        (ROOT, "root.md.j2", part(study, model)),
        *((f"{q}.md", "card.md.j2", part(study, model, q)) for q in manifests),
    ]:
        text, shown = _render(template, {**context, "study": of, "manifest": of.manifests[0], "argv": _argv(of)})
        texts[name] = f"---\n{_metadata(of, model, namespace)}\n---\n\n{text}\n"
        provenance[name] = table.collect(s.provenance() for s in shown)
    texts[SUMS] = "".join(f"{s.sha256}  {neutral.plain(s.file_name)}\n" for s in manifests.values())
    return texts | {PROVENANCE: files.pretty(provenance).decode()}


def _argv(of: Study) -> str:
    """The command line of the first file's first run with experts on the CPU; names of files, not of folders."""
    _, side = advice.pairs(of)[0]
    wanted = (of.manifests[0].quant, *side)
    return next(
        " ".join(r.observation.argv) for r in of.used if (r.spec.quant, r.spec.placement, r.spec.load_mode) == wanted
    )


def _without(t: Table, *columns: str) -> Table:
    """A table without the columns that repeat the card's title."""
    rows = [{k: v for k, v in row.items() if k not in columns} for row in t.rows]
    return replace(t, rows=rows, numbers=tuple(n for n in t.numbers if n not in columns))


def _linked(t: Table) -> Table:
    """The table of files with links to cards and files."""
    rows = []
    for row in t.rows:
        quant, file = row["quant"], f"[{row['file']}]({row['model']}-{row['quant']}.gguf)"
        rows.append(row | {"quant": f"[{quant}]({quant}.md)", "file": file})
    return replace(t, rows=rows, note="")


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
    environment.filters |= {"hub": f"{HUB}/{{}}".format, "without": _without, "linked": _linked, "show": show}
    environment.filters |= {"plain": neutral.markdown, "word": _word, "code": lambda text: neutral.code(text, 4000)}
    return re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(context)).strip(), shown


def _word(name: str) -> str:
    """A file's name as one word of a command, whatever it holds."""
    return shlex.quote(neutral.plain(name).replace("`", "'"))


def _metadata(of: Study, model: str, namespace: str) -> str:
    """The card's frontmatter, in the Hub's terms."""
    from huggingface_hub import ModelCardData

    card = params.card(model)
    twin = ["geometry-twin"] if of.parameters.weights == "twin" else []
    data = ModelCardData(
        **card.model_dump(include={"base_model", "license", "license_name", "license_link"}),
        base_model_relation="quantized",
        library_name="gguf",
        pipeline_tag="text-generation",
        language=list(card.languages),
        quantized_by=card.quantized_by or namespace,
        tags=["gguf", "llama.cpp", "moe", "cpu-offload", *card.tags, *twin],
        model_name=card.repository,
        eval_results=_measured(of, f"{HUB}/{namespace}/{card.repository}"),
    )
    return data.to_yaml()


def _measured(of: Study, url: str) -> list[Any]:
    """The model-index: a result for each quant, placement and quantity.

    The Hub's client merges results of equal task and dataset, and keeps one source: so the dataset's configuration
    names quant and placement, and the source is the quant's card.
    """
    from huggingface_hub import EvalResult

    twin = "geometry twin, " if of.parameters.weights == "twin" else ""
    quantities: list[tuple[str, str, str | None, str, float]]
    quantities = [("peak_vram_mib", "Peak VRAM, MiB", None, "vram_bytes", 2**-20)]
    for w in of.parameters.workloads:
        quantities.append(
            ("decode_tokens_per_second", f"Decode, {neutral.plain(w)}, tokens/s", w, f"tokens_per_s/{w}", 1)
        )
        name = f"TTFT, {neutral.plain(w)}, warm, ms"
        quantities.append(("warm_ttft_ms", name, w, f"ttft_warm_s/{w}", 1000))
    entries: dict[tuple[str, str, frames.Side], EvalResult] = {}
    for metric, name, workload, column, scale in quantities:
        compared = frames.comparisons(of.runs, column, frames.in_one_load_mode)
        sides = [(c.quant, *side) for c in compared for side in ((c.against, c.baseline), (c.side, c.value))]
        for quant, side, e in sides:
            if e is None:
                continue
            interval = [float(stats.number(x, scale)) for x in (e.low, e.high) if x is not None]
            entries[name, quant, side] = EvalResult(
                task_type="text-generation",
                dataset_type=f"moelib-{neutral.plain(of.name)}",
                dataset_name=f"{twin}on {advice.machine(of)}",
                dataset_config=f"{quant}, {advice.place(of, side)}",
                metric_type=metric,
                metric_name=name,
                metric_value=float(stats.number(e.value, scale)),
                metric_config=workload and neutral.plain(workload),
                metric_args={"rounds": e.n, "interval_95": interval},
                source_name=f"moelib, study {neutral.plain(of.name)}",
                source_url=f"{url}/blob/main/{quant}.md",
            )
    return list(entries.values())
