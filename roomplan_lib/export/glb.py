"""A scene as binary glTF, which browsers and Blender open. Needs trimesh."""

from __future__ import annotations

from pathlib import Path

from roomplan_lib.export.meshes import GROUP_COLORS, room_parts
from roomplan_lib.export.usdz import y_up_transform
from roomplan_lib.files import new_file
from roomplan_lib.scenes import Scene
from roomplan_lib.scenes.roomplan import Z_UP

NEEDS = "needs the package trimesh: pip install 'roomplan_lib[export]'"


def write_glb(scene: Scene, path: Path | str, notes: list[str] | None = None) -> None:
    """Write a scene's meshes as one GLB file: metres, y up, a node a part with `category` and `group` in its extras.

    notes: as of `room_parts`. The file is written whole or not at all. Raises ValueError for an empty scene or without
    trimesh.
    """
    try:
        import trimesh
        from trimesh.visual.material import PBRMaterial
    except ImportError:
        raise ValueError(f"GLB {NEEDS}") from None
    materials = {
        group: PBRMaterial(
            name=group, baseColorFactor=color, metallicFactor=0.0, roughnessFactor=0.8, doubleSided=True,
            alphaMode="BLEND" if color[3] < 1 else "OPAQUE",
        )
        for group, color in GROUP_COLORS.items()
    }  # fmt: skip
    room = trimesh.Scene(base_frame="Room", metadata={"scene_id": scene.scene_id})
    for part in room_parts(scene, notes):
        mesh = trimesh.Trimesh(
            vertices=part.vertices @ Z_UP,
            faces=part.quads[:, [[0, 1, 2], [0, 2, 3]]].reshape(-1, 3),
            process=False,
            visual=trimesh.visual.TextureVisuals(material=materials[part.group]),
            metadata={"category": part.category, "group": part.group},
        )
        room.add_geometry(mesh, node_name=part.name, geom_name=part.name, transform=y_up_transform(part))
    with new_file(path) as file:
        file.write(room.export(file_type="glb"))
