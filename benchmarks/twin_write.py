"""Speed of writing a twin, as a ratio to a plain sequential write of as many bytes to the same disk, in turn
and in alternating order. The twin is written with its types' blocks, its hash and whatever it has to find out first.

python benchmarks/twin_write.py [--model deepseek-moe-16b] [--quant Q4_K_M] [--layers 2] [--folder .] [--rounds 3]
"""

import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from moelib.catalogue import params
from moelib.engine import engine
from moelib.gguf import fill, twin
from moelib.models import quantize

BLOCK = bytes(range(256)) * (1 << 15)  # 8 MiB, the size of the twin's own writes


def plain(path: Path, nbytes: int) -> float:
    started = time.monotonic()
    with path.open("wb", buffering=0) as f:
        for _ in range(nbytes // len(BLOCK)):
            f.write(BLOCK)
        f.write(BLOCK[: nbytes % len(BLOCK)])
        os.fsync(f.fileno())
    return time.monotonic() - started


def timed(write: Callable[[], object]) -> float:
    started = time.monotonic()
    write()
    return time.monotonic() - started


def of_quant(model: str, quant: str, layers: int | None) -> tuple[int, Callable[[Path], object]]:
    """Bytes of the twin at a quant, and what writes it to a path, its types found out anew."""

    def shape() -> fill.Outline:
        _, whole = quantize.outline_of(model)
        with TemporaryDirectory() as scratch:
            return quantize.types(llama, whole.first_layers(layers) if layers else whole, quant, Path(scratch))

    llama = engine.find()
    return shape().file_bytes, lambda path: fill.write(path, shape(), llama.library("libggml-base"))


def of_f16(model: str, layers: int | None) -> tuple[int, Callable[[Path], object]]:
    geometry = params.model(model).at_scale("full")
    geometry = geometry.model_copy(update={"block_count": layers or geometry.block_count})
    return twin.nbytes(geometry), lambda path: twin.write(path, geometry)


@click.command()
@click.option("--model", default="deepseek-moe-16b")
@click.option("--quant", help="Types that llama-quantize would give; default: the F16 twin.")
@click.option(
    "--layers", default=2, help="The first so many, 0 for all: 2 are 2.0 GiB (DeepSeek, F16), 28 are 30.5 GiB."
)
@click.option("--folder", default=".", type=click.Path(file_okay=False, path_type=Path))
@click.option("--rounds", default=3)
def main(model: str, quant: str | None, layers: int, folder: Path, rounds: int) -> None:
    path = folder / "twin-benchmark.gguf"
    nbytes, write = of_quant(model, quant, layers or None) if quant else of_f16(model, layers or None)
    what = f"{model} {quant or 'F16'}, {f'{layers} layers' if layers else 'whole'}"
    print(f"{what}: {nbytes / 2**30:.2f} GiB, {rounds} rounds in {folder.resolve().name}/", flush=True)
    ratios = []
    try:
        plain(path, nbytes)  # the first write of a machine pays for memory that later ones find ready
        for i in range(rounds):
            times = {}
            for which in ("plain", "twin") if i % 2 else ("twin", "plain"):
                path.unlink(missing_ok=True)
                times[which] = plain(path, nbytes) if which == "plain" else timed(lambda: write(path))
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
