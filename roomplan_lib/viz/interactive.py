"""A scene to turn by hand, with plotly. Works offline."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from roomplan_lib.geometry import BOX_EDGES, box_corners
from roomplan_lib.scenes import Scene, Surface, View
from roomplan_lib.viz.clouds import Surfels, find_views, scene_surface, thin_surfels
from roomplan_lib.viz.comparison import Boxes, comparison_traces, line_trace, pair_up, table_trace
from roomplan_lib.viz.oblique import (
    CUT_HEIGHT,
    TOP,
    Direction,
    best_direction,
    draw_boxes,
    draw_cameras,
    draw_connectors,
    draw_segments,
    draw_surfels,
    frustum,
    map_axes,
    place_labels,
    scale_bar,
    set_limits,
)
from roomplan_lib.viz.style import CAMERA_COLOR, FONT_SIZE, ROOM_COLOR, PrintFigure

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from roomplan_lib.viz.turnable import TurnableFigure

PALETTE_SIZE = 128
THUMBNAIL = 28  # pixels along the longer side of a picture on its camera's pyramid
PICTURE_DEPTH = 0.22  # metres before the camera at which that picture stands
GRID = 1.0  # metres between the lines on the floor
MAX_POINTS = 50_000  # that software rendering still turns; full_cloud shows more
VIEW_DISTANCE = 2.05  # of a viewer from the middle, in plotly's unit
TABLE_SHARE = 0.34  # of a comparison's width


def scene_figure(
    scene: Scene,
    true: Boxes | None = None,
    predicted: Boxes = (),
    views: list[View] | None = None,
    *,
    surface: Surfels | None = None,
    max_points: int = 40_000,
    cut_height: float | None = CUT_HEIGHT,
    max_pictures: int = 8,
    selected: int | None = None,
    height: int = 640,
) -> TurnableFigure:
    """Surface, cameras and boxes of a scene in its world frame, metres, equal aspect.

    true: blue boxes, the scene's own for None. predicted: orange boxes; as many as true ones (None for those that are
    not there) are pairs in this order, others are brought in one by `pair_up`. views: cameras to show and the source
    of the surface, all for None. surface: to show in place of that of the scene's depth or mesh. max_points: of the
    surface, at most MAX_POINTS; 0 leaves it out. cut_height: metres above the floor beyond which the surface is left
    out, None keeps all. max_pictures: of the views, evenly chosen, whose small picture stands on their camera's
    pyramid. selected: place of the pair of boxes to stand out. height: of the figure, pixels.

    Traces by name: "surface", "room" (walls, doors, windows, floor), "floor grid", "cameras" (pyramids), "pictures",
    "camera centres", and those of `comparison_traces`. Raises ValueError for more than MAX_POINTS.
    """
    from roomplan_lib.viz.turnable import TurnableFigure

    if not 0 <= max_points <= MAX_POINTS:
        raise ValueError(f"max_points: expected 0 to {MAX_POINTS}, got {max_points}; full_cloud shows more")
    true = list(scene.boxes) if true is None else list(true)
    predicted = list(predicted)
    if predicted and len(predicted) != len(true):
        true, predicted = pair_up([b for b in true if b is not None], [b for b in predicted if b is not None])
    views = find_views(scene) if views is None else list(views)
    posed = [view for view in views if view.posed]
    source = "points given"
    if surface is None:
        surface, source = scene_surface(scene, views) if max_points else (None, "no surface asked for")
    if surface is not None and cut_height is not None:
        surface = surface[surface.points[:, 2] < surface.floor + cut_height]
    traces = []
    thinned = None
    if surface is not None and max_points:
        thinned = thin_surfels(surface, max_points)
        traces.append(cloud_trace(thinned.points, thinned.colors))
        source = f"{len(thinned):,} points ({source})"
    if scene.surfaces:
        traces.append(line_trace(surface_segments(scene.surfaces), ROOM_COLOR, "room", 3))
    traces += _floor_traces(_shown_points(scene, thinned, [*true, *predicted], posed))
    if posed:
        traces += _camera_traces(posed, max_pictures)
    traces += comparison_traces(true, predicted, selected)
    num_true, num_predicted = (sum(box is not None for box in boxes) for boxes in (true, predicted))
    title = (
        f"Scene {scene.scene_id}: {len(posed)} cameras of {len(scene.views)} views, {num_true} true and "
        f"{num_predicted} predicted boxes, {source}; metres"
    )

    def still() -> PrintFigure:
        return scene_still(scene, surface, posed, true, predicted, title)

    figure = TurnableFigure(traces, still=still)
    figure.update_layout(
        title={"text": html.escape(title), "font": {"size": 15}, "x": 0.01, "xanchor": "left"},
        scene=_space((0, 1), _outside(surface, true)),
        legend={"itemsizing": "constant", "x": 0, "y": 1, "bgcolor": "rgba(255,255,255,0.7)"},
        margin={"l": 0, "r": 0, "t": 40, "b": 0},
        height=height,
        template="plotly_white",
    )  # fmt: skip
    return figure


def comparison_figure(scene: Scene, true: Boxes, predicted: Boxes, **options) -> TurnableFigure:
    """`scene_figure` with its options, and beside it a table of the pairs: IoU, errors of centre, size and yaw."""
    true, predicted = list(true), list(predicted)
    if len(true) != len(predicted):
        true, predicted = pair_up([b for b in true if b is not None], [b for b in predicted if b is not None])
    figure = scene_figure(scene, true, predicted, **options)
    figure.add_trace(table_trace(true, predicted, (1 - TABLE_SHARE, 1)))
    figure.update_layout(scene={"domain": {"x": [0, 0.99 - TABLE_SHARE], "y": [0, 1]}})
    return figure


def surfaces_figure(
    surfaces: dict[str, Surfels],
    true: Boxes = (),
    cameras: dict[str, np.ndarray] | None = None,
    *,
    max_points: int = 16_000,
    cut_height: float | None = CUT_HEIGHT,
    height: int = 520,
) -> TurnableFigure:
    """Surfaces of one room side by side, each named and with its size in metres.

    true: blue boxes in each. cameras: centres [V, 3] metres by the surfaces' names. max_points: of each surface. A
    surface is drawn to its own extent: two that differ in scale differ in their axes' numbers.
    Raises ValueError for no surface.
    """
    import plotly.graph_objects as go

    from roomplan_lib.viz.turnable import TurnableFigure

    if not surfaces:
        raise ValueError("surfaces_figure: no surface to show")
    if cut_height is not None:
        surfaces = {name: part[part.points[:, 2] < part.floor + cut_height] for name, part in surfaces.items()}
    traces, layout, width = [], {}, 1 / len(surfaces)
    for number, (name, surface) in enumerate(surfaces.items()):
        thinned = thin_surfels(surface, max_points)
        centers = np.asarray((cameras or {}).get(name, np.zeros((0, 3))), np.float32)
        part = [cloud_trace(thinned.points, thinned.colors), *comparison_traces(true)]
        part.append(
            go.Scatter3d(
                x=centers[:, 0], y=centers[:, 1], z=centers[:, 2], mode="markers", name="camera centres",
                marker={"size": 3, "color": CAMERA_COLOR},
            )
        )  # fmt: skip
        subplot = "scene" if number == 0 else f"scene{number + 1}"
        traces += [trace.update(scene=subplot, showlegend=False) for trace in part]
        layout[subplot] = _space((number * width, (number + 0.97) * width), _outside(surface, true))
    titles = {name: f"{name}: {_size_text(surface)}" for name, surface in surfaces.items()}
    figure = TurnableFigure(traces, still=lambda: _surfaces_still(surfaces, titles, true))
    figure.update_layout(
        **layout, margin={"l": 0, "r": 0, "t": 40, "b": 0}, height=height, template="plotly_white",
        annotations=[
            {
                "text": html.escape(text), "x": (number + 0.5) * width, "y": 1.0, "xref": "paper", "yref": "paper",
                "yanchor": "bottom", "showarrow": False, "font": {"size": 14},
            }
            for number, text in enumerate(titles.values())
        ],
    )  # fmt: skip
    return figure


def _surfaces_still(surfaces: dict[str, Surfels], titles: dict[str, str], true: Boxes) -> PrintFigure:
    figure = PrintFigure(3.4, few_colors=True)
    axes = figure.subplots(1, len(surfaces), squeeze=False)[0]
    figure.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.02, wspace=0.05)
    boxes = [box for box in true if box is not None]
    for ax, (name, surface) in zip(axes, surfaces.items(), strict=True):
        direction = _outside(surface, true)
        set_limits(ax, draw_surfels(ax, surface, direction, cut_height=None), direction, boxes)
        draw_boxes(ax, direction, boxes)
        scale_bar(ax)
        ax.set_title(titles[name], fontsize=FONT_SIZE + 0.5, pad=3, parse_math=False)
    return figure


def _size_text(surface: Surfels) -> str:
    size = np.ptp(np.percentile(surface.points, [1, 99], axis=0), axis=0)
    return " x ".join(f"{side:.1f}" for side in size) + " m"


def _space(domain: tuple[float, float], direction: Direction) -> dict:
    """Layout of a space in a part of the figure's width, seen from `direction`: metres, equal aspect."""
    return {
        "aspectmode": "data",
        **{
            f"{axis}axis": {
                "title": f"{axis} (m)", "backgroundcolor": "white", "gridcolor": "#DDDDDD", "zerolinecolor": "#BBB"
            }
            for axis in "xyz"
        },
        "camera": {"eye": dict(zip("xyz", VIEW_DISTANCE * direction.towards, strict=True))},
        "domain": {"x": list(domain), "y": [0, 1]},
    }  # fmt: skip


