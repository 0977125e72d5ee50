"""Tokens counted by a model's own tokenizer, for runners that do not count them, or count words."""

import re
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from moelib.catalogue.params import Workload
from moelib.engine.client import RunError
from moelib.engine.engine import Engine
from moelib.measure.runner import Prompt

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


def prompts(llama: Engine, file: Path, workloads: Sequence[Workload], context: int) -> list[Prompt]:
    """Every workload with its text, for a server that takes text alone, and how many tokens it is.

    Raises RunError for one that is made of token ids, or does not fit the context.
    """
    found = []
    for w in workloads:
        if not w.text:
            raise RunError(
                "prompt-unsupported",
                f"this server takes text, and {w.name} is of token ids: name a workload that is a text",
            )
        text = w.text if w.prompt_tokens is None else repeated(llama, file, w.text, w.prompt_tokens)
        n = count(llama, file, text, begin=True)
        if n + w.generate_tokens > context:
            raise RunError("context-too-small", f"{w.name} needs {n} + {w.generate_tokens} tokens of {context}")
        found.append(Prompt(w, text, n))
    return found


def repeated(llama: Engine, file: Path, text: str, tokens: int) -> str:
    """A text, repeated and cut where it has so many tokens, with the one that begins it: or one or two fewer, where a
    tokenizer makes no such cut."""

    def counted(length: int) -> int:
        return count(llama, file, long[:length], begin=True)

    long = " ".join([text] * (tokens // max(1, len(text.split())) + 1))
    # counts do not fall as the text grows, but for a token at its end
    return long[: bisect_right(range(len(long)), tokens, lo=1, key=counted) - 1]
