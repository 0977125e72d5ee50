import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from moelib import logfile, params, process

SLEEP = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(300)"]


def child(tmp_path, argv=SLEEP, **env):
    return process.Child(argv, tmp_path / "child.log", process.environment(tmp_path, env))


def gone(pid, within_s=10):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_a_child_is_waited_for_and_ended(tmp_path):
    with child(tmp_path) as c:
        assert c.wait_for("rea(dy)", 30)[1] == "dy"
        assert c.running()
    assert gone(c.pid)
    assert c.stop() == process.Exit(-signal.SIGTERM, False)
    assert list(tmp_path.glob("*.child.json")) == []


def test_a_child_that_ignores_the_request_to_end_is_killed(tmp_path):
    argv = [
        sys.executable,
        "-c",
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(300)",
    ]
    with child(tmp_path, argv) as c:
        c.wait_for("ready", 30)
        assert c.stop(grace_s=0.2) == process.Exit(-signal.SIGKILL, True)
    assert gone(c.pid)


def test_a_child_that_ends_says_so_with_its_last_words(tmp_path):
    with child(tmp_path, ["/bin/sh", "-c", "echo last words; exit 3"]) as c:
        with pytest.raises(process.ProcessError, match="ended with 3.*\nlast words") as caught:
            c.wait_for("never", 30)
    assert caught.value.reason == "engine-ended"


def test_a_deadline_is_kept(tmp_path):
    started = time.monotonic()
    with child(tmp_path) as c, pytest.raises(process.ProcessError, match="not ready in 0.3 s") as caught:
        c.wait_for("never", 0.3)
    assert caught.value.reason == "engine-timeout"
    assert time.monotonic() - started < 20


def shell(tmp_path, script, **how):
    return process.Child(["/bin/sh", "-c", script], tmp_path / "child.log", process.environment(tmp_path), **how)


def test_a_match_is_found_in_a_log_as_it_grows(tmp_path):
    with shell(
        tmp_path, "printf 'a re'; sleep 0.1; printf 'ad'; sleep 0.1; echo y; head -c 3000000 /dev/zero; echo ready2"
    ) as c:
        assert c.wait_for(r"rea(d.)\n", 30)[1] == "dy"
        assert c.wait_for("ready(2)", 30)[1] == "2"
        assert c.wait_for("rea(dy)", 30)[1] == "dy", "a second look begins at the beginning"


def test_looking_again_reads_only_what_is_new(tmp_path, monkeypatch):
    path = tmp_path / "x.log"
    path.write_bytes(b"x" * 5_000_000)
    look = logfile.Log(path).looking_for("needle")
    assert look() is None
    read = []
    monkeypatch.setattr(logfile, "CHUNK_BYTES", 1000)
    with path.open("ab") as f:
        f.write(b"need")
    assert look() is None
    with path.open("ab") as f:
        f.write(b"le")
    real = type(path).open
    monkeypatch.setattr(type(path), "open", lambda self, *a: Counted(real(self, *a), read))
    assert look()[0] == "needle"
    assert sum(read) == 2


class Counted:
    """A file that notes how much is read."""

    def __init__(self, f, read):
        self.f, self.noted = f, read

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.f.close()

    def seek(self, at):
        return self.f.seek(at)

    def read(self, n):
        data = self.f.read(n)
        self.noted.append(len(data))
        return data


def test_the_end_of_a_log_is_read_alone(tmp_path):
    path = tmp_path / "x.log"
    path.write_bytes(b"x" * 1_000_000 + "\n\u00e4\nlast\n".encode())
    assert logfile.Log(path).tail(2) == "\u00e4\nlast"
    assert len(logfile.Log(path).tail(3)) < 70_000
    path.write_bytes(b"")
    assert logfile.Log(path).tail(3) == ""


FLOODS = ["exec head -c 3000000000 /dev/zero", "exec yes plausible", "trap '' TERM; yes plausible; sleep 300"]


