"""YAML from people: whatever the file holds, an answer or one sentence, at once and in little memory."""

import re
import time
import tracemalloc

import pytest
import yaml
from conftest import REPO
from hypothesis import given
from hypothesis import strategies as st

from moelib import yaml_file
from moelib.yaml_file import YamlError


def laughs(first, line):
    return first + "".join(
        line.format(key=b, of=",".join([f"*{a}"] * 10)) for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )


HARM = {
    "laughs": (laughs("a: &a [x, x]\n", "{key}: &{key} [{of}]\n"), "aliases expand to more than 100000 values"),
    "merged laughs": (
        laughs("a: &a {{x: 1}}\n".replace("{{", "{").replace("}}", "}"), "{key}: &{key} {{<<: [{of}], {key}z: 1}}\n"),
        "aliases expand to more",
    ),
    "inside itself": ("a: &a [*a]\n", "or refer to themselves"),
    "flow": ("[" * 200_000, "nested more than 30 levels deep"),
    "blocks": ("- " * 100_000, "nested more than 30 levels deep"),
    "keys": ("? " * 100_000, "nested more than 30 levels deep"),
    "mappings": ("{a: " * 40 + "}" * 40, "nested more than 30 levels deep"),
    "digits": ("a: " + "1" * 5000, "a number of more than 100 digits"),
    "base 60": ("a: " + ":".join(["59"] * 60_000), "a number of more than 100 digits"),
    "size": ("a: " + "x" * (1 << 18), "more than 262144"),
    "date": ("a: 2026-13-45", "month must be in 1..12"),
    "object": ("!!python/object/apply:os.system [x]", "could not determine a constructor"),
    "alias of nothing": ("*a", "undefined alias"),
    "list as key": ("{[1]: 2}", "unhashable"),
    "empty integer": ("!!int ''", "index out of range"),
    "time of nothing": ("!!timestamp x", "NoneType"),
    "NUL": ("a: \0", "special characters are not allowed"),
}


@pytest.mark.parametrize("which", HARM)
def test_harm_is_one_sentence_at_once_and_in_little_memory(tmp_path, which):
    text, why = HARM[which]
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(YamlError, match=re.escape(why)) as caught:
        yaml_file.load(path)
    assert time.process_time() - started < 5
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_aliases_that_stand_for_little_are_allowed():
    assert yaml_file.loads("a: &a [1, 2]\nb: *a\nc: {<<: {x: 1}, y: 2}\n") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"x": 1, "y": 2},
    }


def test_what_is_no_text_says_so(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("titel: gr\xf6sse".encode("latin-1"))
    with pytest.raises(YamlError, match="byte 9 is not UTF-8: save it as UTF-8"):
        yaml_file.load(tmp_path / "latin.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(YamlError, match="cannot be read: Is a directory"):
        yaml_file.load(tmp_path / "folder.yaml")
    with pytest.raises(FileNotFoundError):
        yaml_file.load(tmp_path / "none.yaml")


def test_what_this_repository_holds_reads_as_it_always_did():
    paths = [p for p in (REPO / "params").rglob("*.yaml") if p.name != "pins.yaml"]
    assert len(paths) > 8
    for path in paths:
        assert yaml_file.load(path) == yaml.safe_load(path.read_text(encoding="utf-8"))


@given(st.text(alphabet="ab:- \n[]{}&*<!?|>'\"#%,01.~\t", max_size=60))
def test_any_text_is_an_answer_or_a_sentence(text):
    try:
        value, said = yaml_file.loads(text), ""
    except YamlError as err:
        value, said = None, str(err)
    assert "\n" not in said
    assert said or value == yaml.safe_load(text) or value != value
