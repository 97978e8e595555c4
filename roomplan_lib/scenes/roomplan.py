"""Apple RoomPlan's CapturedRoom as JSON, read and written: version 2 (iOS 17), the fewer fields of iOS 16, and
CapturedStructure, which merges the rooms of a home.

    walls doors windows openings floors    surfaces: identifier, category {"door": {"isOpen": true}}, confidence
                                           {"high": {}}, dimensions [width, height, 0], transform [16], parentIdentifier
                                           of the wall, polygonCorners [[x, y, z], ..] ([] for a rectangle), ..
    objects                                identifier, category {"storage": {}}, attributes, dimensions
                                           [width, height, depth], transform [16], parentIdentifier, ..
    sections version story referenceOriginTransform coreModel identifier rooms       kept as they are in the file

The file's frame is right-handed with y up, in metres. `transform` is a 4x4 matrix by columns that takes local
coordinates to the file's frame; its origin is the middle of the surface or object, local x runs along the width, y up
and z along the depth. A floor's local x and y lie in its plane and z is up. Enums are objects with one key; bare
strings, which some exporters write, are read too. iOS 16 has no floors, sections, story and polygonCorners. An optional
field that is null counts as absent, and is null again when written.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from bisect import bisect_right
from dataclasses import replace
from pathlib import Path

import numpy as np

from roomplan_lib.files import write_whole
from roomplan_lib.geometry import OrientedBox
from roomplan_lib.scenes import Scene, Surface

# Turns a vector of the file's y-up frame into our z-up one: (x, y, z) -> (x, -z, y).
Z_UP = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
SURFACES = {"walls": "wall", "doors": "door", "windows": "window", "openings": "opening", "floors": "floor"}
# RoomPlan's categories of objects and our labels; `stairs` has no ARKitScenes category and stays what it is.
LABEL_OF_CATEGORY = {"storage": "cabinet", "washerDryer": "washer", "television": "tv_monitor"} | {
    name: name
    for name in (
        "refrigerator", "stove", "bed", "sink", "toilet", "bathtub", "oven", "dishwasher", "table", "sofa", "chair",
        "fireplace", "stairs",
    )
}  # fmt: skip
CATEGORY_OF_LABEL = {label: category for category, label in LABEL_OF_CATEGORY.items()}
# Labels that RoomPlan tells apart by an attribute of a category only: label -> (category, attribute, value).
ATTRIBUTE_OF_LABEL = {"shelf": ("storage", "StorageType", "shelf"), "stool": ("chair", "ChairType", "stool")}
MAX_BYTES = 16 * 2**20  # a room takes 0.1 MB; parsing costs up to twenty times the file in memory
MAX_DEPTH = 64  # of nested lists and objects
MAX_METRES = 10_000.0
RIGID_TOLERANCE = 1e-3  # real files are orthonormal to 1e-4
LEVELS, LEVEL_BOUNDS = ("low", "medium", "high"), (1 / 3, 2 / 3)  # of confidence; the shares that part them
LISTS = (*SURFACES, "objects")
SUPPLIED = {"confidence": "high", "story": 0, "parentIdentifier": None}  # of what no RoomPlan file told
EXPORT_AGAIN = "export the room again"
MERGED = "merged_from_rooms"  # metadata of a CapturedStructure whose file has the lists of its rooms alone


def read_captured_room(path: Path | str) -> Scene:
    """The room of a CapturedRoom file, or all rooms of a CapturedStructure file merged; scene_id is the file's name.

    Rooms are merged as the file has them, or by joining their lists where the file has only those: metadata then says
    `merged_from_rooms`, and a scene that nobody changed is written with its rooms alone again.

    Boxes are upright or not, as in the file; `label` is one of our categories where there is one. What the file says
    besides is kept under the file's own keys and in its own frame, so that `write_captured_room` loses nothing:
    `Scene.attributes[object_id]` (category, attributes, confidence, parentIdentifier, story, ..),
    `Surface.attributes` (isOpen, confidence, story, curve, ..) and `Scene.metadata` (sections, coreModel, ..).

    Raises ValueError that names the file and the key of whatever is missing, malformed, not finite or too large.
    """
    path = Path(path)
    return _scene(_read_json(path), path.stem, f"{path}: ")


def read_captured_structure(path: Path | str) -> tuple[Scene, list[Scene]]:
    """A CapturedStructure file as its merged scene and the scenes of its rooms, `<file name>_<number>`.

    Raises ValueError as `read_captured_room` does, and for a file without the list `rooms`.
    """
    path = Path(path)
    data = _read_json(path)
    if not isinstance(data.get("rooms"), list):
        raise ValueError(f"{path}: no list `rooms`, so it is no CapturedStructure; read it with read_captured_room")
    merged = _scene(data, path.stem, f"{path}: ")
    rooms = [_scene(room, f"{path.stem}_{i}", f"{path}: rooms[{i}].") for i, room in enumerate(data["rooms"])]
    return merged, rooms


def is_captured_room(data: object) -> bool:
    """Whether parsed JSON means to be a CapturedRoom or CapturedStructure: it or a room of it has a required list."""
    if not isinstance(data, dict) or "action" in data:
        return False
    rooms = data["rooms"] if isinstance(data.get("rooms"), list) else []
    return any(isinstance(room, dict) and not {"walls", "objects"}.isdisjoint(room) for room in (data, *rooms))


def captured_room(scene: Scene, notes: list[str] | None = None) -> dict:
    """The JSON object of a scene. One that `read_captured_room` read comes out with all that was in its file.

    Any other scene gives Apple's key set without the opaque `coreModel`; identifiers are made from the scene's id.
    notes: gets a sentence for everything that the format cannot hold or that had to be supplied.
    """
    notes = [] if notes is None else notes
    native = scene.source == "roomplan"
    if native:
        data = dict(scene.metadata)
    else:
        data = {"version": 2, "story": 0, "sections": [], "referenceOriginTransform": _flat(np.eye(4))}
    things = [*(s.box for s in scene.surfaces), *scene.boxes]
    names = [box.object_id if native else _identifier(box, i, scene) for i, box in enumerate(things)]
    renamed = {box.object_id: name for box, name in zip(things, names, strict=True) if box.object_id}
    lists = {"objects": []}
    for key, kind in SURFACES.items():
        lists[key] = [
            _surface_entry(surface, name, renamed.get(surface.parent_id, surface.parent_id if native else ""), native)
            for surface, name in zip(scene.surfaces, names, strict=False)
            if surface.kind == kind
        ]
    num_shares = 0
    for box, name in zip(scene.boxes, names[len(scene.surfaces) :], strict=True):
        told = scene.attributes.get(box.object_id, {})
        known = dict(told if native and "category" in told else SUPPLIED)
        if "category" not in known or _label(known["category"], known.get("attributes")) != box.label:
            if box.label not in CATEGORY_OF_LABEL | ATTRIBUTE_OF_LABEL:
                notes.append(f"object {box.label!r} {box.object_id} left out: RoomPlan has no category for it")
                continue
            category, *attribute = ATTRIBUTE_OF_LABEL.get(box.label, (CATEGORY_OF_LABEL.get(box.label),))
            known |= {"category": category, "attributes": dict([attribute] if attribute else [])}
        if not native and isinstance(told.get("confidence"), float):
            known["confidence"] = LEVELS[bisect_right(LEVEL_BOUNDS, told["confidence"])]
            num_shares += 1
        lists["objects"].append(_entry(known, box, name))
    if not (data.pop(MERGED, False) and "rooms" in data and lists == _joined_lists(data)):
        data |= {key: entries for key, entries in lists.items() if entries or key not in data}  # null stays null
    if not native and names:
        notes.append(f"identifiers, stories and confidence of {len(names)} surfaces and objects supplied; no coreModel")
    if num_shares:
        notes.append(f"confidence of {num_shares} objects made low, medium or high")
    if scene.views or scene.mesh_path:
        notes.append(f"{len(scene.views)} views{' and the mesh' if scene.mesh_path else ''} left out")
    return data


def write_captured_room(scene: Scene, path: Path | str, notes: list[str] | None = None) -> None:
    """Write `captured_room(scene)`, whole or not at all, with sorted keys."""
    _write_json(path, captured_room(scene, notes))


def write_captured_structure(
    merged: Scene, rooms: list[Scene], path: Path | str, notes: list[str] | None = None
) -> None:
    """Write the scenes that `read_captured_structure` returns as one file again."""
    _write_json(path, captured_room(merged, notes) | {"rooms": [captured_room(room, notes) for room in rooms]})


# Reading --------------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(f"{path}: file is missing") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot read the file ({error})") from None
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES} bytes, which no captured room is; {EXPORT_AGAIN}")
    try:
        data = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: invalid or truncated JSON ({error.msg}); {EXPORT_AGAIN}") from None
    except ValueError as error:  # no UTF-8, a key twice, a number of thousands of digits
        raise ValueError(f"{path}: invalid JSON ({error}); {EXPORT_AGAIN}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested deeper than {MAX_DEPTH} levels; {EXPORT_AGAIN}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected an object with the keys of a CapturedRoom; {EXPORT_AGAIN}")
    _check_values(data, f"{path}: ")
    return data


def _unique_keys(pairs: list) -> dict:
    data = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f"the key {key[:80]!r} stands twice in one object")
        data[key] = value
    return data


def _check_values(value: dict | list, where: str, depth: int = 0) -> None:
    """Raise ValueError naming the first number that is not finite, or the place nested deeper than MAX_DEPTH."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{where[:200]} is nested deeper than {MAX_DEPTH} levels; {EXPORT_AGAIN}")
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, (dict, list)):
            _check_values(item, f"{where}{key}." if isinstance(value, dict) else f"{where[:-1]}[{key}].", depth + 1)
        elif isinstance(item, float) and not math.isfinite(item):
            name = f"{where}{key}" if isinstance(value, dict) else f"{where[:-1]}[{key}]"
            raise ValueError(f"{name} is {item}, no finite number; {EXPORT_AGAIN}")


