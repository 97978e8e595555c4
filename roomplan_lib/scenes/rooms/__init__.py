"""Procedural rooms: furnished, rendered and written in the layout of ARKitScenes, so that its reader opens them.

`layout` decides what stands where, `furniture`, `structure` and `shapes` build it, `make` puts it
together as a `plan.Room`; `render` makes pictures, `camera` walks through, `write` makes the files.
"""

from roomplan_lib.scenes.rooms.make import make_room
from roomplan_lib.scenes.rooms.plan import Opening, Room, RoomObject
from roomplan_lib.scenes.rooms.write import write_rooms

__all__ = ["Opening", "Room", "RoomObject", "make_room", "write_rooms"]
