"""Whatever a server sends in the Hub's place: one sentence, soon, in little memory, and nothing good is lost."""

import copy
import gzip
import itertools
import os
import random
import re
import subprocess
import sys
import time
from hashlib import sha256

import hub_hostile
import psutil
import published
import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moelib.catalogue import params, pins
from moelib.models import hub, remote, sources
from moelib.models.hub import HubError
from moelib.publish import upload

REPO = "alice/toy-GGUF"
ADDRESS = f"hf:{REPO}/toy-F16.gguf"


@pytest.fixture
def toy(home, tmp_path, monkeypatch):
    """A model of the catalogue, and the bytes of its file."""
    monkeypatch.setenv("MOELIB_MODELS", str(tmp_path / "m"))
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    geometry = published.catalogued(home)
    return published.gguf(geometry)


@pytest.fixture
def pinned(toy, lfs_hub):
    lfs_hub.put(REPO, {"toy-F16.gguf": toy, "m.gguf": b"GGUF", "README.md": b"# x"})
    sources.pin("toy", REPO, endpoint=lfs_hub.url)
    return toy


def plan(content=b"GGUF"):
    return upload.Plan(REPO, "t", (upload.Item("m.gguf", content, len(content), sha256(content).hexdigest()),), True)


NUMBERS = itertools.count()


def changed_plan():
    """A plan of what no Hub has."""
    return plan(b"GGUF %d" % next(NUMBERS))


def refusal(use, server):
    """The message of our own error that `use` ends with; "" if it succeeds."""
    try:
        use(server)
    except params.UserError as err:
        return str(err)
    return ""


def one_clean_line(message):
    return not {"\n", "\x1b", "\x9b", "\x07"} & set(message) and "hf_write" not in message and len(message) < 800


DOORS = {
    "pinning": ("/api/models", lambda server: sources.pin("toy", REPO, endpoint=server.url)),
    "finding a header": ("HEAD /alice", lambda server: sources.pin("toy", REPO, endpoint=server.url)),
    "reading a header": ("/storage", lambda server: sources.pin("toy", REPO, endpoint=server.url)),
    "a header by its address": ("/api/models|/storage", lambda server: remote.header(ADDRESS, server.url)),
    "finding a file": ("HEAD /alice", lambda server: sources.fetch("toy", server.url)),
    "fetching a file": ("/storage", lambda server: sources.fetch("toy", server.url)),
    "whose token": ("whoami", lambda server: upload.require_rights(hub.api(server.url), {"alice"})),
    "a state": ("/api/models", lambda server: upload._state(hub.api(server.url), REPO)),
    "a listing": ("/tree", lambda server: upload._listing(hub.api(server.url), REPO, "main")),
    "requests": ("discussions", lambda server: upload._open_request(hub.api(server.url), plan())),
    "an upload": ("/preupload|/commit", lambda server: upload._upload(hub.api(server.url), changed_plan(), print)),
    "publishing": ("/merge", lambda server: upload.publish([changed_plan()], print, server.url)),
    "reading back": ("HEAD /alice", lambda server: upload._read_back(hub.api(server.url), plan(), "main", print)),
}


@pytest.mark.parametrize("way", hub_hostile.WAYS)
def test_harm_ends_in_a_sentence_soon_and_in_little_memory(pinned, lfs_hub, way, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    before, own = pins.path().read_bytes(), psutil.Process()
    monkeypatch.setenv("MOELIB_PATIENCE", "0.002")  # 60 s of silence: 0.1 s; 10 minutes for an answer: 1.2 s
    struck = 0
    for door, (match, use) in DOORS.items():
        lfs_hub._faults.clear()
        fault = lfs_hub.fail(way, match=match, times=None)
        requests, started, held = len(lfs_hub.requests), time.monotonic(), own.memory_info().rss
        assert one_clean_line(refusal(use, lfs_hub)), door
        assert time.monotonic() - started < 30, door
        assert own.memory_info().rss - held < 300 << 20, door
        assert sum(r.sent for r in lfs_hub.requests[requests:] if r.fault) < 100 << 20, door
        struck += bool(fault.struck)
    lfs_hub._faults.clear()
    assert struck >= len(DOORS) - 1  # of the file itself not, if it came already
    assert pins.path().read_bytes() == before
    kept = [p.read_bytes() for p in sources.folder("toy").glob("*.gguf")]
    assert kept in ([], [pinned])  # a HEAD that is answered with a body leads to the file all the same
    lfs_hub.let_go()
    monkeypatch.setenv("MOELIB_PATIENCE", "1")
    assert sources.fetch("toy", lfs_hub.url).path.read_bytes() == pinned


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("flood", "more than 33,554,432 bytes were sent, too many for this answer"),
        ("bomb", "more than 33,554,432 bytes were sent"),
        ("packed", "compressed as 'br', which was not requested: check the network's proxy"),
        ("rubble", "cannot be decompressed"),
        ("drip", "answers too slowly: check the network"),
        ("drip_head", "answers too slowly: check the network"),
        ("circle", "TooManyRedirects"),
        ("later", "asks to wait 999999999 s: run the same command again then"),
        ("much_later", "asks to wait 999999999 s"),
        ("window", "asks to wait 999999999 s"),
        ("wrong", "the answer is not in the Hub's format"),
        ("many", "the answer is not in the Hub's format: .*100000 files"),
        ("no_text", "disconnected.*UnicodeDecodeError"),
    ],
)
def test_the_cause_is_named(toy, lfs_hub, monkeypatch, way, why):
    monkeypatch.setenv("MOELIB_PATIENCE", "0.005" if way.startswith("drip") else "0.2")
    lfs_hub.fail(way, match="/api/models", times=None)
    with pytest.raises(HubError, match=f"^pinning alice/toy-GGUF: .*{why}"):
        sources.pin("toy", REPO, endpoint=lfs_hub.url)


