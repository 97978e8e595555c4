"""Small ScanNet scans and recordings written by hand, with `struct` and plain text: none of the library's writers."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from scene_files import ray_depth, walk

from roomplan_lib.geometry import OrientedBox, rotation_z

SCENE_ID = "scene0123_01"
COLOR_SIZE, DEPTH_SIZE = (64, 48), (40, 30)
COLOR_K = np.array([[57.0, 0, 32.5], [0, 58.0, 23.0], [0, 0, 1]])
DEPTH_K = np.array([[35.0, 0, 19.0], [0, 36.0, 15.5], [0, 0, 1]])
ALIGNMENT = np.eye(4)  # mesh world to scene world
ALIGNMENT[:3, :3] = rotation_z(-0.6)
ALIGNMENT[:3, 3] = [-3.5, 2.25, -0.0625]
# Boxes in the aligned world; object 4 has no segments, object 2 takes a segment that object 0 claims too.
BOXES = [
    OrientedBox([1.0, 0.5, 0.4], [0.6, 0.6, 0.8], label="office chair", object_id="0"),
    OrientedBox([-1.5, 1.0, 0.5], [1.6, 0.8, 1.0], label="kitchen cabinets", object_id="1"),
    OrientedBox([-0.5, -1.5, 0.3], [2.0, 0.9, 0.6], label="couch", object_id="2"),
    OrientedBox([1.8, -1.4, 1.0], [0.3, 0.3, 2.0], label="curtain", object_id="7"),
]
LOST = 2  # the frame whose pose is not known


def poses(num: int = 6) -> list[np.ndarray]:
    """camera_to_world in the mesh's world (as ScanNet stores them), -inf for the frame LOST."""
    raw = [np.linalg.inv(ALIGNMENT) @ pose for pose in walk(num)]
    if num > LOST:
        raw[LOST] = np.full((4, 4), -np.inf)
    return raw


