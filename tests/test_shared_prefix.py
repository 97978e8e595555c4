"""Questions that share a prefix are what they are alone: losses, gradients, and the tokens that are written."""

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F

from roomplan_lib.actions.decoding import GrammarEngine
from roomplan_lib.config import LoraSettings, LossWeightsConfig
from roomplan_lib.model import vlm
from roomplan_lib.model.attention import OF_TEXT
from roomplan_lib.model.generation import Prompt, generate_texts
from roomplan_lib.model.shared_prefix import PrefixLayout, attend, lay_out, prefix_length
from roomplan_lib.model.vlm import summed_loss
from roomplan_lib.training.answers import prompt_of
from roomplan_lib.training.collator import load_samples
from roomplan_lib.training.metrics import read_metrics
from roomplan_lib.training.run import make_collator, make_model, make_tokenizer, train
from roomplan_lib.training.trainer import count_supervised


def changed(config, **sections):
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )


def variant(config, name):
    """The tiny run with random, larger weights wherever they would begin as nothing, so that no gradient is zero."""
    model = config.model
    if name == "without geometry tokens":
        model = dataclasses.replace(model, geometry=dataclasses.replace(model.geometry, num_tokens=0))
    if name == "without positions":
        model = dataclasses.replace(model, positions=dataclasses.replace(model.positions, method="base"))
    if name == "LoRA, frozen encoder":
        language_model = dataclasses.replace(model.language_model, lora=LoraSettings(rank=4))
        model = dataclasses.replace(model, freeze_vggt=True, language_model=language_model)
    return dataclasses.replace(config, model=model)


def make(config):
    samples = load_samples(config.data.train_paths)
    tokenizer = make_tokenizer(config, samples)
    model = make_model(config, tokenizer).train()
    torch.manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model, make_collator(model, tokenizer, config.data), samples


