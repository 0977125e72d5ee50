"""The command line of a run: exactly the flags that it must have, since one more can move what is measured."""

import re
from collections.abc import Sequence

from moelib.invariants import Finding, Measured, holds

# Flag -> the value that it must have; None for one without a value. Whatever else a command line holds is refused.
ALWAYS = {"-ngl": "999", "-np": "1", "--host": "127.0.0.1", "--port": "0"}
IF_KNOWN = {"--fit": "off", "--cache-ram": "0", "--ctx-checkpoints": "0", "--lazy-mode": "off", "-lv": "4"}
IF_KNOWN |= {"--moe-cache-mib": "0"}
SPELLINGS = {"--flash-attn": "-fa", "--no-webui": "--no-ui"}
FIXED = {"-fa": "on", "--no-ui": None, "--offline": None}


def _flags(argv: Sequence[str]) -> dict[str, str | None] | None:
    """A command line's flags with their values; None where it holds something else, or a flag twice."""
    flags, rest = {}, list(argv[1:])
    while rest:
        flag = rest.pop(0)
        flag = SPELLINGS.get(flag, flag)
        if not flag.startswith("-") or flag in flags:
            return None
        flags[flag] = rest.pop(0) if rest and not rest[0].startswith("-") else None
    return flags


@holds("run", "these flags and no others", needs="command")
def command_as_asked(run: Measured) -> Finding:
    """The engine was told the placement of this run, and nothing that moves, fits, caches or splits by itself."""
    flags, spec, device = _flags(run.observation.argv), run.spec, run.observation.device_kind
    if flags is None:
        return False, "not a list of flags, each once"
    threads = str(run.observation.threads)
    expected: dict[str, str | None] = {**ALWAYS, **FIXED, "-c": str(spec.context), "-t": threads, "-tb": threads}
    expected |= {flag: value for flag, value in IF_KNOWN.items() if flag in flags}
    expected |= spec.placed.flags() | spec.placed.load_flags(flags)
    free = {"-m": r".+\.gguf", "--device": {"cuda": r"CUDA0", "none": r"none"}.get(device, r"RPC.*")}
    free |= {"--rpc": r"127\.0\.0\.1:\d+"} if device == "loopback" else {}
    mismatched = [
        flag for flag in sorted(expected.keys() | flags.keys() - free.keys()) if _differs(flag, expected, flags)
    ]
    mismatched += [flag for flag, form in free.items() if not re.fullmatch(form, flags.get(flag) or "")]
    return not mismatched, f"wrong: {', '.join(mismatched)}" if mismatched else "as asked"


def _differs(flag: str, expected: dict[str, str | None], flags: dict[str, str | None]) -> bool:
    return flag not in expected or flag not in flags or expected[flag] != flags[flag]
