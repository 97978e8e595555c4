"""Answers to many questions about the same views: one at a time, in a padded batch, behind a shared prefix; and actions
held to the grammar, with and without a forward pass for what has no choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase

from roomplan_lib.actions.decoding import GrammarEngine
from roomplan_lib.actions.grammar import ActionGrammar
from roomplan_lib.config import RunConfig
from roomplan_lib.model.features import encode
from roomplan_lib.model.generation import generate_texts
from roomplan_lib.model.vlm import RoomPlanVLM
from roomplan_lib.scenes import CATEGORIES
from roomplan_lib.training.answers import PROMPT, prompt_of
from roomplan_lib.training.benchmark.measure import Clock, make_trainer, miniature

PROMPTS = 16
NEW_TOKENS = 24  # of an answer that no grammar ends
NUM_LATENTS = 128  # as at full size, where most of a prompt is visual tokens
# Weights so large, and a head of its own, that each question has other answers; else all repeat one token.
LANGUAGE_MODEL = {"initializer_range": 0.2, "tie_word_embeddings": False}


def measure_inference(config: RunConfig, job: dict) -> dict:
    """Answers per second to PROMPTS questions about one view set, or instructions for actions, by the miniature with
    random weights; `tokens`: what it answers, row by row.

    What the encoder makes of the views is in memory; each way passes it through the resampler as often as it reads it.
    """
    trainer = make_trainer(_sized(config))
    asks_for_actions = job["part"] == "constrained"
    samples = [s for s in trainer.train_samples if ("action_json" in s.record) == asks_for_actions]
    if not asks_for_actions:
        samples = [s for s in samples if s.view_key == samples[0].view_key]
    if len(samples) < PROMPTS:
        raise RuntimeError(f"{len(samples)} prompts, {PROMPTS} are needed; make more rooms")
    model, tokenizer = trainer.model.eval(), trainer.collator.tokenizer
    size = 1 if job["variant"] == "one at a time" else PROMPTS
    batches = [trainer.collator(samples[i : i + size], generate=True) for i in range(0, PROMPTS, size)]
    batches = [encoded(model, batch) for batch in batches]
    answer = ways(model, tokenizer)[job["variant"]]
    clock = Clock(config.training.log_every_steps)
    for step in range(config.training.max_steps):
        tokens = [row for batch in batches for row in answer(batch)]
        clock.mark(step + 1)
    ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return clock.result(PROMPTS) | {"tokens": [[t for t in row if t not in ends] for row in tokens]}


def _sized(config: RunConfig) -> RunConfig:
    config = miniature(config)
    settings = config.model
    language_model = settings.language_model
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            settings,
            freeze_vggt=True,
            positions=dataclasses.replace(settings.positions, method="base"),
            resampler=dataclasses.replace(settings.resampler, num_latents=NUM_LATENTS),
            language_model=dataclasses.replace(language_model, config=language_model.config | LANGUAGE_MODEL),
        ),
    )


@torch.no_grad()
def encoded(model: RoomPlanVLM, batch: dict) -> dict:
    """The batch with the encoder's outputs in place of its pictures."""
    pixels = torch.stack(batch["pixel_values"])
    taps, _ = encode(model.encoder, pixels, model.settings.tap_layers)
    size = tuple(pixels.shape[:-3:-1])
    features = [{"tokens": torch.stack(of_set), "image_size": size} for of_set in zip(*taps, strict=True)]
    return batch | {"pixel_values": [None] * len(pixels), "features": features}


def ways(model: RoomPlanVLM, tokenizer: PreTrainedTokenizerBase) -> dict[str, Callable[[dict], list[list[int]]]]:
    """By variant how a batch of prompts is answered."""
    language_model, num_logits = model.language_model, model.get_input_embeddings().num_embeddings
    free, held = (GrammarEngine(tokenizer, num_logits, name) for name in ("none", "llguidance"))
    grammar = ActionGrammar(held.grammar_kind, ("place_anchor",), categories=CATEGORIES)

    def by_generate(batch: dict) -> list[list[int]]:
        views = {key: value for key, value in batch.items() if key not in PROMPT}
        inputs = {key: batch[key] for key in PROMPT}
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        return model.generate(**inputs, views=views, max_new_tokens=NEW_TOKENS, do_sample=False, **ends).tolist()

    def by_prefix(batch: dict) -> list[list[int]]:
        with torch.no_grad():
            prompt = prompt_of(model, batch)
        return generate_texts(language_model, prompt, free, max_new_tokens=NEW_TOKENS).ids.tolist()

    def actions(batch: dict, jump_forward: bool) -> list[list[int]]:
        grammars = [grammar] * len(batch["input_ids"])
        with torch.no_grad():
            prompt = prompt_of(model, batch)
        return generate_texts(
            language_model, prompt, held, grammars, max_new_tokens=grammar.num_tokens, jump_forward=jump_forward
        ).ids.tolist()

    return {
        "one at a time": by_generate,
        "left-padded batch": by_generate,
        "shared prefix": by_prefix,
        "a pass for every token": lambda batch: actions(batch, False),
        "jump-forward": lambda batch: actions(batch, True),
    }
