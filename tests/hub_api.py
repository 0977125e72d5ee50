"""What a Hub on loopback (tests/hub.py) answers: a function for each endpoint that the official clients ask.

Each takes the hub and what is asked (method, url, query, headers, body, token, the names in its pattern), and returns
what goes back as JSON, or (status, body, headers).
"""

import base64
import hashlib
import json
import re
from urllib.parse import parse_qs, urlencode

import yaml
from hub_state import (
    ANONYMOUS,
    DISCUSS,
    LFS_RULE,
    MAX_REGULAR,
    READ,
    WRITE,
    Discussion,
    Entry,
    Refused,
    regular,
    wrong,
)

REPO = r"/(?P<repo>[\w.-]+/[\w.-]+)"
MODEL = "/api/models" + REPO
REV = r"/(?P<rev>[^/]+)"
OBJECT = "/storage" + REPO + "/(?P<sha>[0-9a-f]{64})"
ROUTES = []


def route(methods, pattern):
    def keep(function):
        ROUTES.append((methods.split("|"), re.compile(pattern), function))
        return function

    return keep


def _id(name):
    return hashlib.sha256(name.encode()).hexdigest()[:24]


# accounts and repositories


@route("GET", "/api/whoami-v2")
def whoami(hub, ask):
    if not ask.token:
        raise Refused(*ANONYMOUS)
    user, role = ask.token.user, ask.token.role
    token = {"displayName": "of a test", "role": role, "createdAt": "2026-01-01T00:00:00.000Z"}
    if role == "fineGrained":
        kinds = {s: "model" if "/" in s else "org" if s in hub.orgs else "user" for s in ask.token.scopes}
        scoped = [
            {"entity": {"_id": _id(s), "type": kinds[s], "name": s}, "permissions": list(p)}
            for s, p in ask.token.scopes.items()
        ]
        token["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
    orgs = [_account("org", o) | {"roleInOrg": roles[user]} for o, roles in hub.orgs.items() if user in roles]
    return _account("user", user) | {"orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}


def _account(kind, name):
    account = {"type": kind, "id": _id(name), "name": name, "fullname": name.title(), "email": None}
    return account | {"canPay": False, "periodEnd": None, "avatarUrl": f"/avatars/{_id(name)}.svg"}


def _named(ask):
    """What the body of a request says, with the repository that it names as the one asked for."""
    asked = json.loads(ask.body)
    if not ask.token:
        raise Refused(*ANONYMOUS)
    ask.repo = f"{asked.get('organization') or ask.token.user}/{asked['name']}"
    return asked


def _is_private(asked):
    return asked.get("private", False) or asked.get("visibility") == "private"


@route("POST", "/api/repos/create")
def create_repo(hub, ask):
    private, namespace = _is_private(_named(ask)), ask.repo.split("/")[0]
    url = {"url": f"{hub.url}/{ask.repo}", "name": ask.repo, "id": _id(ask.repo)}
    if not hub.may(ask.token, ask.repo, WRITE):
        raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    if ask.repo in hub.repos:
        raise Refused(409, f"You already created this model repo: {ask.repo}", more=url)
    hub.create(ask.repo, private, ask.token.user)
    return url


@route("DELETE", "/api/repos/delete")
def delete_repo(hub, ask):
    _named(ask)
    del hub.repos[hub.repo(ask, WRITE).id]
    return {}


@route("PUT", MODEL + "/settings")
def settings(hub, ask):
    repo, asked = hub.repo(ask, WRITE), json.loads(ask.body)
    if "visibility" in asked or "private" in asked:
        repo.private = _is_private(asked)
    repo.gated = asked.get("gated", repo.gated)
    return {"private": repo.private, "gated": repo.gated}


@route("GET", MODEL + "/auth-check(?P<write>/write)?")
def auth_check(hub, ask):
    hub.repo(ask, WRITE if ask.write else READ, content=True)
    return {}


@route("POST", "/api/validate-yaml")
def validate_yaml(hub, ask):
    error, data = _front_matter(json.loads(ask.body)["content"])
    if error:
        raise Refused(400, error, more={"errors": [{"message": error}], "warnings": []})
    return {"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata in repo card"}]}


