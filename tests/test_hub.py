"""The contract: what tests/hub.py answers is what the official clients, in Python and in JavaScript, ask and take."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get

CARD = b"---\nlicense: mit\nbase_model: a/b\n---\n# A model\n"
SMALL, LARGE = (b"GGUF\0\0" + os.urandom(n) for n in (100_000, 3_000_000))
FILES = {"README.md": CARD, "m-Q2_K.gguf": SMALL, "sub/m-Q4_K_M.gguf": LARGE}
M = "alice/m"
HUB_JS = "@huggingface/hub@2.17.5"


def api(hub, token="hf_write"):
    return HfApi(endpoint=hub.url, token=token)


def sha(content):
    return hashlib.sha256(content).hexdigest()


def adds(files):
    return [CommitOperationAdd(path, content) for path, content in files.items()]


def folder(path, files=FILES):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def lines(hub, since=0):
    return [re.sub(r"[0-9a-f]{64}", "SHA", r.line) for r in hub.requests[since:]]


def test_a_repository_is_filled_in_private_read_back_and_made_public(hub, tmp_path):
    owner, anyone = api(hub), api(hub, False)
    assert owner.create_repo(M, private=True).repo_id == M
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        owner.create_repo(M)
    assert owner.create_repo(M, exist_ok=True).repo_id == M
    owner.upload_folder(repo_id=M, folder_path=folder(tmp_path / "up"))
    info = owner.model_info(M, files_metadata=True)
    entries = {s.rfilename: (s.size, s.lfs and s.lfs.sha256) for s in info.siblings if s.rfilename != ".gitattributes"}
    assert entries == {p: (len(c), None if p == "README.md" else sha(c)) for p, c in FILES.items()}
    assert (info.private, info.card_data.license, info.sha) == (True, "mit", hub.repos[M].refs["refs/heads/main"])
    paths = [*FILES, ".gitattributes", "sub"]
    listed = {e.path: e for e in owner.list_repo_tree(M, recursive=True)}
    assert set(listed) == set(paths)
    assert listed == {e.path: e for e in owner.get_paths_info(M, [*paths, "no such"])}
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
    assert [c.title for c in owner.list_repo_commits(M)] == ["Upload folder using huggingface_hub", "initial commit"]
    owner.delete_repo(M)
    first, shown, last = [s for _, s in hub.public_history()]
    assert (first, last) == ({}, {})
    assert {p: shown[M]["refs/heads/main"][p] for p in FILES} == {p: sha(c) for p, c in FILES.items()}


def test_how_files_come_shows_in_the_requests(hub):
    hub.put(M, {})
    api(hub).create_commit(M, adds(FILES), commit_message="x")
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


def test_what_storage_has_is_not_sent_again(lfs_hub):
    lfs_hub.put(M, {"m.gguf": SMALL})
    api(lfs_hub).create_commit(M, adds({"other.gguf": SMALL}), commit_message="x")
    assert not [line for line in lines(lfs_hub) if "/storage" in line or "verify" in line]
    assert lfs_hub.read(M, "other.gguf") == SMALL


def test_what_has_not_changed_is_not_committed_again(hub):
    hub.put(M, {"a.txt": b"a"})
    for _ in range(2):
        made = api(hub).create_commit(M, adds({"a.txt": b"a", "m.gguf": SMALL}), commit_message="x")
    assert made.oid == hub.repos[M].refs["refs/heads/main"]
    assert len(hub.repos[M].commits) == 3
    assert sum("/commit/" in line for line in lines(hub)) == 1


@pytest.mark.parametrize("how", ["commit", "folder"])
def test_a_pull_request_is_filled_and_merged(hub, tmp_path, how):
    start = hub.put(M, {"old.txt": b"old", "x.gguf": LARGE})
    owner = api(hub)
    if how == "commit":
        files = {"README.md": CARD, "m.gguf": SMALL}
        made = owner.create_commit(M, adds(files), commit_message="t", create_pr=True, parent_commit=start)
    else:
        made = owner.upload_folder(repo_id=M, folder_path=folder(tmp_path / "up"), create_pr=True)
    assert made.pr_revision == "refs/pr/1"
    more = [CommitOperationDelete("old.txt"), *adds({"n.gguf": SMALL + b"n"})]
    owner.create_commit(M, more, commit_message="more", revision="refs/pr/1")
    assert "m.gguf" not in owner.list_repo_files(M)
    [pull] = owner.get_repo_discussions(M, discussion_type="pull_request", discussion_status="open")
    draft = hub.cas is not None and how == "folder"  # the streamed upload opens it empty, and so a draft
    assert (pull.num, pull.status, pull.is_pull_request) == (1, "draft" if draft else "open", True)
    if draft:
        with pytest.raises(errors.BadRequestError, match="draft"):
            owner.merge_pull_request(M, 1)
        owner.change_discussion_status(M, 1, "open")
    refs = owner.list_repo_refs(M, include_pull_requests=True)
    assert [r.ref for r in refs.pull_requests] == ["refs/pr/1"]
    assert Path(owner.hf_hub_download(M, "n.gguf", revision="refs/pr/1", cache_dir=tmp_path)).read_bytes()[-1:] == b"n"
    hub.put(M, {"new.txt": b"meanwhile"})
    owner.merge_pull_request(M, 1)
    done = owner.get_discussion_details(M, 1)
    assert (done.status, done.merge_commit_oid) == ("merged", owner.model_info(M).sha)
    assert {"new.txt", "n.gguf", "x.gguf", "README.md"} < set(owner.list_repo_files(M))
    assert "old.txt" not in owner.list_repo_files(M)


def test_a_pull_request_against_what_has_changed_is_refused(lfs_hub):
    hub, owner = lfs_hub, api(lfs_hub)
    hub.put(M, {"a.txt": b"1"})
    owner.create_commit(M, adds({"a.txt": b"2"}), commit_message="t", create_pr=True)
    hub.put(M, {"a.txt": b"3"})
    assert owner.get_discussion_details(M, 1).conflicting_files == ["a.txt"]
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        owner.merge_pull_request(M, 1)


def test_listings_come_in_pages(lfs_hub):
    lfs_hub.put(M, {f"d{n % 3}/{n}.txt": b"x" for n in range(11)})
    lfs_hub.page = 2
    entries = list(api(lfs_hub).list_repo_tree(M, recursive=True))
    assert len({e.path for e in entries}) == len(entries) == 11 + 3 + 1
    assert [e.path for e in api(lfs_hub).list_repo_tree(M, "d1")] == ["d1/1.txt", "d1/10.txt", "d1/4.txt", "d1/7.txt"]
    assert [e.path for e in api(lfs_hub).list_repo_tree(M)] == [".gitattributes", "d0", "d1", "d2"]
    assert len(api(lfs_hub).list_repo_commits(M)) == 2


def head(hub, path):
    return get_hf_file_metadata(hf_hub_url(M, path, endpoint=hub.url), token="hf_write", endpoint=hub.url)


def test_what_a_head_says(hub):
    head_commit = hub.put(M, {"README.md": CARD, "m.gguf": LARGE})
    card, file = head(hub, "README.md"), head(hub, "m.gguf")
    assert (card.etag, card.size) == (api(hub).get_paths_info(M, "README.md")[0].blob_id, len(CARD))
    assert (file.etag, file.size) == (sha(LARGE), len(LARGE))
    assert card.commit_hash == file.commit_hash == head_commit
    assert (card.location.startswith(hub.url), file.location.startswith(hub.storage)) == (True, True)


def test_a_download_goes_on_where_it_stopped(lfs_hub):
    lfs_hub.put(M, {"m.gguf": LARGE})
    file = io.BytesIO(LARGE[:1000])
    file.seek(1000)
    http_get(head(lfs_hub, "m.gguf").location, file, resume_size=1000, expected_size=len(LARGE))
    assert file.getvalue() == LARGE
    assert (lfs_hub.requests[-1].status, lfs_hub.requests[-1].sent) == (206, len(LARGE) - 1000)
    with httpx.Client(trust_env=False) as c:
        place, ranges = head(lfs_hub, "m.gguf").location, ("0-0", f"{len(LARGE)}-")
        ends = [c.get(place, headers={"Range": f"bytes={r}"}) for r in ranges]
    assert [(a.status_code, a.headers["Content-Range"], len(a.content)) for a in ends] == [
        (206, f"bytes 0-0/{len(LARGE)}", 1),
        (416, f"bytes */{len(LARGE)}", 0),
    ]


NOT_FOUND, GATED = errors.RepositoryNotFoundError, errors.GatedRepoError
READS = {
    "no repository": (404, NOT_FOUND, "hf_write", lambda a, _: a.model_info("alice/none")),
    "no repository, anonymous": (401, NOT_FOUND, False, lambda a, _: a.model_info("alice/none")),
    "private, anonymous": (401, NOT_FOUND, False, lambda a, _: a.list_repo_files("alice/private")),
    "private, of another": (404, NOT_FOUND, "hf_other", lambda a, _: a.list_repo_files("alice/private")),
    "no revision": (404, errors.RevisionNotFoundError, "hf_write", lambda a, _: a.model_info(M, revision="none")),
    "no commit": (404, errors.RevisionNotFoundError, "hf_write", lambda a, _: a.list_repo_files(M, revision="0" * 40)),
    "no file": (404, errors.RemoteEntryNotFoundError, "hf_write", lambda a, d: a.hf_hub_download(M, "no", cache_dir=d)),
    "no folder": (404, errors.RemoteEntryNotFoundError, "hf_write", lambda a, _: list(a.list_repo_tree(M, "no"))),
    "gated, anonymous": (401, GATED, False, lambda a, d: a.hf_hub_download("alice/gated", "a.txt", cache_dir=d)),
    "gated": (403, GATED, "hf_other", lambda a, d: a.hf_hub_download("alice/gated", "a.txt", cache_dir=d)),
    "wrong token": (401, errors.HfHubHTTPError, "hf_none", lambda a, _: a.model_info(M)),
    "wrong token, who": (401, errors.HfHubHTTPError, "hf_none", lambda a, _: a.whoami()),
}


@pytest.mark.parametrize("case", READS)
def test_who_may_not_read_is_told_as_by_the_real_one(lfs_hub, tmp_path, case):
    status, kind, token, read = READS[case]
    lfs_hub.put(M, {"a.txt": b"a"})
    lfs_hub.put("alice/private", {"a.txt": b"a"}, private=True)
    lfs_hub.put("alice/gated", {"a.txt": b"a"})
    lfs_hub.repos["alice/gated"].gated = "auto"
    with pytest.raises(kind) as e:
        read(api(lfs_hub, token), tmp_path)
    assert type(e.value) is kind
    assert e.value.response.status_code == status


def commit(a, repo=M, **more):
    return a.create_commit(repo, adds({"m.gguf": SMALL}), commit_message="x", **more)


WRITES = {
    "all with a write token": ("hf_write", {"create": 200, "commit": 200, "pull": 200, "publish": 200}),
    "all with a fine-grained one": ("hf_fine", {"create": 200, "commit": 200, "pull": 200, "publish": 200}),
    "nothing with a read token": ("hf_read", {"create": 403, "commit": 403, "pull": 403, "publish": 403}),
    "nothing with a narrow one": ("hf_narrow", {"create": 403, "commit": 403, "pull": 403, "publish": 403}),
    "a pull request to others": ("hf_other", {"create": 403, "commit": 403, "pull": 200, "publish": 403}),
    "nothing without a token": (False, {"create": 401, "commit": 401, "pull": 401, "publish": 401}),
}


@pytest.mark.parametrize("case", WRITES)
def test_who_may_write(lfs_hub, case):
    token, expected = WRITES[case]
    lfs_hub.put(M, {}), lfs_hub.put("lab/m", {})
    a, statuses = api(lfs_hub, token), {}
    tries = {"create": lambda: a.create_repo("alice/new"), "commit": lambda: commit(a)}
    tries |= {"pull": lambda: commit(a, create_pr=True), "publish": lambda: a.update_repo_settings(M, private=True)}
    for name, go in tries.items():
        try:
            go()
            statuses[name] = 200
        except errors.HfHubHTTPError as e:
            statuses[name] = e.response.status_code
    assert statuses == expected
    assert lfs_hub.repos[M].private == (expected["publish"] == 200)


def test_who_somebody_is(lfs_hub):
    who = api(lfs_hub, "hf_fine").whoami()
    assert (who["name"], who["auth"]["accessToken"]["role"]) == ("alice", "fineGrained")
    [scope] = who["auth"]["accessToken"]["fineGrained"]["scoped"]
    assert (scope["entity"]["name"], "repo.write" in scope["permissions"]) == ("alice", True)
    orgs = {
        t: [(o["name"], o["roleInOrg"]) for o in api(lfs_hub, t).whoami()["orgs"]] for t in ("hf_write", "hf_other")
    }
    assert orgs == {"hf_write": [("lab", "admin")], "hf_other": [("lab", "read")]}
    assert api(lfs_hub).create_repo("lab/new").repo_id == "lab/new"
    with pytest.raises(errors.HfHubHTTPError, match="403"):
        api(lfs_hub, "hf_other").create_repo("lab/other")


def test_a_commit_on_something_else_is_refused(hub):
    old = hub.put(M, {"a.txt": b"1"})
    new = hub.put(M, {"a.txt": b"2"})
    with pytest.raises(errors.HfHubHTTPError, match="A commit has happened since") as e:
        commit(api(hub), parent_commit=old)
    assert e.value.response.status_code == 412
    assert hub.repos[M].commits[commit(api(hub), parent_commit=new).oid].parent == new


def test_storage_refuses_what_was_not_announced(lfs_hub):
    lfs_hub.put(M, {})
    with httpx.Client(trust_env=False, headers={"Authorization": "Bearer hf_write"}) as c:
        batch = {"operation": "upload", "objects": [{"oid": sha(SMALL), "size": len(SMALL)}]}
        [answer] = c.post(f"{lfs_hub.url}/{M}.git/info/lfs/objects/batch", json=batch).json()["objects"]
        place, verify = (answer["actions"][n]["href"] for n in ("upload", "verify"))
        line = {"key": "lfsFile", "value": {"path": "m.gguf", "algo": "sha256", "oid": sha(SMALL), "size": len(SMALL)}}
        body = json.dumps({"key": "header", "value": {"summary": "x"}}) + "\n" + json.dumps(line)
        unsigned = {"Authorization": ""}
        place_of_commits = f"{lfs_hub.url}/api/models/{M}/commit/main"
        assert c.post(place_of_commits, content=body).status_code == 400
        assert c.put(place, content=SMALL).status_code == 400, "with a token"
        assert c.put(place[:-1], content=SMALL, headers=unsigned).status_code == 403, "with another signature"
        assert c.put(place, content=SMALL[:-1], headers=unsigned).status_code == 400, "too short"
        assert c.put(place, content=SMALL[:-1] + b"?", headers=unsigned).status_code == 400, "other bytes"
        assert c.post(verify, json=batch["objects"][0]).status_code == 404
        batch["objects"][0]["size"] += 1
        c.post(f"{lfs_hub.url}/{M}.git/info/lfs/objects/batch", json=batch)
        assert c.put(place, content=SMALL, headers=unsigned).status_code == 400, "announced as longer"
        batch["objects"][0]["size"] -= 1
        c.post(f"{lfs_hub.url}/{M}.git/info/lfs/objects/batch", json=batch)
        assert c.put(place, content=SMALL, headers=unsigned).status_code == 200
        assert c.post(verify, json=batch["objects"][0]).status_code == 200
        assert (
            c.post(f"{lfs_hub.url}/api/models/{M}/commit/main", content=body.replace("100", "101")).status_code == 400
        )
        assert c.post(f"{lfs_hub.url}/api/models/{M}/commit/main", content=body).status_code == 200
    assert lfs_hub.read(M, "m.gguf") == SMALL


def test_a_card_that_is_no_yaml_is_refused(lfs_hub):
    lfs_hub.put(M, {})
    with pytest.raises(ValueError, match=r"Invalid metadata in README.md"):
        api(lfs_hub).create_commit(M, adds({"README.md": b"---\na: [\n---\n"}), commit_message="x")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api(lfs_hub).create_commit(M, adds({"README.md": b"# nothing\n"}), commit_message="x")


def test_whatever_was_public_at_any_time_is_known(hub):
    api(hub).create_repo(M, private=True)
    api(hub).create_commit(M, adds({"secret.txt": b"?"}), commit_message="x")
    api(hub).create_commit(M, [CommitOperationDelete("secret.txt")], commit_message="x")
    api(hub).update_repo_settings(M, private=False)
    commit(api(hub), create_pr=True)
    api(hub).update_repo_settings(M, private=True)
    states = [s for _, s in hub.public_history()]
    assert [{ref: sorted(f) for ref, f in s.get(M, {}).items()} for s in states] == [
        {},
        {"refs/heads/main": [".gitattributes"]},
        {"refs/heads/main": [".gitattributes"], "refs/pr/1": [".gitattributes", "m.gguf"]},
        {},
    ]


@pytest.fixture(scope="session")
def js_folder(request):
    """A folder with the client in its node_modules: MOELIB_HUB_JS, or one in pytest's cache that npm fills."""
    if not (node := shutil.which("node")):
        pytest.skip("no node: the JavaScript client of the Hub is not tried")
    where = Path(os.environ.get("MOELIB_HUB_JS") or request.config.cache.mkdir("hub-js"))
    package = where / "node_modules/@huggingface/hub/package.json"
    if not package.exists() and (npm := shutil.which("npm")):
        ask = [npm, "install", "--prefix", where, "--ignore-scripts", "--no-audit", "--fetch-retries=0", HUB_JS]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(ask, capture_output=True, timeout=60)
    if not package.exists():
        pytest.skip(f"npm could not install {HUB_JS}: the JavaScript client of the Hub is not tried")
    return node, where


