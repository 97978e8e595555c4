"""What the language model writes after a prompt: one loop for greedy and sampled texts, free or held to a grammar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    StaticCache,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from roomplan_lib.actions.decoding import (
    Generation,
    Grammar,
    GrammarEngine,
    Matcher,
    allowed_tokens,
    refuse_excluded,
)
from roomplan_lib.actions.grammar import ActionGrammar

_SCORED = 64  # tokens whose logits are made float32 at once: 39 MB for Qwen3's


@dataclass(frozen=True, eq=False)
class Prompt:
    """What B texts follow, padded on the left.

    embeddings: [B, T, D]; attention_mask: [B, P + T]; cache: keys and values of the P tokens before them, if any.
    """

    embeddings: Tensor
    attention_mask: Tensor
    cache: DynamicCache | None = None

    def of(self, rows: Sequence[int]) -> Prompt:
        """The prompts of these rows."""
        chosen = torch.tensor(rows, device=self.embeddings.device)
        cache = None if self.cache is None else rows_of(self.cache, chosen)
        return Prompt(self.embeddings[chosen], self.attention_mask[chosen], cache)


def prefill(language_model: nn.Module, embeddings: Tensor) -> DynamicCache:
    """Keys and values of G prefixes [G, P, D]."""
    cache = DynamicCache(config=language_model.config)
    language_model.get_decoder()(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
    return cache


def rows_of(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache of these rows of another one, which stays as it is; a row may be there several times."""
    chosen = DynamicCache()
    for number, layer in enumerate(cache.layers):
        chosen.update(layer.keys[rows], layer.values[rows], number)
    return chosen


