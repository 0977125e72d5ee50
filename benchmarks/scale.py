"""How status, audit and report grow with the number of records: CPU seconds and peak memory of each command.

The records are those of the committed demo, each many times over as another block, with steps of its own and its own
log: enough for every invariant to have work to do. Whole processes, children (a report's kernel) included. CPU seconds
depend on what else the machine does: where two threads share a core, by half as much again.
"""

import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import yaml

from moelib.audit import record
from moelib.base import files
from moelib.catalogue import params
from moelib.measure.run import Spec
from moelib.study import study

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "tests/fixtures/twins"
COMMANDS = {"status": ["study", "status"], "audit": ["audit"], "report": ["report"]}
AIM = {"status": (10, 400), "audit": (10, 400), "report": (40, 600)}
"""CPU seconds and MB at 9,000 records."""
SECONDS_APART = 10


def multiply(home: Path, blocks: int) -> Path:
    """A study `scale` of so many blocks in the home; returns its folder."""
    for name in ("params", "notebooks"):
        shutil.copytree(ROOT / name, home / name, dirs_exist_ok=True)
    plan = yaml.safe_load((ROOT / "params/studies/demo-twins.yaml").read_text(encoding="utf-8"))
    (home / "params/studies/scale.yaml").write_text(yaml.safe_dump(plan | {"rounds": blocks}), encoding="utf-8")
    params._yaml.cache_clear()
    folder = study.Study.named("scale")
    folder.begin()
    shutil.copytree(DEMO / "quants", folder.path / "quants")
    for kind in ("records", "raw"):
        (folder.path / kind).mkdir()
    originals: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for path in sorted((DEMO / "records").glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        spec = data["spec"]
        originals.setdefault((spec["model"], spec["quant"], spec["placement"]), []).append(data)
    chance, when = random.Random(0), 0
    for cell in folder.cells:
        for block in cell.blocks:
            for spec in block:
                same = originals[spec.model, spec.quant, spec.placement]
                _write(folder.path, same[spec.block % len(same)], spec, when, chance)
                when += SECONDS_APART
    return folder.path


def _write(folder: Path, of: dict[str, Any], spec: Spec, when: int, chance: random.Random) -> None:
    name = record.run_id(spec, 1)
    data = {**of, "run_id": name, "spec": json.loads(files.canonical(asdict(spec)))}
    days, seconds = divmod(when, 86400)
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    data["started_utc"] = f"{2026 + days // 336}-{1 + days // 28 % 12:02}-{1 + days % 28:02}T{clock}+00:00"
    requests = []
    for q in of["observed"]["requests"]:
        times = q["token_s"]
        inner = sorted(chance.uniform(times[0], times[-1]) * 0.2 + 0.8 * t for t in times[1:-1])
        inner = [round(min(max(t, times[0]), times[-1]), 6) for t in inner]
        requests.append({**q, "token_s": [times[0], *inner, times[-1]]})
    data["observed"] = {**of["observed"], "requests": requests}
    data["raw"] = {}
    for old, sha256 in of["raw"].items():
        new = f"{name}{old.removeprefix(of['run_id'])}"
        os.link(DEMO / "raw" / old, folder / "raw" / new)
        data["raw"][new] = sha256
    data["digest"] = files.digest({k: v for k, v in data.items() if k != "digest"})
    lines = [f" {json.dumps(k)}: {files.canonical(v).decode()}" for k, v in sorted(data.items())]
    (folder / "records" / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def spent(home: Path, command: list[str]) -> tuple[float, float, int, str]:
    """(CPU seconds, peak MB of the largest process, exit code, last line) of a command of moelib, children included."""
    env = {**os.environ, "MOELIB_HOME": str(home), "MOELIB_OUTPUTS": str(home / "outputs")}
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "last = (done.stdout + done.stderr).strip().splitlines()[-1:]\n"
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3, done.returncode, *last)\n"
    )
    argv = [sys.executable, "-c", code, sys.executable, "-m", "moelib.cli", *command, "scale"]
    output = subprocess.run(argv, capture_output=True, text=True, encoding="utf-8", env=env, timeout=7200).stdout
    seconds, peak, exit_code, *last = output.split(maxsplit=3)
    return float(seconds), float(peak), int(exit_code), " ".join(last).strip()


@click.command()
@click.argument("records", nargs=-1, type=int)
@click.option("--only", multiple=True, type=click.Choice(list(COMMANDS)), help="These commands; default: all.")
def main(records: tuple[int, ...], only: tuple[str, ...]) -> None:
    """Measure at so many RECORDS, by default 900, 9,000 and 90,000."""
    rows = []
    for number in records or (900, 9000, 90_000):
        with tempfile.TemporaryDirectory(dir=ROOT / "docs") as folder:  # links do not cross file systems
            home = Path(folder)
            os.environ |= {"MOELIB_HOME": str(home), "MOELIB_OUTPUTS": str(home / "outputs")}
            count = len(list((multiply(home, number // 12) / "records").iterdir()))
            for name in only or COMMANDS:
                seconds, peak, code, last = spent(home, COMMANDS[name])
                rows.append((count, name, seconds, peak, code))
                click.echo(
                    f"{count:>6} records  {name:<7} {seconds:8.1f} CPU s  {peak:8.0f} MB  exit {code}  {last[:90]}"
                )
    for name in only or COMMANDS:
        here = [(count, seconds, peak) for count, of, seconds, peak, _ in rows if of == name]
        for (few, less_s, less_mb), (many, more_s, more_mb) in itertools.pairwise(here):
            each_ms, each_kb = 1e3 * (more_s - less_s) / (many - few), 1e3 * (more_mb - less_mb) / (many - few)
            click.echo(f"{name}: {each_ms:.2f} ms and {each_kb:.0f} kB a record from {few} to {many}")
        for count, seconds, peak in here:
            if count == 9000:
                most_s, most_mb = AIM[name]
                click.echo(f"{name}: {seconds:.1f} of {most_s} CPU s, {peak:.0f} of {most_mb} MB at 9,000 records")
    click.echo(f"largest process of this benchmark: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


if __name__ == "__main__":
    main()
