"""Tokens counted by a model's own tokenizer, for runners that do not count them, or count words."""

import re
import subprocess
import tempfile
from pathlib import Path

from moelib.engine.client import RunError
from moelib.engine.engine import Engine

LIMIT_S = 120.0
COUNT = re.compile(r"^Total number of tokens: (\d{1,12})$", re.M)


def count(llama: Engine, file: Path, text: str, begin: bool) -> int:
    """How many tokens the GGUF's tokenizer makes of a text, by llama-tokenize, which reads no weights.

    begin: with the token that begins a text, where the model has one. Raises RunError "tokenizer", and EngineError
    where the build has no such tool.
    """
    argv = [llama.tool("llama-tokenize"), "-m", str(file), "--show-count", "--log-disable"]
    with tempfile.TemporaryDirectory(prefix="moelib-") as work:
        path = Path(work) / "text.txt"
        path.write_bytes(text.encode())
        argv += ["-f", str(path), *([] if begin else ["--no-bos"])]
        try:
            done = subprocess.run(argv, capture_output=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as err:
            raise RunError("tokenizer", f"llama-tokenize did not count the tokens of a text: {err}") from None
    found = COUNT.findall(done.stdout.decode("utf-8", "replace"))
    if done.returncode or not found:
        told = done.stderr.decode("utf-8", "replace")[-300:]
        raise RunError("tokenizer", f"llama-tokenize ended with {done.returncode} and no count of {file.name}: {told}")
    return int(found[-1])
