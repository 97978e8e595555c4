"""What the model reads for one sample; training and generation use the same prompt."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from roomplan_lib.samples.targets import UNCHANGED, Augmentation, question_text
from roomplan_lib.training.tokenizer import IMAGE_TOKEN, VISION_END, VISION_START


def prompt_text(
    sample: dict,
    tokenizer: PreTrainedTokenizerBase,
    num_visual_tokens: int,
    visual_first: bool = True,
    augmentation: Augmentation = UNCHANGED,
    codec: str = "m2",
) -> str:
    """The user turn in the chat template, up to where the response begins.

    One placeholder stands for each visual token; none are written for `num_visual_tokens` 0 (the blind control).
    Visual tokens come first, so that the questions of a scene share a prefix; then situation, then question.
    """
    views = f"{VISION_START}{IMAGE_TOKEN * num_visual_tokens}{VISION_END}" if num_visual_tokens else ""
    question = " ".join(filter(None, (sample.get("situation"), question_text(sample, augmentation, codec))))
    content = f"{views}{question}" if visual_first else f"{question}{views}"
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def batch_text(batch: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    """A batch of `Collator` for people: per row the prompt, its placeholders counted, then "=>" and what has loss."""
    placeholder = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    rows = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        supervised = labels >= 0
        read, written = ids[(mask == 1) & ~supervised].tolist(), ids[supervised].tolist()
        count = read.count(placeholder)
        text = tokenizer.decode(read)
        if count:
            text = text.replace(IMAGE_TOKEN * count, f"{IMAGE_TOKEN} x {count}")
        rows.append(f"{text.strip()}\n=> {tokenizer.decode(written)}")
    return "\n\n".join(rows)