def _front_matter(text):
    """(what is wrong, what it says) of the YAML at the top of a card."""
    found = re.match(r"\s*---\r?\n(.*?)\n---\s*(\n|$)", text, re.S)
    try:
        data = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as e:
        return f"invalid YAML: {e}", None
    return (None, data) if data is None or isinstance(data, dict) else ("the metadata is no mapping", None)


# reading


@route("GET", MODEL + f"(/revision{REV})?")
def model_info(hub, ask):
    repo = hub.repo(ask)
    commit = repo.find(ask.rev or "main")[1]
    siblings = [{"rfilename": path} for path in commit.files]
    if "blobs" in ask.query:
        for said, e in zip(siblings, commit.files.values(), strict=True):
            said |= {"blobId": e.oid, "size": e.size} | ({"lfs": _lfs("sha256", e)} if e.lfs else {})
    card = commit.files.get("README.md")
    info = {"_id": _id(repo.id), "id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "sha": commit.id}
    info |= {"private": repo.private, "gated": repo.gated, "disabled": False, "createdAt": repo.created}
    info |= {"lastModified": commit.date, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}
    return info | {"cardData": _front_matter(card.content.decode())[1] if card and not card.lfs else None}


@route("GET", MODEL + "/refs")
def refs(hub, ask):
    found = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    kinds = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
    for ref, commit in hub.repo(ask).refs.items():
        prefix = next(k for k in kinds if ref.startswith(k))
        found[kinds[prefix]].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit})
    if "include_prs" not in ask.query:
        del found["pullRequests"]
    return found


