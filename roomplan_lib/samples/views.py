"""Which views of a scene a sample shows, and the geometry record of the chosen ones."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from roomplan_lib.geometry import resize_intrinsics, unproject
from roomplan_lib.samples import depth_histogram, rounded
from roomplan_lib.scenes import Scene, View

STRATEGIES = ("coverage", "uniform", "random")
PIXEL_STRIDE = 4  # every fourth pixel each way: about 3000 points of a 256x192 depth image
MAX_DEPTH = 5.0  # metres; the phone's depth beyond is too noisy to say which voxel is seen
MIN_BASELINE = 0.1  # metres: cameras closer together than this see almost the same picture
MAX_DRAWS = 20  # of random views, until two of them are MIN_BASELINE apart


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen views, the reference view first, and how well they show the scene.

    views: [V]. baseline_m: largest distance between two cameras; None for views without poses. coverage: share of the
    voxels seen by any candidate view that the chosen ones see; None when nothing tells (no depth or no poses).
    """

    views: list[View]
    baseline_m: float | None
    coverage: float | None


def select_views(scene: Scene, num_views: int, **options) -> list[View]:
    """The views of `choose_views`, in order of choice; the first is the reference view."""
    return choose_views(scene, num_views, **options).views


def choose_views(scene: Scene, num_views: int, **options) -> Selection:
    """The first of `choose_view_sets`: up to `num_views` views of a scene; `options` are explained there."""
    return choose_view_sets(scene, num_views, 1, **options)[0]


