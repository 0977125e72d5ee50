"""What a server that means harm, or a broken proxy, answers in a Hub's place: for the Hub on loopback (tests/hub.py).

`WAYS`: name -> function of the request's path that yields what goes to the client as it is, head and all; the server
ends when the client goes.
"""

import json
import time
import zlib

UNPACKED = 4 << 30  # bytes that a bomb stands for
JSON = "Content-Type: application/json"


def head(*lines, status="200 OK"):
    return "\r\n".join([f"HTTP/1.1 {status}", "Connection: close", *lines, "", ""]).encode()


def whole(body, *lines, status="200 OK"):
    """An answer with the length of its body."""
    return head(f"Content-Length: {len(body)}", *lines, status=status) + body


def endless(first, piece, wait_s=0.0):
    yield first
    while True:
        time.sleep(wait_s)
        yield piece


def bomb(_):
    """4 MB that unpack to 4 GB."""
    yield head(JSON, "Content-Encoding: gzip")
    packer = zlib.compressobj(9, wbits=31)
    yield packer.compress(b" " * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(b" " * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    for _ in range(UNPACKED >> 20):
        yield block


def redirect(to):
    return [whole(b"", f"Location: {to}", status="302 Found")]


WRONG_TYPES = {"siblings": 7, "sha": 5, "private": {}, "name": [], "orgs": 3, "auth": "x", "id": None, "files": {}}
MANY = [{"rfilename": f"{i}.gguf", "size": 1 << 40, "blobId": "0" * 40} for i in range(100_000)]
ANSWERS = {
    "packed": whole(b"abcd", "Content-Encoding: br"),  # which nobody asked for
    "rubble": whole(b"abcd", "Content-Encoding: gzip"),  # it says that it is packed, and is not
    "heads": head(*(f"X-{i}: {'x' * 1000}" for i in range(10_000))),
    "later": whole(b"{}", "Retry-After: 999999999", status="429 No"),
    "much_later": whole(b"{}", f"Retry-After: {'9' * 5000}", status="503 No"),
    "window": whole(b"{}", 'RateLimit: "api";r=0;t=999999999', status="429 No"),
    "nested": whole(b"[" * 200_000 + b"]" * 200_000, JSON),
    "wrong": whole(json.dumps(WRONG_TYPES).encode(), JSON),
    "other": whole(b'[5, null, "x", {"path": 7, "type": "file", "oid": [], "size": "x"}]', JSON),
    "many": whole(json.dumps({"id": "alice/toy-GGUF", "sha": "0" * 40, "siblings": MANY}).encode(), JSON),
    "number": whole(b'{"id": "alice/toy-GGUF", "sha": ' + b"9" * 1_000_000 + b"}", JSON),
    "nothing": b"",
    "noise": bytes(range(256)) * 100,
    "length": head(JSON, "Content-Length: x") + b"{}",
    "no_text": whole(b'{"error": "\x1b[2J\xff\xfe\x07\x9b1m"}', "X-Error-Message: \x1b[2J\x07", status="404 No"),
}
WAYS = {name: lambda _, answer=answer: [answer] for name, answer in ANSWERS.items()} | {
    "bomb": bomb,
    "flood": lambda _: endless(head(JSON), b" " * (1 << 20)),  # JSON may begin with white space
    "drip": lambda _: endless(head(JSON), b" ", 0.02),
    "drip_head": lambda _: endless(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x", 0.02),
    "circle": redirect,
    "chain": lambda path: redirect(f"{path}{time.monotonic_ns()}"),
    "elsewhere": lambda _: redirect("file:///etc/passwd"),
    "pages": lambda path: [whole(b"[]", JSON, f'Link: <{path}>; rel="next"')],  # the next page is itself
}
