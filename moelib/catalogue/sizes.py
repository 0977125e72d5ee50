"""Sizes of memory as people write them: 12GiB, 24GB, 512MiB."""

import re

from moelib.base.schema import ParamsError

PREFIXES = "KMGT"
SIZE = re.compile(rf"(\d+(?:\.\d+)?)\s*([{PREFIXES}])(i?)B?", re.IGNORECASE)


def parse(text: str) -> int:
    """Bytes of a size: GiB (and G, as tools of NVIDIA say it) are 2^30, GB are 10^9. Raises ParamsError."""
    m = SIZE.fullmatch(text.strip())
    if m is None or float(m[1]) == 0:
        raise ParamsError(f"{text!r} is no size of memory: write it with its unit, such as 12GiB or 24GB")
    decimal = not m[3] and m[0].rstrip().lower().endswith("b")
    return int(float(m[1]) * (1000 if decimal else 1024) ** (1 + PREFIXES.index(m[2].upper())))
