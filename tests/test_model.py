"""The pathway from pixels to tokens: what moves, what is seen, what is supervised, and that generation agrees."""

import copy
import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from roomplan_lib.config import DataConfig, GeometryConfig, LoraSettings, ResamplerConfig
from roomplan_lib.model.attention import OF_TEXT
from roomplan_lib.model.geometry_tokens import RECORD_WIDTH, GeometryEncoder
from roomplan_lib.model.resampler import PerceiverResampler, build_resampler, sine_grid
from roomplan_lib.model.vlm import RoomPlanVLM, build_model, parameter_table
from roomplan_lib.samples.targets import response_text
from roomplan_lib.training.collator import (
    IGNORE_INDEX,
    load_samples,
    resized_size,
)
from roomplan_lib.training.prompt import prompt_text
from roomplan_lib.training.run import make_collator, make_model, make_tokenizer
from roomplan_lib.training.tokenizer import IMAGE_TOKEN, TURN_END, train_tokenizer
from roomplan_lib.training.trainer import parameter_groups


@pytest.fixture
def setup(tiny_config):
    """(model in train mode, tokenizer, collator, training samples of several scenes and both kinds)."""
    return make_setup(tiny_config)


def make_setup(config):
    samples = load_samples(config.data.train_paths)
    tokenizer = make_tokenizer(config, samples)
    model = make_model(config, tokenizer).train()
    return model, tokenizer, make_collator(model, tokenizer, config.data), samples