def _scene(data: object, scene_id: str, where: str) -> Scene:
    if not isinstance(data, dict):
        raise ValueError(f"{where.rstrip('. ')}: expected an object with the keys of a CapturedRoom; {EXPORT_AGAIN}")
    if isinstance(data.get("rooms"), list) and data["rooms"] and all(data.get(key) is None for key in LISTS):
        return _joined(data, scene_id, where)
    surfaces, boxes, attributes = [], [], {}
    for key, kind in SURFACES.items():
        for entry, place in _entries(data, key, where, required=key == "walls"):
            surfaces.append(_surface(entry, kind, place))
    for entry, place in _entries(data, "objects", where, required=True):
        category, detail = _enum(entry, "category", place)
        given = entry.get("attributes")
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"{place}.attributes: expected an object, got {given!r:.80}; {EXPORT_AGAIN}")
        box = _box(entry, place, _label(category, given))
        boxes.append(box)
        attributes[box.object_id] = _rest(entry, place) | {"category": {category: detail} if detail else category}
    _check_names([s.box for s in surfaces] + boxes, where)
    return Scene(
        scene_id, [], boxes, source="roomplan", surfaces=surfaces, attributes=attributes,
        metadata={key: value for key, value in data.items() if key != MERGED and (key not in LISTS or value is None)},
    )  # fmt: skip


