import base64
import io
import json
import sys
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from PIL import Image

from roomplan_lib import viz
from roomplan_lib.actions import action_record, anchor_from_box
from roomplan_lib.geometry import OrientedBox, look_at, rotation_z
from roomplan_lib.scenes.arkitscenes import read_scene
from roomplan_lib.viz.anchors import anchor_pairs, best_views
from roomplan_lib.viz.clouds import Surfels, find_views, scene_surfels, thin_surfels
from roomplan_lib.viz.oblique import PIXELS_PER_METRE, TOP, Direction, draw_surfels, place_labels
from roomplan_lib.viz.style import DPI, PrintFigure

sys.path.insert(0, str(Path(__file__).parent))
import scene_files

BOXES = [
    scene_files.box("bed", 1.5, 1.2, 0.4, (2.0, 1.5, 0.6)),
    scene_files.box("table", -1.2, -1.0, -0.3, (1.2, 0.8, 0.75)),
    scene_files.box("shelf", -2.2, 1.5, 0.0, (0.6, 1.0, 1.6)),
]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return read_scene(scene_files.write_scene(tmp_path_factory.mktemp("scene"), BOXES))


def anchor_row(box, predicted, index=0, scene_id="42444499", view_ids=None):
    """A row as it comes back from predictions.jsonl."""
    action = action_record(anchor_from_box(predicted, scene_id)) if predicted is not None else None
    row = {
        "index": index, "scene_id": scene_id, "task": "place_anchor", "question": "?", "prediction": "",
        "reference": "", "action": action, "reference_action": action_record(anchor_from_box(box, scene_id)),
        "view_ids": view_ids,
    }  # fmt: skip
    return json.loads(json.dumps(row))


def moved(box, dx, dy=0.0):
    return replace(box, center=box.center + [dx, dy, 0])


def corners_by_hand(box):
    """The corners as centre plus or minus half of each side, one by one."""
    axes = [box.rotation[:, i] * box.extent[i] / 2 for i in range(3)]
    return np.array([box.center + a * axes[0] + b * axes[1] + c * axes[2] for a, b, c in product((-1, 1), repeat=3)])


def pixels_by_hand(points, view):
    """Homogeneous projection K [I 0] inv(camera_to_world)."""
    homogeneous = np.column_stack([points, np.ones(len(points))]) @ np.linalg.inv(view.camera_to_world).T
    image = homogeneous[:, :3] @ view.K.T
    return image[:, :2] / image[:, 2:], homogeneous[:, 2]


