"""What may be written, for machines: grammars and JSON Schemas, all from `spec`.

Numbers are given by their written form, digit by digit, so that a grammar holds exactly what the writer writes. Do not
decode by the JSON Schema in their place: engines differ about ranges with negative numbers, and some take 1E400.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from roomplan_lib.actions.spec import (
    CATEGORY,
    CATEGORY_FORM,
    COMPONENT,
    MAX_CATEGORY,
    MAX_ITEMS,
    MAX_SCENE,
    PLAIN_SCENE_FORM,
    PLAN_VERBS,
    READ_LIMIT,
    SCENE,
    VERBS,
    Action,
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
from roomplan_lib.actions.text import format_action, require_codec, word_text
from roomplan_lib.scenes import CATEGORIES

KINDS = ("lark", "gbnf", "json_schema")
ALL_VERBS = (*VERBS, PlanRoom.verb, ActionList.verb)
ANY_CATEGORY = ("", *CATEGORIES)  # "": an anchor may leave its category out
ANY_SCENE = "*"  # any scene id in plain ASCII, or none
_ANY_TEXT = {"type": "string", "maxLength": MAX_SCENE}
_STRING = re.compile(r'"(?:[^"\\]|\\.)*("|$)')  # the last one may be unfinished


def grammar(
    kind: str = "lark",
    verbs: Sequence[str] = ALL_VERBS,
    scene: str | None = None,
    categories: Sequence[str] | None = ANY_CATEGORY,
    codec: str = "m2",
    max_items: int = MAX_ITEMS,
    items: Sequence[str] | None = None,
) -> str:
    """Every text that `format_action` may write, as a grammar: lark (llguidance), gbnf (xgrammar) or json_schema.

    verbs: the actions allowed; "plan_room" for a room, "list" for an array of actions. scene: None leaves it out, as a
    model does; an id binds it; "*" takes any or none. categories: those of an anchor, "" among them where it may have
    none; None for any word or none. items: verbs inside a plan or list, of which there are at most max_items; None for
    all that may stand there. Raises ValueError for an unknown name or a combination that allows nothing.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "json_schema":
        return json.dumps(json_schema(verbs, scene, categories, codec, max_items, items))
    _check(verbs, scene, categories, codec, max_items, items)
    rules = _Rules(kind, scene, categories, codec)
    alternatives = []
    for verb in verbs:
        if verb == PlanRoom.verb:
            alternatives.append(rules.plan(items or PLAN_VERBS, max_items))
        elif verb == ActionList.verb:
            alternatives.append(rules.several(items or tuple(VERBS), max_items, in_plan=False))
        else:
            alternatives.append(rules.action(verb, in_plan=False))
    start, sign = ("start", ":") if kind == "lark" else ("root", "::=")
    return "".join(
        f"{name} {sign} {body}\n" for name, body in {start: " | ".join(alternatives), **rules.bodies}.items()
    )


