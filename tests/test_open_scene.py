"""`open_scene` tells the layouts apart; plain pictures; hostile pictures and lists."""

import io
import json
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scannet_files import SCENE_ID, pack_sens, sens_frames, write_pictures, write_scan
from scene_files import box
from scene_files import write_scene as write_arkit_scene

from roomplan_lib.scenes import load_depth, load_rgb, open_scene

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real recordings are not at hand")


@pytest.mark.parametrize("layout", ["raw", "3dod"])
def test_arkitscenes(tmp_path, layout):
    folder = write_arkit_scene(tmp_path, [box("chair", 1, 1)], layout=layout)
    scene = open_scene(folder)
    assert (scene.source, scene.scene_id, len(scene.boxes)) == ("arkitscenes", folder.name, 1)
    with pytest.raises(ValueError, match=f"holds 1 scenes; open one of them, such as {folder}"):
        open_scene(tmp_path)


@pytest.mark.parametrize("layout", ["exported", "frames_25k", "posed_images", "frame_files"])
def test_scannet(tmp_path, layout):
    scan = write_scan(tmp_path)
    pictures = write_pictures(tmp_path / "pictures" / SCENE_ID, layout)
    for path in (scan, pictures):
        scene = open_scene(str(path))
        assert (scene.source, scene.scene_id, len(scene.boxes), len(scene.views)) == ("scannet", SCENE_ID, 4, 5)
    with pytest.raises(ValueError, match="holds 1 scenes"):
        open_scene(tmp_path)
    renamed = pictures.rename(tmp_path / "my_room")
    assert open_scene(renamed).source == "rgbd"


def test_a_recording_must_be_exported_first(tmp_path):
    path = tmp_path / f"{SCENE_ID}.sens"
    path.write_bytes(pack_sens(sens_frames()))
    with pytest.raises(ValueError, match=rf"{SCENE_ID}\.sens: .*roomplan prepare sens"):
        open_scene(path)


@needs_data
def test_real_recordings():
    assert len(open_scene(DATA / "rgbd_redwood").views) == 5
    room = open_scene(DATA / "roomplan" / "single.json")
    assert room.source == "roomplan" and room.boxes and room.surfaces


def write_photos(folder: Path) -> Path:
    folder.mkdir()
    for number in (1, 2, 10):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(folder / f"photo{number}.png")
    (folder / "notes.md").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def test_plain_pictures_in_a_folder_or_a_list(tmp_path):
    folder = write_photos(tmp_path / "photos")
    scene = open_scene(folder)
    assert (scene.source, scene.scene_id) == ("pictures", "photos")
    assert [view.view_id for view in scene.views] == ["photo1.png", "photo2.png", "photo10.png"]
    assert not any(view.posed for view in scene.views) and (scene.views[0].width, scene.views[0].height) == (40, 30)
    assert [view.load_rgb()[0, 0, 0] for view in scene.views] == [1, 2, 10]

    names = ["photos/photo10.png", "photos/photo1.png"]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "list.json").write_text(json.dumps(names))
    (tmp_path / "record.json").write_text(json.dumps({"images": names}))
    for name in ("list.txt", "list.json", "record.json"):
        scene = open_scene(tmp_path / name)
        assert [view.view_id for view in scene.views] == names and scene.scene_id == name.split(".")[0]
        assert [view.load_rgb()[0, 0, 0] for view in scene.views] == [10, 1]


def test_lists_with_capital_endings_or_a_byte_order_mark(tmp_path):
    write_photos(tmp_path / "photos")
    names = ["photos/photo10.png", "photos/photo1.png"]
    for name, text in (("LIST.TXT", "\n".join(names)), ("LIST.JSON", json.dumps(names))):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert [view.view_id for view in open_scene(tmp_path / name).views] == names
    (tmp_path / "A.SENS").write_bytes(b"")
    with pytest.raises(ValueError, match="roomplan prepare sens"):
        open_scene(tmp_path / "A.SENS")


@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_a_camera_s_orientation_tag_sets_the_picture_upright(tmp_path, orientation, turns):
    upright = np.zeros((30, 40, 3), np.uint8)
    upright[:10, :, 0] = 250  # a red ceiling
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.rot90(upright, -turns).copy()).save(tmp_path / "a.png", exif=exif)
    (view,) = open_scene(tmp_path).views
    assert (view.quarter_turns, view.width, view.height) == (turns, 40, 30)
    np.testing.assert_array_equal(view.load_rgb(), upright)


