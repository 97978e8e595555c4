"""Stage files and their settings: each file says what its stage is, and each setting changes what a run does."""

import copy
import dataclasses
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from roomplan_lib.cli import app
from roomplan_lib.config import RunConfig, load_run_config, parse
from roomplan_lib.evaluation.predict import predict_run
from roomplan_lib.model.vggt import VGGT
from roomplan_lib.model.vlm import vggt_settings
from roomplan_lib.samples import read_manifest, read_samples, sample_root
from roomplan_lib.training import trainer as trainer_module
from roomplan_lib.training.checkpoint import list_checkpoints
from roomplan_lib.training.collator import load_samples
from roomplan_lib.training.launch import group_command, processes_per_node
from roomplan_lib.training.metrics import read_metrics
from roomplan_lib.training.plan import planned_model
from roomplan_lib.training.run import (
    changed_settings,
    load_model_folder,
    make_collator,
    make_model,
    make_tokenizer,
    train,
)

FOLDER = Path(__file__).parents[1] / "papermill_runs" / "params"
PARAMS = sorted(path for path in FOLDER.glob("*.yaml") if "pretrain" not in path.stem)  # those: test_pretrain.py
STAGES = {path.stem: path for path in PARAMS}


# Stage files ----------------------------------------------------------------------------------------------------------


def test_the_stages_are_there():
    names = {"stage1_sft", "stage2_3d", "stage3_arkit", "stage1_mini", "stage2_mini", "stage3_mini"}
    assert names | {"tiny", "tiny_short", "tiny_actions", "tiny_rooms", "tiny_colors", "tiny_plans"} <= STAGES.keys()
    for name, path in STAGES.items():
        assert load_run_config(path).run_name == name


def benchmark_commands(folder, *arguments, stopped=""):
    """What papermill_runs/tiny_benchmark.sh asks of `roomplan`, one list a command, and how the script ended.

    The command that it finds is one of the shell's own that writes down what it was asked, then prints a path, which
    `stage` does: no environment's scripts are needed. stopped: the row whose training ends as one that was stopped.
    """
    asked, command = folder / "asked", folder / "bin" / "roomplan"
    asked.touch()
    command.parent.mkdir(exist_ok=True)
    command.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" END >> {asked}\n[ "$1" != stage ] || echo "$3/$4/stage.yaml"\n'
        f'case "$1 $2" in "train "*"/run_name={stopped or "none"}/"*) exit 75;; esac\n'
    )
    command.chmod(0o755)
    variables = os.environ | {"PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"}
    variables.pop("ROOMPLAN_DATA", None)
    script = ["bash", FOLDER.parent / "tiny_benchmark.sh", *arguments]
    done = subprocess.run(script, cwd=folder, env=variables, capture_output=True, text=True)
    commands = [words.splitlines() for words in asked.read_text().split("END\n") if words]
    asked.unlink()
    return commands, done