def test_no_message_has_a_token_or_a_signature(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of-another-form")
    with pytest.raises(HubError) as caught, hub.asking("looking"):
        raise ValueError("of-another-form and hf_abc123 for https://x/y?Signature=5e1f&Expires=9 refused\nmore")
    assert str(caught.value).endswith("(ValueError: hf_... and hf_... for https://x/y?... refused)")


def test_an_answer_that_is_packed_after_all_is_read(toy, lfs_hub, monkeypatch):
    """Some proxies pack whatever passes: what is small unpacked is read."""
    body = gzip.compress(b'{"name": "alice", "auth": {"accessToken": {"role": "write"}}}')
    answer = hub_hostile.whole(body, "Content-Encoding: gzip")
    monkeypatch.setitem(hub_hostile.WAYS, "packing", lambda _: [answer])
    lfs_hub.fail("packing", match="whoami")
    upload.require_rights(hub.api(lfs_hub.url), {"alice"})
    assert lfs_hub.requests[-1].fault == "packing"


def test_another_range_than_requested_is_refused(pinned, lfs_hub):
    lfs_hub.twist = lambda status, body, headers: (
        status,
        body,
        headers | ({"Content-Range": "bytes 7-16/99"} if status == 206 else {}),
    )
    with pytest.raises(HubError, match="the server sent another range than requested"):
        sources.fetch("toy", lfs_hub.url)
    assert not list(sources.folder("toy").glob("*.gguf"))


def test_nothing_packed_is_asked_for(lfs_hub):
    from huggingface_hub.utils import get_session

    hub.api(lfs_hub.url)
    with hub.asking("looking"):
        answer = get_session().get(f"{lfs_hub.url}/api/whoami-v2", headers={"Authorization": "Bearer hf_read"})
    assert answer.request.headers["Accept-Encoding"] == "identity"
    assert answer.request.extensions["timeout"]["read"] == hub.WAIT_S


def test_a_file_that_comes_slowly_and_steadily_has_its_time():
    """A limit on the whole would end a download of hours: each MiB buys as much again."""
    budget = hub.Budget(receives=1 << 40)
    first = budget.deadline
    budget.count(hub.PIECE - 1)
    assert budget.deadline == first
    budget.count(1)
    assert budget.deadline > first
    answer = hub.Budget()
    first = answer.deadline
    answer.count(hub.PIECE * 2)
    assert answer.deadline == first
    with pytest.raises(hub.TooMuchError, match="bytes were sent"):
        answer.count(hub.ANSWER_BYTES)
    late = hub.Budget()
    late.deadline = time.monotonic() - 1
    with pytest.raises(hub.TooMuchError, match="too slowly"):
        late.count(1)
    assert hub.Budget(sends=10**9).deadline - first > 10**9 / hub.SLOWEST_BYTES_PER_S - 60


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"HF_ENDPOINT": "nonsense"}, "HF_ENDPOINT is 'nonsense', which is not a web address"),
        ({"HF_ENDPOINT": "ftp://x"}, "which is not a web address"),
        ({"HF_ENDPOINT": "http://"}, "which is not a web address"),
        ({"HF_ENDPOINT": "http://a b"}, "which is not a web address"),
        ({"HF_ENDPOINT": "http://\x1b[2J"}, "an HF_... variable of the environment is invalid|not a web address"),
        (
            {"HF_ENDPOINT": "http://127.0.0.1:999999"},
            "an HF_... variable of the environment is invalid|not a web address",
        ),
        ({"HF_ENDPOINT": "http://127.0.0.1:9", "HTTP_PROXY": "nonsense"}, "HTTP_PROXY is set"),
        ({"HF_ENDPOINT": "https://127.0.0.1:9", "SSL_CERT_FILE": "/nowhere"}, "SSL_CERT_FILE"),
        ({"HF_HUB_DOWNLOAD_TIMEOUT": "soon"}, "an HF_... variable of the environment is invalid"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_TOKEN": "h\u00e9"}, "pinning a/b: "),
        ({"HF_HOME": "/dev/null"}, "pinning a/b: .*HF_HOME is set|pinning a/b: .*/dev/null"),
    ],
)
def test_a_wrong_environment_is_one_sentence(toy, variables, why):
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "MOELIB_PATIENCE": "0.01", **variables}
    argv = [sys.executable, "-m", "moelib.cli", "fetch", "toy", "--pin", "a/b"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, encoding="utf-8")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "bug in moelib" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("moelib: "), done.stderr
    assert re.search(why, last), last
    assert "\x1b" not in last


