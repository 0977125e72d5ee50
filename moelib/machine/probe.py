"""Run a tool for its output, with limits on time and size, and end it with all its child processes."""

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
from typing import IO

from moelib.machine import process

ANSWER_BYTES = 4 << 20  # the longest help is 60 kB
CHUNK_BYTES = 1 << 16
WAIT_S = 0.05  # between checks of a tool without output
MARK = "MOELIB_PROBE"  # in a tool's environment, to recognise its child processes
WHY: dict[int, str] = {
    errno.ENOEXEC: "it is a program for another processor or system",
    errno.EACCES: "it may not be executed: check its rights, or the disk's mount options",
    errno.ENOENT: "it, or the interpreter or loader that it names, does not exist",
    errno.ELOOP: "it is a link that leads back to itself",
}


class ProbeError(Exception):
    """The tool gave no answer; the message says why and continues a sentence that begins with the tool's name."""


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


def ask(argv: Sequence[str], timeout_s: float, cap_bytes: int = ANSWER_BYTES) -> Answer:
    """Run a tool to its end. Raises ProbeError if it cannot be run, does not end in time, or writes too much."""
    try:
        tool = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**process.inherited(), MARK: (mark := secrets.token_hex(16))}, start_new_session=True,
        )  # fmt: skip
    except OSError as err:
        raise ProbeError(f"cannot be run: {WHY.get(err.errno or 0, err.strerror)}") from None
    alive = True
    try:
        outputs = _listen(tool, time.monotonic() + timeout_s, timeout_s, cap_bytes)
        alive = False
    finally:
        process.end_group(tool, alive)
        _end_marked(mark)
        for pipe in _pipes(tool):
            pipe.close()
    return Answer(tool.returncode, *(part.decode("utf-8", "replace") for part in outputs))


def _end_marked(mark: str) -> None:
    """Kill processes that a tool left in another session; they still have its environment (Linux)."""
    for path in glob.glob("/proc/[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's process, or ended
            if mark.encode() in Path(path).read_bytes():
                os.kill(int(path.split("/")[2]), signal.SIGKILL)


def _pipes(tool: subprocess.Popen[bytes]) -> list[IO[bytes]]:
    return [pipe for pipe in (tool.stdout, tool.stderr) if pipe is not None]


def _listen(tool: subprocess.Popen[bytes], deadline: float, timeout_s: float, cap_bytes: int) -> list[bytearray]:
    """The tool's stdout and stderr until it ends."""
    outputs = [bytearray(), bytearray()]
    with selectors.DefaultSelector() as ready:
        for pipe, output in zip(_pipes(tool), outputs, strict=True):
            os.set_blocking(pipe.fileno(), False)
            ready.register(pipe, selectors.EVENT_READ, (pipe, output))
        while True:
            over = process.ended(tool) is not None  # checked before the last read, so that nothing is missed
            for key, _ in ready.select(0 if over else WAIT_S if ready.get_map() else process.POLL_S):
                pipe, output = key.data
                while chunk := pipe.read(CHUNK_BYTES):
                    output.extend(chunk)
                    if sum(map(len, outputs)) > cap_bytes:
                        raise ProbeError(f"wrote more than {cap_bytes >> 20} MiB and was ended")
                if chunk == b"":
                    ready.unregister(pipe)
            if over:
                return outputs
            if time.monotonic() > deadline:
                raise ProbeError(f"did not end in {timeout_s:g} s and was ended")
