"""shimmy against llama-server on one file, in turns, in one run: how long a whole answer takes.

    python benchmarks/runners.py [FILE] [--rounds N]

Both on the CPU alone (`--device none`) with the same CPUs, the same text and greedy choice; shimmy has 4,096 tokens of
context and no other, so llama-server has them too. shimmy reads the model anew for each request and sends all tokens
at once: what can be compared is the time of an answer of 64 tokens, and of one of 1 token, whose difference is what 63
tokens take.
"""

import argparse
import random
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from tabulate import tabulate

from moelib.base import stats
from moelib.base.bar import tqdm
from moelib.campaign import given
from moelib.catalogue import params
from moelib.catalogue.facts import LLAMA_SERVER, SHIMMY
from moelib.catalogue.placement import Placement
from moelib.engine import engine
from moelib.measure.device import NoDevice
from moelib.measure.runner import Job, Runner
from moelib.runners import pick, shimmy

MODEL = params.root() / "training/models/trained-phimoe/trained-phimoe-F16.gguf"
LONG, SHORT, REQUESTS, START_S = 64, 1, 4, 120.0
PLACEMENTS = ("baseline", "cpu-moe")


def seconds(runner: Runner, file: Path, placement: str) -> dict[str, float]:
    """Mean seconds of warm requests of LONG tokens and of SHORT, of one fresh server."""
    where = NoDevice()
    with TemporaryDirectory(prefix="moelib-bench-") as scratch, where.session(runner.tools, Path(scratch)) as session:
        job = Job(file, Placement.parse(placement), shimmy.CONTEXT, where.threads)
        with runner.start(job, session, Path(scratch)) as server, server.serving(START_S):
            (prompt,) = server.prompts([params.workload("prose")], shimmy.CONTEXT)
            took: dict[str, list[float]] = {"long": [], "short": []}
            for i in range(REQUESTS + 1):
                for name, tokens in (("long", LONG), ("short", SHORT)):
                    server.connect()
                    answer = server.read(server.ask(prompt.content, tokens)[1], tokens)
                    if i:
                        took[name].append(answer.token_s[-1])
    return {name: fmean(values) for name, values in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=MODEL)
    parser.add_argument("--rounds", type=int, default=8)
    given_arguments = parser.parse_args()
    llama = engine.find()
    file = given.measurable(given_arguments.file, llama).path
    runners = {name: pick.of(name, llama) for name in (LLAMA_SERVER, SHIMMY)}
    chance, found = random.Random(1), []
    for _ in tqdm(range(given_arguments.rounds), unit="round"):
        turns = [(name, placement) for name in runners for placement in PLACEMENTS]
        chance.shuffle(turns)
        found.append({turn: seconds(runners[turn[0]], file, turn[1]) for turn in turns})
    rows = []
    for placement in PLACEMENTS:
        for what in ("long", "short"):
            of = {name: [r[name, placement][what] for r in found] for name in runners}
            rows.append(
                {
                    "placement": placement,
                    "tokens": LONG if what == "long" else SHORT,
                    **{f"{name}, ms": stats.estimate(stats.geometric_mean(of[name]), 1e3) for name in runners},
                    "shimmy / llama-server": stats.estimate(
                        stats.ratio(list(zip(of[LLAMA_SERVER], of[SHIMMY], strict=True)))
                    ),
                }
            )
    print(
        f"{file.name}, {llama} and {shimmy.find()}, {NoDevice().threads} threads, {len(found)} rounds in random order;"
    )
    print("geometric mean [95 % interval] of warm requests, ratios paired by round\n")
    print(tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
