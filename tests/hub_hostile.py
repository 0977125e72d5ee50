"""What a server that means harm, or a broken proxy, answers in a Hub's place: for the Hub on loopback (tests/hub.py).

Each way is a generator of bytes that go to the client as they are, head and all; the server ends when the client goes.
"""

import json
import time
import zlib

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
UNPACKED = 4 << 30  # bytes that a bomb stands for
WAYS = {}


def way(function):
    WAYS[function.__name__] = function
    return function


@way
def flood(_):
    """White space without an end, which JSON may begin with."""
    yield HEAD + b"\r\n"
    while True:
        yield b" " * (1 << 20)


@way
def bomb(_):
    """4 MB that unpack to 4 GB."""
    yield HEAD + b"Content-Encoding: gzip\r\n\r\n"
    packer = zlib.compressobj(9, wbits=31)
    yield packer.compress(b" " * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(b" " * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    for _ in range(UNPACKED >> 20):
        yield block


@way
def packed(_):
    """An encoding that nobody asked for."""
    yield HEAD + b"Content-Encoding: br\r\nContent-Length: 4\r\n\r\nabcd"


@way
def rubble(_):
    """What says that it is packed, and is not."""
    yield HEAD + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd"


@way
def drip(_):
    """A body that goes on for ever, a byte at a time."""
    yield HEAD + b"\r\n"
    while True:
        time.sleep(0.02)
        yield b" "


@way
def drip_head(_):
    """A head that goes on for ever, a byte at a time."""
    yield b"HTTP/1.1 200 OK\r\nX-Slow: "
    while True:
        time.sleep(0.02)
        yield b"x"


@way
def heads(_):
    """A head of 10 MB."""
    yield b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: %s\r\n" % (i, b"x" * 1000) for i in range(10_000)) + b"\r\n"


@way
def circle(path):
    """A redirect to itself."""
    yield b"HTTP/1.1 302 Found\r\nConnection: close\r\nContent-Length: 0\r\nLocation: %s\r\n\r\n" % path.encode()


@way
def chain(path):
    """Redirects that never come to an end, each to another address."""
    yield b"HTTP/1.1 307 Found\r\nConnection: close\r\nLocation: %s%d\r\n\r\n" % (
        path.encode(),
        time.monotonic_ns(),
    )


@way
def elsewhere(_):
    """A redirect to a file of the client's machine."""
    yield b"HTTP/1.1 302 Found\r\nConnection: close\r\nContent-Length: 0\r\nLocation: file:///etc/passwd\r\n\r\n"


@way
def later(_):
    """Come again in thirty years."""
    yield b"HTTP/1.1 429 No\r\nConnection: close\r\nContent-Length: 2\r\nRetry-After: 999999999\r\n\r\n{}"


@way
def much_later(_):
    """Come again after the end of the world."""
    yield b"HTTP/1.1 503 No\r\nConnection: close\r\nContent-Length: 2\r\nRetry-After: %s\r\n\r\n{}" % (b"9" * 5000)


@way
def window(_):
    """The same, in the newer words."""
    yield b'HTTP/1.1 429 No\r\nConnection: close\r\nContent-Length: 2\r\nRateLimit: "api";r=0;t=999999999\r\n\r\n{}'


@way
def pages(path):
    """A listing whose next page is itself."""
    body = b"[]"
    yield (HEAD + b'Content-Length: %d\r\nLink: <%s>; rel="next"\r\n\r\n' % (len(body), path.encode()) + body)


def _json(body):
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


@way
def nested(_):
    """Lists in lists."""
    yield _json(b"[" * 200_000 + b"]" * 200_000)


@way
def wrong(_):
    """Everything of the wrong type."""
    odd = {
        "siblings": 7,
        "sha": 5,
        "private": {},
        "name": [],
        "orgs": 3,
        "auth": "x",
        "id": None,
        "files": {},
        "modelId": 1,
    }
    yield _json(json.dumps(odd).encode())


@way
def other(_):
    """JSON of another kind than was asked for."""
    yield _json(b'[5, null, "x", {"path": 7, "type": "file", "oid": [], "size": "x"}]')


@way
def many(_):
    """A repository of a hundred thousand files."""
    files = [{"rfilename": f"{i}.gguf", "size": 1 << 40, "blobId": "0" * 40} for i in range(100_000)]
    yield _json(json.dumps({"id": "alice/toy-GGUF", "sha": "0" * 40, "siblings": files}).encode())


@way
def number(_):
    """A number of a million digits."""
    yield _json(b'{"id": "alice/toy-GGUF", "sha": ' + b"9" * 1_000_000 + b"}")


@way
def nothing(_):
    """The connection is closed without a word."""
    yield b""


@way
def noise(_):
    """No HTTP at all."""
    yield bytes(range(256)) * 100


@way
def length(_):
    """A length that is no number."""
    yield HEAD + b"Content-Length: x\r\n\r\n{}"


@way
def no_text(_):
    """JSON that is not UTF-8, with what moves a terminal's cursor in it."""
    body = b'{"error": "\x1b[2J\xff\xfe\x07\x9b1m"}'
    head = b"HTTP/1.1 404 Not Found\r\nConnection: close\r\nX-Error-Message: \x1b[2J\x07\r\nContent-Length: %d\r\n\r\n"
    yield head % len(body) + body
