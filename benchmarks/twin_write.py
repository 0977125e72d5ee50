"""Speed of writing a twin, as a ratio to a plain sequential write of as many bytes to the same disk, in turn
and in alternating order.

python benchmarks/twin_write.py [--model deepseek-moe-16b] [--layers 2] [--folder .] [--rounds 3]
"""

import os
import resource
import statistics
import time
from pathlib import Path

import click

from moelib.catalogue import params
from moelib.gguf import twin

BLOCK = bytes(range(256)) * (1 << 15)  # 8 MiB, the size of the twin's own writes


def plain(path: Path, nbytes: int) -> float:
    started = time.monotonic()
    with path.open("wb", buffering=0) as f:
        for _ in range(nbytes // len(BLOCK)):
            f.write(BLOCK)
        f.write(BLOCK[: nbytes % len(BLOCK)])
        os.fsync(f.fileno())
    return time.monotonic() - started


def twins(path: Path, geometry: params.Geometry) -> float:
    started = time.monotonic()
    twin.write(path, geometry)
    return time.monotonic() - started


@click.command()
@click.option("--model", default="deepseek-moe-16b")
@click.option("--layers", default=2, help="Of the full-size twin: 2 are 2.0 GiB (DeepSeek), all 28 are 30.5 GiB.")
@click.option("--folder", default=".", type=click.Path(file_okay=False, path_type=Path))
@click.option("--rounds", default=3)
def main(model: str, layers: int, folder: Path, rounds: int) -> None:
    geometry = params.model(model).at_scale("full").model_copy(update={"block_count": layers})
    path, nbytes = folder / "twin-benchmark.gguf", twin.nbytes(geometry)
    print(f"{model}, {layers} layers: {nbytes / 2**30:.2f} GiB, {rounds} rounds in {folder.resolve().name}/")
    ratios = []
    try:
        plain(path, nbytes)  # the first write of a machine pays for memory that later ones find ready
        for i in range(rounds):
            times = {}
            for which in ("plain", "twin") if i % 2 else ("twin", "plain"):
                path.unlink(missing_ok=True)
                times[which] = plain(path, nbytes) if which == "plain" else twins(path, geometry)
            base, took = times["plain"], times["twin"]
            ratios.append(base / took)
            speeds = f"plain {nbytes / base / 1e9:.2f} GB/s, twin {nbytes / took / 1e9:.2f} GB/s"
            print(f"round {i + 1}: {speeds}, ratio {ratios[-1]:.2f}", flush=True)
    finally:
        path.unlink(missing_ok=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"ratio twin / plain: median {statistics.median(ratios):.2f} of {min(ratios):.2f} to {max(ratios):.2f}")
    print(f"peak memory: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