@dataclass(frozen=True)
class ActionGrammar:
    """A grammar that can be had for fewer items, so that what is written ends within its tokens.

    The fields are the arguments of `grammar`, with tuples for its sequences. Raises ValueError as `grammar` does.
    """

    kind: str = "lark"
    verbs: tuple[str, ...] = ALL_VERBS
    scene: str | None = None
    categories: tuple[str, ...] | None = ANY_CATEGORY
    codec: str = "m2"
    max_items: int = MAX_ITEMS
    items: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check(self.verbs, self.scene, self.categories, self.codec, self.max_items, self.items)

    def text(self, max_items: int | None = None) -> str:
        """The grammar; with fewer items in a plan or list where `max_items` is given."""
        max_items = max_items or self.max_items
        return grammar(self.kind, self.verbs, self.scene, self.categories, self.codec, max_items, self.items)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens that hold any text with at most one item and the end of the sequence, whatever the tokenizer.

        That is the longest such text in bytes: no token of a text is shorter than a byte.
        """
        return max(len(self._longest(verb).encode()) for verb in self.verbs) + 1

    def require(self, max_new_tokens: int) -> None:
        """Raises ValueError when `max_new_tokens` cannot hold every text of one item."""
        if max_new_tokens < self.num_tokens:
            one = "one action" if {PlanRoom.verb, ActionList.verb}.isdisjoint(self.verbs) else "a plan or list of one"
            raise ValueError(
                f"max_new_tokens: {max_new_tokens} may be too few for {one}, "
                f"which takes up to {self.num_tokens}; allow at least {self.num_tokens}"
            )

    def num_begun(self, text: str) -> int:
        """How many items a plan or list has that begins with `text`, at least; 1 where that says nothing."""
        return 1 + _STRING.sub('""', text).count("]," if self.codec == "rows" else "},")

    def _longest(self, verb: str) -> str:
        scene = "x" * MAX_SCENE if self.scene == ANY_SCENE else self.scene or ""
        if verb == PlanRoom.verb:
            items = [_longest_action(item, "", self.categories) for item in self.items or PLAN_VERBS]
            texts = [format_action(PlanRoom((item,), scene), self.codec) for item in items]
        elif verb == ActionList.verb:
            items = [_longest_action(item, scene, self.categories) for item in self.items or VERBS]
            texts = [format_action(ActionList((item,)), self.codec) for item in items]
        else:
            texts = [format_action(_longest_action(verb, scene, self.categories), self.codec)]
        return max(texts, key=len)


def _longest_action(verb: str, scene: str, categories: Sequence[str] | None) -> Action:
    """The action of the verb that has the longest text: all its keys, its longest numbers and words."""
    values = {}
    for row in action_fields(verb):
        if row.value is SCENE:
            value = scene
        elif row.value is CATEGORY:
            value = "x" * MAX_CATEGORY if categories is None else max(categories, key=len)
        elif row.value is COMPONENT:
            value = (-0.6, -0.8, 0.0)
        elif isinstance(row.value, Word):
            value = max(row.value.words, key=len)
        else:
            number = max(row.value.low, row.value.high, key=lambda steps: len(str(steps)))
            number = number if row.value.whole else number / 100
            value = (number,) * row.count if row.count else number
        values[row.attribute] = value
    return VERBS[verb](**values)


def json_schema(
    verbs: Sequence[str] = ALL_VERBS,
    scene: str | None = ANY_SCENE,
    categories: Sequence[str] | None = ANY_CATEGORY,
    codec: str = "m2",
    max_items: int = MAX_ITEMS,
    items: Sequence[str] | None = None,
) -> dict:
    """JSON Schema (draft 2020-12) of the same texts; arguments as of `grammar`, any scene being the default."""
    _check(verbs, scene, categories, codec, max_items, items)
    build = _row_schema if codec == "rows" else _object_schema
    scenes = None if scene is None else {"const": scene} if scene != ANY_SCENE else _ANY_TEXT

    def several(allowed: Sequence[str], in_plan: bool) -> dict:
        parts = [build(verb, None if in_plan else scenes, categories, codec) for verb in allowed]
        return {"type": "array", "maxItems": max_items, "items": {"anyOf": parts}}

    parts = []
    for verb in verbs:
        if verb == ActionList.verb:
            parts.append(several(items or tuple(VERBS), False))
        elif verb != PlanRoom.verb:
            parts.append(build(verb, scenes, categories, codec))
        elif codec == "rows":
            parts.append(_array([{"const": verb}, several(items or PLAN_VERBS, True)]))
        else:
            keys = {"action": {"const": verb}} | ({"scene": scenes} if scenes else {})
            keys["actions"] = several(items or PLAN_VERBS, True)
            parts.append(_closed(keys, set(keys) - ({"scene"} if scene == ANY_SCENE else set())))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "anyOf": parts}


def seed_schema() -> dict:
    """JSON Schema of the reference's anchor, which stays valid input: no category, any decimals, flat extents.

    An extent of two numbers is the width and height of a plane. The parser also wants a unit normal.
    """
    number = {"type": "number", "minimum": -READ_LIMIT, "maximum": READ_LIMIT}
    length = {"type": "number", "exclusiveMinimum": 0, "maximum": READ_LIMIT}
    keys = {
        "action": {"const": PlaceAnchor.verb},
        "scene": _ANY_TEXT,
        "center": _array([number] * 3),
        "normal": _array([_number_schema(COMPONENT, "m2")] * 3),
        "extent": {"anyOf": [_array([length] * 2), _array([length] * 3)]},
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_closed(keys, set(keys))}


def _check(verbs, scene, categories, codec, max_items, items) -> None:
    require_codec(codec)
    for name, given, known in (("verbs", verbs, ALL_VERBS), ("items", items or (), tuple(VERBS))):
        unknown = [verb for verb in given if verb not in known]
        if unknown or (name == "verbs" and not given):
            raise ValueError(f"{name}: expected some of {', '.join(known)}, got {list(given)}")
    if PlanRoom.verb in verbs and (misplaced := [verb for verb in items or () if verb not in PLAN_VERBS]):
        raise ValueError(f"items: {misplaced} have no place in a plan_room")
    if categories is not None:
        if not categories:
            raise ValueError('categories: none is left; "" stands for an anchor without one, None for any word')
        for category in categories:
            word_text(category, CATEGORY, "categories")
    if scene == "" or codec == "rows" and scene is not None:
        raise ValueError(f"scene: {scene!r} cannot be bound; None leaves it out, which codec rows always does")
    if scene not in (None, ANY_SCENE):
        word_text(scene, SCENE, "scene")
    if not 1 <= max_items <= MAX_ITEMS:
        raise ValueError(f"max_items: expected 1 to {MAX_ITEMS}, got {max_items}")


class _Rules:
    """Rule bodies by name. Literals, choices and repetitions read the same in Lark and in GBNF; characters do not."""

    def __init__(self, kind: str, scene: str | None, categories: Sequence[str] | None, codec: str) -> None:
        self.kind, self.scene, self.categories, self.codec = kind, scene, categories, codec
        self.bodies: dict[str, str] = {}

    def plan(self, verbs: Sequence[str], max_items: int) -> str:
        items = self.several(verbs, max_items, in_plan=True)
        if self.codec == "rows":
            return _sequence('["plan_room",', [items], "]")
        return _sequence('{"action":"plan_room"', [*self.scene_key(), _quoted(',"actions":'), items], "}")

    def several(self, verbs: Sequence[str], max_items: int, in_plan: bool) -> str:
        name = f"{'plan' if in_plan else 'list'}_item"
        self.bodies[name] = " | ".join(self.action(verb, in_plan) for verb in verbs)
        rest = f' ("," {name}){{0,{max_items - 1}}}' if max_items > 1 else ""
        return _sequence("[", [f"({name}{rest})?"], "]")

    def action(self, verb: str, in_plan: bool) -> str:
        """The name of the rule for one action; in a plan it has no scene of its own."""
        with_scene = self.scene is not None and not in_plan
        name = f"{verb}_of_scene" if with_scene else verb
        if name not in self.bodies:
            self.bodies[name] = self.row(verb) if self.codec == "rows" else self.object(verb, with_scene)
        return name

    def object(self, verb: str, with_scene: bool) -> str:
        parts = []
        for row in action_fields(verb):
            if row.value is SCENE:
                parts += self.scene_key() if with_scene else []
                continue
            key = [_quoted(f',"{row.key}":'), self.cells(row)]
            required = (
                row.required or row.value is CATEGORY and self.categories is not None and "" not in self.categories
            )
            if row.value is CATEGORY and self.categories == ("",):
                continue
            parts += key if required else [f"({' '.join(key)})?"]
        return _sequence(f'{{"action":"{verb}"', parts, "}")

    def row(self, verb: str) -> str:
        head = self.anchor_head() if verb == PlaceAnchor.verb else _quoted(f'["{verb}",')
        parts = []
        for row in row_fields(verb):
            cell = self.cells(row)
            parts.append(f'"," {cell}' if row.required else f'("," {cell})?')
        parts[0] = parts[0].removeprefix('"," ')
        return _sequence("", [head, *parts], "]")

    def anchor_head(self) -> str:
        """Bracket, category and comma in one, as the heads of the other rows: llguidance reads whole literals."""
        name = "anchor_head"
        if self.categories is not None:
            self.bodies[name] = " | ".join(_quoted(f"[{json.dumps(word)},") for word in self.categories)
        elif self.kind == "lark":
            self.bodies[name] = rf'/\["({_regex([CATEGORY_FORM])})?",/'
        else:
            self.bodies[name] = " ".join([_quoted('["'), f"({self.characters([CATEGORY_FORM])})?", _quoted('",')])
        return name

    def cells(self, row: ActionField) -> str:
        """A field's value; several numbers stand in an array, and in a row of their own."""
        if not row.count:
            return self.value(row.value)
        if row.value is COMPONENT:
            return _sequence("[", [self.direction()], "]")
        cells = ' "," '.join([self.value(row.value)] * row.count)
        return cells if self.codec == "rows" else _sequence("[", [cells], "]")

    def direction(self) -> str:
        if "direction" not in self.bodies:
            self.bodies["direction"] = self.characters(_direction_forms(self.codec))
        return "direction"

    def scene_key(self) -> list[str]:
        if self.scene is None:
            return []
        key = _quoted(',"scene":')
        if self.scene == ANY_SCENE:
            return [f"({key} {self.value(SCENE)})?"]
        return [key, _quoted(json.dumps(self.scene))]

    def value(self, value: Number | Word) -> str:
        """The name of the rule for a class of values."""
        if value.name not in self.bodies:
            self.bodies[value.name] = self.value_body(value)
        return value.name

    def value_body(self, value: Number | Word) -> str:
        quote = _quoted('"')
        if isinstance(value, Number):
            return self.characters(_number_forms(value, self.codec))
        if value is SCENE:
            return f"{quote} {self.characters([PLAIN_SCENE_FORM])} {quote}"
        if value is CATEGORY and self.categories is None:
            return f"{quote} {self.characters([CATEGORY_FORM])} {quote}"
        words = value.words if value is not CATEGORY else [word for word in self.categories if word]
        return " | ".join(_quoted(json.dumps(word)) for word in words)

    def characters(self, forms: Sequence[Sequence[str]]) -> str:
        """Alternative sequences of single characters and [classes]."""
        if self.kind == "lark":
            return f"/{_regex(forms)}/"
        return " | ".join(" ".join(p if p.startswith("[") else _quoted(p) for p in form) for form in forms)


