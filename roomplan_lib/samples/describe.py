"""Words for the objects of a scene, and the horizontal geometry that decides whether words are unambiguous."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from roomplan_lib.geometry import OrientedBox, box_corners
from roomplan_lib.scenes import Scene

MAX_TILT_COSINE = 0.99  # a box whose axis lies within about 8 degrees of the vertical counts as upright
CLEAR_MARGIN = 0.3  # metres by which "nearest" or "farthest" must be ahead of the next one


def category_text(category: str) -> str:
    """A category as people say it: "tv_monitor" -> "TV"."""
    return "TV" if category == "tv_monitor" else category.replace("_", " ")


def plural(category: str) -> str:
    """ "shelves", "TVs", ..."""
    return "shelves" if category == "shelf" else category_text(category) + "s"


def with_article(phrase: str) -> str:
    """ "an oven", "a TV"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def unique_phrases(scene: Scene) -> dict[int, str]:
    """Noun phrase by box index, for the boxes that one names without doubt: "bed", "red chair".

    The only instance of its category goes by the category. Where all colours of a category are known, an instance
    with a colour of its own goes by colour and category.
    """
    phrases = {}
    for index, box in enumerate(scene.boxes):
        same = [other for other in scene.boxes if other.label == box.label]
        colors = [scene.colors.get(other.object_id, "") for other in same]
        color = scene.colors.get(box.object_id, "")
        if len(same) == 1:
            phrases[index] = category_text(box.label)
        elif all(colors) and colors.count(color) == 1:
            phrases[index] = f"{color} {category_text(box.label)}"
    return phrases


@lru_cache(maxsize=1024)  # of box objects, which every pair and triple of a scene asks for again
def upright(box: OrientedBox) -> OrientedBox | None:
    """The same box with its axes renamed so that the third points up; None for a box that stands on no face."""
    vertical = int(np.argmax(np.abs(box.rotation[2])))
    if abs(box.rotation[2, vertical]) < MAX_TILT_COSINE:
        return None
    order = [(vertical + 1) % 3, (vertical + 2) % 3, vertical]
    rotation = box.rotation[:, order]
    if rotation[2, 2] < 0:
        rotation = rotation * [1, -1, -1]
    return OrientedBox(box.center, box.extent[order], rotation, box.label, box.object_id)


def center_distance(a: OrientedBox, b: OrientedBox) -> float:
    """Horizontal distance of two centres, metres."""
    return float(np.linalg.norm(a.center[:2] - b.center[:2]))


@lru_cache(maxsize=4096)
def footprint_gap(a: OrientedBox, b: OrientedBox) -> float:
    """Smallest horizontal distance between two upright boxes seen from above, metres; 0 where they overlap.

    Two convex outlines apart from each other are nearest between a corner of one and an edge of the other.
    """
    outlines = [box_corners(box)[[0, 2, 6, 4], :2] for box in (a, b)]
    for outline in outlines:  # separating axis theorem: some edge's normal parts them, or they overlap
        for edge in np.diff(outline, axis=0, append=outline[:1]):
            low, high = ((corners @ [-edge[1], edge[0]]) for corners in outlines)
            if low.max() < high.min() or high.max() < low.min():
                return min(_corner_gap(*outlines), _corner_gap(*outlines[::-1]))
    return 0.0


def _corner_gap(corners: np.ndarray, outline: np.ndarray) -> float:
    """Smallest distance from corners [4, 2] to the edges of an outline [4, 2]."""
    start = outline[None]
    edge = np.roll(outline, -1, axis=0)[None] - start
    length = np.maximum((edge**2).sum(-1), 1e-12)
    along = np.clip(((corners[:, None] - start) * edge).sum(-1) / length, 0, 1)
    return float(np.linalg.norm(corners[:, None] - start - along[..., None] * edge, axis=-1).min())
