"""The table that llama.cpp publishes of quants (its tools/perplexity, LLaMA 3 8B), of a study's files, computed twice.

    python benchmarks/scoreboard.py FOLDER [FOLDER ...]

Once as llama-perplexity printed it, from the logs kept with each comparison; once from the values of each token, by
estimators written here. Both must print the same, or this ends with 1. Its errors take every token for an independent
one; the last columns say by how much that is too little, against errors by chunk. Of further folders: what experts on
the CPU change of what their files say.
"""

from __future__ import annotations

import gzip
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tabulate import tabulate

from moelib.answers import quality
from moelib.answers.quality import Loss
from moelib.quality import checks, comparison
from moelib.quality.score import Scores
from moelib.study.study import Study

Pair = tuple[float, float]
"""A mean, and its standard error where tokens are independent."""
PRINTED = {
    "PPL": (r"Mean PPL\(Q\) *: +(\S+) ± +(\S+)", 6),
    "ΔPPL": (r"Mean PPL\(Q\)-PPL\(base\) *: +(\S+) ± +(\S+)", 6),
    "KLD": (r"Mean +KLD: +(\S+) ± +(\S+)", 6),
    "Mean Δp, %": (r"Mean +Δp: +(\S+) ± +(\S+) %", 3),
    "RMS Δp, %": (r"RMS Δp *: +(\S+) ± +(\S+) %", 3),
    "Same top, %": (r"Same top p: +(\S+) ± +(\S+) %", 3),
}
"""Column -> how the tool prints it, and with how many decimals."""
LAST_DIGITS = {"ΔPPL": 40, "PPL": 40, "KLD": 15}
"""By how many of the last printed digits both may differ: the tool takes log-probabilities of 16 bits, and adds up in
another order."""
TIES = 3e-4
"""Share of tokens of which 16 bits may make another one the likeliest, or two of few tokens."""


def mean(values: np.ndarray) -> Pair:
    """As the tool has it: the variance by n - 1 of single tokens."""
    n = len(values)
    return float(values.mean()), float(np.sqrt((np.mean(values**2) - values.mean() ** 2) / (n - 1)))


def again(s: Scores) -> dict[str, Pair]:
    """The table's columns from the tokens."""
    q, p, kld = s.nll.ravel(), s.base_nll.ravel(), s.kld.ravel()
    n, (mean_q, sem_q), (mean_p, sem_p) = len(q), mean(q), mean(p)
    ppl, base = np.exp(mean_q), np.exp(mean_p)
    shared = (np.mean(q * p) - mean_q * mean_p) / (n - 1)
    spread = (ppl * sem_q) ** 2 + (base * sem_p) ** 2 - 2 * ppl * base * shared
    moved = 100 * s.p_diff.ravel()
    square, of_square = mean(moved**2)
    same = s.same_top.ravel().astype(float)
    return {
        "PPL": (float(ppl), float(ppl * sem_q)),
        "ΔPPL": (float(ppl - base), float(np.sqrt(max(0.0, spread)))),
        "KLD": mean(kld),
        "Mean Δp, %": mean(moved),
        "RMS Δp, %": (float(np.sqrt(square)), float(of_square / (2 * np.sqrt(square)))),
        "Same top, %": (100 * same.mean(), 100 * float(np.sqrt(same.mean() * (1 - same.mean()) / (n - 1)))),
    }


def printed(folder: Path, loss: Loss) -> dict[str, Pair]:
    """The same as the tool printed it."""
    (name,) = [n for n in loss.comparison.raw if n.endswith("-divergence.log.gz")]
    text = gzip.decompress((folder / comparison.FOLDER / "raw" / name).read_bytes()).decode()
    found = {column: re.search(pattern, text) for column, (pattern, _) in PRINTED.items()}
    return {column: (float(m[1]), float(m[2])) for column, m in found.items() if m}


def cut_off(s: Scores, own: dict[str, Pair]) -> Pair:
    """By how much the tool's perplexity and its error may be above those of the tokens, which are cut off at DEPTH in
    what it writes: (0, 0) where no token lies so deep."""
    deeper = checks.deeper(s)
    return own["PPL"][0] * float(np.expm1(deeper)), 0.1 * own["PPL"][1] * (deeper > 0)


def by_chunk(loss: Loss) -> float:
    """Standard error of the mean divergence where a chunk is one observation."""
    kld = np.array(loss.found.chunks.kld)
    return float(kld.std(ddof=1) / np.sqrt(len(kld)))