def number_regex(number: Number, codec: str = "m2") -> str:
    """The written forms of a class of numbers, as a regular expression."""
    return _regex(_number_forms(number, codec))


def _regex(forms: Sequence[Sequence[str]]) -> str:
    return "|".join("".join(f"\\{piece}" if piece == "." else piece for piece in form) for form in forms)


def _sequence(opening: str, parts: list[str], closing: str) -> str:
    """Rule parts between two literals; literals that touch become one."""
    return " ".join([*([_quoted(opening)] if opening else []), *parts, _quoted(closing)]).replace('" "', "")


def _quoted(literal: str) -> str:
    return json.dumps(literal)


def _number_forms(number: Number, codec: str) -> list[list[str]]:
    """The written forms of a class of numbers: alternatives of characters and [digit ranges]."""
    dotted = not number.whole and codec != "cm"
    negative = [["-", *form] for form in _forms(1, -number.low, dotted)]
    return _forms(max(number.low, 0), number.high, dotted) + negative


def _direction_forms(codec: str) -> list[list[str]]:
    """The written forms of normals, x,y,z without brackets; for each x the range of y that makes it a unit vector."""
    dotted, high = codec != "cm", COMPONENT.high
    zero, one = (_forms(value, value, dotted)[0] for value in (0, high))
    forms = [[*zero, ",", *zero, ",", *sign, *one] for sign in ("", "-")]
    for x in range(high + 1):
        span = [y for y in range(high + 1) if is_direction((x, y, 0))]
        signed = [
            [*s, *form] for s, low in (("", span[0]), ("-", max(span[0], 1))) for form in _forms(low, span[-1], dotted)
        ]
        for sign in ("", "-") if x else ("",):
            forms += [[*sign, *_forms(x, x, dotted)[0], ",", *y, ",", *zero] for y in signed]
    return forms


