"""Mutation testing of what decides whether a number is believed: does a test fail when the code is changed?

Works in a copy of the tracked files. `--sample N` tries a seeded sample; all of them take about half an hour.
A mutant of a type annotation changes nothing that runs, and of the many operators that could stand in one place two
are tried: the others die with them and would only raise the score.
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
MODULES = ("memory", "invariants", "audit")
TESTS = ("test_audit.py", "test_memory.py", "test_nvml.py")
KEPT_OF_A_PLACE = 2
AIM = 0.9

CONFIG = """
[cosmic-ray]
module-path = [{modules}]
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


def prune(session: Path, copy: Path, sample: int, seed: int) -> int:
    """Drop mutants that say nothing, keep a sample of the rest; return how many are left."""
    with sqlite3.connect(session) as db:
        columns = "job_id, module_path, operator_name, start_pos_row, start_pos_col"
        places, drop = defaultdict(list), []
        for job, module, operator, row, column in db.execute(f"SELECT {columns} FROM mutation_specs"):
            family = re.sub(r"_[A-Za-z]+$", "", operator)
            line = (copy / module).read_text(encoding="utf-8").splitlines()[row - 1]
            annotation = "BitOr" in operator and re.search(r"\| None|\| \w+\b.*[:>]|->", line)
            places[module, family, row, column].append(job)
            same = operator.endswith(("_Eq_Is", "_NotEq_IsNot"))  # of constants, and those are one object
            drop += [job] if annotation or same or "RemoveDecorator" in operator else []
        chosen = random.Random(seed)
        for jobs in places.values():
            chosen.shuffle(jobs)
            drop += jobs[KEPT_OF_A_PLACE:]
        left = sorted({j for jobs in places.values() for j in jobs} - set(drop))
        kept = chosen.sample(left, min(sample, len(left))) if sample else left
        gone = {j for jobs in places.values() for j in jobs} - set(kept)
        for table in ("mutation_specs", "work_items"):
            db.executemany(f"DELETE FROM {table} WHERE job_id = ?", [(j,) for j in gone])
    return len(kept)


@click.command()
@click.option("--sample", default=0, help="How many mutants; 0 for all.")
@click.option("--seed", default=0, show_default=True)
def main(sample: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8"
        ).stdout
        for name in filter(None, listed.split("\0")):
            if not name.startswith("docs/") and (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        modules = ", ".join(f'"moelib/{m}.py"' for m in MODULES)
        tests = " ".join(f"tests/{t}" for t in TESTS)
        (copy / "c.toml").write_text(
            CONFIG.format(modules=modules, tests=tests, python=sys.executable), encoding="utf-8"
        )
        # the copy, and not the installed package, is what the tests import
        (copy / "conftest.py").write_text(f"import sys\nsys.path.insert(0, {str(copy)!r})\n", encoding="utf-8")
        tool("pytest", "-x", "-q", *(f"tests/{t}" for t in TESTS), cwd=copy)  # unbroken, everything passes
        tool("cosmic_ray.cli", "init", "c.toml", "c.sqlite", cwd=copy)
        click.echo(f"{prune(copy / 'c.sqlite', copy, sample, seed)} mutants of {', '.join(MODULES)}, seed {seed}")
        subprocess.run([sys.executable, "-m", "cosmic_ray.cli", "exec", "c.toml", "c.sqlite"], cwd=copy, check=True)
        with sqlite3.connect(copy / "c.sqlite") as db:
            rows = db.execute(
                "SELECT r.test_outcome, m.module_path, m.start_pos_row, m.operator_name, r.diff FROM work_results r "
                "JOIN mutation_specs m ON r.job_id = m.job_id ORDER BY m.module_path, m.start_pos_row"
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
