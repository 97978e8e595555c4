"""A scene to turn by hand, with plotly. Works offline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from roomplan_lib.geometry import BOX_EDGES, OrientedBox, box_corners
from roomplan_lib.scenes import Scene, View
from roomplan_lib.viz.clouds import find_views, scene_cloud
from roomplan_lib.viz.oblique import CUT_HEIGHT, frustum
from roomplan_lib.viz.style import CAMERA_COLOR, PREDICTED_COLOR, TRUE_COLOR

if TYPE_CHECKING:
    import plotly.graph_objects as go

PALETTE_SIZE = 128


def scene_figure(
    scene: Scene,
    true: list[OrientedBox] | None = None,
    predicted: list[OrientedBox] = (),
    views: list[View] | None = None,
    *,
    max_points: int = 40_000,
    cut_height: float | None = CUT_HEIGHT,
    height: int = 640,
) -> go.Figure:
    """Cloud, cameras and boxes of a scene in its world frame, metres, equal aspect.

    true: blue boxes, the scene's own for None. predicted: orange boxes; when there are as many as true ones, a line
    joins the centres of each pair. views: cameras to show and the source of the cloud, all for None. max_points: of
    the cloud, 0 leaves it out. cut_height: metres above the floor beyond which the cloud is left out, None keeps all.
    height: of the figure, pixels.

    Traces by name: "surface", "cameras" (pyramids), "camera centres", "true", "predicted", "centre to centre".
    """
    import plotly.graph_objects as go

    true = list(scene.boxes) if true is None else list(true)
    predicted = list(predicted)
    views = find_views(scene) if views is None else list(views)
    figure = go.Figure()
    num_points = 0
    if max_points:
        points, colors = scene_cloud(scene, max_points, [view.view_id for view in views])
        if cut_height is not None:
            keep = points[:, 2] < np.percentile(points[:, 2], 1) + cut_height
            points, colors = points[keep], colors[keep]
        num_points = len(points)
        figure.add_trace(_cloud_trace(points, colors))
    if views:
        segments = np.concatenate([frustum(view) for view in views])
        figure.add_trace(_lines(segments, CAMERA_COLOR, "cameras", 2))
        centers = np.array([view.camera_to_world[:3, 3] for view in views])
        figure.add_trace(
            go.Scatter3d(
                x=centers[:, 0], y=centers[:, 1], z=centers[:, 2], mode="markers", name="camera centres",
                marker={"size": 3, "color": CAMERA_COLOR}, text=[f"view {view.view_id}" for view in views],
                hovertemplate="%{text}<br>%{x:.2f}, %{y:.2f}, %{z:.2f} m<extra></extra>",
            )
        )  # fmt: skip
    for boxes, color, name in ((true, TRUE_COLOR, "true"), (predicted, PREDICTED_COLOR, "predicted")):
        if boxes:
            segments = np.concatenate([box_corners(box)[BOX_EDGES] for box in boxes])
            figure.add_trace(_lines(segments, color, name, 5))
            figure.add_trace(_labels(boxes, color, name))
    if predicted and len(predicted) == len(true):
        pairs = np.array([[a.center, b.center] for a, b in zip(true, predicted, strict=True)])
        figure.add_trace(_lines(pairs, "#000000", "centre to centre", 3))
    figure.update_layout(
        title=f"Scene {scene.scene_id}: {len(views)} of {len(scene.views)} views, {len(true)} true and "
        f"{len(predicted)} predicted boxes, {num_points:,} points",
        scene={
            "aspectmode": "data",
            **{
                f"{axis}axis": {"title": f"{axis} (m)", "backgroundcolor": "white", "gridcolor": "#DDDDDD"}
                for axis in "xyz"
            },
            "camera": {"eye": {"x": 0.9, "y": -0.9, "z": 1.3}},
        },
        legend={"itemsizing": "constant", "x": 0, "y": 1},
        margin={"l": 0, "r": 0, "t": 40, "b": 0},
        height=height,
        template="plotly_white",
    )
    return figure


def _cloud_trace(points: np.ndarray, colors: np.ndarray) -> go.Scatter3d:
    """Squares coloured by an index into a palette: colour strings, one a point, take plotly a hundred times as long."""
    import plotly.graph_objects as go

    picture = Image.fromarray(colors[None]).quantize(PALETTE_SIZE, method=Image.Quantize.MEDIANCUT)
    index = np.asarray(picture)[0].astype(np.float32)
    palette = np.array(picture.getpalette()).reshape(-1, 3)[: int(index.max()) + 1]
    scale = []
    for k, color in enumerate(palette):
        text = f"rgb({color[0]},{color[1]},{color[2]})"
        scale += [[k / len(palette), text], [(k + 1) / len(palette), text]]
    return go.Scatter3d(
        x=points[:, 0], y=points[:, 1], z=points[:, 2], mode="markers", name="surface", hoverinfo="skip",
        marker={
            "size": 2, "symbol": "square", "color": index + 0.5, "colorscale": scale, "cmin": 0, "cmax": len(palette),
            "showscale": False,
        },
    )  # fmt: skip


def _lines(segments: np.ndarray, color: str, name: str, width: float) -> go.Scatter3d:
    """One trace of separate segments [N, 2, 3]: every third point is a gap."""
    import plotly.graph_objects as go

    gaps = np.full((len(segments), 1, 3), np.nan)
    x, y, z = np.concatenate([segments, gaps], axis=1).reshape(-1, 3).T
    return go.Scatter3d(
        x=x, y=y, z=z, mode="lines", name=name, legendgroup=name, hoverinfo="skip",
        line={"color": color, "width": width},
    )  # fmt: skip


def _labels(boxes: list[OrientedBox], color: str, name: str) -> go.Scatter3d:
    import plotly.graph_objects as go

    tops = np.array([[*box.center[:2], box_corners(box)[:, 2].max() + 0.05] for box in boxes])
    sizes = [" x ".join(f"{side:.2f}" for side in box.extent) + " m" for box in boxes]
    return go.Scatter3d(
        x=tops[:, 0], y=tops[:, 1], z=tops[:, 2], mode="text", name=f"{name} labels", legendgroup=name,
        showlegend=False, text=[box.label for box in boxes], customdata=sizes, textfont={"color": color, "size": 13},
        hovertemplate=f"{name}: %{{text}}<br>%{{customdata}}<extra></extra>",
    )  # fmt: skip
