"""What a Hub on loopback (tests/hub.py) answers: a function for each endpoint that the official clients ask.

Each takes the hub and what is asked (method, url, query, headers, body, token, the names in its pattern), and returns
what goes back as JSON, or (status, body, headers).
"""

import hashlib
import json
import re
from urllib.parse import parse_qs, urlencode

import yaml
from hub_state import (
    ANONYMOUS,
    DISCUSS,
    READ,
    WRITE,
    Refused,
)

REPO = r"/(?P<repo>[\w.-]+/[\w.-]+)"
MODEL = "/api/models" + REPO
REV = r"/(?P<rev>[^/]+)"
ROUTES = []


def route(methods, pattern):
    def keep(function):
        ROUTES.append((methods.split("|"), re.compile(pattern), function))
        return function

    return keep


def object_id(name):
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
            {"entity": {"_id": object_id(s), "type": kinds[s], "name": s}, "permissions": list(p)}
            for s, p in ask.token.scopes.items()
        ]
        token["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
    orgs = [_account("org", o) | {"roleInOrg": roles[user]} for o, roles in hub.orgs.items() if user in roles]
    return _account("user", user) | {"orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}


def _account(kind, name):
    account = {"type": kind, "id": object_id(name), "name": name, "fullname": name.title(), "email": None}
    return account | {"canPay": False, "periodEnd": None, "avatarUrl": f"/avatars/{object_id(name)}.svg"}


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
    url = {"url": f"{hub.url}/{ask.repo}", "name": ask.repo, "id": object_id(ask.repo)}
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
    error, data = front_matter(json.loads(ask.body)["content"])
    if error:
        raise Refused(400, error, more={"errors": [{"message": error}], "warnings": []})
    return {"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata in repo card"}]}


def front_matter(text):
    """(what is wrong, what it says) of the YAML at the top of a card."""
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
        for said, e in zip(siblings, commit.files.values(), strict=True):
            said |= {"blobId": e.oid, "size": e.size} | ({"lfs": _lfs("sha256", e)} if e.lfs else {})
    card = commit.files.get("README.md")
    info = {
        "_id": object_id(repo.id),
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.id,
    }
    info |= {"private": repo.private, "gated": repo.gated, "disabled": False, "createdAt": repo.created}
    info |= {"lastModified": commit.date, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}
    return info | {"cardData": front_matter(card.content.decode())[1] if card and not card.lfs else None}


@route("GET", MODEL + "/refs")
def refs(hub, ask):
    listed = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    kinds = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
    for ref, commit in hub.repo(ask).refs.items():
        prefix = next(k for k in kinds if ref.startswith(k))
        listed[kinds[prefix]].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit})
    if "include_prs" not in ask.query:
        del listed["pullRequests"]
    return listed


@route("GET", MODEL + f"/commits{REV}")
def commits(hub, ask):
    repo = hub.repo(ask, content=True)
    listed, commit = [], repo.find(ask.rev)[1]
    while commit:
        said = {"id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date}
        listed.append(said | {"authors": [{"user": commit.author, "avatar": ""}]})
        commit = repo.commits.get(commit.parent)
    return _paged(hub, ask, listed)


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


@route("GET|HEAD", REPO + f"/(?P<kind>resolve|raw){REV}/(?P<path>.+)")
def resolve(hub, ask):
    repo = hub.repo(ask, content=True)
    commit = repo.find(ask.rev)[1]
    head = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
    if not (e := commit.files.get(ask.path)):
        raise Refused(404, "Entry not found", "EntryNotFound", headers=head)
    if not e.lfs or ask.kind == "raw":
        return ranged(ask, e.blob, head | {"ETag": f'"{e.oid}"'})
    head |= {"X-Linked-Size": str(e.size), "X-Linked-ETag": f'"{e.sha256}"'}
    head |= {"Location": hub.signed(hub.storage, f"/storage/{repo.id}/{e.sha256}")}
    if xet_header := hub.xet_hash(e, "X-Xet-Hash"):
        head |= xet_header | {"Link": f'<{hub.url}/api/models/{repo.id}/xet-read-token/{commit.id}>; rel="xet-auth"'}
    return 302, b"", head


def ranged(ask, content, headers):
    """The bytes of `content` that were asked for."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", ask.headers.get("Range", ""))
    if not asked:
        return 200, content, headers
    first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    if first > last:
        return 416, b"", {"Content-Range": f"bytes */{len(content)}"}
    return 206, content[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}


def right_to_write(ask):
    """What is needed to write there: pull requests may come from those who may not write."""
    is_pull = ask.query.get("create_pr") == "1" or (ask.rev or "").startswith("refs/pr/")
    return DISCUSS if is_pull else WRITE


@route("GET", MODEL + f"/xet-(?P<kind>read|write)-token{REV}")
def xet_token(hub, ask):
    if not hub.cas:
        raise Refused(404, "Sorry, we can't find the page you are looking for.")
    hub.repo(ask, READ if ask.kind == "read" else right_to_write(ask), content=True)
    hub.cas.mkdir(parents=True, exist_ok=True)
    token, until, url = f"xet_{ask.kind}", 1 << 40, f"local://{hub.cas}"
    headers = {"X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(until), "X-Xet-Cas-Url": url}
    return 200, {"accessToken": token, "exp": until, "casUrl": url}, headers
