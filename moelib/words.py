"""How many runs of a study are usable, in the same words everywhere.

A run is *usable* if it is valid or degraded. The two are always counted separately, with the reasons of the degraded.
"""

from collections import Counter
from collections.abc import Mapping

from moelib import neutral
from moelib.gather import standing_for
from moelib.study import Results


def usable(tally: Mapping[str, int], flags: Mapping[str, int]) -> str:
    """`90 of 90 runs usable: 57 valid, 33 degraded (host-quiet in 33)`, then what is invalid or missing.

    `tally` as that of a study or a cell; `flags`: reason -> how many degraded runs have it.
    """
    counts = {k: tally[k] for k in ("valid", "degraded", "invalid", "missing")}
    n_usable, planned = counts["valid"] + counts["degraded"], sum(counts.values())
    text = f"{n_usable} of {planned} runs usable"
    if n_usable:
        why = ", ".join(f"{reason} in {n}" for reason, n in sorted(flags.items()))
        text += f": {counts['valid']} valid, {counts['degraded']} degraded" + (f" ({why})" if why else "")
    rest = [f"{counts[k]} {k}" for k in ("invalid", "missing") if counts[k]]
    return "; ".join([text, *([", ".join(rest)] if rest else [])])


def flags(results: Results, cell: str | None = None) -> Counter[str]:
    """Reason -> how many usable runs of the study, or of one cell, are degraded by it."""
    count: Counter[str] = Counter()
    for c in (c for c in results.cells if cell in (None, c.name)):
        whole = {r.run_id for block in results.statuses[c.name].blocks for r in block}
        for specs in c.blocks:
            runs = [
                r for r in standing_for(specs, results.evidence.standing) if r and results.evidence.why_not(r) is None
            ]
            # runs that are valid one by one and do not fit together are all invalid
            if len(runs) < len(specs) or all(r.run_id in whole for r in runs):
                count.update(neutral.plain(reason) for r in runs for reason in r.reasons)
    return count


def summary(results: Results) -> str:
    """`usable` of the whole study."""
    return usable(results.tally, flags(results))
