"""The contract: what tests/hub.py answers is what the official client asks and takes; and its faults."""

import hashlib
import json
import os
import re
import threading
import time
from pathlib import Path

import httpx
import pytest
from hub import Hub, official_client
from huggingface_hub import CommitOperationAdd, HfApi, errors

CARD = b"---\nlicense: mit\nbase_model: a/b\n---\n# A model\n"
SMALL, LARGE = (b"GGUF\0\0" + os.urandom(n) for n in (100_000, 3_000_000))
FILES = {"README.md": CARD, "m-Q2_K.gguf": SMALL, "sub/m-Q4_K_M.gguf": LARGE}
M = "alice/m"


def api(hub, token="hf_write"):
    return HfApi(endpoint=hub.url, token=token)


def sha(content):
    return hashlib.sha256(content).hexdigest()


def commit(client, files=None, repo=M, **more):
    operations = [CommitOperationAdd(path, content) for path, content in (files or {"m.gguf": SMALL}).items()]
    return client.create_commit(repo, operations, commit_message="x", **more)


def lines(hub):
    return [re.sub(r"[0-9a-f]{64}", "SHA", r.line) for r in hub.requests]


def test_a_repository_is_filled_in_private_read_back_and_made_public(hub, tmp_path):
    owner, anyone = api(hub), api(hub, False)
    assert owner.create_repo(M, private=True).repo_id == M
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        owner.create_repo(M)
    assert owner.create_repo(M, exist_ok=True).repo_id == M
    commit(owner, FILES)
    info = owner.model_info(M, files_metadata=True)
    entries = {s.rfilename: (s.size, s.lfs and s.lfs.sha256) for s in info.siblings if s.rfilename != ".gitattributes"}
    assert entries == {p: (len(c), None if p == "README.md" else sha(c)) for p, c in FILES.items()}
    assert (info.private, info.card_data.license, info.sha) == (True, "mit", hub.repos[M].refs["refs/heads/main"])
    listed = {e.path: e for e in owner.list_repo_tree(M, recursive=True)}
    assert set(listed) == {*FILES, ".gitattributes", "sub"}
    assert listed["m-Q2_K.gguf"].lfs.sha256 == sha(SMALL)
    assert bool(listed["m-Q2_K.gguf"].xet_hash) == bool(hub.cas)
    assert listed["README.md"].blob_id == hashlib.sha1(b"blob %d\0" % len(CARD) + CARD).hexdigest()
    for path, content in FILES.items():
        assert Path(owner.hf_hub_download(M, path, cache_dir=tmp_path / "c")).read_bytes() == content
        assert hub.read(M, path) == content
    with pytest.raises(errors.RepositoryNotFoundError):
        anyone.model_info(M)
    owner.update_repo_settings(M, visibility="public")
    assert Path(anyone.hf_hub_download(M, "sub/m-Q4_K_M.gguf", cache_dir=tmp_path / "d")).read_bytes() == LARGE
    first, last = [state for _, state in hub.public_history()]
    assert first == {}
    assert {p: last[M]["refs/heads/main"][p] for p in FILES} == {p: sha(c) for p, c in FILES.items()}


def test_how_files_come_shows_in_the_requests(hub):
    hub.put(M, {})
    commit(api(hub), FILES)
    storage = "PUT /storage/alice/m/SHA"
    parts = [f"{storage}?part={n}" for n in (1, 2, 3)]
    by_lfs = ["POST /alice/m.git/info/lfs/objects/batch", storage, *parts]
    by_lfs += ["POST /api/complete_multipart?place=%2Fstorage%2Falice%2Fm%2FSHA"]
    by_lfs += ["POST /alice/m.git/info/lfs/objects/verify"] * 2
    requests = lines(hub)
    assert requests[:2] == ["POST /api/validate-yaml", "POST /api/models/alice/m/preupload/main"]
    assert sorted(requests[2:-1]) == sorted(["GET /api/models/alice/m/xet-write-token/main"] if hub.cas else by_lfs)
    assert requests[-1] == "POST /api/models/alice/m/commit/main"
    stored = [r for r in hub.requests if r.path.startswith("/storage")]
    assert not [r for r in stored if r.token], "a token never leaves for storage"
    assert not [r for r in hub.requests if "ignature" in r.path]
    assert sum(r.received for r in stored) == (0 if hub.cas else len(SMALL) + len(LARGE))


def test_a_pull_request_against_what_has_changed_is_refused(lfs_hub):
    lfs_hub.put(M, {"a.txt": b"1"})
    commit(api(lfs_hub), {"a.txt": b"2"}, create_pr=True)
    lfs_hub.put(M, {"a.txt": b"3"})
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        api(lfs_hub).merge_pull_request(M, 1)