@torch.no_grad()
def generate_texts(
    language_model: nn.Module,
    prompt: Prompt,
    engine: GrammarEngine,
    grammars: Sequence[Grammar | None] | None = None,
    *,
    max_new_tokens: int | None = None,
    jump_forward: bool = True,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    static: bool | None = None,
    synced: bool = False,
) -> Generation:
    """Texts after prompts, greedy or sampled, each of its row's grammar; a row without a grammar (None) is free.

    language_model: a causal language model of transformers; prompt: for a RoomPlanVLM its `read_prompt(...)`, which
    stays as it is; engine and grammars [B]: see `GrammarEngine`; None for no grammars at all.
    jump_forward: a row's forced tokens pass through the language model together with the token before them. Rows jump
    by different lengths, so the cache has holes, which are masked; positions are counted without them. Without it
    there is one forward pass a token, and the same result.
    max_new_tokens: None for all that the model has positions for. A row with a `ActionGrammar` always ends: once no
    more tokens are left than one item may take, its plan or list begins no further one. A row whose grammar is a text
    ends where it is complete, or unfinished where its tokens are used up.
    do_sample, temperature, top_k (0: all), top_p: as in transformers, on what the grammar allows.
    static: keep keys and values in memory of a fixed size and compile the step of one token; None = on a GPU, where no
    row has a grammar. synced: all processes make equally many forward passes, each needing what the others hold.
    Raises ValueError when the model's generation_config holds a setting that a grammar excludes, when max_new_tokens
    cannot hold one item of a `ActionGrammar`, for a static cache with grammars, or for jump_forward with layers of
    other than full attention, where holes would count.
    """
    attention_mask, length = prompt.attention_mask, prompt.attention_mask.shape[1]
    device = attention_mask.device
    grammars = grammars or [None] * len(attention_mask)
    matchers = engine.matchers(grammars)
    constrained = any(matcher is not None for matcher in matchers)
    if constrained:
        refuse_excluded(language_model.generation_config)
    kinds = set(getattr(language_model.config, "layer_types", None) or ()) - {"full_attention"}
    if jump_forward and kinds and constrained:
        raise ValueError(f"the language model has layers of {sorted(kinds)}; generate with jump_forward=False")
    if max_new_tokens is None:
        max_new_tokens = language_model.config.max_position_embeddings - length
    if max_new_tokens < 1:
        behind = f"behind a prompt of {length} tokens"
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens} {behind}")
    static = device.type == "cuda" and not (constrained or synced or kinds) if static is None else static
    if static and (constrained or synced):
        raise ValueError("static: rows that jump and processes that wait take a cache that grows; leave it out")
    rows = [_Row(i, matcher, _bounded(grammars[i], matcher)) for i, matcher in enumerate(matchers)]
    for bounded in {row.bounded for row in rows} - {None}:
        bounded.require(max_new_tokens)
    warpers = LogitsProcessorList()
    if do_sample:
        warpers += [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
        warpers += [TopKLogitsWarper(top_k)] if top_k else []
        warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []

    eos_token_id, pad_token_id = engine.tokenizer.eos_token_id, engine.tokenizer.pad_token_id
    passes = _Passes(language_model, prompt, length + max_new_tokens if static else None)
    read = rows  # those that the language model still reads
    active = rows
    while True:
        # One forward pass over each row's chosen token and the forced ones behind it.
        if jump_forward:
            for row in active:
                row.jump(engine, max_new_tokens)
        width, longest = max(len(row.fed) for row in read), max(len(row.jumped) for row in read)
        ids = torch.tensor([row.fed + [pad_token_id] * (width - len(row.fed)) for row in read]).long().to(device)
        lengths = torch.tensor([[len(row.fed)] for row in read]).to(device)
        logits = passes(ids, lengths, longest + 1)
        jumped = [(row, column, token) for row in read for column, token in enumerate(row.jumped)]
        _write(jumped, logits, [True] * len(jumped))

        # One chosen token for each row that has room for it.
        columns = [len(row.jumped) for row in read]
        for row in read:
            row.fed, row.jumped = [], []
        active = [row for row in active if len(row.ids) < max_new_tokens]
        if active:
            scores = logits[[row.index for row in active], [columns[row.index] for row in active]].float()
            forced = [False] * len(active)
            if constrained:
                for row in active:
                    row.room(engine, max_new_tokens)
                allowed = allowed_tokens([row.matcher for row in active], scores.shape[-1], device)
                forced = (allowed.sum(1) == 1).tolist()
                scores = scores.masked_fill(~allowed, -math.inf)
            if do_sample:
                probabilities = warpers(None, scores).softmax(-1)
                tokens = torch.multinomial(probabilities, 1, generator=generator)[:, 0].tolist()
            else:
                tokens = scores.argmax(-1).tolist()
            chosen = [(row, columns[row.index], token) for row, token in zip(active, tokens, strict=True)]
            _write(chosen, logits, forced)
            for row, _, token in chosen:
                row.finished = token == eos_token_id
                if row.matcher is not None:
                    row.matcher.accept(token)
                if not row.finished and len(row.ids) < max_new_tokens:
                    row.fed = [token]
            active = [row for row in active if row.fed]
        if synced:
            wanted = torch.tensor(bool(active))
            dist.all_reduce(wanted, dist.ReduceOp.MAX)
            if not wanted:
                break
            if not active:  # one more pass for the others' sake
                read[0].fed = [pad_token_id]
        elif not active:
            break
        if not static and active and 2 * len(active) <= len(read):  # what is finished costs nothing any more
            passes.keep([row.index for row in active])
            read = active
            for index, row in enumerate(read):
                row.index = index
    return _collect(rows, pad_token_id, passes.count)


class _Passes:
    """The forward passes of one generation, and what the language model remembers between them."""

    def __init__(self, language_model: nn.Module, prompt: Prompt, max_length: int | None) -> None:
        """max_length: tokens of prompt and text together, for a cache of fixed size; None for one that grows."""
        self.language_model, self.prompt, self.max_length = language_model, prompt, max_length
        self.attention_mask = prompt.attention_mask
        self.positions = self.attention_mask.sum(1, keepdim=True)  # of each row's next token
        config, self.count = language_model.config, 0
        if max_length is None:
            self.cache = DynamicCache(config=config) if prompt.cache is None else _copy(prompt.cache)
        else:
            self.cache = StaticCache(config=config, max_cache_len=max_length)
            for number, layer in enumerate(prompt.cache.layers if prompt.cache else ()):
                self.cache.update(layer.keys, layer.values, number)

    def __call__(self, ids: Tensor, lengths: Tensor, num_logits: int) -> Tensor:
        """[B, num_logits, vocabulary] behind ids [B, W], of which each row's first `lengths` [B, 1] are meant."""
        width, seen = ids.shape[1], self.attention_mask.shape[1]
        steps = torch.arange(width, device=ids.device)
        self.attention_mask = torch.cat([self.attention_mask, (steps < lengths).to(self.attention_mask)], 1)
        if self.count == 0:
            new = self.language_model.get_input_embeddings()(ids).to(self.prompt.embeddings)
            inputs = {"inputs_embeds": torch.cat([self.prompt.embeddings, new], 1)}
            seen -= self.prompt.embeddings.shape[1]
            inputs["position_ids"] = (self.attention_mask.cumsum(1) - 1).clamp(min=0)[:, seen:]
        else:
            inputs = {"input_ids": ids, "position_ids": self.positions + steps}
        function, mask = self.language_model, self.attention_mask
        if self.max_length is not None:
            mask = self._whole_mask(seen, self.attention_mask.shape[1] - seen)
            if self.count and width == 1:
                function = self.language_model.get_compiled_call(None)
        logits = function(
            **inputs, attention_mask=mask, past_key_values=self.cache, use_cache=True, logits_to_keep=num_logits
        ).logits
        self.positions = self.positions + lengths
        self.count += 1
        return logits

    def _whole_mask(self, seen: int, width: int) -> Tensor:
        """[B, 1, width, max_length] bool, of one shape for all steps: what tokens behind `seen` others see."""
        known = F.pad(self.attention_mask, (0, self.max_length - self.attention_mask.shape[1])).bool()
        order = torch.arange(self.max_length, device=known.device)
        causal = order[None] <= seen + torch.arange(width, device=known.device)[:, None]
        return known[:, None, None] & causal[None, None]

    def keep(self, rows: list[int]) -> None:
        """Goes on with these rows alone."""
        chosen = torch.tensor(rows, device=self.attention_mask.device)
        self.cache.batch_select_indices(chosen)
        self.attention_mask, self.positions = self.attention_mask[chosen], self.positions[chosen]


def _copy(cache: DynamicCache) -> DynamicCache:
    """A cache that grows apart from the one it was; their tensors are the same until then."""
    other = DynamicCache()
    for number, layer in enumerate(cache.layers):
        other.update(layer.keys, layer.values, number)
    return other


@dataclass(eq=False)
class _Row:
    """A row in the making. fed: tokens of its next forward pass, the last ones of them `jumped`, that is forced.

    bounded: the row's grammar, until no further item may begin; None for a text or no grammar.
    """

    index: int
    matcher: Matcher | None
    bounded: ActionGrammar | None
    fed: list[int] = field(default_factory=list)
    jumped: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    preferred: list[bool] = field(default_factory=list)
    finished: bool = False

    def room(self, engine: GrammarEngine, max_new_tokens: int) -> int:
        """How many tokens may follow until this is to be asked again; before the last ones, no further item may begin.

        It depends on the tokens alone, so that with and without jumps a grammar is shortened at the same place.
        """
        left = max_new_tokens - len(self.ids) - len(self.jumped)
        if self.bounded is None:
            return left
        if left > self.bounded.num_tokens:
            return left - self.bounded.num_tokens
        self.matcher = engine.shorter(self.bounded, self.ids + self.jumped)
        self.bounded = None
        return left

    def jump(self, engine: GrammarEngine, max_new_tokens: int) -> None:
        """Moves on over all forced tokens, as far as there is room."""
        while self.matcher is not None:
            room = self.room(engine, max_new_tokens)  # first: it may exchange the matcher
            forced = self.matcher.forced()[:room]
            if not forced:
                break
            for token in forced:
                self.matcher.accept(token)
            self.jumped += forced
            self.fed = self.fed + forced


def _bounded(grammar: Grammar | None, matcher: Matcher | None) -> ActionGrammar | None:
    return grammar if isinstance(grammar, ActionGrammar) and matcher is not None else None


def _write(places: list[tuple[_Row, int, int]], logits: Tensor, forced: list[bool]) -> None:
    """Appends tokens to their rows, with what the bare logits [B, columns, num_logits] at (row, column) say of them."""
    for start in range(0, len(places), _SCORED):
        part = places[start : start + _SCORED]
        at = [row.index for row, _, _ in part], [column for _, column, _ in part]
        bare = logits[at].float()
        tokens = torch.tensor([token for _, _, token in part], device=bare.device)
        log_probs = bare.gather(1, tokens[:, None])[:, 0] - bare.logsumexp(-1)
        preferred = bare.argmax(-1) == tokens
        scored = zip(part, log_probs.tolist(), preferred.tolist(), forced[start:], strict=False)
        for (row, _, token), log_prob, is_preferred, is_forced in scored:
            row.ids.append(token)
            row.log_probs.append(log_prob)
            row.preferred.append(is_preferred)
            row.forced.append(is_forced)


def _collect(rows: list[_Row], pad_token_id: int, num_forward_passes: int) -> Generation:
    width = max(len(row.ids) for row in rows)

    def padded(name: str, fill) -> Tensor:
        return torch.tensor([getattr(row, name) + [fill] * (width - len(row.ids)) for row in rows])

    return Generation(
        ids=padded("ids", pad_token_id),
        log_probs=padded("log_probs", 0.0),
        forced=padded("forced", False),
        preferred=padded("preferred", False),
        num_tokens=torch.tensor([len(row.ids) for row in rows]),
        finished=torch.tensor([row.finished for row in rows]),
        num_forward_passes=num_forward_passes,
    )
