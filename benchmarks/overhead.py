"""How far the harness's own numbers are from the engine's, as ratios within one run:

- client / server: tokens per second by arrival times here, over the server's own timings (aim: within 0.5 %);
- server / llama-bench: the server's timings over `llama-bench -p 0 -n 100` on the same file and device (within 3 %);
- the same with the next token chosen on the device, where the build can: what sampling on the host costs;
- the same with the answer in one piece besides: what streaming costs;
- monitored / unmonitored: with all monitors on, over the same without them (0.995 or better), in one long generation in
  which they are on in one of each two neighbouring half seconds, by lot.

python benchmarks/overhead.py --model deepseek-moe-16b --scale tiny --quant Q8_0 --rounds 5

Every rate goes to the file named by `--out`, with what it was measured on, after each round; given again, it goes on
there. A study's document shows the ratios of the files in its `harness` folder.
"""

import json
import math
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import slots

from moelib.base import stats
from moelib.catalogue import params
from moelib.engine import client, engine
from moelib.machine import host, process
from moelib.measure import device, llama_server, run
from moelib.measure.memory import Reading
from moelib.models import models, quantize
from moelib.study import overhead

WORKLOAD = "plan-short"
WAYS = ("on_device", "bare", "bench", "toggled")
PLACEMENTS = ("baseline", "cpu-moe")
REQUESTS = 3  # of a server, and repetitions of llama-bench
CONTEXT = 1024
SAMPLING = llama_server.SAMPLING
TOGGLED_S = 20.0  # of generation in a round


def rates(requests: tuple[client.Request, ...]) -> dict[str, list[float]]:
    """Tokens per second of each request, here and by the server, which counts the steps after the first token."""
    server = [(r.predicted_n - 1) / r.engine_predicted_s for r in requests if r.predicted_n and r.engine_predicted_s]
    ours = [r.tps for r in requests if r.tps is not None]
    if not len(server) == len(ours) == len(requests):
        raise click.ClickException("the server told no counts or times of a request: take llama.cpp's own")
    return {"client": ours, "server": server}


def observe(
    spec: run.Spec, made: quantize.Quantised, llama: engine.Engine, where: device.Device, work: Path
) -> tuple[client.Request, ...]:
    """A run's requests."""
    outcome = run.execute(spec, made, llama_server.LlamaServer(llama), where, work)
    if outcome.observation is None:
        raise click.ClickException(f"{outcome.reason}: {outcome.message}")
    return outcome.observation.requests


@contextmanager
def changed(owner: object, name: str, value: object) -> Iterator[None]:
    """Another value while the block runs."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def toggle(
    rate: float, spec: run.Spec, made: quantize.Quantised, llama: engine.Engine, where: device.Device, work: Path
) -> list[tuple[float, float]]:
    """The slots of a generation at about `rate`, with the monitors on in one of each two of them."""
    number = math.ceil(rate * TOGGLED_S / (CONTEXT - 100))
    tokens = max(params.workload(WORKLOAD).generate_tokens, math.ceil(rate * TOGGLED_S / number))
    long = params.workload(WORKLOAD).model_copy(update={"generate_tokens": tokens})
    asked = replace(spec, requests=number)
    session = where.session

    @contextmanager
    def gated(*args: Any) -> Iterator[device.Session]:
        with session(*args) as opened:
            read, last = opened.read, list[Reading]()

            def now_and_then(server_pid: int | None, t_s: float) -> Reading:
                if server_pid is None or not last or slots.watched(t_s):
                    last[:] = [read(server_pid, t_s)]
                return last[0]

            opened.read = now_and_then
            yield opened

    with changed(params, "workload", lambda name: long), changed(where, "session", gated):
        return list(slots.by_slots(observe(asked, made, llama, where, work)))


def in_one_piece(server: llama_server.Serving, prompt: list[int], tokens: int) -> tuple[float, client.Lines]:
    """A completion that is not streamed: the engine's own timings alone."""
    body = {**llama_server.SAMPLING, "ignore_eos": True, "cache_prompt": False, "prompt": prompt, "n_predict": tokens}
    answer = client.answer(server.connection, "POST", "/completion", body, client.REQUEST_S).raise_for_status()
    return time.monotonic(), [(0.0, b"data: " + answer.content)]


def take(
    how: str, spec: run.Spec, made: quantize.Quantised, llama: engine.Engine, where: device.Device, work: Path
) -> Any:
    """What one way of measuring gives."""
    if how == "bench":
        return bench(llama, where, made.path, spec.placement, params.workload(WORKLOAD).generate_tokens, work)
    with changed(llama_server, "SAMPLING", {**SAMPLING, "backend_sampling": how != "watched"}):
        if how == "bare":
            with changed(llama_server.Serving, "ask", in_one_piece):
                return rates(observe(spec, made, llama, where, work))["server"]
        return rates(observe(spec, made, llama, where, work))


