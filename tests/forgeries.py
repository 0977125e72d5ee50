"""Forging campaign: records of a committed study are changed, given a digest that fits, and audited as a study is.

    python tests/forgeries.py --number 2000 [--seed N] [--study h100-twins]

Each forgery is one family's way of changing one run, one placement or one cell, by an amount drawn by lot. It counts
where it moves a number that the document publishes by more than 5 %; it is accepted where the study has as many usable
runs as before and no problem that it had not. Numbers are taken from the records' JSON by this file's own arithmetic.
"""

import copy
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from moelib.audit import audit, record, witness
from moelib.base import files
from moelib.study import gather, study

ROOT = Path(__file__).resolve().parent.parent
STUDIES = {"h100-twins": ROOT / "outputs/h100-twins", "demo": ROOT / "tests/fixtures/twins"}
MOVED = 0.05
FACTORS = (0.1, 0.5, 0.7, 0.8, 0.9, 1.1, 1.2, 1.5, 2.0, 10.0, 1000.0)

Runs = list[dict[str, Any]]
"""Records of a cell, as JSON has them."""


def published(runs: Runs) -> dict[str, float | None]:
    """Every mean over blocks that tables of the document show of a cell, by placement."""
    values: dict[str, list[float | None]] = defaultdict(list)
    for r in runs:
        o, label = r["observed"], f"{r['spec']['placement']}/{r['spec']['load_mode']}"
        m, host, p = o["memory"], o["host"], o["placement"]

        def add(name: str, value: float | None, label: str = label) -> None:
            values[f"{label} {name}"].append(value)

        add("device memory", m["value_bytes"])
        add("engine's buffers", m["engine_bytes"])
        add("rest", m["value_bytes"] - m["engine_bytes"])
        add("device in all", m["growth_bytes"])
        add("load", o["load_s"])
        add("file cached", o["cached_bytes"] / r["sheet"]["file_bytes"] if o.get("cached_bytes") is not None else None)
        add("host RSS", o["host_rss_peak_bytes"])
        add("major page faults", host["major_faults"])
        add("moved", p["moved_bytes"])
        add("read on the device", p["device_read_bytes"])
        add("read on the host", p["host_read_bytes"])
        add("monitors", o["watch_cpu_s"] / host["elapsed_s"] if o["watch_cpu_s"] and host["elapsed_s"] else 0.0)
        clocks = [c["sm_clock_mhz"] for c in o["counters"] if c["sm_clock_mhz"] is not None]
        add("clock", fmean(clocks) if clocks else None)
        for t in o["prompt_traffic"]:
            add(f"bus {t['workload']}", t["received_bytes"])
        spent = [(q["energy_joule"], q["token_s"][-1]) for q in o["requests"]]
        if all(joules is not None for joules, _ in spent):
            add("watts", sum(j for j, _ in spent) / max(1e-9, sum(s for _, s in spent)))
        for q in o["requests"]:
            which = f"{q['workload']} {'warm' if q['index'] else 'first'}"
            lasted = q["token_s"][-1] - q["token_s"][0]
            rate = (q["token_n"][-1] - q["token_n"][0]) / lasted if lasted else None
            add(f"first token {which}", q["token_s"][0])
            add(f"rate {q['workload']}", rate)
            device, ram = r["device"].get("bandwidth_bytes_per_s"), r["host"].get("ram_read_bytes_per_s")
            if rate and device and ram:
                add(f"bound {q['workload']}", rate * (p["device_read_bytes"] / device + p["host_read_bytes"] / ram))
            if q["energy_joule"] is not None and q["predicted_n"]:
                add(f"energy {q['workload']}", q["energy_joule"] / q["predicted_n"])
        for name in ("file_bytes", "bits_per_weight", "expert_bytes", "parameters"):
            values[f"file {name}"].append(r["sheet"][name])
    return {k: fmean(v) if v and None not in v else None for k, v in values.items()}


def moved(before: dict[str, float | None], after: dict[str, float | None]) -> list[str]:
    """Which of the numbers are off by more than 5 %, or came or went."""

    def differs(a: float | None, b: float | None) -> bool:
        return (a is None) != (b is None) or (a is not None and abs(b - a) > MOVED * abs(a))

    return [k for k in before.keys() | after.keys() if differs(before.get(k), after.get(k))]


