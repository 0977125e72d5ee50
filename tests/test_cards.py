"""Model cards: made of records alone, by the rules of the Hub, and checked byte for byte."""

import dataclasses
import json
import re
import subprocess
import sys

import card_rules
import pytest
import real_weights
from click.testing import CliRunner
from conftest import FIXTURES, REPO
from huggingface_hub import ModelCard

from moelib import cli
from moelib.audit import audit
from moelib.base import files
from moelib.catalogue import params
from moelib.catalogue.placement import Placement
from moelib.engine import engine as engines
from moelib.machine import process
from moelib.models import models, quantize
from moelib.publish import cards
from moelib.report import advice
from moelib.study import study

DEEPSEEK, TWIN = "deepseek-moe-16b-cpu-offload-gguf", "deepseek-moe-16b-random-weights"
ROOT, QUANT = f"{TWIN}/README.md", f"{TWIN}/Q2_K.md"
REAL_ROOT, REAL_QUANT = f"{DEEPSEEK}/README.md", f"{DEEPSEEK}/Q2_K.md"
DOCUMENTS = {"full": REPO / "outputs/h100-twins/provenance.json", "trained": REPO / "docs/example/demo/provenance.json"}


@pytest.fixture(scope="module")
def full():
    return study.Study.read(REPO / "outputs/h100-twins")


@pytest.fixture(scope="module")
def demo():
    return study.Study.read(REPO / "tests/fixtures/twins")


@pytest.fixture(scope="module")
def trained():
    """The committed demo: real weights that were made for this project, with their quality."""
    return study.Study.read(REPO / "docs/example/demo")


@pytest.fixture(scope="module")
def document():
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in DOCUMENTS.items()}


@pytest.fixture(scope="module")
def demo_pages(demo):
    return cards.build(demo, "acme")


@pytest.fixture(scope="module")
def real(full):
    return real_weights.real(full)


