"""Publication to a Hub on loopback: the plan, the upload, the verification; and under faults."""

import os
import re

import publishing
import pytest
import rehearsal
from conftest import furnish
from hub_state import wrong
from publishing import SPACE, go, loopback_hub, visible, wanted

from moelib.catalogue import params
from moelib.machine import process
from moelib.models import quantize
from moelib.models.hub import HubError
from moelib.publish import cards, upload
from moelib.publish.upload import PublishError

pytestmark = pytest.mark.engine
REPO = f"{SPACE}/deepseek-moe-16b-random-weights"


@pytest.fixture(scope="module")
def results(tmp_path_factory, models_folder):
    home = tmp_path_factory.mktemp("publish")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELIB_HOME", str(furnish(home / "home")))
        patch.setenv("MOELIB_MODELS", str(models_folder))
        patch.delenv("MOELIB_OUTPUTS", raising=False)
        yield publishing.measured(home / "home")
    params._yaml.cache_clear()


@pytest.fixture(params=["lfs", "xet"])
def server(request, tmp_path):
    with loopback_hub(tmp_path, request.param == "xet") as server:
        yield server


def writes(requests):
    """Requests that change something on the Hub."""
    return [r.line for r in requests if r.method != "GET" and r.method != "HEAD"]


def test_a_plan_says_everything_and_touches_nothing(results, server):
    (plan,) = upload.plan(results, SPACE, None, server.url)
    text = plan.text()
    (manifest,) = results.manifests
    assert f"{REPO} (new, to stay private)" in text
    assert f"{manifest.file_bytes:,}  {manifest.sha256}  {manifest.file_name}" in text
    assert [i.name for i in plan.items] == [manifest.file_name, "README.md", "Q8_0.md", "SHA256SUMS", "provenance.json"]
    assert "2 commits, 5 files" in text
    assert "1. Add deepseek-moe-16b-Q8_0.gguf" in text
    assert "2. Cards: README.md" in text
    assert writes(server.requests) == []
    assert server.repos == {}


def test_without_a_hub_the_plan_stands_and_says_so(results):
    (plan,) = upload.plan(results, SPACE, None, "http://127.0.0.1:9")
    assert "what is there is not known" in plan.text()
    assert len(plan.changes) == 5


def test_what_is_public_in_the_end_is_what_was_measured(results, server):
    progress = go(results, server)
    repo = server.repos[REPO]
    assert not repo.private
    assert visible(server)[-1] == wanted(results)
    assert [c for c in visible(server) if c] == [wanted(results)]  # at no time anything else
    titles = [c.title for c in repo.commits.values() if c.title.startswith(("Add", "Cards"))]
    assert titles == ["Add deepseek-moe-16b-Q8_0.gguf", "Cards: README.md, Q8_0.md, SHA256SUMS, provenance.json"]
    assert progress[-1] == f"{REPO}: public, 5 files verified"
    assert sum("reading back" in line for line in progress) == 5


def test_random_weights_stay_private(results, server):
    go(results, server, public=None)
    assert server.repos[REPO].private
    assert visible(server)[-1] == {}
    server.repos[REPO].private = False
    with pytest.raises(PublishError, match="is public, and what is published now is to stay private"):
        go(results, server, public=None)


@pytest.mark.parametrize(
    "url", ["https://huggingface.co", "https://127.0.0.1.example", "http://127.0.0.2.nip.example:80"]
)
def test_random_weights_are_public_on_no_hub_but_one_of_this_machine(results, monkeypatch, url):
    monkeypatch.setattr(cards, "build", lambda *_: pytest.fail("refused before anything is done"))
    with pytest.raises(PublishError, match=r"files has geometry twins, .* random: they are not made public on a Hub"):
        upload.plan(results, SPACE, True, url)


def test_unchanged_content_makes_no_commit(results, server):
    go(results, server)
    before, commits = len(server.requests), list(server.repos[REPO].commits)
    (plan,) = upload.plan(results, SPACE, True, server.url)
    assert "0 commits, 0 files, 0 bytes to send" in plan.text()
    assert plan.text().count("  same ") == 5
    assert go(results, server) == [f"{REPO}: public already, nothing to do"]
    assert list(server.repos[REPO].commits) == commits
    assert writes(server.requests[before:]) == []