@route("GET", MODEL + f"/commits{REV}")
def commits(hub, ask):
    repo = hub.repo(ask, content=True)
    found, commit = [], repo.find(ask.rev)[1]
    while commit:
        said = {"id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date}
        found.append(said | {"authors": [{"user": commit.author, "avatar": ""}]})
        commit = repo.commits.get(commit.parent)
    return _paged(hub, ask, found)


def _paged(hub, ask, items):
    at, size = int(ask.query.get("cursor", 0)), int(ask.query.get("limit", hub.page))
    more = f"{hub.url}{ask.url}?{urlencode(ask.query | {'cursor': at + size})}"
    return 200, items[at : at + size], {"Link": f'<{more}>; rel="next"'} if at + size < len(items) else {}


def _lfs(name, e):
    return {name: e.sha256, "size": e.size, "pointerSize": len(e.blob)}


def _listed(hub, files, path):
    """What a listing says of a path: a file, or a folder, or None if there is neither."""
    if e := files.get(path):
        said = {"type": "file", "oid": e.oid, "size": e.size, "path": path}
        if e.lfs:
            said["lfs"] = _lfs("oid", e)
            said |= hub.xet_hash(e, "xetHash")
        return said
    inside = any(p.startswith(path + "/") for p in files)
    return (
        {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
        if inside
        else None
    )


@route("GET", MODEL + f"/tree{REV}(/(?P<path>.*))?")
def tree(hub, ask):
    files, above = hub.repo(ask).find(ask.rev)[1].files, f"{ask.path}/" if ask.path else ""
    below = [p.removeprefix(above).split("/") for p in files if p.startswith(above)]
    if above and not below:
        raise Refused(404, f"{ask.path} does not exist on {ask.rev}", "EntryNotFound")
    deep = ask.query.get("recursive", "false").lower() == "true"
    names = {above + "/".join(p[:n]) for p in below for n in range(1, len(p) + 1 if deep else 2)}
    return _paged(hub, ask, [_listed(hub, files, n) for n in sorted(names)])


@route("POST", MODEL + f"/paths-info{REV}")
def paths_info(hub, ask):
    files = hub.repo(ask).find(ask.rev)[1].files
    is_json = "json" in ask.headers.get("Content-Type", "")
    asked = json.loads(ask.body) if is_json else parse_qs(ask.body.decode())
    return [said for p in asked["paths"] if (said := _listed(hub, files, p))]


@route("GET|HEAD", REPO + f"/resolve{REV}/(?P<path>.+)")
def resolve(hub, ask):
    repo = hub.repo(ask, content=True)
    commit = repo.find(ask.rev)[1]
    head = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
    if not (e := commit.files.get(ask.path)):
        raise Refused(404, "Entry not found", "EntryNotFound", headers=head)
    if not e.lfs:
        return _ranged(ask, e.content, head | {"ETag": f'"{e.oid}"'})
    head |= {"X-Linked-Size": str(e.size), "X-Linked-ETag": f'"{e.sha256}"'}
    head |= {"Location": hub.signed(hub.storage, f"/storage/{repo.id}/{e.sha256}")}
    if found := hub.xet_hash(e, "X-Xet-Hash"):
        head |= found | {"Link": f'<{hub.url}/api/models/{repo.id}/xet-read-token/{commit.id}>; rel="xet-auth"'}
    return 302, b"", head


def _ranged(ask, content, headers):
    """The bytes of `content` that were asked for."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", ask.headers.get("Range", ""))
    if not asked:
        return 200, content, headers
    first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    if first > last:
        return 416, b"", {"Content-Range": f"bytes */{len(content)}"}
    return 206, content[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}


@route("GET", MODEL + f"/xet-(?P<kind>read|write)-token{REV}")
def xet_token(hub, ask):
    if not hub.cas:
        raise Refused(404, "Sorry, we can't find the page you are looking for.")
    hub.repo(ask, READ if ask.kind == "read" else _right(ask), content=True)
    hub.cas.mkdir(parents=True, exist_ok=True)
    token, until, url = f"xet_{ask.kind}", 1 << 40, f"local://{hub.cas}"
    headers = {"X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(until), "X-Xet-Cas-Url": url}
    return 200, {"accessToken": token, "exp": until, "casUrl": url}, headers


# writing


def _right(ask):
    """What is needed to write: pull requests may come from those who may not write."""
    is_pr = ask.query.get("create_pr") == "1" or (ask.rev or "").startswith("refs/pr/")
    return DISCUSS if is_pr else WRITE


def _target(hub, ask):
    """(repository, ref, its commit) that is to be written to."""
    repo = hub.repo(ask, _right(ask))
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
    repo, objects = hub.repo(ask, _right(ask)), []
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
    told = {p["partNumber"]: p["etag"].strip('"') for p in json.loads(ask.body)["parts"]}
    if not ask.signed or told != {n: hashlib.md5(p).hexdigest() for n, p in parts.items()}:
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
    return _ranged(ask, wrong(content) if ask.how == "corrupt" else content, {"ETag": f'"{ask.sha}"'})


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
    if card and not card.lfs and (error := _front_matter(card.content.decode())[0]):
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
    event = {"id": _id(f"{d.num} {len(d.events)}"), "type": kind, "createdAt": hub.now(), "author": {"name": user}}
    d.events.append(event | {"data": data})
    return d.events[-1]


def _set_status(hub, d, user, status):
    d.status = status
    return _note(hub, d, "status-change", user, {"status": status})


def _url(hub, repo, d):
    return f"{hub.url}/{repo.id}/discussions/{d.num}"


def _told(repo, d):
    told = {"num": d.num, "title": d.title, "status": d.status, "author": {"name": d.author}, "createdAt": d.date}
    return told | {"isPullRequest": d.base is not None, "repo": {"name": repo.id, "type": "model"}}


@route("GET", MODEL + "/discussions")
def discussions(hub, ask):
    repo, q = hub.repo(ask), ask.query
    kind, status, start = q.get("type", "all"), q.get("status", "all"), int(q.get("p", 0)) * hub.page
    wanted = [
        _told(repo, d)
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
    told = _told(repo, d) | {"events": d.events}
    if d.base:
        told["changes"] = {"base": d.base} | ({"mergeCommitId": d.merged} if d.merged else {})
        told |= {"filesWithConflicts": _changes(repo, d)[1], "diff": ""}
    return told


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