def _forms(low: int, high: int, dotted: bool) -> list[list[str]]:
    """Whole numbers from low to high (from 0), or, `dotted`, as many hundredths."""
    forms, width = [], 3 if dotted else 1
    while low <= high:
        last = min(high, 10**width - 1)
        for digits in _digit_forms(f"{low:0{width}d}", f"{last:0{width}d}") if low <= last else []:
            forms.append([*digits[:-2], ".", *digits[-2:]] if dotted else digits)
        low, width = max(low, last + 1), width + 1
    return forms


def _digit_forms(low: str, high: str) -> list[list[str]]:
    """Digit by digit, the numbers from low to high, which have equally many digits."""
    if not low:
        return [[]]
    first, last, rest = int(low[0]), int(high[0]), len(low) - 1
    if first == last:
        return [[low[0], *form] for form in _digit_forms(low[1:], high[1:])]
    before, after = [], []
    if low[1:] != "0" * rest:
        before, first = [[low[0], *form] for form in _digit_forms(low[1:], "9" * rest)], first + 1
    if high[1:] != "9" * rest:
        after, last = [[high[0], *form] for form in _digit_forms("0" * rest, high[1:])], last - 1
    middle = [] if first > last else [[str(first) if first == last else f"[{first}-{last}]"] + ["[0-9]"] * rest]
    return before + middle + after


