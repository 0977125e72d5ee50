"""What a Hub on loopback (tests/hub.py) knows: accounts and rights, repositories with all their commits, storage."""

import fnmatch
import hashlib
import json
import struct
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

MAIN = "refs/heads/main"
MAX_REGULAR = 10 << 20  # bytes that a file may have outside of LFS
LFS_RULE = " filter=lfs diff=lfs merge=lfs -text\n"
ATTRIBUTES = "".join(p + LFS_RULE for p in ("*.bin", "*.safetensors", "*tfevents*"))  # of a new repository
ANONYMOUS = (401, "Invalid username or password.")
READ, WRITE, DISCUSS = "repo.content.read", "repo.write", "discussion.write"  # rights, as fine-grained tokens name them


class Refused(Exception):
    """The answer is an error: this status, `code` as its X-Error-Code, `more` in its body."""

    def __init__(self, status, message, code=None, more=None, headers=None):
        self.status, self.body = status, {"error": message} | (more or {})
        self.headers = (
            {"X-Error-Message": " ".join(message.split())} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        )


@dataclass(frozen=True)
class Token:
    """Of whom, and what it may: `write`, `read`, or `fineGrained` with permissions by namespace or repository."""

    user: str
    role: str
    scopes: dict[str, tuple[str, ...]] = field(default_factory=dict)


TOKENS = {
    "hf_write": Token("alice", "write"),
    "hf_read": Token("alice", "read"),
    "hf_fine": Token("alice", "fineGrained", {"alice": (READ, WRITE, DISCUSS)}),
    "hf_narrow": Token("alice", "fineGrained", {"alice": (READ,)}),
    "hf_other": Token("bob", "write"),
}
ORGS = {"lab": {"alice": "admin", "bob": "read"}}  # who is what in them


@dataclass(frozen=True)
class Entry:
    """A file of a commit. `content` is None where storage has it (LFS), and `sha256` is what was declared."""

    size: int
    sha256: str
    content: bytes | None = None

    @property
    def lfs(self):
        return self.content is None

    @property
    def blob(self):
        """What git has: the file itself, or the pointer to it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        return pointer.encode() if self.lfs else self.content

    @property
    def oid(self):
        return hashlib.sha1(b"blob %d\0" % len(self.blob) + self.blob).hexdigest()


def regular(content):
    return Entry(len(content), hashlib.sha256(content).hexdigest(), content)


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    files: dict[str, Entry]


@dataclass
class Discussion:
    """A pull request."""

    num: int
    title: str
    author: str
    status: str  # open, merged
    date: str
    base: str  # the branch
    start: str  # the commit that it began from

    @property
    def ref(self):
        return f"refs/pr/{self.num}"


@dataclass
class Repo:
    id: str
    private: bool
    gated: str | bool = False
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/pr/1 -> commit id
    commits: dict[str, Commit] = field(default_factory=dict)  # all there ever were
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS: SHA-256 -> what storage has
    discussions: list[Discussion] = field(default_factory=list)

    def files(self, ref=MAIN):
        return self.commits[self.refs[ref]].files

    def find(self, rev):
        """(ref, commit) that a revision names; no ref for a commit's id."""
        for ref in (rev, MAIN if rev == "HEAD" else f"refs/heads/{rev}"):
            if ref in self.refs:
                return ref, self.commits[self.refs[ref]]
        if rev in self.commits:
            return None, self.commits[rev]
        raise Refused(404, f"Invalid rev id: {rev}", "RevisionNotFound")


