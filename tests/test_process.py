"""Children: waited for, ended with all that they started, and limited in what they write to their log."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from moelib.catalogue import params
from moelib.machine import process

SLEEP = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(300)"]


def child(tmp_path, argv=SLEEP, log_bytes=process.LOG_BYTES, cpus=(), **env):
    return process.Child(argv, tmp_path / "child.log", process.environment(tmp_path, env), cpus, log_bytes)


def shell(tmp_path, script, **how):
    return child(tmp_path, ["/bin/sh", "-c", script], **how)


def gone(pid, within_s=10):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def sleeping(seconds, within_s=2):
    """Processes that still `sleep` that long after `within_s`; each test has a number of its own. The killed take a
    moment to die, and the dead wait for their new parent."""
    deadline = time.monotonic() + within_s
    while True:
        processes = [
            p
            for p in psutil.process_iter(["cmdline", "status"])
            if p.info["cmdline"] == ["sleep", str(seconds)] and p.info["status"] != psutil.STATUS_ZOMBIE
        ]
        if not processes or time.monotonic() > deadline:
            return processes
        time.sleep(0.02)


# waiting and ending
def test_a_child_is_waited_for_and_ended(tmp_path):
    with child(tmp_path) as c:
        assert c.wait_for("rea(dy)", 30)[1] == "dy"
        assert c.running()
    assert gone(c.pid)
    assert c.stop() == process.Exit(-signal.SIGTERM, False)
    assert list(tmp_path.glob("*.child.json")) == []


def test_a_child_that_ends_shows_the_end_of_its_log(tmp_path):
    with shell(tmp_path, "echo last words; exit 3") as c:
        with pytest.raises(process.ProcessError, match="ended with 3.*\nlast words") as caught:
            c.wait_for("never", 30)
    assert caught.value.reason == "engine-ended"


@pytest.mark.parametrize(
    ("wait", "words"),
    [
        (lambda c: c.wait_for("never", 0.3), "was not ready in 0.3 s"),
        (lambda c: c.wait_listening(process.free_port(), 0.3), "did not listen in 0.3 s"),
        (lambda c: c.wait_end(0.3), "did not end in 0.3 s"),
    ],
)
def test_every_wait_has_a_deadline(tmp_path, wait, words):
    started = time.monotonic()
    with child(tmp_path) as c, pytest.raises(process.ProcessError, match=words) as caught:
        wait(c)
    assert caught.value.reason == "engine-timeout"
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("script", "seconds", "killed"),
    [
        ("sleep 1011 & echo ready; exit 0", 1011, False),
        ("trap '' TERM; setsid sleep 1012 & echo ready; wait; sleep 1012", 1012, True),
    ],
)
def test_a_child_is_ended_with_all_that_it_started(tmp_path, script, seconds, killed):
    deadline = time.monotonic() + 30
    with shell(tmp_path, script) as c:
        c.wait_for("ready", 30)
        while not sleeping(seconds, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sleeping(seconds, 0)
        assert c.stop(grace_s=0.2).killed is killed
    assert not sleeping(seconds)


def test_an_exit_code_is_known_before_the_child_is_reaped(tmp_path):
    """Until then its id cannot be another process's."""
    with shell(tmp_path, "exit 7") as c:
        c.wait_end(30)
        assert psutil.Process(c.pid).status() == psutil.STATUS_ZOMBIE
        assert process.ended(c._popen) == 7
        assert c.stop() == process.Exit(7, False)
    assert not psutil.pid_exists(c.pid)
    assert c.stop() == process.Exit(7, False)


def test_a_child_that_cannot_be_run_says_so_in_a_line(tmp_path):
    (tmp_path / "tool").write_text("#!/no/such/loader\n", encoding="utf-8")
    (tmp_path / "tool").chmod(0o755)
    with child(tmp_path, [str(tmp_path / "tool")]) as c:
        with pytest.raises(process.ProcessError, match="ended with 1; its log ends:\n/.*tool cannot be run: .*No such"):
            c.wait_for("never", 30)
    assert len(c.text().splitlines()) == 1