FAMILIES: dict[str, Callable[[random.Random, Runs, dict[str, bytes | None]], None]] = {}


def family(name: str) -> Callable:
    def register(how: Callable) -> Callable:
        FAMILIES[name] = how
        return how

    return register


def some(chance: random.Random, runs: Runs) -> Runs:
    """One run, the runs of one placement, or all."""
    label = chance.choice(sorted({key(r) for r in runs}))
    return chance.choice([[chance.choice(runs)], [r for r in runs if key(r) == label], runs])


def key(r: dict[str, Any]) -> str:
    return f"{r['spec']['placement']}/{r['spec']['load_mode']}"


def scaled(value: Any, by: float) -> Any:
    return value if value is None or isinstance(value, bool) else type(value)(value * by)


def put(record_part: Any, path: str, change: Callable[[Any], Any]) -> None:
    """Change what lies at `a/b/*/c`; `*` is every item of a list or every value of a mapping."""
    *way, last = path.split("/")
    places = [record_part]
    for step in way:
        nxt: list[Any] = []
        for place in places:
            if place is None:
                continue
            nxt += (list(place.values()) if isinstance(place, dict) else place) if step == "*" else [place[step]]
        places = nxt
    for place in places:
        if place is None:
            continue
        for k in (range(len(place)) if isinstance(place, list) else list(place)) if last == "*" else [last]:
            if isinstance(place, list) or k in place:
                place[k] = change(place[k])


FIELDS = {
    "load": ["observed/load_s"],
    "RSS": ["observed/host_rss_peak_bytes"],
    "page cache": ["observed/cached_bytes"],
    "page cache and disk": ["observed/cached_bytes", "observed/disk_read_bytes"],
    "energy of requests": ["observed/requests/*/energy_joule"],
    "energy, counters too": ["observed/requests/*/energy_joule", "observed/counters/*/energy_joule"],
    "energy, counters and meter": [
        "observed/requests/*/energy_joule",
        "observed/counters/*/energy_joule",
        "observed/counters/*/power_watt",
    ],
    "page faults": ["observed/host/major_faults", "observed/host/minor_faults"],
    "clock": ["observed/counters/*/sm_clock_mhz"],
    "bus": ["observed/prompt_traffic/*/received_bytes", "observed/prompt_traffic/*/sent_bytes"],
    "monitors": ["observed/watch_cpu_s"],
    "elapsed": ["observed/host/elapsed_s"],
    "elapsed and wall": ["observed/host/elapsed_s", "observed/wall_s"],
    "header's reads": ["observed/placement/device_read_bytes", "observed/placement/host_read_bytes"],
    "header's device bytes": ["observed/placement/device_bytes", "observed/placement/moved_bytes"],
    "RAM's speed": ["host/ram_read_bytes_per_s"],
    "device memory's speed": ["device/bandwidth_bytes_per_s"],
    "file size": ["sheet/file_bytes"],
    "bits per weight": ["sheet/bits_per_weight"],
    "expert bytes": ["sheet/expert_bytes"],
    "parameters": ["sheet/parameters"],
    "engine's prompt time": ["observed/requests/*/engine_prompt_s"],
    "all times of requests": [
        "observed/requests/*/token_s/*",
        "observed/requests/*/engine_prompt_s",
        "observed/requests/*/engine_predicted_s",
    ],
    "all times of a run": [
        "observed/requests/*/token_s/*",
        "observed/requests/*/started_s",
        "observed/requests/*/engine_prompt_s",
        "observed/requests/*/engine_predicted_s",
        "observed/load_s",
        "observed/wall_s",
        "observed/host/elapsed_s",
        "observed/memory/trace/*/*/t_s",
        "observed/counters/*/t_s",
    ],
    "value of memory": ["observed/memory/value_bytes"],
    "memory, all accounts": [
        "observed/memory/value_bytes",
        "observed/memory/process_bytes",
        "observed/memory/growth_bytes",
        "observed/memory/trace/*/*/process_bytes",
        "observed/memory/trace/*/*/device_bytes",
    ],
}


