"""A few rooms and the samples made from them, shared by the tests that need real files."""

import dataclasses
from pathlib import Path

import pytest

from roomplan_lib.config import load_run_config

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def rooms_root(tmp_path_factory):
    """Ten rooms (eight train, two val) in the ARKitScenes layout, eight posed views each."""
    from roomplan_lib.scenes.rooms import write_rooms

    root = tmp_path_factory.mktemp("rooms")
    write_rooms(root, 10, seed=5, num_poses=10, progress=False)
    return root


@pytest.fixture(scope="session")
def sample_files(rooms_root, tmp_path_factory):
    """Prepared JSONL files by name (anchors_train, qa_train, anchors_val, qa_val), six views a sample."""
    from roomplan_lib.samples.prepare import prepare_arkitscenes

    return prepare_arkitscenes(rooms_root, tmp_path_factory.mktemp("samples"), num_views=6, progress=False)


@pytest.fixture
def tiny_config(sample_files, tmp_path):
    """The tiny stage file, cut to a few steps, on the session's samples, in a folder of the test's own."""
    config = load_run_config(PROJECT / "papermill_runs" / "params" / "tiny.yaml")
    files = {
        split: tuple(str(sample_files[f"{kind}_{split}"]) for kind in ("anchors", "qa")) for split in ("train", "val")
    }
    return dataclasses.replace(
        config,
        run_name="test",
        runs_dir=str(tmp_path),
        data=dataclasses.replace(config.data, train_files=files["train"], eval_files=files["val"]),
        training=dataclasses.replace(
            config.training, max_steps=6, micro_batch_size=8, group_size=4, log_every_steps=1, eval_every_steps=3,
            num_eval_samples=8, save_every_steps=2, device="cpu",
        ),
        prediction=dataclasses.replace(config.prediction, num_scenes=2, max_new_tokens=8, batch_size=16),
    )  # fmt: skip
