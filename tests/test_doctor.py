"""The preflight names what is wrong, with a remedy, and stops a batch job only for what would stop the run."""

import dataclasses
import json
import time

import pytest
import torch
import yaml
from typer.testing import CliRunner

from roomplan_lib import doctor
from roomplan_lib.cli import app
from roomplan_lib.config import to_dict
from roomplan_lib.doctor import B200, Check, check_kernels


def statuses(checks):
    return {check.name: check.status for check in checks}


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def with_model(config, **changes):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def test_a_good_stage_passes_quickly(tiny_config, tmp_path, monkeypatch):
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    stage = tmp_path / "stage.yaml"
    stage.write_text(yaml.safe_dump(to_dict(tiny_config)))
    start = time.process_time()
    result = CliRunner().invoke(app, ["doctor", str(stage)])
    assert result.exit_code == 0, result.output
    assert time.process_time() - start < 5
    lines = result.output.splitlines()
    assert all(line.split()[0] in ("ok", "warn") for line in lines)
    names = {line.split()[1] for line in lines}
    assert names >= {"python", "torch", "transformers", "peft", "accelerate", "gpus", "/dev/shm", "slurm", "open3d"}
    assert names >= {"scratch", "run", "data", "processes", "memory"}
    as_json = CliRunner().invoke(app, ["doctor", str(stage), "--json"])
    rows = [json.loads(line) for line in as_json.output.splitlines()]
    assert [row["name"] for row in rows if row["name"] == "data"] == ["data"] * 4
    assert rows[1]["name"] == "torch" and torch.__version__.split("+")[0] in rows[1]["found"]


def test_missing_and_damaged_data_fail_with_the_file(tiny_config, sample_files, tmp_path):
    torn = tmp_path / "torn.jsonl"
    text = sample_files["qa_train"].read_text()
    torn.write_text(text[: len(text) - 30])
    elsewhere = tmp_path / "elsewhere.jsonl"  # its pictures would lie below tmp_path
    record = json.loads(text.splitlines()[0])
    elsewhere.write_text(json.dumps(record | {"images": ["absent/picture.png"]}) + "\n")
    array = tmp_path / "array.json"
    array.write_text("[")
    for path, reason in (
        (tmp_path / "absent.jsonl", "is missing"),
        (torn, "its first or last line is no record"),
        (elsewhere, "absent/picture.png is missing"),
        (array, "array.json"),
    ):
        checks = list(doctor.check_data(with_data(tiny_config, train_files=(str(path),), eval_files=())))
        assert [check.status for check in checks] == ["fail"], checks
        assert reason in checks[0].found and str(path) in checks[0].found and checks[0].remedy
    assert statuses(doctor.check_data(with_data(tiny_config, train_files=(), eval_files=()))) == {"data": "fail"}


def test_missing_weights(tiny_config, tmp_path, monkeypatch):
    named = with_model(tiny_config, vggt_weights=str(tmp_path / "vggt_1B_commercial.pt"))
    (check,) = doctor.check_weights(named)
    assert check.status == "fail" and "model.vggt_weights" in check.found and "vggt_1B_commercial.pt" in check.found
    (tmp_path / "vggt_1B_commercial.pt").write_bytes(b"")
    assert [check.status for check in doctor.check_weights(named)] == ["ok"]
    language = dataclasses.replace(tiny_config.model.language_model, name="Nobody/Has-This")
    (check,) = doctor.check_weights(with_model(tiny_config, language_model=language))
    assert check.status in ("warn", "fail") and "hf download Nobody/Has-This" in check.remedy
    start = dataclasses.replace(
        tiny_config, training=dataclasses.replace(tiny_config.training, start_from="never_trained")
    )
    (check,) = doctor.check_weights(start)
    assert check.status == "fail" and "training.start_from: never_trained" in check.found
    (tmp_path / "never_trained").mkdir()  # runs_dir of tiny_config is tmp_path
    (tmp_path / "never_trained" / "run.yaml").touch()
    (check,) = doctor.check_weights(start)
    assert check.status == "fail" and "never_trained is not finished" in check.found
    (tmp_path / "never_trained" / "model.safetensors").touch()
    assert list(doctor.check_weights(start)) == []
    shipped = dataclasses.replace(start.training, start_from="roomplan-tiny")
    assert list(doctor.check_weights(dataclasses.replace(start, training=shipped))) == []


