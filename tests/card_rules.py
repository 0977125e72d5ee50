"""Rules on the text of model cards: what would be wrong with them on the Hugging Face Hub."""

import json
import re
from pathlib import PurePosixPath

import mistune
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from moelib.base import files
from moelib.report import table

LICENSES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigcode-openrail-m bsd-2-clause
bsd-3-clause cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc0-1.0 gpl-3.0 lgpl-3.0 agpl-3.0 mpl-2.0 unlicense
llama2 llama3 llama3.1 llama3.2 llama3.3 gemma other""".split()
"""Of the Hub's identifiers (huggingface.co/docs/hub/repositories-licenses) those that models' weights come under."""
REQUIRED = "base_model base_model_relation library_name license quantized_by tags language model-index".split()
UNFINISHED = re.compile(
    r"\b(TODO|TBD|FIXME|[Xx]{3,}|NAMESPACE|YOUR[-_ ]\w+|REPLACE_\w+)\b|[Ll]orem ipsum|\{\{|\}\}|\{%"
    r"|^(<{7}|={7}|>{7}|\|{7})(?=\s|$)",  # of a merge
    re.M,
)
LEFT_OVER = re.compile(r"<[^<>\n]+>|\b(None|nan|NaN)\b")
CITED = re.compile(r"^\*Table `(.+)`: (\d+) sources, set digest `(\w+)`\.\*$", re.M)


def metadata(page):
    """The frontmatter is whole, and the Hub's own client reads and writes it the same."""
    front = yaml.safe_load(page.front)
    missing = [key for key in REQUIRED if not front.get(key)]
    if missing:
        return [f"lacks {', '.join(missing)}"]
    problems = []
    if front["license"] not in LICENSES:
        problems.append(f"license {front['license']!r} is not one of the Hub's")
    if front["license"] == "other" and not (front.get("license_name") and front.get("license_link")):
        problems.append("license other needs license_name and license_link")
    if front["pipeline_tag"] != "text-generation":
        problems.append("pipeline_tag is not that of a language model")
    data = ModelCard(page.text).data
    if eval_results_to_model_index(data.model_name, data.eval_results or []) != front["model-index"]:
        problems.append("huggingface_hub merges results of equal configuration in its model-index")
    return problems


def links(page):
    """Links lead to the web or to a file beside the card, and every GGUF that is named is one that is there."""
    targets = [token["attrs"]["url"] for token in page.of("link", "image")]
    wrong = [u for u in targets if not re.fullmatch(r"https://[\w.-]+\.\w+(/\S*)?", u) and u not in page.beside]
    return wrong + sorted(set(re.findall(r"[\w.-]+\.gguf\b", page.body)) - page.beside)


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


RULES = (metadata, links, unfinished, renders, tables)


class Page:
    """One card. `beside`: names of the files in its folder. `provenance`: what `provenance.json` says of it."""

    def __init__(self, text, beside, provenance):
        self.text, self.beside, self.provenance = text, beside, provenance
        _, self.front, self.body = text.split("---\n", 2)
        self.tokens = list(_walk(mistune.create_markdown(renderer=None, plugins=["table"])(self.body)))
        self.prose = "\n".join(t["raw"] for t in self.of("text", "inline_html", "block_html"))

    def of(self, *types):
        return [token for token in self.tokens if token["type"] in types]


def _walk(tokens):
    for token in tokens:
        yield token
        yield from _walk(token.get("children", []))


def broken(pages, models):
    """[(page, rule, problems)] of cards as `cards.build` makes them. `models`: paths of the GGUF files beside them."""
    findings = []
    for name in (n for n in pages if n.endswith(".md")):
        folder = PurePosixPath(name).parent
        beside = {PurePosixPath(p).name for p in (*pages, *models) if PurePosixPath(p).parent == folder}
        provenance = json.loads(pages[f"{folder}/provenance.json"])[PurePosixPath(name).name]
        page = Page(pages[name], beside, provenance)
        findings += [(name, rule.__name__, problems) for rule in RULES if (problems := rule(page))]
    assert findings or pages
    return findings