def _field(name: str, paths: list[str]) -> None:
    @family(name)
    def change(chance: random.Random, runs: Runs, logs: dict[str, bytes | None]) -> None:
        by = chance.choice((*FACTORS, -1.0, 0.0))
        for r in some(chance, runs):
            for path in paths:
                put(r, path, lambda v: scaled(v, by))


for _name, _paths in FIELDS.items():
    _field(_name, _paths)


TIMES: dict[str, Callable[[list[float], float], list[float]]] = {
    "token times scaled": lambda times, by: [times[0] + (t - times[0]) * by for t in times],
    "first token moved": lambda times, by: [t + times[0] * (by - 1) for t in times],
    "first token alone": lambda times, by: [min(times[0] * by, times[1]), *times[1:]],
}


def _times(name: str, move: Callable[[list[float], float], list[float]]) -> None:
    @family(name)
    def change(chance: random.Random, runs: Runs, logs: dict[str, bytes | None]) -> None:
        by = chance.choice(FACTORS)
        for r in some(chance, runs):
            for q in r["observed"]["requests"]:
                q["token_s"] = [round(t, 6) for t in move(q["token_s"], by)]


for _name, _move in TIMES.items():
    _times(_name, _move)


@family("another runner's times")
def _(chance, runs, logs):
    """What the engine reported is taken out, as of a runner that reports less; then any time will do."""
    by, name = chance.choice(FACTORS), chance.choice(["llama-server", "another-server"])
    for r in some(chance, runs):
        r["engine"]["runner"] = name
        r["observed"]["report"] |= {"buffers": [], "graph_splits": [], "total_layers": None, "offloaded_layers": None}
        for q in r["observed"]["requests"]:
            q |= dict.fromkeys(("prompt_n", "cache_n", "predicted_n", "engine_prompt_s", "engine_predicted_s"))
            q["token_s"] = [round(t * by, 6) for t in q["token_s"]]


@family("page cache, made up or left out")
def _(chance, runs, logs):
    """Of all where nobody looked, or of nothing where somebody did; the disk was idle, or read all of it."""
    share, disk = chance.choice((None, 0, 1)), chance.choice((None, 0, 1))
    for r in some(chance, runs):
        for name, part in (("cached_bytes", share), ("disk_read_bytes", disk)):
            r["observed"][name] = None if part is None else part * r["sheet"]["file_bytes"]


@family("half the tokens")
def _(chance, runs, logs):
    block = chance.choice(runs)["spec"]["block"]
    for r in runs:
        if r["spec"]["block"] == block:
            for q in r["observed"]["requests"]:
                half = len(q["token_s"]) // 2
                for name in ("token_s", "token_n", "tokens"):
                    q[name] = q[name][:half]
                q["predicted_n"] = q["generate_tokens"] = half
                q["engine_predicted_s"] = round(q["token_s"][-1] - q["token_s"][0], 6)


def _swap(path: str) -> Callable:
    def change(chance: random.Random, runs: Runs, logs: dict[str, bytes | None]) -> None:
        labels = sorted({key(r) for r in runs})
        one, other = chance.sample(labels, 2)
        blocks = {r["spec"]["block"] for r in runs}
        for block in chance.choice([blocks, {chance.choice(sorted(blocks))}]):
            pair = [next(r for r in runs if key(r) == label and r["spec"]["block"] == block) for label in (one, other)]
            (a, b), (*way, last) = pair, path.split("/")
            for step in way:
                a, b = a[step], b[step]
            a[last], b[last] = b[last], a[last]

    return change


for _path in ("requests", "load_s", "host_rss_peak_bytes", "memory", "prompt_traffic", "host"):
    FAMILIES[f"swapped between placements: {_path}"] = _swap(f"observed/{_path}")


@family("a block copied and shifted")
def _(chance, runs, logs):
    a, b = chance.sample(sorted({r["spec"]["block"] for r in runs}), 2)
    by, noise = chance.choice((1.0, 1.0, 1.1, 0.9)), chance.choice((1e-6, 3e-6))
    for r in runs:
        if r["spec"]["block"] == b:
            of = next(o for o in runs if o["spec"]["block"] == a and key(o) == key(r))
            r["observed"] = copy.deepcopy(of["observed"])
            for q in r["observed"]["requests"]:
                q["token_s"] = [round(t * by + chance.uniform(-noise, noise), 6) for t in q["token_s"]]