@pytest.mark.parametrize("script", FLOODS)
@pytest.mark.parametrize("wait", ["for words", "for its end"])
def test_a_log_without_end_ends_its_writer(tmp_path, script, wait):
    started = time.monotonic()
    with shell(tmp_path, script, log_bytes=4 << 20) as c:
        with pytest.raises(process.ProcessError, match="more than 4 MiB to its log and was ended") as caught:
            c.wait_for("never", 60) if wait == "for words" else c.wait_end(60)
    assert caught.value.reason == "engine-log-flood"
    assert gone(c.pid)
    assert (tmp_path / "child.log").stat().st_size == logfile.KEPT_BYTES
    assert time.monotonic() - started < 20


def test_a_log_without_end_ends_its_writer_while_nobody_looks(tmp_path):
    with shell(tmp_path, "exec yes", log_bytes=4 << 20) as c:
        assert gone(c.pid)
        assert (tmp_path / "child.log").stat().st_size < 2 << 30
        with pytest.raises(process.ProcessError) as caught:
            c.check_log()
    assert caught.value.reason == "engine-log-flood"


def test_what_a_child_started_ends_with_it(tmp_path):
    for script, seconds in (
        ("sleep 1011 & echo ready; exit 0", 1011),
        ("trap '' TERM; setsid sleep 1012 & echo ready; wait; sleep 1012", 1012),
    ):
        with shell(tmp_path, script) as c:
            c.wait_for("ready", 30)
            while not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", str(seconds)]]:
                time.sleep(0.01)
            c.stop(grace_s=0.2)
        assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", str(seconds)]]


def test_an_exit_code_is_known_before_the_child_is_reaped(tmp_path):
    """Until then its id cannot be another process's."""
    with shell(tmp_path, "exit 7") as c:
        while c.running():
            time.sleep(0.005)
        assert psutil.Process(c.pid).status() == psutil.STATUS_ZOMBIE
        assert process.ended(c._popen) == 7
        assert c.stop() == process.Exit(7, False)
    assert not psutil.pid_exists(c.pid)
    assert c.stop() == process.Exit(7, False)


def test_a_child_that_cannot_be_run_says_so_in_a_line(tmp_path):
    (tmp_path / "tool").write_text("#!/no/such/loader\n", encoding="utf-8")
    (tmp_path / "tool").chmod(0o755)
    with child(tmp_path, [str(tmp_path / "tool")]) as c:
        with pytest.raises(
            process.ProcessError, match="ended with 1; its log ends:\n/.*tool cannot be run: .*No such file"
        ):
            c.wait_for("never", 30)
    assert len(c.text().splitlines()) == 1


