"""What would be wrong with model cards on the Hugging Face Hub: rules on their text alone, each with a name."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from moelib import files, table, yaml_file

LICENSES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigcode-openrail-m bsd-2-clause
bsd-3-clause cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc0-1.0 gpl-3.0 lgpl-3.0 agpl-3.0 mpl-2.0 unlicense
llama2 llama3 llama3.1 llama3.2 llama3.3 gemma other""".split()
"""Of the Hub's identifiers (huggingface.co/docs/hub/repositories-licenses) those that models' weights come under."""
PIPELINE_TAGS = """text-generation text-classification token-classification question-answering translation summarization
feature-extraction fill-mask sentence-similarity text-ranking image-text-to-text any-to-any""".split()
"""Of the Hub's tasks (huggingface.js, packages/tasks/src/pipelines.ts) those of language models."""
REQUIRED = (
    "base_model base_model_relation library_name pipeline_tag license quantized_by tags language model-index".split()
)
UNFINISHED = re.compile(
    r"\b(TODO|TBD|FIXME|[Xx]{3,}|NAMESPACE|YOUR[-_ ]\w+|REPLACE_\w+)\b|[Ll]orem ipsum|\{\{|\}\}|\{%"
)
LEFT_OVER = re.compile(r"<[^<>\n]+>|\b(None|nan|NaN)\b")
CITED = re.compile(r"^\*Table `(.+)`: (\d+) sources, set digest `(\w+)`\.\*$", re.M)


class Fault(NamedTuple):
    page: str
    rule: str
    what: str


