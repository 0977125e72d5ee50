"""A trained model's card and curve, from its check.json and log alone: `python training/card.py phi|deepseek`."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import jinja2
import yaml
from fetch import SOURCES
from pieces import replacing
from recipes import MODELS

HERE = Path(__file__).resolve().parent
CORPORA = HERE.parent / "params" / "corpora.yaml"


def curve(lines: list[dict[str, float]], kept_step: int, title: str, path: Path) -> None:
    """Draw the losses of a log over its steps to a PNG, the same bytes for the same log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 3.8), layout="constrained")
    ax = figure.add_subplot()
    steps = [line["step"] for line in lines]
    ax.plot(steps, [line["train_nats"] for line in lines], color="0.6", label="a batch of training text")
    ax.plot(steps, [line["valid_nats"] for line in lines], color="C0", label="validation text")
    ax.axvline(kept_step, color="C1", linestyle="--", linewidth=1, label=f"kept: step {kept_step}")
    ax.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=100, metadata={"Software": None})


def log(path: Path) -> list[dict[str, float]]:
    """The points of a run's curve."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plus(value: dict[str, Any]) -> str:
    """A mean and its standard error, to two figures of the error; the mean alone where there is none."""
    error = value["standard_error"]
    if not error:
        return f"{value['mean']:.5f}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value['mean']:.{digits}f} ± {error:.{digits}f}"


def markdown(said: dict[str, Any], name: str) -> str:
    """The card of a check's result; `name` is that of the commands."""
    room = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    room.filters["plus"] = plus
    sources = yaml.safe_load(SOURCES.read_text(encoding="utf-8"))
    used = [s for s in sources.values() if s["use"] == "training"]
    texts = [name for name in yaml.safe_load(CORPORA.read_text(encoding="utf-8")) if name in said["corpora"]]
    return room.get_template("card.md.j2").render(**said, name=name, sources=used, texts=texts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--out", type=Path, help="folder of the file; training/models/MODEL")
    a = parser.parse_args(argv)
    folder = a.out or HERE / "models" / MODELS[a.model].name
    try:
        said = json.loads((folder / "check.json").read_text(encoding="utf-8"))
        lines = log(folder / "log.jsonl")
    except FileNotFoundError as err:
        sys.exit(f"card: {err.filename} is not there: run export.py, then check.py")
    curve(lines, said["run"]["best_step"], f"{said['title']}, {said['run']['device']}", folder / "curve.png")
    with replacing(folder / "README.md") as partial:
        partial.write_text(markdown(said, a.model), encoding="utf-8")
    print(folder / "README.md")


if __name__ == "__main__":
    main()