@family("attempts gone")
def _(chance, runs, logs):
    r = chance.choice(runs)
    r["attempt"] = 7
    r["run_id"] = r["run_id"].rpartition("_a")[0] + "_a7"
    put(r, "observed/requests/*/energy_joule", lambda v: scaled(v, 1.5))
    put(r, "observed/host_rss_peak_bytes", lambda v: scaled(v, 1.5))


@family("a judgement of nothing")
def _(chance, runs, logs):
    r = chance.choice(runs)
    r["judged"] = {"record": "nobody", "digest": "0" * 64, "commit": "c" * 40}
    put(r, "observed/host_rss_peak_bytes", lambda v: scaled(v, 1.5))


@family("another flag on the command line")
def _(chance, runs, logs):
    flag = chance.choice((["-ot", ".*=CPU"], ["--no-kv-offload"], ["--cpu-moe"], ["-ub", "64"], ["-ctk", "q8_0"]))
    for r in some(chance, runs):
        r["observed"]["argv"] += flag
        put(r, "observed/host_rss_peak_bytes", lambda v: scaled(v, 1.06))


@family("another driver, kernel or host in a block")
def _(chance, runs, logs):
    r = chance.choice(runs)
    part, name = chance.choice((("device", "driver"), ("host", "system"), ("host", "cpu"), ("device", "uuid")))
    r[part][name] = "another"
    put(r, "observed/host_rss_peak_bytes", lambda v: scaled(v, 1.06))


@family("buffers")
def _(chance, runs, logs):
    kind, by = chance.choice(("KV", "compute", "model")), chance.choice(FACTORS)
    for r in some(chance, runs):
        for b in r["observed"]["report"]["buffers"]:
            if b["kind"] == kind:
                b["size_bytes"] = int(b["size_bytes"] * by)
        r["observed"]["memory"]["engine_bytes"] = sum(
            b["size_bytes"] for b in r["observed"]["report"]["buffers"] if b["name"].startswith(("CUDA0", "RPC"))
        )


def _logs(name: str, content: bytes | None) -> None:
    @family(name)
    def change(chance: random.Random, runs: Runs, logs: dict[str, bytes | None]) -> None:
        for r in some(chance, runs):
            logs |= dict.fromkeys(r["raw"], content)
            put(r, "observed/load_s", lambda v: v * 1.1)


_logs("logs of zeros", b"\0" * 5000)
_logs("logs gone", None)


@family("no log named")
def _(chance, runs, logs):
    for r in some(chance, runs):
        r["raw"] = {}
        put(r, "observed/load_s", lambda v: v * 1.1)


@family("logs of another run")
def _(chance, runs, logs):
    a, b = chance.sample(runs, 2)
    a["observed"], kept = copy.deepcopy(b["observed"]), a["observed"]["argv"]
    a["observed"]["argv"], a["raw"] = kept, dict(b["raw"])


@family("any number")
def _(chance, runs, logs):
    """Some leaf of the observation, the same in some runs."""

    def leaves(part: Any, path: tuple) -> Iterator[tuple]:
        for k, v in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
            if isinstance(v, int | float) and not isinstance(v, bool):
                yield (*path, k)
            yield from leaves(v, (*path, k))

    path = chance.choice(list(leaves(runs[0]["observed"], ())))
    by = chance.choice((*FACTORS, -1.0, 0.0))
    for r in some(chance, runs):
        part = r["observed"]
        try:
            for step in path[:-1]:
                part = part[step]
            part[path[-1]] = scaled(part[path[-1]], by)
        except (IndexError, KeyError, TypeError):
            continue


