"""Model cards: made of records alone, by the rules of the Hub, and checked byte for byte."""

import dataclasses
import re
import subprocess
import sys

import card_rules
import pytest
from click.testing import CliRunner
from conftest import FIXTURES, REPO
from huggingface_hub import ModelCard

from moelib import cli
from moelib.base import files, stats
from moelib.catalogue import params
from moelib.catalogue.placement import Placement
from moelib.engine import engine as engines
from moelib.machine import process
from moelib.models import models, quantize
from moelib.publish import cards
from moelib.study import study

DEEPSEEK = "deepseek-moe-16b-cpu-offload-gguf"
ROOT, QUANT = f"{DEEPSEEK}/README.md", f"{DEEPSEEK}/Q2_K.md"


@pytest.fixture(scope="module")
def full():
    return study.Study.read(REPO / "outputs/h100-twins")


@pytest.fixture(scope="module")
def demo():
    return study.Study.read(REPO / "docs/example/demo")


@pytest.fixture(scope="module")
def demo_pages(demo):
    return cards.build(demo, "acme")


@pytest.fixture(scope="module")
def pages(full):
    return {name: text for name, text in cards.build(full, "acme").items() if name.startswith(DEEPSEEK)}


def broken_by(pages, full, old, new):
    """The rules that a card breaks once `old` is `new` in it."""
    text = pages[QUANT].replace(old, new, 1)
    assert text != pages[QUANT], f"{old!r} is not in the card"
    return {rule for _, rule, _ in card_rules.broken(pages | {QUANT: text}, cards.planned(full))}


def test_the_cards_of_both_models_break_no_rule(full, demo, demo_pages):
    assert card_rules.broken(cards.build(full, "acme"), cards.planned(full)) == []
    assert card_rules.broken(demo_pages, cards.planned(demo)) == []
    models = demo.parameters.models
    assert {name.split("/")[0] for name in demo_pages} == {params.card(m).repository for m in models}
    assert len([n for n in demo_pages if n.endswith(".md")]) == 2 * (1 + 3)
    assert cards.build(demo, "acme") == demo_pages


@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        ("metadata", "base_model_relation: quantized\n", ""),
        ("metadata", "config: Q2_K, experts on the CPU", "config: Q2_K, all on the GPU"),
        ("metadata", "license: other", "license: deepseek"),
        ("metadata", "license_name: deepseek\n", ""),
        ("metadata", "pipeline_tag: text-generation", "pipeline_tag: text-completion"),
        ("links", "](README.md)", "](CARD.md)"),
        ("links", "https://github.com/ggml-org/llama.cpp", "https://github"),
        ("links", "-m deepseek-moe-16b-Q2_K.gguf", "-m deepseek-moe-16b-Q3_K.gguf"),
        ("unfinished", "## Run it", "## Run it\n\nTODO"),
        ("unfinished", "## Run it", "## Run it\n\nby <your name>"),
        ("unfinished", "for 4,096 tokens", "for None tokens"),
        ("unfinished", "## Run it", "<<<<<<< ours\n\n## Run it"),
        ("renders", "## Run it", "**Run it"),
        ("renders", "## Run it", "# Run it"),
        ("renders", "- Measured and written with", "```\n- Measured and written with"),
        ("tables", "set digest `", "set digest `0"),
    ],
)
def test_each_rule_fails_alone(pages, full, rule, old, new):
    assert broken_by(pages, full, old, new) == {rule}


def test_a_table_with_another_number_or_no_ruler_is_seen(pages, full):
    row = re.search(r"\| cpu-moe +\| mmap +\| +([\d.]+)", pages[QUANT])[0]
    assert broken_by(pages, full, row, row[:-1] + str((int(row[-1]) + 1) % 10)) == {"tables"}
    ruler = next(line for line in pages[QUANT].splitlines() if line.startswith("|:-"))
    assert broken_by(pages, full, ruler + "\n", "") == {"tables"}
    assert broken_by(pages, full, ruler, ruler + "---|") == {"renders", "tables"}


def one_bit(path):
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])


