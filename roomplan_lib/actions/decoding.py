"""Constrained decoding: a language model writes nothing but texts of a grammar, and what has no choice is not asked.

A `GrammarEngine` wraps a tokenizer once; it gives each row of a batch its own place in its own grammar, and these go
to `model.generation.generate_texts` (the whole generation, forced tokens without forward passes of their own) or into
a `GrammarProcessor` (for `generate` of transformers, one forward pass a token). This module imports torch; the rest of
`roomplan_lib.actions` does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import llguidance
import llguidance.hf
import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerBase,
)

from roomplan_lib.actions.grammar import ActionGrammar
from roomplan_lib.actions.spec import VERBS, PlanRoom

ENGINES = ("llguidance", "xgrammar", "none")
# Settings of transformers' `generate` that forbid tokens a grammar may need, and the values that switch them off. Of
# valid actions with two decimals 70 % repeat some four tokens, so no_repeat_ngram_size=4 makes them unreachable.
_EXCLUDED = {
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "num_beams": (None, 1),
}
_JSON_PART = re.compile(
    r'"(?P<key>[^"\\]*)":|(?P<open>[\[{])|(?P<close>[\]}])|"(?P<string>[^"\\]*)"|(?P<number>-?\d[\d.]*)'
)
_KEPT = 256  # compiled grammars; scenes or categories that are bound per sample make many


class GrammarEngine:
    """A tokenizer made ready for one engine; made once (about a second for Qwen3's), used for every batch.

    name: llguidance, xgrammar or none (no grammar is enforced). num_logits: columns of the model's logits, which may be
    more than the tokenizer has tokens. `grammar_kind` says which form of grammar `matchers` expects: lark or gbnf.
    Raises ValueError for an unknown name and where xgrammar is not installed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_logits: int, name: str = "llguidance") -> None:
        if name not in ENGINES:
            raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {name!r}")
        if num_logits < len(tokenizer):
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model's logits only {num_logits} columns")
        self.name, self.tokenizer, self.num_logits = name, tokenizer, num_logits
        self.grammar_kind = "gbnf" if name == "xgrammar" else "lark"
        self._compiled: dict = {}  # by grammar
        if name == "llguidance":
            self._wrapped = llguidance.hf.from_tokenizer(tokenizer, num_logits, tokenizer.eos_token_id)
        elif name == "xgrammar":
            try:
                import xgrammar
            except ImportError as error:
                raise ValueError(f"engine xgrammar is not installed ({error}); pip install xgrammar") from None
            info = xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=num_logits, stop_token_ids=[tokenizer.eos_token_id]
            )
            self._wrapped = xgrammar.GrammarCompiler(info)

    def matchers(self, grammars: Sequence[Grammar | None]) -> list[Matcher | None]:
        """One matcher per row, at the start of its grammar; None for a row without grammar, or with engine none.

        Rows with the same grammar share its compilation. Raises ValueError for a grammar that does not compile, and
        for a `ActionGrammar` of another kind than the engine's.
        """
        return [None if grammar is None or self.name == "none" else self._start(grammar) for grammar in grammars]

    def shorter(self, grammar: ActionGrammar, tokens: Sequence[int]) -> Matcher:
        """A matcher behind `tokens`, of which the grammar's are the first, that lets no further item begin."""
        begun = grammar.num_begun(self.tokenizer.decode(tokens))
        matcher = self._start(replace(grammar, max_items=min(begun, grammar.max_items)))
        for token in tokens:
            matcher.accept(token)
        return matcher

    def _start(self, grammar: Grammar) -> Matcher:
        if isinstance(grammar, ActionGrammar) and grammar.kind != self.grammar_kind:
            raise ValueError(f"{self.name}: expected a grammar of kind {self.grammar_kind}, got {grammar.kind}")
        if grammar not in self._compiled:
            if len(self._compiled) == _KEPT:
                self._compiled.clear()
            text = grammar.text() if isinstance(grammar, ActionGrammar) else grammar
            self._compiled[grammar] = self._compile(text)
        compiled = self._compiled[grammar]
        if self.name == "xgrammar":
            return XGrammarMatcher(compiled, self.tokenizer)
        return LLGuidanceMatcher(compiled.deep_copy())

    def _compile(self, grammar: str):
        if self.name == "xgrammar":
            try:
                return self._wrapped.compile_grammar(grammar)
            except RuntimeError as error:
                raise ValueError(f"xgrammar: {error}") from None
        compiled = llguidance.LLMatcher(self._wrapped, grammar, log_level=0)
        if compiled.is_error():
            raise ValueError(f"llguidance: {compiled.get_error()}")
        return compiled