class Court:
    """A study with its honest records, before which forgeries are brought."""

    def __init__(self, folder: Path, scratch: Path):
        self.folder, self.scratch = folder, scratch
        self.honest = study.Study.read(folder)
        self.whole = gather.gather(folder)
        self.known = set(self.honest.problems)
        (scratch / "raw").mkdir(parents=True)
        for path in (folder / "raw").iterdir():
            (scratch / "raw" / path.name).symlink_to(path)
        self.runs: dict[str, Runs] = defaultdict(list)
        for r in self.whole.records:
            if r.run_id not in self.whole.problems:
                path = folder / "records" / f"{r.run_id}.json"
                self.runs[r.cell].append(json.loads(path.read_text(encoding="utf-8")))

    def accepts(self, cell: str, runs: Runs, logs: dict[str, bytes | None]) -> bool:
        """Whether a cell with these records passes as the honest one does."""
        others = [r for r in self.whole.records if r.cell != cell or r.run_id in self.whole.problems]
        records, wrong, starts = list(others), dict(self.whole.problems), dict(self.whole.starts)
        for name, content in logs.items():
            path = self.scratch / "raw" / name
            path.unlink()
            if content is not None:
                path.write_bytes(content)
        try:
            for data in runs:
                data["digest"] = files.digest({k: v for k, v in data.items() if k != "digest"})
                path = self.scratch / f"{data['run_id']}.json"
                path.write_text(json.dumps(data), encoding="utf-8")
                try:
                    r = record.read(path)
                except record.RecordError:
                    return False
                finally:
                    path.unlink()
                called = witness.call(self.scratch, r)
                wrong.pop(r.run_id, None)
                if why := gather.why_not(r, called):
                    wrong[r.run_id] = why
                if called.log and called.log.ready_s is not None:
                    starts[r.run_id] = r.observed.load_s - called.log.ready_s
                records.append(r)
        finally:
            for name in logs:
                (self.scratch / "raw" / name).unlink(missing_ok=True)
                (self.scratch / "raw" / name).symlink_to(self.folder / "raw" / name)
        evidence = gather.Evidence(records, [], wrong, starts)
        planned = next(c for c in self.honest.cells if c.name == cell)
        status = study.Status.of(planned, evidence, self.honest.workloads)
        if status.usable != self.honest.statuses[cell].usable or set(status.problems) - self.known:
            return False
        blocks = [r for name, s in self.honest.statuses.items() if name != cell for runs in s.rounds for r in runs]
        blocks += [r for runs in status.rounds for r in runs]
        keys = [record.spec_key(s) for c in self.honest.cells for s in c.specs]
        checks = audit.study(audit.Matrix(keys, blocks, records))
        return all(c.passed or c.id == "matrix-complete" for c in checks)


def campaign(court: Court, number: int, seed: int) -> dict[str, list[int]]:
    """Family -> [made, of them moved a number, of these accepted]."""
    chance, rows = random.Random(seed), {name: [0, 0, 0] for name in FAMILIES}
    order = [name for _ in range(number // len(FAMILIES) + 1) for name in FAMILIES]
    for name in order[:number]:
        cell = chance.choice(sorted(court.runs))
        runs, logs = copy.deepcopy(court.runs[cell]), {}
        FAMILIES[name](chance, runs, logs)
        rows[name][0] += 1
        try:
            numbers = moved(published(court.runs[cell]), published(runs))
        except (TypeError, ValueError, IndexError, ZeroDivisionError):
            numbers = ["nothing can be computed"]
        if numbers:
            rows[name][1] += 1
            if court.accepts(cell, runs, logs):
                rows[name][2] += 1
    return rows


@click.command()
@click.option("--number", default=2000, show_default=True)
@click.option("--seed", default=lambda: random.SystemRandom().randrange(1 << 32), show_default="new")
@click.option("--study", "name", default="h100-twins", type=click.Choice(list(STUDIES)), show_default=True)
def main(number: int, seed: int, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        court = Court(STUDIES[name], Path(folder))
        for cell, runs in court.runs.items():
            if not court.accepts(cell, copy.deepcopy(runs), {}):
                raise click.ClickException(f"the honest records of {cell} are not accepted")
        rows = campaign(court, number, seed)
    click.echo(f"{name}, seed {seed}\n\n| family | made | moved a number | accepted |\n| --- | ---: | ---: | ---: |")
    for label, row in rows.items():
        click.echo(f"| {label} | {row[0]} | {row[1]} | {row[2]} |")
    forged, changed, accepted = (sum(row[i] for row in rows.values()) for i in range(3))
    click.echo(f"| **all** | {forged} | {changed} | {accepted} ({accepted / max(1, changed):.1%}) |")


if __name__ == "__main__":
    main()
