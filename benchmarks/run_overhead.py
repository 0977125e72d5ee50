"""Wall-clock of a study's runs over the time that the engine itself accounts for: load, prompts, generation.

python benchmarks/run_overhead.py outputs/demo
"""

from pathlib import Path

import click
import pandas as pd

from moelib.audit import record
from moelib.study import frames


@click.command()
@click.argument("study", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(study: Path) -> None:
    frame: pd.DataFrame = frames.runs(r for r in record.read_all(study)[0] if r.done)
    if frame.empty:
        raise click.ClickException(f"{study} holds no valid record")
    ratios = frame.wall_s / frame.engine_s
    print(f"{len(frame)} runs: {frame.wall_s.sum():.1f} s of wall clock, {frame.engine_s.sum():.1f} s of engine")
    print(f"ratio wall / engine: {frame.wall_s.sum() / frame.engine_s.sum():.3f} in all")
    print(f"by run: median {ratios.median():.3f}, {ratios.min():.3f} to {ratios.max():.3f}")


if __name__ == "__main__":
    main()
