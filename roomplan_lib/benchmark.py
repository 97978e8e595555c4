"""What constrained decoding costs, as a share of the language model's own forward pass, and what it saves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from roomplan_lib.actions import PlaceAnchor, format_action
from roomplan_lib.actions.decoding import GrammarEngine, allowed_tokens
from roomplan_lib.actions.grammar import grammar
from roomplan_lib.scenes import CATEGORIES
from roomplan_lib.training.plan import KNOWN_SHAPES
from roomplan_lib.training.processes import resolve_device
from roomplan_lib.training.tokenizer import load_tokenizer, train_tokenizer

CONTEXT = 400  # tokens in the cache: 136 visual tokens, a prompt, an action
# Layers and widths of the tiny stage file and of Qwen3-4B.
SIZES = {
    "tiny": {
        "vocab_size": 640,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "Qwen3-4B": KNOWN_SHAPES["Qwen/Qwen3-4B-Instruct-2507"],
}
# What a benchmarked text may be: arguments of `grammar`.
TASKS = {
    "anchor": {"verbs": ("place_anchor",)},
    "any verb": {},
    "plan of 16": {"verbs": ("plan_room",), "max_items": 16},
}


def benchmark_decoding(
    tokenizer: str | Path = "",
    *,
    engines: Sequence[str] = ("llguidance",),
    batch_size: int = 8,
    num_texts: int = 16,
    measured_layers: int = 4,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> Iterator[dict]:
    """One row per language model, engine and task: times per token and row of a batch, and shares.

    tokenizer: a Qwen3 tokenizer (hub id or folder) for the rows of Qwen3-4B's size; the tiny size, which trains its
    own, is always there. Texts are random walks: each token drawn evenly from what the grammar allows. The forward
    pass is one token per row of random weights behind CONTEXT tokens, float32 on the CPU and bfloat16 on a GPU; of a
    model with more layers than `measured_layers` so many are timed and the time is multiplied up.
    Raises ValueError for an engine or a device that is not there.
    """
    if unknown := [name for name in engines if name not in ("llguidance", "xgrammar")]:
        raise ValueError(f"engine: expected llguidance or xgrammar, got {', '.join(unknown)}")
    device = resolve_device(device)
    tokenizers = {"tiny": tiny_tokenizer()}
    if tokenizer:
        tokenizers["Qwen3-4B"] = load_tokenizer(tokenizer)
    for size, wrapped in tokenizers.items():
        fields = SIZES[size]
        forward_s = forward_seconds(fields, batch_size, measured_layers, device)
        for name in engines:
            start = time.perf_counter()
            engine = GrammarEngine(wrapped, fields["vocab_size"], name)
            setup_s = time.perf_counter() - start
            for task, options in tqdm(TASKS.items(), f"{size}, {name}", unit="task", disable=not progress):
                text = grammar(engine.grammar_kind, **options)
                walk = walk_texts(engine, text, num_texts, seed)
                apply_s = apply_seconds(engine, text, batch_size, device)
                per_token_s = walk["mask_s"] + walk["accept_s"] + apply_s
                yield {
                    "language_model": size,
                    "engine": name,
                    "task": task,
                    "device": device,
                    "batch_size": batch_size,
                    "setup_s": setup_s,
                    **walk,
                    "apply_s": apply_s,
                    "forward_s": forward_s,
                    "layers_timed": min(measured_layers, fields["num_hidden_layers"]),
                    "layers": fields["num_hidden_layers"],
                    "overhead_share": per_token_s * batch_size / forward_s,
                }


def walk_texts(engine: GrammarEngine, text: str, num_texts: int, seed: int) -> dict:
    """Random walks through a grammar: tokens per text and the share of them that is forced; seconds to compile it, and
    per token that is not forced for `mask_s` (which tokens are allowed) and `accept_s` (moving on, forced ones too)."""
    start = time.perf_counter()
    engine.matchers([text])
    compile_s = time.perf_counter() - start
    rng = np.random.default_rng(seed)
    bits = np.empty(-(-engine.num_logits // 32), np.int32)
    num_forced = num_free = mask_s = accept_s = 0
    for _ in range(num_texts):
        (matcher,) = engine.matchers([text])
        token = None
        while token != engine.tokenizer.eos_token_id:
            start = time.perf_counter()
            while forced := matcher.forced():
                for token in forced:
                    matcher.accept(token)
                num_forced += len(forced)
            then = time.perf_counter()
            matcher.fill(bits)
            now = time.perf_counter()
            accept_s, mask_s = accept_s + then - start, mask_s + now - then
            token = int(rng.choice(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))))
            start = time.perf_counter()
            matcher.accept(token)
            accept_s += time.perf_counter() - start
            num_free += 1
    return {
        "tokens_per_text": (num_forced + num_free) / num_texts,
        "passes_per_text": num_free / num_texts,
        "forced_share": num_forced / (num_forced + num_free),
        "compile_s": compile_s,
        "mask_s": mask_s / num_free,
        "accept_s": accept_s / num_free,
    }


def apply_seconds(engine: GrammarEngine, text: str, batch_size: int, device: str) -> float:
    """Seconds per row to put a mask on a batch's logits, the time to find the mask taken off."""
    matchers = engine.matchers([text] * batch_size)
    logits = torch.randn(batch_size, engine.num_logits, device=device)
    bits = np.empty(-(-engine.num_logits // 32), np.int32)

    def apply() -> None:
        logits.masked_fill(~allowed_tokens(matchers, engine.num_logits, device), -torch.inf)

    def fill() -> None:
        for matcher in matchers:
            matcher.fill(bits)

    return max(median_seconds(apply, device) - median_seconds(fill, device), 0.0) / batch_size


@torch.no_grad()
def forward_seconds(fields: dict, batch_size: int, measured_layers: int, device: str) -> float:
    """Seconds of one forward pass of one token per row behind CONTEXT cached ones, random weights.

    Of more layers than `measured_layers` so many are timed, and their time without the head's is multiplied up.
    """
    layers = fields["num_hidden_layers"]
    timed = min(measured_layers, layers)
    config = Qwen3Config(**fields | {"num_hidden_layers": timed, "tie_word_embeddings": True})
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = Qwen3ForCausalLM._from_config(config, dtype=dtype).to(device).eval()
    cached = torch.randn(batch_size, config.num_key_value_heads, CONTEXT, config.head_dim, device=device, dtype=dtype)
    cache = DynamicCache(config=config)
    for layer in range(timed):
        cache.update(cached, cached, layer)
    ids = torch.zeros(batch_size, 1, dtype=torch.long, device=device)

    def step() -> None:
        model.model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    hidden = torch.randn(batch_size, 1, config.hidden_size, device=device, dtype=dtype)
    body_s = median_seconds(step, device)
    return body_s / timed * layers + median_seconds(lambda: model.lm_head(hidden), device)


def median_seconds(function, device: str, repeats: int = 9) -> float:
    """Median seconds of a call, the first one not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A small BPE trained on texts of the action language, as the tiny run trains its own."""
    rng = np.random.default_rng(0)
    actions = [
        PlaceAnchor(category, tuple(rng.uniform(-5, 5, 3)), (1.0, 0.0, 0.0), tuple(rng.uniform(0.3, 3, 3)))
        for category in CATEGORIES
        for _ in range(20)
    ]
    return train_tokenizer(map(format_action, actions), SIZES["tiny"]["vocab_size"])


def decoding_table(rows: Sequence[dict]) -> str:
    """The rows of `benchmark_decoding` as a Markdown table, and what its columns mean."""
    columns = {
        "model": lambda r: r["language_model"],
        "engine": lambda r: r["engine"],
        "task": lambda r: r["task"],
        "tokens a text": lambda r: f"{r['tokens_per_text']:.0f}",
        "passes": lambda r: f"{r['passes_per_text']:.0f}",
        "forced": lambda r: f"{r['forced_share']:.0%}",
        "compile ms": lambda r: f"{r['compile_s'] * 1e3:.1f}",
        "mask us": lambda r: f"{r['mask_s'] * 1e6:.0f}",
        "accept us": lambda r: f"{r['accept_s'] * 1e6:.0f}",
        "apply us": lambda r: f"{r['apply_s'] * 1e6:.0f}",
        "forward ms": lambda r: f"{r['forward_s'] * 1e3:.2f}",
        "overhead": lambda r: f"{r['overhead_share']:.2%}",
    }
    lines = [columns.keys(), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    first = rows[0]
    timed = {f"{r['layers_timed']} of {r['layers']} layers of {r['language_model']}" for r in rows}
    return (
        f"{table}\n\nOn {first['device']}, {first['batch_size']} rows a batch. "
        "mask, accept, apply: microseconds per row and token that is not forced. "
        f"forward: one pass of a token per row behind {CONTEXT}, random weights, and no other work; timed were "
        f"{', '.join(sorted(timed))}, multiplied up, and the whole head. "
        "overhead: (mask + accept + apply) of all rows as a share of forward. "
        "forced: share of the tokens that need no choice nor, with jump-forward, a pass; passes: those of the others."
    )