def _object_schema(verb: str, scene: dict | None, categories: Sequence[str] | None, codec: str) -> dict:
    keys, required = {"action": {"const": verb}}, {"action"}
    for row in action_fields(verb):
        if row.value is SCENE and scene is None:
            continue
        keys[row.key] = scene if row.value is SCENE else _field_schema(row, categories, codec)
        bound = row.value is SCENE and "const" in scene
        named = row.value is CATEGORY and categories is not None and "" not in categories
        if row.required or bound or named:
            required.add(row.key)
    return _closed(keys, required)


def _row_schema(verb: str, scene: None, categories: Sequence[str] | None, codec: str) -> dict:
    """A row with and without the field that may be left out."""
    head = _word_schema(CATEGORY, categories) if verb == PlaceAnchor.verb else {"const": verb}
    table = row_fields(verb)
    lengths = [table, [row for row in table if row.required]]
    rows = [
        _array([head, *(_value_schema(row.value, categories, codec) for row in part for _ in range(row.count or 1))])
        for part in lengths[: 1 if len(lengths[0]) == len(lengths[1]) else 2]
    ]
    return rows[0] if len(rows) == 1 else {"anyOf": rows}


def _field_schema(row: ActionField, categories: Sequence[str] | None, codec: str) -> dict:
    schema = _value_schema(row.value, categories, codec)
    return (_array([schema] * row.count) if row.count else schema) | {"description": row.doc}


def _value_schema(value: Number | Word, categories: Sequence[str] | None, codec: str) -> dict:
    return _number_schema(value, codec) if isinstance(value, Number) else _word_schema(value, categories)


def _number_schema(number: Number, codec: str) -> dict:
    if number.whole or codec == "cm":
        return {"type": "integer", "minimum": number.low, "maximum": number.high}
    return {"type": "number", "minimum": number.low / 100, "maximum": number.high / 100}


def _word_schema(word: Word, categories: Sequence[str] | None) -> dict:
    if word is CATEGORY and categories is None:
        return {"type": "string", "pattern": f"^({''.join(CATEGORY_FORM)})?$"}
    return {"enum": list(categories if word is CATEGORY else word.words)}


def _array(parts: list[dict]) -> dict:
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts), "maxItems": len(parts)}


def _closed(keys: dict[str, dict], required: set[str]) -> dict:
    return {
        "type": "object",
        "properties": keys,
        "required": [key for key in keys if key in required],
        "additionalProperties": False,
    }
