"""What a Hub on loopback (tests/hub.py) answers to those who write: uploads, storage, commits, pull requests."""

import base64
import hashlib
import json

from hub_api import MODEL, READ, REPO, REV, front_matter, object_id, ranged, right_to_write, route
from hub_state import DISCUSS, LFS_RULE, MAX_REGULAR, WRITE, Discussion, Entry, Refused, regular, wrong

OBJECT = "/storage" + REPO + "/(?P<sha>[0-9a-f]{64})"


def _target(hub, ask):
    """(repository, ref, its commit) that is to be written to."""
    repo = hub.repo(ask, right_to_write(ask))
    ref, commit = repo.find(ask.rev)
    if ref is None:
        raise Refused(404, f"Invalid rev id: {ask.rev}", "RevisionNotFound")
    return repo, ref, commit


@route("POST", MODEL + f"/preupload{REV}")
def preupload(hub, ask):
    _, _, commit = _target(hub, ask)
    answers = []
    for f in json.loads(ask.body)["files"]:
        lfs = hub.is_lfs(commit.files, f["path"], f["size"], base64.b64decode(f["sample"]))
        answers.append({"path": f["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
        if e := commit.files.get(f["path"]):  # by this the Python client leaves out what has not changed
            answers[-1]["oid"] = e.sha256 if e.lfs else e.oid
    return {"files": answers, "commitOid": commit.id}


@route("POST", REPO + r"\.git/info/lfs/objects/batch")
def lfs_batch(hub, ask):
    asked = json.loads(ask.body)
    ask.rev = (asked.get("ref") or {"name": "refs/pr/"})["name"]  # clients leave it out for a pull request to come
    repo, objects = hub.repo(ask, right_to_write(ask)), []
    for o in asked["objects"]:
        sha, size = o["oid"], o["size"]
        objects.append({"oid": sha, "size": size})
        if sha not in repo.objects:
            hub.uploads[repo.id, sha] = size
            verify = {"href": f"{hub.url}/{repo.id}.git/info/lfs/objects/verify"}
            objects[-1]["actions"] = {"upload": _upload(hub, f"/storage/{repo.id}/{sha}", size), "verify": verify}
    several = any("chunk_size" in str(o) for o in objects)
    return {"transfer": "multipart" if several else "basic", "objects": objects}


def _upload(hub, place, size):
    if size <= hub.part_bytes:
        return {"href": hub.signed(hub.storage, place)}
    parts = range(1, -(-size // hub.part_bytes) + 1)
    header = {f"{n:05}": hub.signed(hub.storage, place, part=n) for n in parts}
    return {
        "href": hub.signed(hub.url, "/api/complete_multipart", place=place),
        "header": header | {"chunk_size": str(hub.part_bytes)},
    }


@route("POST", REPO + r"\.git/info/lfs/objects/verify")
def lfs_verify(hub, ask):
    repo, asked = hub.repo(ask, DISCUSS), json.loads(ask.body)
    if hub.stored(repo, asked["oid"]) != asked["size"]:
        raise Refused(404, f"{asked['oid']} of {asked['size']} bytes is not in storage")
    return {}


@route("PUT", OBJECT)
def storage_put(hub, ask):
    _only_signed(hub, ask)
    if ask.how == "corrupt":
        hub.rotten.add(ask.url)
    if part := ask.query.get("part"):
        hub.parts.setdefault(ask.url, {})[int(part)] = ask.body
    else:
        _store(hub, ask.url, ask.body)
    return 200, b"", {"ETag": f'"{hashlib.md5(ask.body).hexdigest()}"'}


@route("POST", "/api/complete_multipart")
def lfs_complete(hub, ask):
    place = ask.query["place"]
    parts = hub.parts.get(place, {})
    etags = {p["partNumber"]: p["etag"].strip('"') for p in json.loads(ask.body)["parts"]}
    if not ask.signed or etags != {n: hashlib.md5(p).hexdigest() for n, p in parts.items()}:
        raise Refused(400, "InvalidPart: one or more of the parts could not be found")
    _store(hub, place, b"".join(parts[n] for n in sorted(parts)))
    return {"success": True}


def _store(hub, place, content):
    """Keep an upload if it is what was announced."""
    repo, _, sha = place.removeprefix("/storage/").rpartition("/")
    if len(content) != hub.uploads.get((repo, sha)) or hashlib.sha256(content).hexdigest() != sha:
        raise Refused(400, f"BadDigest: these {len(content)} bytes are not the announced {sha}")
    hub.repos[repo].objects[sha] = wrong(content) if place in hub.rotten else content


@route("GET|HEAD", OBJECT)
def storage_get(hub, ask):
    _only_signed(hub, ask)
    content = hub.content(hub.repos[ask.repo], Entry(0, ask.sha))
    return ranged(ask, wrong(content) if ask.how == "corrupt" else content, {"ETag": f'"{ask.sha}"'})


def _only_signed(hub, ask):
    if ask.said:
        raise Refused(400, "InvalidArgument: only one auth mechanism is allowed")
    if not ask.signed or ask.repo not in hub.repos:
        raise Refused(403, "SignatureDoesNotMatch")


@route("POST", MODEL + f"/commit{REV}")
def commit(hub, ask):
    repo, ref, head = _target(hub, ask)
    header, *lines = [json.loads(line) for line in ask.body.splitlines() if line.strip()]
    said, user = header["value"], ask.token.user
    parent, is_new = said.get("parentCommit"), ask.query.get("create_pr") == "1"
    if parent and is_new:
        head = repo.find(parent)[1]
    elif parent and not head.id.startswith(parent):
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines:
        _apply(hub, repo, files, line["key"], line["value"])
    card = files.get("README.md")
    if card and not card.lfs and (error := front_matter(card.content.decode())[0]):
        raise Refused(400, f"Invalid metadata in README.md: {error}")
    title, text = said["summary"], said.get("description") or ""
    if is_new:
        ref = _open(hub, repo, title, text, user, "open", ref, head).ref
    made = hub.commit(repo, ref, files, title, text, user)
    pull = next((d for d in repo.discussions if d.ref == ref), None)
    if pull:
        _note(hub, pull, "commit", user, {"subject": title, "oid": made.id})
    if ask.how == "corrupt":
        hub.damage_xet()
    answer = {"success": True, "commitOid": made.id, "commitUrl": f"{hub.url}/{repo.id}/commit/{made.id}"}
    return answer | {"hookOutput": ""} | ({"pullRequestUrl": _url(hub, repo, pull)} if is_new else {})


def _apply(hub, repo, files, key, value):
    """Do one line of a commit to `files`. A file that stays as it was is no error: that makes an empty commit."""
    path = value["path"]
    if key == "file":
        text = value["content"]
        files[path] = regular(base64.b64decode(text) if value.get("encoding") == "base64" else text.encode())
        if files[path].size > MAX_REGULAR:
            raise Refused(400, f"Your push was rejected because it contains files larger than 10 MiB: {path}")
    elif key == "lfsFile":
        size = hub.stored(repo, value["oid"])
        if size is None or value.get("size", size) != size:
            reason = "an LFS pointer pointed to a file that does not exist"
            raise Refused(400, f"Your push was rejected because {reason}. Offending file: - {path}")
        if not hub.is_lfs(files, path):
            rules = files[".gitattributes"].content if ".gitattributes" in files else b""
            files[".gitattributes"] = regular(rules + (path + LFS_RULE).encode())
        files[path] = Entry(size, value["oid"])
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
    elif key == "deletedFolder":
        for p in [p for p in files if p.startswith(path.rstrip("/") + "/")]:
            del files[p]
    else:
        raise Refused(400, f"no such operation: {key}")


# discussions and pull requests


def _open(hub, repo, title, text, user, status, base=None, head=None):
    d = Discussion(len(repo.discussions) + 1, title, user, status, hub.now(), base, head and head.id)
    repo.discussions.append(d)
    if base:
        repo.refs[d.ref] = head.id
    _comment(hub, d, user, text)
    return d


def _comment(hub, d, user, text):
    latest = {"raw": text, "html": "", "updatedAt": hub.now(), "author": {"name": user}}
    return _note(hub, d, "comment", user, {"edited": False, "hidden": False, "latest": latest, "history": [latest]})


def _note(hub, d, kind, user, data):
    event = {
        "id": object_id(f"{d.num} {len(d.events)}"),
        "type": kind,
        "createdAt": hub.now(),
        "author": {"name": user},
    }
    d.events.append(event | {"data": data})
    return d.events[-1]


def _set_status(hub, d, user, status):
    d.status = status
    return _note(hub, d, "status-change", user, {"status": status})


def _url(hub, repo, d):
    return f"{hub.url}/{repo.id}/discussions/{d.num}"


def _summary(repo, d):
    summary = {"num": d.num, "title": d.title, "status": d.status, "author": {"name": d.author}, "createdAt": d.date}
    return summary | {"isPullRequest": d.base is not None, "repo": {"name": repo.id, "type": "model"}}


@route("GET", MODEL + "/discussions")
def discussions(hub, ask):
    repo, q = hub.repo(ask), ask.query
    kind, status, start = q.get("type", "all"), q.get("status", "all"), int(q.get("p", 0)) * hub.page
    wanted = [
        _summary(repo, d)
        for d in reversed(repo.discussions)
        if kind in ("all", "pull_request" if d.base else "discussion")
        and status in ("all", "open" if d.status in ("open", "draft") else "closed")
    ]
    return {"discussions": wanted[start : start + hub.page], "count": len(wanted), "start": start}


@route("POST", MODEL + "/discussions")
def open_discussion(hub, ask):
    repo, asked = hub.repo(ask, DISCUSS), json.loads(ask.body)
    pull = ("draft", *repo.find("main")) if asked.get("pullRequest") else ("open",)
    d = _open(hub, repo, asked["title"], asked["description"], ask.token.user, *pull)
    return {"num": d.num, "url": _url(hub, repo, d), "pullRequest": bool(d.base)}


def _discussion(hub, ask, right=READ):
    repo = hub.repo(ask, right)
    if not 1 <= int(ask.num) <= len(repo.discussions):
        raise Refused(404, "Discussion not found")
    return repo, repo.discussions[int(ask.num) - 1]


@route("GET", MODEL + r"/discussions/(?P<num>\d+)")
def discussion(hub, ask):
    repo, d = _discussion(hub, ask)
    answer = _summary(repo, d) | {"events": d.events}
    if d.base:
        answer["changes"] = {"base": d.base} | ({"mergeCommitId": d.merged} if d.merged else {})
        answer |= {"filesWithConflicts": _changes(repo, d)[1], "diff": ""}
    return answer


@route("POST", MODEL + r"/discussions/(?P<num>\d+)/comment")
def comment(hub, ask):
    _, d = _discussion(hub, ask, DISCUSS)
    return {"newMessage": _comment(hub, d, ask.token.user, json.loads(ask.body)["comment"])}


@route("POST", MODEL + r"/discussions/(?P<num>\d+)/status")
def change_status(hub, ask):
    _, d = _discussion(hub, ask, DISCUSS)
    return {"newStatus": _set_status(hub, d, ask.token.user, json.loads(ask.body)["status"])}


def _changes(repo, d):
    """({path: new file, or None for a deleted one} of a pull request, the paths in conflict with its base)."""
    start, base, ours = repo.commits[d.start].files, repo.files(d.base), repo.files(d.ref)
    changes = {p: ours.get(p) for p in start.keys() | ours.keys() if start.get(p) != ours.get(p)}
    return changes, sorted(p for p, e in changes.items() if base.get(p) not in (start.get(p), e))


@route("POST", MODEL + r"/discussions/(?P<num>\d+)/merge")
def merge(hub, ask):
    repo, d = _discussion(hub, ask, WRITE)
    if not d.base or d.status != "open":
        raise Refused(400, f"This is {d.status}: only an open pull request can be merged")
    changes, conflicts = _changes(repo, d)
    if conflicts:
        raise Refused(409, f"Conflicts in {', '.join(conflicts)}")
    files = {p: e for p, e in (repo.files(d.base) | changes).items() if e}
    d.merged = hub.commit(repo, d.base, files, f"{d.title} (#{d.num})", "", ask.token.user).id
    _set_status(hub, d, ask.token.user, "merged")
    return {}