def test_listening_is_proven_for_the_child_itself(tmp_path):
    port = process.free_port()
    serve = f"import socket, time; s = socket.socket(); s.bind(('127.0.0.1', {port})); s.listen(); time.sleep(300)"
    with child(tmp_path, [sys.executable, "-c", serve]) as c:
        c.wait_listening(port, 30)
        other = process.Child(SLEEP, tmp_path / "other.log", process.environment(tmp_path))
        with other, pytest.raises(process.ProcessError, match="did not listen"):
            other.wait_listening(port, 0.3)


# the log
def test_a_match_is_found_in_a_log_as_it_grows(tmp_path):
    script = "printf 'a re'; sleep 0.1; printf 'ad'; sleep 0.1; echo y; head -c 3000000 /dev/zero; echo ready2"
    with shell(tmp_path, script) as c:
        assert c.wait_for(r"rea(d.)\n", 30)[1] == "dy"
        assert c.wait_for("ready(2)", 30)[1] == "2"
        assert c.wait_for("rea(dy)", 30)[1] == "dy", "a second search begins at the beginning"


def test_searching_again_reads_only_what_is_new(tmp_path, monkeypatch):
    path = tmp_path / "x.log"
    path.write_bytes(b"x" * 5_000_000)
    look = process.Log(path).looking_for("needle")
    assert look() is None
    with path.open("ab") as f:
        f.write(b"need")
    assert look() is None
    os.truncate(path, 0)  # what was read before is gone, and is not needed
    with path.open("ab") as f:
        f.truncate(5_000_004)
        f.write(b"le")
    assert look()[0] == "needle"


def test_the_end_of_a_log_is_read_alone(tmp_path):
    path = tmp_path / "x.log"
    path.write_bytes(b"x" * 1_000_000 + "\n\u00e4\nlast\n".encode())
    assert process.Log(path).tail(2) == "\u00e4\nlast"
    assert len(process.Log(path).tail(3)) < 70_000
    path.write_bytes(b"")
    assert process.Log(path).tail(3) == ""


@pytest.mark.parametrize("script", ["exec head -c 3000000000 /dev/zero", "trap '' TERM; yes plausible; sleep 300"])
@pytest.mark.parametrize(
    "wait",
    [
        lambda c: c.wait_for("never", 60),
        lambda c: c.wait_end(60),
        lambda c: gone(c.pid) and c.check_log(),  # the guard ends it while nobody looks
    ],
    ids=["wait_for", "wait_end", "nobody"],
)
def test_a_child_that_floods_its_log_is_ended(tmp_path, script, wait):
    started = time.monotonic()
    with shell(tmp_path, script, log_bytes=4 << 20) as c:
        with pytest.raises(process.ProcessError, match="more than 4 MiB to its log and was ended") as caught:
            wait(c)
    assert caught.value.reason == "engine-log-flood"
    assert gone(c.pid)
    assert (tmp_path / "child.log").stat().st_size == process.KEPT_BYTES
    assert time.monotonic() - started < 20


