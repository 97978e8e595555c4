"""The benchmark of preparing: its scans are real ones, and its figures add up."""

import pytest

from roomplan_lib.samples.benchmark import benchmark_prepare, benchmark_table, make_scans
from roomplan_lib.scenes.arkitscenes import find_scenes, read_scene


def test_scans_are_hard_links_under_names_of_their_own(tmp_path):
    make_scans(tmp_path, 7, 3)
    scenes = [read_scene(path) for path in find_scenes(tmp_path / "scans")]
    assert sorted(scene.scene_id for scene in scenes) == [f"4000000{number}" for number in range(7)]
    assert len({scene.visit_id for scene in scenes}) == 7
    assert [scene.scene_id for scene in scenes if scene.split == "val"] == ["40000004"]
    for scene in scenes:
        assert len(scene.views) == 3 and scene.boxes and scene.views[0].load_depth().max() > 1
        assert scene.views[0].rgb_path.stat().st_nlink > 1


def test_figures_of_the_benchmark(tmp_path):
    result = benchmark_prepare(10, num_poses=4, num_views=3, folder=tmp_path)
    assert result["num_samples"] > 20 and 0 < result["decode_seconds"] < result["seconds"]
    assert 30 < result["few_peak_mb"] < 2000 and 30 < result["peak_mb"] < 2000
    assert "10 scans, 1 processes" in benchmark_table(result) and "read and decode" in benchmark_table(result)
    assert result["num_few"] == 2 and "at 2 scans" in benchmark_table(result)  # not compared with itself
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        benchmark_prepare(10, folder=tmp_path / "nowhere")
