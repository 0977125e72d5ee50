"""What a run's command line must be, by its runner."""

import re
from collections.abc import Sequence

from moelib.catalogue.facts import LLAMA_SERVER, SHIMMY, SHIMMY_GENERATE
from moelib.measure.run import Observation, Spec

# Flag -> the value that it must have; None for one without a value. Whatever else a command line holds is refused.
ALWAYS = {"-ngl": "999", "-np": "1", "--host": "127.0.0.1", "--port": "0"}
IF_KNOWN = {"--fit": "off", "--cache-ram": "0", "--ctx-checkpoints": "0", "--lazy-mode": "off", "-lv": "4"}
IF_KNOWN |= {"--moe-cache-mib": "0"}
SPELLINGS = {"--flash-attn": "-fa", "--no-webui": "--no-ui"}
FIXED = {"-fa": "on", "--no-ui": None, "--offline": None}
Flags = dict[str, str | None]


def wrong(runner: str, spec: Spec, observation: Observation) -> list[str]:
    """What is not as it was asked, flag by flag; empty where all is. A runner that is not known is llama-server."""
    begin, of = OF.get(runner, OF[LLAMA_SERVER])
    flags = _flags(observation.argv, begin)
    if flags is None:
        return ["not a list of flags, each once"]
    expected, free = of(spec, observation, flags)
    given = {flag: value for flag, value in flags.items() if flag not in free}
    mismatched = sorted({flag for flag, _ in expected.items() ^ given.items()})
    return mismatched + [flag for flag, form in free.items() if not re.fullmatch(form, flags.get(flag) or "")]


def _flags(argv: Sequence[str], begin: int) -> Flags | None:
    """A command line's flags with their values; None where it holds something else, or a flag twice."""
    flags: Flags = {}
    rest = list(argv[begin:])
    while rest:
        flag = rest.pop(0)
        flag = SPELLINGS.get(flag, flag)
        if not flag.startswith("-") or flag in flags:
            return None
        flags[flag] = rest.pop(0) if rest and not rest[0].startswith("-") else None
    return flags


def _of_llama_server(spec: Spec, observation: Observation, flags: Flags) -> tuple[Flags, dict[str, str]]:
    """(flags with their values, those of which only the form is known)."""
    threads, device = str(observation.threads), observation.device_kind
    expected: Flags = {**ALWAYS, **FIXED, "-c": str(spec.context_tokens), "-t": threads, "-tb": threads}
    expected |= {flag: value for flag, value in IF_KNOWN.items() if flag in flags}
    expected |= spec.placed.flags() | spec.placed.load_flags(flags)
    free = {"-m": r".+\.gguf", "--device": {"cuda": r"CUDA0", "none": r"none"}.get(device, r"RPC.*")}
    return expected, free | ({"--rpc": r"127\.0\.0\.1:\d+"} if device == "loopback" else {})


def _of_shimmy(spec: Spec, observation: Observation, flags: Flags) -> tuple[Flags, dict[str, str]]:
    """The same of `shimmy serve`."""
    return spec.placed.flags(), {"--model-path": r".+\.gguf", "--bind": r"127\.0\.0\.1:\d+"}


def _of_generate(spec: Spec, observation: Observation, flags: Flags) -> tuple[Flags, dict[str, str]]:
    """The same of `shimmy generate NAME`, which gets its file by a variable."""
    return spec.placed.flags(), {"--prompt": r"(?s).+", "--max-tokens": r"\d+"}


OF = {LLAMA_SERVER: (1, _of_llama_server), SHIMMY: (2, _of_shimmy), SHIMMY_GENERATE: (3, _of_generate)}
"""Runner -> how many words of a command line come before its flags, and what these must be."""
