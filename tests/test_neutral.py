"""Strings that others wrote: plain ones come back as they are, and no other one gets out as what it tries to be."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import types
import typing
import unicodedata
from dataclasses import fields
from typing import Any

import mistune
import pytest
import shown
import yaml
from click.testing import CliRunner
from conftest import REPO
from factory import study_of
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.text import Text
from pydantic import BaseModel

from moelib import cli
from moelib.base import files, neutral
from moelib.evidence import appendix, table
from moelib.figures import curves, plots
from moelib.publish import cards
from moelib.report import document, laws
from moelib.study import study

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=y>|&lt;b&gt;\n\n| a | b |\n|---|---|\n# head\n- item\n"
    "[link](http://evil.example) ![i](http://evil.example/x.png) <http://evil.example> http://evil.example "
    "www.evil.example `code` ``` ~~~ **bold** _em_ $x^2$ \\ \x1b[31mred\x1b]0;title\x07 \x00 \x7f \x9b "
    "\u202eright to left\u2066 \u200b\ufeff\u2028 &#60;b&#62; ]] }} {{ x }} {% raw %}"
)
PLAIN = (
    "Intel(R) Xeon(R) Processor",
    "NVIDIA H100 80GB HBM3",
    "version: 0.6.0-dev (build 11434, commit b11434); built with GNU 13.3.0 for Linux x86_64",
    "Linux 6.18.44-fc-v657-gpu",
    "3.11.7",
    "deepseek-moe-16b/Q4_K_M",
    "ggml-rpc-server, 1 threads on AMD EPYC 9V74",
    "RPC0[127.0.0.1:5]".replace("[", "(").replace("]", ")"),
    "n-cpu-moe=12",
)
MARKDOWN = mistune.create_markdown(renderer="html", escape=False, plugins=["table", "url", "strikethrough", "math"])
TAGS = {"p", "table", "thead", "tbody", "tr", "th", "td", "code", "em", "strong", "ul", "li", "h1", "h2", "h3"}


def unseen(text: str) -> set[str]:
    return {c for c in text if unicodedata.category(c) in neutral._SHAPELESS and c != "\n"}


def tags(text: str) -> set[str]:
    """The tags of what Markdown makes of a text, HTML in it let through."""
    return {name.lower() for name in re.findall(r"<\s*/?\s*([A-Za-z][\w-]*)", MARKDOWN(text))}


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_plain_stays_as_it_is(text):
    assert neutral.plain(text) == neutral.markdown(text) == neutral.lines(text) == text
    assert neutral.label(text) in (text, f"{text[:59]}…")
    assert neutral.code(text) == f"`{text}`"


def test_known_values():
    assert neutral.plain("a\tb\r\nc\x1b[0m") == "a b c\N{REPLACEMENT CHARACTER}[0m"
    assert neutral.plain("x" * 1000) == "x" * (neutral.LONGEST - 1) + "…"
    assert neutral.markdown("<b>*x*</b> [y](z) & _e_ a_b") == r"&#60;b&#62;\*x\*&#60;/b&#62; \[y\](z) &#38; \_e\_ a_b"
    assert neutral.markdown("# x") == r"\# x"
    assert neutral.markdown("12. x") == r"12\. x"
    assert neutral.markdown("https://x.y www.x.y a@b.c") == "https&#58;//x.y www&#46;x.y a&#64;b.c"
    assert neutral.code("a`b``c") == "`a'b''c`"
    assert neutral.word("m-Q2_K.gguf") == "m-Q2_K.gguf"
    assert neutral.word("a b`c`\n; rm x") == "'a b'\"'\"'c'\"'\"' ; rm x'"
    assert neutral.label("$x$") == r"\$x\$"
    assert neutral.lines("  a\n\x1b[2Jb\tc") == "  a\n\N{REPLACEMENT CHARACTER}[2Jb c"
    assert neutral.escaped('{"a": "\u202e\x7f\n\U000e0001"}') == '{"a": "\\u202e\\u007f\n\\udb40\\udc01"}'


@given(st.text(max_size=300))
def test_any_text_is_one_paragraph_of_its_own_characters(text):
    escaped = neutral.markdown(text)
    assert not unseen(escaped)
    assert "\n" not in escaped
    assert tags(f"x {escaped}") == {"p"}
    rendered = re.sub(r"</?p>", "", MARKDOWN(f"x {escaped}"))
    assert html.unescape(rendered).split() == ["x", *neutral.plain(text).split()]


@given(st.text(max_size=100))
def test_any_text_is_the_same_in_json_spelt_out(text):
    written = files.pretty({"a": text, text: 1}).decode("utf-8")
    assert json.loads(written) == {"a": text, text: 1}
    assert not unseen(written)


@example("", "\\|")
@given(st.text(max_size=100), st.text(max_size=100))
def test_any_cell_and_any_column_keep_the_tables_shape(value, column):
    plain = table.Table("t", [{"x": 1, f"c{column}": neutral.markdown(value)}] * 2, [{}] * 2)
    rows = MARKDOWN(plain.markdown())
    assert rows.count("<tr>") == 3
    assert len(re.findall(r"<t[hd]", rows)) == 6 + rows.count("<thead>")


def strings(annotation: Any) -> bool:
    """Whether a field may hold any string at all."""
    if annotation is str:
        return True
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        inner, *how = typing.get_args(annotation)
        return strings(inner) and not any(getattr(h, "pattern", None) or "pattern=" in repr(h) for h in how)
    if origin in (typing.Union, types.UnionType):
        return any(map(strings, typing.get_args(annotation)))
    return False


class Poison:
    """Replaces every string of a record or manifest that may be any string; `taken` says where there were some."""

    def __init__(self, models: bool):
        self.models = models
        """Whether names of models are made hostile too; cards are made of models that `params/` knows alone."""
        self.taken: set[str] = set()

    def name(self, value: str) -> str:
        return f"{value} {HOSTILE}"

    def __call__(self, value: Any, where: str = "") -> Any:
        if isinstance(value, BaseModel) or dataclasses.is_dataclass(value):
            kinds = typing.get_type_hints(type(value), include_extras=True)
            names = type(value).model_fields if isinstance(value, BaseModel) else [f.name for f in fields(value)]
            change = {k: self.field(k, kinds[k], getattr(value, k), f"{type(value).__name__}.{k}") for k in names}
            if isinstance(value, BaseModel):
                return value.model_copy(update=change)
            return dataclasses.replace(value, **change)
        if isinstance(value, tuple | list):
            return type(value)(self(v, where) for v in value)
        if isinstance(value, dict):
            return {self(k, where): self(v, where) for k, v in value.items()}
        if isinstance(value, str):
            self.taken.add(where)
            return self.name(value)
        return value

    def field(self, key: str, kind: Any, value: Any, where: str) -> Any:
        if key in KEPT or (key == "model" and not self.models):
            return value
        if isinstance(value, str) and not strings(kind):
            return value
        return self(value, where)


KEPT = {"quant", "placement", "load_mode", "kind", "digest", "raw", "started_utc", "block", "order"}
"""What a schema or a pattern holds to a few values, and what rows are found by."""
COMMITTED = {"demo": REPO / "docs/example/demo", "h100-twins": REPO / "outputs/h100-twins"}


def poisoned(name: str, models: bool) -> tuple[study.Study, set[str]]:
    """A committed study as evidence in which every free string is hostile; nothing is asked of it again."""
    results, poison = study.Study.read(COMMITTED[name]), Poison(models)
    parameters = results.parameters.model_copy(
        update={
            "name": poison.name("x"),
            "title": HOSTILE,
            "scale": HOSTILE if models else results.parameters.scale,
            "models": tuple(map(poison.name, results.parameters.models)) if models else results.parameters.models,
            "workloads": tuple(map(poison.name, results.parameters.workloads)),
        }
    )
    workloads = {
        poison.name(k): w.model_copy(update={"name": poison.name(k), "title": HOSTILE, "text": HOSTILE})
        for k, w in results.workloads.items()
    }
    records = {r.run_id: poison(r) for r in results.records}
    statuses = {}
    for cell, s in results.statuses.items():
        model, quant = cell.split("/")
        rounds = tuple(tuple(records[r.run_id] for r in runs) for runs in s.rounds)
        key = f"{poison.name(model) if models else model}/{quant}"
        statuses[key] = dataclasses.replace(s, rounds=rounds, problems=(f"{key}: {HOSTILE}",))
    bad = dataclasses.replace(results.evidence, records=[*records.values()], damaged=[HOSTILE], problems={}, checks={})
    poisonous = study_of(
        parameters,
        [poison(c) for c in results.cells],
        [],
        workloads,
        [poison(s) for s in results.manifests],
        {f"harness/{HOSTILE}": poison(h) for h in results.overhead.values()},
        bad,
        poison.name("x"),
    )
    poisonous.__dict__["statuses"] = statuses
    poisonous.__dict__["audit"] = tuple(poison(c) for c in results.audit)
    return poisonous, poison.taken


@pytest.fixture(scope="module", params=COMMITTED)
def bad(request):
    return poisoned(request.param, models=True)


def test_every_free_string_of_a_record_is_among_those_that_are_tried():
    taken = set().union(*(poisoned(name, models=True)[1] for name in COMMITTED))
    known = {
        "Record": ("run_id", "reasons"),
        "Spec": ("study", "model", "workloads", "scale"),
        "Manifest": ("model", "origin", "file_name", "engine_version", "tensor_types", "expert_types"),
        "EngineFacts": ("version",),
        "DeviceFacts": ("name",),
        "HostFacts": ("cpu", "system", "python", "moelib"),
        "Observation": ("argv", "absent"),
        "Request": ("workload",),
        "Buffer": ("name",),
        "Check": ("id",),
    }
    assert {f"{owner}.{name}" for owner, names in known.items() for name in names} <= taken


def clean(text: str) -> None:
    """A page shows no string as anything but itself."""
    assert not unseen(text), unseen(text)
    page = MARKDOWN(text)
    elements = {name.lower() for name in re.findall(r"<\s*/?\s*([A-Za-z][\w-]*)", page)}
    assert elements <= TAGS | {"img", "pre"}, elements - TAGS
    assert page.count("<pre") == page.count("</pre>") == text.count("```bash"), "no string ends a block of commands"
    assert "evil.example" in page, "the strings are there"
    assert not re.search(r"(href|src|onerror)\s*=\s*[\"'][^\"']*evil", page)
    tables = page.count("<table>")
    for rows in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL):
        assert rows.count("<td") == 0 or rows.count("<td") > 1
    assert tables == len(re.findall(r"^\|[:|-]+\|$", text, re.MULTILINE)), "every table is one"


def test_no_string_gets_out_in_the_document(bad, monkeypatch):
    results, _ = bad
    monkeypatch.setattr(study.Study, "read", lambda _: results)
    clean(shown.document("x", figures=True))


def test_no_string_gets_out_in_the_tables_of_a_run(bad):
    results, _ = bad
    records = results.used[:2]
    clean(appendix.runs_table(records).markdown())
    clean(appendix.manifest_table(results.manifests[0]).markdown())
    for figure in (plots.vram_over_time(records), plots.tokens_over_time(records, results.parameters.workloads[0])):
        figure.draw_without_rendering()


def test_no_string_gets_out_in_the_figures_of_a_study(bad):
    results, _ = bad
    workload = results.parameters.workloads[-1]
    assert "buffers" in curves.memory_stack(results).axes[0].texts[0].get_text(), "their kinds are none that are known"
    for figure in (
        curves.rate_over_vram(results, workload),
        curves.ttft_over_prompt(results),
        curves.predicted_against_measured(results, workload),
    ):
        figure.draw_without_rendering()
        said = [t.get_text() for t in figure.findobj(Text)]
        assert any("script" in t for t in said), "the strings are there"
        assert not unseen("".join(said))


def test_no_string_gets_out_in_the_tables_of_laws(bad):
    results, _ = bad
    assert "lack" in laws.vram_table(results).why_empty, "buffers of no known kind tell no law of VRAM"
    known = study.Study(results.path, results.plan, results.contents)
    parts = dict.fromkeys(("vram_weights_bytes", "vram_cache_bytes", "vram_compute_bytes"), 1e6)
    known.__dict__["runs"] = results.runs.assign(**parts)
    clean(laws.vram_table(known).markdown())
    for workload in results.parameters.workloads:
        for of in (laws.decode_table(results, workload), laws.ttft_table(results, workload)):
            clean(of.markdown())
        estimated = laws.estimates(results, workload, 50e9, 12e9)
        assert not unseen(estimated.markdown())
        if estimated.rows:
            clean(estimated.markdown())


@pytest.mark.parametrize("name", COMMITTED)
def test_no_string_gets_out_in_a_card(name, monkeypatch):
    results, _ = poisoned(name, models=False)
    part = cards.part

    def part_of(*args):
        of = part(*args)
        of.__dict__["statuses"] = {f"{c.model}/{c.quant}": results.statuses[f"{c.model}/{c.quant}"] for c in of.cells}
        return of

    monkeypatch.setattr(cards, "part", part_of)
    pages = {k: v for k, v in cards.build(results, "acme").items() if k.endswith(".md")}
    assert pages
    for text in pages.values():
        front, body = text.split("\n---\n", 1)
        assert not unseen(text)
        assert yaml.safe_load(front)["library_name"] == "gguf"
        page = MARKDOWN(body)
        elements = {name.lower() for name in re.findall(r"<\s*/?\s*([A-Za-z][\w-]*)", page)}
        assert elements <= TAGS | {"a", "pre", "blockquote", "h4"}
        assert not re.search(r"(href|src|onerror)\s*=\s*[\"'][^\"']*evil", page)
        assert body.count("```") == 2 * len(re.findall(r"^```\w+$", body, re.MULTILINE)), "no block of code ends early"


def test_no_string_gets_out_on_a_terminal(bad, monkeypatch):
    results, _ = bad
    monkeypatch.setattr(study.Study, "read", lambda _: results)
    monkeypatch.setattr(study.Study, "named", lambda _: results)
    verdict = appendix.problems(results).verdict
    monkeypatch.setattr(document, "report", lambda *_: document.Reported(REPO, **verdict))
    for argv in (["audit", "demo"], ["study", "status", "demo"], ["report", "demo"]):
        done = CliRunner().invoke(cli.main, argv)
        assert done.exit_code == 1, done.exception
        assert "bug in moelib" not in done.output
        assert not unseen(done.output)
        problems = [line for line in done.output.splitlines() if line.startswith("  ")]
        assert len(problems) == len(results.problems)
