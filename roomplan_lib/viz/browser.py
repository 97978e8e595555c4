"""The anchor browser: where did it put the box, and why. Widgets over `answers`; a still page where there are none."""

from __future__ import annotations

import base64
import io
import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from roomplan_lib.actions import ActionError, PlanRoom
from roomplan_lib.actions.rooms import plan_scene
from roomplan_lib.evaluation.errors import CLASSES
from roomplan_lib.geometry import BOX_EDGES, OrientedBox, box_corners, project_segments
from roomplan_lib.scenes import Scene, View
from roomplan_lib.viz.anchors import shown_share
from roomplan_lib.viz.answers import (
    ERRORS,
    NO_CATEGORY,
    OUTCOMES,
    SORTS,
    Answer,
    Answers,
    Notes,
    Room,
    Scenes,
    load_answers,
    notes_file,
    scene_folders,
)
from roomplan_lib.viz.clouds import Surfels, scene_surface, thin_surfels
from roomplan_lib.viz.frontend import live_frontend
from roomplan_lib.viz.marking import marked_texts
from roomplan_lib.viz.style import PREDICTED_COLOR, TRUE_COLOR

PAGE = 200  # samples in the list at a time
PICTURE_WIDTH = 256  # pixels of a view in the strip
STRIP_HEIGHT = 100  # pixels of a view in the strip
FIGURE_HEIGHT = 360  # pixels
EYE = {"x": 0.7, "y": -0.7, "z": 1.0}  # of the 3D figure, in plotly's units: near enough for a low figure
KEPT_SURFACES = 6
KEPT_PICTURES = 80
RUN_DASHES = ("solid", "dash", "dot", "dashdot")  # predicted boxes are orange; runs differ by dash and letter
STILL_ROWS = 3  # samples on the still page: worst, middle, best
HEADINGS = dict(zip(ERRORS, ("IoU", "centre (m)", "yaw (°)", "size (m)"), strict=True))
DIGITS = dict(zip(ERRORS, (2, 2, 0, 2), strict=True))
# Inline, since exported pages have table styles of their own.
ALIGNED = "text-align:left;vertical-align:top;padding:2px 8px;white-space:normal"
LEFT = f'style="{ALIGNED}"'
MONO = f"{ALIGNED};font-family:monospace;font-size:12px;overflow-wrap:anywhere"
# JupyterLab takes arrow keys for itself (next cell), also those that go to a list, unless the list says otherwise.
OWN_KEYS = """
function claim(el) {
  const root = el.closest(".anchor-browser");
  if (!root) setTimeout(() => claim(el), 200);
  else root.addEventListener("focusin", (event) => event.target.setAttribute("data-lm-suppress-shortcuts", "true"));
}
export default { render({ el }) { claim(el); } };
"""
STYLE = """<style>
.anchor-browser select[size], .anchor-browser select[multiple] {font-family: monospace; font-size: 12px}
.anchor-browser table {border-collapse: collapse; font-size: 13px; line-height: 1.35; width: 100%}
</style>"""


def anchor_browser(
    run_or_predictions: str | Path | Sequence[str | Path] | dict[str, str | Path],
    scenes: str | Path | Iterable[str | Path] | None = None,
    *,
    max_points: int = 20_000,
    static: bool | None = None,
) -> AnchorBrowser:
    """Predicted beside true anchors, sample by sample, of one or several runs side by side.

    run_or_predictions: run folders or predictions files (see `load_answers`). scenes: folders that hold the scenes'
    own; None looks where the runs' samples come from. Samples whose scene is not found are shown without it.
    max_points: of a room's cloud. static: a still page in place of widgets; None decides by whether somebody can
    operate them, which papermill, nbconvert and scripts deny.

    Notes are kept beside the first run's predictions (`notes_file`). Raises ValueError for predictions that cannot be
    read, and for a folder of scenes that is not there.
    """
    answers = load_answers(run_or_predictions)
    folders = [scenes] if isinstance(scenes, str | Path) else scenes
    found = Scenes(scene_folders(answers.files) if folders is None else folders)
    return AnchorBrowser(answers, found, max_points, not live_frontend() if static is None else static)


