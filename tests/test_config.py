"""Settings: strict keys and types, and stage files that state every field."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from roomplan_lib.config import (
    LoraSettings,
    RunConfig,
    load_run_config,
    parse,
    run_config_from_notebook,
    to_dict,
)

FOLDER = Path(__file__).parents[1] / "papermill_runs" / "params"
PARAMS = sorted(path for path in FOLDER.glob("*.yaml") if "pretrain" not in path.stem)  # those: test_pretrain.py


@pytest.mark.parametrize(
    "data, message",
    [
        ({"trainng": {}}, "trainng: unknown setting"),
        ({"training": {"lr": 1e-4}}, "training.lr: unknown setting"),
        ({"training": {"learning_rate": "1e-4"}}, r"training.learning_rate: expected float, got str '1e-4'.*1.0e-04"),
        ({"training": {"max_steps": 10.0}}, "training.max_steps: expected int, got float 10.0"),
        ({"training": {"bf16": 1}}, "training.bf16: expected bool"),
        ({"training": {"max_grad_norm": float("nan")}}, "training.max_grad_norm: expected a finite number"),
        ({"training": {"max_grad_norm": -1.0}}, "training.max_grad_norm: expected 0 or more, got -1"),
        ({"training": {"learning_rate": -1e-4}}, "training.learning_rate: expected 0 or more, got -0.0001"),
        ({"training": {"warmup_ratio": 1.5}}, "training.warmup_ratio: expected 0 to 1, got 1.5"),
        ({"data": {"num_workers": -1}}, "data.num_workers: expected at least 0, got -1"),
        ({"training": {"lr_scheduler": "step"}}, "training.lr_scheduler: expected one of cosine"),
        ({"training": {"micro_batch_size": 5, "group_size": 2}}, "training.micro_batch_size: expected a multiple"),
        ({"model": {"tap_layers": ["last"]}}, r"model.tap_layers\[0\]: expected int"),
        ({"model": {"resampler": 3}}, "model.resampler: expected a mapping"),
        ({"model": {"language_model": {"lora": {"r": 8}}}}, "model.language_model.lora.r: unknown setting"),
        ({"data": {"train_files": "a.jsonl"}}, "data.train_files: expected a list"),
        ({"run_name": "../elsewhere"}, "run_name: expected a plain folder name"),
        ({"run_name": ".."}, "run_name: expected a plain folder name"),
        ({"seed": -1}, "seed: expected 0 to"),
    ],
)
def test_wrong_settings_stop_with_their_path(data, message):
    with pytest.raises(ValueError, match=message):
        parse(RunConfig, data)


def test_numbers_and_optional_sections_are_read():
    config = parse(RunConfig, {"training": {"learning_rate": 1}, "model": {"language_model": {"lora": {"rank": 4}}}})
    assert config.training.learning_rate == 1.0 and isinstance(config.training.learning_rate, float)
    assert config.model.language_model.lora == LoraSettings(rank=4)
    assert parse(RunConfig, to_dict(config)) == config


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.stem)
def test_stage_files_state_every_field(path):
    def missing(kind, data, prefix=""):
        for field in dataclasses.fields(kind):
            yield from [prefix + field.name] * (field.name not in data)
            value = getattr(kind(), field.name, None)
            if dataclasses.is_dataclass(value) and field.name in data:
                yield from missing(type(value), data[field.name], f"{prefix}{field.name}.")

    assert list(missing(RunConfig, yaml.safe_load(path.read_text()))) == []
    assert load_run_config(path, run_name="other").run_name == "other"


def test_unreadable_stage_file_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("training: [1, 2")
    for name in ("bad.yaml", "absent.yaml"):
        with pytest.raises(ValueError, match=name):
            load_run_config(tmp_path / name)


def test_notebook_parameters_are_checked():
    namespace = {"run_name": "a", "seed": 3, "Path": Path, "dataclasses": dataclasses, "In": [], "_i1": ""}
    assert run_config_from_notebook(namespace) == RunConfig(run_name="a", seed=3)
    with pytest.raises(ValueError, match="learning_rte: unknown setting"):
        run_config_from_notebook({**namespace, "learning_rte": 1.0})
    with pytest.raises(ValueError, match="seed: expected int"):
        run_config_from_notebook({**namespace, "seed": "3"})


def test_data_root_moves_with_the_environment(monkeypatch):
    data = parse(RunConfig, {"data": {"train_files": ["data/processed/a.jsonl", "/abs/b.jsonl"]}}).data
    monkeypatch.delenv("ROOMPLAN_DATA", raising=False)
    assert data.train_paths == (Path("data/processed/a.jsonl"), Path("/abs/b.jsonl"))
    monkeypatch.setenv("ROOMPLAN_DATA", "/scratch/rooms")
    assert data.train_paths == (Path("/scratch/rooms/processed/a.jsonl"), Path("/abs/b.jsonl"))
