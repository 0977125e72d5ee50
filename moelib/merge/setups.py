"""What sets apart the machines that measured a study: what may not differ within a round or a cell, and kinds of setup
across cells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from moelib.audit.record import Record
from moelib.base import stats

RAM_TIMES = 1.1
"""Speeds of RAM that are further apart are of two kinds."""
Facts = Mapping[str, Callable[[Record], Any]]
ENGINE: Facts = {
    "engine": lambda r: (r.engine.runner, r.engine.server_sha256),
    "device's kind or model": lambda r: (r.device.kind, r.device.name),
    "file": lambda r: r.sheet.sha256,
}
"""What the runs of a cell must share: a cell is one file, on one engine and model of device."""
MACHINE: Facts = {
    **ENGINE,
    "host": lambda r: r.host.host_id,
    "GPU": lambda r: r.device.uuid,
    "driver": lambda r: r.device.driver,
    "kernel": lambda r: r.host.system,
}
"""What the runs of a round must share, as they are compared with each other."""
KIND: Facts = {
    "device": lambda r: r.device.name,
    "CPU": lambda r: r.host.cpu,
    "PCIe link": lambda r: r.device.pcie_link,
    "power limit": lambda r: r.device.power_limit_watt,
    "engine": lambda r: r.engine.version,
    "engine's digest": lambda r: (r.engine.server_sha256 or "")[:12] or None,
}
"""What may differ between cells, and is then said: numbers of two kinds of machine are not compared in silence."""


def differing(runs: Sequence[Record], facts: Facts) -> list[str]:
    """The facts in which runs differ."""
    return [name for name, of in facts.items() if len({of(r) for r in runs}) > 1]


def faults(runs: Iterable[Record]) -> Iterator[str]:
    """What cannot be one study: rounds of several machines, cells of several engines, devices or files."""
    cells: dict[str, list[Record]] = defaultdict(list)
    rounds: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for r in runs:
        cells[r.cell].append(r)
        rounds[r.cell, r.spec.block].append(r)
    for cell, of in cells.items():
        if wrong := differing(of, ENGINE):
            yield f"{cell}: its runs differ in {', '.join(wrong)}"
    for (cell, block), of in rounds.items():
        wrong = [name for name in differing(of, MACHINE) if name not in ENGINE]
        if wrong:
            yield f"{cell} round {block + 1}: its runs differ in {', '.join(wrong)}"


@dataclass(frozen=True)
class Setup:
    """A kind of machine, and what was measured on it."""

    facts: tuple[tuple[str, Any], ...]
    """By the names of KIND."""
    ram: tuple[float, float] | None
    """The slowest and the fastest RAM of its hosts, in bytes per second; None where it was not measured."""
    hosts: int
    cells: tuple[str, ...]


def setups(runs: Iterable[Record]) -> list[Setup]:
    """The kinds of machine that measured runs, in the order of their cells' names.

    A host's RAM is as fast as the median of what its runs say; hosts are of one kind up to RAM_TIMES of the slowest.
    """
    by_kind: dict[tuple[Any, ...], dict[str | None, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for r in runs:
        by_kind[tuple(of(r) for of in KIND.values())][r.host.host_id].append(r)
    found = []
    for kind, hosts in by_kind.items():
        for group in _alike(hosts):
            speeds = [s for host in group if (s := _ram(hosts[host])) is not None]
            found.append(
                Setup(
                    tuple(zip(KIND, kind, strict=True)),
                    (min(speeds), max(speeds)) if speeds else None,
                    len(group),
                    tuple(sorted({r.cell for host in group for r in hosts[host]})),
                )
            )
    return sorted(found, key=lambda s: (s.cells, str(s.facts), s.ram or (0.0, 0.0)))


def _ram(runs: Iterable[Record]) -> float | None:
    speeds = [r.host.ram_read_bytes_per_s for r in runs if r.host.ram_read_bytes_per_s is not None]
    return median(speeds) if speeds else None


def _alike(hosts: Mapping[str | None, Sequence[Record]]) -> list[list[str | None]]:
    """Hosts by how fast their RAM is, each group within RAM_TIMES of its slowest."""
    speeds = {host: _ram(runs) for host, runs in hosts.items()}
    groups: list[list[str | None]] = []
    for host in sorted(speeds, key=lambda h: (speeds[h] or 0.0, h or "")):
        first = speeds[groups[-1][0]] if groups else None
        now = speeds[host]
        if groups and ((first is None) == (now is None)) and (now is None or now <= RAM_TIMES * (first or 0.0)):
            groups[-1].append(host)
        else:
            groups.append([host])
    return groups


def said(found: Sequence[Setup]) -> list[str]:
    """Lines on kinds of machine, where there are several: in what they differ, and which cells each measured."""
    if len(found) < 2:
        return []
    differ = [name for i, name in enumerate(KIND) if len({s.facts[i] for s in found}) > 1]
    lines = []
    for s in found:
        told = [f"{name} {dict(s.facts)[name]}" for name in differ]
        told += [f"RAM {stats.span([x / 1e9 for x in s.ram], stats.number)} GB/s"] if s.ram else []
        hosts = f"{s.hosts} host{'s' * (s.hosts > 1)}"
        lines.append(f"{', '.join(s.cells)}: {hosts}{''.join(f'; {t}' for t in told)}")
    return lines