def picture(figure):
    """uint8 [H, W, 3] of what the figure looks like."""
    figure.canvas.draw()
    figure.savefig(buffer := io.BytesIO(), format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def share_of(image, color, tolerance=12):
    return (np.abs(image.astype(int) - np.array(to_rgb(color)) * 255).max(axis=-1) <= tolerance).mean()


def test_colours_are_the_convention():
    blue, orange = np.array(to_rgb(viz.TRUE_COLOR)), np.array(to_rgb(viz.PREDICTED_COLOR))
    assert blue.argmax() == 2 and orange.argmax() == 0 and orange[0] > orange[1] > orange[2]
    # Seen without red-green distinction, blue minus yellow still tells them apart.
    assert (blue[2] - blue[:2].mean()) - (orange[2] - orange[:2].mean()) > 0.5


# Clouds ---------------------------------------------------------------------------------------------------------------


def distance_to_room(points):
    """Metres from the nearest surface of the room's inside or of the boxes' outside."""
    distances = [np.abs(scene_files.ROOM.extent / 2 - np.abs(points - scene_files.ROOM.center)).min(axis=1)]
    for box in BOXES:
        outside = np.abs((points - box.center) @ box.rotation) - box.extent / 2
        distances.append(np.abs(np.linalg.norm(np.maximum(outside, 0), axis=1) + np.minimum(outside.max(axis=1), 0)))
    return np.min(distances, axis=0)


def test_cloud_lies_on_the_surfaces(scene):
    points, colors = viz.scene_cloud(scene, 100_000)
    assert points.dtype == np.float32 and colors.dtype == np.uint8 and len(points) == len(colors) > 5000
    assert distance_to_room(points).max() < 0.01  # depth is stored in millimetres, a voxel has 1 cm


def test_cloud_is_thinned_and_repeatable(scene):
    first, second = viz.scene_cloud(scene, 2000), viz.scene_cloud(scene, 2000)
    assert 1000 < len(first[0]) <= 2000
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    full = viz.scene_cloud(scene, 100_000)[0]
    spread = [np.linalg.norm(full - point, axis=1).min() for point in first[0][::50]]
    assert max(spread) < 0.15


def test_cloud_colours_are_the_pixels(scene):
    view = scene.views[0]
    points, colors = viz.scene_cloud(scene, 100_000, [view.view_id])
    _, depth = pixels_by_hand(points, view)  # the fixture paints depth as grey
    assert np.abs(colors[:, 0] - depth / 6 * 255).max() < 4


def test_surfel_normals_point_into_the_room(scene):
    surfels = scene_surfels(scene)
    floor = np.abs(surfels.points[:, 2]) < 0.005
    assert floor.sum() > 100 and (surfels.normals[floor, 2] > 0.98).mean() > 0.95  # not at the foot of walls
    wall = (surfels.points[:, 0] > 2.995) & (surfels.points[:, 2] > 0.2)
    assert wall.sum() > 100 and (surfels.normals[wall, 0] < -0.98).mean() > 0.95  # into the room


def test_unknown_views_and_missing_depth_are_named(scene, tmp_path):
    with pytest.raises(ValueError, match="no view 'nine'"):
        find_views(scene, ["nine"])
    bare = read_scene(scene_files.write_scene(tmp_path, BOXES, depth=False))
    with pytest.raises(ValueError, match="has no depth"):
        viz.scene_cloud(bare)


# Plotly ---------------------------------------------------------------------------------------------------------------


def traces_of(figure):
    """Traces by name from the figure's JSON; plotly stores arrays as base64."""

    def plain(value):
        if isinstance(value, dict) and "bdata" in value:
            return np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"]).astype(float)
        return np.array([np.nan if v is None else v for v in value], dtype=float)

    data = json.loads(figure.to_json())
    return {t["name"]: (np.stack([plain(t[a]) for a in "xyz"], axis=1), t) for t in data["data"]}, data["layout"]


def test_scene_figure_holds_boxes_and_cameras_where_the_scene_has_them(scene):
    pytest.importorskip("plotly")
    predicted = [moved(box, 0.3) for box in scene.boxes]
    traces, layout = traces_of(viz.scene_figure(scene, predicted=predicted, max_points=3000))
    for name, boxes, color in (("true", scene.boxes, viz.TRUE_COLOR), ("predicted", predicted, viz.PREDICTED_COLOR)):
        xyz, trace = traces[name]
        edges = xyz.reshape(len(boxes), 12, 3, 3)
        assert trace["line"]["color"] == color and np.isnan(edges[:, :, 2]).all()
        for box, of_box in zip(boxes, edges, strict=True):
            drawn = np.unique(of_box[:, :2].reshape(-1, 3).round(6), axis=0)
            assert np.allclose(drawn, np.unique(corners_by_hand(box).round(6), axis=0), atol=2e-6)
            lengths = np.linalg.norm(of_box[:, 1] - of_box[:, 0], axis=1)  # four edges along each side
            assert np.allclose(np.sort(lengths), np.sort(np.repeat(box.extent, 4)), atol=1e-6)
    centers = np.array([view.camera_to_world[:3, 3] for view in scene.views])
    assert np.allclose(traces["camera centres"][0], centers, atol=1e-6)
    rims = traces["cameras"][0].reshape(len(scene.views), 8, 3, 3)[:, :4, 1]
    for view, rim in zip(scene.views, rims, strict=True):
        pixels, depth = pixels_by_hand(rim, view)
        w, h = view.width - 0.5, view.height - 0.5
        assert np.allclose(pixels, [[-0.5, -0.5], [w, -0.5], [w, h], [-0.5, h]], atol=1e-3) and (depth > 0).all()
    joins = traces["centre to centre"][0].reshape(-1, 3, 3)[:, :2]
    assert np.allclose(joins[:, 1] - joins[:, 0], [0.3, 0, 0], atol=1e-6)
    assert layout["scene"]["aspectmode"] == "data"
    assert [layout["scene"][f"{a}axis"]["title"]["text"] for a in "xyz"] == ["x (m)", "y (m)", "z (m)"]
    assert "3 true and 3 predicted boxes" in layout["title"]["text"]


def test_scene_figure_cloud_keeps_colours_and_is_cut_below_the_ceiling(scene):
    pytest.importorskip("plotly")
    traces, _ = traces_of(viz.scene_figure(scene, max_points=3000, cut_height=1.2))
    xyz, trace = traces["surface"]
    marker = trace["marker"]
    assert marker["symbol"] == "square" and xyz[:, 2].max() < 1.3 < viz.scene_cloud(scene)[0][:, 2].max()
    index = np.frombuffer(base64.b64decode(marker["color"]["bdata"]), dtype=marker["color"]["dtype"])
    stops = np.array([s for s, _ in marker["colorscale"]])
    shown = [marker["colorscale"][i][1] for i in np.searchsorted(stops, index / marker["cmax"]) - 1]
    shown = np.array([[int(n) for n in color[4:-1].split(",")] for color in shown])
    surfels = scene_surfels(scene)
    kept = thin_surfels(surfels[surfels.points[:, 2] < np.percentile(surfels.points[:, 2], 1) + 1.2], 3000)
    assert np.allclose(kept.points, xyz) and np.abs(shown - kept.colors).max() <= 4


# Boxes on a picture ---------------------------------------------------------------------------------------------------


def drawn_lines(ax, color):
    """[M, 2, 2] pixels of everything drawn in a colour."""
    collections = [c for c in ax.collections if isinstance(c, LineCollection)]
    parts = [c.get_segments() for c in collections if np.allclose(c.get_colors()[0][:3], to_rgb(color))]
    return np.array([segment for part in parts for segment in part]), collections


def on_edges(points, box, view):
    """Largest distance in pixels of drawn points from the box's edges, projected by hand at 2000 places each."""
    corners = corners_by_hand(box)
    pairs = [(a, b) for a, b in product(range(8), repeat=2) if a < b and bin(a ^ b).count("1") == 1]
    share = np.linspace(0, 1, 2000)[:, None]
    places = np.concatenate([corners[a] + share * (corners[b] - corners[a]) for a, b in pairs])
    pixels, depth = pixels_by_hand(places, view)
    pixels = pixels[depth > 0.04]
    return max(np.linalg.norm(pixels - point, axis=1).min() for point in points)


def test_boxes_on_a_view_are_where_they_project(scene):
    view, box = scene.views[0], scene.boxes[1]
    predicted = moved(box, 0.2, -0.1)
    ax = PrintFigure(3).add_subplot()
    viz.draw_boxes_on_view(ax, view, [box], [predicted])
    for expected, color in ((box, viz.TRUE_COLOR), (predicted, viz.PREDICTED_COLOR)):
        lines, _ = drawn_lines(ax, color)
        assert on_edges(lines.reshape(-1, 2), expected, view) < 0.2
        assert on_edges(lines.reshape(-1, 2), moved(expected, 0.2), view) > 2
    dashed, _ = drawn_lines(ax, viz.PREDICTED_COLOR)
    whole = PrintFigure(3).add_subplot()
    viz.draw_boxes_on_view(whole, view, [predicted])
    assert len(dashed) == pytest.approx(len(drawn_lines(whole, viz.TRUE_COLOR)[0]) * 3 / 4, abs=6)  # cut at the border
    assert [t.get_text() for t in ax.texts] == ["table"]
    assert ax.get_xlim() == (-0.5, view.width - 0.5) and ax.get_ylim() == (view.height - 0.5, -0.5)


def test_a_box_around_the_camera_stays_in_front_of_it(scene):
    view = scene.views[0]
    box = OrientedBox(view.camera_to_world[:3, 3], [1.5, 1.0, 0.8], rotation_z(0.3), "bed")
    ax = PrintFigure(3).add_subplot()
    viz.draw_boxes_on_view(ax, view, [box])
    lines, collections = drawn_lines(ax, viz.TRUE_COLOR)
    assert np.isfinite(lines).all() and len(lines) and all(c.get_clip_on() for c in collections)
    inside = ((lines >= 0) & (lines <= [view.width, view.height])).all(axis=(1, 2))
    assert on_edges(lines[inside].reshape(-1, 2), box, view) < 0.5


def test_near_lines_are_thicker_and_hidden_ones_pale(scene):
    # The camera looks along +x at two boxes, the farther one wholly behind the nearer.
    near, far = (
        scene_files.box("bed", 1.0, 0, size=(0.4, 1.4, 1.4)),
        scene_files.box("table", 2.2, 0, size=(0.4, 0.6, 0.6)),
    )
    view = scene.views[0]
    pose = look_at(np.array([-0.9, 0, 0.7]), np.array([1.0, 0, 0.7]))
    depth = scene_files.ray_depth([near, far], pose, view.K, (view.width, view.height))
    path = view.depth_path.with_name("occluder.tiff")
    Image.fromarray(np.round(depth * 1000).astype(np.uint16)).save(path)
    view = replace(view, camera_to_world=pose, depth_path=path)
    ax = PrintFigure(3).add_subplot()
    viz.draw_boxes_on_view(ax, view, [near, far])
    path.unlink()
    blue = [c for c in ax.collections if np.allclose(c.get_colors()[0][:3], to_rgb(viz.TRUE_COLOR))]
    alphas = {alpha: sum(len(c.get_segments()) for c in blue if c.get_alpha() == alpha) for alpha in (0.45, 1.0)}
    assert alphas[0.45] >= 12 * 24 > 0 and alphas[1.0] > 0  # all of the far box and the back of the near one
    assert [t.get_text() for t in ax.texts] == ["bed"]
    front = max(blue, key=lambda c: c.get_alpha())
    back = min(blue, key=lambda c: c.get_alpha())
    assert max(front.get_linewidths()) > min(back.get_linewidths())


def test_labels_do_not_cover_each_other():
    figure = PrintFigure(3, 4)
    ax = figure.add_axes([0.1, 0.1, 0.8, 0.8])
    ax.set_xlim(0, 4)
    ax.set_ylim(0, 3)
    place_labels(ax, [(2.0, 1.5 + 0.01 * i, name) for i, name in enumerate(["bed", "table", "refrigerator", "sofa"])])
    figure.canvas.draw()
    extents = [text.get_window_extent().padded(-1) for text in ax.texts]
    assert len(extents) == 4 and not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i])
    place_labels(ax, [(*place, "refrigerator " * 40) for place in np.random.default_rng(0).uniform(0, 3, (300, 2))])
    figure.canvas.draw()
    extents = [text.get_window_extent().padded(-1) for text in ax.texts[4:]]
    assert 0 < len(extents) < 100  # there is no room for the others
    assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i])