def color_and_depth(index: int, num: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [48, 64, 3], uint16 millimetres [30, 40]) seen from a pose."""
    pose = walk(num)[index]
    shade = np.clip(ray_depth(BOXES, pose, COLOR_K, COLOR_SIZE) / 6 * 255, 0, 255).astype(np.uint8)
    depth = ray_depth(BOXES, pose, DEPTH_K, DEPTH_SIZE)
    return np.stack([shade, shade // 2, shade], -1), np.round(depth * 1000).astype(np.uint16)


def jpeg(color: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(color).save(file, format="JPEG", quality=95)
    return file.getvalue()


def matrix_text(matrix: np.ndarray) -> str:
    return "\n".join(" ".join(str(float(x)) for x in row) for row in matrix)


def homogeneous(K: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = K
    return matrix


# Recordings -----------------------------------------------------------------------------------------------------------


def pack_sens(frames, **changes) -> bytes:
    """A `.sens` file of frames (camera_to_world, color bytes, depth uint16); `changes` replace fields of the header.

    A frame may have further entries: the sizes of its colour and depth bytes as the file shall claim them.
    """
    field = {
        "version": 4, "name": b"StructureSensor", "name_length": None, "color_compression": 2, "depth_compression": 1,
        "sizes": (*COLOR_SIZE, *DEPTH_SIZE), "depth_shift": 1000.0, "num_frames": len(frames), "num_imu": 2,
    } | changes  # fmt: skip
    name = field["name"]
    out = [struct.pack("<I", field["version"])]
    out += [struct.pack("<Q", len(name) if field["name_length"] is None else field["name_length"]), name]
    for K in (COLOR_K, DEPTH_K):
        for matrix in (homogeneous(K), np.eye(4)):
            out.append(struct.pack("<16f", *matrix.ravel()))
    out.append(struct.pack("<ii", field["color_compression"], field["depth_compression"]))
    out.append(struct.pack("<IIII", *field["sizes"]))
    out.append(struct.pack("<f", field["depth_shift"]) + struct.pack("<Q", field["num_frames"]))
    for index, (pose, color, depth, *claimed) in enumerate(frames):
        stored = depth if isinstance(depth, bytes) else depth.astype("<u2").tobytes()
        if field["depth_compression"] == 1 and not isinstance(depth, bytes):
            stored = zlib.compress(stored, 9)
        sizes = claimed or (len(color), len(stored))
        out.append(struct.pack("<16f", *np.asarray(pose).ravel()))
        out.append(struct.pack("<QQQQ", 1000 + 33333 * index, 1017 + 33333 * index, *sizes))
        out += [color, stored]
    out.append(struct.pack("<Q", field["num_imu"]) + bytes(128 * field["num_imu"]))
    return b"".join(out)


def sens_frames(num: int = 6) -> list[tuple[np.ndarray, bytes, np.ndarray]]:
    frames = []
    for index, pose in enumerate(poses(num)):
        color, depth = color_and_depth(index, num)
        frames.append((pose, jpeg(color), depth))
    return frames


def parse_sens(data: bytes) -> dict:
    """A second reader: the whole file at once, front to back."""
    at = 0

    def take(layout: str):
        nonlocal at
        values = struct.unpack_from("<" + layout, data, at)
        at += struct.calcsize("<" + layout)
        return values if len(values) > 1 else values[0]

    out = {"version": take("I")}
    length = take("Q")
    out["name"] = bytes(take(f"{length}B")).decode() if length > 1 else ""
    out["matrices"] = [np.array(take("16f")).reshape(4, 4) for _ in range(4)]
    out["compressions"], out["sizes"], out["depth_shift"] = take("2i"), take("4I"), take("f")
    out["frames"] = []
    for _ in range(take("Q")):
        pose, times, (num_color, num_depth) = np.array(take("16f")).reshape(4, 4), take("2Q"), take("2Q")
        color = data[at : at + num_color]
        depth = zlib.decompress(data[at + num_color : at + num_color + num_depth])
        at += num_color + num_depth
        width, height = out["sizes"][2:]
        depth = np.array(struct.unpack(f"<{width * height}H", depth)).reshape(height, width)
        out["frames"].append((pose, times, color, depth))
    out["num_imu"] = take("Q")
    at += 128 * out["num_imu"]
    assert at == len(data)
    return out


# Scans and exported pictures ------------------------------------------------------------------------------------------


def write_scan(root: Path, scene_id: str = SCENE_ID, alignment: np.ndarray | None = ALIGNMENT, folder="scans") -> Path:
    """A scan's txt, mesh, segments and aggregation; the mesh's vertices lie on the faces of BOXES."""
    scan = root / folder / scene_id
    scan.mkdir(parents=True)
    rng = np.random.default_rng(3)
    to_mesh = np.linalg.inv(np.eye(4) if alignment is None else alignment)
    points, segments, groups = [np.array([[-3.0, -2.5, 0.0], [3.0, 2.5, 0.0], [3.0, -2.5, 2.5]])], [5, 5, 5], []
    for number, box in enumerate(BOXES):
        inside = rng.uniform(-0.5, 0.5, (40, 3))
        inside[np.arange(40), np.arange(40) % 3] = np.where(np.arange(40) % 2, 0.5, -0.5)  # on a face each
        points.append(box.center + inside * box.extent)
        mine = [100 + 10 * number, 101 + 10 * number]
        segments += [mine[k % 2] for k in range(40)]
        groups.append({"id": number, "objectId": int(box.object_id), "segments": mine, "label": box.label})
    points.append(BOXES[2].center + np.array([[0.0, 0.0, 0.2]]))  # a segment that two objects claim
    segments.append(77)
    groups[0]["segments"] = groups[0]["segments"] + [77]
    groups[2]["segments"] = groups[2]["segments"] + [77]
    groups.append({"id": 4, "objectId": 4, "segments": [], "label": "lamp"})
    mesh = np.concatenate(points) @ to_mesh[:3, :3].T + to_mesh[:3, 3]
    lines = ["sceneType = Bedroom / Hotel", "colorWidth = 1296"]
    if alignment is not None:
        lines.insert(0, "axisAlignment = " + " ".join(f"{x:.6f}" for x in alignment.ravel()) + " ")
    (scan / f"{scene_id}.txt").write_text("\n".join(lines) + "\n")
    (scan / f"{scene_id}_vh_clean_2.ply").write_bytes(pack_ply(mesh))
    (scan / f"{scene_id}_vh_clean_2.0.010000.segs.json").write_text(
        json.dumps({"params": {}, "sceneId": scene_id, "segIndices": segments})
    )
    (scan / f"{scene_id}.aggregation.json").write_text(
        json.dumps({"sceneId": f"scannet.{scene_id}", "segGroups": groups})
    )
    return scan


def pack_ply(points: np.ndarray, form: str = "binary_little_endian") -> bytes:
    """A mesh as ScanNet has it: x, y, z, red, green, blue, alpha; one triangle."""
    properties = "".join(f"property float {axis}\n" for axis in "xyz")
    properties += "".join(f"property uchar {name}\n" for name in ("red", "green", "blue", "alpha"))
    header = f"ply\nformat {form} 1.0\ncomment made by hand\nelement vertex {len(points)}\n{properties}"
    header += "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    if form == "ascii":
        rows = "".join(f"{x:.9g} {y:.9g} {z:.9g} 10 20 30 255\n" for x, y, z in points)
        return (header + rows + "3 0 1 2\n").encode()
    order = "<" if "little" in form else ">"
    rows = b"".join(struct.pack(order + "3f4B", *point, 10, 20, 30, 255) for point in points)
    return header.encode() + rows + struct.pack(order + "B3i", 3, 0, 1, 2)


def write_pictures(folder: Path, layout: str, num: int = 6) -> Path:
    """Exported pictures in one of the four usual layouts."""
    folder.mkdir(parents=True)
    for index, pose in enumerate(poses(num)):
        color, depth = color_and_depth(index, num)
        if layout == "exported":
            paths = [f"color/{index}.jpg", f"depth/{index}.png", f"pose/{index}.txt"]
        elif layout == "frames_25k":
            paths = [
                f"{kind}/{index * 100:06}.{end}" for kind, end in (("color", "jpg"), ("depth", "png"), ("pose", "txt"))
            ]
        elif layout == "posed_images":
            paths = [f"{index * 10:05}.{end}" for end in ("jpg", "png", "txt")]
        else:
            paths = [f"frame-{index:06}.{end}" for end in ("color.jpg", "depth.png", "pose.txt")]
        for path in paths:
            (folder / path).parent.mkdir(exist_ok=True)
        (folder / paths[0]).write_bytes(jpeg(color))
        Image.fromarray(depth).save(folder / paths[1])
        (folder / paths[2]).write_text(matrix_text(pose))
    if layout == "frame_files":
        info = {
            "m_versionNumber": 4, "m_depthShift": 1000,
            "m_calibrationColorIntrinsic": " ".join(map(str, homogeneous(COLOR_K).ravel())),
            "m_calibrationDepthIntrinsic": " ".join(map(str, homogeneous(DEPTH_K).ravel())),
        }  # fmt: skip
        (folder / "_info.txt").write_text("".join(f"{key} = {value}\n" for key, value in info.items()))
        return folder
    names = {
        "exported": ("intrinsic/intrinsic_color.txt", "intrinsic/intrinsic_depth.txt"),
        "frames_25k": ("intrinsics_color.txt", "intrinsics_depth.txt"),
        "posed_images": ("intrinsic.txt", "depth_intrinsic.txt"),
    }[layout]
    for name, K in zip(names, (COLOR_K, DEPTH_K), strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(matrix_text(homogeneous(K)))
    return folder