class State:
    """`cas`: the folder that the official xet code keeps its chunks in, None for a server without xet."""

    def __init__(self, cas=None):
        self.cas = cas
        self.tokens, self.orgs = dict(TOKENS), {k: dict(v) for k, v in ORGS.items()}
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[tuple[str, str], int] = {}  # (repository, SHA-256) -> bytes that were announced
        self.parts: dict[str, dict[int, bytes]] = {}  # path of an object in storage -> its parts
        self.rotten: set[str] = set()  # paths of objects that storage will have wrong
        self._seconds = 0

    def now(self):
        """A second later each time: the same requests have the same dates, and the same commit ids."""
        self._seconds += 1
        return (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self._seconds)).isoformat()[:19] + ".000Z"

    def create(self, repo_id, private):
        repo = self.repos[repo_id] = Repo(repo_id, private)
        self.commit(repo, MAIN, {".gitattributes": regular(ATTRIBUTES.encode())}, "initial commit")
        return repo

    def commit(self, repo, ref, files, title):
        parent = repo.refs.get(ref)
        tree = sorted((path, e.oid) for path, e in files.items())
        id_ = hashlib.sha1(json.dumps([repo.id, ref, parent, tree, title, self.now()]).encode()).hexdigest()
        repo.commits[id_] = Commit(id_, parent, title, dict(sorted(files.items())))
        repo.refs[ref] = id_
        return repo.commits[id_]

    def public(self):
        """{repository: {ref: {path: SHA-256}}} of what anyone can see now."""
        return {
            r.id: {ref: {p: e.sha256 for p, e in r.files(ref).items()} for ref in r.refs}
            for r in self.repos.values()
            if not r.private
        }

    # who may what

    def role(self, user, namespace):
        return "admin" if user == namespace else self.orgs.get(namespace, {}).get(user)

    def may(self, token, repo_id, right):
        """Whether the token gives a right on a repository, which need not exist."""
        if token is None or (token.role == "read" and right != READ):
            return False
        namespace = repo_id.split("/")[0]
        if token.role == "fineGrained" and not any(right in token.scopes.get(s, ()) for s in (namespace, repo_id)):
            return False
        role = self.role(token.user, namespace)
        is_public = repo_id in self.repos and not self.repos[repo_id].private
        return role in ("admin", "write") if right == WRITE else role is not None or (right == DISCUSS and is_public)

    def repo(self, ask, right=READ, content=False):
        """The repository asked for, if it may be seen and there is this right. `content`: of a gated one, its files."""
        repo, token = self.repos.get(ask.repo), ask.token
        if repo is None or (repo.private and not self.may(token, repo.id, READ)):
            raise Refused(404, "Repository not found", "RepoNotFound") if token else Refused(*ANONYMOUS, "RepoNotFound")
        inside = token and self.role(token.user, repo.id.split("/")[0])
        if content and repo.gated and not inside:
            raise Refused(403 if token else 401, f"Access to model {repo.id} is restricted", "GatedRepo")
        if right != READ and not self.may(token, repo.id, right):
            raise Refused(403, f"Forbidden: you have no {right} on {repo.id}") if token else Refused(*ANONYMOUS)
        return repo

    # storage

    def is_lfs(self, files, path, size=1, sample=b""):
        """Whether a file is to be kept outside of git: by the rules in `files`, its size, or a NUL in its head."""
        rules = files[".gitattributes"].content.decode() if ".gitattributes" in files else ""
        patterns = [line.split()[0] for line in rules.splitlines() if "filter=lfs" in line]
        matched = any(fnmatch.fnmatch(name, p) for p in patterns for name in (path, path.split("/")[-1]))
        return size > 0 and (matched or size > MAX_REGULAR or b"\0" in sample)

    def stored(self, repo, sha256):
        """Bytes of an LFS file that storage has; None if it has none of it."""
        if sha256 in repo.objects:
            return len(repo.objects[sha256])
        return self.xet_files().get(sha256, (None, None))[1]

    def content(self, repo, e):
        """What a download gets, which is not what was declared if storage has it wrong."""
        if not e.lfs:
            return e.content
        return repo.objects[e.sha256] if e.sha256 in repo.objects else self._from_xet(e.sha256)

    def xet_files(self):
        """{SHA-256: (xet hash, bytes)} of all files in the xet folder, by its shards."""
        files = {}
        for shard in self.cas.glob("xet/xorbs/shards/*.mdb") if self.cas else ():
            data, at = shard.read_bytes(), 48
            while data[at : at + 32] != b"\xff" * 32:
                xet_hash, flags, n = _hex(data, at), *struct.unpack_from("<2I", data, at + 32)
                size = sum(struct.unpack_from("<I", data, at + 48 * i + 36)[0] for i in range(1, n + 1))
                at += 48 * (1 + n + n * (flags >> 31))  # head, segments, what verifies them
                if flags >> 30 & 1:
                    files[_hex(data, at)] = (xet_hash, size)
                    at += 48
        return files

    def xet_hash(self, e, name):
        """{name: xet hash} of a file that xet has."""
        file = self.xet_files().get(e.sha256)
        return {name: file[0]} if file else {}

    def _from_xet(self, sha256):
        import hf_xet

        with tempfile.TemporaryDirectory(dir=self.cas) as folder:
            access = {"endpoint": f"local://{self.cas}", "token": "-", "token_expiry_unix_secs": 1 << 40}
            with hf_xet.XetSession().new_file_download_group(**access) as group:
                group.start_download_file(hf_xet.XetFileInfo(*self.xet_files()[sha256]), f"{folder}/file")
            return Path(f"{folder}/file").read_bytes()

    def damage_xet(self):
        """Make every chunk in the xet folder wrong."""
        for xorb in self.cas.glob("xet/xorbs/xorbs/default.*[!t]"):  # .tagset is no xorb
            data, at = xorb.read_bytes(), 0
            while data[at] == 0:  # the head of a chunk: version, bytes as stored, how they are packed, bytes unpacked
                end = at + 8 + int.from_bytes(data[at + 1 : at + 4], "little")
                data, at = data[: at + 8] + wrong(data[at + 8 : end]) + data[end:], end
            xorb.chmod(0o644)
            xorb.write_bytes(data)


def wrong(content):
    """`content` with one bit of it changed."""
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] if content else content


def _hex(data, at):
    """A hash as xet writes it: four little-endian numbers."""
    return "".join(f"{n:016x}" for n in struct.unpack_from("<4Q", data, at))