def test_a_public_repository_changes_by_a_pull_request_alone(results, server):
    go(results, server)
    for merged in (1, 2):  # an earlier one, which is merged, is not taken up again
        server.put(REPO, {"README.md": b"---\nlicense: mit\n---\n# old\n", "theirs.txt": b"kept\n"})
        (plan,) = upload.plan(results, SPACE, True, server.url)
        assert re.search(r"changed .*  README.md\n", plan.text())
        assert re.search(r"left .*  theirs.txt\n", plan.text())
        before, count = visible(server)[-1], len(server.public_history())
        go(results, server)
        assert [request.status for request in server.repos[REPO].discussions] == ["merged"] * merged
        goal = {REPO: wanted(results)[REPO] | {"theirs.txt": server.repos[REPO].files()["theirs.txt"].sha256}}
        assert visible(server)[-1] == goal
        assert [state for state in visible(server)[count:] if state not in (before, goal)] == []


def test_what_another_changes_meanwhile_is_not_shown(results, server):
    def meddle(line):
        if "reading back provenance.json" in line:  # the last one
            server.put(REPO, {"README.md": b"---\nlicense: mit\n---\n# something else\n"})

    with pytest.raises(PublishError, match=r"is private, and README.md not as verified"):
        upload.publish(upload.plan(results, SPACE, True, server.url), meddle, server.url)
    assert visible(server)[-1] == {}


def test_the_token_reaches_no_engine(results, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "hf_secret")
    assert "hf_secret" not in str(process.environment(tmp_path)) + str(process.inherited())


def test_what_the_hub_gives_back_wrong_is_never_public(results, server):
    server.fail("corrupt", match=r"^PUT |^POST /api/models/.*/commit", times=1)
    with pytest.raises(PublishError, match=r"was read back with SHA-256 .*Nothing was made public"):
        go(results, server)
    assert visible(server)[-1] == {}


def test_a_file_that_was_not_measured_is_not_published(results, server, tmp_path, monkeypatch):
    (manifest,) = results.manifests
    content = quantize.place(manifest).read_bytes()
    changed = tmp_path / "m" / manifest.model / f"twin-{manifest.scale}" / manifest.file_name
    changed.parent.mkdir(parents=True)
    changed.write_bytes(wrong(content))
    monkeypatch.setenv("MOELIB_MODELS", str(tmp_path / "m"))
    with pytest.raises(cards.CardError, match=r"has SHA-256 \w+, but files measured"):
        go(results, server)
    changed.unlink()
    with pytest.raises(PublishError, match=r"moelib quantize.*MOELIB_MODELS"):
        go(results, server)
    assert server.requests == []


def test_a_file_that_changes_meanwhile_is_not_sent(results, server, tmp_path, monkeypatch):
    plans = upload.plan(results, SPACE, True, server.url)
    (model,) = [i for i in plans[0].items if i.is_model]
    path = tmp_path / "swapped.gguf"
    path.write_bytes(wrong(model.content.read_bytes()))
    items = tuple(upload.Item(i.name, path if i is model else i.content, i.nbytes, i.sha256) for i in plans[0].items)
    plans[0] = upload.Plan(plans[0].repository, plans[0].title, items, True)
    with pytest.raises(PublishError, match="changed while it was being published"):
        upload.publish(plans, print, server.url)
    assert visible(server)[-1] == {}


@pytest.mark.parametrize(
    ("token", "space", "why"),
    [
        ("hf_read", "alice", "reads only"),
        ("hf_other", "alice", "is bob's, who may not write to alice"),
        ("hf_other", "lab", "is bob's, who may not write to lab"),
        ("hf_narrow", "alice", "has no right to write to repositories of alice"),
        ("hf_write", "nobody", "may not write to nobody"),
    ],
)
def test_a_token_without_the_right_is_told_before_anything(results, server, monkeypatch, token, space, why):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PublishError, match=why) as caught:
        upload.publish(upload.plan(results, space, True, server.url), print, server.url)
    assert token not in str(caught.value)
    assert writes(server.requests) == []