def rows(folder: Path, study: Study) -> Iterator[tuple[str, dict[str, str], list[str]]]:
    """(text, row, what differs) of every comparison with an unquantised file."""
    sizes = {(m.model, m.quant): m.file_bytes for m in study.manifests}
    for loss in quality.losses(study):
        scores = comparison.tokens(folder, loss.comparison)
        told, own = printed(folder, loss), again(scores)
        wrong = [f"{loss.model} {loss.quant}: no {c} in the log" for c in PRINTED if c not in told]
        row = {"model": loss.model, "quantization": loss.quant.removesuffix("-imatrix")}
        deep = cut_off(scores, own)
        row["imatrix"] = study.parameters.imatrix or "" if loss.quant.endswith("-imatrix") else "none"
        row["MB"] = f"{sizes[loss.model, loss.quant] / 1e6:.2f}"
        for column, (_, digits) in PRINTED.items():
            if column not in told:
                continue
            most = LAST_DIGITS.get(column, 2) * 10.0**-digits
            if column.startswith("Same"):
                most += 100 * max(TIES, 2 / (loss.found.scored * len(loss.found.chunks.kld)))
            deeper = deep if column in ("PPL", "ΔPPL") else (0.0, 0.0)
            whats = (column, f"error of {column}")
            for one, two, what, more in zip(told[column], own[column], whats, deeper, strict=True):
                if not -most - (more if what != column else 0) <= one - two <= most + more:
                    wrong.append(f"{loss.model} {loss.quant}, {what}: {one} by the tool, {two} here")
            shown = {"KLD": 6, "PPL": 4, "ΔPPL": 4}.get(column, 2)
            row[column] = f"{own[column][0]:.{shown}f} ± {own[column][1]:.{shown}f}"
        row["error of KLD by chunk / by token"] = f"{by_chunk(loss) / own['KLD'][1]:.1f}"
        yield loss.corpus, row, wrong


INTRO = """# The table that llama.cpp publishes of quants, of the two trained models

Columns and estimators are those of llama.cpp's own table (tools/perplexity, LLaMA 3 8B): *PPL* perplexity, *ΔPPL* its
difference to F16's on the same tokens, *KLD* mean Kullback-Leibler divergence from F16, *Δp* what the probability of
the token that follows gains. Every number, {count} with the errors, was computed twice: by llama-perplexity, as in
its kept log, and from the values of each token by `benchmarks/scoreboard.py`. {verdict} But for PPL and ΔPPL where a
token lies more than {depth:.0f} nats below the likeliest: the tool's log has it as deep as it is in the quant, and
cut off in F16, so that its ΔPPL is too large; here it is cut off in both.

After ± is one standard error that takes every token for an independent observation, as in that table; the last column
is by how much an error by chunks is larger: the study's document has those.
"""


PLACED = """## With experts on the CPU, on {device}

Logits of the same file at two placements, as error by variance (NMSE), beside what other batches (8 tokens, or 64,
instead of 512) change of them with all on the GPU, where it is largest. {identical} of {n} placements are identical to
the last bit: a GPU copies the experts of a large batch and computes them itself. With *op-offload=off* the CPU computes
them, as it does while text is generated. The limit between rounding and a defect is {times:g} times what other batches
change.
"""


def placements(folder: Path) -> str:
    """What placements change of what the files of a study say. Raises ValueError where none was compared."""
    judged = checks.sameness(list(comparison.standing(comparison.read_all(folder)[0]).values()))
    rows = [
        {
            "model": one.comparison.spec.model,
            "file": one.comparison.spec.other.quant,
            "placement": one.comparison.spec.other.placement,
            "NMSE": f"{one.nmse:.1e}",
            "other batches": f"{floor:.1e}",
            "times": f"{one.nmse / floor:.2f}",
            "largest KLD": f"{found.tails['kld_max'].value:.1e}",
            "verdict": one.verdict,
        }
        for one in judged
        if one.nmse and (found := one.comparison.found)
        for floor in [max(map(checks.nmse, one.floors))]
    ]
    (device,) = {one.comparison.device.name for one in judged}
    counts = {"identical": len(judged) - len(rows), "n": len(judged), "times": checks.TIMES_FLOOR}
    table = tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)
    return f"{PLACED.format(device=device, **counts)}\n{table}\n\nRecords: `{folder}`."


def main() -> None:
    folder = Path(sys.argv[1])
    study = Study.read(folder)
    every = list(rows(folder, study))
    wrong = [w for _, _, found in every for w in found]
    verdict = f"**{len(wrong)} differ.**" if wrong else "Both print the same, to what the tool's 16 bits allow."
    print(INTRO.format(count=2 * len(every) * len(PRINTED), verdict=verdict, depth=checks.DEPTH))
    for corpus in dict.fromkeys(c for c, _, _ in every):
        print(f"## Text {corpus}\n")
        table = [row for c, row, _ in every if c == corpus]
        print(tabulate(table, headers="keys", tablefmt="pipe", disable_numparse=True), "\n")
    print(f"Records: `{folder}`; llama.cpp b{', b'.join(sorted({str(m.engine_build) for m in study.manifests}))}.")
    for other in map(Path, sys.argv[2:]):
        print(f"\n{placements(other)}")
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
