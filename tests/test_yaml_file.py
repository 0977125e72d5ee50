"""YAML from people: whatever the file holds, an answer or one sentence, at once."""

import re
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moelib.base import yaml_file
from moelib.base.yaml_file import YamlError

HARM = {
    "alias of nothing": ("*a", "undefined alias"),
    "flow": ("[" * 100_000, "it is nested too deep"),
    "blocks": ("- " * 100_000, "it is nested too deep"),
    "keys": ("? " * 100_000, "it is nested too deep"),
    "digits": ("a: " + "1" * 5000, "Exceeds the limit"),
    "size in bytes": ("a: " + "ä" * (1 << 17), "more than 262144 bytes"),
    "date": ("a: 2026-13-45", "month must be in 1..12"),
    "object": ("!!python/object/apply:os.system [x]", "could not determine a constructor"),
    "list as key": ("{[1]: 2}", "unhashable"),
    "empty integer": ("!!int ''", "index out of range"),
    "time of nothing": ("!!timestamp x", "NoneType"),
    "NUL": ("a: \0", "special characters are not allowed"),
}


@pytest.mark.parametrize("name", HARM)
def test_harm_is_one_sentence_at_once(tmp_path, name):
    text, cause = HARM[name]
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    started = time.process_time()
    with pytest.raises(YamlError, match=re.escape(cause)) as caught:
        yaml_file.load(path)
    assert time.process_time() - started < 5
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


@given(st.text(alphabet="ab:- \n[]{}&*<!?|>'\"#%,01.~\t", max_size=60))
def test_any_text_is_an_answer_or_a_sentence(text):
    try:
        value, error = yaml_file.loads(text), ""
    except YamlError as err:
        value, error = None, str(err)
    assert "\n" not in error
    assert error or value == yaml.safe_load(text) or value != value  # not a number