def _joined(data: dict, scene_id: str, where: str) -> Scene:
    """The scene of a structure without lists of its own: all surfaces and objects of its rooms, in their order."""
    rooms = [_scene(room, scene_id, f"{where}rooms[{i}].") for i, room in enumerate(data["rooms"])]
    surfaces = [surface for room in rooms for surface in room.surfaces]
    boxes = [box for room in rooms for box in room.boxes]
    _check_names([s.box for s in surfaces] + boxes, where)
    attributes = {name: told for room in rooms for name, told in room.attributes.items()}
    return Scene(
        scene_id, [], boxes, source="roomplan", surfaces=surfaces, attributes=attributes, metadata=data | {MERGED: True}
    )


def _joined_lists(data: dict) -> dict:
    """The lists that an unchanged `_joined` scene is written with, were they written."""
    lists = captured_room(replace(_joined(data, "", ""), metadata={}))
    return {key: lists[key] for key in LISTS}


def _check_names(boxes: list[OrientedBox], where: str) -> None:
    names = set()
    for box in boxes:
        if box.object_id in names:
            raise ValueError(f"{where}identifier {box.object_id} is used twice; {EXPORT_AGAIN}")
        names.add(box.object_id)


def _entries(data: dict, key: str, where: str, required: bool) -> list[tuple[dict, str]]:
    """The entries of one list, each with its place for messages: `room.json: walls[2] (5D3777E0-..)`."""
    entries = [] if data.get(key) is None else data[key]
    if data.get(key) is None and required:
        raise ValueError(f"{where}the list `{key}` is missing, so this is no CapturedRoom; {EXPORT_AGAIN}")
    if not isinstance(entries, list):
        raise ValueError(f"{where}{key}: expected a list, got {entries!r:.80}; {EXPORT_AGAIN}")
    found = []
    for index, entry in enumerate(entries):
        place = f"{where}{key}[{index}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{place}: expected an object, got {entry!r:.80}; {EXPORT_AGAIN}")
        name = entry.get("identifier")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{place}.identifier: expected a text, got {name!r:.80}; {EXPORT_AGAIN}")
        found.append((entry, f"{place} ({name:.60})"))
    return found