def test_rows_of_the_benchmark_differ_in_what_they_are_named_after(tmp_path, monkeypatch):
    """papermill_runs/tiny_benchmark.sh: one thing changed in each row, and the steps where rooms are counted."""
    commands, done = benchmark_commands(tmp_path, "--stages")
    assert done.returncode == 0, done.stderr
    (tmp_path / "papermill_runs").mkdir()
    (tmp_path / "papermill_runs" / "params").symlink_to(FOLDER)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        written = CliRunner().invoke(app, command)
        assert command[0] == "stage" and written.exit_code == 0, written.output
    stages = {path.parent.name: load_run_config(path) for path in tmp_path.rglob("stage.yaml")}
    recipe, ours = load_run_config(STAGES["tiny_rooms"]), stages["ours"]
    steps = {"training.max_steps": (11_000, 1_300), "training.eval_every_steps": (1_000, 325)}
    folder = (recipe.runs_dir, "papermill_runs/tiny_benchmark")
    assert changed_settings(recipe, ours) == {"run_name": ("tiny_rooms", "ours"), "runs_dir": folder} | steps

    def learned(name):
        changed = changed_settings(ours, stages[name])
        shown = ("run_name", "data.eval_files", "prediction.num_scenes", "prediction.controls")
        return {key: values[1] for key, values in changed.items() if key not in shown}

    def files(folder, split):
        return [f"data/processed/{folder}/{kind}_{split}.jsonl" for kind in ("anchors", "qa", "lists", "negatives")]

    assert list(recipe.data.train_files) == files("rooms2400", "train")
    longer = {"training.max_steps": 2_600}
    expected = {
        "ours": {}, "seed1": {"seed": 1}, "seed2": {"seed": 2},
        "sin3d": {"model.positions.method": "sin3d_pe"}, "base": {"model.positions.method": "base"},
        "places": {"model.resampler.num_latents": 192}, "no_geometry": {"model.geometry.num_tokens": 0},
        "random": {"model.vggt_weights": ""},
        "end_to_end": {
            "model.freeze_vggt": False, "data.features.folder": "", "data.features.resident": "none",
            "training.encoder_learning_rate": 3e-4,
        },
        "rooms60": longer | {"data.train_files": files("rooms75", "train")},
        "rooms240": longer | {"data.train_files": files("rooms300", "train")},
        "rooms1920": longer,
    }  # fmt: skip
    assert stages.keys() == {*expected, *(f"{row}_unusual" for row in expected)}
    for row, changes in expected.items():
        assert learned(row) == learned(f"{row}_unusual") == changes
        assert list(stages[row].data.eval_files) == files("rooms2400", "val")
        assert stages[row].prediction.num_scenes == 60
        unusual = stages[f"{row}_unusual"]
        assert list(unusual.data.eval_files) == files("unusual60", "val") and unusual.prediction.num_scenes == 0


def test_rows_of_the_benchmark_are_trained_answered_and_compared(tmp_path):
    """Each with its own stage, the unusual rooms answered by the row's model; a table of all rows comes last."""
    runs = "papermill_runs/tiny_benchmark"
    for name in ("rooms2400/{}_train", "rooms2400/{}_val", "unusual60/{}_val"):
        for kind in ("anchors", "qa", "lists", "negatives"):
            path = tmp_path / "data" / "processed" / f"{name.format(kind)}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    commands, done = benchmark_commands(tmp_path, "ours", "base")
    assert done.returncode == 0, done.stderr
    asked = []
    for row in ("ours", "base"):
        usual, unusual = (f"runs_dir={runs}/run_name={name}/stage.yaml" for name in (row, f"{row}_unusual"))
        weights = ["--checkpoint", f"{runs}/{row}/model"]
        asked += [["train", usual], ["predict", usual], ["predict", unusual, *weights]]
    unusual = [f"{runs}/{row}_unusual/predictions/model" for row in ("ours", "base")]
    assert [command[0] for command in commands[:4]] == ["stage"] * 4
    assert commands[4:] == [*asked, ["compare", f"{runs}/ours", f"{runs}/base", *unusual]]
    commands, done = benchmark_commands(tmp_path, "ours", "base", stopped="ours")
    assert done.returncode == 75 and commands[4:] == asked[:1]
    commands, done = benchmark_commands(tmp_path, "ours", "rooms60")
    assert done.returncode == 1 and "data/processed/rooms75/anchors_train.jsonl is missing" in done.stderr
    assert {command[0] for command in commands} == {"stage"}  # found out before ours is trained
    unknown, done = benchmark_commands(tmp_path, "ours", "none")
    assert done.returncode == 2 and "no row none; known: ours" in done.stderr and not unknown