NOT_FOUND, GATED = errors.RepositoryNotFoundError, errors.GatedRepoError
READS = {
    "no repository": (404, NOT_FOUND, "hf_write", lambda a, _: a.model_info("alice/none")),
    "no repository, anonymous": (401, NOT_FOUND, False, lambda a, _: a.model_info("alice/none")),
    "private, of another": (404, NOT_FOUND, "hf_other", lambda a, _: a.list_repo_files("alice/private")),
    "no revision": (404, errors.RevisionNotFoundError, "hf_write", lambda a, _: a.model_info(M, revision="none")),
    "no file": (404, errors.RemoteEntryNotFoundError, "hf_write", lambda a, d: a.hf_hub_download(M, "no", cache_dir=d)),
    "gated": (403, GATED, "hf_other", lambda a, d: a.hf_hub_download("alice/gated", "a.txt", cache_dir=d)),
    "wrong token": (401, errors.HfHubHTTPError, "hf_none", lambda a, _: a.whoami()),
}


@pytest.mark.parametrize("case", READS)
def test_who_may_not_read_is_refused_as_by_the_real_one(lfs_hub, tmp_path, case):
    status, kind, token, read = READS[case]
    lfs_hub.put(M, {"a.txt": b"a"})
    lfs_hub.put("alice/private", {"a.txt": b"a"}, private=True)
    lfs_hub.put("alice/gated", {"a.txt": b"a"})
    lfs_hub.repos["alice/gated"].gated = "auto"
    with pytest.raises(kind) as e:
        read(api(lfs_hub, token), tmp_path)
    assert type(e.value) is kind
    assert e.value.response.status_code == status


WRITES = {  # token -> statuses of creating, committing, a pull request, publishing
    "hf_write": (200, 200, 200, 200),
    "hf_fine": (200, 200, 200, 200),
    "hf_read": (403, 403, 403, 403),
    "hf_narrow": (403, 403, 403, 403),
    "hf_other": (403, 403, 200, 403),
    False: (401, 401, 401, 401),
}


@pytest.mark.parametrize("token", WRITES)
def test_who_may_write(lfs_hub, token):
    lfs_hub.put(M, {})
    client, statuses = api(lfs_hub, token), []
    for attempt in (
        lambda: client.create_repo("alice/new"),
        lambda: commit(client),
        lambda: commit(client, create_pr=True),
        lambda: client.update_repo_settings(M, private=True),
    ):
        try:
            attempt()
            statuses.append(200)
        except errors.HfHubHTTPError as e:
            statuses.append(e.response.status_code)
    assert tuple(statuses) == WRITES[token]
    assert lfs_hub.repos[M].private == (statuses[-1] == 200)


def test_storage_takes_what_was_announced_alone(lfs_hub):
    lfs_hub.put(M, {})
    with httpx.Client(trust_env=False, headers={"Authorization": "Bearer hf_write"}) as c:
        batch = {"operation": "upload", "objects": [{"oid": sha(SMALL), "size": len(SMALL)}]}
        [answer] = c.post(f"{lfs_hub.url}/{M}.git/info/lfs/objects/batch", json=batch).json()["objects"]
        place, verify = (answer["actions"][n]["href"] for n in ("upload", "verify"))
        line = {"key": "lfsFile", "value": {"path": "m.gguf", "algo": "sha256", "oid": sha(SMALL), "size": len(SMALL)}}
        body = json.dumps({"key": "header", "value": {"summary": "x"}}) + "\n" + json.dumps(line)
        unsigned, commits = {"Authorization": ""}, f"{lfs_hub.url}/api/models/{M}/commit/main"
        assert c.post(commits, content=body).status_code == 400
        assert c.put(place, content=SMALL).status_code == 400, "with a token"
        assert c.put(place[:-1], content=SMALL, headers=unsigned).status_code == 403, "with another signature"
        assert c.put(place, content=SMALL[:-1], headers=unsigned).status_code == 400, "too short"
        assert c.put(place, content=SMALL[:-1] + b"?", headers=unsigned).status_code == 400, "other bytes"
        assert c.post(verify, json=batch["objects"][0]).status_code == 404
        assert c.put(place, content=SMALL, headers=unsigned).status_code == 200
        assert c.post(verify, json=batch["objects"][0]).status_code == 200
        assert c.post(commits, content=body).status_code == 200
    assert lfs_hub.read(M, "m.gguf") == SMALL