def surface_segments(surfaces: list[Surface]) -> np.ndarray:
    """[N, 2, 3] world segments, metres, of the outlines of walls, doors, windows and floors."""
    parts = []
    for surface in surfaces:
        if surface.polygon is None:
            parts.append(box_corners(surface.box)[BOX_EDGES])
        else:
            parts.append(np.stack([surface.polygon, np.roll(surface.polygon, -1, axis=0)], axis=1))
    return np.concatenate(parts)


def _shown_points(scene: Scene, surface: Surfels | None, boxes: Boxes, views: list[View]) -> np.ndarray:
    """[N, 3] metres: corners, cameras and surface that must lie within the figure."""
    points = [box_corners(box) for box in boxes if box is not None]
    if surface is not None:
        points.append(np.percentile(surface.points, [0.5, 99.5], axis=0))
    if scene.surfaces:
        points.append(surface_segments(scene.surfaces).reshape(-1, 3))
    points += [view.camera_to_world[None, :3, 3] for view in views]
    if not points:
        raise ValueError(
            f"scene {scene.scene_id}: nothing to draw in space: it has no box, no surface, no depth, no mesh and no "
            "camera with a pose; views_figure shows its pictures"
        )
    return np.concatenate(points)


def _floor_traces(points: np.ndarray) -> list[go.Scatter3d]:
    """A grid of metres under points [N, 3] and arrows of a metre along the world's axes in its corner."""
    import plotly.graph_objects as go

    lower, upper = np.floor(points.min(axis=0) / GRID) * GRID, np.ceil(points.max(axis=0) / GRID) * GRID
    floor = points[:, 2].min()
    lower, upper = lower[:2], upper[:2]
    segments = []
    for axis in (0, 1):
        for at in np.arange(lower[axis], upper[axis] + GRID / 2, GRID):
            ends = np.array([[at, lower[1 - axis]], [at, upper[1 - axis]]])
            segments.append(np.column_stack([ends if axis == 0 else ends[:, ::-1], [floor, floor]]))
    origin = np.array([*lower, floor])
    axes = np.stack([np.tile(origin, (3, 1)), origin + np.eye(3)], axis=1)
    tips = (axes[:, 1] + 0.12 * np.eye(3)).astype(np.float32)
    names = go.Scatter3d(
        x=tips[:, 0], y=tips[:, 1], z=tips[:, 2], mode="text", text=["x", "y", "z"], name="axis names",
        legendgroup="floor grid", showlegend=False, hoverinfo="skip", textfont={"color": "#444444", "size": 13},
    )  # fmt: skip
    arrows = line_trace(axes, "#444444", "axes, 1 m", 4).update(legendgroup="floor grid", showlegend=False)
    return [line_trace(np.array(segments), "#CCCCCC", "floor grid", 1), arrows, names]