def test_nothing_needs_a_locale_that_is_utf_8(tmp_path):
    """Words that are no ASCII, told by a child, in a folder whose name is none either."""
    here = tmp_path / "gr\u00fc\u00df"
    here.mkdir()
    code = (
        "import sys, pathlib; from moelib import probe, process; here = pathlib.Path(sys.argv[1])\n"
        "argv = ['/bin/sh', '-c', \"printf '\\\\303\\\\274ber\\\\377'\"]\n"
        "with process.Child(argv, here / 'x.log', process.environment(here)) as c: c.wait_end(30)\n"
        "assert c.text() == '\\xfcber\\ufffd' == probe.ask(argv, 30).out, ascii(c.text())\n"
        "process.facts()\n"
    )
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for flags in ([], ["-OO"]):
        done = subprocess.run([sys.executable, *flags, "-c", code, str(here)], env=env, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")


def test_only_the_allow_list_reaches_a_child(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_ARG_CPU_MOE", "1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-x")
    with child(tmp_path, ["/usr/bin/env"], LLAMA_API_KEY="k") as c:
        while c.running():
            time.sleep(0.01)
    variables = dict(line.split("=", 1) for line in c.text().splitlines() if "=" in line)
    assert set(variables) <= {
        *process.ENV_ALLOWED,
        "XDG_CONFIG_HOME",
        "XDG_CACHE_HOME",
        "LLAMA_API_KEY",
        "PWD",
        "SHLVL",
        "_",
        "LC_CTYPE",  # of the Python that launches, where the system sets no locale
    }
    assert variables["CUDA_VISIBLE_DEVICES"] == "GPU-x"
    assert os.listdir(variables["XDG_CONFIG_HOME"]) == []


def test_cpus_are_kept_to(tmp_path):
    one = process.cpu_ids()[-1]
    argv = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    with process.Child(argv, tmp_path / "c.log", process.environment(tmp_path), cpus=[one]) as c:
        while c.running():
            time.sleep(0.01)
    assert c.text().strip() == f"[{one}]"


PARENT = """
import sys, time
from pathlib import Path
from moelib import process
here = Path(sys.argv[1])
c = process.Child(["/bin/sleep", "300"], here / "child.log", process.environment(here))
print(c.pid, flush=True)
time.sleep(300)
"""


def test_no_orphan_after_kill_9_of_the_parent(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    pid = int(parent.stdout.readline())
    time.sleep(0.3)  # the launcher has become the tool
    assert psutil.Process(pid).name() == "sleep"
    parent.kill()
    parent.wait()
    assert gone(pid)


def test_a_parent_that_dies_at_once_leaves_no_child_either(tmp_path):
    for _ in range(5):
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        assert gone(pid)


def test_the_sweep_ends_children_of_dead_parents_by_identity_only(tmp_path):
    orphan, living, reused = (subprocess.Popen(["/bin/sleep", "300"]) for _ in range(3))
    born = {p.pid: psutil.Process(p.pid).create_time() for p in (orphan, living, reused)}
    me = [os.getpid(), psutil.Process().create_time()]

    def note(name, parent, who):
        (tmp_path / f"{name}.child.json").write_text(json.dumps({"parent": parent, "child": who}), encoding="utf-8")

    try:
        note("orphan", [me[0], me[1] - 50], [orphan.pid, born[orphan.pid]])
        note("living", me, [living.pid, born[living.pid]])
        note("reused", [me[0], me[1] - 50], [reused.pid, born[reused.pid] - 50])
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


def test_listening_is_proven_for_the_child_itself(tmp_path):
    port = process.free_port()
    serve = f"import socket, time; s = socket.socket(); s.bind(('127.0.0.1', {port})); s.listen(); time.sleep(300)"
    with child(tmp_path, [sys.executable, "-c", serve]) as c:
        c.wait_listening(port, 30)
        other = process.Child(SLEEP, tmp_path / "other.log", process.environment(tmp_path))
        with other, pytest.raises(process.ProcessError, match="did not listen"):
            other.wait_listening(port, 0.3)


def test_a_clone_is_dirty_by_what_measures_and_not_by_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELIB_HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def facts():
        result = process.facts.__wrapped__()
        return result["commit"], result["dirty"]

    def git(*args):
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.check_output(["git", *who, *args], cwd=tmp_path, text=True, encoding="utf-8")

    assert facts() == (None, None)
    for name in ("params/a", "outputs/b", "docs/c"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("as committed", encoding="utf-8")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    commit = git("rev-parse", "HEAD").strip()
    assert facts() == (commit, False)
    (tmp_path / "new").write_text("not tracked", encoding="utf-8")
    (tmp_path / "outputs/b").write_text("a product made again", encoding="utf-8")
    (tmp_path / "docs/c").unlink()
    assert facts() == (commit, False)
    (tmp_path / "params/a").write_text("changed", encoding="utf-8")
    assert facts() == (commit, True)


@pytest.mark.parametrize("setting", ["", "fast", "0", "-1", "nan", "inf", "1e9", "1e-9", "0x1"])
def test_a_patience_that_is_no_number_is_said(monkeypatch, setting):
    monkeypatch.setenv("MOELIB_PATIENCE", setting)
    with pytest.raises(params.UserError, match="MOELIB_PATIENCE=.* is not a number from 0.001 to 1000; unset it"):
        process.patience(1)


@pytest.mark.parametrize(("setting", "waits"), [("1", 3.0), ("2.5", 7.5), ("1e-3", 0.003), (" 2 ", 6.0)])
def test_patience_lengthens_waits(monkeypatch, setting, waits):
    monkeypatch.setenv("MOELIB_PATIENCE", setting)
    assert process.patience(3) == pytest.approx(waits)
