"""A Hub whose true answers are changed at random: wrong types, odd numbers, strings, heads and states in any place.

    python tests/hub_fuzz.py                  2,000 answers, and how they ended
    python tests/hub_fuzz.py --cases 200 --seed 7

Each case asks one door of moelib, and one answer on its way is changed. It ends well in success, or in one of our
errors, on one line and without a token; anything else is a traceback at the door.
"""

import argparse
import copy
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from hashlib import sha256
from pathlib import Path
from unittest import mock

import published
from hub import Hub, official_client

from moelib import hub, params, publish, sources

REPO = "alice/toy-GGUF"
ODD = [None, True, False, 0, -1, 1.5, 1 << 40, 1 << 70, 10**40, float("nan"), "", "x", "a" * 10_000, "\x1b[2J", "a\nb"]
ODD += ["\x00", "../../x.gguf", "/etc/passwd", "ä" * 50, "\ud800", "2026-13-45", "0" * 40, "f" * 64, "main", "<script>"]
ODD += [[], {}, [[]], [None], {"a": 1}, ["x"] * 100, {"": {}}, [{"rfilename": "x.gguf"}], "http://127.0.0.1:9/x"]
STATUS = (200, 201, 204, 206, 301, 302, 304, 307, 400, 401, 403, 404, 409, 416, 418, 429, 500, 503)
HEADS = ("Location", "Content-Range", "Link", "X-Linked-Size", "X-Linked-ETag", "ETag", "X-Repo-Commit", "X-Error-Code")
HEADS += ("X-Error-Message", "Retry-After", "Content-Type", "X-Xet-Hash", "Content-Encoding", "Accept-Ranges")
SAID = (
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
    '<x>; rel="next"',
    "RepoNotFound",
)
SAID += (
    "GatedRepo",
    "EntryNotFound",
    "/x",
    "http://[",
    "http://127.0.0.1:9/",
    "ftp://x/",
    "text/html",
    "utf-9",
    "a" * 5000,
)


def places(data, path=()):
    """Every place in a JSON value."""
    yield path
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from places(value, (*path, key))


def changed(data, rng):
    """The same with a value of another kind somewhere, or without it, or twice."""
    data = copy.deepcopy(data)
    path = rng.choice(list(places(data)))
    odd = copy.deepcopy(rng.choice(ODD))
    if not path:
        return odd
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    what = rng.random()
    if what < 0.2:
        del inside[path[-1]]
    elif what < 0.3 and isinstance(inside, list):
        inside.append(odd)
    else:
        inside[path[-1]] = odd
    return data


class Twist:
    """Changes the nth answer, once."""

    def __init__(self, nth, rng):
        self.left, self.rng, self.did = nth, rng, None

    def __call__(self, status, body, headers):
        self.left -= 1
        if self.left:
            return status, body, headers
        headers, kind = dict(headers), self.rng.random()
        if kind < 0.6 and not isinstance(body, bytes):
            body = changed(body, self.rng)
            self.did = "body"
        elif kind < 0.7:
            body = self.rng.choice([b"", b"{", b"[]", b"null", b"\xff", b"5", b"[" * 5000, b"<html>", b'"x"', b"{}"])
            self.did = "bytes"
        elif kind < 0.8:
            status, self.did = self.rng.choice(STATUS), "status"
        else:
            headers[self.rng.choice(HEADS)] = self.rng.choice(SAID)
            self.did = "head"
        return status, body, headers


def doors(server, folder):
    def plan():
        item = publish.Item("m.gguf", b"GGUF", 4, sha256(b"GGUF").hexdigest())
        return publish.Plan(REPO, "t", (item,), True)

    def anew():
        shutil.rmtree(sources.folder("toy"), ignore_errors=True)
        sources.fetch("toy", server.url)

    return {
        "pin": lambda: sources.pin("toy", REPO, endpoint=server.url),
        "fetch": anew,
        "rights": lambda: publish.require_rights(hub.api(server.url), {"alice", "lab"}),
        "look": lambda: publish._look(plan(), hub.api(server.url)),
        "publish": lambda: publish.publish([publish._look(plan(), hub.api(server.url))], lambda _: None, server.url),
        "requests": lambda: publish._open_request(hub.api(server.url), plan()),
    }


def campaign(home, cases, seed, say=print):
    """(how each case ended, tracebacks by their last line)."""
    rng, ended, bad = random.Random(seed), Counter(), Counter()
    geometry, path = published.catalogued(home), home / "params/models.yaml"
    toy = published.gguf(geometry)
    clean = path.read_bytes()
    with (
        tempfile.TemporaryDirectory() as own,
        Hub(Path(own), part_bytes=1 << 20) as server,
        official_client(server, 0.0001),
    ):
        with mock.patch.dict(os.environ, HF_TOKEN="hf_write", MOELIB_PATIENCE="0.02"):
            server.put(REPO, {"toy-F16.gguf": toy, "m.gguf": b"GGUF", "README.md": b"# x"})
            sources.pin("toy", REPO, endpoint=server.url)
            pinned = path.read_bytes()
            every = doors(server, own)
            steps = {}
            for name, go in every.items():
                before = len(server.requests)
                go()
                steps[name] = len(server.requests) - before
            for _ in range(cases):
                name = rng.choice(list(every))
                server.twist = Twist(rng.randint(1, steps[name]), rng)
                try:
                    every[name]()
                    ended["went well"] += 1
                except params.UserError as err:
                    fine = "\n" not in str(err) and "\x1b" not in str(err) and "hf_write" not in str(err)
                    ended["one sentence" if fine else "not one clean line"] += 1
                    if not fine:
                        bad[f"{name}: {str(err)[:200]!r}"] += 1
                except Exception as err:
                    ended["traceback"] += 1
                    at = traceback.extract_tb(err.__traceback__)
                    ours = next((f for f in reversed(at) if "moelib" in f.filename), at[-1])
                    bad[
                        f"{name} ({server.twist.did}): {type(err).__name__} in {Path(ours.filename).name}:{ours.lineno}"
                    ] += 1
                server.twist = None
                if path.read_bytes() not in (pinned, clean):
                    ended["catalogue damaged"] += 1
                path.write_bytes(pinned)
                params._yaml.cache_clear()
            server.gaps.clear()  # it was this that sent the client to where nothing is
    return ended, bad


def main():
    from conftest import furnish, stay_off_the_hub

    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--cases", type=int, default=2000)
    ask.add_argument("--seed", type=int, default=1)
    args = ask.parse_args()
    with tempfile.TemporaryDirectory() as own:
        stay_off_the_hub(own)
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error", "HF_HUB_DISABLE_XET": "1"}
        home = furnish(Path(own) / "home")
        os.environ |= {"MOELIB_HOME": str(home), "MOELIB_MODELS": str(Path(own) / "models")}
        ended, bad = campaign(home, args.cases, args.seed)
    print(
        f"{args.cases} answers changed, seed {args.seed}: "
        + ", ".join(f"{n} {what}" for what, n in ended.most_common())
    )
    for what, n in bad.most_common():
        print(f"  {n:5} {what}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