def test_stage_two_is_what_was_agreed():
    config = load_run_config(STAGES["stage2_3d"])
    data, training, lora = config.data, config.training, config.model.language_model.lora
    shares = dict(zip((Path(file).name for file in data.train_files), data.train_shares, strict=True))
    assert shares == {"scanqa_train.jsonl": 0.7, "sqa3d_train.jsonl": 0.3}
    assert (data.image_size, data.max_length, data.view_dropout) == (448, 512, 0.3)
    assert (training.micro_batch_size, training.gradient_accumulation_steps) == (6, 32)
    assert (training.max_steps, training.save_every_steps, training.bf16) == (30_000, 1_500, True)
    assert (lora.rank, set(lora.target_modules)) == (16, {"q_proj", "k_proj", "v_proj", "o_proj"})
    assert training.lr_scheduler == "cosine" and training.warmup_ratio > 0 and training.start_from == "stage1_sft"
    assert config.model.tap_layers == (11, 17, 23) and config.model.freeze_vggt
    assert config.model.vggt_weights == "facebook/VGGT-1B" and config.model.frozen_dtype == "bfloat16"
    assert config.model.language_model.name == "Qwen/Qwen3-4B-Instruct-2507" and data.features.folder
    assert re.findall(r"--num-views (\d+)", STAGES["stage2_3d"].read_text()) == ["8"]
    third = load_run_config(STAGES["stage3_arkit"])
    assert (third.training.max_steps, third.data.max_length, third.training.start_from) == (10_000, 4096, "stage2_3d")
    assert set(re.findall(r"--num-views (\d+)", STAGES["stage3_arkit"].read_text())) == {"10"}


@pytest.mark.parametrize("size", ["full", "mini"])
def test_each_stage_starts_from_the_one_before(size):
    names = {"full": ("stage1_sft", "stage2_3d", "stage3_arkit"), "mini": ("stage1_mini", "stage2_mini", "stage3_mini")}
    configs = [load_run_config(STAGES[name]) for name in names[size]]
    assert [config.training.start_from for config in configs] == ["", *names[size][:2]]
    models = [planned_model(config.model, config.data) for config in configs]
    shapes = [{name: (p.shape, p.requires_grad) for name, p in model.named_parameters()} for model in models]
    for former, later in zip(shapes, shapes[1:], strict=False):  # a later stage has all of the former's weights
        assert former.items() <= later.items()
        assert {name.split(".")[0] for name in later.keys() - former.keys()} <= {"positions"}
    assert all(not any(p.requires_grad for p in model.encoder.parameters()) for model in models)
    if size == "full":
        names = [name for name, p in models[1].named_parameters() if p.requires_grad and "lora_" in name]
        assert len(names) == 36 * 4 * 2


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.stem)
def test_the_commands_in_a_head_are_real(path):
    """Every `roomplan` command and option that a stage file names is one of the program's."""
    from typer.main import get_command

    head = "\n".join(line[1:] for line in path.read_text().splitlines() if line.startswith("#"))
    words = {}
    for variable, text in re.findall(r"""(\w+)=(?:"([^"]*)"|\S+)""", head):
        words[f"${variable}"] = text
    for name, text in words.items():
        head = re.sub(rf"{re.escape(name)}\b", lambda _, text=text: text, head)
    found = re.findall(r"roomplan ((?:[a-z0-9]+ )+)([^\n;`]*)", head)
    assert found or path.stem == "tiny"
    for names, rest in found:
        node = get_command(app)
        for word in names.split():
            if not hasattr(node, "commands"):
                break
            assert word in node.commands, f"roomplan {names}: no such command"
            node = node.commands[word]
        known = {option for parameter in node.params for option in parameter.opts}
        used = set(re.findall(r"(?<=\s)--[a-z-]+", f" {rest}"))
        assert used <= known | {"--help"}, f"roomplan {names}: {sorted(used - known)}"


# Every setting --------------------------------------------------------------------------------------------------------

MICRO = {
    "vggt": {
        "img_size": 28, "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_embed_depth": 1,
        "patch_embed_num_heads": 2, "layer_scale_init": 1.0,
    },
    "freeze_vggt": True,
    "resampler": {"num_latents": 2, "num_layers": 1, "width": 16, "ffn_width": 16, "head_width": 8},
    "geometry": {"num_tokens": 1, "width": 16, "head_width": 8},
    "positions": {"method": "mlp_pe", "width": 8},
    "language_model": {
        "config": {
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True,
        },
        "vocab_size": 400,
    },
}  # fmt: skip
HEADS = {"head_layers": [0, 0, 1, 1], "dpt_features": 8, "dpt_out_channels": [4] * 4, "camera_trunk_depth": 1}
HEADS |= {"camera_num_heads": 2}
LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": ["q_proj"]}


