"""The action language for people: Markdown from the same table as the parser and the grammars."""

from __future__ import annotations

from collections import Counter

from roomplan_lib.actions.grammar import number_regex
from roomplan_lib.actions.spec import (
    AMOUNT,
    CATEGORY,
    COMPONENT,
    CONFIDENCE,
    COORDINATE,
    DEGREES,
    INDEX,
    LENGTH,
    MAX_ITEMS,
    QUANTITY,
    REASON,
    SCENE,
    VERBS,
    Action,
    ActionField,
    ActionList,
    Number,
    PlanRoom,
    Word,
    action_fields,
)
from roomplan_lib.actions.text import CODECS, format_action
from roomplan_lib.scenes import CATEGORIES

_EXAMPLES = {
    COORDINATE: (1.2, -0.84, 0.36), LENGTH: (0.9, 2.1, 0.6), COMPONENT: (0.8, 0.6, 0.0), CONFIDENCE: (0.87,),
    AMOUNT: (1.85,), DEGREES: (37,), INDEX: (0, 3), SCENE: ("",), CATEGORY: ("cabinet",), QUANTITY: ("distance",),
    REASON: ("not_present",),
}  # fmt: skip


def language_docs() -> str:
    """Markdown: the verbs with their keys and an example in each codec, the classes of values, order and meaning."""
    parts = ["# The action language\n"]
    parts.append(
        "An action is one JSON object, written without spaces and with its keys in the order below; a JSON array holds "
        "several. Coordinates are metres, z up: in the reference frame of a sample's first view where a model writes "
        "(origin at the camera, y its heading), in the scene's own frame in files. A model leaves `scene` out and the "
        "program that asked fills it in. Reading takes the keys in any order, any number of decimals and coordinates "
        f"up to {COORDINATE.read[1]:g} m; a key twice, an unknown key, a number that is not finite or any other text "
        "is refused with a reason.\n"
    )
    for verb, cls in VERBS.items():
        parts.append(f"## {verb}\n\n{_summary(cls)}\n\n| key | value | | meaning |\n|---|---|---|---|\n{_table(verb)}")
        parts.append(_samples(_example(verb)))
    plan = PlanRoom((_example("place_wall"), _example("place_door"), _example("place_anchor")))
    parts.append(
        f"## {PlanRoom.verb}\n\n{_summary(PlanRoom)} `actions` holds at most {MAX_ITEMS} of the `place_` verbs without "
        f"`scene`.\n"
    )
    parts.append(_samples(plan))
    parts.append(f"## Lists\n\n{_summary(ActionList)} At most {MAX_ITEMS} of the verbs above except plan_room.\n")
    parts.append(_samples(ActionList((_example("place_anchor"), _example("remove")))))
    parts.append("## Values\n\n| class | written | codec m2 | meaning |\n|---|---|---|---|\n" + _values())
    parts.append(
        "A normal is level, x² + y² = 1 up to rounding and z = 0.00, or vertical, `[0.00,0.00,1.00]` or "
        "`[0.00,0.00,-1.00]`; no number is written -0.00. In codec cm whatever has two decimals is written as whole "
        "hundredths. In codec rows an anchor's normal is written as its yaw, and no scene is.\n"
    )
    parts.append(
        "## Order and numbers of items\n\nA plan lists walls, doors, windows, openings, anchors. Walls go "
        "counter-clockwise about the room from the one whose middle is nearest to the origin, each from `a` to `b` in "
        "that sense; what lies in walls goes by wall, then from `a` to `b`; anchors go from near to far (horizontally, "
        "to 0.1 m), equally far ones by category, x, y. `wall`, `target`, `from` and `to` are positions in this order, "
        "from 0: in a plan its own walls, in a single action the items of the room as it stands.\n"
    )
    parts.append(
        "## Canonical yaw\n\nThe yaw of an anchor is in [0, 180) degrees, since half a turn leaves a box as it is, and "
        "in [0, 90) where its level sides are equal at 1 cm. `normal` carries it; `yaw` is written only where it is "
        "given, and then rules.\n"
    )
    return "\n".join(parts)


def _summary(cls: type) -> str:
    return " ".join(cls.__doc__.split())


def _table(verb: str) -> str:
    lines = [f'| `action` | `"{verb}"` | | |']
    for row in action_fields(verb):
        lines.append(f"| `{row.key}` | {_value_name(row)} | {'' if row.required else 'optional'} | {row.doc} |")
    return "\n".join(lines) + "\n"


def _value_name(row: ActionField) -> str:
    return f"[{', '.join([row.value.name] * row.count)}]" if row.count else row.value.name


def _example(verb: str) -> Action:
    values, used = {}, Counter()
    for row in action_fields(verb):
        example = _EXAMPLES[row.value]
        start = used[row.value] % len(example)  # so that two fields of one class differ
        example = example[start:] + example[:start]
        values[row.attribute] = example[: row.count] if row.count else example[0]
        used[row.value] += 1
    return VERBS[verb](**values)


def _samples(action) -> str:
    return "```\n" + "".join(f"{codec + ':':<6}{format_action(action, codec)}\n" for codec in CODECS) + "```\n"


def _values() -> str:
    lines = []
    for value in _EXAMPLES:
        if isinstance(value, Number):
            step = 1 if value.whole else 100
            form = f"{value.low / step:g} to {value.high / step:g}, {'whole' if value.whole else 'two decimals'}"
            lines.append(
                f"| {value.name} | {form} | `{number_regex(value).replace('|', chr(92) + '|')}` | {value.doc} |"
            )
        else:
            lines.append(f"| {value.name} | {_words(value)} | | {value.doc} |")
    return "\n".join(lines) + "\n"


def _words(word: Word) -> str:
    if word is SCENE:
        return "a string"
    return ", ".join(f"`{name}`" for name in (CATEGORIES if word is CATEGORY else word.words))