def test_a_card_that_is_no_yaml_is_refused(lfs_hub):
    lfs_hub.put(M, {})
    with pytest.raises(ValueError, match=r"Invalid metadata in README.md"):
        commit(api(lfs_hub), {"README.md": b"---\na: [\n---\n"})


def test_whatever_was_public_at_any_time_is_known(hub):
    api(hub).create_repo(M, private=True)
    commit(api(hub), {"a.txt": b"a"})
    api(hub).update_repo_settings(M, private=False)
    commit(api(hub), create_pr=True)
    api(hub).update_repo_settings(M, private=True)
    states = [state for _, state in hub.public_history()]
    assert [{ref: sorted(f) for ref, f in state.get(M, {}).items()} for state in states] == [
        {},
        {"refs/heads/main": [".gitattributes", "a.txt"]},
        {"refs/heads/main": [".gitattributes", "a.txt"], "refs/pr/1": [".gitattributes", "a.txt", "m.gguf"]},
        {},
    ]


# faults

STATUS = {"401": 401, "403": 403, "404": 404, "409": 409, "412": 412}
AGAIN = {"429": 429, "500": 500, "503": 503}


@pytest.mark.parametrize("how", [*STATUS, *AGAIN, "timeout", "reset", "lost", "short", "corrupt"])
def test_a_request_fails_as_it_was_set(tmp_path, how):
    with Hub(tmp_path, silence_s=0.2) as hub, official_client(hub) as waits:
        hub.put(M, {})
        fault = hub.fail(how, match="preupload")
        if how in STATUS:
            with pytest.raises(errors.HfHubHTTPError) as e:
                commit(api(hub))
            assert e.value.response.status_code == STATUS[how]
        elif how == "corrupt":
            with pytest.raises(json.JSONDecodeError):
                commit(api(hub))
        else:  # the client tries again
            commit(api(hub))
            assert waits == [1.0]
        assert (fault.struck, hub.requests[0].fault) == (1, how)
        assert hub.requests[0].status == (STATUS | AGAIN | {"short": 200, "corrupt": 200}).get(how, 0)


def test_a_fault_stays_with_the_nth_request_and_then_ends(tmp_path):
    with Hub(tmp_path) as hub, official_client(hub) as waits:
        hub.put(M, {"a.txt": b"a"})
        hub.put("alice/n", {"b.txt": b"b"})
        fault = hub.fail("503", match="/tree/", nth=2, times=3)
        for _ in range(2):
            assert api(hub).list_repo_files(M) == [".gitattributes", "a.txt"]
            assert api(hub).list_repo_files("alice/n") == [".gitattributes", "b.txt"]
        assert [r.path.split("/")[4] for r in hub.requests] == ["m", *["n"] * 4, "m", "n"]
        assert (fault.struck, waits) == (3, [1.0, 2.0, 4.0])


def test_what_was_done_stays_done_though_the_answer_was_lost(hub):
    hub.put(M, {})
    hub.fail("lost", match="/commit/")
    with pytest.raises(Exception, match="reset|disconnected"):
        commit(api(hub))
    assert hub.read(M, "m.gguf") == SMALL
    commit(api(hub))
    assert len(hub.repos[M].commits) == 3, "the second one had nothing left to do"


@pytest.mark.parametrize("after", [0, 1, None])
def test_an_upload_that_is_cut_leaves_nothing(lfs_hub, after):
    lfs_hub.put(M, {})
    fault = lfs_hub.fail("reset", match="PUT /storage", times=None, after=after)
    with pytest.raises(RuntimeError, match="Error while uploading 'm.gguf'"):
        commit(api(lfs_hub))
    assert fault.struck == 6, "the client's own tries"
    assert {r.received for r in lfs_hub.requests if r.fault} == {len(SMALL) // 2 if after is None else after}
    assert not lfs_hub.repos[M].objects


def test_silence_ends_with_the_hub(tmp_path):
    before = threading.active_count()
    with Hub(tmp_path) as hub, httpx.Client(trust_env=False, timeout=0.2) as c:
        hub.fail("timeout")
        with pytest.raises(httpx.ReadTimeout):
            c.get(hub.url + "/api/whoami-v2")
        started = time.monotonic()
    assert time.monotonic() - started < 5
    while threading.active_count() > before and time.monotonic() - started < 5:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_what_the_hub_cannot_answer_fails_the_test(tmp_path):
    with pytest.raises(AssertionError, match="GET /api/nothing: no such endpoint"):
        with Hub(tmp_path) as hub:
            assert httpx.get(hub.url + "/api/nothing", trust_env=False).status_code == 404
    with pytest.raises(ValueError, match="a bang is none of 401"):
        hub.fail("a bang")