def _walk(tokens: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for token in tokens:
        yield token
        yield from _walk(token.get("children", []))


@dataclass(frozen=True)
class Page:
    """One card, and the names of the files beside it."""

    text: str
    beside: frozenset[str]
    provenance: dict[str, Any] | None
    """What `provenance.json` says of this page."""

    @cached_property
    def metadata(self) -> dict[str, Any]:
        try:
            data = yaml_file.loads(self.text.split("---\n")[1]) if self.text.startswith("---\n") else None
        except yaml_file.YamlError:
            data = None
        return data if isinstance(data, dict) else {}

    @cached_property
    def body(self) -> str:
        return self.text.split("\n---\n", 1)[-1]

    @cached_property
    def tokens(self) -> list[dict[str, Any]]:
        import mistune

        return list(_walk(mistune.create_markdown(renderer=None, plugins=["table"])(self.body)))

    def of(self, *types: str) -> list[dict[str, Any]]:
        return [t for t in self.tokens if t["type"] in types]

    @cached_property
    def words(self) -> str:
        """What is read, without code."""
        return "\n".join(t["raw"] for t in self.of("text", "inline_html", "block_html"))


def metadata(page: Page) -> Iterator[str]:
    """The frontmatter is what the Hub's own client makes of it, and whole."""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard_data import eval_results_to_model_index

    if not page.metadata:
        yield "has no frontmatter that is YAML"
        return
    if lacks := [k for k in REQUIRED if not page.metadata.get(k)]:
        yield f"lacks {', '.join(lacks)}"
        return
    try:
        data = ModelCard(page.text).data
        again = eval_results_to_model_index(data.model_name, data.eval_results or [])
    except (ValueError, TypeError, KeyError, AttributeError) as err:
        yield f"huggingface_hub cannot read it: {err}"
        return
    if again != page.metadata["model-index"]:
        yield "its model-index changes when huggingface_hub reads and writes it: results of equal configuration merge"


def licence(page: Page) -> Iterator[str]:
    name = page.metadata.get("license")
    if page.metadata and name not in LICENSES:
        yield f"license {name!r} is not one of the Hub's"
    elif name == "other" and not (page.metadata.get("license_name") and page.metadata.get("license_link")):
        yield "license other needs license_name and license_link"


def pipeline(page: Page) -> Iterator[str]:
    if page.metadata and page.metadata.get("pipeline_tag") not in PIPELINE_TAGS:
        yield f"pipeline_tag {page.metadata.get('pipeline_tag')!r} is no task of the Hub for a language model"


def links(page: Page) -> Iterator[str]:
    """Links lead to the web or to a file beside the card, and every GGUF that is named is one that is there."""
    for url in (t["attrs"]["url"] for t in page.of("link", "image")):
        if not re.fullmatch(r"https://[\w.-]+\.\w+(/\S*)?", url) and url not in page.beside:
            yield f"a link leads to {url!r}, which is not there"
    for name in sorted(set(re.findall(r"[\w.-]+\.gguf\b", page.body)) - page.beside):
        yield f"names {name}, which is not there"


def unfinished(page: Page) -> Iterator[str]:
    for match in [*UNFINISHED.finditer(page.text), *LEFT_OVER.finditer(page.words)]:
        yield f"holds {match[0]!r}"


def conflict(page: Page) -> Iterator[str]:
    for match in re.finditer(r"^(<{7}|={7}|>{7}|\|{7})(?=\s|$)", page.text, re.M):
        yield f"holds a conflict marker: {match[0]}"


def renders(page: Page) -> Iterator[str]:
    """One title; every table is a table, all emphasis and links are closed, and so is every block of code."""
    outside = re.sub(r"^```.*?^```$", "", page.body, flags=re.M | re.S)
    if (titles := sum(t["attrs"]["level"] == 1 for t in page.of("heading"))) != 1:
        yield f"has {titles} titles"
    if len(re.findall(r"^\|[-: |]+\|$", outside, re.M)) != len(page.of("table")):
        yield "holds a table that is not rendered as one"
    for mark in ("**", "](", "```", "|:-"):
        if mark in page.words or (mark == "```" and mark in outside):
            yield f"shows {mark} to its reader"


def tables(page: Page) -> Iterator[str]:
    """Every table cites its sources, and is, cell by cell, what `provenance.json` says it is."""
    provenance = page.provenance or {"tables": {}, "sets": {}, "sources": {}}
    cited = CITED.findall(page.text)
    if len(cited) != len(page.of("table")):
        yield f"{len(page.of('table'))} tables, {len(cited)} of them cite their sources"
    lines = [sorted(c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]) for line in page.text.splitlines()]
    for name, count, digest in cited:
        rows = provenance["tables"].get(name, {"rows": []})["rows"]
        sources = table.resolved((name for row in rows for name in row["from"]), provenance)
        if (len(sources), files.digest(sources)[: len(digest)]) != (int(count), digest):
            yield f"table {name} cites other sources than provenance.json"
        elif any(sorted(c.replace("|", "\\|") for c in row["cells"].values()) not in lines for row in rows):
            yield f"table {name} differs from provenance.json"


RULES: dict[str, Callable[[Page], Iterator[str]]] = {
    rule.__name__: rule for rule in (metadata, licence, pipeline, links, unfinished, conflict, renders, tables)
}


def faults(texts: dict[str, str], planned: set[str]) -> list[Fault]:
    """Every rule that a card breaks. `texts`: path -> content of the folder; `planned`: paths of the files to come."""
    broken, names = [], sorted(n for n in texts if n.endswith(".md"))
    for name in names:
        folder = PurePosixPath(name).parent
        beside = {p.name for p in map(PurePosixPath, texts.keys() | planned) if p.parent == folder}
        page = Page(texts[name], frozenset(beside), _provenance(texts, PurePosixPath(name)))
        for rule, breaks in RULES.items():
            try:
                broken += [Fault(name, rule, what) for what in breaks(page)]
            except (RecursionError, LookupError, TypeError, AttributeError) as err:  # of a file that nobody made here
                broken.append(Fault(name, rule, f"cannot be judged ({type(err).__name__}): make the cards again"))
    return broken if names else [Fault(".", "empty", "there is no card here")]


def _provenance(texts: dict[str, str], page: PurePosixPath) -> dict[str, Any] | None:
    try:
        data = json.loads(texts.get(str(page.with_name("provenance.json")), "{}"))
    except (ValueError, RecursionError):
        return None  # its tables then cite what is not there
    return data.get(page.name) if isinstance(data, dict) else None
