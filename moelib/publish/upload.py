"""Cards and the files that they are about -> repositories on the Hub, verified byte by byte before anyone sees them.

The Hub itself holds the state: a file that is there with the right hash is not sent again, so an interrupted
publication goes on where it was. A new repository is private until everything in it was read back; to one that is
public already, everything goes through a pull request that is merged when it was read back.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from moelib.base import files, neutral
from moelib.catalogue import params
from moelib.catalogue.facts import Receipt
from moelib.models import hub, quantize
from moelib.publish import cards
from moelib.study.study import Study

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

MAIN = "main"


class PublishError(params.UserError):
    """Something is not fit to be published, or is not on the Hub as it was sent; the message says what to do."""


@dataclass(frozen=True)
class Item:
    """One file of a repository."""

    name: str
    content: Path | bytes
    nbytes: int
    sha256: str

    @property
    def is_model(self) -> bool:
        return isinstance(self.content, Path)

    @cached_property
    def git_oid(self) -> str:
        """What the Hub tells of a file that is not a large one."""
        content = self.content.read_bytes() if isinstance(self.content, Path) else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Plan:
    """What is to be in one repository, and what is there."""

    repository: str
    title: str
    items: tuple[Item, ...]
    visible: bool
    """Whether it is to be public in the end."""
    existing: dict[str, str] = field(default_factory=dict)
    """Name -> SHA-256 (of large files) or git's id of what is on `main`."""
    state: str = "new"
    """new, private, public; or why it is not known."""

    def same(self, item: Item, existing: dict[str, str] | None = None) -> bool:
        digest = (self.existing if existing is None else existing).get(item.name)
        return digest is not None and (digest == item.sha256 or (len(digest) == 40 and digest == item.git_oid))

    @property
    def changes(self) -> tuple[Item, ...]:
        return tuple(i for i in self.items if not self.same(i))

    @property
    def commits(self) -> list[tuple[Item, ...]]:
        """The commits to make: each GGUF alone, then the cards together, which are what a visitor sees."""
        pages = tuple(i for i in self.changes if not i.is_model)
        return [(i,) for i in self.changes if i.is_model] + ([pages] if pages else [])

    def text(self) -> str:
        later = "" if self.state == "public" else ", to be public" if self.visible else ", to stay private"
        lines = [f"{self.repository} ({self.state}{later})"]
        for i in self.items:
            change = "same" if self.same(i) else "changed" if i.name in self.existing else "new"
            lines.append(f"  {change:8} {i.nbytes:>14,}  {i.sha256}  {i.name}")
        others = sorted(self.existing.keys() - {i.name for i in self.items})
        lines += [f"  {'left':8} {'':>14}  {'':64}  {name}" for name in others]
        sent = sum(i.nbytes for i in self.changes)
        lines.append(f"  {len(self.commits)} commits, {len(self.changes)} files, {sent:,} bytes to send")
        lines += [f"    {n + 1}. {_message(c)}" for n, c in enumerate(self.commits)]
        return "\n".join(lines)


def _message(commit: tuple[Item, ...]) -> str:
    return f"Add {commit[0].name}" if commit[0].is_model else "Cards: " + ", ".join(i.name for i in commit)


def plan(study: Study, namespace: str, public: bool | None = None, endpoint: str | None = None) -> list[Plan]:
    """What publishing the study would do, by repository; nothing is changed anywhere.

    `public`: whether the repositories are to be seen by all; by default those of real weights are. Random weights are
    seen by nobody but their owner, except where a Hub on this machine plays the real one, as in a rehearsal. Raises
    CardError for a file that is not the one that was measured, PublishError for one that is not there, and for random
    weights that are to be public, HubError.
    """
    client, real = hub.api(endpoint), study.parameters.weights == "real"
    if public and not real and not hub.is_here(client):
        raise PublishError(
            f"{study.name} has geometry twins, whose weights are random: they are not made public on a Hub; without "
            "--public they go to private repositories, which only you can see"
        )
    pages, models = cards.build(study, namespace), cards.planned(study)
    at = {s.file_name: quantize.place(s) for s in study.manifests}
    items: dict[str, list[Item]] = {}
    for path, sha256 in models.items():
        repository, name = path.split("/")
        if not at[name].is_file():
            raise PublishError(
                f"{name} is not in {at[name].parent}: `moelib quantize` makes it, or set MOELIB_MODELS to where it is"
            )
        cards.require_measured(study, at[name])
        items.setdefault(repository, []).append(Item(name, at[name], at[name].stat().st_size, sha256))
    for path, text in pages.items():
        repository, name = path.split("/")
        content = text.encode()
        items[repository].append(Item(name, content, len(content), hashlib.sha256(content).hexdigest()))
    visible, title = real if public is None else public, f"moelib: study {study.name}"
    return [_look(Plan(f"{namespace}/{r}", title, tuple(i), visible), client) for r, i in items.items()]


