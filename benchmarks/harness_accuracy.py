"""How far the harness's own numbers are from the engine's, as ratios within one run:

- client / server: tokens per second by arrival times here, over the server's own timings (aim: within 0.5 %);
- server / llama-bench: the server's timings over `llama-bench -p 0 -n 100` on the same file and device (within 3 %);
- watched / unwatched: with all monitors on, over the same without them (0.995 or better).

python benchmarks/harness_accuracy.py --model deepseek-moe-16b --scale tiny --quant Q8_0 --rounds 5
"""

import json
import random
import statistics
import subprocess
import tempfile
from pathlib import Path

import click

from moelib import client, device, engine, models, params, process, quantize, run, stats

WORKLOAD = "plan-short"


def rates(requests: tuple[client.Request, ...]) -> list[tuple[float, float]]:
    """(here, by the server) in tokens per second; the server counts the steps after the first token."""
    return [(r.tps, (r.predicted_n - 1) / r.engine_predicted_s) for r in requests]


def bench(llama: engine.Engine, where: device.Device, file: Path, placement: str, tokens: int, work: Path) -> float:
    """Tokens per second by llama-bench: decoding alone, without a server and without sampling."""
    tool = llama.folder / "llama-bench"
    if not tool.exists():
        raise click.ClickException(f"{llama} has no llama-bench")
    with where.session(llama, work) as session:
        told = dict(zip(session.args[::2], session.args[1::2], strict=True))
        argv = [str(tool), "-m", str(file), "-p", "0", "-n", str(tokens), "-r", "3", "-o", "json", "-fa", "on"]
        argv += ["-rpc", told["--rpc"]] if "--rpc" in told else []  # before the device that it makes
        argv += ["-ngl", "999", "-t", str(where.threads), "-lm", "mmap", "-dev", told["--device"]]
        argv += ["-ncmoe", "999"] if placement == "cpu-moe" else []
        if session.cpus:
            argv = ["taskset", "-c", ",".join(map(str, session.cpus)), *argv]
        env = process.environment(work, session.env)
        done = subprocess.run(argv, capture_output=True, text=True, timeout=600, env=env)
    if done.returncode:
        raise click.ClickException(f"llama-bench ended with {done.returncode}: {done.stderr[-400:]}")
    return statistics.fmean(json.loads(done.stdout)[0]["samples_ts"])


@click.command()
@click.option("--model", default="deepseek-moe-16b", show_default=True)
@click.option("--scale", default="tiny", show_default=True)
@click.option("--quant", default="Q8_0", show_default=True)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(2))
def main(model: str, scale: str, quant: str, rounds: int) -> None:
    llama = engine.find()
    where = device.choose("auto", llama)
    tokens = params.workload(WORKLOAD).generate_tokens
    asked = {"study": "benchmark", "model": model, "weights": "twin", "scale": scale, "quant": quant, "block": 0}
    asked |= {"order": 0, "workloads": (WORKLOAD,), "requests": 3, "context": 1024, "device": where.kind, "seed": 0}
    seeded, every = random.Random(rounds), device.SAMPLE_S
    print(f"{model} at scale {scale}, {quant}, on {where.identity()['name']}, {llama}, {rounds} rounds", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        made = quantize.make(models.make_twin(model, scale), quant, llama, work)
        where.calibrate(work)
        for placement in ("baseline", "cpu-moe"):
            spec = run.Spec(placement=placement, load_mode="mmap", **asked)
            pairs = {"client / server": [], "server / llama-bench": [], "watched / unwatched": []}
            for _ in range(rounds):
                seen, order = {}, ["watched", "unwatched", "bench"]
                seeded.shuffle(order)
                for what in order:
                    if what == "bench":
                        seen[what] = bench(llama, where, made.path, placement, tokens, work)
                        continue
                    device.SAMPLE_S = every if what == "watched" else 3600.0
                    outcome = run.execute(spec, made, llama, where, work)
                    if outcome.observation is None:
                        raise click.ClickException(f"{outcome.reason}: {outcome.message}")
                    seen[what] = rates(outcome.observation.requests)
                ours, servers = (statistics.fmean(r[i] for r in seen["watched"]) for i in (0, 1))
                pairs["client / server"].append((servers, ours))
                pairs["server / llama-bench"].append((seen["bench"], servers))
                pairs["watched / unwatched"].append((statistics.fmean(r[0] for r in seen["unwatched"]), ours))
            for what, values in pairs.items():
                e = stats.ratio(values)
                print(f"{placement:9} {what:21} {e.value:.4f} [{e.low:.4f}, {e.high:.4f}]", flush=True)


if __name__ == "__main__":
    main()
