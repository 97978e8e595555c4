"""Which views of a scene a sample shows, and the geometry record of the chosen ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from roomplan_lib.geometry import resize_intrinsics, unproject
from roomplan_lib.samples import depth_histogram, rounded
from roomplan_lib.scenes import Scene, View

STRATEGIES = ("coverage", "uniform")
PIXEL_STRIDE = 4  # every fourth pixel each way: about 3000 points of a 256x192 depth image
MAX_DEPTH = 5.0  # metres; the phone's depth beyond is too noisy to say which voxel is seen


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen views, the reference view first, and how well they show the scene.

    views: [V]. baseline_m: largest distance between two cameras. coverage: share of the voxels seen by any candidate
    view that the chosen ones see; None when nothing tells (no depth).
    """

    views: list[View]
    baseline_m: float
    coverage: float | None


def select_views(scene: Scene, num_views: int, **options) -> list[View]:
    """The views of `choose_views`, in order of choice; the first is the reference view."""
    return choose_views(scene, num_views, **options).views


def choose_views(
    scene: Scene,
    num_views: int,
    *,
    strategy: str = "coverage",
    voxel_size: float = 0.2,
    stop_ratio: float = 1.0,
    max_candidates: int = 240,
) -> Selection:
    """Choose up to `num_views` views of a scene; fewer only when the scene has fewer.

    "coverage": greedy maximum coverage of the voxels (`voxel_size` metres) that depth shows, which is within 1 - 1/e
    of the best choice (Nemhauser et al. 1978); the first view shows most and is the reference view. Once the chosen
    views show `stop_ratio` of all voxels, or no view adds one, the most novel viewpoints fill up: those furthest, in
    place and heading, from what is chosen. Long scans are thinned to `max_candidates` views, evenly in order of time.
    "uniform": evenly in order of time; also what a scene without depth gets, since nothing tells what its views show.
    Ties go to the earlier view, so the choice is deterministic.

    Raises ValueError for settings out of range.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {STRATEGIES}, got {strategy!r}")
    if num_views < 1 or max_candidates < num_views or voxel_size <= 0 or not 0 < stop_ratio <= 1:
        raise ValueError(
            f"num_views {num_views} >= 1, max_candidates {max_candidates} >= num_views, voxel_size {voxel_size} > 0 "
            f"and 0 < stop_ratio {stop_ratio} <= 1 are expected"
        )
    has_depth = all(view.depth_path is not None for view in scene.views)
    if strategy == "uniform" or not has_depth:
        views = [scene.views[i] for i in _evenly(len(scene.views), num_views)]
        return Selection(views, max_baseline(views), None)
    candidates = [scene.views[i] for i in _evenly(len(scene.views), max_candidates)]
    seen, num_voxels = _seen_voxels(candidates, voxel_size)
    chosen, covered = greedy_coverage(seen, num_voxels, num_views, stop_ratio)
    while len(chosen) < min(num_views, len(candidates)):
        chosen.append(_most_novel(candidates, chosen))
        covered[seen[chosen[-1]]] = True
    views = [candidates[i] for i in chosen]
    return Selection(views, max_baseline(views), float(covered.mean()) if num_voxels else None)


def greedy_coverage(
    seen: list[np.ndarray], num_voxels: int, num_views: int, stop_ratio: float = 1.0
) -> tuple[list[int], np.ndarray]:
    """Greedy maximum coverage. seen: per view the indices of its voxels, each once.

    Returns (chosen view indices in order, covered [num_voxels] bool); stops early when nothing is gained.
    """
    covered = np.zeros(num_voxels, dtype=bool)
    chosen: list[int] = []
    while len(chosen) < num_views and covered.sum() < stop_ratio * num_voxels:
        gains = [int((~covered[voxels]).sum()) for voxels in seen]
        best = int(np.argmax(gains))
        if gains[best] == 0:
            break
        chosen.append(best)
        covered[seen[best]] = True
    return chosen, covered


def max_baseline(views: list[View]) -> float:
    """Largest distance between two cameras, metres."""
    centers = np.array([view.camera_to_world[:3, 3] for view in views])
    return float(np.linalg.norm(centers[:, None] - centers[None], axis=-1).max())


def view_points(view: View, stride: int = PIXEL_STRIDE) -> np.ndarray:
    """[N, 3] world points, metres, of every `stride`-th valid depth pixel each way of a view with depth."""
    depth = view.load_depth()
    height, width = depth.shape
    K = view.K
    if (width, height) != (view.width, view.height):
        K = resize_intrinsics(K, (view.width, view.height), (width, height))
    start = stride // 2
    K = K.copy()
    K[:2, 2] -= start  # the subsampled image's pixel (0, 0) is pixel (start, start)
    K[:2] /= stride
    points, valid = unproject(depth[start::stride, start::stride], K, view.camera_to_world)
    return points[valid]


def geometry_record(views: list[View]) -> dict:
    """`geom_token` of views: R [V, 9], t [V, 3] camera_to_world, K [V, 9] pixels, depth_hist [V, 16]; nested lists."""
    poses = [view.camera_to_world for view in views]
    depths = [view.load_depth() if view.depth_path is not None else None for view in views]
    return {
        "R": [rounded(pose[:3, :3], 7) for pose in poses],
        "t": [rounded(pose[:3, 3], 6) for pose in poses],
        "K": [rounded(view.K, 5) for view in views],
        "depth_hist": [rounded(depth_histogram(depth), 5) for depth in depths],
    }


def _evenly(count: int, num: int) -> list[int]:
    """`num` indices spread over range(count) from first to last, all of them when there are no more."""
    return sorted(set(np.linspace(0, count - 1, min(num, count)).round().astype(int).tolist()))


def _seen_voxels(views: list[View], voxel_size: float) -> tuple[list[np.ndarray], int]:
    """(indices of the voxels each view shows, number of voxels shown by any)."""
    cells = []
    for view in views:
        points = view_points(view)
        near = np.linalg.norm(points - view.camera_to_world[:3, 3], axis=1) <= MAX_DEPTH
        cells.append(np.unique(np.floor(points[near] / voxel_size).astype(np.int64), axis=0))
    _, inverse = np.unique(np.concatenate(cells), axis=0, return_inverse=True)
    ends = np.cumsum([len(cell) for cell in cells])
    return np.split(inverse.ravel(), ends[:-1]), int(inverse.max(initial=-1)) + 1


def _most_novel(views: list[View], chosen: list[int]) -> int:
    """The view whose nearest chosen one is furthest; one metre counts like one radian of heading."""
    centers = np.array([view.camera_to_world[:3, 3] for view in views])
    headings = np.array([view.camera_to_world[:3, 2] for view in views])
    angles = np.arccos(np.clip(headings @ headings[chosen].T, -1, 1))
    distances = np.linalg.norm(centers[:, None] - centers[chosen][None], axis=-1) + angles
    novelty = distances.min(axis=1, initial=np.inf)
    novelty[chosen] = -1
    return int(np.argmax(novelty))