# From outside ---------------------------------------------------------------------------------------------------------


def test_directions_are_right_handed_and_true_to_scale():
    for direction in (TOP, Direction(0.7, 0.9), Direction(-2.0, 0.3)):
        frame = np.stack([direction.right, direction.up, direction.towards])
        assert np.allclose(frame @ frame.T, np.eye(3), atol=1e-12) and np.isclose(np.linalg.det(frame), 1)
        assert direction.up[2] >= -1e-12  # upright
    points = np.random.default_rng(0).normal(size=(5, 3))
    assert np.allclose(TOP.flat(points), points[:, :2])


def test_from_above_the_nearest_surface_that_faces_up_is_seen():
    x, y = np.meshgrid(np.arange(0, 2, 0.005), np.arange(0, 1, 0.005))

    def layer(height, color, normal, inside):
        points = np.stack([x, y, np.full_like(x, height)], -1)[inside].astype(np.float32)
        normals = np.tile(np.float32([0, 0, normal]), (len(points), 1))
        return points, np.tile(np.uint8(color), (len(points), 1)), normals, np.full(len(points), 0.005, np.float32)

    everywhere = x >= 0
    layers = [
        layer(0.7, (0, 200, 0), 1, x > 1),  # a table over the right half
        layer(0.0, (200, 0, 0), 1, everywhere),
        layer(1.8, (0, 0, 200), -1, everywhere),  # seen from below only
        layer(2.6, (9, 9, 9), 1, everywhere),  # higher than the cut
    ]
    ax = PrintFigure(3).add_subplot()
    lower, upper = draw_surfels(ax, Surfels(*(np.concatenate(part) for part in zip(*layers, strict=True))), TOP)
    canvas = np.asarray(ax.images[0].get_array())
    for at, channel in (((0.5, 0.5), 0), ((1.5, 0.5), 1), ((0.9, 0.1), 0), ((1.1, 0.9), 1)):
        column, row = ((np.array(at) - lower) * PIXELS_PER_METRE).astype(int)
        assert canvas[row, column, 3] == 255 and canvas[row, column, :3].argmax() == channel, at
    assert np.allclose(lower, [-0.05, -0.05], atol=1e-6) and np.allclose(upper, [2.045, 1.045], atol=1e-3)
    extent = ax.images[0].get_extent()
    assert np.isclose((extent[1] - extent[0]) * PIXELS_PER_METRE, canvas.shape[1])


