"""Procedural rooms: furnished, rendered and written in the layouts of ARKitScenes and ScanNet, for their own readers.

`layout` decides what stands where, `furniture`, `structure` and `shapes` build it, `make` puts it
together as a `plan.Room`; `render` makes pictures, `camera` walks through, `write` and `scannet` make the files of one
room, `collection` those of many.
"""

from roomplan_lib.scenes.rooms.make import make_room
from roomplan_lib.scenes.rooms.plan import Opening, Room, RoomObject
from roomplan_lib.scenes.rooms.scannet import write_scannet_rooms
from roomplan_lib.scenes.rooms.write import write_rooms

__all__ = ["Opening", "Room", "RoomObject", "make_room", "write_rooms", "write_scannet_rooms"]