ODD = [None, True, False, 0, -1, 1.5, 1 << 70, 10**40, float("nan"), "", "x", "a" * 10_000, "\x1b[2J", "a\nb", "\x00"]
ODD += ["../../x.gguf", "/etc/passwd", "\ud800", "2026-13-45", "0" * 40, "f" * 64, "main", "http://127.0.0.1:9/x"]
ODD += [[], {}, [[]], [None], {"a": 1}, ["x"] * 100, {"": {}}, [{"rfilename": "x.gguf"}]]
BODIES = [b"", b"{", b"[]", b"null", b"\xff", b"5", b"[" * 5000, b"<html>", b'"x"', b"{}"]
STATUSES = (200, 201, 204, 206, 301, 302, 304, 307, 400, 401, 403, 404, 409, 416, 418, 429, 500, 503)
HEADS = """Location Content-Range Link X-Linked-Size X-Linked-ETag ETag X-Repo-Commit X-Error-Code X-Error-Message
Retry-After Content-Type X-Xet-Hash Content-Encoding Accept-Ranges""".split()
VALUES = [
    "",
    "x",
    "-1",
    "0",
    "1" * 30,
    "bytes 0-0/1",
    "bytes 5-9/2",
    "bytes */*",
    "gzip",
    "\x1b[2J",
    "utf-9",
    "a" * 5000,
]
VALUES += ['<x>; rel="next"', "RepoNotFound", "GatedRepo", "/x", "http://[", "http://127.0.0.1:9/", "ftp://x/"]


def places(data, path=()):
    """Every place in a JSON value."""
    yield path
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from places(value, (*path, key))


def changed(data, rng):
    """A JSON value with something odd in one place, or without that place."""
    data, odd = copy.deepcopy(data), copy.deepcopy(rng.choice(ODD))
    *above, key = rng.choice(list(places(data))) or (None,)
    if key is None:
        return odd
    holder = data
    for step in above:
        holder = holder[step]
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = odd
    return data


def twist(nth, rng):
    """Changes the nth answer: its body, status or one of its heads."""
    left = iter(range(nth - 1, -1, -1))

    def change(status, body, headers):
        if next(left, None) != 0:
            return status, body, headers
        kind = rng.random()
        if kind < 0.6 and not isinstance(body, bytes):
            return status, changed(body, rng), headers
        if kind < 0.7:
            return status, rng.choice(BODIES), headers
        if kind < 0.8:
            return rng.choice(STATUSES), body, headers
        return status, body, headers | {rng.choice(HEADS): rng.choice(VALUES)}

    return change


def test_answers_that_are_changed_at_random_end_in_success_or_a_sentence(pinned, lfs_hub, monkeypatch):
    monkeypatch.setenv("MOELIB_PATIENCE", "0.02")
    before, sentences = pins.path().read_bytes(), []

    @settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sorted(DOORS)), st.integers(1, 8), st.integers(0, 1 << 32))
    def change_one(door, nth, seed):
        for path in sources.folder("toy").glob("*.gguf"):
            path.unlink()
        lfs_hub.twist = twist(nth, random.Random(seed))
        message = refusal(DOORS[door][1], lfs_hub)
        lfs_hub.twist = None
        assert one_clean_line(message)
        sentences.append(message)
        assert [p.read_bytes() for p in sources.folder("toy").glob("*.gguf")] in ([], [pinned])
        assert pins.of("toy"), "what was pinned can be read"
        pins.path().write_bytes(before)

    change_one()
    lfs_hub.gaps.clear()  # it was this that sent the client to where nothing is
    assert sum(map(bool, sentences)) > 50
