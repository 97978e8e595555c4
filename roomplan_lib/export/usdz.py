"""A scene as USDZ, which Quick Look, Blender and the USD tools open. Needs usd-core."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import numpy as np

from roomplan_lib.export.meshes import GROUP_COLORS, Part, room_parts
from roomplan_lib.files import new_file
from roomplan_lib.scenes import Scene
from roomplan_lib.scenes.roomplan import Z_UP

NEEDS = "needs the package usd-core: pip install 'roomplan_lib[export]'"
_FIRST_DAY = bytes([0, 0, 0x21, 0])  # time and date of 1 January 1980 in a zip header


def write_usdz(scene: Scene, path: Path | str, notes: list[str] | None = None) -> None:
    """Write a scene's meshes as one USDZ package: metres, y up as in RoomPlan, one prim a part below /Room.

    Each part is a mesh with its own transform and `roomplan:category` in its custom data; walls have holes for what
    lies in them. notes: as of `room_parts`. The file is written whole or not at all. Raises ValueError for an empty
    scene or without usd-core.
    """
    try:
        from pxr import Gf, Kind, Sdf, Usd, UsdGeom, UsdShade, UsdUtils, Vt
    except ImportError:
        raise ValueError(f"USDZ {NEEDS}") from None
    parts = room_parts(scene, notes)
    with tempfile.TemporaryDirectory() as folder:  # USD writes by paths and knows a format by its suffix
        source, package = Path(folder, "room.usdc"), Path(folder, "room.usdz")
        stage = Usd.Stage.CreateNew(str(source))
        UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.y)
        UsdGeom.SetStageMetersPerUnit(stage, 1.0)
        room = UsdGeom.Xform.Define(stage, "/Room").GetPrim()
        Usd.ModelAPI(room).SetKind(Kind.Tokens.component)
        stage.SetDefaultPrim(room)
        room.SetCustomDataByKey("roomplan:scene", scene.scene_id)
        materials = {}
        for group in dict.fromkeys(part.group for part in parts):
            UsdGeom.Xform.Define(stage, f"/Room/{group}")
            materials[group] = _material(stage, group)
        for part in parts:
            mesh = UsdGeom.Mesh.Define(stage, f"/Room/{part.group}/{part.name}")
            points = Vt.Vec3fArray.FromNumpy((part.vertices @ Z_UP).astype(np.float32))
            mesh.CreatePointsAttr(points)
            mesh.CreateFaceVertexCountsAttr(Vt.IntArray.FromNumpy(np.full(len(part.quads), 4, dtype=np.int32)))
            mesh.CreateFaceVertexIndicesAttr(Vt.IntArray.FromNumpy(part.quads.ravel().astype(np.int32)))
            mesh.CreateSubdivisionSchemeAttr(UsdGeom.Tokens.none)
            mesh.CreateDoubleSidedAttr(True)
            mesh.CreateExtentAttr(UsdGeom.PointBased.ComputeExtent(points))
            mesh.AddTransformOp().Set(Gf.Matrix4d(y_up_transform(part).T.tolist()))  # USD multiplies rows
            mesh.GetPrim().SetCustomDataByKey("roomplan:category", part.category)
            UsdShade.MaterialBindingAPI.Apply(mesh.GetPrim()).Bind(materials[part.group])
        stage.GetRootLayer().Save()
        if not UsdUtils.CreateNewARKitUsdzPackage(Sdf.AssetPath(str(source)), str(package)):
            raise RuntimeError(f"USD could not package {source}")
        data = bytearray(package.read_bytes())
        with zipfile.ZipFile(package) as archive:  # one entry; without its time the same room gives the same bytes
            for place in (archive.infolist()[0].header_offset + 10, archive.start_dir + 12):
                data[place : place + 4] = _FIRST_DAY
    with new_file(path) as file:
        file.write(data)


def y_up_transform(part: Part) -> np.ndarray:
    """[4, 4] from a part's own frame, its y and z axes changed to y up as well, to the y-up world."""
    turn = np.eye(4)
    turn[:3, :3] = Z_UP
    return turn.T @ part.box_to_world @ turn


def _material(stage, group: str):
    from pxr import Gf, Sdf, UsdShade

    *color, opacity = GROUP_COLORS[group]
    material = UsdShade.Material.Define(stage, f"/Room/Materials/{group}")
    shader = UsdShade.Shader.Define(stage, f"/Room/Materials/{group}/Surface")
    shader.CreateIdAttr("UsdPreviewSurface")
    shader.CreateInput("diffuseColor", Sdf.ValueTypeNames.Color3f).Set(Gf.Vec3f(*color))
    shader.CreateInput("roughness", Sdf.ValueTypeNames.Float).Set(0.8)
    shader.CreateInput("opacity", Sdf.ValueTypeNames.Float).Set(opacity)
    material.CreateSurfaceOutput().ConnectToSource(shader.ConnectableAPI(), "surface")
    return material
