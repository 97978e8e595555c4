"""Pictures on their way to the encoder: JPEGs decoded smaller, the rest as they are, and what both cost."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from roomplan_lib.cli import app
from roomplan_lib.config import DataConfig, PositionsConfig
from roomplan_lib.scenes import load_rgb, picture_size
from roomplan_lib.training.collator import Sample, ViewLoader, resize_picture
from roomplan_lib.training.picture_benchmark import benchmark_pictures, make_picture, reference_pixels


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A JPEG of 960x720, about as rough as a photograph."""
    return make_picture(tmp_path_factory.mktemp("photo"), 960, 720)


def loader(image_size=224, positions=None):
    return ViewLoader(DataConfig(image_size=image_size), patch_size=14, needs_positions=positions)


def pictures_of(path, turns=0, image_size=224):
    record = {"images": [path.name], "quarter_turns": [turns], "scene_id": "one"}
    return loader(image_size).load_pictures(Sample(record, path.parent))


def pillow_bicubic(path, size, turns=0):
    """int [3, H, W] of the whole picture, resized by Pillow alone."""
    with Image.open(path) as picture:
        upright = Image.fromarray(np.rot90(np.asarray(picture.convert("RGB")), turns))
    return np.asarray(upright.resize(size, Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)


@pytest.mark.parametrize(
    "size, at_least, expected",
    [
        ((1296, 968), (448, 336), (648, 484)),  # ScanNet's colour camera
        ((1920, 1440), (448, 336), (480, 360)),
        ((1920, 1440), (240, 180), (240, 180)),  # just enough
        ((1920, 1440), (241, 180), (480, 360)),
        ((640, 480), (448, 336), (640, 480)),  # half would be too small
        ((1297, 968), (448, 336), (1297, 968)),  # half a pixel would be left over
        ((1920, 1436), (224, 168), (480, 359)),  # an eighth would not divide it, a quarter does
    ],
)
@pytest.mark.parametrize("turns", [0, 1])
def test_a_jpeg_is_decoded_at_the_least_scale_that_holds_the_target(tmp_path, size, at_least, expected, turns):
    path = tmp_path / "a.jpg"
    Image.new("RGB", size).save(path)
    turned = slice(None, None, -1 if turns else 1)
    assert load_rgb(path, turns, at_least[turned]).shape[1::-1] == expected[turned]
    assert load_rgb(path, turns).shape[1::-1] == picture_size(path, turns) == size[turned]
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert load_rgb(tmp_path / "a.png", turns, at_least[turned]).shape[1::-1] == size[turned]


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_pixels_differ_little_from_those_of_the_whole_picture(photo, turns):
    size = (168, 224) if turns % 2 else (224, 168)
    pictures, stored = pictures_of(photo, turns)
    assert stored == ((720, 960) if turns % 2 else (960, 720))  # of the file, whatever was decoded
    assert pictures.dtype == torch.uint8 and pictures.shape == (1, 3, *size[::-1]) and pictures.is_contiguous()
    difference = np.abs(pictures[0].numpy() - pillow_bicubic(photo, size, turns))
    assert difference.max() <= 8 and difference.mean() < 0.8
    wrong = np.abs(pictures[0].numpy() - pillow_bicubic(photo, size, (turns + 2) % 4))
    assert wrong.mean() > 20


@pytest.mark.parametrize("mode, kind", [("L", {}), ("CMYK", {}), ("RGB", {"progressive": True, "subsampling": 0})])
def test_other_jpegs_are_decoded_as_well(photo, tmp_path, mode, kind):
    path = tmp_path / "other.jpg"
    with Image.open(photo) as picture:
        picture.convert(mode).save(path, quality=95, **kind)
    assert load_rgb(path, at_least=(224, 168)).shape == (180, 240, 3)
    difference = np.abs(pictures_of(path)[0][0].numpy() - pillow_bicubic(path, (224, 168)))
    assert difference.max() <= 12 and difference.mean() < 1.2


def test_an_orientation_tag_turns_nothing_here(photo, tmp_path):
    """The record's quarter_turns do, for all formats alike."""
    tag = Image.Exif()
    tag[0x0112] = 6
    with Image.open(photo) as picture:
        picture.save(tmp_path / "tagged.jpg", exif=tag)
        picture.save(tmp_path / "plain.jpg")
    (tagged, stored), (plain, _) = (pictures_of(tmp_path / name) for name in ("tagged.jpg", "plain.jpg"))
    assert torch.equal(tagged, plain) and stored == (960, 720)


def test_pictures_that_come_out_whole_are_resized_by_pillow_alone(photo, tmp_path):
    path = tmp_path / "photo.png"
    with Image.open(photo) as picture:
        picture.save(path)
    for turns, size in ((0, (224, 168)), (3, (168, 224))):
        assert np.array_equal(pictures_of(path, turns)[0][0], pillow_bicubic(path, size, turns))
    assert np.array_equal(pictures_of(photo, image_size=700)[0][0], pillow_bicubic(photo, (700, 532)))


def test_the_faster_filter_is_pillow_s_to_one_grey_level():
    pixels = np.random.default_rng(0).integers(0, 256, (180, 250, 3), dtype=np.uint8)
    fast = resize_picture(pixels, (500, 360), (224, 168)).int()
    exact = resize_picture(pixels, (250, 180), (224, 168)).int()
    assert (fast - exact).abs().max() == 1 and (fast != exact).float().mean() < 0.05


def test_geometry_refers_to_the_whole_picture(tmp_path):
    """Equal for a PNG and a JPEG that is decoded at an eighth."""
    rng, sets = np.random.default_rng(0), []
    Image.fromarray(rng.integers(500, 4000, (96, 128), dtype=np.uint16)).save(tmp_path / "depth.png")
    geometry = {"R": np.eye(3).reshape(1, 9), "t": np.ones((1, 3)), "depth_hist": np.full((1, 16), 1 / 16)}
    geometry["K"] = np.array([[800.0, 0, 479.5, 0, 800, 359.5, 0, 0, 1]])
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (960, 720), (90, 120, 30)).save(tmp_path / name)
        record = {"images": [name], "depths": ["depth.png"], "scene_id": "one", "geom_token": geometry}
        sets.append(loader(112, PositionsConfig()).view_set(Sample(record, tmp_path)))
    whole, smaller = sets
    assert whole.stored_size == smaller.stored_size == (960, 720) and smaller.image_size == (112, 84)
    assert torch.equal(whole.geometry_records, smaller.geometry_records)
    assert torch.equal(whole.patch_coordinates, smaller.patch_coordinates) and whole.patch_valid.all()
    assert (whole.pixel_values.int() - smaller.pixel_values.int()).abs().max() <= 2