class AnchorBrowser:
    """State of the browser and its widgets; `anchor_browser` makes it.

    place: of the sample shown, in `answers`; run: the one looked at; pair: of its boxes (`Answer.pairs`), selected.
    """

    def __init__(self, answers: Answers, scenes: Scenes, max_points: int, static: bool) -> None:
        self.answers, self.scenes, self.max_points, self.static = answers, scenes, max_points, static
        self.notes = Notes(notes_file(answers.files[0]))
        self.places = np.arange(len(answers))
        self.place, self.run, self.pair = 0, 0, 0
        self._surfaces: OrderedDict[tuple, Surfels | None] = OrderedDict()
        self._pictures: OrderedDict[Path, str] = OrderedDict()
        self._drawn: tuple | None = None  # what the 3D figure holds besides the boxes
        if not static:
            self._make_widgets()

    # What is shown ----------------------------------------------------------------------------------------------------

    @property
    def shown(self) -> list[Answer | None]:
        """The runs' answers to the sample shown."""
        return self.answers.answers[self.place]

    @property
    def answer(self) -> Answer:
        """That of the run looked at, or of the first that was asked."""
        return self.shown[self.run] or next(filter(None, self.shown))

    @property
    def true_box(self) -> OrientedBox | None:
        """The true box of the selected pair."""
        return self._pair_boxes(self.answer)[0]

    @property
    def predicted_box(self) -> OrientedBox | None:
        """The predicted box of the selected pair, of the run looked at."""
        return self._pair_boxes(self.answer)[1]

    def room(self) -> Room:
        return Room(self.answer, self.scenes)

    def furnished_room(self) -> Scene:
        """The room of the sample shown as the run looked at has it: the plan that it wrote, or the scene's walls with
        every box that it placed between them (`Answers.furnished`). Of texts in a frame of their own, this one's boxes.
        """
        answer = self.answer
        alone = isinstance(answer.predicted, PlanRoom) or answer.true is not None and not answer.in_scene
        if alone and not isinstance(answer.predicted, ActionError):
            return plan_scene(answer.predicted.bound(answer.row["scene_id"]))
        found = self.scenes.get(self.answer.row["scene_id"])
        scene = Scene(self.answer.row["scene_id"], [], [], "predictions") if isinstance(found, str) else found
        return self.answers.furnished(scene, self.run)

    @property
    def file_name(self) -> str:
        """Of the shown room as the run looked at has it, without ending; what stands in files never leads elsewhere."""
        name = f"{self.answer.row['scene_id']}_{self.answers.names[self.run]}"
        return re.sub(r"[^\w-]+", "_", name)[:100]

    def ranked_views(self, room: Room) -> list[tuple[View, float]]:
        """The sample's views with the share of their picture that shows the selected box (the true one where there is
        one), that which shows most of it first; in their own order where none shows it."""
        box = self.true_box or self.predicted_box
        shares = [0.0 if box is None else shown_share(view, box) for view in room.views]
        order = sorted(range(len(shares)), key=lambda i: -shares[i])
        return [(room.views[i], shares[i]) for i in order]

    def _pair_boxes(self, answer: Answer) -> tuple[OrientedBox | None, OrientedBox | None]:
        if self.pair >= len(answer.pairs):
            return None, None
        true, predicted = answer.pairs[self.pair]
        return (
            None if true is None else answer.true_boxes[true],
            None if predicted is None else answer.predicted_boxes[predicted],
        )

    def surface(self, room: Room) -> Surfels | None:
        """The room's cloud, thinned to `max_points`; kept for the next sample of the same views."""
        if room.key not in self._surfaces:
            surface, _ = scene_surface(room.scene, room.views)
            if surface is not None:
                surface = thin_surfels(surface, self.max_points)
            self._surfaces[room.key] = surface
            if len(self._surfaces) > KEPT_SURFACES:
                self._surfaces.popitem(last=False)
        return self._surfaces[room.key]

    # HTML: every text from a file is escaped --------------------------------------------------------------------------

    def strip_html(self, room: Room, wrap: bool = False) -> str:
        """The views beside each other, the one that shows the selected box best first, with all boxes of the sample."""
        cells = [self._view_html(view, share, room.views) for view, share in self.ranked_views(room)]
        note = f'<div style="color:#555">{escape(room.problem)}</div>' if room.problem else ""
        row = f"display:flex;gap:6px;overflow-x:auto;flex-wrap:{'wrap' if wrap else 'nowrap'}"
        return f'{note}<div style="{row}">{"".join(cells)}</div>'

    def _view_html(self, view: View, share: float, views: Sequence[View]) -> str:
        lines = []
        for boxes, color in ((self.answer.true_boxes, TRUE_COLOR), (self.answer.predicted_boxes, PREDICTED_COLOR)):
            selected = self.true_box if color == TRUE_COLOR else self.predicted_box
            for box in boxes:
                if view.posed:
                    segments, _ = project_segments(box_corners(box)[BOX_EDGES], view.K, view.camera_to_world)
                    lines.append(_svg_lines(segments + 0.5, color, box is selected, view.width))
        caption = f"view {views.index(view) + 1}" + (f", fills {_percent(share)}" if share else ", not seen")
        return (
            f'<figure style="margin:0;flex:none"><svg viewBox="0 0 {view.width} {view.height}" height="{STRIP_HEIGHT}" '
            f'width="{STRIP_HEIGHT * view.width / view.height:.0f}" style="display:block;overflow:hidden">'
            f'<image href="{self._picture(view)}" width="{view.width}" height="{view.height}" '
            f'preserveAspectRatio="none"/>{"".join(lines)}</svg>'
            f'<figcaption style="font-size:12px">{caption}</figcaption></figure>'
        )

    def _picture(self, view: View) -> str:
        """The view as a data URI, PICTURE_WIDTH pixels wide at most; the last ones are kept."""
        if view.rgb_path not in self._pictures:
            picture = Image.fromarray(view.load_rgb())
            picture.thumbnail((PICTURE_WIDTH, PICTURE_WIDTH))
            buffer = io.BytesIO()
            picture.save(buffer, format="JPEG", quality=80)
            self._pictures[view.rgb_path] = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            if len(self._pictures) > KEPT_PICTURES:
                self._pictures.popitem(last=False)
        return self._pictures[view.rgb_path]

    def texts_html(self) -> str:
        """Question, truth and the runs' texts side by side, differences marked; errors under each."""
        answer = self.answer
        row = answer.row
        asked = " ".join(filter(None, (str(row.get("situation", "")), str(row["question"]))))
        wanted = row["reference"] or " | ".join(row.get("answers", [])) or "(hidden)"
        frame = " (metres in the frame of the texts)" if answer.true is not None else ""
        heads, cells = [f"true{frame}"], [marked_texts(wanted, answer.row["prediction"])[0]]
        for run, other in enumerate(self.shown):
            heads.append(f"{_letter(run)}: {self.answers.names[run]}" if len(self.shown) > 1 else "predicted")
            if other is None:
                cells.append("<i>was not asked</i>")
                continue
            text = marked_texts(other.row["reference"] or wanted, other.row["prediction"])[1] or "<i>nothing</i>"
            reason = f'<div style="font-family:sans-serif">no action: {escape(other.reason)}</div>' * bool(other.reason)
            cells.append(f"{text}{reason}<div style='font-family:sans-serif;color:#333'>{self._verdict(run)}</div>")
        head = "".join(f"<th {LEFT}>{escape(text)}</th>" for text in heads)
        body = "".join(f'<td style="{MONO};width:{100 / len(cells):.0f}%">{cell}</td>' for cell in cells)
        others = [text for text in row.get("answers", []) if text != row["reference"]]
        also = f"<div>also right: {escape(' | '.join(others))}</div>" if others and answer.true is None else ""
        return (
            f"{STYLE}<div><b>{escape(asked)}</b> <span style='color:#555'>scene {escape(row['scene_id'])}, "
            f"{escape(str(row.get('task') or 'no task named'))}, sample {self.place + 1} of {len(self.answers)}</span>"
            f"</div>{also}<table><tr>{head}</tr><tr>{body}</tr></table>"
        )

    def _verdict(self, run: int) -> str:
        outcome = self.answers.outcomes[self.place, run]
        failure = self._failure(run)
        words = outcome if failure in ("", outcome) else f"{outcome}: {failure}"
        return escape(", ".join([words, *self.answers.told_errors(self.place, run)]))

    def _failure(self, run: int) -> str:
        try:
            return self.answers.failure(self.place, run)
        except ValueError:  # a row that scoring refuses; its texts are shown all the same
            return ""

    def boxes_html(self) -> str:
        """The sample's boxes of the run looked at, a line a pair, with their errors."""
        cells = self._box_cells()
        return _table(["", "box", *HEADINGS.values()], [[k, *line] for k, line in enumerate(cells, 1)]) if cells else ""

    def _box_cells(self) -> list[tuple[str, ...]]:
        """(what, IoU, centre, yaw, size) of each pair, as texts."""
        answer = self.answer
        errors = self.answers.box_errors(self.place, self.shown.index(answer))
        cells = []
        for k, (true, predicted) in enumerate(answer.pairs):
            box = answer.predicted_boxes[predicted] if true is None else answer.true_boxes[true]
            missing = "needless" if true is None else "not placed" if predicted is None else ""
            values = [missing or f"{errors[ERRORS[0]][k]:.2f}"]
            values += ["-" if missing else f"{errors[name][k]:.{DIGITS[name]}f}" for name in ERRORS[1:]]
            cells.append((box.label or NO_CATEGORY, *values))
        return cells

    # Still page -------------------------------------------------------------------------------------------------------

    def still_places(self) -> list[int]:
        """The worst, the middle and the best of the samples chosen, of those that have boxes if there are any."""
        ranked = self.answers.choose(run=self.run, sort="worst first")
        ranked = ranked[np.isin(ranked, self.places)]
        boxed = [place for place in ranked if not np.isnan(self.answers.errors["iou_3d"][place, self.run])]
        ranked = boxed or list(ranked)
        return [int(ranked[i]) for i in dict.fromkeys(np.linspace(0, len(ranked) - 1, STILL_ROWS).astype(int))]

    def to_html(self) -> str:
        """A page without scripts: how many samples are right, and the worst, the middle and the best one of them."""
        counts = {name: (self.answers.outcomes == name).sum(axis=0) for name in OUTCOMES}
        lines = [[name, *(counts[outcome][run] for outcome in OUTCOMES)] for run, name in enumerate(self.answers.names)]
        table = _table(["run", *OUTCOMES], lines)
        before = self.place, self.pair
        parts = []
        for place, name in zip(self.still_places(), ("worst", "middle", "best"), strict=False):
            self.place, self.pair = place, 0
            room = self.room()
            parts.append(f"<h4>{name}</h4>{self.texts_html()}{self.boxes_html()}{self.strip_html(room, wrap=True)}")
        self.place, self.pair = before
        return f'<div class="anchor-browser">{table}{"".join(parts)}</div>'

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        """The widgets where they can be operated; beside them a still page for exports, and alone where they cannot."""
        text = f"{len(self.answers)} samples of {', '.join(self.answers.names)}"
        bundle = {"text/plain": text, "text/html": self.to_html()}
        return bundle if self.static else bundle | self.widget._repr_mimebundle_() | {"text/plain": text}

    # Choosing: what the widgets call, and scripts may ----------------------------------------------------------------

    def filter(self, **choice) -> None:
        """Keeps the samples that `Answers.choose` chooses, and shows the first of them."""
        self.run = choice.get("run", self.run)
        self.places = self.answers.choose(**{"run": self.run, **choice})
        if len(self.places):
            self.place, self.pair = int(self.places[0]), 0
        self._refresh(samples=True)

    def select(self, place: int) -> None:
        """Shows a sample by its place in the file."""
        self.place, self.pair = int(place), 0
        self._refresh()

    def select_pair(self, pair: int) -> None:
        """Picks out one of the sample's pairs of boxes everywhere."""
        self.pair = int(pair)
        self._refresh(boxes_only=True)

    def next_worst(self) -> None:
        """The next sample of those chosen, worst first."""
        ranked = self.answers.choose(run=self.run, sort="worst first")
        ranked = ranked[np.isin(ranked, self.places)]
        if not len(ranked):
            return
        in_order = len(ranked) == len(self.places) and (ranked == self.places).all()
        if not in_order:
            self.places = ranked
            self.select(ranked[0])
            self._refresh(samples=True)
            return
        after = np.flatnonzero(ranked == self.place)
        self.select(ranked[(after[0] + 1) % len(ranked)] if len(after) else ranked[0])

    # Widgets ----------------------------------------------------------------------------------------------------------

    def _make_widgets(self) -> None:
        import ipywidgets as widgets
        import plotly.graph_objects as go
        from anywidget import AnyWidget

        a = self.answers

        def chooser(name: str, values: Iterable[str], width: str = "auto") -> widgets.Dropdown:
            options = [(f"{name}: all", None), *((str(value) or "none named", value) for value in values)]
            return widgets.Dropdown(options=options, layout={"width": width})

        categories = sorted({category for text in set(a.categories) for category in text.split(", ")})
        classes = sorted({failure for names in CLASSES.values() for failure in names} - {"right"})
        self._filters = {
            "scene": chooser("scene", sorted(set(a.scene_ids)), "150px"),
            "task": chooser("task", sorted(set(a.tasks)), "140px"),
            "category": chooser("category", categories, "150px"),
            "outcome": chooser("outcome", [name for name in OUTCOMES if (a.outcomes == name).any()], "140px"),
            "failure": chooser("class of failure", classes, "180px"),
            "search": widgets.Text(placeholder="words to find", continuous_update=False, layout={"width": "170px"}),
            "sort": widgets.Dropdown(options=SORTS, description="sort", style={"description_width": "30px"},
                                     layout={"width": "180px"}),
            "most_iou": self._slider(widgets, "IoU at most", 1.0, 1.0, 0.05),
            "least_center_error": self._slider(widgets, "centre error from (m)", 0.0, 5.0, 0.1),
        }  # fmt: skip
        runs = [(f"{_letter(run)}: {name}", run) for run, name in enumerate(a.names)]
        self._run = widgets.Dropdown(options=runs, description="run", style={"description_width": "30px"},
                                     layout={"width": "220px", "display": "" if len(runs) > 1 else "none"})  # fmt: skip
        self._next = widgets.Button(description="next worst", tooltip="the next sample, worst first",
                                    layout={"width": "100px"})  # fmt: skip
        self._page = widgets.IntSlider(min=1, max=1, description="page", continuous_update=False,
                                       style={"description_width": "36px"}, layout={"width": "250px"})  # fmt: skip
        self._count = widgets.HTML()
        self._list = widgets.Select(options=[], rows=11, layout={"width": "100%"})
        self._boxes = widgets.Select(options=[], rows=4, layout={"width": "100%"})
        self._box = widgets.Dropdown(options=[], description="box", style={"description_width": "30px"},
                                     layout={"width": "260px"})  # fmt: skip
        self._list_head, self._boxes_head = widgets.HTML(), widgets.HTML()
        self._strip, self._texts, self._status = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._note = widgets.Textarea(placeholder="a note on this sample; kept when you leave the field", rows=2,
                                      continuous_update=False, layout={"width": "100%", "height": "52px"})  # fmt: skip
        self.figure = go.FigureWidget(
            layout={"height": FIGURE_HEIGHT, "margin": {"l": 0, "r": 0, "t": 0, "b": 0}, "template": "plotly_white"}
        )
        for name, control in [*self._filters.items(), ("run", self._run)]:
            control.observe(lambda _, name=name: self._filtered(name), "value")
        self._page.observe(self._guarded(lambda value: self._fill_list()), "value")
        self._list.observe(self._guarded(self.select), "value")
        self._boxes.observe(self._guarded(self.select_pair), "value")
        self._box.observe(self._guarded(self.select_pair), "value")
        self._note.observe(self._guarded(self._keep_note), "value")
        self._next.on_click(lambda _: self.next_worst())
        row = {"flex_flow": "row wrap", "align_items": "center"}
        filters = [self._filters[name] for name in ("scene", "task", "category", "outcome", "failure", "search")]
        limits = [self._run, self._filters["sort"], self._filters["most_iou"], self._filters["least_center_error"]]
        left = widgets.VBox(
            [self._list_head, self._list, self._page, self._boxes_head, self._boxes, self._note],
            layout={"width": "37%", "min_width": "340px", "padding": "0 10px 0 0"},
        )
        right = widgets.VBox([self.figure], layout={"width": "63%", "overflow": "hidden"})
        self.widget = widgets.VBox(
            [
                widgets.HBox(filters, layout=row),
                widgets.HBox([*limits, self._next, self._count], layout=row),
                widgets.HBox([left, right]),
                widgets.HBox([self._box, self._status, AnyWidget(_esm=OWN_KEYS)]),
                self._strip,
                self._texts,
            ]
        )
        self.widget.add_class("anchor-browser")
        self._busy = False
        self._refresh(samples=True)

    @staticmethod
    def _slider(widgets, name: str, value: float, largest: float, step: float):
        return widgets.FloatSlider(
            value=value, min=0, max=largest, step=step, description=name, continuous_update=False,
            readout_format=".2f", style={"description_width": "initial"}, layout={"width": "260px"},
        )  # fmt: skip

    def _guarded(self, action):
        """An observer that stays quiet while the program itself sets widgets, and for no value."""
        return lambda change: None if self._busy or change["new"] is None else action(change["new"])

    def _filtered(self, name: str) -> None:
        if self._busy:
            return
        if name == "failure" and self._filters[name].value is not None:
            self._count.value = f"telling the classes of {len(self.answers)} samples ..."
        self.filter(run=self._run.value, **{key: control.value for key, control in self._filters.items()})

    def _keep_note(self, text: str) -> None:
        try:
            self.notes.set(self.answers.keys[self.place], text, str(self.answer.row["question"]))
            self._status.value = f"kept in {escape(str(self.notes.path))}"
        except OSError as error:
            self._status.value = f"<b>not kept: {escape(str(error))}</b>"

    def _refresh(self, samples: bool = False, boxes_only: bool = False) -> None:
        """Brings the widgets to the state. samples: the list too; boxes_only: only another pair is picked out."""
        if self.static:
            return
        self._busy = True
        try:
            if samples:
                self._page.max = max(1, math.ceil(len(self.places) / PAGE))
                self._count.value = f"{len(self.places):,} of {len(self.answers):,} samples"
            here = np.flatnonzero(self.places == self.place)
            page = int(here[0]) // PAGE + 1 if len(here) else 1
            if samples or page != self._page.value:
                self._page.value = page
                self._fill_list()
            if len(here):
                self._list.value = self.place
            if not boxes_only:
                self._fill_boxes()
                self._note.value = self.notes.get(self.answers.keys[self.place])
                self._status.value = f"{len(self.notes)} notes" if len(self.notes) else ""
                self._texts.value = self.texts_html()
            if self._boxes.options:
                self._boxes.value = self._box.value = self.pair
            room = self.room()
            self._strip.value = self.strip_html(room)
            self._draw(room)
        finally:
            self._busy = False

    def _fill_list(self) -> None:
        start = (self._page.value - 1) * PAGE
        many = len(self.answers.names) > 1
        wide = " ".join(f"{'IoU ' + _letter(run) if many else 'IoU':>6}" for run in range(len(self.answers.names)))
        head = f"{'sample':>6}  {'scene':<12} {'asked for':<13} {wide}  centre"
        self._list_head.value = f'{STYLE}<pre style="margin:0;font-size:12px;line-height:1.3">{head} (m)</pre>'
        busy, self._busy = self._busy, True
        self._list.options = [(self._line(int(place)), int(place)) for place in self.places[start : start + PAGE]]
        self._busy = busy

    def _line(self, place: int) -> str:
        """A line of the list: what, and how far off; a star where there is a note."""
        a = self.answers
        cells = []
        for run in range(len(a.names)):
            iou = a.errors["iou_3d"][place, run]
            plain = a.outcomes[place, run] == "invalid" or np.isnan(iou)
            cells.append(f"{a.outcomes[place, run][:6] if plain else format(iou, '.2f'):>6}")
        error = a.errors["center_error_m"][place, self.run]
        star = "*" if a.keys[place] in self.notes else " "
        return (
            f"{place + 1:>6}{star} {a.scene_ids[place]:<12.12} {a.categories[place]:<13.13} {' '.join(cells)}  "
            f"{'' if np.isnan(error) else format(error, '.2f'):>6}"
        ).replace(" ", "\u00a0")

    def _fill_boxes(self) -> None:
        cells = self._box_cells()
        lines = [
            f"{number:>3} {label:<13.13} {iou:>9} {centre:>6} {yaw:>4} {size:>6}".replace(" ", "\u00a0")
            for number, (label, iou, centre, yaw, size) in enumerate(cells, 1)
        ]
        head = f"{'':>3} {'box':<13} {'IoU':>9} {'centre':>6} {'yaw':>4} {'size':>6}"
        self._boxes_head.value = f'<pre style="margin:0;font-size:12px;line-height:1.3">{head}</pre>'
        self._boxes.options = [(line, k) for k, line in enumerate(lines)]
        self._box.options = [(f"{k + 1}: {cell[0]}", k) for k, cell in enumerate(cells)]

    def _draw(self, room: Room) -> None:
        """The 3D figure: the room only where it is another one than before, so that turning it stays as it was."""
        import plotly.graph_objects as go

        from roomplan_lib.viz.interactive import scene_figure

        answer = self.answer
        true, predicted = _aligned(answer)
        selected = self.pair if len(true) > 1 else None
        if not (answer.true_boxes or answer.predicted_boxes or room.views):
            self.figure.data = ()
            self.figure.update_layout(title={"text": "nothing to show in space", "y": 0.5})
            self._drawn = None
            return
        surface = self.surface(room)
        full = scene_figure(
            room.scene, true, predicted, [view for view in room.views if view.posed], surface=surface,
            max_points=self.max_points if surface is not None else 0, max_pictures=0, selected=selected,
        )  # fmt: skip
        traces = [*full.data, *self._other_runs()]
        names = [trace.name for trace in traces]
        with self.figure.batch_update():
            if self._drawn == (room.key, names):
                for old, new in zip(self.figure.data, traces, strict=True):
                    old.update(
                        {key: value for key, value in new.to_plotly_json().items() if key not in ("type", "uid")}
                    )
            else:
                self.figure.data = ()
                self.figure.add_traces(traces)
                full.layout.scene.camera.eye = EYE
                full.layout.scene.uirevision = str(room.key)  # each part of the layout is sent once, whole
                full.layout.legend.font = {"size": 10}
                self.figure.layout.scene = full.layout.scene
                self.figure.layout.legend = full.layout.legend
                self.figure.layout.title = None
                self._drawn = (room.key, names)
                for trace in self.figure.data:
                    if isinstance(trace, go.Scatter3d) and trace.name and "labels" in trace.name:
                        trace.on_click(self._clicked)

    def _other_runs(self) -> list:
        """Predicted boxes of the runs that are not looked at: orange too, dashed, with the run's letter."""
        from roomplan_lib.viz.comparison import comparison_traces

        traces = []
        for run, answer in enumerate(self.shown):
            if answer is None or answer is self.answer:
                continue
            true, predicted = _aligned(answer)
            for trace in comparison_traces(true, predicted, self.pair if len(true) > 1 else None):
                if trace.name.startswith("predicted"):
                    trace.name = trace.name.replace("predicted", f"predicted {_letter(run)}")
                    trace.legendgroup = f"predicted {_letter(run)}"
                    if trace.line is not None and "labels" not in trace.name:
                        trace.line.dash = RUN_DASHES[run % len(RUN_DASHES)]
                    traces.append(trace)
        return traces

    def _clicked(self, trace, points, _) -> None:
        if points.point_inds:
            self.select_pair(trace.customdata[points.point_inds[0]][0])


