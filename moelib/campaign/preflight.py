"""What a study needs, told before anything is downloaded, written or run; and its plan, where placements are to fit.

A study with `placements: fitting` gets, for each of its files, the fewest layers' experts on the CPU that the card here
holds, and all of them: planned once, when it is begun, from headers alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import psutil

from moelib.base import files, stats
from moelib.catalogue import params, sizes
from moelib.catalogue.params import PlacementMode
from moelib.catalogue.placement import Placement
from moelib.engine import engine
from moelib.gguf import twin
from moelib.gguf.gguf_header import Header
from moelib.measure import device
from moelib.models import models, sources
from moelib.planner import budget, memory, named
from moelib.planner.budget import CLOSE, GIB, Budget, PlanError, gib
from moelib.planner.memory import Need
from moelib.runners import pick
from moelib.study import plan as plans
from moelib.study.plan import Card, Cell, Foreseen, Plan, StudyError
from moelib.study.study import Study


class Room(NamedTuple):
    """The device that a study is planned for, and the machine it is in."""

    name: str | None
    usable_bytes: int | None
    """None where it has no memory of its own."""
    ram_bytes: int | None
    """None of a machine that is not known."""
    is_cuda: bool
    note: str | None = None


def here(parameters: params.Study) -> Room:
    """The device of this machine that runs of a study will use. Raises EngineError, ShimmyError; DeviceError, with what
    to do."""
    llama = engine.find()
    try:
        where = pick.device_for(pick.of_study(parameters, llama), parameters.device, llama)
    except device.DeviceError as err:
        other = "or plan for another machine's card: `moelib study plan NAME --vram 12GiB`"
        raise device.DeviceError(f"{err}; {other}") from None
    return Room(where.name, where.usable_bytes, psutil.virtual_memory().total, where.kind == "cuda", where.note)


def elsewhere(vram_bytes: int) -> Room:
    """A card of another machine."""
    return Room(None, vram_bytes, None, is_cuda=True)


def of(name: str, room: Room | None = None) -> Study:
    """The study that `params/studies/` describes, begun or not; one that is to fit and is not begun is planned for
    this machine or, whether begun or not, for `room`. Raises what `Study.named` and `fitted` do."""
    parameters = params.study(name)
    path = plans.outputs() / name
    if parameters.fitting and (room or not (path / "plan.json").exists()):
        return Study(path, fitted(parameters, room or here(parameters)))
    return Study.named(name)


def fitted(parameters: params.Study, where: Room) -> Plan:
    """The plan of a study whose placements are to fit a device.

    Raises StudyError where it has no memory of its own to plan for, or a file does not fit it, with what does.
    """
    name, usable = parameters.name, where.usable_bytes
    if parameters.vram is None and usable is None:
        raise StudyError(
            f"params/studies/{name}.yaml: nothing says how much VRAM there is ({where.note or 'no GPU is used'}): "
            "write what it is for, such as `vram: 12GiB`"
        )
    # of all of a card only what a plan that is somewhat wrong leaves free
    vram = sizes.parse(parameters.vram) if parameters.vram else int((1 - CLOSE) * (usable or 0))
    planned: dict[str, tuple[PlacementMode, ...]] = {}
    foreseen: dict[str, dict[str, Foreseen]] = {}
    for cell, header in _headers(parameters, [*itertools.product(parameters.models, parameters.quants)]).items():
        try:
            plan = budget.plan(header, vram, where.ram_bytes, parameters.context, cuda=where.is_cuda)
            chosen = plan.chosen
        except PlanError as err:
            raise StudyError(f"{name}, {cell}: {err}; or leave that quant out of params/studies/{name}.yaml") from None
        modes = [PlacementMode(placement=str(chosen.placement)), PlacementMode(placement="cpu-moe")]
        if chosen.placement.is_whole:  # nothing else fits: its load modes are compared
            modes[1] = PlacementMode(placement="cpu-moe", load_mode="none")
        planned[cell] = tuple(modes)
        needs = {str(n.placement): n for n in plan.needs}
        foreseen[cell] = {
            m.label: Foreseen(vram_bytes=needs[m.placement].vram_bytes, ram_bytes=needs[m.placement].ram_bytes)
            for m in modes
        }
    every = dict.fromkeys(mode for modes in planned.values() for mode in modes)
    arms = tuple(sorted(every, key=lambda mode: mode.placed.rank))
    card = Card(name=where.name, vram_bytes=vram, ram_bytes=where.ram_bytes)
    plan_of_runs = plans.of(parameters.model_copy(update={"arms": arms}), planned)
    return plan_of_runs.model_copy(update={"card": card, "foreseen": foreseen})


def _headers(parameters: params.Study, cells: Sequence[tuple[str, str]]) -> dict[str, Header]:
    """Cell -> the header that its file has, or will have, of (model, quant); nothing of it is downloaded."""
    headers: dict[str, Header] = {}
    for model in dict.fromkeys(m for m, _ in cells):
        quants = [q for m, q in cells if m == model]
        listed = named.headers(model, [params.plain(q) for q in quants], parameters.scale)
        headers |= {f"{model}/{quant}": h for quant, h in zip(quants, listed, strict=True)}
    return headers


@dataclass(frozen=True)
class Row:
    """A cell: its file, and what each of its placements needs."""

    cell: str
    file_bytes: int
    needs: tuple[tuple[Placement, Need], ...]


@dataclass(frozen=True)
class Preflight:
    """What a study needs, and what this machine has."""

    study: Study
    where: Room
    rows: tuple[Row, ...]
    download_bytes: int
    """Still to come."""
    unpinned: tuple[str, ...]
    """Models of which nothing is pinned: the size of their download is that of their shape in F16."""
    disk_bytes: int
    """To be written yet, downloads included."""

    @cached_property
    def free_bytes(self) -> int:
        return files.free_bytes(models.folder())

    @property
    def vram_bytes(self) -> int:
        """The most that a placement needs."""
        return max(need.vram_bytes for row in self.rows for _, need in row.needs)

    @property
    def ram_bytes(self) -> int:
        return max(need.ram_bytes for row in self.rows for _, need in row.needs)

    def lines(self) -> Iterator[str]:
        """As text, with what is lacking last."""
        width = max(len(row.cell) for row in self.rows)
        wide = max(len(placement.label) for row in self.rows for placement, _ in row.needs)
        yield f"{'file':<{width}}{'GiB':>9}  {'placement':<{wide}}{'VRAM':>9}{'RAM':>9}  GiB, predicted"
        for row in self.rows:
            for i, (placement, need) in enumerate(row.needs):
                file = (row.cell, f"{row.file_bytes / GIB:.2f}") if not i else ("", "")
                sizes_of = f"{need.vram_bytes / GIB:>9.2f}{need.ram_bytes / GIB:>9.2f}"
                yield f"{file[0]:<{width}}{file[1]:>9}  {placement.label:<{wide}}{sizes_of}".rstrip()
        download = stats.size(self.download_bytes) if self.download_bytes else "nothing"
        if self.unpinned:
            download += f" ({', '.join(self.unpinned)} is not pinned yet: by its shape in F16)"
        yield f"download: {download}"
        written, free = stats.size(self.disk_bytes), stats.size(self.free_bytes)
        yield f"disk: {written} to be written to {models.folder().name}/, {free} are free"
        ram = self.where.ram_bytes
        yield f"RAM: up to {gib(self.ram_bytes)}{f' of {gib(ram)}' if ram else ''}"
        room = self.where.usable_bytes
        if room:
            of_what = f"{gib(room)} ({self.where.name or 'of a card elsewhere'})"
        elif self.where.is_cuda:
            of_what = f"a size that the driver of the {self.where.name} does not say"
        elif self.where.name is None:
            of_what = "the RAM, as there is no device"
        else:
            of_what = "the RAM, as a second process plays the device"
        if card := self.study.plan.card:
            of_what += f", planned for {gib(card.vram_bytes)}"
        yield f"VRAM: up to {gib(self.vram_bytes)} of {of_what}"
        yield from self.doubts()

    def doubts(self) -> Iterator[str]:
        """What will not go well, by the predictions; runs may tell otherwise."""
        room, ram = self.where.usable_bytes, self.where.ram_bytes
        if self.disk_bytes > self.free_bytes:
            yield f"too little disk: {stats.size(self.disk_bytes - self.free_bytes)} more must be free"
        for row in self.rows:
            for placement, need in row.needs:
                if room is not None and need.vram_bytes > room:
                    yield f"too much VRAM: {row.cell} at {placement.label} needs {gib(need.vram_bytes)} of {gib(room)}"
                host_bytes = need.ram_bytes + (0 if self.where.is_cuda else need.buffers_bytes)
                if ram is not None and host_bytes > ram:
                    yield (
                        f"too much RAM: {row.cell} at {placement.label} needs {gib(host_bytes)} of {gib(ram)}, so "
                        "that the disk would be read for each token"
                    )

    def require(self) -> None:
        """Raise FileError if the disk is too small for what is to be written."""
        if self.disk_bytes:
            files.need_space(models.folder(), self.disk_bytes, f"study {self.study.name}")


def preflight(study: Study, cells: Sequence[Cell] | None = None, room: Room | None = None) -> Preflight:
    """What a study, or some cells of it, need here, or in `room`. Raises StudyError for placements that make no sense;
    EngineError, DeviceError; QuantizeError, GGUFError where headers do not tell; HubError for a file on the Hub that
    cannot be looked at."""
    p, asked = study.parameters, study.cells if cells is None else cells
    where = room or here(p)
    cuda = where.is_cuda
    beside = Budget(0, cuda=cuda).context_bytes
    placed = {c.name: sorted({s.placed for s in c.specs}, key=lambda one: one.rank) for c in asked}
    rows, download, unpinned, disk = [], 0, [], 0
    headers = _headers(p, [(c.model, c.quant) for c in asked])
    for model in dict.fromkeys(c.model for c in asked):
        to_make, quants = 0, [c.quant for c in asked if c.model == model]
        for quant in quants:
            cell, path = f"{model}/{quant}", _path(p, model, quant)
            header = headers[cell]
            if fault := header.fault(placed[cell]):
                raise StudyError(f"params/studies/{p.name}.yaml: {model}: {fault}")
            needs = tuple((one, memory.need(header, one, p.context, beside, cuda)) for one in placed[cell])
            is_made = path is None or path.exists()
            rows.append(Row(cell, header.file_bytes, needs))
            to_make += 0 if is_made else header.file_bytes
        come, pinned = _to_come(p, model, headers[f"{model}/{quants[0]}"], bool(to_make))
        download += come
        unpinned += [] if pinned else [model]
        disk += to_make + come + _twin_bytes(p, model, bool(to_make))
    return Preflight(study, where, tuple(rows), download, tuple(unpinned), disk)


def _path(p: params.Study, model: str, quant: str) -> Path | None:
    """Where a file that moelib makes will be; None of one that somebody else made."""
    if params.model(model).file:
        return None
    if p.weights == "real":
        return sources.folder(model) / f"{model}-{quant}.gguf"
    return models.twin_folder(model, p.scale) / f"{model}-{quant}{'-twin' if p.twins == 'direct' else ''}.gguf"


def _to_come(p: params.Study, model: str, header: Header, needed: bool) -> tuple[int, bool]:
    """(bytes to be downloaded yet, whether their size is known)."""
    entry = params.model(model)
    if entry.address:
        missing = sources.missing_bytes(model)
        return (header.file_bytes if missing is None else missing), True
    if entry.file:
        return 0, True
    if p.weights == "twin" or not needed:
        return 0, True
    missing = sources.missing_bytes(model)
    return (twin.nbytes(entry.at_scale("full")), False) if missing is None else (missing, True)


def _twin_bytes(p: params.Study, model: str, needed: bool) -> int:
    """Bytes of an F16 twin that is to be written first."""
    entry = params.model(model)
    if entry.file or p.weights == "real" or p.twins == "direct" or not needed:
        return 0
    path = models.twin_folder(model, p.scale) / f"{model}-F16.gguf"
    return 0 if path.exists() else twin.nbytes(entry.at_scale(p.scale))