def _camera_traces(views: list[View], max_pictures: int) -> list[go.Scatter3d | go.Mesh3d]:
    import plotly.graph_objects as go

    segments = np.concatenate([frustum(view, PICTURE_DEPTH) for view in views])
    centers = np.array([view.camera_to_world[:3, 3] for view in views], dtype=np.float32)
    traces = [line_trace(segments, CAMERA_COLOR, "cameras", 2)]
    num = min(max_pictures, len(views))
    if num:
        traces.append(_pictures_trace([views[i] for i in np.linspace(0, len(views) - 1, num).astype(int)]))
    traces.append(
        go.Scatter3d(
            x=centers[:, 0], y=centers[:, 1], z=centers[:, 2], mode="markers", name="camera centres",
            marker={"size": 3, "color": CAMERA_COLOR},
            text=[f"view {i} of {len(views)}: {html.escape(view.view_id)}" for i, view in enumerate(views, 1)],
            hovertemplate="%{text}<br>%{x:.2f}, %{y:.2f}, %{z:.2f} m<extra></extra>",
        )
    )  # fmt: skip
    return traces


def _pictures_trace(views: list[View]) -> go.Mesh3d:
    """The views' pictures, small, in the image plane of their cameras: plotly has no textures, so a cell a pixel."""
    import plotly.graph_objects as go

    vertices, triangles, colors, start = [], [], [], 0
    for view in views:
        scale = THUMBNAIL / max(view.width, view.height)
        columns, rows = (max(1, round(side * scale)) for side in (view.width, view.height))
        picture = Image.fromarray(view.load_rgb()).resize((columns, rows), Image.Resampling.BOX)
        v, u = np.mgrid[: rows + 1, : columns + 1].astype(float)
        pixels = np.stack([u / columns * view.width - 0.5, v / rows * view.height - 0.5], -1).reshape(-1, 2)
        rays = np.column_stack([(pixels - view.K[:2, 2]) / view.K[[0, 1], [0, 1]], np.ones(len(pixels))])
        vertices.append(rays * PICTURE_DEPTH @ view.camera_to_world[:3, :3].T + view.camera_to_world[:3, 3])
        corner = start + (np.arange(rows)[:, None] * (columns + 1) + np.arange(columns)).ravel()
        below = corner + columns + 1
        triangles.append(np.stack([corner, corner + 1, below + 1, corner, below + 1, below], -1).reshape(-1, 3))
        colors.append(np.repeat(np.asarray(picture).reshape(-1, 3), 2, axis=0))
        start += len(pixels)
    index, scale, num_colors = _palette(np.concatenate(colors))
    x, y, z = np.concatenate(vertices).T.astype(np.float32)
    i, j, k = np.concatenate(triangles).T.astype(np.int32)
    return go.Mesh3d(
        x=x, y=y, z=z, i=i, j=j, k=k, intensity=index, intensitymode="cell", colorscale=scale, cmin=0, cmax=num_colors,
        showscale=False, flatshading=True, lighting={"ambient": 1, "diffuse": 0, "specular": 0, "fresnel": 0},
        hoverinfo="skip", name="pictures", showlegend=True,
    )  # fmt: skip


