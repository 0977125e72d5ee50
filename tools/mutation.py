"""Mutation testing of what decides whether a number is believed: does a test fail when the code is changed?

Works in a copy of the tracked files, each module against the tests of its own. `--sample N` tries a seeded sample of
all modules together, `--module` one alone. A mutant of a type annotation changes nothing that runs, and of the many
operators that could stand in one place two are tried: the others die with them and would only raise the score.
"""

import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "measure/memory": ("memory",),
    "audit/invariants": ("audit",),
    "audit/audit": ("audit", "cells"),
    "audit/bounds": ("bounds",),
    "audit/witness": ("witness",),
    "base/stats": ("stats",),
    "base/neutral": ("neutral",),
    "study/frames": ("frames", "advice"),
    "study/status": ("status",),
}
"""Module -> the tests that must notice; `test_` is left out."""
KEPT_OF_A_PLACE = 2
AIM = 0.9

CONFIG = """
[cosmic-ray]
module-path = ["moelib/{module}.py"]
timeout = 120.0
excluded-modules = []
test-command = "{python} -m pytest -x -q -p no:cacheprovider {tests}"
[cosmic-ray.distributor]
name = "local"
"""


def tool(*args: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-m", *args], cwd=cwd, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise click.ClickException(f"{' '.join(args)}: {(done.stdout + done.stderr)[-600:]}")
    return done.stdout


def worth_trying(session: Path, copy: Path, chosen: random.Random) -> list[str]:
    """The mutants of a session that say something."""
    with sqlite3.connect(session) as db:
        columns = "job_id, module_path, operator_name, start_pos_row, start_pos_col"
        places, drop = defaultdict(list), set()
        for job, module, operator, row, column in db.execute(f"SELECT {columns} FROM mutation_specs"):
            family = re.sub(r"_[A-Za-z]+$", "", operator)
            line = (copy / module).read_text(encoding="utf-8").splitlines()[row - 1]
            annotation = "BitOr" in operator and re.search(r"\| None|\| \w+\b.*[:>]|->", line)
            places[module, family, row, column].append(job)
            same = operator.endswith(("_Eq_Is", "_NotEq_IsNot"))  # of constants, and those are one object
            drop |= {job} if annotation or same or "RemoveDecorator" in operator else set()
        for jobs in places.values():
            chosen.shuffle(jobs)
            drop |= set(jobs[KEPT_OF_A_PLACE:])
        return sorted({j for jobs in places.values() for j in jobs} - drop)


def keep(session: Path, kept: set[str]) -> None:
    """Drop the other mutants."""
    with sqlite3.connect(session) as db:
        gone = [row for row in db.execute("SELECT job_id FROM mutation_specs") if row[0] not in kept]
        for table in ("mutation_specs", "work_items"):
            db.executemany(f"DELETE FROM {table} WHERE job_id = ?", gone)


@click.command()
@click.option("--sample", default=0, help="How many mutants; 0 for all.")
@click.option("--seed", default=0, show_default=True)
@click.option("--module", "modules", multiple=True, type=click.Choice(list(TESTS)), help="These alone.")
def main(sample: int, seed: int, modules: tuple[str, ...]) -> None:
    modules = modules or tuple(TESTS)
    with tempfile.TemporaryDirectory() as folder:
        copy, rows = Path(folder), []
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        # the copy, and not the installed package, is what the tests import
        where = f"import sys\nsys.path.insert(0, {str(copy)!r})\n"
        (copy / "conftest.py").write_text(where, encoding="utf-8")
        chosen, mutants = random.Random(seed), []
        for module in modules:
            tests = [f"tests/test_{t}.py" for t in TESTS[module]]
            tool("pytest", "-x", "-q", *tests, cwd=copy)  # unbroken, everything passes
            config = CONFIG.format(module=module, tests=" ".join(tests), python=sys.executable)
            (copy / f"{module}.toml").write_text(config, encoding="utf-8")
            tool("cosmic_ray.cli", "init", f"{module}.toml", f"{module}.sqlite", cwd=copy)
            mutants += [(module, job) for job in worth_trying(copy / f"{module}.sqlite", copy, chosen)]
        kept = chosen.sample(mutants, min(sample, len(mutants))) if sample else mutants
        click.echo(f"{len(kept)} mutants of {len(mutants)} in {', '.join(modules)}, seed {seed}")
        for module in modules:
            keep(copy / f"{module}.sqlite", {job for of, job in kept if of == module})
            command = [sys.executable, "-m", "cosmic_ray.cli", "exec", f"{module}.toml", f"{module}.sqlite"]
            subprocess.run(command, cwd=copy, check=True)
            with sqlite3.connect(copy / f"{module}.sqlite") as db:
                rows += db.execute(
                    "SELECT r.test_outcome, m.module_path, m.start_pos_row, m.operator_name, r.diff FROM work_results "
                    "r JOIN mutation_specs m ON r.job_id = m.job_id ORDER BY m.start_pos_row"
                ).fetchall()
    alive = [row for row in rows if "SURVIVED" in str(row[0]).upper()]
    for _, module, row, operator, diff in alive:
        changed = [line for line in (diff or "").splitlines() if re.match(r"[+-](?![+-])", line)]
        click.echo(f"survived: {module}:{row} {operator}\n  " + "\n  ".join(changed))
    score = 1 - len(alive) / len(rows) if rows else 0.0
    click.echo(f"mutation score {score:.1%}: {len(rows) - len(alive)} of {len(rows)} killed (aim {AIM:.0%})")
    sys.exit(score < AIM)


if __name__ == "__main__":
    main()
