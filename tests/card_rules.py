"""Rules on the text of model cards: what would be wrong with them on the Hugging Face Hub."""

import json
import re
from pathlib import PurePosixPath

import mistune
import yaml
from huggingface_hub import ModelCard

from moelib.base import files
from moelib.catalogue import params
from moelib.evidence import table
from moelib.publish import cards

LICENSES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigcode-openrail-m bsd-2-clause
bsd-3-clause cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc0-1.0 gpl-3.0 lgpl-3.0 agpl-3.0 mpl-2.0 unlicense
llama2 llama3 llama3.1 llama3.2 llama3.3 gemma other""".split()
"""Of the Hub's identifiers (huggingface.co/docs/hub/repositories-licenses) those that models' weights come under."""
REQUIRED = "library_name license quantized_by tags language".split()
BASE = ["base_model", "base_model_relation"]
"""Of all real weights but those that were made for this project."""
LONGEST = 24
"""Lines of a short frontmatter."""
UNFINISHED = re.compile(
    r"\b(TODO|TBD|FIXME|[Xx]{3,}|NAMESPACE|YOUR[-_ ]\w+|REPLACE_\w+)\b|[Ll]orem ipsum|\{\{|\}\}|\{%"
    r"|^(<{7}|={7}|>{7}|\|{7})(?=\s|$)",  # of a merge
    re.M,
)
LEFT_OVER = re.compile(r"<[^<>\n]+>|\b(None|nan|NaN)\b")
CITED = re.compile(r"^\*Table `(.+)`: (\d+) sources, set digest `(\w+)`\.\*$", re.M)
FOR_USERS = re.compile(r"prompt format|ollama|lm studio|\blms\b|shimmy|hf download|licen[cs]e|quantized", re.I)
"""What only a card of real weights speaks of."""
USE = ["Prompt format", "Use it from Python and other programs"]
FIRST = {
    "README.md": ["Which file for which GPU", "Files", "VRAM", "Speed"],
    "quant": ["Run it", "File", "VRAM", "Speed"],
}
LAST = ["How it was measured", "Reproduce it"]
COMMAND = re.compile(r"llama-server -m (\S+\.gguf) -ngl 99 -c (\d+) -np 1 -fa on( .*)?")
FLAGS = re.compile(
    r"--cpu-moe|--n-cpu-moe \d+|-ub \d+|--no-op-offload|-ct[kv] \S+|--load-mode (?!mmap)\w+|--no-mmap|--mlock"
)
SHARED = re.compile(r"what-to-run-|files$|vram-|speed-|quality-")
OF_ROOT = re.compile(r"what-to-run-|files$")
"""Tables of the document that only the page of a model has."""
OF_MODEL = re.compile(r"what-to-run-|vram-|speed-|quality-\w+-")
"""Before the name of the model that a table is of."""


def metadata(page):
    """The frontmatter of real weights is whole, and the Hub's own client reads it; that of random weights says that
    they are random, and names no model, licence, language or task, by which the Hub would list it."""
    front = yaml.safe_load(page.front)
    if page.twin:
        return [] if front == {"library_name": "gguf", "tags": ["gguf", "geometry-twin", "random-weights"]} else [front]
    missing = [key for key in [*REQUIRED, *(BASE if page.card.base_model else ())] if not front.get(key)]
    if missing:
        return [f"lacks {', '.join(missing)}"]
    problems = []
    if front["license"] not in LICENSES:
        problems.append(f"license {front['license']!r} is not one of the Hub's")
    if front["license"] == "other" and not (front.get("license_name") and front.get("license_link")):
        problems.append("license other needs license_name and license_link")
    if front["pipeline_tag"] != "text-generation":
        problems.append("pipeline_tag is not that of a language model")
    relation = "quantized" if page.card.base_model else None
    if ModelCard(page.text).data.base_model != page.card.base_model or front.get("base_model_relation") != relation:
        problems.append("it is not listed as a quantisation of its model")
    return problems


def short(page):
    """The frontmatter is what the Hub lists by, and no table of results."""
    lines = page.front.count("\n")
    return [f"{lines} lines of frontmatter"] if lines > LONGEST else []


def warned(page):
    """Random weights say so in the first line, in bold, and real ones nowhere."""
    line = f"**Random weights: this is not {page.title}, and must not be published as that model.**"
    first, *rest = page.body.strip().splitlines()
    good = first == line if page.twin else line not in (first, *rest)
    return [] if good else [f"begins with {first!r}"]


def silent(page):
    """A card of random weights has nothing for users of the model."""
    return FOR_USERS.findall(page.body) if page.twin else []


def answered(page):
    """The answer comes first, with its commands; then files, VRAM and speed, how it was measured and is reproduced."""
    first, credits = [*FIRST.get(page.name, FIRST["quant"])], ["Credits" if page.twin else "Licence and credits"]
    first[3:3] = ["Quality"] if page.quality else []
    problems = []
    use = USE if page.name == "README.md" and not page.twin else []
    if page.headings != first + use + LAST + credits:
        problems.append(f"sections {page.headings}")
    if "\nllama-server -m " not in page.body.partition("\n## ")[2].partition("\n## ")[0]:
        problems.append("no command in the first section")
    return problems


def commands(page):
    """Every command has the flags of runs of its file; where both load modes ran and copying is advised, with that."""
    problems = [] if page.commands else ["no command"]
    copy = "**For long prompts, copy the experts**" in page.body
    for line in page.commands:
        match = COMMAND.fullmatch(line)
        name, context, given = match.groups() if match else (None, None, None)
        flags = frozenset(FLAGS.findall(given or ""))
        measured = page.measured.get((name, context), set())
        if match is None or flags not in measured or FLAGS.sub("", given or "").strip():
            problems.append(f"was not measured: {line}")
        elif copy and flags and any(flags < other and "--load-mode none" in other for other in measured):
            problems.append(f"maps the experts: {line}")
    return problems


def layers(page):
    """N is told by the layers that hold experts: those that hold none count among the N, and move nothing."""
    dense, count = page.geometry.leading_dense_block_count, page.geometry.block_count
    told = re.findall(r"^# .*experts of (\d+) layers? on the CPU.*\n.*--n-cpu-moe (\d+)", page.body, re.M)
    told += [(k, n) for n, k in re.findall(r"^\|.*--n-cpu-moe (\d+)\b[^|]*\| *(\d+) *\|", page.body, re.M)]
    bare = len(re.findall(r"--n-cpu-moe \d", re.sub(r"`llama-server [^`]*`", "", page.body))) - len(told)
    half = re.findall(r"N = (\d+) moves the experts of (\d+) of the (\d+) layers that hold some", page.body)
    problems = [f"{bare} times --n-cpu-moe without its layers"] if bare else []
    problems += [f"N = {n} moves {k} layers" for k, n in told if int(k) != int(n) - dense]
    if [(int(n) - int(k), int(of)) for n, k, of in half] != [(dense, count - dense)]:
        problems.append(f"N by layers: {half}")
    if dense and f"so that N moves those of N - {dense} layers" not in page.body:
        problems.append("the layers without experts are not told")
    return problems


def hashed(page):
    """The SHA-256 of every file of the page is there in full, once."""
    found = {name: re.findall(rf"\b{sha256[:12]}\w*", page.body) for name, sha256 in page.files.items()}
    return [f"{name}: SHA-256 {found[name]}" for name, sha256 in page.files.items() if found[name] != [sha256]]


def split(page):
    """Bits per weight of every file are told apart: experts and the rest."""
    tables = page.provenance["tables"]
    if "files" in tables:
        cells = [row["cells"] for row in tables["files"]["rows"]]
        numbers = [c.get(head, "") for c in cells for head in ("bits/weight", "of the experts", "of the rest")]
    else:
        rows = {row["cells"]["what"]: row["cells"]["value"] for row in tables["sheet"]["rows"]}
        numbers = re.split(r"; | of the experts, ", rows["bits per weight"].removesuffix(" of the rest"))
    good = len(numbers) == 3 * len(page.files) and all(re.fullmatch(r"\d+(\.\d+)?", n) for n in numbers)
    return [] if good else [f"bits per weight: {numbers}"]


def links(page):
    """Links lead to the web or to a file beside the card, and every GGUF that is named is one that is there."""
    targets = [token["attrs"]["url"] for token in page.of("link", "image")]
    wrong = [u for u in targets if not re.fullmatch(r"https://[\w.-]+\.\w+(/\S*)?", u) and u not in page.beside]
    named = set(re.findall(r"[\w.-]+\.gguf\b", page.body)) - set(re.findall(r"[\w.-]+\.gguf\b", str(page.origins)))
    return wrong + sorted(named - page.beside)


def unfinished(page):
    return [match[0] for match in (*UNFINISHED.finditer(page.text), *LEFT_OVER.finditer(page.prose))]


def renders(page):
    """One title; every table is a table, all emphasis and links are closed, and so is every block of code."""
    outside = re.sub(r"^```.*?^```$", "", page.body, flags=re.M | re.S)
    problems = [mark for mark in ("**", "](", "```", "|:-") if mark in page.prose] + re.findall("```", outside)
    if sum(token["attrs"]["level"] == 1 for token in page.of("heading")) != 1:
        problems.append("not one title")
    if len(re.findall(r"^\|[-: |]+\|$", outside, re.M)) != len(page.of("table")):
        problems.append("a table that is not rendered as one")
    return problems


def tables(page):
    """Every table cites its sources, and is, cell by cell, what `provenance.json` says it is."""
    cited = CITED.findall(page.text)
    problems = ["a table cites no sources"] if len(cited) != len(page.of("table")) else []
    lines = [sorted(c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]) for line in page.text.splitlines()]
    for name, count, digest in cited:
        rows = page.provenance["tables"][name]["rows"]
        sources = table.resolved((source for row in rows for source in row["from"]), page.provenance)
        if (len(sources), files.digest(sources)[: len(digest)]) != (int(count), digest):
            problems.append(f"table {name} cites other sources than provenance.json")
        if any(sorted(c.replace("|", "\\|") for c in row["cells"].values()) not in lines for row in rows):
            problems.append(f"table {name} differs from provenance.json")
    return problems


def same(page):
    """The tables are those of the document, cell by cell: all rows of the page's model and quant, and no others. A card
    leaves out the columns that are alike in all of these, and links to files; of these it leaves out more."""
    if page.document is None:
        return []
    about = {"model": page.model} if page.name == cards.ROOT else {"model": page.model, "quant": page.name[:-3]}
    shown = {name: t["rows"] for name, t in page.provenance["tables"].items() if SHARED.match(name)}
    wanted = {name: t["rows"] for name, t in page.document["tables"].items() if SHARED.match(name)}
    wanted = {k: v for k, v in wanted.items() if not OF_MODEL.match(k) or OF_MODEL.sub("", k).startswith(page.model)}
    if page.twin:  # what random weights say has no quality
        wanted = {k: v for k, v in wanted.items() if not k.startswith("quality-")}
    if "quant" in about:
        wanted = {name: rows for name, rows in wanted.items() if not OF_ROOT.match(name)}
    problems = [f"tables {sorted(shown)}, not {sorted(wanted)}"] if shown.keys() != wanted.keys() else []
    for name in shown.keys() & wanted.keys():
        rows = [row["cells"] for row in wanted[name]]
        rows = [cells for cells in rows if all(cells.get(k, v) == v for k, v in about.items())]
        cells_of = [
            {k: _unlinked(v) for k, v in row["cells"].items() if (name, k) != ("files", "file")} for row in shown[name]
        ]
        if len(cells_of) != len(rows):
            problems.append(f"table {name} has {len(cells_of)} of the document's {len(rows)} rows")
        for cells in cells_of:
            if not any(cells.items() <= other.items() for other in rows):
                problems.append(f"table {name} is not the document's: {cells}")
            if name != "files" and any(other.keys() - about.keys() - cells.keys() for other in rows):
                problems.append(f"table {name} lacks columns: {cells}")
    return problems


def _unlinked(text):
    return re.sub(r"^\[(.*)\]\(.*\)$", r"\1", text)


RULES = (
    *(metadata, short, warned, silent, answered, commands, layers, hashed, split),
    *(links, unfinished, renders, tables, same),
)


class Page:
    """One card of a study. `beside`: names of the files in its folder. `provenance`: what `provenance.json` says of it.
    `document`: the same of the study's document."""

    def __init__(self, name, text, beside, provenance, document, study, model):
        self.name, self.text, self.beside, self.provenance, self.document = name, text, beside, provenance, document
        self.model = model
        _, self.front, self.body = text.split("---\n", 2)
        self.tokens = list(_walk(mistune.create_markdown(renderer=None, plugins=["table"])(self.body)))
        self.prose = "\n".join(t["raw"] for t in self.of("text", "inline_html", "block_html"))
        self.headings = re.findall(r"^## (.+)$", self.body, re.M)
        self.commands = re.findall(r"^llama-server .*$", self.body, re.M)
        self.twin, self.card = study.parameters.weights == "twin", params.card(model)
        self.quality = study.parameters.quality is not None and not self.twin
        self.title, self.geometry = params.model(model).title, params.model(model).at_scale(study.parameters.scale)
        manifests = cards.quants_of(study, model)
        shown = manifests if name == cards.ROOT else {name[:-3]: manifests[name[:-3]]}
        self.files = {s.file_name: s.sha256 for s in shown.values()}
        self.origins = {s.origin for s in shown.values()}
        self.measured = {}
        for r in (r for r in study.used if r.spec.model == model):
            key = manifests[r.spec.quant].file_name, str(r.spec.context_tokens)
            self.measured.setdefault(key, set()).add(frozenset(FLAGS.findall(" ".join(r.observation.argv))))

    def of(self, *types):
        return [token for token in self.tokens if token["type"] in types]


def _walk(tokens):
    for token in tokens:
        yield token
        yield from _walk(token.get("children", []))


def broken(pages, study, document=None):
    """[(page, rule, problems)] of cards as `cards.build` makes them of a study. `document`: provenance of its document;
    without one it is not compared."""
    models = {cards.repository(study, m): m for m in study.parameters.models}
    findings = []
    for name in (n for n in pages if n.endswith(".md")):
        folder, base = PurePosixPath(name).parent, PurePosixPath(name).name
        every = (*pages, *cards.planned(study))
        beside = {PurePosixPath(p).name for p in every if PurePosixPath(p).parent == folder}
        provenance = json.loads(pages[f"{folder}/provenance.json"])[base]
        page = Page(base, pages[name], beside, provenance, document, study, models[str(folder)])
        findings += [(name, rule.__name__, problems) for rule in RULES if (problems := rule(page))]
    assert findings or pages
    return findings