HARMS = {
    "one bit": (one_bit, "differs from what the records give: make the cards again"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\n"), "differs"),
    "other line ends": (lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")), "differs"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "differs"),
    "deleted": (lambda path: path.unlink(), "is missing: make the cards again"),
    "added": (lambda path: path.with_name("note.txt").write_bytes(b"0"), "is not a card of these records: delete it"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_was_written_is_byte_for_byte_what_the_records_give(demo, demo_pages, tmp_path, monkeypatch, harm):
    monkeypatch.setattr(cards, "build", lambda results, namespace: demo_pages)  # each takes a second
    written = cards.write(demo, "acme", tmp_path)
    assert {p.relative_to(tmp_path).as_posix() for p in written} == demo_pages.keys()
    assert cards.check(tmp_path, demo, "acme") == []
    change, words = HARMS[harm]
    for name in (ROOT, QUANT, f"{DEEPSEEK}/SHA256SUMS", f"{DEEPSEEK}/provenance.json"):
        change(tmp_path / name)
        (problem,) = cards.check(tmp_path, demo, "acme")
        assert words in problem
        (tmp_path / DEEPSEEK / "note.txt").unlink(missing_ok=True)
        cards.write(demo, "acme", tmp_path)


def test_cards_for_another_namespace_or_of_other_records_are_stale(demo, tmp_path):
    cards.write(demo, "acme", tmp_path)
    assert any(problem.startswith(f"{ROOT} differs") for problem in cards.check(tmp_path, demo, "other"))
    stale = cards.check(tmp_path, without(demo, "Q8_0"), "acme")
    assert f"{DEEPSEEK}/Q8_0.md is not a card of these records: delete it" in stale
    assert any(problem.startswith(f"{ROOT} differs") for problem in stale)


def test_the_metadata_is_what_the_hub_understands(pages, full):
    data = ModelCard(pages[ROOT]).data
    assert data.base_model == "deepseek-ai/deepseek-moe-16b-base"
    assert (data.license, data.license_name, data.quantized_by) == ("other", "deepseek", "acme")
    results = {(r.dataset_config, r.metric_name): r for r in data.eval_results}
    assert len(results) == len(data.eval_results)
    quants = cards.quants_of(full, "deepseek-moe-16b")
    assert len(results) == len(quants) * 2 * (1 + 2 * len(full.parameters.workloads))
    assert {r.source_url for r in results.values()} == {
        f"https://huggingface.co/acme/{DEEPSEEK}/blob/main/{q}.md" for q in quants
    }
    runs = [r for b in full.statuses["deepseek-moe-16b/Q2_K"].rounds for r in b if r.spec.label == "cpu-moe/mmap"]
    memory = stats.geometric_mean([r.observed.memory.value_bytes / 2**20 for r in runs]).value
    vram = results["Q2_K, experts on the CPU", "Peak VRAM, MiB"]
    assert vram.metric_value == float(stats.number(memory))
    assert vram.metric_args["rounds"] == len(runs)


def test_a_twin_says_so_first_and_in_its_metadata(pages):
    for page in (ROOT, QUANT):
        card = ModelCard(pages[page])
        assert card.text.strip().startswith("> **The numbers of this card are those of a geometry twin")
        assert "geometry-twin" in card.data.tags


def test_the_document_and_the_card_hold_the_same_tables(full):
    document = (REPO / "docs/MOE-TECHNICAL-VALIDATION.md").read_text(encoding="utf-8")
    for name, text in cards.build(full, "acme").items():
        if name.endswith("README.md"):
            card = text.split("## Which file")[1].split("How to read it")[0]
            shared = [line for line in card.splitlines() if line and "not listed" not in line]
            assert len(shared) > 12
            assert [line for line in shared if line not in document.splitlines()] == []


def only(results, keep):
    left = [r for r in results.records if keep(r.spec)]
    evidence = dataclasses.replace(results.evidence, records=left)
    return study.Study(results.path, results.plan, study.Contents(evidence, results.manifests, {}))


def without(results, *quants):
    return only(results, lambda spec: spec.quant not in quants)


def test_one_block_has_no_interval_and_says_so(demo):
    one = only(demo, lambda spec: spec.block == 0)
    pages = cards.build(one, "acme")
    assert card_rules.broken(pages, cards.planned(one)) == []
    assert "(n = 1)" in pages[QUANT]
    assert {(*r.metric_args["interval_95"],) for r in ModelCard(pages[ROOT]).data.eval_results} == {()}


def test_what_is_not_measured_has_no_card_and_is_named(demo):
    pages = cards.build(without(demo, "Q8_0"), "acme")
    assert f"{DEEPSEEK}/Q8_0.md" not in pages
    assert "Not measured yet, so not listed: Q8_0." in pages[ROOT]
    assert "Q8_0.gguf" not in pages[ROOT]
    assert cards.missing(without(demo, "Q8_0")) == []
    nothing = without(demo, *demo.parameters.quants)
    assert cards.missing(nothing) == list(demo.parameters.models)
    with pytest.raises(cards.CardError, match="no complete round"):
        cards.build(nothing, "acme")


def test_only_the_file_that_was_measured_may_be_published(full, tmp_path):
    path = tmp_path / "deepseek-moe-16b-Q2_K.gguf"
    path.write_bytes(b"other weights")
    with pytest.raises(cards.CardError, match="would show other numbers"):
        cards.require_measured(full, path)
    with pytest.raises(cards.CardError, match="no file of this name"):
        cards.require_measured(full, path.rename(tmp_path / "other.gguf"))
    sha256 = files.sha256(tmp_path / "other.gguf")
    manifests = tuple(m.model_copy(update={"sha256": sha256}) for m in full.manifests)
    same = study.Study(full.path, full.plan, dataclasses.replace(full.contents, manifests=manifests))
    (tmp_path / "other.gguf").rename(path)
    assert cards.require_measured(same, path) == files.sha256(path)


def test_the_command_writes_checks_and_names_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELIB_OUTPUTS", str(REPO / "docs/example"))
    command = ["card", "demo", "--into", str(tmp_path)]
    assert "--namespace" in CliRunner().invoke(cli.main, command).output
    assert not list(tmp_path.iterdir())
    done = CliRunner().invoke(cli.main, [*command, "--namespace", "acme"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / ROOT).exists()
    (tmp_path / "stray.md").write_text("# stray\n", encoding="utf-8")
    done = CliRunner().invoke(cli.main, [*command, "--namespace", "acme"])
    assert done.exit_code == 1
    assert "stray.md is not a card of these records: delete it" in done.output


def fenced(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


def test_every_flag_of_the_commands_is_known_to_old_and_new_builds(pages):
    lines = [line for block in fenced(pages[ROOT], "bash") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("llama-server")]
    assert len(commands) == 3
    for build in ("b6666", "b11434"):
        known = engines.Help((FIXTURES / f"llama-server-help-{build}.txt").read_text(encoding="utf-8")).flags
        assert {f for c in commands for f in re.findall(r" (--?[a-z][\w-]*)", c)} <= known


@pytest.mark.engine
@pytest.mark.parametrize("model", ["deepseek-moe-16b", "phi-3.5-moe"])
def test_the_python_example_runs(model, demo, home, engine, tmp_path):
    text = cards.build(demo, "acme")[f"{params.card(model).repository}/README.md"]
    (code,) = fenced(text, "python")
    file = quantize.make(models.make_twin(model, "nano"), "Q8_0", engine, tmp_path).path
    argv = engine.server_argv(file, Placement.parse("cpu-moe", "mmap"), 512, 1, ["--device", "none"])
    with process.Child(argv, tmp_path / "server.log", process.environment(tmp_path)) as server:
        port = next(filter(None, server.wait_for(engines.LISTENING, process.patience(60)).groups()))
        code = code.replace(":8080/", f":{port}/")
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, encoding="utf-8"
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_what_people_own_is_checked(home):
    catalogue = [m for m in ("phi-3.5-moe", "deepseek-moe-16b") if not params.model(m).excluded]
    assert {params.card(m).license for m in catalogue} <= set(card_rules.LICENSES)
    with pytest.raises(params.ParamsError, match="allowed: deepseek-moe-16b, phi-3.5-moe"):
        params.card("gpt-oss-20b")
    path = home / "params/cards.yaml"
    whole = path.read_text(encoding="utf-8")
    for old, new, words in (
        ("  license_name: deepseek\n", "", "license other needs license_name and license_link"),
        ("  languages: [en, zh]\n", "  languages: []\n", "languages"),
        ("  summary:", "  sumary:", "sumary"),
        ("base_model: deepseek-ai/", "base_model: ", "base_model"),
    ):
        path.write_text(whole.replace(old, new), encoding="utf-8")
        params._yaml.cache_clear()
        with pytest.raises(params.ParamsError, match=words):
            params.card("deepseek-moe-16b")


@pytest.mark.parametrize(
    "name", ["../../evil", "a/b", "a b", "<script>alert(1)</script>", "x" * 200, "", "a\nb", "[a](b)"]
)
def test_what_can_be_no_namespace_writes_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setenv("MOELIB_OUTPUTS", str(REPO / "docs/example"))
    card = ("card", "demo", "--into", str(tmp_path / "cards"), "--namespace", name)
    for args in (card, ("publish", "demo", "--to", name)):
        done = CliRunner().invoke(cli.main, list(args))
        assert done.exit_code == 1
        assert "is not a namespace of the Hub: give the name" in done.output
        assert len(done.output.splitlines()) == 1
        assert done.exception is None or isinstance(done.exception, SystemExit)
    assert not (tmp_path / "cards").exists()
    with pytest.raises(params.ParamsError, match="not a namespace"):
        cards.build(None, name)


def test_a_folder_that_cannot_be_written_is_one_sentence(demo, tmp_path):
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(cards.CardError, match=r"cannot be written into .*taken \(.*name another folder with --into"):
        cards.write(demo, "acme", tmp_path / "taken")
