"""What a Hub on loopback (tests/hub.py) answers: a function for each endpoint that moelib reaches.

Each takes the hub and the request (method, url, query, headers, body, token, the names in its pattern), and returns
what goes back as JSON, or (status, body, headers).
"""

import base64
import hashlib
import json
import re

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


# accounts and repositories


@route("GET", "/api/whoami-v2")
def whoami(hub, ask):
    if not ask.token:
        raise Refused(*ANONYMOUS)
    user, token = ask.token.user, {"displayName": "of a test", "role": ask.token.role}
    if ask.token.role == "fineGrained":
        scopes = ask.token.scopes.items()
        token["fineGrained"] = {"scoped": [{"entity": {"name": s}, "permissions": list(p)} for s, p in scopes]}
    orgs = [{"type": "org", "name": o, "roleInOrg": roles[user]} for o, roles in hub.orgs.items() if user in roles]
    return {"type": "user", "name": user, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}


def _is_private(body):
    return body.get("private", False) or body.get("visibility") == "private"


@route("POST", "/api/repos/create")
def create_repo(hub, ask):
    body = json.loads(ask.body)
    if not ask.token:
        raise Refused(*ANONYMOUS)
    repo_id = f"{body.get('organization') or ask.token.user}/{body['name']}"
    url = {"url": f"{hub.url}/{repo_id}", "name": repo_id}
    if not hub.may(ask.token, repo_id, WRITE):
        raise Refused(403, f"You don't have the rights to create the model {repo_id}")
    if repo_id in hub.repos:
        raise Refused(409, f"You already created this model repo: {repo_id}", more=url)
    hub.create(repo_id, _is_private(body))
    return url


@route("PUT", MODEL + "/settings")
def settings(hub, ask):
    repo = hub.repo(ask, WRITE)
    repo.private = _is_private(json.loads(ask.body))
    return {"private": repo.private}


@route("POST", "/api/validate-yaml")
def validate_yaml(hub, ask):
    error, data = front_matter(json.loads(ask.body)["content"])
    if error:
        raise Refused(400, error, more={"errors": [{"message": error}], "warnings": []})
    return {"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata in repo card"}]}


def front_matter(text):
    """(error or None, the data) of the YAML at the top of a card."""
    match = re.match(r"\s*---\r?\n(.*?)\n---\s*(\n|$)", text, re.S)
    try:
        data = yaml.safe_load(match[1]) if match else None
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
        for sibling, e in zip(siblings, commit.files.values(), strict=True):
            sibling |= {"blobId": e.oid, "size": e.size} | ({"lfs": _lfs("sha256", e)} if e.lfs else {})
    info = {"id": repo.id, "sha": commit.id, "private": repo.private, "gated": repo.gated, "siblings": siblings}
    card = commit.files.get("README.md")
    return info | {"cardData": front_matter(card.content.decode())[1] if card and not card.lfs else None}


def _lfs(name, e):
    return {name: e.sha256, "size": e.size, "pointerSize": len(e.blob)}


def _listed(hub, files, path):
    """A listing's entry for a path: a file, or else a folder."""
    if not (e := files.get(path)):
        return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
    entry = {"type": "file", "oid": e.oid, "size": e.size, "path": path}
    return entry | ({"lfs": _lfs("oid", e)} | hub.xet_hash(e, "xetHash") if e.lfs else {})


@route("GET", MODEL + f"/tree{REV}")
def tree(hub, ask):
    files = hub.repo(ask).find(ask.rev)[1].files
    parts = [path.split("/") for path in files]
    names = {"/".join(p[:n]) for p in parts for n in range(1, len(p) + 1)}
    return [_listed(hub, files, n) for n in sorted(names)]


@route("GET|HEAD", REPO + f"/resolve{REV}/(?P<path>.+)")
def resolve(hub, ask):
    repo = hub.repo(ask, content=True)
    commit = repo.find(ask.rev)[1]
    head = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
    if not (e := commit.files.get(ask.path)):
        raise Refused(404, "Entry not found", "EntryNotFound", headers=head)
    if not e.lfs:
        return ranged(ask, e.blob, head | {"ETag": f'"{e.oid}"'})
    head |= {"X-Linked-Size": str(e.size), "X-Linked-ETag": f'"{e.sha256}"'}
    head |= {"Location": hub.signed(hub.storage, f"/storage/{repo.id}/{e.sha256}")}
    if xet_header := hub.xet_hash(e, "X-Xet-Hash"):
        head |= xet_header | {"Link": f'<{hub.url}/api/models/{repo.id}/xet-read-token/{commit.id}>; rel="xet-auth"'}
    return 302, b"", head


def ranged(ask, content, headers):
    """The bytes of `content` that the request's range names, or all of them."""
    limits = re.fullmatch(r"bytes=(\d+)-(\d*)", ask.headers.get("Range", ""))
    if not (limits and ask.accepts_ranges):
        return 200, content, headers
    first, last = int(limits[1]), min(int(limits[2] or len(content)), len(content) - 1)
    if first > last:
        return 416, b"", {"Content-Range": f"bytes */{len(content)}"}
    return 206, content[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}


