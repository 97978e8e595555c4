"""Predicted beside true boxes of one scene: how far apart, in numbers and in space."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from roomplan_lib.evaluation.box_metrics import box_errors, match_boxes
from roomplan_lib.geometry import BOX_EDGES, OrientedBox, box_corners
from roomplan_lib.viz.oblique import short_label
from roomplan_lib.viz.style import IOU_SCALE, PREDICTED_COLOR, TRUE_COLOR
from roomplan_lib.viz.tables import markdown_table

if TYPE_CHECKING:
    import plotly.graph_objects as go

Boxes = Sequence[OrientedBox | None]
# key of a row, heading, digits
COLUMNS = (
    ("iou_3d", "IoU", 2), ("center_error_m", "centre (m)", 2), ("extent_error_m", "size (m)", 2),
    ("yaw_error_deg", "yaw (°)", 0),
)  # fmt: skip
LABEL_HEIGHT = 0.06  # metres above a box


def pair_up(true: Sequence[OrientedBox], predicted: Sequence[OrientedBox]) -> tuple[list, list]:
    """Both lists in one order, with None for what has no counterpart: boxes of one label whose centres are nearest,
    so that the distances add up to the least. True boxes keep their order; predictions left over come last."""
    partner = {j: i for i, j in match_boxes(predicted, true, most_distance=np.inf)}
    extra = [box for i, box in enumerate(predicted) if i not in partner.values()]
    aligned = [predicted[partner[j]] if j in partner else None for j in range(len(true))]
    return [*true, *[None] * len(extra)], [*aligned, *extra]


def comparison_rows(true: Boxes, predicted: Boxes) -> list[dict]:
    """A row a pair: number (from 1), label, and the errors of `box_errors`; None where one of the two is not there,
    which `missing` names ("true" or "predicted").

    true, predicted: in one order (see `pair_up`). Raises ValueError for different lengths.
    """
    if len(true) != len(predicted):
        raise ValueError(f"{len(true)} true and {len(predicted)} predicted boxes; bring them in one order with pair_up")
    rows = []
    for number, (a, b) in enumerate(zip(true, predicted, strict=True), 1):
        errors = box_errors(b, a) if a is not None and b is not None else {}
        rows.append(
            {"number": number, "label": (a or b).label if a or b else ""}
            | {key: errors.get(key) for key, _, _ in COLUMNS}
            | {"missing": "predicted" if b is None else "true" if a is None else ""}
        )
    return rows


def comparison_table(true: Boxes, predicted: Boxes) -> str:
    """`comparison_rows` as Markdown."""
    cells = [_cells(row) for row in comparison_rows(true, predicted)]
    return markdown_table(["", "box", *(heading for _, heading, _ in COLUMNS)], cells)


def _cells(row: dict) -> list[str]:
    absent = {"predicted": "missing", "true": "extra"}.get(row["missing"], "-")
    numbers = [absent if row[key] is None else f"{row[key]:.{digits}f}" for key, _, digits in COLUMNS]
    return [str(row["number"]), row["label"], *(numbers if not row["missing"] else [absent, *["-"] * 3])]


def comparison_traces(true: Boxes, predicted: Boxes = (), selected: int | None = None) -> list[go.Scatter3d]:
    """Plotly traces of boxes in one order (see `pair_up`), always these, empty where there is nothing to show:

    "true" and "predicted" (edges), "true labels" and "predicted labels" (customdata: place in the list, label, sides,
    errors), "centre to centre" (a line a pair, coloured by its IoU). selected: place of the pair to be drawn thick, in
    the traces "true selected" and "predicted selected"; the others turn thin.
    """
    import plotly.graph_objects as go

    rows = comparison_rows(true, predicted) if len(predicted) else []
    traces = []
    for boxes, color, name in ((true, TRUE_COLOR, "true"), (predicted, PREDICTED_COLOR, "predicted")):
        there = {i: box for i, box in enumerate(boxes) if box is not None}
        for suffix, chosen, width in (
            ("", [i for i in there if i != selected], 5 if selected is None else 2),
            (" selected", [i for i in there if i == selected], 10),
        ):
            edges = [box_corners(there[i])[BOX_EDGES] for i in chosen]
            trace = line_trace(np.concatenate(edges) if edges else np.zeros((0, 2, 3)), color, name + suffix, width)
            traces.append(trace.update(legendgroup=name, showlegend=not suffix and bool(there)))
        # A prediction that is called as the true box beside it needs no second label.
        named = {i for i in there if name == "predicted" and true[i] is not None and true[i].label == there[i].label}
        tops = np.array([[*box.center[:2], box_corners(box)[:, 2].max()] for box in there.values()]).reshape(-1, 3)
        x, y, z = (tops + [0, 0, LABEL_HEIGHT]).astype(np.float32).T
        traces.append(
            go.Scatter3d(
                x=x, y=y, z=z, mode="markers+text", name=f"{name} labels", legendgroup=name, showlegend=False,
                text=[html.escape(short_label(box.label)) * (i not in named) for i, box in there.items()],
                textposition="top center",
                textfont={"color": color, "size": 13}, marker={"size": 3, "color": color},
                customdata=[
                    [i, html.escape(box.label), _sides(box), _told(rows[i]) if rows else ""] for i, box in there.items()
                ],
                hovertemplate=f"{name} %{{customdata[1]}}<br>%{{customdata[2]}}%{{customdata[3]}}<extra></extra>",
            )
        )  # fmt: skip
    both = [i for i, row in enumerate(rows) if not row["missing"]]
    ends = np.array([[true[i].center, predicted[i].center] for i in both]).reshape(-1, 2, 3)
    joins = line_trace(ends, "black", "centre to centre", 6)
    joins.line = {
        "width": 6, "color": np.repeat(np.array([rows[i]["iou_3d"] for i in both], np.float32), 3),
        "colorscale": [list(stop) for stop in IOU_SCALE], "cmin": 0, "cmax": 1,
        "showscale": bool(both),
        "colorbar": {
            "title": {"text": "IoU", "side": "top"}, "orientation": "h", "len": 0.2, "thickness": 10, "x": 0.01,
            "y": 0.01, "xanchor": "left", "yanchor": "bottom", "bgcolor": "rgba(255,255,255,0.7)",
        },
    }  # fmt: skip
    joins.showlegend = bool(both)
    return [*traces, joins]


def line_trace(segments: np.ndarray, color: str, name: str, width: float) -> go.Scatter3d:
    """One trace of separate segments [N, 2, 3]: every third point is a gap."""
    import plotly.graph_objects as go

    gaps = np.full((len(segments), 1, 3), np.nan)
    x, y, z = np.concatenate([segments, gaps], axis=1).reshape(-1, 3).T.astype(np.float32)
    return go.Scatter3d(
        x=x, y=y, z=z, mode="lines", name=name, legendgroup=name, hoverinfo="skip",
        line={"color": color, "width": width},
    )  # fmt: skip


def table_trace(true: Boxes, predicted: Boxes, domain: tuple[float, float]) -> go.Table:
    """The numbers as a plotly table in the part `domain` of the figure's width."""
    import plotly.graph_objects as go

    cells = [_cells(row) for row in comparison_rows(true, predicted)]
    columns = list(zip(*cells, strict=True)) or [()] * (2 + len(COLUMNS))
    return go.Table(
        domain={"x": list(domain), "y": [0, 1]}, columnwidth=[18, 70, 44, 60, 50, 46], name="errors",
        header={"values": ["", "box", *(h for _, h, _ in COLUMNS)], "align": "left", "font": {"size": 12}},
        cells={
            "values": [[html.escape(cell) for cell in column] for column in columns], "align": "left", "height": 24,
            "font": {"size": 12},
        },
    )  # fmt: skip


def _sides(box: OrientedBox) -> str:
    return " x ".join(f"{side:.2f}" for side in box.extent) + " m"


def _told(row: dict) -> str:
    if row["missing"]:
        return f"<br>{_cells(row)[2]}"
    return "".join(f"<br>{heading}: {row[key]:.{digits}f}" for key, heading, digits in COLUMNS)