def test_kernels_follow_the_rule_of_cuda():
    """Torch's own lists: 2.6 for CUDA 12.4 knows no B200, 2.7 for CUDA 12.8 does."""
    old = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
    new = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
    for kernels, capability, good in (
        (old, B200, False),
        (new, B200, True),
        (old, (9, 0), True),
        (old, (8, 9), True),  # sm_86 runs on 8.9
        (["sm_90"], (8, 0), False),
        (["sm_86"], (8, 0), False),
        (["sm_90a"], B200, False),
        (["compute_80"], B200, True),
        (new, (12, 1), True),
        (["sm_100"], (10, 3), True),
    ):
        assert (check_kernels(kernels, capability, "fail").status == "ok") == good, (kernels, capability)
    assert "sm_100 (B200)" in str(check_kernels(old, B200, "warn"))


class EightB200:
    """What torch.cuda says on such a node."""

    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 8)
    get_device_name = staticmethod(lambda i: "NVIDIA B200")
    get_device_capability = staticmethod(lambda i: (10, 0))
    get_arch_list = staticmethod(lambda: ["sm_90", "sm_100"])
    is_bf16_supported = staticmethod(lambda including_emulation: True)

    class nccl:
        version = staticmethod(lambda: (2, 27, 5))


def test_gpus_of_a_node(monkeypatch, tiny_config):
    monkeypatch.setattr(torch, "cuda", EightB200)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: "570.86")
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    checks = list(doctor.check_gpus(tiny_config))
    assert statuses(checks) == {
        "gpus": "ok", "kernels": "ok", "bfloat16": "ok", "nccl": "ok", "nccl settings": "warn"
    }  # fmt: skip
    assert "8 x NVIDIA B200, driver 570.86" in checks[0].found
    monkeypatch.setattr(EightB200, "get_arch_list", staticmethod(lambda: ["sm_80", "sm_90"]))
    assert statuses(doctor.check_gpus(tiny_config))["kernels"] == "fail"


def test_a_stage_for_gpus_fails_without_one(monkeypatch, tiny_config):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: "")
    on_gpus = dataclasses.replace(tiny_config, training=dataclasses.replace(tiny_config.training, device="cuda"))
    assert statuses(doctor.check_gpus(on_gpus))["gpus"] == "fail"
    assert statuses(doctor.check_gpus(None))["gpus"] == "warn"
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: "570.86")  # the driver shows some, torch does not
    assert statuses(doctor.check_gpus(None))["gpus"] == "fail"


def test_old_and_missing_packages(monkeypatch, tiny_config):
    versions = {"torch": "2.5.1", "transformers": "5.1.0", "peft": "0.18.0", "accelerate": "1.10.0"}

    def version(name):
        if name not in versions:
            raise doctor.importlib.metadata.PackageNotFoundError
        return versions[name]

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    found = statuses(doctor.check_packages(None))
    assert (found["torch"], found["transformers"], found["deepspeed"]) == ("fail", "ok", "warn")
    sharded = dataclasses.replace(
        tiny_config, distributed=dataclasses.replace(tiny_config.distributed, strategy="zero3")
    )
    assert statuses(doctor.check_packages(sharded))["deepspeed"] == "fail"


def test_full_and_read_only_disks(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: doctor.shutil._ntuple_diskusage(100, 100, 10**6))
    assert doctor._writable("run folder", tmp_path / "a" / "b", 5e9, "free space").status == "fail"
    monkeypatch.undo()
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    check = doctor._writable("run folder", tmp_path / "a" / "b", 5e9, "free space")
    assert check.status == "fail" and f"{tmp_path} cannot be written to" in check.found


def test_what_open3d_lacks_is_named():
    error = "Traceback\nImportError: libGL.so.1: cannot open shared object file: No such file or directory\n"
    check = doctor.check_open3d("", error, 1)
    assert check.status == "warn" and "apt-get install libgl1" in check.remedy
    assert doctor.check_open3d("0.19.0\n", "", 0) == Check("open3d", "ok", "0.19.0")


@pytest.mark.parametrize("wrong", ["training: {max_stps: 1}", "run_name: a/b"])
def test_wrong_settings_are_one_line(wrong, tmp_path):
    (tmp_path / "stage.yaml").write_text(wrong)
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "stage.yaml")])
    assert result.exit_code == 1 and result.stderr.startswith("roomplan doctor: ")
