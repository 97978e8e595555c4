"""A scene as the actions that place all of it, and the scene that actions place.

Actions hold upright rectangles and boxes. Both functions tell in `notes`, a sentence each, whatever the other side
cannot hold: what is left out, made simpler or supplied.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from roomplan_lib.actions import (
    Action,
    ActionList,
    PlaceAnchor,
    PlaceDoor,
    PlaceOpening,
    PlaceWall,
    PlaceWindow,
    PlanRoom,
    anchor_from_box,
    canonical,
)
from roomplan_lib.actions.order import CORNER
from roomplan_lib.geometry import OrientedBox, box_corners, rotation_z
from roomplan_lib.scenes import CATEGORIES, Scene, Surface

IN_WALL = {"door": PlaceDoor, "window": PlaceWindow, "opening": PlaceOpening}
UPRIGHT = 1e-3  # radians from the vertical that are rounding


def room_actions(scene: Scene, notes: list[str] | None = None) -> PlanRoom:
    """The plan that places a scene's walls, doors, windows, openings and boxes, each kind in the scene's order.

    Coordinates are the scene's world, unrounded; put the plan in another frame by `transformed`, in order by
    `canonical`. The index of a door's wall counts the plan's walls. Anchors have no yaw: their normal has it exactly.
    """
    notes = [] if notes is None else notes
    walls, wall_of, in_walls, anchors = [], {}, [], []
    for surface in (s for s in scene.surfaces if s.kind == "wall"):
        box = _upright(surface.box, f"wall {surface.box.object_id}", notes)
        half = box.rotation[:2, 0] * box.extent[0] / 2
        wall_of[surface.box.object_id] = len(walls)
        a, b, bottom = box.center[:2] - half, box.center[:2] + half, box.center[2] - box.extent[2] / 2
        walls.append(PlaceWall(_floats(a), _floats(b), float(bottom), float(box.extent[2])))
        if surface.polygon is not None:
            notes.append(f"wall {surface.box.object_id}: outline of {len(surface.polygon)} corners made a rectangle")
        if surface.attributes.get("curve"):
            notes.append(f"wall {surface.box.object_id}: curve made straight")
    for kind, verb in IN_WALL.items():
        for surface in (s for s in scene.surfaces if s.kind == kind):
            name = f"{kind} {surface.box.object_id}"
            box = _upright(surface.box, name, notes)
            wall = wall_of.get(surface.parent_id)
            if wall is None and walls:
                wall = int(np.argmin([_distance(box.center, w) for w in walls]))
                notes.append(f"{name}: names no wall of the scene, put into the nearest, wall {wall}")
            if wall is None:
                notes.append(f"{name} left out: the scene has no wall")
                continue
            if surface.polygon is not None:
                notes.append(f"{name}: outline of {len(surface.polygon)} corners made a rectangle")
            in_walls.append(verb(wall, _floats(box.center), float(box.extent[0]), float(box.extent[2])))
    num_turned = num_thin = 0
    for box in scene.boxes:
        upright = _upright(box, f"{box.label} {box.object_id}", notes)
        category = re.sub(r"[^a-z0-9]+", "_", box.label.lower()).strip("_")
        anchor = anchor_from_box(replace(upright, label=category))
        num_turned += np.dot(anchor.normal, upright.rotation[:, 0]) < 1 - UPRIGHT
        num_thin += min(anchor.extent) > min(upright.extent)
        anchors.append(anchor)
    open_words = sorted({anchor.category for anchor in anchors} - set(CATEGORIES) - {""})
    if open_words:
        notes.append(f"categories beyond the {len(CATEGORIES)} of the language: {', '.join(open_words)}")
    if num_turned:
        notes.append(f"{num_turned} boxes turned by half or quarter turns: the same boxes, their fronts are not held")
    if num_thin:
        notes.append(f"{num_thin} boxes made thicker: an anchor has no side thinner than 1 cm")
    _note_the_rest(scene, notes)
    return PlanRoom((*walls, *in_walls, *anchors), scene=scene.scene_id)


def plan_scene(plan: Action | ActionList, notes: list[str] | None = None) -> Scene:
    """The scene that a plan, a list or a single action places; `source` is "actions", objects are named by number.

    Where the walls close to one outline, a floor with that outline is supplied.
    """
    notes = [] if notes is None else notes
    actions = plan.actions if isinstance(plan, (PlanRoom, ActionList)) else (plan,)
    walls = [action for action in actions if isinstance(action, PlaceWall)]
    surfaces, boxes, attributes = [], [], {}
    for number, wall in enumerate(walls):
        surfaces.append(Surface("wall", replace(wall.to_box(), object_id=f"wall-{number}")))
    for number, action in enumerate(actions):
        if isinstance(action, (PlaceDoor, PlaceWindow, PlaceOpening)):
            if action.wall >= len(walls):
                notes.append(f"{action.verb} left out: names wall {action.wall}, there are {len(walls)}")
                continue
            box = action.to_box(walls[action.wall])
            box = replace(box, object_id=f"{box.label}-{number}")
            surfaces.append(Surface(box.label, box, f"wall-{action.wall}"))
        elif isinstance(action, PlaceAnchor):
            boxes.append(replace(action.to_box(), object_id=f"anchor-{number}"))
            if action.confidence is not None:
                attributes[f"anchor-{number}"] = {"confidence": action.confidence}
            if abs(action.normal[2]) > UPRIGHT:
                notes.append(f"anchor {number} ({action.category}): normal {list(action.normal)} made level")
        elif not isinstance(action, PlaceWall):
            notes.append(f"{action.verb} left out: it places nothing")
    floor = _floor(walls)
    if floor is not None:
        surfaces.append(floor)
        notes.append("floor supplied from the outline of the walls")
    stated = actions if isinstance(plan, ActionList) else (plan, *actions)
    scene_id = next((action.scene for action in stated if action.scene), "")
    return Scene(scene_id, [], boxes, source="actions", surfaces=surfaces, attributes=attributes)


def _upright(box: OrientedBox, name: str, notes: list[str]) -> OrientedBox:
    """The same box with z as its third axis; where none of its axes is vertical, the upright box around it."""
    vertical = int(np.argmax(np.abs(box.rotation[2])))
    order = [(vertical + 1) % 3, (vertical + 2) % 3, vertical]  # keeps the handedness
    axis = box.rotation[:, order[0]]
    rotation, extent = rotation_z(np.arctan2(axis[1], axis[0])), box.extent[order]
    tilt = np.arcsin(min(1.0, np.linalg.norm(box.rotation[:2, vertical])))
    if tilt > UPRIGHT:
        notes.append(f"{name}: tilted by {np.degrees(tilt):.1f} degrees, replaced by the upright box around it")
        extent = np.ptp(box_corners(box) @ rotation, axis=0)
    return replace(box, rotation=rotation, extent=extent)


def _note_the_rest(scene: Scene, notes: list[str]) -> None:
    """Sentences for what a scene says besides the geometry of walls, doors, windows, openings and boxes."""
    surfaces = [s for s in scene.surfaces if s.kind != "floor"]
    for what, values in (
        ("surfaces", [s.attributes for s in surfaces]),
        ("boxes", [scene.attributes.get(b.object_id, {}) for b in scene.boxes]),
        ("the scene", [scene.metadata]),
    ):
        keys = sorted({key for known in values for key, value in known.items() if value not in (None, "", [], {})})
        if keys:
            notes.append(f"{', '.join(keys)} of {what} left out")
    thick = [s for s in surfaces if s.box.extent[1] > 0]
    if thick:
        notes.append(f"thickness of {len(thick)} surfaces left out, up to {max(s.box.extent[1] for s in thick):.2f} m")
    floors = [s for s in scene.surfaces if s.kind == "floor"]
    if floors:
        notes.append(f"floors left out: no action places one ({len(floors)})")
    if scene.surfaces or scene.boxes:
        notes.append(f"names of {len(surfaces) + len(scene.boxes)} surfaces and boxes left out: actions are numbered")
    for what, given in (("views", scene.views), ("colours", scene.colors), ("mesh", scene.mesh_path)):
        if given:
            notes.append(f"{what} left out")


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def _distance(point: np.ndarray, wall: PlaceWall) -> float:
    """Metres on the floor plan from a point to a wall."""
    a, along = np.array(wall.a), np.subtract(wall.b, wall.a)
    share = np.clip(np.dot(point[:2] - a, along) / max(np.dot(along, along), 1e-12), 0, 1)
    return float(np.linalg.norm(point[:2] - a - share * along))


def _floor(walls: list[PlaceWall]) -> Surface | None:
    """The floor within walls that are one closed loop at one height; None where they are not."""
    if len(walls) < 3 or np.ptp([wall.z for wall in walls]) > CORNER:
        return None
    loop = canonical(PlanRoom(tuple(walls))).actions
    joints = np.array([(before.b, after.a) for before, after in zip(loop[-1:] + loop[:-1], loop, strict=True)])
    if np.linalg.norm(joints[:, 0] - joints[:, 1], axis=1).max() > CORNER:
        return None
    polygon = np.column_stack([joints.mean(axis=1), np.full(len(loop), walls[0].z)])
    rotation = loop[0].to_box().rotation
    local = polygon @ rotation
    center, extent = rotation @ (local.min(axis=0) + local.max(axis=0)) / 2, np.ptp(local, axis=0)
    return Surface("floor", OrientedBox(center, extent, rotation, "floor", "floor"), polygon=polygon)