@pytest.mark.parametrize(("token", "space"), [("hf_fine", "alice"), ("hf_write", "lab")])
def test_a_fine_token_and_an_organisation_may(results, server, monkeypatch, token, space):
    monkeypatch.setenv("HF_TOKEN", token)
    upload.publish(upload.plan(results, space, True, server.url), print, server.url)
    assert not server.repos[REPO.replace(SPACE, space)].private


def test_no_token_says_how_to_log_in(results, server, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="hf auth login"):
        go(results, server)
    assert writes(server.requests) == []


def test_an_interrupted_publication_sends_no_finished_file_again(results, server):
    def stop(line):
        if "Cards:" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upload.publish(upload.plan(results, SPACE, True, server.url), stop, server.url)
    assert server.repos[REPO].private
    (plan,) = upload.plan(results, SPACE, True, server.url)
    assert [i.is_model for i in plan.changes] == [False] * 4
    before = len(server.requests)
    go(results, server)
    (size,) = [i.nbytes for i in plan.items if i.is_model]
    assert sum(r.received for r in server.requests[before:]) < size / 4
    assert visible(server)[-1] == wanted(results)


def test_a_file_that_the_hub_lists_with_another_hash_is_not_shown(results, server, monkeypatch):
    """Its bytes come back right: what others would be served may still be what the list says."""
    honest, back = upload._listing, upload._read_back

    def read_back(*args):
        with monkeypatch.context() as patch:
            wrong = {results.manifests[0].file_name: "0" * 64}
            patch.setattr(upload, "_listing", lambda *where: honest(*where) | wrong)
            back(*args)

    monkeypatch.setattr(upload, "_read_back", read_back)
    with pytest.raises(PublishError, match="was read back with SHA-256"):
        go(results, server)
    assert server.repos[REPO].private
    assert not [shown for shown in visible(server) if shown]


@pytest.mark.parametrize("scene", publishing.SCENES, ids=str)
def test_whatever_fails_nothing_partial_is_public(results, tmp_path, scene):
    injected, safe, wrongs = publishing.campaign(results, tmp_path, scene, every=37, first=os.getpid())
    assert wrongs == []
    assert injected.total() > 10
    assert injected == safe


UNSAFE = {
    "nothing is read back": ("_read_back", lambda *_: None, "wrong bytes became public"),
    "an error of another kind": ("_listing", lambda *_: [][1], "BUG: IndexError"),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_the_campaign_finds_what_is_not_safe(results, tmp_path, monkeypatch, name):
    function, instead, finding = UNSAFE[name]
    scene = publishing.SCENES[0]
    todo = [c for c in publishing.cases(results, tmp_path, scene) if c.how == "corrupt" and c.line.startswith("PUT")]
    monkeypatch.setattr(upload, function, instead)
    assert re.search(finding, publishing.judge(results, tmp_path, scene, todo[0])[0])


def test_the_campaign_finds_a_repository_that_is_public_too_soon(results, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    create, scene = HfApi.create_repo, publishing.SCENES[0]
    case = publishing.Case("500", 1, 1, "any")
    assert publishing.judge(results, tmp_path, scene, case)[0] is None
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **how: create(self, name, **how | {"private": False}))
    assert "showed []" in publishing.judge(results, tmp_path, scene, case)[0]


def test_the_rehearsal_sends_every_byte_once(results, tmp_path):
    text, sent = rehearsal.rehearse("files", tmp_path, stop_at=1)
    (manifest,) = results.manifests
    assert sent == (0, manifest.file_bytes, 0)
    assert "nothing was changed; add --yes to upload" in text
    assert "interrupted; what is finished is kept, run the same command to go on" in text
    assert f"{REPO}: public, 5 files verified" in text
    assert publishing.TOKEN not in text