def _surface(entry: dict, kind: str, place: str) -> Surface:
    found, detail = _enum(entry, "category", place)
    if found != kind:
        raise ValueError(f"{place}.category: expected {kind!r}, got {found!r}; {EXPORT_AGAIN}")
    attributes, detail = _rest(entry, place), dict(detail)
    parent = attributes.pop("parentIdentifier", None)
    if parent is not None and not isinstance(parent, str):
        raise ValueError(f"{place}.parentIdentifier: expected a text or null, got {parent!r:.80}; {EXPORT_AGAIN}")
    if "isOpen" in detail:
        attributes["isOpen"] = detail.pop("isOpen")
    if detail:
        attributes["category"] = detail
    box = _box(entry, place, kind)
    corners = entry.get("polygonCorners") or []
    polygon = None
    if corners:
        if not isinstance(corners, list) or len(corners) < 3:
            raise ValueError(f"{place}.polygonCorners: expected three corners or more, got {corners!r:.80}")
        local = np.array([_numbers(c, 3, f"{place}.polygonCorners[{i}]") for i, c in enumerate(corners)])
        matrix = _matrix(entry, place)
        polygon = (local @ matrix[:3, :3].T + matrix[:3, 3]) @ Z_UP.T
    return Surface(kind, box, parent or "", polygon, attributes)


def _box(entry: dict, place: str, label: str) -> OrientedBox:
    matrix = _matrix(entry, place)
    extent = _numbers(entry.get("dimensions"), 3, f"{place}.dimensions")
    if min(extent) < 0:
        raise ValueError(f"{place}.dimensions: expected lengths of at least 0 m, got {extent}; {EXPORT_AGAIN}")
    # A floor keeps its axes, as its third one is up. Of all else y and z change places, as the frame's do.
    rotation = Z_UP @ matrix[:3, :3] if label == "floor" else Z_UP @ matrix[:3, :3] @ Z_UP.T
    if label != "floor":
        extent = [extent[0], extent[2], extent[1]]
    return OrientedBox(Z_UP @ matrix[:3, 3], extent, rotation, label, entry["identifier"])


def _matrix(entry: dict, place: str) -> np.ndarray:
    matrix = np.array(_numbers(entry.get("transform"), 16, f"{place}.transform")).reshape(4, 4, order="F")
    rotation = matrix[:3, :3]
    if np.abs(matrix[3] - [0, 0, 0, 1]).max() > RIGID_TOLERANCE:
        raise ValueError(f"{place}.transform: its last row is {matrix[3].tolist()}, not 0 0 0 1; {EXPORT_AGAIN}")
    if np.abs(rotation.T @ rotation - np.eye(3)).max() > RIGID_TOLERANCE or np.linalg.det(rotation) < 0:
        raise ValueError(f"{place}.transform: its axes are no rotation (orthonormal, right-handed); {EXPORT_AGAIN}")
    return matrix


def _numbers(values: object, count: int, place: str) -> list[float]:
    if (
        not isinstance(values, list)
        or len(values) != count
        or any(type(v) not in (int, float) or not abs(v) <= MAX_METRES for v in values)
    ):
        got = "nothing" if values is None else f"{values!r:.120}"
        raise ValueError(f"{place}: expected {count} numbers up to {MAX_METRES:g}, got {got}; {EXPORT_AGAIN}")
    return [float(v) for v in values]