def ragged(samples, size):
    """`size` questions of one scene, then fewer of others, words and actions, long and short ones in turn."""
    chosen = []
    for number, group in enumerate(by_scene(samples)[:3]):
        group = sorted(group, key=lambda s: len(str(s.record)))
        mixed = [group[i // 2] if i % 2 else group[-1 - i // 2] for i in range(len(group))]
        chosen += mixed[: max(1, size - 3 * number)]
    return chosen


def backward(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "name",
    ["tiny", "without geometry tokens", "without positions", "LoRA, frozen encoder", "hidden views", "weighted tokens"],
)
@pytest.mark.parametrize("size", [1, 4, 8, 16])
def test_grouped_equals_ungrouped(tiny_config, name, size):
    """Loss and every gradient within 1e-5, relative, in float32."""
    config = changed(variant(tiny_config, name), data={"view_dropout": 0.5 if name == "hidden views" else 0.0})
    if name == "weighted tokens":
        config = changed(config, data={"loss_weights": LossWeightsConfig(3.0, 5.0)})
    model, collator, samples = make(config)
    chosen = [dataclasses.replace(s, draw=7) for s in ragged(samples, size)]
    batch = collator(chosen)
    shared = batch.pop("shared_prefix", None)
    assert (shared is None) == (size == 1)
    if shared is None:  # one question of each scene: nothing to share, the plain path
        return
    lengths = batch["attention_mask"].sum(1)
    assert len(lengths.unique()) > 2  # ragged
    loss, gradients = backward(model, batch)
    shared_loss, shared_gradients = backward(model, {**batch, "shared_prefix": shared})
    assert shared_loss == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == shared_gradients.keys() and any("resampler" in key for key in gradients)
    for key, gradient in gradients.items():
        assert (shared_gradients[key] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, key


def test_the_sum_over_questions_alone(tiny_config):
    """One batch of a group equals its questions one by one, each in a batch of its own."""
    model, collator, samples = make(tiny_config)
    chosen = ragged(samples, 8)[:8]
    count = sum(int((collator([s])["labels"] >= 0).sum()) for s in chosen)
    model.zero_grad()
    total = 0.0
    for sample in chosen:
        batch = collator([sample])
        assert "shared_prefix" not in batch
        loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    alone = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss, gradients = backward(model, collator(chosen))
    assert loss == pytest.approx(total, rel=1e-5)
    for key, gradient in gradients.items():
        assert (gradient - alone[key]).norm() <= 1e-5 * alone[key].norm() + 1e-9, key


@pytest.mark.parametrize("shares", [True, False])
def test_weighted_tokens_count_so_many_times(tiny_config, shares, monkeypatch):
    """The loss against logits of the same rows, weighted by the characters that the tokens stand for."""
    config = changed(tiny_config, data={"loss_weights": LossWeightsConfig(3.0, 5.0)})
    model, collator, samples = make(config)
    scene = [s for s in samples if s.record["scene_id"] == samples[0].record["scene_id"]]
    actions, questions = ([s for s in scene if key in s.record][:3] for key in ("instruction", "question"))
    chosen = [dataclasses.replace(s, draw=1) for s in actions + questions]
    batch = collator(chosen)
    if not shares:
        del batch["shared_prefix"]
    rest = {k: v for k, v in batch.items() if k not in ("labels", "loss_weights", "shared_prefix")}
    log_shares = model(**rest).logits.log_softmax(-1)
    total = weight = 0.0
    kinds = set()
    for row, sample in enumerate(chosen):
        ids = batch["labels"][row]
        ids = ids[ids >= 0].tolist()
        start = int((batch["labels"][row] >= 0).nonzero()[0])
        text = collator.tokenizer.decode(ids[:-1])
        centers = re.finditer(r'"center":(\[-?\d+\.\d)\d(,-?\d+\.\d)\d,', text)
        spans = [center.span(k) for center in centers for k in (1, 2)]
        assert len(spans) == 2 * ("instruction" in sample.record)
        for place, token in enumerate(ids):
            at, after = (len(collator.tokenizer.decode(ids[:n])) for n in (place, place + 1))
            own = 3.0 if any(first < after and at < end for first, end in spans) else 1.0
            if "question" in sample.record:
                own = 5.0 if place < len(ids) - 1 else 1.0
            kinds.add(own)
            total -= own * log_shares[row, start + place - 1, token].item()
            weight += own
    assert kinds == {1.0, 3.0, 5.0}
    assert count_supervised(batch) == pytest.approx(weight)
    assert model(**batch).loss.item() == pytest.approx(total / weight, rel=1e-5)
    assert model(**batch, num_items_in_batch=7).loss.item() == pytest.approx(total / 7, rel=1e-5)
    monkeypatch.setattr(vlm, "LOGITS_AT_ONCE", 4 * len(collator.tokenizer))
    assert model(**batch).loss.item() == pytest.approx(total / weight, rel=1e-5)
    held_out = collator([dataclasses.replace(s, draw=None) for s in chosen])
    assert "loss_weights" not in held_out and "weights" not in held_out.get("shared_prefix", {})


def test_a_question_sees_no_other(tiny_config):
    """Another question in the group, of another length, does not move a question's loss."""
    model, collator, samples = make(tiny_config)
    group = ragged(samples, 6)[:6]
    losses = []
    for others in (group[1:3], group[3:6]):
        batch = collator([group[0], *others])
        shared = batch["shared_prefix"]
        first = int((batch["labels"][0] >= 0).sum())
        kept = {**shared, "predicting": shared["predicting"][:first], "targets": shared["targets"][:first]}
        losses.append(model(**{**batch, "shared_prefix": kept}).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_batch_that_shares_calls_the_same_modules_as_one_that_does_not(tiny_config):
    """Under ZeRO-3 each call fetches weights from the other processes, whose batch may share nothing."""
    model, collator, samples = make(tiny_config)
    calls = []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None and not name.startswith("encoder."):
            module.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
    orders = []
    for chosen in (ragged(samples, 4)[:4], [group[0] for group in by_scene(samples)[:4]]):
        batch = collator(chosen)
        model(**batch)
        orders.append(("shared_prefix" in batch, [*calls]))
        calls.clear()
    (shares, one), (shares_too, other) = orders
    assert shares and not shares_too and one == other and "language_model.model.embed_tokens" in one


def by_scene(samples):
    scenes = {}
    for sample in samples:
        scenes.setdefault(sample.record["scene_id"], []).append(sample)
    return list(scenes.values())


def random_layout(generator, groups=3, length=5):
    lengths = torch.tensor([4, 1, 3, 6, 2, 6, 1])
    group = torch.tensor([0, 0, 1, 2, 2, 2, 0])
    width = int(lengths.max())
    own = torch.arange(width)[None] < lengths[:, None]
    return PrefixLayout(length, width, group, own.flatten().nonzero()[:, 0], groups), lengths


def who_sees_whom(layout, lengths):
    """The same relation, token by token, from each question's own row."""
    places = [(g, -1, t) for g in range(layout.num_groups) for t in range(layout.length)]
    places += [
        (int(layout.group[b]), b, layout.length + t) for b, count in enumerate(lengths.tolist()) for t in range(count)
    ]
    return places, torch.tensor(
        [[g == h and (c == -1 or c == b) and u <= t for h, c, u in places] for g, b, t in places]
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("ragged", [1.0, 1.5, 2.0])
def test_attention_by_question_equals_a_dense_mask_and_flex_attention(ragged, monkeypatch):
    """All view sets at once, and one by one where that saves enough scores."""
    monkeypatch.setattr("roomplan_lib.model.shared_prefix.RAGGED", ragged)
    generator = torch.Generator().manual_seed(0)
    layout, lengths = random_layout(generator)
    assert len(layout.by_view_set) == (3 if ragged < 2 else 0)  # 594 scores against 330
    places, mask = who_sees_whom(layout, lengths)
    assert layout.num_tokens == len(places)
    assert layout.position_ids().tolist() == [t for _, _, t in places]
    query = torch.randn(1, 4, len(places), 8, generator=generator, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(1, 2, len(places), 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    dense = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    attended, _ = attend(None, query, key, value, None, prefix_layout=layout, scaling=0.3)
    assert torch.allclose(attended, dense.transpose(1, 2), atol=1e-12)
    weight = torch.randn(dense.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad((dense * weight).sum(), (query, key, value))
    found = torch.autograd.grad((attended * weight.transpose(1, 2)).sum(), (query, key, value))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    filled = [F.pad(t.detach(), (0, 0, 0, 64 - len(places))) for t in (query, key, value)]
    with torch.no_grad():
        flex, _ = attend(None, *filled, None, prefix_layout=layout.with_block_mask(64), scaling=0.3)
    assert torch.allclose(flex[:, : len(places)], dense.transpose(1, 2), atol=1e-12)
    assert flex.isfinite().all()


@pytest.mark.parametrize("kind", ["causal", "padded", "added"])
def test_attention_of_rows_equals_fused_attention(kind):
    generator = torch.Generator().manual_seed(0)

    def draw(heads):
        return torch.randn(3, heads, 9, 8, generator=generator, dtype=torch.float64, requires_grad=True)

    states, mask = [draw(4), draw(2), draw(2)], None
    if kind != "causal":
        mask = torch.ones(9, 9, dtype=torch.bool).tril().expand(3, 1, 9, 9).clone()
        mask[1, :, :, 6:] = False
        mask = mask if kind == "padded" else torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e9)
    dense = F.scaled_dot_product_attention(
        *states, attn_mask=mask, is_causal=mask is None, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    attended, _ = attend(None, *states, mask, scaling=0.3)
    assert torch.allclose(attended, dense, atol=1e-12)
    weight = torch.randn(dense.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), states) for y in (attended, dense)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_gives_the_loss_of_the_whole_model(tiny_config, monkeypatch):
    """The path of a GPU, its rows filled up to whole blocks, on the CPU, where it has no gradient."""
    model, collator, samples = make(tiny_config)
    batch = collator(ragged(samples, 8))
    expected = model(**batch).loss.item()
    monkeypatch.setattr(vlm, "takes_block_mask", lambda device: True)
    with torch.no_grad():
        assert model.requires_grad_(False)(**batch).loss.item() == pytest.approx(expected, rel=1e-6)


def test_what_prompts_begin_with():
    image = 9
    assert prefix_length([[1, image, image, 2, 3], [1, image, image, 4]], image) == 3
    assert prefix_length([[1, image, image, 2], [5, image, image, 2]], image) == 0  # the question comes first
    assert prefix_length([[1, 2], [1, 3]], image) == 0  # no views
    assert prefix_length([[1, image, 2], [1, image, image, 2]], image) == 0
    assert prefix_length([[1, image, 2, image, 3], [1, image, 2, image, 4]], image) == 4


def test_lay_out_says_where_each_target_is_predicted():
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, -100, -100, 7, 8], [-100, -100, -100, 9, -100, -100]])
    found = lay_out(mask, labels, 2)
    assert found["tokens"].tolist() == [0, 1, 2, 3, 4, 5]  # of [2, 4]: four of the first row, two of the second
    assert found["predicting"].tolist() == [1, 2, 4] and found["targets"].tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"lora": LoraSettings(rank=4, dropout=0.1)}, "dropout would be drawn once for a prefix"),
        ({"config": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}}, "sliding"),
        ({"config": {"attention_dropout": 0.1}}, "dropout"),
    ],
)
def test_a_language_model_that_cannot_share_trains_question_by_question(tiny_config, change, reason):
    settings = tiny_config.model.language_model
    if "config" in change:
        change = {"config": {**settings.config, **change["config"]}}
    settings = dataclasses.replace(settings, **change)
    config = dataclasses.replace(tiny_config, model=dataclasses.replace(tiny_config.model, language_model=settings))
    model, collator, samples = make(config)
    assert reason in model.why_not_shared
    assert "shared_prefix" not in collator(ragged(samples, 4))