@pytest.mark.parametrize(
    "text, expected",
    [
        ('["../secret.png"]', r"'\.\./secret\.png': .*without `\.\.`"),
        ('["photos/../../secret.png"]', "without `..`"),
        ('["/etc/passwd"]', "absolute"),
        ('["photos\\\\\\\\..\\\\\\\\a.png"]', "backslashes"),
        ('["photos/photo1.png", "photos/photo1.png"]', "listed 2 times"),
        ('["photos/none.png"]', "none.png: picture is missing"),
        ('["photos/notes.md"]', "notes.md: cannot read the picture"),
        ("[]", "0 pictures"),
        ("[3]", "list of paths"),
        ('{"a": NaN}', r"list\.json: invalid JSON \(NaN"),
        ('["photos/photo1.png"', r"list\.json:1: invalid or truncated JSON"),
        ("[" * 100_000, r"list\.json.*invalid"),
        (f"[{'9' * 5000}]", r"list\.json: invalid JSON"),
    ],
)
def test_hostile_lists(tmp_path, text, expected):
    write_photos(tmp_path / "photos")
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ValueError, match=expected):
        open_scene(tmp_path / "list.json")


def test_a_line_of_a_gigabyte_is_refused_in_bounded_memory(tmp_path):
    path = tmp_path / "list.txt"
    with path.open("wb") as file:
        file.truncate(2**30)  # a hole: takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"list\.txt: more than \d+ bytes"):
            open_scene(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_unknown_things_say_what_was_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.xyz").write_text("")
    (tmp_path / "infos.pkl").write_bytes(b"")
    for name, expected in (
        ("empty", "no scene found. Looked for ScanNet .*ARKitScenes .*RGB-D"),
        ("a.xyz", "expected a CapturedRoom"),
        ("infos.pkl", "read_infos"),
        ("none", "no such file or folder"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*{expected}"):
            open_scene(tmp_path / name)


# Pictures -------------------------------------------------------------------------------------------------------------


def png(width: int, height: int, rows: bytes = b"", kind: int = 2) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(100_000, 100_000), (10_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path, size):
    path = tmp_path / "huge.png"
    path.write_bytes(png(*size))
    tracemalloc.start()
    try:
        for read in (load_rgb, load_depth, lambda path: open_scene(path.parent)):
            with pytest.raises(ValueError, match=r"huge\.png: "):
                read(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow tells of damaged tags
def test_damaged_pictures_are_value_errors_that_name_the_file(tmp_path):
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 9000, (24, 32), dtype=np.uint16))
    count = 0
    for picture, form in (
        (noise, "PNG"),
        (noise, "JPEG"),
        (noise, "TIFF"),
        (noise, "WEBP"),
        (noise, "GIF"),
        (deep, "PNG"),
    ):
        file = io.BytesIO()
        picture.save(file, format=form)
        good = file.getvalue()
        for trial in range(120):
            bad = bytearray(good[: rng.integers(1, len(good))] if trial % 3 == 0 else good)
            for at in rng.integers(0, min(len(bad), 400), trial % 5):
                bad[at] = rng.integers(256)
            path = tmp_path / "bad.png"
            path.write_bytes(bad)
            for read in (load_rgb, load_depth, open_scene):
                try:
                    read(path if read is not open_scene else tmp_path)
                except ValueError as error:
                    count += 1
                    assert "bad.png" in str(error)
    assert count > 400


@pytest.mark.parametrize("form", ["EPS", "PCX", "ICO", "TGA"])
def test_formats_that_no_scene_has_are_not_opened(tmp_path, form):
    """EPS files are programs, which Pillow hands to Ghostscript."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", format=form)
    with pytest.raises(ValueError, match=r"a\.png: cannot read the picture \(cannot identify"):
        load_rgb(tmp_path / "a.png")


def test_a_picture_next_to_a_scan_s_name_is_no_scan(tmp_path):
    folder = write_photos(tmp_path / "kitchen")
    (folder / "kitchen.txt").write_text("taken on Monday")
    assert open_scene(folder).source == "pictures"
