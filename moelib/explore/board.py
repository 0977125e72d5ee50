"""The board: controls of JupyterLab wired to the tables and figures of this package. It shows and computes nothing of
its own; a panel is made when it is looked at."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets
import pandas as pd
from itables.widget import ITable

from moelib.base import neutral
from moelib.base.schema import UserError
from moelib.explore import draw, fits, runs, said, two
from moelib.explore.view import CARD_GB, GB, View, at, code, load, most_bytes
from moelib.study import plan as plans
from moelib.study.study import Study

AS_RUN, ALL = "as run", "all"
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
RAM_GB_PER_S = (20, 30, 40, 50, 60, 80, 100, 150, 200, 300, 400, 600)
Widgets = Sequence[widgets.Widget]


def show(study: str | None = None) -> Board:
    """The board on a study, by default the first that can be loaded; all others can be chosen on it."""
    return Board(study)


class Board(widgets.VBox):
    """Controls above, panels below."""

    def __init__(self, study: str | None = None):
        names = sorted({*plans.measured(), *([study] if study else [])})
        self._loaded: dict[str, Study] = {}
        self._changing = False
        self.run_id: str | None = None
        """Of the row that was clicked last."""
        self.study = _dropdown("study", names, study or next(iter(names), None))
        self.model = _dropdown("model", [])
        self.quant = _dropdown("quant", [])
        how = {"readout_format": ".3g", "continuous_update": False}
        self.vram = widgets.FloatSlider(description="VRAM, GB", **how, **_wide())
        self.context = _steps("context", CONTEXTS, "{:,}")
        self.ram = _steps("RAM, GB/s", RAM_GB_PER_S, "{}")
        self.other = _dropdown("with study", names, next((n for n in names if n != self.study.value), None))
        self.column = _dropdown("column", [])
        controls = [self.study, self.model, self.quant, self.vram, self.context, self.ram]
        self.panels = {
            "What fits": self._what_fits,
            "Curves over N": self._curves,
            "Pareto front": self._front,
            "Memory": self._memory,
            "Token intervals": self._intervals,
            "Quality": self._quality,
            "Two studies": self._two,
            "Runs, checks": self._runs,
        }
        self.tab = widgets.Tab([widgets.VBox() for _ in self.panels], titles=list(self.panels), selected_index=0)
        grid = widgets.Layout(grid_template_columns="repeat(3, minmax(0, 1fr))", width="100%")
        super().__init__([widgets.GridBox(controls, layout=grid), self.tab])
        self._choices()
        for control in (*controls, self.other, self.column):
            control.observe(self._changed, "value")
        self.tab.observe(lambda _: self._draw(), "selected_index")
        self._draw()

    @property
    def view(self) -> View:
        """What is chosen."""
        quant = None if self.quant.value == ALL else self.quant.value
        other = _not_measured(self.context), _not_measured(self.ram)
        return at(self._study(), self.model.value, quant, self.vram.value, *other)

    def _study(self) -> Study:
        name = self.study.value
        if name not in self._loaded:
            self._loaded[name] = load(name)
        return self._loaded[name]

    def _changed(self, change: Any) -> None:
        if self._changing:
            return
        if change["owner"] in (self.study, self.model):
            self._choices()
        self._draw()

    def _choices(self) -> None:
        """Offer what the study has; keep what was chosen, where it has that too. Why a study cannot be read is said by
        the panel."""
        try:
            measured = self._study().runs
        except UserError:
            return
        self._changing = True
        try:
            _offer(self.model, list(measured["model"].unique()))
            of_model = measured[measured["model"] == self.model.value]
            _offer(self.quant, [ALL, *of_model["quant"].unique()])
            most = most_bytes(of_model) / GB
            fits_in = CARD_GB if most > CARD_GB else most / 2
            self.vram.min, self.vram.max, self.vram.step = 0, 1.05 * most, most / 200
            self.vram.value = fits_in
            _offer(self.column, list(two.columns(self.view).items()))
        finally:
            self._changing = False

    def _draw(self) -> None:
        """Make the panel that is looked at."""
        index = self.tab.selected_index or 0
        make = list(self.panels.values())[index]
        try:
            shown = make(self.view)
        except UserError as err:
            shown = [_said(str(err))]
        self.tab.children[index].children = tuple(shown)

    def _what_fits(self, view: View) -> Widgets:
        table = _table(fits.what_fits(view), "nowrap")
        return [_said(fits.in_words(view)), table, *_notes(view), _code(view, fits.what_fits)]

    def _curves(self, view: View) -> Widgets:
        text = "Points: measured. Dashed, and the lines between points of VRAM: predicted from them, not measured."
        return [*_figure(view, draw.curves), _said(text), *_notes(view)]

    def _front(self, view: View) -> Widgets:
        text = "Dominated: another has less VRAM, more tokens/s or less TTFT beyond doubt, and nothing worse."
        text += " Speeds are as measured, not for the chosen RAM." * (view.ram_bytes_per_s is not None)
        return [*_figure(view, draw.front), _said(text), _table(fits.pareto(view), "nowrap"), _code(view, fits.pareto)]

    def _memory(self, view: View) -> Widgets:
        return [*_figure(view, draw.memory), *_notes(view)]

    def _intervals(self, view: View) -> Widgets:
        of_view = {r.run_id for r in view.study.records if r.spec.model == view.model and r.spec.quant in view.quants}
        chosen = self.run_id if self.run_id in of_view else str(view.runs["run_id"].iloc[0])
        return [*_figure(view, draw.intervals, chosen), _said("The run is the one clicked in the last tab.")]

    def _quality(self, view: View) -> Widgets:
        shown: list[widgets.Widget] = []
        for make in (said.lost, said.written):
            try:
                shown += [_table(make(view)), _code(view, make)]
            except said.NothingSaid as err:
                shown.append(_said(str(err)))
        return shown

    def _two(self, view: View) -> Widgets:
        asked = [widgets.HBox([self.other, self.column])]
        other, column = self.other.value, self.column.value
        try:
            found = two.short(two.compare(view, other, column), column)
            return [*asked, _said(two.differ(view, other)), _table(found), _code(view, two.compare, other, column)]
        except UserError as err:
            return [*asked, _said(str(err))]

    def _runs(self, view: View) -> Widgets:
        frame, below = runs.table(view), widgets.VBox()
        short = frame.assign(run=frame["run"].str.split("_").str[-2:].str.join("_"))  # a digest, and the attempt
        table = _table(short, "nowrap", select="single")

        def clicked(change: Any) -> None:
            if change["new"]:
                self.run_id = str(frame["run"].iloc[change["new"][0]])
                below.children = tuple(_record(view, self.run_id))

        table.observe(clicked, "selected_rows")
        return [_said("Click a row: its record, and every check with its verdict."), table, below]


def _record(view: View, run_id: str) -> Widgets:
    shown = [_table(runs.facts(view, run_id), paging=False), _code(view, runs.facts, run_id)]
    return [*shown, _table(runs.checks(view, run_id), paging=False), _code(view, runs.checks, run_id)]


def _wide() -> dict[str, Any]:
    """As wide as its column."""
    return {"layout": widgets.Layout(width="auto"), "style": {"description_width": "80px"}}


def _dropdown(name: str, options: Sequence[Any], value: Any = None) -> Any:
    return widgets.Dropdown(description=name, options=options, value=value, **_wide())


def _steps(name: str, values: Sequence[int], text: str) -> Any:
    """A slider over values that were not measured; its first step is what was."""
    options = [(AS_RUN, AS_RUN), *((text.format(v), v) for v in values)]
    return widgets.SelectionSlider(description=name, options=options, continuous_update=False, **_wide())


def _not_measured(control: Any) -> int | None:
    """The value of such a slider; None where it is what was measured."""
    return None if control.value == AS_RUN else int(control.value)


def _offer(control: Any, options: Sequence[Any]) -> None:
    """Set what can be chosen; what was chosen stays, if it can, else it is the first."""
    values = [o[1] if isinstance(o, tuple) else o for o in options]
    kept = control.value if control.value in values else values[0]
    control.options = options
    control.value = kept


def _said(text: str) -> Any:
    return widgets.HTML(html.escape(neutral.plain(text, None)))


def _notes(view: View) -> Widgets:
    """What the laws say of themselves, folded away where it is long."""
    if not view.notes:
        return []
    items = "".join(f"<li>{html.escape(neutral.plain(note, None))}</li>" for note in view.notes)
    opened = " open" if len(view.notes) < 3 or any("not told" in note for note in view.notes) else ""
    return [
        widgets.HTML(f"<details{opened}><summary>Estimates: of what, from what</summary><ul>{items}</ul></details>")
    ]


def _code(view: View, make: Callable[..., object], *args: object) -> Any:
    return widgets.HTML(f"<pre>{html.escape(code(view, make, *args))}</pre>")


def _figure(view: View, make: Callable[..., Any], *args: object) -> Widgets:
    """A figure as PNG, and the lines that make it."""
    return [widgets.Image(value=draw.png(make(view, *args)), format="png"), _code(view, make, *args)]


def _table(frame: pd.DataFrame, classes: str = "", **options: Any) -> Any:
    """With what is not known left empty, and no decimals of whole numbers from 100 up."""
    shown = frame.astype(object).where(frame.notna(), "").map(_whole)
    style = "width:100%; font-size:90%"
    return ITable(shown, showIndex=False, classes=f"display compact {classes}", style=style, maxBytes=0, **options)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value >= 100 and value.is_integer() else value
