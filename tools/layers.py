"""Draw how moelib is built: its rooms (modules), floors (a room stands above all that it imports) and arrows (imports).

python tools/layers.py [FOLDER] [--out layers.png] [--packages]

With `--packages`, a room is a package. FOLDER: a package's folder, by default `moelib/` of this clone.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click

Rooms = dict[str, set[str]]
"""Room -> rooms that it imports."""


def _modules(folder: Path) -> dict[str, Path]:
    """Dotted name below the package -> file."""
    files = {p.relative_to(folder).with_suffix(""): p for p in sorted(folder.rglob("*.py"))}
    return {".".join(name.parts): path for name, path in files.items() if name.name not in ("__init__", "__main__")}


def _imported(path: Path, package: str, names: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package and not node.level:
            base = (node.module or "").partition(".")[2]
            for candidate in [base, *(f"{base}.{a.name}".strip(".") for a in node.names)]:
                if candidate in names:
                    yield candidate


def rooms(folder: Path, packages: bool = False) -> Rooms:
    """Every room of the package in `folder` with those that it imports; by package, if asked."""
    modules = _modules(folder)
    imports = {name: set(_imported(path, folder.name, set(modules))) - {name} for name, path in modules.items()}
    if not packages:
        return imports
    joined: Rooms = {}
    for name, used in imports.items():
        mine = name.split(".")[0]
        joined.setdefault(mine, set()).update({u.split(".")[0] for u in used} - {mine})
    return joined


def floors(of: Rooms) -> dict[str, int]:
    """Room -> its floor: 0 for one that imports none, else one above the highest that it imports. Raises ValueError for
    rooms that import each other."""
    standing: list[str] = []

    @cache
    def floor(name: str) -> int:
        if name in standing:
            raise ValueError(f"these rooms import each other: {' -> '.join([*standing, name])}")
        standing.append(name)
        height = max((floor(used) + 1 for used in of[name]), default=0)
        standing.pop()
        return height

    return {name: floor(name) for name in of}


def draw(of: Rooms, out: Path) -> None:
    """A picture of the rooms on their floors with an arrow for each import."""
    from matplotlib.figure import Figure

    level = floors(of)
    rows: dict[int, list[str]] = {}
    for name in sorted(of, key=lambda n: (level[n], n)):
        rows.setdefault(level[name], []).append(name)
    widest = max(map(len, rows.values()))
    figure = Figure(figsize=(max(6.0, 1.5 * widest), max(3.0, 0.8 * len(rows))), layout="constrained")
    ax = figure.subplots()
    place = {n: ((i + 0.5) * widest / len(row), f) for f, row in rows.items() for i, n in enumerate(row)}
    for name, used in of.items():
        for other in used:
            ax.annotate("", place[other], place[name], arrowprops={"arrowstyle": "->", "color": "#99999980", "lw": 0.6})
    for name, (x, y) in place.items():
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "#0072B2"}
        ax.text(x, y, name.rpartition(".")[2], ha="center", va="center", fontsize=7, bbox=box)
    ax.set(xlim=(0, widest), ylim=(-0.6, len(rows) - 0.4), ylabel="floor", xticks=[])
    figure.savefig(out, dpi=144)


@click.command()
@click.argument("folder", default=Path(__file__).parents[1] / "moelib", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Picture to write.")
@click.option("--packages", is_flag=True, help="A room is a package.")
def main(folder: Path, out: Path | None, packages: bool) -> None:
    of = rooms(folder, packages)
    level = floors(of)
    arrows = sum(map(len, of.values()))
    print(f"{len(of)} rooms, {max(level.values()) + 1} floors, {arrows} arrows")
    for height in range(max(level.values()), -1, -1):
        print(f"{height:3}  {' '.join(sorted(n for n in of if level[n] == height))}")
    if out:
        draw(of, out)


if __name__ == "__main__":
    main()