def test_a_bad_jpeg_is_one_error_that_names_it(photo, tmp_path):
    good, path = photo.read_bytes(), tmp_path / "bad.jpg"
    cut = [good[: len(good) * part // 10] for part in range(10)]
    for data in (*cut, b"no picture", good[:400] + bytes(600) + good[1000:1200]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"bad\.jpg: cannot read the picture"):
            pictures_of(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"bad\.jpg: picture is missing"):
        pictures_of(path)
    Image.new("RGB", (8000, 8000)).save(path, quality=1)
    with pytest.raises(ValueError, match=r"bad\.jpg: 8000x8000 pixels, more than 50000000 are refused"):
        pictures_of(path)  # although an eighth of it would not be too large


def test_views_of_different_sizes_are_refused_whatever_they_are_decoded_to(tmp_path):
    for name, size in (("a.jpg", (960, 720)), ("b.jpg", (480, 360))):
        Image.new("RGB", size).save(tmp_path / name)
    record = {"images": ["a.jpg", "b.jpg"], "scene_id": "one"}
    with pytest.raises(ValueError, match="scene one: its views differ in size"):
        loader(112).load_pictures(Sample(record, tmp_path))


def test_the_benchmark(photo, tmp_path):
    """The floor in CI; on a quiet core 1296x968 takes a third of the reference's time."""
    made = make_picture(tmp_path, 1296, 968)
    (row,) = benchmark_pictures([made], rounds=5, progress=False)
    assert (row["width"], row["height"]) == (1296, 968) and row["reference_ms"] > 1.8 * row["ours_ms"]
    assert 0 < row["mean_difference"] < 0.8 and row["max_difference"] <= 8
    output = tmp_path / "rows.jsonl"
    command = ["benchmark", "pictures", str(photo), "--rounds", "1", "--output", str(output), "--image-size", "112"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "960x720" in result.output
    assert json.loads(output.read_text())["image_size"] == 112
    result = CliRunner().invoke(app, ["benchmark", "pictures", str(tmp_path / "none.jpg")])
    assert result.exit_code == 1 and "none.jpg: picture is missing" in result.output


def test_the_reference_s_transform():
    """The middle square of the picture, in [0, 1]."""
    file = io.BytesIO()
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, 20:60, 0] = 255
    Image.fromarray(pixels).save(file, "PNG")
    made = reference_pixels(file, 20)
    assert made.shape == (3, 20, 20) and made.dtype == torch.float32
    assert made[0, :, 2:-2].min() == 1 and made[1:].max() == 0