def mixed(samples, count=8):
    """`count` samples of both kinds and at least two scenes, some sharing their views."""
    picked = samples[:: max(1, len(samples) // count)][:count]
    assert len({s.view_key for s in picked}) >= 2 and {"answer" in s.record for s in picked} == {True, False}
    return picked


def prompt_inputs(batch):
    views = {k: v for k, v in batch.items() if k not in OF_TEXT}
    return batch["input_ids"], batch["attention_mask"], batch["scene_index"], views


def replace_model(config, **changes):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


# ---------------------------------------------------------------------------- what moves
@pytest.mark.parametrize("frozen", [False, True])
def test_every_trainable_part_moves_and_frozen_parts_do_not(tiny_config, frozen):
    if frozen:
        language_model = dataclasses.replace(tiny_config.model.language_model, lora=LoraSettings(rank=4))
        tiny_config = replace_model(tiny_config, freeze_vggt=True, language_model=language_model)
    model, _, collator, samples = make_setup(tiny_config)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(parameter_groups(model, tiny_config))
    for start in (0, 1):  # a LoRA's A matrix moves once its B has left zero
        model(**collator(mixed(samples[start:]))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {"resampler", "geometry_encoder", "positions"} | ({"language_model"} if frozen else set(model.parts()))
    assert {name.split(".")[0] for name in trainable} == expected | {"language_model"}
    stuck = trainable - moved
    # Adam moves whatever has a gradient; the null geometry has one only where a sample lacks geometry
    assert stuck <= {"geometry_encoder.null_record"}
    assert all(name in trainable for name in moved - {"language_model.lm_head.weight"})  # the head is tied
    if frozen:
        assert all("lora_" in name for name in moved if name.startswith("language_model"))
        assert not model.train().encoder.training


def test_optimizer_groups_hold_each_trainable_parameter_once(setup, tiny_config):
    model = setup[0]
    grouped = [id(p) for group in parameter_groups(model, tiny_config) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    decayed = [p for g in parameter_groups(model, tiny_config) if g["weight_decay"] for p in g["params"]]
    assert all(p.dim() >= 2 for p in decayed)


def test_muon_has_the_matrices_of_linear_layers(tiny_config):
    config = dataclasses.replace(tiny_config, training=dataclasses.replace(tiny_config.training, optimizer="muon"))
    model = make_model(config, make_tokenizer(config, load_samples(config.data.train_paths)))
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    groups = parameter_groups(model, config)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(names)
    muon = {names[id(p)] for g in groups if g.get("muon") for p in g["params"]}
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    assert {shapes[name] for name in muon} == {2}
    assert not any("embed_tokens" in n or "lm_head" in n or n.endswith(("latents", "queries")) for n in muon)
    left = {n for n in set(names.values()) - muon if shapes[n] == 2}
    assert all(n.endswith(("embed_tokens.weight", "latents", "queries", "_embedding")) for n in left), left
    for part in ("encoder.", "resampler.", "geometry_encoder.", "positions.", "language_model."):
        assert any(name.startswith(part) for name in muon)
    rates = {g["name"]: g["lr"] for g in groups if g.get("muon")}
    assert rates == {g["name"]: g["lr"] for g in groups}
    with pytest.raises(ValueError, match="muon works on whole matrices, which strategy zero3 divides"):
        dataclasses.replace(config, distributed=dataclasses.replace(config.distributed, strategy="zero3"))


# ---------------------------------------------------------------------------- what is seen
@pytest.mark.parametrize("view", [0, -1])
@pytest.mark.parametrize("what", ["pixel_values", "geometry_records", "patch_coordinates"])
def test_every_view_reaches_the_answer(setup, view, what):
    model, _, collator, samples = setup
    batch = collator(mixed(samples))
    model.eval()
    labels = batch.pop("labels")
    logits = model(**batch).logits
    changed = [v.clone() for v in batch[what]]
    for values in changed:
        values[view] = 255 - values[view] if what == "pixel_values" else values[view] + 1
    other = model(**{**batch, what: changed}).logits
    answer = labels[:, 1:] != IGNORE_INDEX
    assert ((logits - other)[:, :-1][answer].abs().amax(-1) > 1e-6).all()


def test_shared_encoding_equals_one_sample_at_a_time(setup):
    model, _, collator, samples = setup
    model.eval()
    picked = mixed(samples)
    together = collator(picked)
    assert len(together["pixel_values"]) < len(picked)  # views of a scene are there once
    loss = (
        sum(model(**collator([s])).loss * (collator([s])["labels"] != IGNORE_INDEX).sum() for s in picked)
        / (together["labels"] != IGNORE_INDEX).sum()
    )
    assert model(**together).loss.item() == pytest.approx(loss.item(), rel=1e-5)


def test_unequal_view_counts_and_missing_geometry_share_a_batch(setup):
    model, _, collator, samples = setup
    model.eval()
    question = next(s for s in samples if "answer" in s.record)
    few = {k: v[:3] if k in ("images", "depths", "view_ids") else v for k, v in question.record.items()}
    few["geom_token"] = {k: v[:3] for k, v in question.record["geom_token"].items()}
    few = dataclasses.replace(question, record=few)
    batch = collator([question, few, question])
    batch.pop("labels")
    logits = model(**batch).logits
    alone = collator([few])
    alone.pop("labels")
    assert torch.allclose(logits[1], model(**alone).logits[0], atol=1e-5)
    batch["has_geometry"] = torch.tensor([True, False])
    assert not torch.allclose(model(**batch).logits[1], logits[1], atol=1e-6)
    assert torch.allclose(model(**batch).logits[0], logits[0], atol=1e-6)


def test_blind_prompts_hold_no_views(setup):
    model, tokenizer, collator, samples = setup
    batch = collator(mixed(samples), generate=True, blind=True)
    assert "pixel_values" not in batch and model.config.image_token_id not in batch["input_ids"]
    assert torch.isfinite(model(**batch).logits).all()


# ---------------------------------------------------------------------------- placeholders and labels
def test_labels_are_exactly_the_response_and_its_end(setup):
    model, tokenizer, collator, samples = setup
    for sample, ids, labels, mask in zip(
        mixed(samples), *(collator(mixed(samples))[k] for k in ("input_ids", "labels", "attention_mask")), strict=True
    ):
        supervised = labels != IGNORE_INDEX
        assert tokenizer.decode(labels[supervised]) == response_text(sample.record) + TURN_END
        assert torch.equal(ids[supervised], labels[supervised])
        assert supervised.nonzero().flatten().tolist() == list(
            range(int(mask.sum()) - int(supervised.sum()), int(mask.sum()))
        )
        text = prompt_text(sample.record, tokenizer, model.num_visual_tokens)
        assert tokenizer.decode(ids[~supervised & mask.bool()]) == text
        assert text.count(IMAGE_TOKEN) == model.num_visual_tokens
        assert text.startswith("<|im_start|>user\n<|vision_start|>") and text.endswith("<|im_start|>assistant\n")
        assert (sample.record.get("situation") or "") in text


def test_placeholder_count_is_checked_per_row(setup):
    model, _, collator, samples = setup
    batch = collator(mixed(samples))
    row, column = (batch["input_ids"] == model.config.image_token_id).nonzero()[0]
    batch["input_ids"][row, column] = 7
    with pytest.raises(ValueError, match="placeholders per row"):
        model(**batch)
    with pytest.raises(ValueError, match="placeholders per row"):
        model(batch["input_ids"], batch["attention_mask"])


def test_too_long_sample_is_named_not_cut(setup, tiny_config):
    model, tokenizer, _, samples = setup
    collator = make_collator(model, tokenizer, dataclasses.replace(tiny_config.data, max_length=40))
    with pytest.raises(ValueError, match=rf"scene {samples[0].record['scene_id']}.*data.max_length is 40"):
        collator(samples[:1])


def test_action_without_geometry_is_refused(setup):
    _, _, collator, samples = setup
    sample = next(s for s in samples if "action_json" in s.record)
    blank = dataclasses.replace(sample, record={**sample.record, "geom_token": None})
    with pytest.raises(ValueError, match="geom_token"):
        collator([blank])


def test_loss_equals_cross_entropy_over_full_logits(setup):
    model, _, collator, samples = setup
    model.eval()
    batch = collator(mixed(samples))
    labels = batch.pop("labels")
    logits = model(**batch).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    assert model(**batch, labels=labels).loss.item() == pytest.approx(expected.item(), rel=1e-5)


# ---------------------------------------------------------------------------- generation
def test_prefill_and_greedy_generation_equal_full_forwards(setup):
    model, tokenizer, collator, samples = setup
    model.eval()
    picked = mixed(samples, 6)
    ids, mask, index, views = prompt_inputs(collator(picked, generate=True))
    result = model.generate(
        ids, mask, index, views=views, max_new_tokens=6, do_sample=False, eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    for i, sample in enumerate(picked):  # one at a time, unpadded, no cache
        one_ids, one_mask, one_index, one_views = prompt_inputs(collator([sample], generate=True))
        for step in range(6):
            logits = model(one_ids, one_mask, scene_index=one_index, **one_views).logits[0, -1]
            assert torch.allclose(logits, result.logits[step][i], atol=1e-4)
            token = logits.argmax()
            assert token == result.sequences[i, step]
            one_ids = torch.cat([one_ids, token.view(1, 1)], dim=1)
            one_mask = torch.ones_like(one_ids)


def test_save_and_load_are_bit_equal(setup, tmp_path):
    model, _, collator, samples = setup
    model.eval().save_pretrained(tmp_path)
    batch = collator(mixed(samples))
    batch.pop("labels")
    loaded = RoomPlanVLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"num_latents": 32', '"num_latents": 16')
    )
    with pytest.raises(ValueError, match="do not fit"):
        RoomPlanVLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing"):
        RoomPlanVLM.from_pretrained(tmp_path)


def test_merged_lora_leaves_the_logits(tiny_config):
    language_model = dataclasses.replace(tiny_config.model.language_model, lora=LoraSettings(rank=4))
    model, _, collator, samples = make_setup(replace_model(tiny_config, language_model=language_model))
    names = [n for n, p in model.language_model.named_parameters() if p.requires_grad]
    layers, projections = 4, 4
    assert len(names) == 2 * layers * projections and all("lora_" in n for n in names)
    with torch.no_grad():
        for module in model.language_model.modules():
            if hasattr(module, "lora_B"):
                module.lora_B["default"].weight.normal_(std=0.1)
    batch = collator(mixed(samples))
    batch.pop("labels")
    model.eval()
    logits = model(**batch).logits
    for module in model.language_model.modules():
        if hasattr(module, "merge"):
            module.merge()
    assert torch.allclose(model(**batch).logits, logits, atol=1e-4)


def test_unknown_qwen_field_is_refused(tiny_config):
    language_model = dataclasses.replace(tiny_config.model.language_model, config={"hidden_sice": 64})
    settings = dataclasses.replace(tiny_config.model, language_model=language_model)
    with pytest.raises(ValueError, match="hidden_sice"):
        build_model(settings, tiny_config.data, 300, 5)
    with pytest.raises(ValueError, match="model.vggt.dept: unknown setting"):
        build_model(dataclasses.replace(tiny_config.model, vggt={"dept": 3}), tiny_config.data, 300, 5)


# ---------------------------------------------------------------------------- the parts on their own
def test_resampler_parameters_at_full_size():
    with torch.device("meta"):
        resampler = PerceiverResampler(ResamplerConfig(128, 6, 1024, 4096, 64), 1, 2048, 2560)
    attention = 1024 * 1024 * 2 + 1024 * 2048 * 2 + 1024 * 1024 * 4  # cross (q, kv, out) and self
    expected = 6 * (attention + 2 * 1024 * 4096 + 3 * 2 * 1024) + 128 * 1024 + 2 * 1024 + 1024 * 2560
    expected += 2 * 2048 + 2048 * (1 + 32 + 1 + 1)  # context norm; layer, view, camera embeddings, patch gain
    assert sum(p.numel() for p in resampler.parameters()) == expected
    assert 115e6 < expected < 117e6


def test_resampler_tells_views_patches_and_layers_apart():
    torch.manual_seed(0)
    resampler = PerceiverResampler(ResamplerConfig(4, 2, 32, 64, 16), 2, 24, 16)
    tokens = [torch.randn(1, 3, 2 + 6, 24) for _ in range(2)]
    out = resampler(tokens, 2, (2, 3))
    for other in (
        [t[:, [0, 2, 1]] for t in tokens],  # two views swapped
        [torch.cat([t[:, :, :2], t[:, :, 2:].flip(2)], dim=2) for t in tokens],  # patches reversed
        tokens[::-1],  # layers swapped
    ):
        assert not torch.allclose(resampler(other, 2, (2, 3)), out, atol=1e-6)
    registers = [t.clone() for t in tokens]
    registers[0][:, :, 1] = 9  # between camera token and patches: left out
    assert torch.equal(resampler(registers, 2, (2, 3)), out)
    with pytest.raises(ValueError, match="max_views is 2"):
        PerceiverResampler(ResamplerConfig(4, 2, 32, 64, 16, max_views=2), 2, 24, 16)(tokens, 2, (2, 3))


@pytest.mark.parametrize("width, num_layers", [(128, 2), (512, 6)])
def test_latents_and_geometry_queries_start_apart(width, num_layers):
    """Random directions: their mean cosine is near 0. With latents of 0.02 it was 0.99 after every layer."""
    torch.manual_seed(0)
    resampler = PerceiverResampler(ResamplerConfig(32, num_layers, width, 4 * width, 32), 1, 192, 64)
    geometry = GeometryEncoder(GeometryConfig(8, width, 32), 64)
    with torch.no_grad():
        visual = resampler([torch.randn(1, 8, 1 + 12, 192)], 1, (3, 4))[0]
        tokens = geometry(torch.randn(1, 8, RECORD_WIDTH), torch.tensor([True]))[0]
    for rows in (visual, tokens):
        unit = torch.nn.functional.normalize(rows, dim=-1)
        cosines = (unit @ unit.T)[~torch.eye(len(rows), dtype=torch.bool)]
        assert cosines.mean().abs() < 0.15


def test_a_spatial_token_is_the_mean_of_the_patches_nearest_to_a_place():
    torch.manual_seed(0)
    config = ResamplerConfig(num_latents=5, ffn_width=24, kind="spatial")
    resampler = build_resampler(config, 2, 16, 12)
    taps = [torch.randn(2, 3, 2 + 6, 16) for _ in range(2)]
    positions, coordinates = torch.randn(2, 3, 6, 16), torch.randn(2, 3, 6, 3)
    valid = torch.rand(2, 3, 6) > 0.3
    seen = torch.tensor([[True, True, True], [True, False, True]])
    for norm in resampler.context_norms:  # gains and biases that show
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    out = resampler(taps, 2, (2, 3), positions, seen, (coordinates, valid))
    own_marks = sine_grid((2, 3), 16, torch.device("cpu")) * resampler.patch_gain
    tokens = positions + resampler.view_embedding[:3, None] + own_marks
    for tap, norm, layer in zip(taps, resampler.context_norms, resampler.layer_embedding, strict=True):
        tokens = tokens + (norm(tap[:, :, 2:]) + layer) / 2
    tokens = tokens.detach().flatten(1, 2).numpy()
    weights = [p.detach().numpy() for p in resampler.mlp.parameters()]
    for row in range(2):
        points, there = coordinates[row].flatten(0, 1).numpy(), (valid & seen[..., None])[row].flatten().numpy()
        chosen = [int(np.flatnonzero(there)[0])]
        while len(chosen) < 5:
            apart = np.linalg.norm(points[:, None] - points[chosen], axis=-1).min(1)
            chosen.append(int(np.where(there, apart, -1).argmax()))
        nearest = np.linalg.norm(points[:, None] - points[chosen], axis=-1).argmin(1)
        for number in range(5):
            mean = tokens[row][there & (nearest == number)].mean(0)
            hidden = torch.nn.functional.gelu(torch.from_numpy(weights[0] @ mean + weights[1])).numpy()
            np.testing.assert_allclose(out[row, number].detach(), weights[2] @ hidden + weights[3], atol=1e-5)
    hidden_view = [t.clone() for t in taps]
    hidden_view[0][1, 1] = 9
    assert torch.equal(resampler(hidden_view, 2, (2, 3), positions, seen, (coordinates, valid)), out)

    def means(shares):
        return shares @ positions.flatten(1, 2)

    assert torch.equal(resampler(taps, 2, (2, 3), means, seen, (coordinates, valid)), out)


def test_spatial_tokens_without_coordinates_and_with_too_few_patches():
    torch.manual_seed(0)
    resampler = build_resampler(ResamplerConfig(num_latents=12, ffn_width=24, kind="spatial"), 1, 16, 12)
    taps = [torch.randn(2, 2, 1 + 6, 16)]
    plain = resampler(taps, 1, (2, 3))
    assert plain.isfinite().all() and (torch.pdist(plain[0]) > 1e-6).all()  # twelve patches, twelve places
    none = torch.zeros(2, 2, 6, 3), torch.zeros(2, 2, 6, dtype=torch.bool)
    assert torch.equal(resampler(taps, 1, (2, 3), None, None, none), plain)
    few = none[1].clone()
    few[1, 0, :3] = True  # one set without coordinates beside one of three patches
    mixed = resampler(taps, 1, (2, 3), None, None, (torch.randn(2, 2, 6, 3), few))
    assert torch.allclose(mixed[0], plain[0], atol=1e-6)
    empty = resampler.mlp(torch.zeros(16))
    assert torch.allclose(mixed[1, 3:], empty.expand(9, -1)) and not torch.allclose(mixed[1, 0], empty)
    same = torch.ones(2, 2, 6, 3), torch.ones(2, 2, 6, dtype=torch.bool)  # all at one point: the first takes them all
    assert torch.allclose(resampler(taps, 1, (2, 3), None, None, same)[:, 1:], empty.expand(2, 11, -1))


def test_geometry_tokens_differ_and_ignore_records_that_are_not_there():
    torch.manual_seed(0)
    encoder = GeometryEncoder(GeometryConfig(4, 32, 16), 24)
    records = torch.randn(2, 5, RECORD_WIDTH)
    has = torch.tensor([True, False])
    tokens = encoder(records, has)
    assert tokens.shape == (2, 4, 24)
    assert (torch.pdist(tokens[0]) > 1e-4).all()  # different tokens, not copies of one
    other = records.clone()
    other[1] = 7
    assert torch.equal(encoder(other, has), tokens)
    tokens[1].sum().backward()
    assert encoder.null_record.grad.abs().sum() > 0


def test_picture_sizes_keep_their_content():
    assert resized_size(256, 192, 112, 14) == (112, 84)
    assert resized_size(192, 256, 448, 14) == (336, 448)
    assert resized_size(1296, 968, 448, 14) == (448, 336)


def test_trained_tokenizer_splits_digits_and_encodes_anything():
    tokenizer = train_tokenizer(["Place an anchor at 123.45 123.45 123.45"] * 50, 400)
    assert tokenizer.tokenize("123.45") == ["1", "2", "3", ".", "4", "5"]
    for text in ("naïve 椅子 🪑\n\t x", "12.5,-3"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_parameter_table_adds_up(setup):
    rows = parameter_table(setup[0])
    assert rows[-1][1] == sum(row[1] for row in rows[:-1]) and rows[-1][2] == sum(row[2] for row in rows[:-1])


def test_default_data_settings_travel_with_the_model(setup):
    assert setup[0].config.data == {
        name: getattr(DataConfig(max_length=256), name)
        for name in ("image_size", "max_length", "visual_first", "codec")
    }


def test_a_model_folder_is_loaded_without_a_word(setup, tmp_path):
    """Warnings stand red in a notebook and make readers doubt a model that is whole."""
    model, tokenizer = setup[:2]
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    code = "import sys; from roomplan_lib.training.run import load_model_folder; load_model_folder(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "of type" not in done.stdout + done.stderr and "roomplan_vlm" not in done.stdout + done.stderr
