"""Actions to text and back, by the table of `spec`. What is read is not trusted: a reason comes back, never an error.

Codecs: `m2` writes metres with two decimals; `cm` writes whole hundredths in their place; `rows` writes an array in
place of an object, ["cabinet",1.20,-0.84,0.36,0.37,0.89,1.83,152] for category, center, extent and yaw of an anchor,
and the verb followed by its fields for the others.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from dataclasses import replace

from roomplan_lib.actions.spec import (
    CATEGORY,
    CATEGORY_FORM,
    COMPONENT,
    MAX_ITEMS,
    MAX_SCENE,
    PLAN_VERBS,
    SCENE,
    UNIT_TOLERANCE,
    VERBS,
    Action,
    ActionError,
    ActionField,
    ActionList,
    Number,
    PlaceAnchor,
    PlanRoom,
    Word,
    action_fields,
    is_direction,
    row_fields,
)
from roomplan_lib.scenes import CATEGORIES

CODECS = ("m2", "cm", "rows")
MAX_TEXT = 65_536  # characters; a longer text is refused unread
MAX_DIGITS = 18  # of a whole number that is read exactly; a longer one is out of every range
THIN = 0.01  # metres: thickness of an anchor whose extent is given as width and height


def format_action(action: Action | ActionList, codec: str = "m2") -> str:
    """The text of an action: compact, keys in the order of the table, `scene` and `category` only where known.

    The order of a plan's items is kept; `canonical` sets it. Raises ValueError for what the language cannot express:
    a number out of range or not finite, a tilted normal, an unknown word, too many items, and in `rows` a scene or a
    vertical normal.
    """
    require_codec(codec)
    write = _write_row if codec == "rows" else _write_object
    if isinstance(action, ActionList):
        return f"[{_write_items(action, tuple(VERBS), write, codec)}]"
    if not isinstance(action, PlanRoom):
        return write(action, codec)
    if any(item.scene for item in action.actions):
        raise ValueError("plan_room.actions: an item has a scene of its own; only the plan carries it")
    items = _write_items(action, PLAN_VERBS, write, codec)
    if codec == "rows":
        _refuse_scene(action)
        return f'["plan_room",[{items}]]'
    scene = f'"scene":{_scene_text(action.scene)},' if action.scene else ""
    return f'{{"action":"plan_room",{scene}"actions":[{items}]}}'


def action_record(action: Action | ActionList) -> dict | list:
    """The action as JSON data with all its digits, for files; `parse_action` reads its text (codec m2)."""
    if isinstance(action, ActionList):
        return [action_record(item) for item in action.actions]
    if isinstance(action, PlanRoom):
        scene = {"scene": action.scene} if action.scene else {}
        return {"action": action.verb, **scene, "actions": [action_record(item) for item in action.actions]}
    values = {row.key: getattr(action, row.attribute) for row in action_fields(action.verb)}
    return {"action": action.verb, **{key: value for key, value in values.items() if value not in (None, "")}}


def anchor_text(anchor: PlaceAnchor, codec: str = "m2") -> str:
    """Where an anchor is, without what it is: {"center":[...],"normal":[...],"extent":[...]}, as a question says it."""
    require_codec(codec)
    where = ("center", "normal", "extent")
    parts = [
        f'"{row.key}":{_write_value(anchor, row, codec)}' for row in action_fields(anchor.verb) if row.key in where
    ]
    return "{" + ",".join(parts) + "}"


def parse_action(
    text: str, categories: Collection[str] | None = CATEGORIES, codec: str = "m2"
) -> Action | ActionList | ActionError:
    """Reads an action, or a JSON array of actions, from model text or a file. Never raises on a text, never evaluates.

    categories: those that an anchor may have besides none; None for any word. Keys may come in any order; numbers may
    have any number of decimals and lie up to `READ_LIMIT` metres out. Time and memory are bounded by `MAX_TEXT`.
    """
    require_codec(codec)
    if len(text) > MAX_TEXT:
        return ActionError(f"text has {len(text)} characters, more than {MAX_TEXT}")
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        return ActionError(f"no JSON: {error}")
    reader = _Reader(categories, codec)
    try:
        return reader.row(data) if codec == "rows" else reader.top(data)
    except _Refused as refusal:
        return ActionError(str(refusal))


def place_digits(text: str, codec: str = "m2") -> list[tuple[int, int]]:
    """[start, end) in an action's text of x and of y of each centre and each end of a wall (in rows: the first end),
    from the character before the number, beside which a sign is or is not, to the decimetres."""
    require_codec(codec)
    before = r"\[\"[a-z0-9_]+\"" if codec == "rows" else r"\"(?:center|a|b)\":"
    number = r"([,\[]-?\d*)\d" if codec == "cm" else r"([,\[]-?\d+\.\d)\d*"
    return [match.span(k) for match in re.finditer(before + 2 * number, text) for k in (1, 2)]


def require_codec(codec: str) -> None:
    """Raises ValueError for a codec that is none of `CODECS`."""
    if codec not in CODECS:
        raise ValueError(f"codec: expected one of {', '.join(CODECS)}, got {codec!r}")


class _Refused(ValueError):
    """Why a text is no action; caught where reading began."""


class _Reader:
    """Reads decoded JSON into actions; every method raises _Refused with the reason."""

    def __init__(self, categories: Collection[str] | None, codec: str) -> None:
        self.categories, self.scale = categories, 100 if codec == "cm" else 1

    def top(self, data) -> Action | ActionList:
        if isinstance(data, list):
            return ActionList(tuple(self.object(item, tuple(VERBS)) for item in _items(data)))
        if not isinstance(data, dict) or data.get("action") != PlanRoom.verb:
            return self.object(data, tuple(VERBS))
        _require_keys(data, {"action", "scene", "actions"}, {"action", "actions"})
        items = tuple(self.object(item, PLAN_VERBS, scene=False) for item in _items(data["actions"]))
        return PlanRoom(items, self.word(data.get("scene", ""), SCENE, "scene"))

    def object(self, data, verbs: tuple[str, ...], scene: bool = True) -> Action:
        if not isinstance(data, dict):
            raise _Refused(f"expected a JSON object, got {_show(data)}")
        verb = data.get("action")
        if not isinstance(verb, str) or verb not in verbs:
            raise _Refused(f"action: expected one of {', '.join(verbs)}, got {_show(verb)}")
        table = [row for row in action_fields(verb) if scene or row.value is not SCENE]
        _require_keys(data, {"action", *(row.key for row in table)}, {row.key for row in table if row.required})
        values = {row.attribute: self.value(data[row.key], row) for row in table if row.key in data}
        return self.action(verb, values)

    def row(self, data) -> Action | ActionList:
        if not isinstance(data, list):
            raise _Refused(f"expected a JSON array, got {_show(data)}")
        if not data or isinstance(data[0], list):
            return ActionList(tuple(self.one_row(item, tuple(VERBS)) for item in _items(data)))
        if data[0] != PlanRoom.verb:
            return self.one_row(data, tuple(VERBS))
        if len(data) != 2:
            raise _Refused(f"plan_room: expected one array of rows, got {len(data) - 1} cells")
        return PlanRoom(tuple(self.one_row(item, PLAN_VERBS) for item in _items(data[1])))

    def one_row(self, data, verbs: tuple[str, ...]) -> Action:
        if not isinstance(data, list) or not data:
            raise _Refused(f"expected a row, got {_show(data)}")
        verb, values = data[0], {}
        if not isinstance(verb, str) or verb not in VERBS or verb == PlaceAnchor.verb:
            verb, values = PlaceAnchor.verb, {"category": self.word(verb, CATEGORY, "category")}
        if verb not in verbs:
            raise _Refused(f"{verb} has no place in a plan")
        table, cells = row_fields(verb), data[1:]
        for part in (table, [row for row in table if row.required]):
            if len(cells) == sum(row.count or 1 for row in part):
                break
        else:
            raise _Refused(f"{verb}: a row of {len(cells)} cells after its head has the wrong length")
        for row in part:
            taken, cells = cells[: row.count or 1], cells[row.count or 1 :]
            values[row.attribute] = self.value(taken if row.count else taken[0], row)
        if verb == PlaceAnchor.verb:
            angle = math.radians(values["yaw"])
            values["normal"] = (round(math.cos(angle), 2) + 0.0, round(math.sin(angle), 2) + 0.0, 0.0)
        return self.action(verb, values)

    def action(self, verb: str, values: dict) -> Action:
        cls = VERBS[verb]
        if cls is PlaceAnchor:
            values.setdefault("category", "")
            if abs(math.hypot(*values["normal"]) - 1) > UNIT_TOLERANCE + 1e-9:
                raise _Refused("normal: not a unit vector")
            if len(values["extent"]) == 2:
                level = abs(values["normal"][2]) < 0.5
                values["extent"] = (THIN, *values["extent"]) if level else (*values["extent"], THIN)
        elif verb == "measure":
            values.setdefault("target", None)
        return cls(**values)

    def value(self, data, row: ActionField):
        if isinstance(row.value, Word):
            return self.word(data, row.value, row.key)
        if not row.count:
            return self.number(data, row.value, row.key)
        counts = (2, 3) if row.key == "extent" else (row.count,)  # the reference code's planes have width and height
        if not isinstance(data, list) or len(data) not in counts:
            raise _Refused(f"{row.key}: expected {row.count} numbers, got {_show(data)}")
        return tuple(self.number(v, row.value, row.key) for v in data)

    def number(self, data, number: Number, key: str) -> float | int:
        if type(data) not in (int, float):
            raise _Refused(f"{key}: expected a number, got {_show(data)}")
        low, high = number.read
        value = data if number.whole else data / self.scale + 0.0  # + 0.0 turns -0.0 into 0.0
        if not low <= value <= high:
            raise _Refused(f"{key}: {value:.6g} is beyond {low:g} to {high:g}")
        if number.low > 0 and value <= 0:
            raise _Refused(f"{key}: must be positive, got {value:g}")
        if not number.whole:
            return value
        if int(value) != value:
            raise _Refused(f"{key}: expected a whole number, got {value:g}")
        return int(value)

    def word(self, data, word: Word, key: str) -> str:
        if not isinstance(data, str):
            raise _Refused(f"{key}: expected a string, got {_show(data)}")
        if not _is_word(data, word, self.categories):
            raise _Refused(f"{key}: {data!r:.80} is not {_expected(word, self.categories)}")
        return data


def _items(data) -> list:
    if not isinstance(data, list) or len(data) > MAX_ITEMS:
        raise _Refused(f"actions: expected an array of at most {MAX_ITEMS} actions, got {_show(data)}")
    return data


def _require_keys(data: dict, known: set[str], required: set[str]) -> None:
    for problem, keys in (("unknown", data.keys() - known), ("missing", required - data.keys())):
        if keys:
            raise _Refused(f"{problem} keys {sorted(keys)!s:.200}")


def _show(data) -> str:
    if isinstance(data, list | dict):
        return f"{'an array' if isinstance(data, list) else 'an object'} of {len(data)}"
    return f"{data!r:.80}"


def _unique_keys(pairs: list) -> dict:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a key stands twice")
    return keys


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _integer(digits: str) -> int | float:
    """A whole number; a long one as a float, since exact conversion takes time quadratic in the digits."""
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def _write_items(action: PlanRoom | ActionList, verbs: tuple[str, ...], write: Callable, codec: str) -> str:
    if len(action.actions) > MAX_ITEMS:
        raise ValueError(f"{action.verb}: {len(action.actions)} actions, more than {MAX_ITEMS}")
    for item in action.actions:
        if item.verb not in verbs:
            raise ValueError(f"{action.verb}: holds a {item.verb}, expected one of {', '.join(verbs)}")
    return ",".join(write(item, codec) for item in action.actions)


def _write_object(action: Action, codec: str) -> str:
    written = [
        f'"{row.key}":{_write_value(action, row, codec)}' for row in _present(action, action_fields(action.verb))
    ]
    return "{" + ",".join([f'"action":"{action.verb}"', *written]) + "}"


def _write_row(action: Action, codec: str) -> str:
    _refuse_scene(action)
    head = action.verb
    if isinstance(action, PlaceAnchor):
        if not action.level:
            raise ValueError(f"place_anchor.normal: {action.normal} is not level, so no yaw stands for it in a row")
        head = action.category
        if head in VERBS or head == PlanRoom.verb:
            raise ValueError(f"place_anchor.category: {head!r} is a verb, which a row cannot tell from a category")
        word_text(head, CATEGORY, "place_anchor.category")
        angle = math.degrees(math.atan2(action.normal[1], action.normal[0]))
        action = action if action.yaw is not None else replace(action, yaw=round(angle) % 360)
    cells = [_write_value(action, row, codec).strip("[]") for row in _present(action, row_fields(action.verb))]
    return "[" + ",".join([f'"{head}"', *cells]) + "]"


def _present(action: Action, table: tuple[ActionField, ...]) -> list[ActionField]:
    return [row for row in table if row.required or getattr(action, row.attribute) not in (None, "")]


def _write_value(action: Action, row: ActionField, codec: str) -> str:
    value, name = getattr(action, row.attribute), f"{action.verb}.{row.key}"
    if isinstance(row.value, Word):
        return word_text(value, row.value, name)
    if not row.count:
        return _number_text(value, row.value, name, codec)
    if len(value) != row.count:
        raise ValueError(f"{name}: expected {row.count} numbers, got {value}")
    text = f"[{','.join(_number_text(v, row.value, name, codec) for v in value)}]"
    if row.value is COMPONENT and not is_direction([_steps(v, row.value) for v in value]):
        raise ValueError(f"{name}: {value} is no unit vector, level or vertical; canonical() levels a tilted one")
    return text


def _number_text(value: float, number: Number, name: str, codec: str) -> str:
    if not math.isfinite(value) or not number.low <= (steps := _steps(value, number)) <= number.high:
        step = 1 if number.whole else 100
        raise ValueError(
            f"{name}: {value} cannot be written; the language has {number.low / step:g} to {number.high / step:g}"
        )
    if number.whole or codec == "cm":
        return str(steps)
    return f"{steps / 100:.2f}"


def _steps(value: float, number: Number) -> int:
    """The value as it is written, in steps of 1/100 or of 1."""
    return int(f"{value:.{0 if number.whole else 2}f}".replace(".", ""))


def word_text(value: str, word: Word, name: str) -> str:
    """The JSON string of a word. Raises ValueError with `name` for what is none of its class."""
    if not _is_word(value, word, None):
        raise ValueError(f"{name}: {value!r:.80} cannot be written; expected {_expected(word, None)}")
    return json.dumps(value)


def _scene_text(scene: str) -> str:
    return word_text(scene, SCENE, "scene")


def _refuse_scene(action: Action) -> None:
    if action.scene:
        raise ValueError(f"{action.verb}: codec rows has no place for a scene, got {action.scene!r}; leave it unbound")


def _is_word(value: str, word: Word, categories: Collection[str] | None) -> bool:
    if word is SCENE:
        return len(value) <= MAX_SCENE and value.isprintable()
    if word is CATEGORY:
        return not value or (
            bool(re.fullmatch("".join(CATEGORY_FORM), value)) if categories is None else value in categories
        )
    return value in word.words


def _expected(word: Word, categories: Collection[str] | None) -> str:
    if word is CATEGORY and categories is not None:
        return f"one of {len(categories)} known ones"
    return word.doc if word.words is None else f"one of {', '.join(word.words)}"
