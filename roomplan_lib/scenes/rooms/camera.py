"""A hand-held camera that walks through a room at eye height and turns until it has seen it."""

from __future__ import annotations

import heapq

import numpy as np

from roomplan_lib.scenes.rooms.plan import CELL, FLOOR_ID, Room, footprint, room_rng, walkable_grid, wall_frame
from roomplan_lib.scenes.rooms.render import RoomRenderer

MIN_MEDIAN_DEPTH = 0.8  # metres; nearer views stare at something
MAX_OBJECT_SHARE = 0.45  # of the pixels that one piece of furniture may cover
MIN_CONTENT = 0.06  # share of pixels on furniture
_COARSE = (32, 24)  # pixels of the views that choose the path
_ATTEMPTS = 12


def camera_path(room: Room, renderer: RoomRenderer, num_frames: int) -> np.ndarray:
    """[num_frames, 4, 4] camera_to_room (OpenCV camera) along a walk.

    Of several walks the one that shows most of the furniture is taken; its frames are spread over the stretches where
    the view is open (`open_views`), so the camera moves on faster past a wardrobe or a bare wall.
    """
    free = walkable_grid(room.polygon, [footprint(o) for o in room.objects if o.position[2] < 1.2])
    focal = _COARSE[0] * 0.83
    K = np.array([[focal, 0, _COARSE[0] / 2 - 0.5], [0, focal, _COARSE[1] / 2 - 0.5], [0, 0, 1]])
    numbers = np.arange(1, len(room.objects) + 1)
    best, best_score = None, -1.0
    for attempt in range(_ATTEMPTS):
        poses = _walk(room_rng(room.seed, room.index, 1, attempt), room, free, max(2 * num_frames, 72))
        depth, ids = renderer.trace(K, poses, _COARSE)
        good = np.flatnonzero(open_views(depth, ids))
        if len(good) < 12:
            continue
        chosen = good[np.round(np.linspace(0, len(good) - 1, num_frames)).astype(int)]
        # A piece counts as seen when it covers 3 % of some view, by half when it covers 0.5 %.
        share = (ids[good].reshape(len(good), -1, 1) == numbers).mean(axis=1).max(axis=0)
        seen = np.mean(0.5 * (share > 0.03) + 0.5 * (share > 0.005))
        score = float(seen) + 0.5 * len(good) / len(poses)
        if score > best_score:
            best, best_score = poses[chosen], score
        if attempt >= 2 and best_score > 1.25:
            break
    assert best is not None, f"room {room.scene_id}: no walk with open views in {_ATTEMPTS} attempts"
    return best


def open_views(depth: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """[N] bool of views [N, H, W]: which stare neither at something close nor at a bare wall."""
    flat = ids.reshape(len(ids), -1)
    largest = np.array([np.bincount(row[row < FLOOR_ID], minlength=1).max() for row in flat]) / flat.shape[1]
    furniture = (flat < FLOOR_ID).mean(axis=1)
    median = np.median(depth.reshape(len(depth), -1), axis=1)
    return (median > MIN_MEDIAN_DEPTH) & (largest < MAX_OBJECT_SHARE) & (furniture > MIN_CONTENT)


def _walk(rng: np.random.Generator, room: Room, free: np.ndarray, count: int) -> np.ndarray:
    """[count, 4, 4] camera_to_room, evenly in time, along a way through the free cells.

    The camera looks from one thing to the next, as somebody does who records a room.
    """
    cells = np.argwhere(free)
    stops = [cells[rng.integers(len(cells))]]
    for _ in range(3):  # each stop is the farthest of a few draws, so that the walk crosses the room
        draws = cells[rng.integers(len(cells), size=8)]
        reach = np.min([np.linalg.norm(draws - s, axis=1) for s in stops], axis=0)
        stops.append(draws[np.argmax(reach)])
    way = np.concatenate([_shortest_way(free, a, b) for a, b in zip(stops[:-1], stops[1:], strict=True)])
    way = (way + 0.5) * CELL
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(way, axis=0), axis=1) + 1e-6)])
    s = np.linspace(0, length[-1], count)
    xy = np.stack([np.interp(s, length, way[:, k]) for k in range(2)], axis=1)
    xy = _smooth(xy, 0.25 / max(length[-1] / count, 0.01))  # corners are cut by about 0.25 m
    eye = rng.uniform(1.33, 1.58)
    heading, pitch = _gaze(rng, room, xy, eye)
    heading += _shake(rng, count, 0.02)
    pitch += _shake(rng, count, 0.015)
    roll = np.radians(rng.uniform(-1.5, 1.5)) + _shake(rng, count, 0.014)
    position = np.concatenate([xy, np.full((count, 1), eye)], axis=1)
    position += np.stack([_shake(rng, count, 0.012) for _ in range(3)], axis=1)

    c, s = np.cos(heading), np.sin(heading)
    cp, sp = np.cos(pitch), np.sin(pitch)
    forward = np.stack([c * cp, s * cp, sp], axis=1)
    level = np.stack([s, -c, np.zeros(count)], axis=1)  # to the right, horizontal
    down = np.cross(forward, level)
    cr, sr = np.cos(roll)[:, None], np.sin(roll)[:, None]
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, 0] = cr * level + sr * down
    poses[:, :3, 1] = cr * down - sr * level
    poses[:, :3, 2] = forward
    poses[:, :3, 3] = position
    return poses