# what reaches a child
def test_nothing_needs_a_locale_that_is_utf_8(tmp_path):
    """Bytes that are no ASCII, in a folder whose name is none either."""
    folder = tmp_path / "gr\u00fc\u00df"
    folder.mkdir()
    code = (
        "import sys, pathlib; from moelib.machine import host, probe, process; folder = pathlib.Path(sys.argv[1])\n"
        "argv = ['/bin/sh', '-c', \"printf '\\\\303\\\\274ber\\\\377'\"]\n"
        "with process.Child(argv, folder / 'x.log', process.environment(folder)) as c: c.wait_end(30)\n"
        "assert c.text() == '\\xfcber\\ufffd' == probe.ask(argv, 30).text, ascii(c.text())\n"
        "host.facts()\n"
    )
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for flags in ([], ["-OO"]):
        argv = [sys.executable, *flags, "-c", code, str(folder)]
        done = subprocess.run(argv, env=env, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")


def test_only_the_allow_list_reaches_a_child(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_ARG_CPU_MOE", "1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-x")
    with child(tmp_path, ["/usr/bin/env"], LLAMA_API_KEY="k") as c:
        c.wait_end(30)
    variables = dict(line.split("=", 1) for line in c.text().splitlines() if "=" in line)
    added = {"XDG_CONFIG_HOME", "XDG_CACHE_HOME", "LLAMA_API_KEY"}
    of_shells_and_python = {"PWD", "SHLVL", "_", "LC_CTYPE"}
    assert set(variables) <= {*process.ENV_ALLOWED, *added, *of_shells_and_python}
    assert variables["CUDA_VISIBLE_DEVICES"] == "GPU-x"
    assert os.listdir(variables["XDG_CONFIG_HOME"]) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has CPU affinity")
def test_a_child_keeps_to_its_cpus(tmp_path):
    cpu = max(os.sched_getaffinity(0))
    argv = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    with child(tmp_path, argv, cpus=[cpu]) as c:
        c.wait_end(30)
    assert c.text().strip() == f"[{cpu}]"


# orphans
PARENT = """
import sys, time
from pathlib import Path
from moelib.machine import process
folder = Path(sys.argv[1])
c = process.Child(["/bin/sleep", "300"], folder / "child.log", process.environment(folder))
print(c.pid, flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("after_s", [0, 0.001, 0.01, 0.3])  # the launcher is killed, or the tool that it has become
def test_no_orphan_after_kill_9_of_the_parent(tmp_path, after_s):
    argv = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, encoding="utf-8") as parent:
        pid = int(parent.stdout.readline())
        time.sleep(after_s)
        name = psutil.Process(pid).name()
        parent.kill()
    assert name == "sleep" or after_s < 0.3
    assert gone(pid)


def test_the_sweep_ends_children_of_dead_parents_by_identity_only(tmp_path):
    orphan, living, reused = (subprocess.Popen(["/bin/sleep", "300"]) for _ in range(3))
    started = {p.pid: psutil.Process(p.pid).create_time() for p in (orphan, living, reused)}
    me = [os.getpid(), psutil.Process().create_time()]

    def note(name, parent, child):
        (tmp_path / f"{name}.child.json").write_text(json.dumps({"parent": parent, "child": child}), encoding="utf-8")

    try:
        note("orphan", [me[0], me[1] - 50], [orphan.pid, started[orphan.pid]])
        note("living", me, [living.pid, started[living.pid]])
        note("reused", [me[0], me[1] - 50], [reused.pid, started[reused.pid] - 50])
        (tmp_path / "cut.child.json").write_text('{"par', encoding="utf-8")
        assert process.sweep(tmp_path) == [orphan.pid]
        assert orphan.wait(10) == -signal.SIGKILL
        assert living.poll() is None
        assert reused.poll() is None
        assert [p.name for p in tmp_path.glob("*.child.json")] == ["living.child.json"]
    finally:
        for p in (orphan, living, reused):
            p.kill()
            p.wait()


# patience
@pytest.mark.parametrize("setting", ["", "fast", "0", "-1", "nan", "inf", "1e9", "1e-9"])
def test_a_patience_that_is_no_number_in_range_is_refused(monkeypatch, setting):
    monkeypatch.setenv("MOELIB_PATIENCE", setting)
    with pytest.raises(params.UserError, match="MOELIB_PATIENCE=.* is not a number from 0.001 to 1000; unset it"):
        process.patience(1)


@pytest.mark.parametrize(("setting", "seconds"), [("1", 3.0), ("2.5", 7.5), ("1e-3", 0.003), (" 2 ", 6.0)])
def test_patience_multiplies_time_limits(monkeypatch, setting, seconds):
    monkeypatch.setenv("MOELIB_PATIENCE", setting)
    assert process.patience(3) == pytest.approx(seconds)
