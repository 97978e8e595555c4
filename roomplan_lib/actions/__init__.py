"""The action language: what the model writes, read back without trust, put in order, carried out.

`spec` is the language, one dataclass per verb; `text` writes and reads it, `order` sets the canonical order, `grammar`
and `docs` derive JSON Schema, grammars and documentation, `executor` applies actions to a room, `decoding` keeps a
model to a grammar, `rooms` and `scripts` turn scenes and other programs' layout texts into actions and back.
"""

from roomplan_lib.actions.order import canonical
from roomplan_lib.actions.spec import (
    Action,
    ActionError,
    ActionList,
    Measure,
    Move,
    NoAction,
    PlaceAnchor,
    PlaceDoor,
    PlaceOpening,
    PlaceWall,
    PlaceWindow,
    PlanRoom,
    Remove,
    anchor_from_box,
)
from roomplan_lib.actions.text import CODECS, action_record, anchor_text, format_action, parse_action

__all__ = [
    "CODECS",
    "Action",
    "ActionError",
    "ActionList",
    "Measure",
    "Move",
    "NoAction",
    "PlaceAnchor",
    "PlaceDoor",
    "PlaceOpening",
    "PlaceWall",
    "PlaceWindow",
    "PlanRoom",
    "Remove",
    "action_record",
    "anchor_from_box",
    "anchor_text",
    "canonical",
    "format_action",
    "parse_action",
]