class LLGuidanceMatcher:
    """One row's place in its grammar, by llguidance. Text without a choice has one tokenisation: the canonical one."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def forced(self) -> list[int]:
        """The tokens that follow whatever the model thinks, as far as they are known; empty where it has a choice."""
        return self._matcher.compute_ff_tokens()

    def accept(self, token: int) -> None:
        """Moves on by one token, which must be allowed."""
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} is not allowed here: {self._matcher.get_error().splitlines()[0]:.200}")

    def fill(self, bits: np.ndarray) -> None:
        """Writes the allowed tokens into `bits` [num_logits / 32, rounded up] int32, one bit each, lowest first.

        Once the grammar is complete that is the end-of-sequence token, and nothing else where no text may follow.
        """
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error():  # of its limits; what is complete is none
            raise ValueError(f"llguidance: {self._matcher.get_error().splitlines()[0]:.200}")


class XGrammarMatcher:
    """The same by xgrammar, which would allow any tokenisation of text without a choice: here it is the canonical."""

    def __init__(self, compiled, tokenizer: PreTrainedTokenizerBase) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._tokenizer = tokenizer
        self._ahead: list[int] = []  # forced and not accepted yet

    def forced(self) -> list[int]:
        if not self._ahead:
            text = self._matcher.find_jump_forward_string()
            tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            self._ahead = tokens[:-1]  # the last one may grow together with what follows
        return list(self._ahead)

    def accept(self, token: int) -> None:
        if not self._matcher.accept_token(token):
            raise ValueError(f"token {token} is not allowed here")
        self._ahead = self._ahead[1:]

    def fill(self, bits: np.ndarray) -> None:
        if forced := self.forced():
            bits[:] = 0
            bits[forced[0] // 32] = np.uint32(1 << forced[0] % 32).astype(np.int32)
        else:
            self._matcher.fill_next_token_bitmask(bits[None], 0)


Matcher = LLGuidanceMatcher | XGrammarMatcher
Grammar = str | ActionGrammar


def allowed_tokens(matchers: Sequence[Matcher | None], num_logits: int, device: torch.device | str = "cpu") -> Tensor:
    """[B, num_logits] bool: what each row's grammar allows next; everything for a row without one."""
    bits = np.full((len(matchers), -(-num_logits // 32)), -1, np.int32)
    for row, matcher in zip(bits, matchers, strict=True):
        if matcher is not None:
            matcher.fill(row)
    packed = torch.from_numpy(bits.view(np.uint8)).to(device)
    bit = torch.arange(8, dtype=torch.uint8, device=device)
    return (packed[..., None] >> bit & 1).flatten(1)[:, :num_logits].bool()


@dataclass(frozen=True)
class Generation:
    """What the rows of a batch wrote, up to and with their end-of-sequence token; [B, T] each, on the CPU.

    ids: int64, padded behind the end; log_probs: float32, natural log-probability of each token under the model alone
    (no grammar, temperature 1); forced: bool, tokens that the grammar left no choice about; preferred: bool, tokens
    that the model alone rates highest. Padding has 0 and False.
    num_tokens: [B], without padding; finished: [B] bool, false for rows that ran out of tokens;
    num_forward_passes: of the language model, the prompt's included.
    """

    ids: Tensor
    log_probs: Tensor
    forced: Tensor
    preferred: Tensor
    num_tokens: Tensor
    finished: Tensor
    num_forward_passes: int

    @property
    def is_greedy(self) -> Tensor:
        """[B] bool: finished rows that greedy decoding writes without a grammar too."""
        padding = torch.arange(self.ids.shape[1]) >= self.num_tokens[:, None]
        return self.finished & (self.preferred | padding).all(1)


def refuse_excluded(settings: GenerationConfig) -> None:
    """Raises ValueError when `settings` hold one that forbids tokens a grammar may need."""
    for name, off in _EXCLUDED.items():
        if (value := getattr(settings, name, None)) not in off:
            raise ValueError(
                f"generation_config.{name} is {value}, which forbids tokens that a grammar may leave as the only ones: "
                f"most actions repeat runs of tokens; set it to {off[-1]} to decode with a grammar"
            )


class GrammarProcessor(LogitsProcessor):
    """The grammars of a batch for one call of `generate` of transformers, which makes one forward pass a token.

    grammars: as in `GrammarEngine.matchers`; with num_return_sequences k, each k times. None is shortened, since how
    many tokens `generate` may write is not known here. Right with `inputs_embeds`,
    whose input_ids begin with no column, and with prompts of ids. settings: the model's generation_config, with what
    `generate` is called with. Raises ValueError when that excludes a grammar, and for reuse and for beam search, which
    moves rows.
    """

    def __init__(self, engine: GrammarEngine, grammars: Sequence[Grammar | None], settings: GenerationConfig) -> None:
        self._matchers = engine.matchers(grammars)
        if any(matcher is not None for matcher in self._matchers):
            refuse_excluded(settings)
        self._eos_token_id = engine.tokenizer.eos_token_id
        self._seen: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(input_ids) != len(self._matchers):
            raise ValueError(f"{len(self._matchers)} grammars for a batch of {len(input_ids)} rows")
        if self._seen is not None:
            if input_ids.shape[1] != self._seen.shape[1] + 1 or not torch.equal(input_ids[:, :-1], self._seen):
                raise ValueError("a GrammarProcessor serves one call of generate, without beams; make a new one")
            for i, token in enumerate(input_ids[:, -1].tolist()):
                if self._matchers[i] is not None:
                    self._matchers[i].accept(token)
                    if token == self._eos_token_id:
                        self._matchers[i] = None  # `generate` pads the row from here on
        self._seen = input_ids
        scores = scores.masked_fill(~allowed_tokens(self._matchers, scores.shape[-1], scores.device), -math.inf)
        if scores.isneginf().all(1).any():
            raise ValueError("no token is left: another logits processor forbids what the grammar asks for; remove it")
        return scores


def confidences(generation: Generation, tokenizer: PreTrainedTokenizerBase) -> list[list[float]]:
    """Per row the model's confidence in each action of its text, in order: exp(mean log p) of tokens in its values.

    Values are the numbers and strings of the action, but for its verb and scene; what was forced does not count. An
    action without a token that counts has confidence 1: there was nothing to choose.
    """
    found = []
    for row, count in enumerate(generation.num_tokens.tolist()):
        pieces = [tokenizer.decode([token]) for token in generation.ids[row, :count].tolist()]
        ends = np.cumsum([len(piece) for piece in pieces], dtype=int)
        log_probs, free = generation.log_probs[row, :count].numpy(), ~generation.forced[row, :count].numpy()
        actions, values = _find_values("".join(pieces))
        scores = []
        for start, end in actions:
            inside = np.zeros(count, bool)
            for first, last in values:
                if start <= first and last <= end:  # the tokens that share a character with it
                    inside[np.searchsorted(ends, first, "right") : np.searchsorted(ends, last, "left") + 1] = True
            counted = log_probs[inside & free]
            scores.append(math.exp(counted.mean()) if len(counted) else 1.0)
        found.append(scores)
    return found


def _find_values(text: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(first character, end) of each action in a text of the language, a plan's own bracket not among them, and of each
    of their values.

    An action is an object, or an array that begins with a string (the row form).
    """
    key, opened, actions, values = "", [], [], []
    for match in _JSON_PART.finditer(text):
        kind, start = match.lastgroup, match.start()
        if kind == "key":
            key = match["key"]
        elif kind == "open":
            opened.append(start if text[start] == "{" or text[start + 1 : start + 2] == '"' else None)
        elif kind == "close":
            if opened and (start := opened.pop()) is not None:
                actions.append((start, match.end()))
        elif match["string"] == PlanRoom.verb:
            opened[-1:] = [None]
        elif match["string"] not in VERBS and key != "scene":
            values.append(match.span(kind))
    return actions, values