def _look(plan: Plan, client: "HfApi") -> Plan:
    """The plan with what is on the Hub; where that cannot be read, everything counts as new, and it says why."""
    try:
        state = _state(client, plan.repository)
        existing = _listing(client, plan.repository, MAIN) if state != "new" else {}
    except hub.HubError as err:
        state, existing = f"what is there is not known: {err}", {}
    return replace(plan, existing=existing, state=state)


def _state(client: "HfApi", repository: str) -> str:
    from huggingface_hub.errors import RepositoryNotFoundError

    with hub.asking(f"reading {repository}"):
        try:
            return "private" if client.model_info(repository).private else "public"
        except RepositoryNotFoundError:
            return "new"


def _listing(client: "HfApi", repository: str, revision: str) -> dict[str, str]:
    from huggingface_hub.hf_api import RepoFile

    with hub.asking(f"listing {repository}"):
        entries = list(islice(client.list_repo_tree(repository, recursive=True, revision=revision), hub.MAX_FILES + 1))
        listed = {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in entries if isinstance(f, RepoFile)}
        if len(entries) > hub.MAX_FILES or not all(isinstance(x, str) for pair in listed.items() for x in pair):
            raise TypeError(f"a listing of {len(entries)} paths")
    listed.pop(".gitattributes", None)  # the Hub's own
    return listed


Say = Callable[[str], object]


def publish(plans: list[Plan], say: Say, endpoint: str | None = None, receipts: Path | None = None) -> None:
    """Do what was planned: upload, read everything back, and only then let it be seen.

    Running it again after an interruption sends only what is not there. Each repository that is as planned leaves a
    receipt in the folder `receipts`. Raises HubError, or PublishError if what the Hub gives back is not what was sent;
    nothing of it has become public then.
    """
    client = hub.api(endpoint)
    require_rights(client, {p.repository.split("/")[0] for p in plans})
    ready = [(p, _upload(client, p, say)) for p in plans]
    for p, sent in ready:
        if sent:
            _read_back(client, p, sent[0], say)
    for p, sent in ready:
        if sent:
            _show(client, p, *sent, say)
        if receipts:
            _acknowledge(client, p, receipts)


def _acknowledge(client: "HfApi", p: Plan, folder: Path) -> None:
    """Write down what is on the Hub now. Raises PublishError if it cannot be written, or is not what was planned."""
    state = _state(client, p.repository)
    _require(p, state, _listing(client, p.repository, MAIN), state == "new")
    receipt = Receipt(
        hub=client.endpoint,
        here=hub.is_here(client),
        repository=p.repository,
        public=state == "public",
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        files={i.name: i.sha256 for i in p.items},
    )
    try:
        files.write_json(folder / f"{p.repository.replace('/', '--')}.json", receipt.model_dump())
    except OSError as err:
        raise PublishError(
            f"{p.repository} is {state} on the Hub and complete, but its receipt cannot be written into {folder} "
            f"({err.strerror or err}): fix its permissions and run the same command again"
        ) from None


def require_rights(client: "HfApi", namespaces: set[str]) -> None:
    """Raise PublishError unless the token may write to every namespace."""
    with hub.asking("asking whose token this is"):
        who = client.whoami()
        user, role = str(who["name"]), (access := who.get("auth", {}).get("accessToken", {})).get("role")
        orgs = {o["name"]: o.get("roleInOrg") for o in who.get("orgs", ())}
        scoped = access.get("fineGrained", {}).get("scoped", ())
        fine = {s["entity"]["name"]: tuple(s["permissions"]) for s in scoped}
    for name in sorted(namespaces):
        own = name == user or orgs.get(name) in ("admin", "write", "contributor")
        if role == "read" or not own:
            why = "reads only" if own else f"is {neutral.plain(user)}'s, who may not write to {name}"
        elif role == "fineGrained" and "repo.write" not in fine.get(name, ()):
            why = f"has no right to write to repositories of {name}"
        else:
            continue
        raise PublishError(f"the token {why}: `hf auth login` with one that may, or set HF_TOKEN")