def _aligned(answer: Answer) -> tuple[list[OrientedBox | None], list[OrientedBox | None]]:
    """True and predicted boxes in the order of the answer's pairs, None for what is not there."""
    true = [None if t is None else answer.true_boxes[t] for t, _ in answer.pairs]
    predicted = [None if p is None else answer.predicted_boxes[p] for _, p in answer.pairs]
    return true, predicted if answer.predicted_boxes else [None] * len(true)


def _percent(share: float) -> str:
    return "under 1%" if share < 0.01 else f"{share:.0%}"


def _letter(run: int) -> str:
    return chr(ord("A") + run % 26)


def _table(head: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
    """An HTML table; what stands in it is escaped."""
    rows = [f"<tr>{''.join(f'<th {LEFT}>{escape(str(cell))}</th>' for cell in head)}</tr>"]
    rows += [f"<tr>{''.join(f'<td {LEFT}>{escape(str(cell))}</td>' for cell in line)}</tr>" for line in lines]
    return f"<table style='width:auto'>{''.join(rows)}</table>"


def _svg_lines(segments: np.ndarray, color: str, selected: bool, width: int) -> str:
    """Lines [M, 2, 2] in pixels as one path over a white casing; a selected box is thicker."""
    path = "".join(f"M{a[0]:.1f} {a[1]:.1f}L{b[0]:.1f} {b[1]:.1f}" for a, b in segments)
    unit = width / 256
    stroke = (3.0 if selected else 1.2) * unit
    dash = f' stroke-dasharray="{6 * unit:.1f} {2.5 * unit:.1f}"' if color == PREDICTED_COLOR else ""
    return (
        f'<path d="{path}" stroke="white" stroke-width="{stroke + 1.2 * unit:.1f}" fill="none" opacity="0.7"/>'
        f'<path d="{path}" stroke="{color}" stroke-width="{stroke:.1f}" fill="none"{dash}/>'
    )
