"""Tools run for their output, which write too much, nothing, or go on for ever."""

import time

import pytest
from test_process import sleeping

from moelib.machine import probe, process


def shell(script):
    return ["/bin/sh", "-c", script]


def test_an_answer_has_both_outputs_and_the_code():
    assert probe.ask(shell("echo out; echo err >&2; exit 3"), 30) == (3, "out\nerr\n")
    assert probe.ask(shell("kill -11 $$"), 30).code == -11
    assert probe.ask(shell("printf '\\377'"), 30).text == "\ufffd"
    assert len(probe.ask(shell("head -c 3000000 /dev/zero; head -c 1000000 /dev/zero >&2"), 30).text) == 4_000_000


@pytest.mark.parametrize(
    ("script", "seconds"),
    [
        ("sleep 1001; :", 1001),
        ("trap '' TERM; sleep 1002; :", 1002),
        ("setsid sleep 1003; :", 1003),
        ("(setsid sleep 1004 &); sleep 1004; :", 1004),
        ("exec >/dev/null 2>&1; sleep 1005; :", 1005),
    ],
)
def test_a_tool_that_hangs_is_ended_with_all_that_it_started(script, seconds):
    with pytest.raises(probe.ProbeError, match="did not end in 0.5 s and was ended"):
        probe.ask(shell(script), 0.5)
    assert sleeping(seconds) == []


@pytest.mark.parametrize(
    ("script", "seconds"), [("sleep 1006 & echo hi", 1006), ("setsid sleep 1007 & sleep 0.1; echo hi", 1007)]
)
def test_processes_that_a_tool_leaves_behind_are_ended_and_not_waited_for(script, seconds):
    started = time.monotonic()
    assert probe.ask(shell(script), 30).text == "hi\n"
    assert time.monotonic() - started < 10
    assert sleeping(seconds) == []


def test_ctrl_c_ends_the_tool(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "ended", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probe.ask(shell("sleep 1008; :"), 30)
    assert sleeping(1008) == []