@dataclass(frozen=True)
class Change:
    """Another value of a setting, and what shows that it counts; `beside`: settings of both sides, by path."""

    value: Any
    look: Callable[[RunConfig], Any]
    beside: dict[str, Any] = field(default_factory=dict)


def digest(tensors):
    parts = sorted((name, str(t.dtype), tuple(t.shape), t.float().numpy().tobytes()) for name, t in tensors.items())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def parts_of(config):
    samples = load_samples(config.data.train_paths)
    tokenizer = make_tokenizer(config, samples)
    model = make_model(config, tokenizer)
    return samples, tokenizer, model


def run_folder(config):
    return config.run_dir


def built(config):
    """Names, types, values and freedom of all weights."""
    model = parts_of(config)[2]
    return digest(model.state_dict()), [(n, p.dtype) for n, p in model.named_parameters() if p.requires_grad]


def applied(config):
    """What the model makes of a batch, all weights drawn anew so that only its ways of working count."""
    samples, tokenizer, model = parts_of(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = make_collator(model, tokenizer, config.data)(samples[:3])
    with torch.no_grad():
        return model.eval()(**batch).loss.item()


def batched(config, draw=None):
    """What the collator makes of three samples, those of a training draw where one is given."""
    samples, tokenizer, model = parts_of(config)
    collator = make_collator(model, tokenizer, config.data)
    picked = [dataclasses.replace(sample, draw=draw) for sample in (samples[0], samples[1], samples[-1])]
    flat = {}
    for key, value in collator(picked).items():
        for i, tensor in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(tensor, torch.Tensor):
                flat[f"{key}.{i}"] = tensor
    return digest(flat)


def decoded(config):
    """How often a set of views is loaded that is asked for twice."""
    samples, tokenizer, model = parts_of(config)
    collator, count = make_collator(model, tokenizer, config.data), []
    load = collator.load_pictures
    collator.load_pictures = lambda sample: (count.append(1), load(sample))[1]
    for sample in (samples[0], samples[1]):
        collator([sample])
    return len(count)


def trained(config):
    """Curve, checkpoints and weights of a short run."""
    run_dir = train(config)
    entries = [{k: v for k, v in e.items() if k not in TIMES} for e in read_metrics(run_dir / "metrics.jsonl")]
    weights = load_model_folder(run_dir / "model")[0].state_dict()
    return entries, [path.name for path in list_checkpoints(run_dir / "checkpoints")], digest(weights)


TIMES = ("elapsed_s", "samples_per_s", "tokens_per_s", "memory_gb")


def cached(config):
    """Files of the feature cache after a run, and how large they are."""
    train(config)
    folder = Path(config.data.features.folder or "none")
    return sorted((folder.name, path.name, path.stat().st_size) for path in folder.rglob("*.safetensors"))


def held(config):
    """View sets whose features are in memory after a run."""
    seen = []
    step = trainer_module.RoomPlanTrainer.train

    def look(self, *args, **kwargs):
        step(self, *args, **kwargs)
        residence = self.collator.features.residence
        seen.append(residence and (residence.on_device, len(residence.held)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.RoomPlanTrainer, "train", look)
        train(config)
    return seen


def loaders(config):
    """Loader processes that a run asks for."""
    asked = []

    class Recorded(torch.utils.data.DataLoader):
        def __init__(self, *args, **kwargs):
            asked.append(kwargs.get("num_workers", 0))
            super().__init__(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "DataLoader", Recorded)
        train(config)
    return asked


def recomputing(config):
    """Parts of the model that forget their activations while it trains."""
    seen = []
    step = trainer_module.RoomPlanTrainer.train

    def look(self, *args, **kwargs):
        seen.append([name for name, m in self.model.named_modules() if getattr(m, "gradient_checkpointing", False)])
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.RoomPlanTrainer, "train", look)
        train(config)
    return seen


def compiling(config):
    """Kinds of the layers that are to be compiled, which takes too long here."""
    kinds = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda self: kinds.append(type(self).__name__))
        train(config)
    return kinds