def test_a_question_before_its_views_is_not_shared(tiny_config):
    model, collator, samples = make(changed(tiny_config, data={"visual_first": False}))
    assert not model.why_not_shared
    assert "shared_prefix" not in collator(ragged(samples, 4))


def test_logits_in_parts_give_the_same_loss(monkeypatch):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    hidden, targets = torch.randn(23, 8, requires_grad=True), torch.randint(50, (23,))
    whole = summed_loss(head, hidden, targets)
    expected = torch.autograd.grad(whole, (hidden, head.weight))
    monkeypatch.setattr(vlm, "LOGITS_AT_ONCE", 50 * 4)
    largest = []
    head.register_forward_hook(lambda module, args, output: largest.append(len(output)))
    parts = summed_loss(head, hidden, targets)
    found = torch.autograd.grad(parts, (hidden, head.weight))
    assert max(largest) == 4 and parts.item() == pytest.approx(whole.item(), rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
def test_compiled_layers_train_the_same(tiny_config):
    """Six steps whose rows differ in number and length."""
    losses = []
    for compiled in ("never", "always"):
        config = changed(tiny_config, training={"compile": compiled, "eval_every_steps": 0})
        run_dir = train(dataclasses.replace(config, run_name=compiled))
        losses.append([entry["loss"] for entry in read_metrics(run_dir / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 6


# ---------------------------------------------------------------------------- what is written
@pytest.fixture
def writing(tiny_config):
    """A model that writes texts of different lengths, its engine without a grammar, and prompts of three scenes."""
    model, collator, samples = make(tiny_config)
    for parameter in model.language_model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    engine = GrammarEngine(collator.tokenizer, model.language_model.config.vocab_size, "none")
    return model.double().eval(), engine, collator(ragged(samples, 9), generate=True)


def written(model, engine, prompt, **settings):
    return generate_texts(model.language_model, prompt, engine, max_new_tokens=24, **settings)


def test_a_shared_prefix_writes_the_same_tokens(writing):
    model, engine, batch = writing
    prompt, plain = prompt_of(model, batch), prompt_of(model, batch, share_prefix=False)
    assert prompt.cache is not None and plain.cache is None
    assert prompt.embeddings.shape[1] < plain.embeddings.shape[1] - model.num_visual_tokens + 1
    a, b = written(model, engine, prompt), written(model, engine, plain)
    assert torch.equal(a.ids, b.ids) and torch.allclose(a.log_probs, b.log_probs, atol=1e-6)
    assert len({tuple(row) for row in a.ids.tolist()}) > 3
    views = {key: value for key, value in batch.items() if key not in OF_TEXT}
    inputs = {key: value for key, value in batch.items() if key in OF_TEXT}
    eos, pad = engine.tokenizer.eos_token_id, engine.tokenizer.pad_token_id
    ids = model.generate(**inputs, views=views, max_new_tokens=24, do_sample=False, eos_token_id=eos, pad_token_id=pad)
    assert torch.equal(a.ids, ids)
    again = written(model, engine, prompt)  # the prompt was not written into
    assert torch.equal(a.ids, again.ids)


def test_sampled_tokens_are_the_same_too(writing):
    model, engine, batch = writing
    settings = {"do_sample": True, "temperature": 1.3, "top_k": 40}
    found = [
        written(model, engine, prompt_of(model, batch, share), generator=torch.Generator().manual_seed(3), **settings)
        for share in (True, False)
    ]
    assert torch.equal(found[0].ids, found[1].ids)


def test_rows_that_have_ended_are_read_no_more(writing):
    """Most rows may write one letter alone; the others go on as if they were by themselves."""
    model, unbound, batch = writing
    engine = GrammarEngine(unbound.tokenizer, model.language_model.config.vocab_size)
    prompt, count = prompt_of(model, batch), len(batch["input_ids"])
    free = [1, 4]
    expected = written(model, engine, prompt.of(free))
    sizes = []
    head = model.language_model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    grammars = [None if i in free else 'start: "a"' for i in range(count)]
    mixed = written(model, engine, prompt, grammars=grammars)
    assert sizes[0] == count and sizes[-1] <= len(free)
    for row, k in zip(expected.ids, free, strict=True):
        assert mixed.ids[k, : len(row)].tolist() == row.tolist()
    others = mixed.finished.tolist()
    assert all(done for i, done in enumerate(others) if i not in free)


def test_a_cache_of_fixed_size_writes_the_same_tokens(writing):
    model, engine, batch = writing
    prompt = prompt_of(model, batch)
    model.language_model.get_compiled_call = lambda config: model.language_model  # compiled in the slow test below
    a, b = written(model, engine, prompt), written(model, engine, prompt, static=True)
    c = written(model, engine, prompt_of(model, batch, share_prefix=False), static=True)
    assert torch.equal(a.ids, b.ids) and torch.equal(a.ids, c.ids)
    with pytest.raises(ValueError, match="static: rows that jump"):
        generate_texts(model.language_model, prompt, engine, static=True, synced=True)


@pytest.mark.slow
def test_a_compiled_step_writes_the_same_tokens(writing):
    model, engine, batch = writing
    prompt = prompt_of(model, batch)
    assert torch.equal(written(model, engine, prompt).ids, written(model, engine, prompt, static=True).ids)


def test_rows_of_a_prompt(writing):
    model, engine, batch = writing
    prompt = prompt_of(model, batch)
    whole, some = written(model, engine, prompt), written(model, engine, prompt.of([5, 2]))
    for row, k in zip(some.ids, (5, 2), strict=True):
        assert row.tolist() == whole.ids[k, : len(row)].tolist()


def test_a_blind_prompt_shares_nothing(writing):
    model, _, batch = writing
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    ids = text["input_ids"].masked_fill(text["input_ids"] == model.config.image_token_id, 3)
    prompt = model.read_prompt(ids, text["attention_mask"], views={})
    assert isinstance(prompt, Prompt) and prompt.cache is None