@route("GET", MODEL + f"/xet-(?P<kind>read|write)-token{REV}")
def xet_token(hub, ask):
    if not hub.cas:
        raise Refused(404, "Sorry, we can't find the page you are looking for.")
    hub.repo(ask, READ if ask.kind == "read" else right_to_write(ask), content=True)
    hub.cas.mkdir(parents=True, exist_ok=True)
    token, until, url = f"xet_{ask.kind}", 1 << 40, f"local://{hub.cas}"
    headers = {"X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(until), "X-Xet-Cas-Url": url}
    return 200, {"accessToken": token, "exp": until, "casUrl": url}, headers


# writing


def right_to_write(ask):
    """What is needed to write there: pull requests may come from those who may not write."""
    is_pull = ask.query.get("create_pr") == "1" or (ask.rev or "").startswith("refs/pr/")
    return DISCUSS if is_pull else WRITE


@route("POST", MODEL + f"/preupload{REV}")
def preupload(hub, ask):
    _, commit = hub.repo(ask, right_to_write(ask)).find(ask.rev)
    answers = []
    for f in json.loads(ask.body)["files"]:
        lfs = hub.is_lfs(commit.files, f["path"], f["size"], base64.b64decode(f["sample"]))
        answers.append({"path": f["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
        if e := commit.files.get(f["path"]):  # by this the client leaves out what has not changed
            answers[-1]["oid"] = e.sha256 if e.lfs else e.oid
    return {"files": answers, "commitOid": commit.id}


@route("POST", REPO + r"\.git/info/lfs/objects/batch")
def lfs_batch(hub, ask):
    body = json.loads(ask.body)
    ask.rev = (body.get("ref") or {"name": "refs/pr/"})["name"]  # left out for a pull request to come
    repo, objects = hub.repo(ask, right_to_write(ask)), []
    for o in body["objects"]:
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
    complete = hub.signed(hub.url, "/api/complete_multipart", place=place)
    return {"href": complete, "header": header | {"chunk_size": str(hub.part_bytes)}}


@route("POST", REPO + r"\.git/info/lfs/objects/verify")
def lfs_verify(hub, ask):
    repo, body = hub.repo(ask, DISCUSS), json.loads(ask.body)
    if hub.stored(repo, body["oid"]) != body["size"]:
        raise Refused(404, f"{body['oid']} of {body['size']} bytes is not in storage")
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
    if ask.credential:
        raise Refused(400, "InvalidArgument: only one auth mechanism is allowed")
    if not ask.signed or ask.repo not in hub.repos:
        raise Refused(403, "SignatureDoesNotMatch")


@route("POST", MODEL + f"/commit{REV}")
def commit(hub, ask):
    repo = hub.repo(ask, right_to_write(ask))
    ref, head = repo.find(ask.rev)
    header, *lines = [json.loads(line) for line in ask.body.splitlines() if line.strip()]
    files = dict(head.files)
    for line in lines:
        _apply(hub, repo, files, line["key"], line["value"])
    card = files.get("README.md")
    if card and not card.lfs and (error := front_matter(card.content.decode())[0]):
        raise Refused(400, f"Invalid metadata in README.md: {error}")
    title, pull = header["value"]["summary"], None
    if ask.query.get("create_pr") == "1":
        pull = Discussion(len(repo.discussions) + 1, title, ask.token.user, "open", hub.now(), ref, head.id)
        repo.discussions.append(pull)
        ref = pull.ref
        repo.refs[ref] = head.id
    oid = hub.commit(repo, ref, files, title).id
    if ask.how == "corrupt":
        hub.damage_xet()
    answer = {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo.id}/commit/{oid}", "hookOutput": ""}
    return answer | ({"pullRequestUrl": f"{hub.url}/{repo.id}/discussions/{pull.num}"} if pull else {})


def _apply(hub, repo, files, key, value):
    """Do one line of a commit to `files`. A file that stays as it was is no error: that makes an empty commit."""
    path = value["path"]
    if key == "file":
        files[path] = regular(base64.b64decode(value["content"]))
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
    else:
        raise Refused(400, f"no such operation: {key}")


# pull requests


@route("GET", MODEL + "/discussions")
def discussions(hub, ask):
    repo = hub.repo(ask)
    listed = [
        {
            "num": d.num,
            "title": d.title,
            "status": d.status,
            "author": {"name": d.author},
            "createdAt": d.date,
            "isPullRequest": True,
            "repo": {"name": repo.id, "type": "model"},
        }
        for d in reversed(repo.discussions)
        if d.author == ask.query.get("author", d.author)
    ]
    return {"discussions": listed, "count": len(listed), "start": 0}


@route("POST", MODEL + r"/discussions/(?P<num>\d+)/merge")
def merge(hub, ask):
    repo = hub.repo(ask, WRITE)
    if not 1 <= int(ask.num) <= len(repo.discussions):
        raise Refused(404, "Discussion not found")
    d = repo.discussions[int(ask.num) - 1]
    if d.status != "open":
        raise Refused(400, f"This is {d.status}: only an open pull request can be merged")
    start, base, ours = repo.commits[d.start].files, repo.files(d.base), repo.files(d.ref)
    changes = {p: ours.get(p) for p in start.keys() | ours.keys() if start.get(p) != ours.get(p)}
    if conflicts := sorted(p for p, e in changes.items() if base.get(p) not in (start.get(p), e)):
        raise Refused(409, f"Conflicts in {', '.join(conflicts)}")
    files = {p: e for p, e in (base | changes).items() if e}
    hub.commit(repo, d.base, files, f"{d.title} (#{d.num})")
    d.status = "merged"
    return {}
