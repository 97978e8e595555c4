"""Which objects the chosen views really show, told from depth alone."""

from __future__ import annotations

import numpy as np

from roomplan_lib.geometry import box_corners, points_in_box
from roomplan_lib.samples.views import view_points
from roomplan_lib.scenes import Scene, View

MIN_VISIBLE_PIXELS = 150  # of a 256x192 picture: about 12 pixels square, the least that shows what an object is
REFERENCE_PIXELS = 256 * 192
MARGIN = 0.02  # metres a box grows sideways and upwards: the noise of the phone's depth
FLOOR_MARGIN = 0.05  # metres above a box's bottom that do not count: floor around its legs
STRIDE = 2


def pixels_in_boxes(scene: Scene, views: list[View]) -> np.ndarray:
    """[V, num_boxes] depth pixels of each view that lie in each box of the scene, as if every view were 256x192.

    Raises ValueError when a view has no depth.
    """
    counts = np.zeros((len(views), len(scene.boxes)))
    heights = [box_corners(box)[:, 2] for box in scene.boxes]
    floors = [z.min() + min(FLOOR_MARGIN, np.ptp(z) / 4) for z in heights]
    reaches = [np.abs(box.rotation) @ (box.extent / 2 + MARGIN) + 1e-6 for box in scene.boxes]  # along the world's axes
    for v, view in enumerate(views):
        if view.depth_path is None:
            raise ValueError(
                f"scene {scene.scene_id}: no depth beside {view.rgb_path}, so nothing tells which objects are visible; "
                "fetch lowres_depth"
            )
        depth = view.load_depth()
        points = view_points(view, STRIDE, depth)
        weight = STRIDE**2 * REFERENCE_PIXELS / depth.size
        points = points[np.argsort(points[:, 0])]
        x = points[:, 0].copy()
        for b, box in enumerate(scene.boxes):
            # Most points are far from the box, most of them along one axis already.
            first, last = np.searchsorted(x, box.center[0] + reaches[b][0] * np.array([-1, 1]))
            near = points[first:last]
            near = near[np.abs(near[:, 1] - box.center[1]) <= reaches[b][1]]
            counts[v, b] = weight * (points_in_box(near, box, MARGIN) & (near[:, 2] > floors[b])).sum()
    return counts


def visible_boxes(scene: Scene, views: list[View], min_pixels: float = MIN_VISIBLE_PIXELS) -> np.ndarray:
    """[num_boxes] bool: at least one view shows `min_pixels` (of a 256x192 picture) of the box."""
    return pixels_in_boxes(scene, views).max(axis=0, initial=0) >= min_pixels
