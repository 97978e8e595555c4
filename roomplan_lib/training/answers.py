"""Greedy answers to a few held-out samples while a run trains, scored in the simplest way that shows progress."""

from __future__ import annotations

import math
import re
import statistics
from contextlib import nullcontext
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from roomplan_lib.actions import ActionError, PlaceAnchor, parse_action
from roomplan_lib.actions.decoding import GrammarEngine
from roomplan_lib.model.generation import Prompt, generate_texts
from roomplan_lib.model.vlm import RoomPlanVLM
from roomplan_lib.samples.targets import reference_action
from roomplan_lib.training.collator import Sample

PROMPT = ("input_ids", "attention_mask", "scene_index")


class Answer(NamedTuple):
    """What one answer is worth; None where the sample asks for something else."""

    exact: bool | None = None  # a question's
    valid: bool | None = None  # an instruction's: the text is an action
    center_error_m: float | None = None  # where both the answer and the reference place one anchor


@torch.no_grad()
def greedy_answers(
    model: RoomPlanVLM,
    tokenizer: PreTrainedTokenizerBase,
    batch: dict,
    *,
    max_new_tokens: int,
    synced: bool = False,
    bf16: bool = False,
) -> list[str]:
    """The text after each prompt of a batch that the collator made for generation, on the model's device.

    synced: under ZeRO-3 every process goes on until the longest answer of all is written, since each forward pass
    needs the weights that the others hold.
    """
    device, engine = batch["input_ids"].device, GrammarEngine(tokenizer, model.language_model.config.vocab_size, "none")
    with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
        prompt = prompt_of(model, batch, share_prefix=not synced)
        generation = generate_texts(model.language_model, prompt, engine, max_new_tokens=max_new_tokens, synced=synced)
    return tokenizer.batch_decode(generation.ids, skip_special_tokens=True)


def prompt_of(model: RoomPlanVLM, batch: dict, share_prefix: bool = True) -> Prompt:
    """`RoomPlanVLM.read_prompt` of a batch that the collator made for generation.

    share_prefix off: as many forward passes whatever the batch, as processes make that need one another's weights.
    """
    views = {key: value for key, value in batch.items() if key not in PROMPT}
    inputs = {key: batch[key] for key in PROMPT if key in batch}
    return model.read_prompt(**inputs, views=views, share_prefix=share_prefix)


def score_answers(samples: list[Sample], texts: list[str], codec: str) -> list[Answer]:
    """One Answer per sample. A question is answered exactly when the words are those of one of its answers, whatever
    their case and punctuation; the distance of centers is in metres of the reference frame."""
    answers = []
    for sample, text in zip(samples, texts, strict=True):
        record = sample.record
        if "action_json" not in record:
            right = record.get("answers") or [record["answer"]]
            answers.append(Answer(exact=_words(text) in map(_words, right)))
            continue
        action, reference = parse_action(text, None, codec), reference_action(record)
        error = None
        if isinstance(action, PlaceAnchor) and isinstance(reference, PlaceAnchor):
            error = math.dist(action.center, reference.center)
        answers.append(Answer(valid=not isinstance(action, ActionError), center_error_m=error))
    return answers


def _words(text: str) -> list[str]:
    return re.findall(r"[\w.+-]*\w", text.lower())


def summarise_answers(answers: list[Answer]) -> dict[str, float]:
    """`eval_em`, `eval_valid_json_rate` (shares) and `eval_center_error_m` (median), each where there is one."""
    exact, valid, errors = ([v for v in values if v is not None] for values in zip(*answers, strict=True))
    scores = {}
    if exact:
        scores["eval_em"] = round(statistics.mean(exact), 4)
    if valid:
        scores["eval_valid_json_rate"] = round(statistics.mean(valid), 4)
    if errors:
        scores["eval_center_error_m"] = round(statistics.median(errors), 4)
    return scores
