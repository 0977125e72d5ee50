"""A tool asked for a few words: bounded in time and in what is read of it, and ended with all that it started."""

import contextlib
import errno
import glob
import os
import secrets
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moelib import process

ANSWER_BYTES = 4 << 20  # the longest help is 60 kB
CHUNK_BYTES = 1 << 16
WAIT_S = 0.05  # between looks at a tool that is silent
MARK = "MOELIB_PROBE"  # in a tool's environment: who has it belongs to this tool
WHY = {
    errno.ENOEXEC: "it is a program for another processor or system",
    errno.EACCES: "it may not be executed: check its rights, or the disk's mount options",
    errno.ENOENT: "it, or the interpreter or loader that it names, is not there",
    errno.ELOOP: "it is a link that leads back to itself",
}


class ProbeError(Exception):
    """The tool gave no answer; the message says why, in words that go on from its name."""


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


def ask(argv: Sequence[str], timeout_s: float, cap_bytes: int = ANSWER_BYTES) -> Answer:
    """Run a tool to its end. Raises ProbeError: it cannot be run, did not end in time, or said too much."""
    try:
        tool = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**process.inherited(), MARK: (mark := secrets.token_hex(16))}, start_new_session=True,
        )  # fmt: skip
    except OSError as err:
        raise ProbeError(f"cannot be run: {WHY.get(err.errno, err.strerror)}") from None
    alive = True
    try:
        said = _listen(tool, time.monotonic() + timeout_s, timeout_s, cap_bytes)
        alive = False
    finally:
        process.end_group(tool, alive)
        _end_marked(mark)
        tool.stdout.close()
        tool.stderr.close()
    return Answer(tool.returncode, *(part.decode("utf-8", "replace") for part in said))


def _end_marked(mark: str) -> None:
    """Kill what a tool left behind in a session of its own: it still has the tool's environment (Linux)."""
    for path in glob.glob("/proc/[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or gone
            if mark.encode() in Path(path).read_bytes():
                os.kill(int(path.split("/")[2]), signal.SIGKILL)


def _listen(tool: subprocess.Popen, deadline: float, timeout_s: float, cap_bytes: int) -> list[bytes]:
    """What the tool says until it ends, on stdout and stderr."""
    said = [bytearray(), bytearray()]
    with selectors.DefaultSelector() as ready:
        for i, pipe in enumerate((tool.stdout, tool.stderr)):
            os.set_blocking(pipe.fileno(), False)
            ready.register(pipe, selectors.EVENT_READ, said[i])
        while True:
            over = process.ended(tool) is not None  # before the last look, so that nothing is missed
            for key, _ in ready.select(0 if over else WAIT_S if ready.get_map() else process.POLL_S):
                while chunk := key.fileobj.read(CHUNK_BYTES):
                    key.data.extend(chunk)
                    if sum(map(len, said)) > cap_bytes:
                        raise ProbeError(f"said more than {cap_bytes >> 20} MiB and was ended")
                if chunk == b"":
                    ready.unregister(key.fileobj)
            if over:
                return said
            if time.monotonic() > deadline:
                raise ProbeError(f"did not end in {timeout_s:g} s and was ended")
