"""The faults that tests/hub.py can be told to have, as huggingface_hub meets them."""

import json
import threading
import time
from pathlib import Path

import httpx
import pytest
from hub import Hub, official_client
from huggingface_hub import errors
from test_hub import LARGE, SMALL, M, adds, api, commit, sha

STATUS = {"401": 401, "403": 403, "404": 404, "409": 409, "412": 412}
AGAIN = {"429": 429, "500": 500, "503": 503}


@pytest.mark.parametrize("how", [*STATUS, *AGAIN, "timeout", "reset", "lost", "short", "corrupt"])
def test_a_request_fails_as_it_is_told(tmp_path, how):
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
        hub.put(M, {"d/a.txt": b"a"})
        fault = hub.fail("503", match="/tree/", nth=2, times=3)
        for _ in range(2):
            assert api(hub).list_repo_files(M) == [".gitattributes", "d/a.txt"]
            assert [e.path for e in api(hub).list_repo_tree(M, "d")] == ["d/a.txt"]
        root, inside = (f"GET /api/models/{M}/tree/main{p}" for p in ("?recursive=true", "/d?recursive=false"))
        assert [r.line.removesuffix("&expand=false") for r in hub.requests] == [root, *[inside] * 4, root, inside]
        assert (fault.struck, waits) == (3, [1.0, 2.0, 4.0])


def test_what_was_done_stays_done_though_the_answer_was_lost(hub):
    hub.put(M, {})
    hub.fail("lost", match="/commit/")
    with pytest.raises(Exception, match="reset|disconnected"):
        commit(api(hub))
    assert hub.read(M, "m.gguf") == SMALL
    assert commit(api(hub)).oid == hub.repos[M].refs["refs/heads/main"]
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


def test_a_download_that_breaks_off_goes_on_within_the_call_and_leaves_nothing_for_the_next(lfs_hub, tmp_path):
    huge = LARGE * 8  # the client keeps what came in steps of 10 MB
    lfs_hub.put(M, {"m.gguf": huge})
    lfs_hub.fail("short", match="GET /storage")
    assert Path(api(lfs_hub).hf_hub_download(M, "m.gguf", cache_dir=tmp_path / "a")).read_bytes() == huge
    assert [r.status for r in lfs_hub.requests if "GET /storage" in r.line] == [200, 206]
    lfs_hub.fail("short", match="GET /storage", times=None)
    with pytest.raises(Exception, match="peer closed connection"):
        api(lfs_hub).hf_hub_download(M, "m.gguf", cache_dir=tmp_path / "b")
    assert not [p for p in (tmp_path / "b").rglob("*") if p.is_file() and p.stat().st_size > 1000]


def test_storage_that_keeps_wrong_bytes_is_found_by_reading_back(hub, tmp_path):
    hub.put(M, {})
    hub.fail("corrupt", match="/commit/" if hub.cas else "PUT /storage", times=None)
    api(hub).create_commit(M, adds({"m.gguf": SMALL, "x.gguf": LARGE}), commit_message="x")
    for path, content in (("m.gguf", SMALL), ("x.gguf", LARGE)):
        assert api(hub).get_paths_info(M, path)[0].lfs.sha256 == sha(content), "nothing shows from outside"
        got = Path(api(hub).hf_hub_download(M, path, cache_dir=tmp_path)).read_bytes()
        assert len(got) == len(content)
        assert got != content


def test_a_download_gets_wrong_bytes(lfs_hub, tmp_path):
    lfs_hub.put(M, {"m.gguf": SMALL})
    lfs_hub.fail("corrupt", match="GET /storage")
    got = Path(api(lfs_hub).hf_hub_download(M, "m.gguf", cache_dir=tmp_path / "a")).read_bytes()
    assert sum(a != b for a, b in zip(got, SMALL, strict=True)) == 1
    assert Path(api(lfs_hub).hf_hub_download(M, "m.gguf", cache_dir=tmp_path / "b")).read_bytes() == SMALL


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