def cloud_trace(points: np.ndarray, colors: np.ndarray) -> go.Scatter3d:
    """The trace "surface" of points [N, 3], metres, in their colours uint8 [N, 3]."""
    import plotly.graph_objects as go

    index, scale, num_colors = _palette(colors)
    x, y, z = points.astype(np.float32).T
    return go.Scatter3d(
        x=x, y=y, z=z, mode="markers", name="surface", hoverinfo="skip",
        marker={
            "size": 2, "symbol": "square", "color": index, "colorscale": scale, "cmin": 0, "cmax": num_colors,
            "showscale": False,
        },
    )  # fmt: skip


def _palette(colors: np.ndarray) -> tuple[np.ndarray, list, int]:
    """Colours uint8 [N, 3] as (numbers float32 [N], stepped colour scale, its upper end): strings, one a point, take
    plotly a hundred times as long."""
    picture = Image.fromarray(colors[None]).quantize(PALETTE_SIZE, method=Image.Quantize.MEDIANCUT)
    index = np.asarray(picture)[0].astype(np.float32)
    palette = np.array(picture.getpalette()).reshape(-1, 3)[: int(index.max()) + 1]
    scale = []
    for k, color in enumerate(palette):
        text = f"rgb({color[0]},{color[1]},{color[2]})"
        scale += [[k / len(palette), text], [(k + 1) / len(palette), text]]
    return index + 0.5, scale, len(palette)


def _outside(surface: Surfels | None, true: Boxes) -> Direction:
    """Where one who looks at the scene stands."""
    elevation = np.radians(48)
    if surface is None:
        return Direction(np.radians(-60), elevation)
    return best_direction(surface, [box for box in true if box is not None], elevation)


def scene_still(
    scene: Scene, surface: Surfels | None, views: list[View], true: Boxes, predicted: Boxes, title: str
) -> PrintFigure:
    """The scene from outside and from above."""
    pairs = [(a, b) for a, b in zip(true, predicted, strict=False) if a is not None and b is not None]
    true, predicted = ([box for box in boxes if box is not None] for boxes in (true, predicted))
    figure = PrintFigure(4.0, few_colors=True)
    figure.suptitle(title, fontsize=FONT_SIZE + 0.5, y=0.985, va="top", parse_math=False)
    grid = figure.add_gridspec(1, 2, width_ratios=(1.25, 1), left=0.01, right=0.99, top=0.9, bottom=0.09, wspace=0.12)
    outside = _outside(surface, true)
    shown = _shown_points(scene, None, [*true, *predicted], views) if surface is None or views else None
    for place, direction in zip(grid, (outside, TOP), strict=True):
        ax = figure.add_subplot(place)
        corners = [] if surface is None else [draw_surfels(ax, surface, direction, cut_height=None)]
        corners += [] if shown is None else [direction.flat(shown)]
        corners = np.concatenate(corners)
        set_limits(ax, np.stack([corners.min(axis=0), corners.max(axis=0)]), direction, [*true, *predicted])
        if scene.surfaces:
            draw_segments(ax, direction, surface_segments(scene.surfaces), ROOM_COLOR)
        draw_boxes(ax, direction, true, predicted, labels=False)
        draw_connectors(ax, direction, pairs)
        draw_cameras(ax, direction, views)
        tops = [(*direction.flat(box.center + [0, 0, box.extent[2] / 2]), box.label) for box in true or predicted]
        place_labels(ax, tops)
        if direction is TOP:
            map_axes(ax)
        else:
            scale_bar(ax)
    return figure