def processes(config):
    command = group_command(Path("folder"), 1, processes_per_node(config))
    return command[command.index("--num_processes") + 1]


def strategy(config):
    """Which class shares the weights, and what it asks of DeepSpeed; nothing is started."""
    from roomplan_lib.training import strategy as module

    class Asked(Exception):
        pass

    class DeepSpeed:
        @staticmethod
        def initialize(**given):
            assert os.environ["LOCAL_RANK"] == "0"
            raise Asked(given["config"]["zero_optimization"])

    samples, tokenizer, model = parts_of(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_import_deepspeed", lambda device: DeepSpeed)
        patch.delenv("LOCAL_RANK", raising=False)
        group = module.Processes(torch.device("cpu"))
        try:
            made = module.make_strategy(config, model, trainer_module.parameter_groups(model, config), group)
        except Asked as asked:
            assert "LOCAL_RANK" not in os.environ, "what runs next in this process would wait for a group"
            return str(asked)
        return type(made).__name__


def predicted(config):
    """Rows of all controls, with the untrained model."""
    folder = predict_run(config, "base")
    return {path.name: path.read_text() for path in sorted(folder.glob("*.jsonl"))}


def forward_sizes(config):
    """Samples of each batch that is answered."""
    from roomplan_lib.training.collator import Collator

    sizes = []
    collate = Collator.__call__

    def look(self, samples, *args, **kwargs):
        sizes.append(len(samples))
        return collate(self, samples, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collator, "__call__", look)
        predict_run(config, "base")
    return sizes


ACTIONS = {"data.train_files": "anchors_train", "data.eval_files": "anchors_val"}
ONE_STEP = {"training.max_steps": 1}
CACHED = {"data.features.folder": "{tmp}/features", "model.positions.method": "base"}
OWN_POINTS = {"model.positions.source": "vggt", "model.vggt": MICRO["vggt"] | HEADS}
WITH_LORA = {"model.language_model.lora": LORA}
THAWED = {"model.freeze_vggt": False}
CHANGES = {
    "run_name": Change("other", run_folder),
    "runs_dir": Change("{tmp}/elsewhere", run_folder),
    "seed": Change(1, built),
    "data.train_files": Change("anchors_train", trained, ONE_STEP),
    "data.train_shares": Change([0.0, 1.0], trained, ONE_STEP),
    "data.eval_files": Change("anchors_val", trained),
    "data.image_size": Change(42, batched),
    "data.max_length": Change(12, batched),
    "data.visual_first": Change(False, batched),
    "data.codec": Change("cm", batched),
    "data.loss_weights.places": Change(4.0, partial(batched, draw=3), ACTIONS),
    "data.loss_weights.answers": Change(4.0, partial(batched, draw=3)),
    "data.cache_scenes": Change(0, decoded),
    "data.features.folder": Change("{tmp}/other", cached, CACHED | ONE_STEP),
    "data.features.dtype": Change("float32", cached, CACHED | ONE_STEP),
    "data.features.on_missing": Change("error", cached, CACHED | ONE_STEP),
    "data.features.pool": Change(2, cached, CACHED | ONE_STEP),
    "data.features.resident": Change("host", held, CACHED | ONE_STEP),
    "data.view_dropout": Change(0.9, partial(batched, draw=3)),
    "data.num_workers": Change(1, loaders, ONE_STEP),
    "data.augmentation.yaw_deg": Change(90.0, partial(batched, draw=3)),
    "data.augmentation.scale_jitter": Change(0.5, partial(batched, draw=3), ACTIONS),
    "model.vggt": Change(MICRO["vggt"] | {"depth": 1}, built),
    "model.vggt_weights": Change("{tmp}/vggt.safetensors", built),
    "model.freeze_vggt": Change(False, built),
    "model.tap_layers": Change([0, 1], built),
    "model.resampler.num_latents": Change(3, built),
    "model.resampler.num_layers": Change(2, built),
    "model.resampler.width": Change(24, built),
    "model.resampler.ffn_width": Change(24, built),
    "model.resampler.head_width": Change(16, applied),
    "model.resampler.max_views": Change(31, built),
    "model.resampler.kind": Change("reference", built),
    "model.geometry.num_tokens": Change(2, built),
    "model.geometry.width": Change(24, built),
    "model.geometry.head_width": Change(16, applied),
    "model.positions.method": Change("sin3d_pe", built),
    "model.positions.coordinates": Change("discrete", applied),
    "model.positions.width": Change(12, built),
    "model.positions.source": Change("vggt", applied, {"model.vggt": MICRO["vggt"] | HEADS}),
    "model.positions.position_encoding_dim": Change(12, built),
    "model.positions.n_points": Change(2, batched),
    "model.positions.min_valid_share": Change(1.5, batched),
    "model.positions.add_to": Change("encoder", applied),
    "model.language_model.name": Change("{tmp}/qwen", built),
    "model.language_model.config": Change(MICRO["language_model"]["config"] | {"num_hidden_layers": 1}, built),
    "model.language_model.tokenizer": Change("{tmp}/qwen", batched),
    "model.language_model.vocab_size": Change(500, built),
    "model.language_model.freeze": Change(True, built),
    "model.language_model.lora": Change(LORA, built),
    "model.language_model.lora.rank": Change(3, built, WITH_LORA),
    "model.language_model.lora.alpha": Change(8.0, applied, WITH_LORA),
    "model.language_model.lora.dropout": Change(0.5, trained, WITH_LORA | {"training.max_steps": 2}),
    "model.language_model.lora.target_modules": Change(["k_proj"], built, WITH_LORA),
    "model.frozen_dtype": Change("bfloat16", built),
    "training.start_from": Change("{tmp}/former", built),
    "training.max_steps": Change(3, trained),
    "training.micro_batch_size": Change(8, trained),
    "training.group_size": Change(2, trained),
    "training.gradient_accumulation_steps": Change(2, trained),
    "training.learning_rate": Change(1e-2, trained),
    "training.resampler_learning_rate": Change(1e-2, trained),
    "training.encoder_learning_rate": Change(1e-2, trained, THAWED),
    "training.weight_decay": Change(0.5, trained),
    "training.warmup_ratio": Change(0.9, trained),
    "training.lr_scheduler": Change("linear", trained, {"training.max_steps": 4}),
    "training.optimizer": Change("muon", trained, {"training.max_steps": 2, "training.warmup_ratio": 0.0}),
    "training.max_grad_norm": Change(1e-3, trained),
    "training.explosion_factor": Change(0.5, trained),
    "training.bf16": Change(True, trained),
    "training.compile": Change("always", compiling, ONE_STEP),
    "training.gradient_checkpointing": Change("always", recomputing, ONE_STEP),
    "training.log_every_steps": Change(3, trained, {"training.max_steps": 4}),
    "training.eval_every_steps": Change(1, trained),
    "training.num_eval_samples": Change(3, trained),
    "training.num_generated_samples": Change(2, trained),
    "training.save_every_steps": Change(1, trained),
    "training.keep_checkpoints": Change(1, trained, {"training.save_every_steps": 1}),
    "training.device": Change("cuda", trained),
    "distributed.strategy": Change("zero3", strategy),
    "distributed.num_processes": Change(2, processes),
    "distributed.offload": Change("all", strategy, {"distributed.strategy": "zero3"}),
    "prediction.num_scenes": Change(2, predicted),
    "prediction.max_new_tokens": Change(5, predicted),
    "prediction.batch_size": Change(3, forward_sizes),
    "prediction.controls": Change([], predicted),
    "prediction.constrained": Change("llguidance", predicted, ACTIONS | {"prediction.max_new_tokens": 192}),
}


def leaves(kind, prefix=""):
    """The paths of all settings; a section that may be absent counts itself as well."""
    for item in dataclasses.fields(kind):
        path = f"{prefix}{item.name}"
        default = getattr(kind(), item.name)
        if item.name == "lora":
            yield path
            default = parse(RunConfig, {"model": {"language_model": {"lora": {}}}}).model.language_model.lora
        if dataclasses.is_dataclass(default):
            yield from leaves(type(default), f"{path}.")
        else:
            yield path


def test_no_setting_is_forgotten():
    assert sorted(CHANGES) == sorted(leaves(RunConfig))


def changed(data, path, value):
    *sections, name = path.split(".")
    for section in sections:
        data = data.setdefault(section, {})
    data[name] = value


@pytest.fixture(scope="module")
def few_files(sample_files, tmp_path_factory):
    """Three scenes' first four records of each file, with the pictures where they are."""
    folder = tmp_path_factory.mktemp("few")
    for name, file in sample_files.items():
        kept = {}
        for record in read_samples(file):
            kept.setdefault(record["scene_id"], []).append(record)
        records = [record for scene in list(kept.values())[:3] for record in scene[:4]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        manifest = read_manifest(file) | {"root": str(sample_root(file).resolve())}
        (folder / f"{name}.manifest.json").write_text(json.dumps(manifest))
    return folder


def config_of(few_files, tmp, changes):
    data = {
        "run_name": "run", "runs_dir": str(tmp / "runs"),
        "data": {"train_files": ["qa_train", "anchors_train"], "eval_files": ["qa_val", "anchors_val"],
                 "image_size": 28, "max_length": 1024},
        "model": copy.deepcopy(MICRO),
        "training": {"max_steps": 2, "micro_batch_size": 4, "group_size": 4, "log_every_steps": 1,
                     "eval_every_steps": 2, "num_eval_samples": 4, "save_every_steps": 2, "warmup_ratio": 0.0,
                     "device": "cpu"},
        "prediction": {"max_new_tokens": 3, "controls": ["blind"], "num_scenes": 1},
    }  # fmt: skip
    for path, value in changes.items():
        changed(data, path, value.format(tmp=tmp) if isinstance(value, str) else value)
    for key in ("train_files", "eval_files"):
        names = data["data"][key]
        data["data"][key] = [
            str(few_files / f"{name}.jsonl") for name in ([names] if isinstance(names, str) else names)
        ]
    return parse(RunConfig, data)


class Refused(str):
    """What was wrong with the settings."""


def seen(look, few_files, tmp, changes):
    """What a look shows, or the error that the settings end in."""
    tmp.mkdir()
    made = " ".join(str(value) for value in changes.values())
    base = {key: value for key, value in changes.items() if not str(value).startswith("{tmp}/")}
    if "former" in made:
        train(dataclasses.replace(config_of(few_files, tmp, base | ONE_STEP), run_name="former", runs_dir=str(tmp)))
    if "vggt.safetensors" in made:
        torch.manual_seed(7)
        save_file(VGGT(vggt_settings(config_of(few_files, tmp, base).model)).state_dict(), tmp / "vggt.safetensors")
    if "qwen" in made:
        _, tokenizer, model = parts_of(
            config_of(few_files, tmp, base | {"seed": 5, "model.language_model.vocab_size": 450})
        )
        model.language_model.save_pretrained(tmp / "qwen")
        tokenizer.save_pretrained(tmp / "qwen")
    try:
        return look(config_of(few_files, tmp, changes))
    except ValueError as error:
        return Refused(str(error).replace(str(tmp), ""))


_BASES: dict = {}


@pytest.mark.parametrize("path", CHANGES)
def test_every_setting_changes_something(path, few_files, tmp_path, capsys):
    change = CHANGES[path]
    key = (str(change.look), str(change.beside))
    if key not in _BASES:
        _BASES[key] = seen(change.look, few_files, tmp_path / "base", change.beside)
    base = _BASES[key]
    other = seen(change.look, few_files, tmp_path / "other", change.beside | {path: change.value})
    assert not isinstance(base, Refused), base  # the base works
    assert other != base