def _upload(client: "HfApi", p: Plan, say: Say) -> tuple[str, int | None] | None:
    """Send what is not there; returns the revision that holds it all, and the pull request's number if it is one.

    None if all of it is public already.
    """
    operation = f"publishing {p.repository}"
    if (state := _state(client, p.repository)) == "new":
        with hub.asking(operation):
            client.create_repo(p.repository, private=True, exist_ok=True)
        state = _state(client, p.repository)
    if state == "public" and not p.visible:
        raise PublishError(
            f"{p.repository} is public, and what is published now is to stay private: make it private on the Hub, or "
            "publish to another namespace"
        )
    existing, revision, number = _listing(client, p.repository, MAIN), MAIN, None
    if state == "public":
        if all(p.same(i, existing) for i in p.items):
            say(f"{p.repository}: public already, nothing to do")
            return None
        if number := _open_request(client, p):
            revision = f"refs/pr/{number}"
            existing = _listing(client, p.repository, revision)
    for commit in replace(p, existing=existing).commits:
        say(f"{p.repository}: {_message(commit)} ({sum(i.nbytes for i in commit):,} bytes)")
        operations = _operations(commit)
        for i, o in zip(commit, operations, strict=True):
            if o.upload_info.sha256.hex() != i.sha256:
                raise PublishError(f"{i.name} changed while it was being published: run the same command again")
        request = state == "public" and number is None
        with hub.asking(operation, sends=sum(i.nbytes for i in commit)):
            done = client.create_commit(
                p.repository,
                operations,
                commit_message=p.title if request else _message(commit),
                revision=None if request else revision,
                create_pr=request,
            )
            if request:
                number, revision = int(str(done.pr_num)), str(done.pr_revision)
    return revision, number


def _operations(commit: tuple[Item, ...]) -> list["CommitOperationAdd"]:
    from huggingface_hub import CommitOperationAdd

    try:
        return [CommitOperationAdd(i.name, str(i.content) if i.is_model else i.content) for i in commit]
    except (OSError, ValueError) as err:  # the library says so of a file that is gone
        raise PublishError(f"{commit[0].name} cannot be read any more ({err}): run the same command again") from None


def _open_request(client: "HfApi", p: Plan) -> int | None:
    """Number of the pull request that an earlier, interrupted publication opened."""
    with hub.asking(f"listing the pull requests of {p.repository}"):
        who = client.whoami()["name"]
        requests = client.get_repo_discussions(p.repository, author=who, discussion_type="pull_request")
        requests = islice(requests, hub.MAX_FILES)
        return max((d.num for d in requests if d.title == p.title and d.status == "open"), default=None)


def _read_back(client: "HfApi", p: Plan, revision: str, say: Say) -> None:
    """Download every file and compare its hash. Raises PublishError."""
    listed = _listing(client, p.repository, revision)
    for n, i in enumerate(p.items):
        say(f"{p.repository}: reading back {i.name} ({n + 1} of {len(p.items)})")
        received = hashlib.sha256()
        with hub.asking(f"reading back {i.name} of {p.repository}", receives=i.nbytes):
            location = hub.locate(client, p.repository, i.name, revision)
            for data in hub.download(*location, 0, i.nbytes + 1, i.name):  # one more: a longer file has another hash
                received.update(data)
        if received.hexdigest() != i.sha256 or not p.same(i, listed):
            raise PublishError(
                f"{i.name} of {p.repository} was read back with SHA-256 {received.hexdigest()[:12]}..., but was sent "
                f"with {i.sha256[:12]}.... Nothing was made public. Delete the file on the Hub, with its history, and "
                "run the same command again"
            )


def _show(client: "HfApi", p: Plan, revision: str, number: int | None, say: Say) -> None:
    """Let what was verified be seen: merge the pull request, or make the repository public."""
    place = "private" if number is None else f"in pull request {number}"
    _require(p, place, _listing(client, p.repository, revision))  # nobody else changed it meanwhile
    if number is not None:
        with hub.asking(f"merging pull request {number} of {p.repository}"):
            client.merge_pull_request(p.repository, number)
    elif p.visible and _state(client, p.repository) == "private":
        with hub.asking(f"making {p.repository} public"):
            client.update_repo_settings(p.repository, private=False)
    state = _state(client, p.repository)
    _require(p, state, _listing(client, p.repository, MAIN), p.visible and state != "public")
    say(f"{p.repository}: {state}, {len(p.items)} files verified")


def _require(p: Plan, state: str, existing: dict[str, str], wrong: bool = False) -> None:
    changed = [i.name for i in p.items if not p.same(i, existing)]
    if changed or wrong:
        names = f", and {', '.join(changed)} not as verified" if changed else ""
        raise PublishError(f"{p.repository} is {state}{names}: look at it on the Hub, then run the same command again")
