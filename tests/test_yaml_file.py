"""YAML from people: whatever the file holds, an answer or one sentence, at once and in little memory."""

import re
import time
import tracemalloc

import pytest
import yaml
from conftest import REPO
from hypothesis import given
from hypothesis import strategies as st

from moelib.base import yaml_file
from moelib.base.yaml_file import YamlError

HARM = {
    "laughs": ("a: &a [x, x]\n" + "b: &b [*a, *a]\n" * 9, "line 2 has an alias: write out what it stands for"),
    "merged laughs": ("a: &a {x: 1}\nb: {<<: *a}\n", "line 2 has an alias"),
    "inside itself": ("a: &a [*a]\n", "line 1 has an alias"),
    "alias of nothing": ("*a", "line 1 has an alias"),
    "flow": ("[" * 200_000, "nested more than 30 levels deep"),
    "blocks": ("- " * 100_000, "nested more than 30 levels deep"),
    "keys": ("? " * 100_000, "nested more than 30 levels deep"),
    "mappings": ("{a: " * 40 + "}" * 40, "nested more than 30 levels deep, near line 1"),
    "digits": ("a: " + "1" * 5000, "line 1 holds a number of more than 100 digits"),
    "base 60": ("a: " + ":".join(["59"] * 60_000), "a number of more than 100 digits"),
    "size": ("a: " + "x" * (1 << 18), "more than 262144"),
    "size in bytes": ("a: " + "ä" * (1 << 17), "more than 262144 bytes"),
    "date": ("a: 2026-13-45", "month must be in 1..12"),
    "object": ("!!python/object/apply:os.system [x]", "could not determine a constructor"),
    "list as key": ("{[1]: 2}", "unhashable"),
    "empty integer": ("!!int ''", "index out of range"),
    "time of nothing": ("!!timestamp x", "NoneType"),
    "NUL": ("a: \0", "special characters are not allowed"),
}


@pytest.mark.parametrize("name", HARM)
def test_harm_is_one_sentence_at_once_and_in_little_memory(tmp_path, name):
    text, cause = HARM[name]
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(YamlError, match=re.escape(cause)) as caught:
        yaml_file.load(path)
    assert time.process_time() - started < 5
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_says_so(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("titel: gr\xf6sse".encode("latin-1"))
    with pytest.raises(YamlError, match="byte 9 is not UTF-8: save it as UTF-8"):
        yaml_file.load(tmp_path / "latin.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(YamlError, match="cannot be read: Is a directory"):
        yaml_file.load(tmp_path / "folder.yaml")
    with pytest.raises(FileNotFoundError):
        yaml_file.load(tmp_path / "none.yaml")


def test_the_repositorys_files_read_as_with_plain_yaml():
    texts = [p.read_text(encoding="utf-8") for p in sorted((REPO / "params").rglob("*.yaml"))]
    assert len(texts) > 8
    for text in [*texts, "a: {<<: {x: 1}, y: 2}", "[" * 29 + "]" * 29, "a: " + "1" * 100]:
        assert yaml_file.loads(text) == yaml.safe_load(text)


@given(st.text(alphabet="ab:- \n[]{}&*<!?|>'\"#%,01.~\t", max_size=60))
def test_any_text_is_an_answer_or_a_sentence(text):
    try:
        value, error = yaml_file.loads(text), ""
    except YamlError as err:
        value, error = None, str(err)
    assert "\n" not in error
    assert error or value == yaml.safe_load(text) or value != value  # not a number
