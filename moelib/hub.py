"""The Hugging Face Hub: its client with bounded waits, and its errors as one message that names the next step.

The token is the Hub's own login (`hf auth login`, HF_TOKEN); it appears in no message.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from moelib import process
from moelib.params import UserError

if TYPE_CHECKING:
    from httpx2 import Client, Request
    from huggingface_hub import HfApi

WAIT_S = 60.0  # for an answer to begin, or to go on; the library itself waits for ever


class HubError(UserError):
    """The Hub could not be asked, or refused; the message says why and what to do."""


def api(endpoint: str | None = None) -> "HfApi":
    """The official client, logged in as its user is; `endpoint`: HF_ENDPOINT or the Hub itself."""
    from huggingface_hub import HfApi

    _bound_waits()
    return HfApi(endpoint=endpoint)


@cache
def _bound_waits() -> None:
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def bound(request: "Request") -> None:
        # the library passes timeout=None with many requests, which a client's own timeout does not override
        asked, limit = request.extensions.get("timeout", {}), process.patience(WAIT_S)
        request.extensions["timeout"] = {k: asked.get(k) or limit for k in ("connect", "read", "write", "pool")}

    def client() -> "Client":
        made = default_client_factory()
        made.event_hooks = {"request": [bound, *made.event_hooks["request"]]}
        return made

    set_client_factory(client)


def located(client: "HfApi", url: str) -> tuple[str, dict[str, str] | None]:
    """(address, headers) to download `url` from: storage is elsewhere, and is not told the token."""
    from huggingface_hub.file_download import get_hf_file_metadata
    from huggingface_hub.utils import build_hf_headers

    at = get_hf_file_metadata(url, endpoint=client.endpoint).location
    return at, build_hf_headers() if at.startswith(f"{client.endpoint}/") else None


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Turn whatever the client raises into a HubError that begins with `what`, without signatures or tokens."""
    from huggingface_hub import errors

    login = "log in with `hf auth login`, or set HF_TOKEN"
    steps = {
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set: unset it, or give a local file with `moelib fetch --from`",
        errors.GatedRepoError: f"its owner asks for consent: give it on the repository's page, then {login}",
        errors.RepositoryNotFoundError: f"there is no such repository, or it is private: check its name, or {login}",
        errors.RevisionNotFoundError: "there is no such revision: check it, or pin another",
        errors.EntryNotFoundError: "there is no such file in that revision: pin it again",
        errors.LocalTokenNotFoundError: login,
    }
    by_status = {
        401: f"the token is not known: {login}",
        403: "the token may not do this: use one with the right to write to that namespace",
        404: "there is no such thing: check the names",
        429: "the Hub asks to slow down: wait some minutes, then run the same command again",
    }
    try:
        yield
    except tuple(steps) as err:
        step = next(step for kind, step in steps.items() if isinstance(err, kind))
        raise HubError(f"{what}: {step} ({_told(err)})") from None
    except errors.HfHubHTTPError as err:
        status = err.response.status_code if err.response is not None else 0
        again = "the Hub is in trouble: run the same command again later" if status >= 500 else "the Hub refused"
        raise HubError(f"{what}: {by_status.get(status, again)} ({_told(err)})") from None
    except (errors.HTTPError, OSError, RuntimeError, ValueError, KeyError) as err:
        on_disk = (
            isinstance(err, OSError) and err.errno is not None and not isinstance(err, ConnectionError | TimeoutError)
        )
        if isinstance(err, UserError) or on_disk:
            raise
        reach = "the Hub cannot be reached, or broke off: check the network, then run the same command again"
        raise HubError(f"{what}: {reach} ({_told(err)})") from None


def _told(err: BaseException) -> str:
    """The first line of an error, without what only its sender should see."""
    from huggingface_hub import get_token

    lines = [line for line in str(err).splitlines() if line.strip()] or [""]
    text = re.sub(r"\?[^\s'\")]+", "?...", f"{type(err).__name__}: {lines[0]}")
    token = get_token()
    return re.sub(r"hf_\w+", "hf_...", text.replace(token, "hf_...") if token else text)[:300]
