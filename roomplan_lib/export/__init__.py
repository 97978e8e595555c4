"""Rooms as files for other programs, from any file or folder that holds a room."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from roomplan_lib.actions import (
    CODECS,
    Action,
    ActionError,
    ActionList,
    Move,
    PlanRoom,
    Remove,
    canonical,
    format_action,
    parse_action,
)
from roomplan_lib.actions.executor import RoomState, apply
from roomplan_lib.actions.rooms import plan_scene, room_actions
from roomplan_lib.actions.scripts import (
    BINS,
    lower_corner,
    read_scenescript,
    read_spatiallm,
    write_scenescript,
    write_spatiallm,
)
from roomplan_lib.actions.spec import PLAN_VERBS
from roomplan_lib.export.glb import write_glb
from roomplan_lib.export.usdz import write_usdz
from roomplan_lib.files import write_whole
from roomplan_lib.scenes import Scene, open_scene
from roomplan_lib.scenes.roomplan import (
    LISTS,
    captured_room,
    is_captured_room,
    read_captured_room,
    write_captured_room,
)
from roomplan_lib.scenes.text import read_json, read_text
from roomplan_lib.viz.floorplan import save_floor_plan

Room = Scene | Action | ActionList
# Writers of a scene: (scene, path, notes); of a plan: its text from (plan, notes, bins).
SCENE_WRITERS: dict[str, Callable[[Scene, Path, list[str]], None]] = {
    "capturedroom": lambda scene, path, notes: _write_captured_room(scene, path, notes),
    "usdz": write_usdz,
    "glb": write_glb,
    "svg": lambda scene, path, notes: save_floor_plan(scene, path, "svg"),
    "png": lambda scene, path, notes: save_floor_plan(scene, path, "png"),
}
PLAN_WRITERS: dict[str, Callable[[Action | ActionList, list[str], int], str]] = {
    "spatiallm": lambda plan, notes, bins: write_spatiallm(plan, notes),
    "spatiallm-bins": lambda plan, notes, bins: _quantised(plan, notes, bins),
    "scenescript": lambda plan, notes, bins: write_scenescript(plan, notes),
    "actions": lambda plan, notes, bins: format_action(canonical(plan)) + "\n",
}
FORMATS = (*SCENE_WRITERS, *PLAN_WRITERS)
# A line by which a script is known, whatever stands before it; of SpatialLM's, what it says is the group.
SCENESCRIPT_LINE = re.compile(r"^[ \t]*make_\w+[ \t]*,", re.MULTILINE)
SPATIALLM_LINE = re.compile(
    r"^[ \t]*(?:<\|layout_s\|>[ \t]*)?(?:wall|door|window|bbox)_\d+[ \t]*=[ \t]*\w+\((.*)", re.MULTILINE
)


def export_room(room: Room, format: str, path: Path | str, *, bins: int = BINS) -> list[str]:
    """Write a room, whole or not at all, in one of FORMATS; returns a sentence for all that is not in the file as it
    was: left out, made simpler or supplied.

    A list that moves or removes things is carried out, and the room that it leaves is written. bins: of the quantised
    script of SpatialLM. Raises ValueError for an unknown format, a room of which nothing is left to write, or numbers
    that the format cannot hold.
    """
    notes: list[str] = []
    path = Path(path)
    if isinstance(room, ActionList) and any(isinstance(action, Move | Remove) for action in room.actions):
        scene_id = next((action.scene for action in room.actions if action.scene), "")
        state, problems = apply(RoomState(scene=scene_id), room)
        notes += [f"action {problem.item} not carried out: {problem.reason}" for problem in problems]
        room = state.to_plan()
    if format in SCENE_WRITERS:
        scene = room if isinstance(room, Scene) else plan_scene(room, notes)
        if not scene.surfaces and not scene.boxes:
            raise _nothing_left(notes)
        SCENE_WRITERS[format](scene, path, notes)
        if format != "capturedroom":
            _note_unshown(scene, format, notes)
    elif format in PLAN_WRITERS:
        plan = room_actions(room, notes) if isinstance(room, Scene) else room
        items = plan.actions if isinstance(plan, ActionList | PlanRoom) else (plan,)
        text = PLAN_WRITERS[format](plan, notes, bins)
        if not text or not any(item.verb in PLAN_VERBS for item in items):
            raise _nothing_left(notes)
        if format == "actions":
            notes.append("numbers rounded to two decimals, items put in canonical order")
        write_whole(path, text)
    else:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    return notes


def load_room(
    path: Path | str,
    notes: list[str] | None = None,
    *,
    index: int | None = None,
    bins: int = BINS,
    codec: str = "m2",
) -> Room:
    """The room of a scene folder, a CapturedRoom, an action text, a SpatialLM or SceneScript script, or a predictions
    file of which `index` chooses the row.

    Files are told apart by what they hold. codec: of an action text; a prediction names its own. A SpatialLM script
    without a decimal point is in `bins`, as the model writes it, else in metres. notes: gets a sentence for each part
    of a script that is left out. Raises ValueError that names the file for anything else, and for text that is no
    action.
    """
    path, notes = Path(path), [] if notes is None else notes
    if path.is_dir():
        return open_scene(path)
    if index is not None:
        return _prediction(path, index)
    if path.suffix.lower() == ".jsonl":
        raise ValueError(f"{path}: holds a prediction a row; choose one by its index (--index), from 0")
    text = read_text(path).strip()
    if text.startswith("{") and is_captured_room(read_json(path)):
        return read_captured_room(path)
    if text[:1] in ("{", "["):
        return _action(text, path, codec)
    if SCENESCRIPT_LINE.search(text):
        room = read_scenescript(text, notes)
    elif entities := SPATIALLM_LINE.findall(text):
        if quantised := not any("." in entity for entity in entities):
            notes.append(f"all numbers are whole, so they are taken for bins of {bins}")
        room = read_spatiallm(text, notes, quantised=quantised, bins=bins)
    else:
        raise ValueError(f"{path}: no CapturedRoom, no action text, no SpatialLM or SceneScript script")
    if not room.actions:
        raise ValueError(f"{path}: the script has no wall, door, window or box ({'; '.join(notes[:3])})")
    return room


def _nothing_left(notes: list[str]) -> ValueError:
    return ValueError(f"no room to write: {'; '.join(notes) or 'nothing is placed'}")


def _write_captured_room(scene: Scene, path: Path, notes: list[str]) -> None:
    data = captured_room(scene, notes)
    if not any(data.get(key) for key in (*LISTS, "rooms")):
        raise _nothing_left(notes)
    write_captured_room(scene, path)


def _quantised(plan: Action | ActionList, notes: list[str], bins: int) -> str:
    offset = lower_corner(plan)
    notes.append(f"shifted by {(-offset).round(3).tolist()} m, rounded down to {bins} bins")
    return write_spatiallm(plan, notes, quantised=True, bins=bins, offset=offset)


def _prediction(path: Path, index: int) -> Action | ActionList:
    """The action of row `index`, counted from 0, in the frame in which the model wrote it."""
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    if not 0 <= index < len(lines):
        raise ValueError(f"{path}: no row {index}; it has {len(lines)}, counted from 0")
    try:
        row = json.loads(lines[index])
        text, scene_id, codec = row["prediction"], str(row["scene_id"]), row.get("codec", "m2")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: row {index} needs prediction and scene_id ({error!r})") from None
    if codec not in CODECS:
        raise ValueError(f"{path}: row {index}: codec: expected one of {', '.join(CODECS)}, got {codec!r:.80}")
    return _action(str(text), f"{path}, row {index}", codec).bound(scene_id)


def _action(text: str, where: Path | str, codec: str) -> Action | ActionList:
    action = parse_action(text, categories=None, codec=codec)
    if isinstance(action, ActionError):
        raise ValueError(f"{where}: neither a CapturedRoom nor an action: {action.reason}")
    return action


def _note_unshown(scene: Scene, format: str, notes: list[str]) -> None:
    """What meshes and drawings do not show of a scene."""
    if scene.source == "roomplan":
        notes.append("attributes, confidence, stories, sections and coreModel left out")
    if scene.views or scene.mesh_path:
        notes.append("views and mesh of the scan left out")
    curved = sum(bool(s.attributes.get("curve")) for s in scene.surfaces)
    if curved:
        notes.append(f"{curved} curved surfaces made flat")
    if format in ("svg", "png"):
        notes.append("heights left out: the plan shows the room from above; how doors open is drawn by convention")