def _gaze(rng: np.random.Generator, room: Room, xy: np.ndarray, eye: float) -> tuple[np.ndarray, np.ndarray]:
    """Heading and pitch [N] in radians along the positions [N, 2]: from target to target, each looked at from afar."""
    targets = [o.position + [0, 0, o.box.extent[2] / 2] for o in room.objects]
    weight = [1.0] * len(targets)
    for o in room.openings:
        start, along, _ = wall_frame(room.polygon, o.wall)
        targets.append(start + along * (o.start + o.width / 2) + [0, 0, (o.bottom + o.top) / 2])
        weight.append(0.6)
    targets, weight = np.array(targets), np.array(weight)
    keys = np.linspace(0, len(xy) - 1, 12).round().astype(int)
    looked = np.zeros(len(targets))
    heading, pitch = [rng.uniform(-np.pi, np.pi)], [np.radians(-14)]
    for k in keys:
        offset = targets - [*xy[k], eye]
        distance = np.linalg.norm(offset[:, :2], axis=1)
        angle = np.arctan2(offset[:, 1], offset[:, 0])
        turn = (angle - heading[-1] + np.pi) % (2 * np.pi) - np.pi
        cost = (
            looked / weight
            + 0.5 * np.abs(turn) / np.pi
            + 1.2 * np.maximum(2.0 - distance, 0)
            + rng.uniform(0, 0.2, len(turn))
        )
        pick = int(np.argmin(cost))
        looked[pick] += 1.0
        # What lies beside the target in the picture counts as half seen.
        looked[np.abs((angle - angle[pick] + np.pi) % (2 * np.pi) - np.pi) < 0.4] += 0.5
        heading.append(heading[-1] + turn[pick])
        pitch.append(np.clip(np.arctan2(offset[pick, 2], distance[pick]) * 0.9, np.radians(-30), np.radians(-9)))
    angles = np.stack([np.interp(np.arange(len(xy)), keys, np.array(a[1:])) for a in (heading, pitch)], axis=1)
    angles = _smooth(angles, len(xy) / 40)
    return angles[:, 0], angles[:, 1]


def _shake(rng: np.random.Generator, count: int, size: float) -> np.ndarray:
    """[count] smooth noise of standard deviation `size`: a hand's tremble."""
    noise = _smooth(rng.normal(size=(count + 24, 1)), 2.5)[12:-12, 0]
    return noise * (size / max(noise.std(), 1e-9))


def _smooth(values: np.ndarray, width: float) -> np.ndarray:
    """Gaussian mean of [N, D] over `width` samples; the ends are repeated."""
    reach = int(np.ceil(3 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(values, ((reach, reach), (0, 0)), mode="edge")
    return np.stack([np.convolve(padded[:, k], kernel, mode="valid") for k in range(values.shape[1])], axis=1)


def _shortest_way(free: np.ndarray, start: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """[N, 2] cells from start to goal through free cells (A* over eight neighbours); both are in one component."""
    start, goal = tuple(map(int, start)), tuple(map(int, goal))
    width, height = free.shape
    cost, origin, done = {start: 0.0}, {}, set()
    queue = [(0.0, start)]
    while queue:
        _, cell = heapq.heappop(queue)
        if cell == goal:
            break
        if cell in done:
            continue
        done.add(cell)
        for dx in (-1, 0, 1):
            for dy in (-1, 0, 1):
                x, y = cell[0] + dx, cell[1] + dy
                if not (0 <= x < width and 0 <= y < height and free[x, y]):
                    continue
                price = cost[cell] + (dx * dx + dy * dy) ** 0.5
                if price < cost.get((x, y), np.inf):
                    cost[x, y], origin[x, y] = price, cell
                    heapq.heappush(queue, (price + ((x - goal[0]) ** 2 + (y - goal[1]) ** 2) ** 0.5, (x, y)))
    way = [goal]
    while way[-1] != start:
        way.append(origin[way[-1]])
    return np.array(way[::-1], dtype=np.float64)