def bench(
    llama: engine.Engine, where: device.Device, file: Path, placement: str, tokens: int, work: Path
) -> list[float]:
    """Tokens per second by llama-bench: decoding alone, without a server and without sampling."""
    tool = llama.folder / "llama-bench"
    if not tool.exists():
        raise click.ClickException(f"{llama} has no llama-bench")
    with where.session(llama, work) as session:
        options = dict(zip(session.args[::2], session.args[1::2], strict=True))
        argv = [str(tool), "-m", str(file), "-p", "0", "-n", str(tokens), "-r", str(REQUESTS), "-o", "json"]
        argv += ["-rpc", options["--rpc"]] if "--rpc" in options else []  # before the device that it makes
        argv += ["-fa", "on", "-ngl", "999", "-t", str(where.threads), "-lm", "mmap", "-dev", options["--device"]]
        argv += ["-ncmoe", "999"] if placement == "cpu-moe" else []
        if session.cpus:
            argv = ["taskset", "-c", ",".join(map(str, session.cpus)), *argv]
        env = process.environment(work, session.env)
        done = subprocess.run(argv, capture_output=True, text=True, timeout=600, env=env, encoding="utf-8")
    if done.returncode:
        raise click.ClickException(f"llama-bench ended with {done.returncode}: {done.stderr[-400:]}")
    return json.loads(done.stdout)[0]["samples_ts"]


def show(kept: overhead.Overhead) -> None:
    """Print the ratios: geometric means with 95 % intervals, by placement."""
    about = kept.about
    print(f"{about.model} at scale {about.scale}, {about.quant}, on {about.device.name}, {about.engine}")
    for placement, ratio, e in overhead.ratios(kept):
        print(f"{placement:9} {ratio.name:60} {stats.close(e)}  {ratio.aim}: {ratio.met(e)}")


@click.command()
@click.option("--model", default="deepseek-moe-16b", show_default=True)
@click.option("--scale", default="tiny", show_default=True)
@click.option("--quant", default="Q8_0", show_default=True)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(2))
@click.option("--way", "ways", multiple=True, type=click.Choice(WAYS), default=WAYS, help="Beside a study's own way.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Keep every rate in this file.")
def main(model: str, scale: str, quant: str, rounds: int, ways: tuple[str, ...], out: Path | None) -> None:
    llama = engine.find()
    where = device.choose("auto", llama)
    fields: dict[str, Any]
    fields = {"study": "benchmark", "model": model, "weights": "twin", "scale": scale, "quant": quant, "block": 0}
    fields |= {
        "order": 0,
        "workloads": (WORKLOAD,),
        "requests": REQUESTS,
        "context": CONTEXT,
        "device": where.kind,
        "seed": 0,
    }
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        made = quantize.make(models.make_twin(model, scale, needed=False), quant, llama, work)
        where.calibrate(work)
        about: dict[str, Any]
        about = {
            "model": model,
            "scale": scale,
            "quant": quant,
            "weights": "twin",
            "file_sha256": made.manifest["sha256"],
        }
        about |= {"engine": str(llama), "device": where.identity(), "host": host.facts(), "workload": WORKLOAD}
        results = overhead.read(out) if out and out.exists() else None
        if results and results.about != overhead.About(**about):
            raise click.ClickException(f"{out} was measured on something else: give another --out, or delete it")
        measured = [r.model_dump(exclude_none=True) for r in results.rounds] if results else []
        for number in range(len(measured) // len(PLACEMENTS), rounds):
            for placement in PLACEMENTS:
                spec = run.Spec(placement=placement, load_mode="mmap", **fields)
                order = ["watched", *(way for way in WAYS if way in ways and way != "toggled")]
                random.Random(f"{number}/{placement}").shuffle(order)
                took = {how: take(how, spec, made, llama, where, work) for how in order}
                if "toggled" in ways:  # last: it needs to know the rate, and its slots are compared with themselves
                    rate = fmean(took["watched"]["client"])
                    took["toggled"] = toggle(rate, spec, made, llama, where, work)
                measured.append({"placement": placement, "order": list(took), **took})
            print(f"round {number + 1} of {rounds}", flush=True)
            results = overhead.write(out or work / "harness.json", about, measured)
    if results:
        show(results)


if __name__ == "__main__":
    main()
