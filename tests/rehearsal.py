"""A whole publication as a user sees it, to a Hub on loopback: plan, upload, Ctrl-C, resume, verification.

    python tests/rehearsal.py STUDY TRANSCRIPT    writes the commands and their output, as Markdown

The commands are real, and so are the files; the Hub is tests/hub.py.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hub import Hub, official_client
from hub_state import MAIN

from moelib.catalogue.facts import Receipt
from moelib.study import plan

TOKEN, SPACE, WAIT_S = "hf_write", "alice", 300
INTRO = """# A publication, rehearsed

Written by `make rehearsal`. The files are the six of the committed demo study, made again by llama.cpp and byte for
byte those that its records measured; the commands are the real ones, with Hugging Face's own client. The Hub is a
stand-in on loopback (`tests/hub.py`): the real one was not reached. `$PORT` is the stand-in's.
"""


class Stage:
    """The transcript, and what the Hub saw meanwhile."""

    def __init__(self, server, study, outputs):
        self.server, self.study, self.outputs = server, study, outputs
        self.lines, self.seen = [INTRO], 0

    def say(self, text):
        self.lines.append(text)

    def command(self, *args, interrupt=None):
        """Run `moelib publish STUDY --to SPACE *args`; `interrupt`: send it Ctrl-C once this is so."""
        argv = [sys.executable, "-m", "moelib.cli", "publish", self.study, "--to", SPACE, *args]
        off = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        env = (
            os.environ | {"HF_ENDPOINT": self.server.url, "HF_TOKEN": TOKEN, "MOELIB_OUTPUTS": str(self.outputs)} | off
        )
        # a shell starts what it puts into the background with Ctrl-C ignored, and children inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8") as out,
            subprocess.Popen(argv, env=env, stdout=out, stderr=out) as child,
        ):
            deadline = time.monotonic() + WAIT_S
            try:
                while child.poll() is None and time.monotonic() < deadline:
                    if interrupt and interrupt():
                        child.send_signal(signal.SIGINT)
                        interrupt = None
                    time.sleep(0.02)
            finally:
                child.kill()
            out.seek(0)
            text = out.read()
        assert TOKEN not in text
        shown = "export HF_ENDPOINT=http://127.0.0.1:$PORT\n$ " if self.seen == 0 else ""
        text = text.replace(self.server.url, "http://127.0.0.1:$PORT").rstrip()
        self.say(
            f"```\n$ {shown}moelib publish {self.study} --to {SPACE} {' '.join(args)}".rstrip() + f"\n{text}\n```\n"
        )
        return child.returncode, text

    def hub(self):
        """What it took since the last time, and what anyone can see."""
        new, self.seen = self.server.requests[self.seen :], len(self.server.requests)
        stored = [r for r in new if r.line.startswith("PUT /storage") and r.status == 200]
        received = sum(r.received for r in stored)
        public = {r: len(refs[MAIN]) for r, refs in self.server.public_history()[-1][1].items()}
        shown = ", ".join(f"{r} with {n} files" for r, n in sorted(public.items())) or "nothing"
        private = {r.id: len(r.files()) - 1 for r in self.server.repos.values() if r.private}
        hidden = ", ".join(f"{r} with {n} files" for r, n in sorted(private.items())) or "nothing"
        writes = sum(r.method not in ("GET", "HEAD") for r in new)
        self.say(
            f"*The Hub's side: {len(new)} requests, {writes} of them to write, {len(stored)} objects stored with "
            f"{received:,} bytes. Public: {shown}. Private: {hidden}.*\n"
        )
        return received, public


def rehearse(study, folder, stop_at=3):
    """The transcript, and (bytes stored until the interruption, after it, after that).

    Of a copy of the study: a receipt of a stand-in has no place among what was measured.
    """
    copy = shutil.copytree(plan.outputs() / study, folder / "outputs" / study)
    with Hub(folder, silence_s=WAIT_S, part_bytes=1 << 30) as server, official_client(server):
        stage = Stage(server, study, copy.parent)
        stage.say("## The plan\n")
        code, _ = stage.command()
        assert (code, stage.hub(), server.repos) == (0, (0, {}), {})

        stage.say(f"## Interrupted: Ctrl-C while file {stop_at} is being sent\n")
        silence = server.fail("timeout", match="^PUT /storage", nth=stop_at, times=1)
        code, text = stage.command("--yes", "--public", interrupt=lambda: silence.struck)
        server.let_go()
        assert code == 130, text
        first, public = stage.hub()
        assert public == {}

        stage.say("## The same command again\n")
        code, text = stage.command("--yes", "--public")
        assert code == 0, text
        second, public = stage.hub()
        assert len(public) == len(re.findall(r": public, \d+ files verified", text)) > 0
        assert text.count("reading back") == sum(public.values()) - len(public)  # all but the Hub's own .gitattributes

        stage.say("## And once more: nothing is left to do\n")
        code, text = stage.command("--yes", "--public")
        assert code == 0, text
        third, again = stage.hub()
        assert again == public
        receipts = [Receipt.model_validate_json(p.read_bytes()) for p in (copy / "published").glob("*.json")]
        assert {r.repository: len(r.files) + 1 for r in receipts} == public
        assert all(r.here and r.public for r in receipts)
        return "\n".join(stage.lines), (first, second, third)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as own:
        text, sent = rehearse(sys.argv[1], Path(own))
    Path(sys.argv[2]).write_text(text, encoding="utf-8")
    print(f"{sys.argv[2]}: {sent[0]:,} bytes sent until the interruption, {sent[1]:,} after it, {sent[2]:,} then")
