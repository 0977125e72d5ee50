"""Read the log of a child process with bounded memory and work, however much is written to it."""

import os
import re
from collections.abc import Callable
from pathlib import Path

LOG_BYTES = 64 << 20  # a normal run's log is under 1 MiB
KEPT_BYTES = 1 << 20  # kept of a log over its limit: its start, which holds the reason
LINE_BYTES = 1 << 16  # longest line, and longest end of a log, that is read
CHUNK_BYTES = 1 << 20


class Log:
    """The log at `path`, which may hold `limit` bytes."""

    def __init__(self, path: Path, limit: int = LOG_BYTES):
        self.path, self.limit = path, limit

    def size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:  # not written yet, or removed
            return 0

    def flooded(self) -> bool:
        return self.size() > self.limit

    def cut(self) -> None:
        """Truncate to the first KEPT_BYTES, after its writer has ended."""
        os.truncate(self.path, KEPT_BYTES)

    def text(self) -> str:
        """The log's text, up to its limit."""
        with self.path.open("rb") as f:
            return f.read(self.limit).decode("utf-8", "replace")

    def tail(self, lines: int) -> str:
        """The last lines, at most LINE_BYTES."""
        with self.path.open("rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - LINE_BYTES))
            last = f.read(LINE_BYTES).decode("utf-8", "replace")
        return "\n".join(last.splitlines()[-lines:])

    def looking_for(self, pattern: str) -> Callable[[], re.Match[str] | None]:
        """A function that returns the first match of `pattern` within a line, or None if it is not written yet.

        Each call reads only what was written since the previous one.
        """
        searched, at, begun = re.compile(pattern), 0, b""

        def look() -> re.Match[str] | None:
            nonlocal at, begun
            with self.path.open("rb") as f:
                f.seek(at)
                for chunk in iter(lambda: f.read(CHUNK_BYTES), b""):
                    at += len(chunk)
                    here = begun + chunk
                    if match := searched.search(here.decode("utf-8", "replace")):
                        return match
                    begun = here[here.rfind(b"\n") + 1 :][-LINE_BYTES:]
                    if at > self.limit:
                        break
            return None

        return look
