"""Clouds too large for plotly, with k3d: a widget in JupyterLab, one HTML file for everybody else."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from roomplan_lib.files import write_whole
from roomplan_lib.geometry import BOX_EDGES, OrientedBox, box_corners
from roomplan_lib.scenes import Scene, View
from roomplan_lib.viz.clouds import Surfels, find_views, scene_surface, thin_surfels
from roomplan_lib.viz.frontend import live_frontend
from roomplan_lib.viz.interactive import scene_still, surface_segments
from roomplan_lib.viz.oblique import CUT_HEIGHT, best_direction, frustum, short_label
from roomplan_lib.viz.style import CAMERA_COLOR, PREDICTED_COLOR, ROOM_COLOR, TRUE_COLOR, PrintFigure

if TYPE_CHECKING:
    import k3d

TURNING_POINTS = 60_000  # drawn while the view turns; all of them again when it rests
VIEW_DISTANCE = 0.95  # of a viewer from the middle, in diagonals of the scene
REST_MS = 250  # milliseconds without a move after which it rests
# The points are in random order, so the first so many are an even sample: nothing is sent twice.
LEVEL_OF_DETAIL = """
const clouds = [];
K3DInstance.getWorld().K3DObjects.traverse((object) => {
  if (object.isPoints) clouds.push(object);
});
const sizes = clouds.map((cloud) => cloud.material.uniforms.size.value);
let timer = null;
function draw(limit) {
  clouds.forEach((cloud, i) => {
    const count = cloud.geometry.attributes.position.count;
    cloud.geometry.setDrawRange(0, limit);
    cloud.material.uniforms.size.value = sizes[i] * Math.sqrt(Math.max(1, count / limit));  // covers as much
  });
  K3DInstance.render();
}
let held = false;  // a slow machine may need longer for a frame than a view rests
addEventListener("pointerdown", () => { held = true; }, true);
addEventListener("pointerup", () => { held = false; }, true);
function rest() {
  timer = held ? setTimeout(rest, %d) : null;
  if (timer === null) draw(Infinity);
}
function turning() {
  if (timer === null) draw(%d);
  clearTimeout(timer);
  timer = setTimeout(rest, %d);
}
K3DInstance.on(K3DInstance.events.CAMERA_CHANGE, turning);
turning();
window.fullCloud = {clouds, isTurning: () => timer !== null};
"""


@dataclass(frozen=True, eq=False)
class FullCloud:
    """Points float32 [N, 3] metres, colors uint8 [N, 3], in random order, with boxes and lines around them.

    lines: (segments [M, 2, 3] metres, colour "#rrggbb", name). names: (point [3] metres, text, colour). Shown by a
    live JupyterLab as a k3d widget and elsewhere as `still()`: a widget's state would be stored in the notebook.
    """

    points: np.ndarray
    colors: np.ndarray
    lines: list[tuple[np.ndarray, str, str]]
    names: list[tuple[np.ndarray, str, str]]
    point_size: float  # metres
    camera: list[float]  # where the viewer stands [3], what is in the middle [3], up [3]
    title: str
    still: Callable[[], PrintFigure] = field(repr=False)

    def plot(self) -> k3d.Plot:
        """The widget. Raises ValueError without k3d."""
        try:
            import k3d
        except ImportError:
            raise ValueError("full clouds need the package k3d: pip install 'roomplan_lib[notebooks]'") from None
        plot = k3d.plot(
            height=640, background_color=0xFFFFFF, grid_visible=True, axes=[r"x\,(m)", r"y\,(m)", r"z\,(m)"],
            camera_auto_fit=False, name=self.title,
        )  # fmt: skip
        plot.camera = self.camera
        r, g, b = self.colors.astype(np.uint32).T
        plot += k3d.points(
            self.points, colors=(r << 16) + (g << 8) + b, point_size=self.point_size, shader="flat",
            name=f"{len(self.points):,} points",
        )  # fmt: skip
        for segments, color, name in self.lines:
            vertices = segments.reshape(-1, 3).astype(np.float32)
            indices = np.arange(len(vertices), dtype=np.uint32).reshape(-1, 2)
            plot += k3d.lines(
                vertices, indices, indices_type="segment", color=_number(color), width=0.02, shader="simple", name=name
            )
        for point, text, color in self.names:
            plot += k3d.text(
                html.escape(text), position=point.tolist(), color=_number(color), size=0.9, is_html=True,
                label_box=False, reference_point="cb", name=text,
            )  # fmt: skip
        return plot

    def save(self, path: Path | str) -> Path:
        """One HTML file that turns by itself and asks no server. While it turns, TURNING_POINTS are drawn."""
        code = LEVEL_OF_DETAIL % (REST_MS, TURNING_POINTS, REST_MS)
        with _unseen_widgets():
            write_whole(path, self.plot().get_snapshot(compression_level=6, additional_js_code=code))
        return Path(path)

    def _repr_mimebundle_(self, include=None, exclude=None, **kwargs) -> dict:
        if live_frontend():
            return self.plot()._repr_mimebundle_(include=include, exclude=exclude, **kwargs)
        return {"image/png": self.still()._repr_png_(), "text/plain": self.title}


def full_cloud(
    scene: Scene,
    true: Sequence[OrientedBox] | None = None,
    predicted: Sequence[OrientedBox] = (),
    views: list[View] | None = None,
    *,
    surface: Surfels | None = None,
    max_points: int = 500_000,
    cut_height: float | None = CUT_HEIGHT,
) -> FullCloud:
    """A scene's whole surface with cameras and boxes, in its world frame.

    true: blue boxes, the scene's own for None; predicted: orange. views: cameras and the source of the surface, all
    for None. surface: in place of that of the scene's depth or mesh. max_points: more are thinned, a mean point a
    voxel. cut_height: metres above the floor beyond which the surface is left out, None keeps all.
    Raises ValueError for a scene without depth, mesh and `surface`.
    """
    true = list(scene.boxes) if true is None else list(true)
    predicted = list(predicted)
    views = find_views(scene) if views is None else list(views)
    posed = [view for view in views if view.posed]
    source = "points given"
    if surface is None:
        surface, source = scene_surface(scene, views)
    if surface is None:
        raise ValueError(
            f"scene {scene.scene_id}: no view has depth and there is no mesh, so there is no cloud to show"
        )
    if cut_height is not None:
        surface = surface[surface.points[:, 2] < surface.floor + cut_height]
    if len(surface) > max_points:
        surface = thin_surfels(surface, max_points)
    order = np.random.default_rng(0).permutation(len(surface))
    shuffled = surface[order]
    lines = [
        (np.concatenate([box_corners(box)[BOX_EDGES] for box in boxes]), color, name)
        for boxes, color, name in ((true, TRUE_COLOR, "true"), (predicted, PREDICTED_COLOR, "predicted"))
        if boxes
    ]
    if posed:
        lines.append((np.concatenate([frustum(view) for view in posed]), CAMERA_COLOR, "cameras"))
    if scene.surfaces:
        lines.append((surface_segments(scene.surfaces), ROOM_COLOR, "room"))
    names = [
        (box.center + [0, 0, box.extent[2] / 2 + 0.05], short_label(box.label), color)
        for boxes, color in ((true, TRUE_COLOR), (predicted if not true else [], PREDICTED_COLOR))
        for box in boxes
        if box.label
    ]
    title = (
        f"Scene {scene.scene_id}: {len(surface):,} points ({source}), {len(true)} true and {len(predicted)} predicted "
        f"boxes, {len(posed)} cameras; metres"
    )
    lower, upper = np.percentile(surface.points, [0.5, 99.5], axis=0)
    middle = (lower + upper) / 2
    eye = middle + VIEW_DISTANCE * np.linalg.norm(upper - lower) * best_direction(surface, true).towards
    return FullCloud(
        shuffled.points, shuffled.colors, lines, names, float(np.median(shuffled.spacing)), [*eye, *middle, 0, 0, 1],
        title,
        still=lambda: scene_still(scene, surface, posed, true, predicted, title),
    )  # fmt: skip


@contextmanager
def _unseen_widgets() -> Iterator[None]:
    """Widgets made within tell no frontend of themselves, which would store their state in the executed notebook."""
    import comm

    create = comm.create_comm  # meant to be replaced: the kernel has done so
    comm.create_comm = comm.DummyComm
    try:
        yield
    finally:
        comm.create_comm = create


def _number(color: str) -> int:
    return int(color.removeprefix("#"), 16)
