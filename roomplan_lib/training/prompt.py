"""What the model reads for one sample; training and generation use the same prompt."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from roomplan_lib.training.tokenizer import IMAGE_TOKEN, VISION_END, VISION_START


def prompt_text(
    sample: dict, tokenizer: PreTrainedTokenizerBase, num_visual_tokens: int, visual_first: bool = True
) -> str:
    """The user turn in the chat template, up to where the response begins.

    One placeholder stands for each visual token; none are written for `num_visual_tokens` 0 (the blind control).
    Visual tokens come first, so that the questions of a scene share a prefix; then situation, then question.
    """
    views = f"{VISION_START}{IMAGE_TOKEN * num_visual_tokens}{VISION_END}" if num_visual_tokens else ""
    question = " ".join(filter(None, (sample.get("situation"), sample.get("question") or sample.get("instruction"))))
    content = f"{views}{question}" if visual_first else f"{question}{views}"
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