@pytest.fixture(scope="module")
def swept(full):
    """Real weights, with points between: N of 14 with the file mapped alone, N of 21 in both load modes."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("block", "cell"):  # what was made of other runs is no evidence
            patch.setattr(audit, kind, lambda _: ())
        every = real_weights.real(full)
        for n, load_mode in ((14, "mmap"), (21, "mmap"), (21, "none")):
            every = real_weights.also(every, n, load_mode)
        yield every


@pytest.fixture(scope="module")
def pages(full, swept):
    """The cards of one model, of random weights and of real ones."""
    every = cards.build(full, "acme") | cards.build(swept, "acme")
    return {name: text for name, text in every.items() if name.startswith("deepseek")}


def broken_by(pages, full, swept, page, old, new, document=None):
    """The rules that a card breaks once `old` is `new` in it."""
    text = pages[page].replace(old, new, 1)
    assert text != pages[page], f"{old!r} is not in the card"
    folder = page.split("/")[0]
    of_folder = {name: text for name, text in pages.items() if name.startswith(f"{folder}/")}
    found = card_rules.broken(of_folder | {page: text}, full if folder == TWIN else swept, document)
    return {rule for _, rule, _ in found}


def test_the_cards_of_the_documents_study_break_no_rule():
    both = study.Study.read(REPO / "outputs/h200")
    tables = json.loads((REPO / "docs/provenance.json").read_text(encoding="utf-8"))
    assert card_rules.broken(cards.build(both, "acme"), both, tables) == []


def test_the_cards_of_every_study_break_no_rule(full, demo, trained, real, swept, demo_pages, document):
    assert card_rules.broken(cards.build(full, "acme"), full, document["full"]) == []
    assert card_rules.broken(demo_pages, demo) == []
    assert card_rules.broken(cards.build(trained, "acme"), trained, document["trained"]) == []
    assert card_rules.broken(cards.build(real, "acme"), real, document["full"]) == []
    assert card_rules.broken(cards.build(swept, "acme"), swept) == []
    models = demo.parameters.models
    assert {name.split("/")[0] for name in demo_pages} == {f"{m}-random-weights" for m in models}
    assert {name.split("/")[0] for name in cards.build(real, "acme")} == {params.card(m).repository for m in models}
    assert len([n for n in demo_pages if n.endswith(".md")]) == 2 * (1 + 3)
    assert cards.build(demo, "acme") == demo_pages


WARNING = "**Random weights: this is not DeepSeek-MoE 16B, and must not be published as that model.**"
ANSWER = "## Which file for which GPU\n"
COMMAND = "llama-server -m deepseek-moe-16b-Q2_K.gguf -ngl 99 -c 1024 -np 1 -fa on"


@pytest.mark.parametrize(
    ("rule", "page", "old", "new"),
    [
        ("metadata", REAL_ROOT, "base_model_relation: quantized\n", ""),
        ("metadata", REAL_ROOT, "base_model_relation: quantized\n", "base_model_relation: merge\n"),
        ("metadata", REAL_ROOT, "license: other", "license: deepseek"),
        ("metadata", REAL_ROOT, "license_name: deepseek\n", ""),
        ("metadata", REAL_ROOT, "pipeline_tag: text-generation", "pipeline_tag: text-completion"),
        ("metadata", ROOT, "tags:", "base_model: deepseek-ai/deepseek-moe-16b-base\ntags:"),
        ("metadata", ROOT, "tags:", "base_model_relation: quantized\ntags:"),
        ("metadata", ROOT, "tags:", "pipeline_tag: text-generation\ntags:"),
        ("metadata", QUANT, "tags:", "language: [en]\ntags:"),
        ("metadata", QUANT, "tags:", "license: mit\ntags:"),
        ("metadata", QUANT, "- random-weights\n", ""),
        ("short", REAL_ROOT, "tags:", "tags:\n" + "- model\n" * 10),
        ("warned", ROOT, "must not be published", "may be published"),
        ("warned", QUANT, "**Random weights", "Weights\n\n**Random weights"),
        ("warned", REAL_ROOT, "# Deep", f"{WARNING}\n\n# Deep"),
        ("silent", ROOT, "- Measured and", "- Prompt format: none.\n- Measured and"),
        ("silent", ROOT, "- Measured and", "- `ollama run hf.co/acme/x`\n- Measured and"),
        ("silent", QUANT, "- Measured and", "- For LM Studio as well.\n- Measured and"),
        ("silent", QUANT, "- Measured and", "- The licence is MIT.\n- Measured and"),
        ("answered", REAL_ROOT, "## Files", "## About\n\n## Files"),
        ("answered", REAL_ROOT, "## Reproduce it", "### Reproduce it"),
        ("answered", REAL_ROOT, ANSWER, f"{ANSWER}\nSee below.\n\n## Which\n"),
        ("answered", REAL_ROOT, "## Prompt format", "## Prompts"),
        ("commands", REAL_ROOT, f"{COMMAND}\n", "llama-server -m deepseek-moe-16b-Q2_K.gguf\n"),
        ("commands", REAL_ROOT, f"{COMMAND}\n", f"{COMMAND.replace('1024', '4096')}\n"),
        ("commands", REAL_ROOT, f"{COMMAND}\n", f"{COMMAND} -ub 64\n"),
        ("commands", REAL_QUANT, " --cpu-moe --load-mode none\n", " --cpu-moe\n"),
        ("commands", QUANT, " --cpu-moe --load-mode none\n", " --cpu-moe\n"),
        ("layers", REAL_QUANT, "experts of 13 layers on the CPU:", "experts of 14 layers on the CPU:"),
        ("layers", REAL_QUANT, "experts of 13 layers on the CPU:", "experts on the CPU:"),
        ("layers", ROOT, "N = 14 moves the experts of 13", "N = 14 moves the experts of 14"),
        ("layers", QUANT, "of the 27 layers", "of the 28 layers"),
        ("layers", ROOT, "so that N moves those of N - 1 layers", "so that N moves fewer"),
        ("hashed", REAL_ROOT, "\ne6ed9aa26886", "\nf6ed9aa26886"),
        ("hashed", REAL_ROOT, "## VRAM\n", "Begins with `e6ed9aa26886`.\n\n## VRAM\n"),
        ("links", QUANT, "](README.md)", "](CARD.md)"),
        ("links", QUANT, "https://github.com/ggml-org/llama.cpp", "https://github"),
        ("links", REAL_QUANT, f"acme/{DEEPSEEK} deepseek-moe-16b-Q2_K.gguf", f"acme/{DEEPSEEK} x.gguf"),
        ("unfinished", QUANT, "## Run it", "TODO\n\n## Run it"),
        ("unfinished", QUANT, "## File", "by <your name>\n\n## File"),
        ("unfinished", QUANT, "for 4,096 tokens", "for None tokens"),
        ("unfinished", QUANT, "## Run it", "<<<<<<< ours\n\n## Run it"),
        ("renders", QUANT, "### long-512", "**long-512"),
        ("renders", QUANT, "### long-512", "# long-512"),
        ("renders", QUANT, "- Measured and written with", "```\n- Measured and written with"),
        ("tables", QUANT, "set digest `", "set digest `0"),
    ],
)
def test_each_rule_fails_alone(pages, full, swept, rule, page, old, new):
    assert broken_by(pages, full, swept, page, old, new) == {rule}


def test_bits_per_weight_that_are_not_told_apart_are_seen(pages, full, swept):
    path = f"{DEEPSEEK}/provenance.json"
    for page, told, shown, instead in (
        (REAL_ROOT, '"of the rest": "3.53"', " 3.53 |", ("3.53", "n/a")),
        (REAL_QUANT, '"value": "3.27; 3.25', " 3.27; 3.25", ("; 3.25 of the experts, 3.53 of the rest", "")),
    ):
        (at,) = [line for line in pages[path].splitlines() if told in line]
        changed = pages | {path: pages[path].replace(at, at.replace(*instead))}
        (row,) = [line for line in pages[page].splitlines() if shown in line]
        assert broken_by(changed, full, swept, page, row, row.replace(*instead)) == {"split"}


def test_a_row_whose_n_moves_another_number_of_layers_is_seen(pages, full, swept):
    path, row = f"{DEEPSEEK}/provenance.json", "`--n-cpu-moe 18`"
    assert row in pages[path]
    changed = pages | {path: pages[path].replace(row, row.replace("18", "19"))}
    text = pages[REAL_ROOT].replace(row, row.replace("18", "19"))
    folder = {name: page for name, page in (changed | {REAL_ROOT: text}).items() if name.startswith(f"{DEEPSEEK}/")}
    assert {rule for _, rule, _ in card_rules.broken(folder, swept)} == {"layers"}


TO_RUN, VRAM = "what-to-run-deepseek-moe-16b", "vram-deepseek-moe-16b"


def test_a_table_that_is_not_the_documents_is_seen(pages, full, swept, document):
    changed = json.loads(json.dumps(document["full"]))
    assert broken_by(pages, full, swept, ROOT, "\n- Measured", "\n- Written", changed) == set()
    for page, name, head in (
        (ROOT, "files", "of the experts"),
        (ROOT, TO_RUN, "flags"),
        (ROOT, VRAM, "VRAM"),
        (ROOT, "speed-deepseek-moe-16b-long-512", "tokens/s"),
        (QUANT, VRAM, "saved"),
        (QUANT, "speed-deepseek-moe-16b-plan-short", "TTFT, warm"),
    ):
        changed = json.loads(json.dumps(document["full"]))
        for row in changed["tables"][name]["rows"]:
            row["cells"][head] = "9"
        assert broken_by(pages, full, swept, page, "\n- Measured", "\n- Written", changed) == {"same"}


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda tables: tables.pop("speed-deepseek-moe-16b-long-512"), [ROOT, QUANT]),
        (lambda tables: tables.pop(TO_RUN), [ROOT]),
        (lambda tables: tables[VRAM]["rows"].pop(), [ROOT]),  # of another quant
        (
            lambda tables: [row["cells"].update(quant="Q2_K") for row in tables[VRAM]["rows"]],
            [ROOT, QUANT],
        ),
        (
            lambda tables: [row["cells"].update(new="1") for row in tables[VRAM]["rows"]],
            [ROOT, QUANT],
        ),
    ],
    ids=["a-table", "the-answer", "a-row", "a-quant", "a-column"],
)
def test_what_a_card_lacks_of_the_documents_tables_is_seen(pages, full, document, change, seen):
    changed = json.loads(json.dumps(document["full"]))
    change(changed["tables"])
    twins = {name: text for name, text in pages.items() if name.startswith(f"{TWIN}/")}
    found = card_rules.broken(twins, full, changed)
    assert {rule for _, rule, _ in found} == {"same"}
    assert [name for name in (ROOT, QUANT) if name in {page for page, *_ in found}] == seen


def test_a_table_with_another_number_or_no_ruler_is_seen(pages, full, swept):
    row = re.search(r"\| cpu-moe, mmap +\| +([\d.]+)", pages[QUANT])[0]
    assert broken_by(pages, full, swept, QUANT, row, row[:-1] + str((int(row[-1]) + 1) % 10)) == {"tables"}
    ruler = next(line for line in pages[QUANT].splitlines() if line.startswith("|:-"))
    assert broken_by(pages, full, swept, QUANT, ruler + "\n", "") == {"tables"}
    assert broken_by(pages, full, swept, QUANT, ruler, ruler + "---|") == {"renders", "tables"}


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
    for name in (ROOT, QUANT, f"{TWIN}/SHA256SUMS", f"{TWIN}/provenance.json"):
        change(tmp_path / name)
        (problem,) = cards.check(tmp_path, demo, "acme")
        assert words in problem
        (tmp_path / TWIN / "note.txt").unlink(missing_ok=True)
        cards.write(demo, "acme", tmp_path)


def test_cards_for_another_namespace_or_of_other_records_are_stale(demo, tmp_path):
    cards.write(demo, "acme", tmp_path)
    assert any(problem.startswith(f"{QUANT} differs") for problem in cards.check(tmp_path, demo, "other"))
    stale = cards.check(tmp_path, without(demo, "Q8_0"), "acme")
    assert f"{TWIN}/Q8_0.md is not a card of these records: delete it" in stale
    assert any(problem.startswith(f"{ROOT} differs") for problem in stale)


def test_the_metadata_of_real_weights_is_what_the_hub_lists_them_by(pages):
    for page in (REAL_ROOT, REAL_QUANT):
        data = ModelCard(pages[page]).data
        assert (data.base_model, data.base_model_relation) == ("deepseek-ai/deepseek-moe-16b-base", "quantized")
        assert (data.license, data.license_name, data.quantized_by) == ("other", "deepseek", "acme")
        assert (data.pipeline_tag, data.library_name, data.language) == ("text-generation", "gguf", ["en", "zh"])
        assert data.eval_results is None


def test_random_weights_are_listed_as_no_model(pages):
    for page in (ROOT, QUANT):
        card = ModelCard(pages[page])
        assert card.text.strip().startswith("**Random weights: this is not DeepSeek-MoE 16B")
        assert card.data.to_dict() == {"library_name": "gguf", "tags": ["gguf", "geometry-twin", "random-weights"]}


def test_the_answer_for_a_gpu_has_the_whole_command(pages):
    answer = pages[REAL_ROOT].split("## Files")[0]
    (row,) = re.findall(r"^\| 4 +\| 16 +\| speed +\| Q2_K +\| (.*?) +\| +(.*?) \| +(.*?) \|", answer, re.M)
    assert row[:2] == ("`--n-cpu-moe 18`", "17")
    assert row[2].endswith(", predicted")
    told = r"# Q2_K, experts of 20 layers on the CPU: .* 4\.19 GiB of experts in RAM, .* tokens/s"
    assert re.search(rf"^{told}\n{COMMAND} --n-cpu-moe 21 --load-mode none$", answer, re.M)
    assert "N = 14 moves the experts of 13 of the 27 layers that hold some.\n" in answer
    assert "N = 14 moves the experts of 13 of the 27 layers that hold some (not measured here).\n" in pages[ROOT]
    # N of 14 ran with the file mapped alone: the command is that of its runs
    assert f"{COMMAND} --n-cpu-moe 14\n" in pages[REAL_QUANT]


def test_files_are_listed_by_their_own_names_the_largest_first(pages, full):
    files_of = pages[REAL_ROOT].split("## Files")[1]
    assert re.findall(r"^\| \[deepseek-moe-16b-(\w+)\.gguf\]", files_of, re.M) == ["Q8_0", "Q4_K_M", "Q2_K"]
    names = {m.quant: f"m-{m.quant}-twin.gguf" for m in full.manifests}
    manifests = tuple(m.model_copy(update={"file_name": names[m.quant]}) for m in full.manifests)
    renamed = study.Study(full.path, full.plan, dataclasses.replace(full.contents, manifests=manifests))
    page = cards.build(renamed, "acme")[ROOT]
    assert "| [m-Q2_K-twin.gguf](m-Q2_K-twin.gguf) " in page
    assert "llama-server -m m-Q2_K-twin.gguf -ngl 99" in page


def test_a_half_way_n_moves_something_whatever_the_model():
    for model in ("deepseek-moe-16b", "phi-3.5-moe"):
        for scale in ("nano", "tiny", "full"):
            geometry = params.model(model).at_scale(scale)
            between = cards._between(geometry)
            assert between["n"] - geometry.leading_dense_block_count == between["moved"] >= 1
            assert between["n"] <= geometry.block_count
    assert cards._between(params.model("deepseek-moe-16b").at_scale("full"))["n"] == 14


def only(results, keep):
    left = [r for r in results.records if keep(r.spec)]
    evidence = dataclasses.replace(results.evidence, records=left)
    return study.Study(results.path, results.plan, study.Contents(evidence, results.manifests, {}))


def without(results, *quants):
    return only(results, lambda spec: spec.quant not in quants)


def test_one_block_has_no_interval_and_says_so(demo):
    one = only(demo, lambda spec: spec.block == 0)
    pages = cards.build(one, "acme")
    assert card_rules.broken(pages, one) == []
    assert "(n = 1)" in pages[QUANT]


def test_what_is_not_measured_has_no_card_and_is_named(demo):
    pages = cards.build(without(demo, "Q8_0"), "acme")
    assert f"{TWIN}/Q8_0.md" not in pages
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
    assert (tmp_path / "trained-deepseek-12m-gguf/README.md").exists()
    (tmp_path / "stray.md").write_text("# stray\n", encoding="utf-8")
    done = CliRunner().invoke(cli.main, [*command, "--namespace", "acme"])
    assert done.exit_code == 1
    assert "stray.md is not a card of these records: delete it" in done.output


def fenced(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


def test_every_flag_of_the_commands_is_known_to_old_and_new_builds(pages):
    lines = [line for block in fenced(pages[REAL_ROOT], "bash") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("llama-server")]
    assert len(commands) > 5
    given = {f for c in commands for f in re.findall(r" (--?[a-z][\w-]*)", c)}
    for build in ("b6666", "b11434"):
        known = engines.Help((FIXTURES / f"llama-server-help-{build}.txt").read_text(encoding="utf-8")).flags
        assert given - known == ({"--load-mode"} if build == "b6666" else set())
    assert "`--load-mode none`; older builds `--no-mmap`" in pages[REAL_ROOT]


def test_a_command_has_the_load_mode_in_the_words_of_the_build_that_was_measured(full):
    run = next(r for r in full.used if r.spec.label == "cpu-moe/none")
    assert advice.flags(run.spec.placed, run) == "--cpu-moe --load-mode none"
    line = " ".join(run.observation.argv).replace("--load-mode none", "--no-mmap")
    older = run.model_copy(update={"observed": dataclasses.replace(run.observed, argv=tuple(line.split()))})
    assert advice.flags(run.spec.placed, older) == "--cpu-moe --no-mmap"


@pytest.mark.engine
@pytest.mark.parametrize("model", ["deepseek-moe-16b", "phi-3.5-moe"])
def test_the_python_example_runs(model, demo, home, engine, tmp_path):
    text = cards.build(real_weights.real(demo), "acme")[f"{params.card(model).repository}/README.md"]
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
