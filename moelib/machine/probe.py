"""Run a tool for its output, with limits on time and size, and end it with all its child processes."""

import contextlib
import errno
import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import psutil

from moelib.machine import process

ANSWER_BYTES = 4 << 20  # the longest help is 60 kB
MARK = "MOELIB_PROBE"  # in a tool's environment, to recognise its child processes
WHY: dict[int, str] = {
    errno.ENOEXEC: "it is a program for another processor or system",
    errno.EACCES: "it may not be executed: check its rights, or the disk's mount options",
    errno.ENOENT: "it, or the interpreter or loader that it names, does not exist",
    errno.ELOOP: "it is a link that leads back to itself",
}


class ProbeError(Exception):
    """The tool gave no answer; the message says why and continues a sentence that begins with the tool's name."""


class Answer(NamedTuple):
    code: int
    text: str
    """What it wrote, to either output."""


def ask(argv: Sequence[str], timeout_s: float) -> Answer:
    """Run a tool to its end. Raises ProbeError if it cannot be run, does not end in time, or writes too much."""
    deadline, mark = time.monotonic() + timeout_s, secrets.token_hex(16)
    with tempfile.TemporaryFile() as output:
        try:
            tool = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={**process.inherited(), MARK: mark}, start_new_session=True,
            )  # fmt: skip
        except OSError as err:
            raise ProbeError(f"cannot be run: {WHY.get(err.errno or 0, err.strerror)}") from None
        running = True
        try:
            while running:
                running = process.ended(tool) is None  # before the look, so that nothing is missed
                if os.fstat(output.fileno()).st_size > ANSWER_BYTES:
                    raise ProbeError(f"wrote more than {ANSWER_BYTES >> 20} MiB and was ended")
                if running and time.monotonic() > deadline:
                    raise ProbeError(f"did not end in {timeout_s:g} s and was ended")
                time.sleep(process.POLL_S if running else 0)
        finally:
            process.end_group(tool, running)
            _end_marked(mark)
        output.seek(0)
        return Answer(tool.returncode, output.read(ANSWER_BYTES).decode("utf-8", "replace"))


def _end_marked(mark: str) -> None:
    """Kill processes that a tool left in another session; they still have its environment."""
    for p in psutil.process_iter(["environ"]):
        if (p.info["environ"] or {}).get(MARK) == mark:  # None of another user's
            with contextlib.suppress(psutil.Error):
                p.kill()