def test_the_javascript_client_gets_along(lfs_hub, tmp_path, js_folder):
    node, where = js_folder
    script = (
        Path(__file__).with_name("hub_client.mjs").read_text(encoding="utf-8")
    )  # as text, so that it finds the package in `where`
    run = [node, "--input-type=module", "-e", script, lfs_hub.url, str(folder(tmp_path))]
    done = subprocess.run(run, cwd=where, capture_output=True, text=True, timeout=60, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert (out["who"], out["created"]) == ("alice", f"{lfs_hub.url}/alice/js")
    assert {e["path"] for e in out["listed"]} == {*FILES, "sub", ".gitattributes"}
    listed = {e["path"]: (e["size"], e.get("lfs", {}).get("oid")) for e in out["infos"]}
    assert listed == {p: (len(c), None if p == "README.md" else sha(c)) for p, c in FILES.items()}
    assert out["sizes"] == [[p, True, len(c)] for p, c in FILES.items()]
    assert (out["part"], out["missing"], out["exists"], out["info"]) == ("GGUF", None, [True, False], True)
    assert out["pull"] == f"{lfs_hub.url}/alice/js/discussions/1"
    titles = ["Delete m-Q2_K.gguf", "upload 1", "upload 0", "initial commit"]
    assert out["commits"] == titles, "this client commits what has not changed"
    assert out["codes"] == [409, 401, 401, 403, 412]
    assert "alice/js" not in lfs_hub.repos