def choose_view_sets(
    scene: Scene,
    num_views: int,
    num_sets: int,
    *,
    strategy: str = "coverage",
    voxel_size: float = 0.2,
    stop_ratio: float = 1.0,
    max_candidates: int = 240,
    seed: int = 0,
) -> list[Selection]:
    """Choose up to `num_sets` times `num_views` views of a scene; fewer views only when the scene has fewer.

    "coverage": greedy maximum coverage of the voxels (`voxel_size` metres) that depth shows, which is within 1 - 1/e
    of the best choice (Nemhauser et al. 1978); the first view shows most and is the reference view. With `stop_ratio`
    below 1 the choice ends once its views show that share of all voxels, though not before two views. When no view
    adds a voxel, the most novel viewpoints fill up: those furthest, in place and heading, from what is chosen. Long
    scans are thinned to `max_candidates` views, or `num_views` where that is more, evenly in order of time.
    "uniform": evenly in order of time, first and last included; also what a scene without depth gets instead of
    "coverage", since nothing tells what its views show.
    "random": drawn anew for every set, by `seed` and the scene alone, with MIN_BASELINE between two cameras where
    MAX_DRAWS tries find that.
    Sets of the first two strategies share no view: each is chosen from what earlier ones left, and there are fewer
    sets once fewer than `num_views` views are left. Ties go to the earlier view, so the choice is deterministic.

    Raises ValueError for settings out of range and for a scene without views.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {STRATEGIES}, got {strategy!r}")
    if num_views < 1 or num_sets < 1 or max_candidates < 1 or voxel_size <= 0 or not 0 < stop_ratio <= 1:
        raise ValueError(
            f"num_views {num_views} >= 1, number of sets {num_sets} >= 1, max_candidates {max_candidates} >= 1, "
            f"voxel_size {voxel_size} > 0 and 0 < stop_ratio {stop_ratio} <= 1 are expected"
        )
    views = scene.views
    if not views:
        raise ValueError(f"scene {scene.scene_id}: it has no views to choose from")
    shows_depth = all(view.posed and view.depth_path is not None for view in views)
    candidates = _evenly(len(views), max(max_candidates, num_views))
    seen: dict[int, np.ndarray] = {}
    if strategy == "coverage" and shows_depth:
        seen, num_voxels = _seen_voxels(views, candidates, voxel_size)
        choose = partial(_cover, views, seen, num_voxels, num_views, stop_ratio)
        left = candidates
    elif strategy == "random":
        chance = random.Random(f"{seed}/{scene.scene_id}/views")
        choose = partial(_draw, views, num_views, chance)
        left = list(range(len(views)))
    else:
        choose = partial(_spread, num_views)
        left = list(range(len(views)))
    chosen = []
    while len(chosen) < num_sets and (not chosen or len(left) >= num_views):
        chosen.append(choose(left))
        if strategy != "random":
            left = [index for index in left if index not in chosen[-1]]
    if shows_depth and not seen:
        seen, num_voxels = _seen_voxels(views, sorted({*candidates, *chain(*chosen)}), voxel_size)
    return [
        Selection(
            [views[index] for index in indices],
            max_baseline([views[index] for index in indices]),
            len(np.unique(np.concatenate([seen[index] for index in indices]))) / num_voxels
            if shows_depth and num_voxels
            else None,
        )
        for indices in chosen
    ]


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


def max_baseline(views: list[View]) -> float | None:
    """Largest distance between two cameras, metres; None when a view has no pose."""
    if not all(view.posed for view in views):
        return None
    centers = np.array([view.camera_to_world[:3, 3] for view in views])
    return float(np.linalg.norm(centers[:, None] - centers[None], axis=-1).max())


def depth_intrinsics(view: View, size: tuple[int, int]) -> np.ndarray:
    """K [3, 3] of a posed view's depth picture of `size` (width, height): its own, or the picture's K scaled."""
    if view.depth_K is not None:
        return view.depth_K
    if size == (view.width, view.height):
        return view.K
    return resize_intrinsics(view.K, (view.width, view.height), size)


def view_points(view: View, stride: int = PIXEL_STRIDE, depth: np.ndarray | None = None) -> np.ndarray:
    """[N, 3] world points, metres, of every `stride`-th valid depth pixel each way of a posed view with depth.

    depth: the view's depth [H, W] where the caller has loaded it already.
    """
    depth = view.load_depth() if depth is None else depth
    start = stride // 2
    K = depth_intrinsics(view, depth.shape[::-1]).copy()
    K[:2, 2] -= start  # the subsampled image's pixel (0, 0) is pixel (start, start)
    K[:2] /= stride
    points, valid = unproject(depth[start::stride, start::stride], K, view.camera_to_world)
    return points[valid]


@dataclass(frozen=True, eq=False)
class _KeptView(View):
    depth: np.ndarray | None = None  # [H, W] metres

    def load_depth(self) -> np.ndarray:
        return super().load_depth() if self.depth is None else self.depth


def keep_depth(view: View) -> View:
    """The same view with its depth in memory, for those who look at it several times."""
    return view if view.depth_path is None else _KeptView(**vars(view), depth=view.load_depth())


def geometry_record(views: list[View]) -> dict | None:
    """`geom_token` of views: R [V, 9], t [V, 3] camera_to_world, K [V, 9] pixels, depth_hist [V, 16]; nested lists.

    None when a view has no pose.
    """
    if not all(view.posed for view in views):
        return None
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


def _spread(num_views: int, left: list[int]) -> list[int]:
    return [left[i] for i in _evenly(len(left), num_views)]


def _draw(views: list[View], num_views: int, chance: random.Random, left: list[int]) -> list[int]:
    for _ in range(MAX_DRAWS):
        chosen = chance.sample(left, min(num_views, len(left)))
        baseline = max_baseline([views[index] for index in chosen])
        if baseline is None or baseline >= MIN_BASELINE:
            break
    return chosen


def _cover(
    views: list[View], seen: dict[int, np.ndarray], num_voxels: int, num_views: int, stop_ratio: float, left: list[int]
) -> list[int]:
    """Greedy coverage of all voxels by some of the views `left`, see `choose_view_sets`."""
    chosen, covered = greedy_coverage([seen[index] for index in left], num_voxels, num_views, stop_ratio)
    enough = stop_ratio < 1 and covered.sum() >= stop_ratio * num_voxels
    wanted = min(num_views, len(left), max(2, len(chosen)) if enough else num_views)
    while len(chosen) < wanted:
        chosen.append(_most_novel([views[index] for index in left], chosen))
    return [left[i] for i in chosen]


def _seen_voxels(views: list[View], indices: list[int], voxel_size: float) -> tuple[dict[int, np.ndarray], int]:
    """(numbers of the voxels that each of the views shows, by its index; number of voxels shown by any)."""
    cells = []
    for index in indices:
        points = view_points(views[index])
        near = np.linalg.norm(points - views[index].camera_to_world[:3, 3], axis=1) <= MAX_DEPTH
        x, y, z = np.floor(points[near] / voxel_size).astype(np.int64).T + 2**20  # one number sorts faster than three
        cells.append(np.unique(x << 42 | y << 21 | z))
    _, inverse = np.unique(np.concatenate(cells), return_inverse=True)
    ends = np.cumsum([len(cell) for cell in cells])
    numbers = np.split(inverse.ravel(), ends[:-1])
    return dict(zip(indices, numbers, strict=True)), int(inverse.max(initial=-1)) + 1


def _most_novel(views: list[View], chosen: list[int]) -> int:
    """The view whose nearest chosen one is furthest; one metre counts like one radian of heading."""
    centers = np.array([view.camera_to_world[:3, 3] for view in views])
    headings = np.array([view.camera_to_world[:3, 2] for view in views])
    angles = np.arccos(np.clip(headings @ headings[chosen].T, -1, 1))
    distances = np.linalg.norm(centers[:, None] - centers[chosen][None], axis=-1) + angles
    novelty = distances.min(axis=1, initial=np.inf)
    novelty[chosen] = -1
    return int(np.argmax(novelty))