# Anchors --------------------------------------------------------------------------------------------------------------


def test_anchor_pairs_measure_error_and_overlap(scene):
    bed, table, shelf = scene.boxes
    along = bed.rotation[:, 0] * 0.5  # of 2 m: overlap 1.5 / 2.5
    rows = [
        anchor_row(bed, replace(bed, center=bed.center + along)),
        anchor_row(table, moved(table, 0.3, 0.4)),
        anchor_row(bed, None),
        anchor_row(shelf, shelf, scene_id="other"),
        {"scene_id": "42444499", "question": "?", "prediction": "two"},
    ]
    pairs = anchor_pairs(scene, rows)
    assert [p.number for p in pairs] == [1, 2, 1]
    assert pairs[0].center_error_m == pytest.approx(0.5) and pairs[0].iou_3d == pytest.approx(1.5 / 2.5)
    assert pairs[1].center_error_m == pytest.approx(0.5)
    assert pairs[2].center_error_m is None and pairs[2].iou_3d == 0
    with pytest.raises(ValueError, match="none of the 1 predictions"):
        anchor_pairs(scene, [rows[3]])


def test_best_views_show_the_boxes(scene):
    """The chosen view is the one in which most pixels' rays meet the box first."""
    for box in scene.boxes:
        counts = []
        for view in scene.views:
            size = (view.width, view.height)
            others = [b for b in BOXES if not np.allclose(b.center, box.center)]
            with_box = scene_files.ray_depth(BOXES, view.camera_to_world, view.K, size)
            counts.append((with_box < scene_files.ray_depth(others, view.camera_to_world, view.K, size) - 1e-3).sum())
        chosen = best_views(scene, scene.views, [box], 1)[0]
        assert counts[scene.views.index(chosen)] >= 0.8 * max(counts)


