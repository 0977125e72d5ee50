"""Access to the Hugging Face Hub: limits on time and size, and every error as one message with the next step.

The token is the Hub's own login (`hf auth login`, HF_TOKEN) and appears in no message. `moelib/wire.py` holds the
limits on what a server sends.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from moelib import files, neutral, wire
from moelib.params import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAX_FILES = 20_000  # in a repository's listing; the largest repositories of GGUFs have some hundreds
WEB = re.compile(r"https?://[A-Za-z0-9._~\[\]:-]+(/[\x21-\x7e]*)?")


class HubError(UserError):
    """The Hub could not be reached, or refused; the message says why and what to do."""


def require() -> None:
    """Raise HubError if a variable of the environment makes the official client unusable."""
    try:
        from huggingface_hub import constants
    except ValueError as err:  # it reads its variables when it is imported
        raise HubError(f"an HF_... variable of the environment is invalid ({err}): unset or correct it") from None
    try:
        good = WEB.fullmatch(constants.ENDPOINT) and urlsplit(constants.ENDPOINT).port != 0
    except ValueError:  # a port beyond 65,535
        good = False
    if not good:
        raise HubError(
            f"HF_ENDPOINT is {neutral.plain(constants.ENDPOINT)!r}, which is not a web address: unset or correct it"
        )


def api(endpoint: str | None = None) -> "HfApi":
    """The official client with the user's login; `endpoint` defaults to HF_ENDPOINT or the Hub. Raises HubError."""
    require()
    from huggingface_hub import HfApi

    wire.install()
    return HfApi(endpoint=endpoint)


def located(client: "HfApi", url: str) -> tuple[str, dict[str, str] | None]:
    """(address, headers) to download `url` from; storage on another host does not get the token."""
    from huggingface_hub.file_download import get_hf_file_metadata
    from huggingface_hub.utils import build_hf_headers

    at = get_hf_file_metadata(url, endpoint=client.endpoint).location
    return at, build_hf_headers() if at.startswith(f"{client.endpoint}/") else None


def first_bytes(url: str, start: int, stop: int, headers: dict[str, str] | None) -> bytes:
    """Bytes [start, stop) of the file at `url`, fewer if it ends earlier; no more are read."""
    from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

    request_headers = {**(headers or {}), "Range": f"bytes={start}-{stop - 1}"}
    with http_stream_backoff("GET", url, headers=request_headers) as response:
        if response.status_code == 416:  # it ends before `start`
            return b""
        hf_raise_for_status(response)
        skip = 0 if response.status_code == 206 else start  # 200: the server ignored the range
        if response.status_code == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise ValueError("the server sent another range than requested")
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= skip + stop - start:
                break
    return bytes(data[skip : skip + stop - start])


class Digest:
    """A write-only file that keeps only the SHA-256 of a download."""

    def __init__(self) -> None:
        self.sha256, self.at = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.at += len(data)
        return len(data)

    def tell(self) -> int:
        return self.at

    def seek(self, *_: int) -> int:
        raise OSError("the download restarted and cannot be continued")  # the server ignored a range


@contextmanager
def asking(what: str, receives: int = 0, sends: int = 0) -> Iterator[None]:
    """Turn any error of the client into a HubError that begins with the operation `what`, without signatures or tokens.

    The `with` body should hold only requests to the Hub and the parsing of its answers, because an answer in an
    unexpected form counts as an error of the Hub. `receives`, `sends`: bytes of files to download and upload. The body
    ends with a HubError if the Hub sends much more than that, or takes too long.
    """
    require()
    from huggingface_hub import errors

    login = "log in with `hf auth login`, or set HF_TOKEN"
    steps = {
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set: unset it, or give a local file with `moelib fetch --from`",
        errors.GatedRepoError: f"its owner requires consent: give it on the repository's page, then {login}",
        errors.RepositoryNotFoundError: f"there is no such repository, or it is private: check its name, or {login}",
        errors.RevisionNotFoundError: "there is no such revision: check it, or pin another",
        errors.EntryNotFoundError: "there is no such file in that revision: pin it again",
        errors.LocalTokenNotFoundError: login,
    }
    by_status = {
        401: f"the token is not valid: {login}",
        403: "the token may not do this: use one with the right to write to that namespace",
        404: "the Hub does not have it: check the names",
        429: "the Hub asks to slow down: wait some minutes, then run the same command again",
    }
    budget = wire.Budget(receives, sends)
    try:
        with budget:
            yield
    except Exception as err:
        if isinstance(err, wire.TooMuchError) or (budget.late and not isinstance(err, UserError)):
            cause = str(err) if isinstance(err, wire.TooMuchError) else wire.SLOW
            raise HubError(f"{what}: {cause}") from None
        if isinstance(err, UserError) or (isinstance(err, OSError) and err.errno in files.NO_SPACE):
            raise
        if step := next((step for kind, step in steps.items() if isinstance(err, kind)), None):
            pass
        elif isinstance(err, errors.HfHubHTTPError):
            status = err.response.status_code if err.response is not None else 0
            other = "the Hub has a server error: run the command again later" if status >= 500 else "the Hub refused"
            step = by_status.get(status, other)
        elif _of_this_machine(err):
            variables = _set("SSL_CERT_FILE", "SSL_CERT_DIR", "HF_HOME")
            step = f"a file of this machine cannot be used{variables}: correct its path or its rights"
        elif isinstance(err, errors.HTTPError | OSError | RuntimeError | ValueError | KeyError):
            proxy = _set("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
            step = f"the Hub cannot be reached, or disconnected: check the network{proxy}, then run the command again"
        else:
            step = "the answer is not in the Hub's format: check HF_ENDPOINT and the network, or update huggingface_hub"
        raise HubError(f"{what}: {step} ({_summary(err)})") from None


def _of_this_machine(err: BaseException) -> bool:
    is_net = isinstance(err, ConnectionError | TimeoutError)
    return isinstance(err, OSError) and err.errno is not None and not is_net


def _set(*names: str) -> str:
    """The variables among `names` that are set, in brackets: they may be the cause."""
    present = [n for n in names if os.environ.get(n) or os.environ.get(n.lower())]
    return f" ({', '.join(present)} is set)" if present else ""


def _summary(err: BaseException) -> str:
    """The first line of an error, without tokens and signatures."""
    from huggingface_hub import get_token

    try:
        token = get_token()
    except (OSError, ValueError):  # the token's own file cannot be read
        token = None
    lines = [line for line in str(err).splitlines() if line.strip()] or [""]
    text = re.sub(r"\?[^\s'\")]+", "?...", f"{type(err).__name__}: {lines[0]}")
    return neutral.plain(re.sub(r"hf_\w+", "hf_...", text.replace(token, "hf_...") if token else text), 300)