def _enum(entry: dict, key: str, place: str) -> tuple[str, dict]:
    """(name, detail) of `{"door": {"isOpen": true}}` or of the bare text `door`."""
    value = entry.get(key)
    if isinstance(value, str):
        value = {value: {}}
    if isinstance(value, dict) and len(value) == 1:
        ((name, detail),) = value.items()
        if re.fullmatch(r"[A-Za-z][A-Za-z0-9]{0,63}", name) and isinstance(detail, dict):
            return name, detail
    raise ValueError(f'{place}.{key}: expected one name, as {{"wall": {{}}}}, got {value!r:.80}; {EXPORT_AGAIN}')


def _rest(entry: dict, place: str) -> dict:
    """What neither a box nor a polygon holds, under the file's keys; enums without detail as their bare name."""
    used = ("identifier", "category", "dimensions", "transform", "polygonCorners")
    rest = {key: value for key, value in entry.items() if key not in used or (key, value) == ("polygonCorners", None)}
    if rest.get("confidence") is not None:
        name, detail = _enum(entry, "confidence", place)
        rest["confidence"] = {name: detail} if detail else name
    return rest


def _label(category: object, attributes: dict | None) -> str:
    if isinstance(category, dict):
        (category,) = category
    for label, (owner, key, value) in ATTRIBUTE_OF_LABEL.items():
        if category == owner and (attributes or {}).get(key) == value:
            return label
    if category not in LABEL_OF_CATEGORY and category:  # a category of a later RoomPlan: airFryer -> air_fryer
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", category).lower()
    return LABEL_OF_CATEGORY.get(category, "")


# Writing --------------------------------------------------------------------------------------------------------------


def _identifier(box: OrientedBox, index: int, scene: Scene) -> str:
    """The box's own name where it is a UUID, else one that is the same whenever the same scene is written."""
    if re.fullmatch(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", box.object_id):
        return box.object_id
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{scene.scene_id}/{index}/{box.object_id}")).upper()


def _surface_entry(surface: Surface, name: str, parent: str, native: bool) -> dict:
    told = surface.attributes
    known = dict(told) if native and told else SUPPLIED | {"completedEdges": [], "curve": None}
    detail = known.pop("category", {}) | ({"isOpen": known.pop("isOpen")} if "isOpen" in known else {})
    if surface.kind == "door" and not (native and told):
        detail = {"isOpen": bool(told.get("isOpen", False))}
    known |= {"category": {surface.kind: detail}, "parentIdentifier": parent or None}
    entry = _entry(known, surface.box, name)
    corners = [] if surface.polygon is None else surface.polygon
    if len(corners):
        matrix = np.reshape(entry["transform"], (4, 4), order="F")
        corners = np.linalg.solve(matrix[:3, :3], (corners @ Z_UP - matrix[:3, 3]).T).T.round(15)
    if not len(corners) and "polygonCorners" in entry:
        return entry  # null in its file
    return entry | {"polygonCorners": [[_number(v) for v in corner] for corner in corners]}


def _entry(known: dict, box: OrientedBox, name: str) -> dict:
    """What surfaces and objects have in common; `known` are the keys besides the geometry."""
    floor = box.label == "floor"
    matrix = np.eye(4)
    matrix[:3, :3] = Z_UP.T @ box.rotation if floor else Z_UP.T @ box.rotation @ Z_UP
    matrix[:3, 3] = Z_UP.T @ box.center
    extent = box.extent if floor else box.extent[[0, 2, 1]]
    known = {
        key: {value: {}} if key in ("category", "confidence") and isinstance(value, str) else value
        for key, value in known.items()
    }
    return known | {"identifier": name, "dimensions": [_number(v) for v in extent], "transform": _flat(matrix)}


def _flat(matrix: np.ndarray) -> list:
    """The numbers of a matrix, column by column."""
    return [_number(v) for v in matrix.flatten(order="F")]


def _number(value: float) -> int | float:
    """Whole numbers without a point, as Apple's encoder writes them."""
    return int(value) if float(value).is_integer() else float(value)


def _write_json(path: Path | str, data: dict) -> None:
    write_whole(path, json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n")