def texts_of(figure):
    return "\n".join(t.get_text() for t in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_anchors_figure_shows_pairs_and_lists_invalid_ones(scene, tmp_path):
    bed, table, shelf = scene.boxes
    ids = [view.view_id for view in scene.views[:4]]
    rows = [
        anchor_row(bed, moved(bed, 0.3, 0.4), 0, view_ids=ids),
        anchor_row(table, None, 1, view_ids=ids),
        anchor_row(shelf, moved(shelf, 30.0), 2, view_ids=ids),  # far outside: the room must stay readable
    ]
    figure = viz.save_anchors_figure([scene, scene], rows, tmp_path / "figures" / "anchors.png")
    text = texts_of(figure)
    assert "6 anchors in 2 rooms" in text and "2 invalid" in text and "15.25 m" in text  # median of 0.5, 30, 0.5, 30
    assert "0.50" in text and "30.00" in text and "table            invalid" in text and "x (m)" in text
    image = np.asarray(Image.open(tmp_path / "figures" / "anchors.png").convert("RGB"))
    assert image.shape[1] == 9 * DPI
    assert image.std() > 20 and min(share_of(image, c) for c in (viz.TRUE_COLOR, viz.PREDICTED_COLOR)) > 1e-3
    room = figure.axes[0]
    assert np.ptp(room.get_xlim()) < 10
    short = texts_of(viz.anchors_figure(scene, rows, max_anchors=2))
    assert "2 anchors in 1 room" in short and "first 2 of 3 anchors" in short


def test_a_room_without_any_valid_prediction_still_has_a_figure(scene):
    figure = viz.anchors_figure(scene, [anchor_row(scene.boxes[0], None)])
    assert "median" not in texts_of(figure) and share_of(picture(figure), viz.TRUE_COLOR) > 1e-3


def test_room_and_views_figures(scene):
    figure = viz.room_figure(scene, scene.views[:5])
    text = texts_of(figure)
    assert "3 boxes, 5 of 8 views" in text and "view 1 (reference)" in text and "y (m)" in text
    assert sum(bool(ax.images) for ax in figure.axes) == 7
    image = picture(figure)
    assert image.std() > 20 and share_of(image, viz.TRUE_COLOR) > 1e-3
    figure = viz.views_figure([scene.views[0], scene.views[1].rgb_path, str(scene.views[2].rgb_path)])
    shown = [np.asarray(ax.images[0].get_array()) for ax in figure.axes]
    assert all(np.array_equal(a, v.load_rgb()) for a, v in zip(shown, scene.views[:3], strict=True))
    with pytest.raises(ValueError, match="no picture"):
        viz.views_figure([])


# Curves ---------------------------------------------------------------------------------------------------------------


def log(step, loss):
    return {
        "step": step, "elapsed_s": step / 2, "loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3,
        "samples_per_s": 20.0 + step, "tokens_per_s": 1000.0,
    }  # fmt: skip


def test_curves_hold_the_logged_numbers():
    entries = [log(10, 5.0), log(20, 4.0), {"step": 20, "elapsed_s": 9, "eval_loss": 4.5}, log(30, 9.0), log(30, 3.0)]
    figure = viz.curve_figure({"tiny": entries, "empty": []})
    lines = [line.get_xydata().tolist() for ax in figure.axes for line in ax.lines if len(line.get_xdata())]
    assert [[10, 5], [20, 4], [30, 3]] in lines and [[20, 4.5]] in lines and [[10, 30], [20, 40], [30, 50]] in lines
    assert "tiny: 30 steps, 3 training and 1 held-out logs" in texts_of(figure)
    assert [ax.get_xlabel() for ax in figure.axes] == ["optimizer step", "", "", "optimizer step"]
    assert [ax.get_title("left") for ax in figure.axes[1:]] == ["learning rate", "gradient norm", "samples per second"]
    with pytest.raises(ValueError, match="no logged step"):
        viz.curve_figure({"tiny": []})
    answered = viz.curve_figure({"tiny": [*entries, {"step": 30, "eval_loss": 4.0, "eval_em": 0.25}]})
    assert [ax.get_title("left") for ax in answered.axes[1:]][0] == "exact match of held-out questions"
    assert [[30, 0.25]] in [line.get_xydata().tolist() for line in answered.axes[1].lines]


def test_a_long_curve_is_smoothed_by_a_running_mean():
    entries = [log(i, float(i)) for i in range(200)]
    _, smooth = viz.curve_figure({"tiny": entries}).axes[0].lines
    middle = smooth.get_ydata()[20:-20]
    assert np.allclose(np.diff(middle), 1) and abs(middle[0] - 20) <= 0.5  # the mean of a straight line is the line


def test_live_curve_is_silent_outside_a_notebook(capsys):
    live = viz.LiveCurve(interval=0)
    for i in range(3):
        live(log(i, 3.0 - i))
    assert capsys.readouterr().out == "" and len(live.entries) == 3
    assert len(live.figure().axes[0].lines[0].get_xdata()) == 3


def test_live_curve_updates_one_display_and_leaves_no_figure_open():
    pytest.importorskip("IPython")
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output
    from matplotlib import pyplot

    shell = InteractiveShell.instance()
    shell.kernel = object()  # what tells a notebook from a terminal
    try:
        with capture_output() as captured:
            live = viz.LiveCurve(interval=0)
            for i in range(4):
                live(log(i, 3.0 - i))
            calm = viz.LiveCurve(interval=1000)
            for i in range(50):
                calm(log(i, 1.0))
            calm({"step": 50, "elapsed_s": 60, "eval_loss": 0.5})
    finally:
        InteractiveShell.clear_instance()
    outputs = captured._outputs
    ids = [output["transient"]["display_id"] for output in outputs]
    assert len(outputs) == 4 + 2 and len(set(ids)) == 2
    assert [bool(output.get("update")) for output in outputs] == [False, True, True, True, False, True]
    assert all("image/png" in output["data"] for output in outputs)
    assert pyplot.get_fignums() == []


# Scores ---------------------------------------------------------------------------------------------------------------


def anchor_score(error, iou):
    interval = {} if error is None else {"median_center_error_m": [0.2, 9]}
    return {
        "median_center_error_m": error, "mean_iou_3d": iou, "acc_iou25": 0.5, "valid_json_rate": 1.0,
        "num_samples": 412, "num_scenes": 40,
        "ci95": {"mean_iou_3d": [iou - 0.011, iou + 0.012]} | interval,
    }  # fmt: skip


def qa_score(em):
    return {
        "em": em, "num_samples": 800, "num_scenes": 40, "ci95": {"em": [em - 0.02, em + 0.03]},
        "em_by_task": {"count": em / 2, "exists": em},
    }  # fmt: skip


SCORES = {
    "anchors": {"blind": anchor_score(None, 0.05), "model": anchor_score(0.313, 0.341)},
    "qa": {"model": qa_score(0.712), "majority": qa_score(0.444)},
    "protocols": {"anchors": "place-anchor-1: upright", "qa": "exact-match-1"},
}


def test_scores_table_holds_the_numbers_in_their_columns():
    table = viz.scores_table(SCORES)
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")]
    assert rows[0][:3] == ["", "median centre error (m)", "mean 3D IoU"]
    assert rows[1] == ["model", "0.313 [0.200, 9.000]", "0.341 [0.330, 0.353]", "0.500", "1.000"]
    assert rows[2][0].startswith("blind") and rows[2][1] == "-"  # the model comes first, whatever the file's order
    assert rows[3][1:] == ["exact match", "count", "exists"]
    assert rows[4] == ["model", "0.712 [0.692, 0.742]", "0.356", "0.712"]
    lines = table.splitlines()
    assert all(len({len(line) for line in part if line.startswith("|")}) == 1 for part in (lines[:6], lines[8:14]))
    assert "412 samples of 40 scenes" in table and "place-anchor-1" in table and "95 %" in table


def test_scores_figure_draws_values_and_intervals():
    figure = viz.scores_figure(SCORES)
    assert len(figure.axes) == 4
    iou = figure.axes[1]
    drawn = [(line.get_xdata().tolist(), line.get_color()) for line in iou.lines]
    assert (pytest.approx([0.33, 0.353]), viz.PREDICTED_COLOR) in drawn
    assert [0.341] in [xs for xs, _ in drawn] and [0.05] in [xs for xs, _ in drawn]
    text = texts_of(figure)
    assert "412 samples" in text and "800 samples" in text and "none valid" in text and "0.71" in text
    assert picture(figure).std() > 10
    figure.canvas.draw()
    for a, b in pairwise(figure.axes):
        assert not a.get_tightbbox().padded(-2).overlaps(b.get_tightbbox().padded(-2)) or b is figure.axes[-1]


def test_scores_without_content_are_refused():
    for function in (viz.scores_table, viz.scores_figure):
        with pytest.raises(ValueError, match="expected scores under anchors or qa"):
            function({"protocols": {}})
        with pytest.raises(ValueError, match="expected the controls"):
            function({"qa": {"modle": qa_score(0.5)}})
