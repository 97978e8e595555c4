"""Questions about one set of views share what comes before them: each sees that prefix and itself, and nothing else.

The tokens of a batch lie in one row without padding: the prefixes of all view sets, then what is each question's own.
Everything but attention works on tokens one by one, so it is done once per prefix; attention is told who sees whom, by
a FlexAttention block mask on a GPU and by matrix products over the questions of a view set elsewhere. Positions are
those that each question has alone, so losses and gradients are those of separate rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "shared_prefix"  # the name under which transformers finds `attend`
SHORT = 512  # tokens up to which rows attend by matrix products on a CPU: scores of all pairs are written down
RAGGED = 1.5  # times the scores of a view set by itself from which a CPU takes view sets one by one
BLOCK = 128  # tokens: side of a block of FlexAttention's mask; rows on a GPU are filled up to whole blocks
IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class PrefixLayout:
    """Where the tokens of B questions about G view sets lie in one row of G * length + M tokens.

    length: tokens P of each prefix. group: [B] int, the view set of each question. tokens: [M] int, increasing, the
    place of each other token in the questions' own padded rows [B, S], flattened; width: S.
    """

    length: int
    width: int
    group: Tensor
    tokens: Tensor
    num_groups: int
    block_mask: BlockMask | None = None

    @property
    def num_tokens(self) -> int:
        return self.num_groups * self.length + len(self.tokens)

    def position_ids(self) -> Tensor:
        """[G * P + M] int: the place of each token in a row of its own question's."""
        prefix = torch.arange(self.length, device=self.tokens.device).repeat(self.num_groups)
        return torch.cat([prefix, self.length + self.tokens % self.width])

    def owners(self) -> tuple[Tensor, Tensor]:
        """[G * P + M] int each: the view set of a token, and its question, -1 for a prefix."""
        question = self.tokens // self.width
        of_prefix = torch.arange(self.num_groups, device=self.tokens.device).repeat_interleave(self.length)
        return (
            torch.cat([of_prefix, self.group[question]]),
            torch.cat([torch.full_like(of_prefix, -1), question]),
        )

    def ranks(self) -> tuple[Tensor, int]:
        """[B] int: how many questions before it are of the same view set; and the most questions that one set has."""
        same = self.group[:, None] == self.group
        return same.tril(-1).sum(1), int(same.sum(1).max())

    @cached_property
    def by_view_set(self) -> list[tuple[Tensor, PrefixLayout]]:
        """Of each view set: which of the row's tokens are its own [n], and the layout that they have by themselves.

        Empty where all of them at once are as well: where padding every set to the most questions and to the longest
        does not make more than RAGGED times the scores.
        """
        question, place = self.tokens // self.width, self.tokens % self.width
        owner, (rank, most) = self.group[question], self.ranks()
        chosen = [(owner == number).nonzero()[:, 0] for number in range(self.num_groups)]
        counts = self.group.bincount(minlength=self.num_groups).tolist()
        widths = [int(place[own].max()) + 1 if len(own) else 1 for own in chosen]
        needed = sum(n * width * (self.length + width) for n, width in zip(counts, widths, strict=True))
        padded = self.num_groups * most * self.width * (self.length + self.width)
        if 0 in counts or padded <= RAGGED * needed:
            return []
        start, parts = self.num_groups * self.length, []
        for number, (own, count, width) in enumerate(zip(chosen, counts, widths, strict=True)):
            prefix = torch.arange(number * self.length, (number + 1) * self.length, device=own.device)
            tokens = rank[question[own]] * width + place[own]
            layout = PrefixLayout(self.length, width, self.group.new_zeros(count), tokens, 1)
            parts.append((torch.cat([prefix, start + own]), layout))
        return parts

    def with_block_mask(self, num_tokens: int) -> PrefixLayout:
        """With a FlexAttention mask over rows of `num_tokens` tokens; those behind the last see one another."""
        group, question = (F.pad(owner, (0, num_tokens - len(owner)), value=-1) for owner in self.owners())

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = (question[key] < 0) | (question[key] == question[query])
            return (key <= query) & (group[key] == group[query]) & own

        on_gpu = group.device.type == "cuda"
        mask = create_block_mask(sees, None, None, num_tokens, num_tokens, str(group.device), BLOCK, _compile=on_gpu)
        return replace(self, block_mask=mask)


def prefix_length(prompts: Sequence[Sequence[int]], placeholder: int) -> int:
    """Tokens that all prompts begin with, up to the last placeholder of a visual token; 0 where they differ.

    So it is 0 where a question stands before its views, and without views.
    """
    first = list(prompts[0])
    length = len(first) - first[::-1].index(placeholder) if placeholder in first else 0
    begin = first[:length]
    same = all(list(ids[:length]) == begin and placeholder not in ids[length:] for ids in prompts)
    return length if same else 0


def lay_out(attention_mask: Tensor, labels: Tensor, length: int, weights: Tensor | None = None) -> dict:
    """What `RoomPlanVLM.forward` needs to share the prefixes of a batch [B, T] that is padded on the right.

    length: tokens of the prefix that all rows begin with, each longer; none of them supervised. `length`, `tokens`:
    see PrefixLayout; `predicting` [C] int: for each supervised token, which of the M tokens predicts it; `targets` [C]:
    their labels; `weights` [C]: theirs of [B, T], where given.
    """
    own = attention_mask[:, length:].bool()
    number = (torch.cumsum(own.flatten(), 0) - 1).view_as(own)
    supervised = labels[:, length + 1 :] != IGNORE_INDEX
    return {
        "length": length,
        "tokens": own.flatten().nonzero()[:, 0],
        "predicting": number[:, :-1][supervised],
        "targets": labels[:, length + 1 :][supervised],
    } | ({} if weights is None else {"weights": weights[:, length + 1 :][supervised]})


def takes_block_mask(device: torch.device) -> bool:
    """Whether FlexAttention is the way there; on a CPU it has no gradients."""
    return device.type == "cuda"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_layout: PrefixLayout | None = None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one layer as transformers asks for it: query [B, H, T, d], key and value [B, H / r, T, d] -> [B, T,
    H, d]. Without a layout it is transformers' own by `scaled_dot_product_attention`, but for training short rows on a
    CPU."""
    if prefix_layout is None:
        if query.device.type == "cpu" and query.requires_grad and key.shape[2] <= SHORT and not kwargs.get("dropout"):
            return _attend_by_row(query, key, value, attention_mask, scaling), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if prefix_layout.block_mask is not None:
        query, key = query.to(value.dtype), key.to(value.dtype)
        attended = _flex(query, key, value, prefix_layout.block_mask, scaling)
        return attended.transpose(1, 2), None
    if not (parts := prefix_layout.by_view_set):
        return _attend_by_group(query, key, value, prefix_layout, scaling), None
    attended = [
        _attend_by_group(*(tensor[:, :, rows] for tensor in (query, key, value)), layout, scaling)
        for rows, layout in parts
    ]
    return torch.cat(attended, dim=1)[:, torch.cat([rows for rows, _ in parts]).argsort()], None


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    function = flex_attention
    if query.device.type == "cuda":  # which alone is made fast by compiling, and would write all scores down without
        global _compiled
        _compiled = _compiled or torch.compile(flex_attention)
        function = _compiled
    return function(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


_compiled = None


def _attend_by_row(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """As `scaled_dot_product_attention`, causal without a mask ([B, 1, T, S] bool, or to be added): [B, T, H, d].

    By matrix products in fp32: a CPU's fused attention takes three times as long for the gradients of short rows.
    """
    dtype, shape = value.dtype, (query.shape[2], key.shape[2])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(shape[1] - shape[0])[None, None]
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query * scale, key, value))
        # The queries of a key head's r heads lie below one another.
        query = query.unflatten(1, (key.shape[1], -1))
        scores = (query.flatten(2, 3) @ key.mT).unflatten(2, (-1, shape[0]))  # [B, H / r, r, T, S]
        mask = mask[:, :, None]
        if mask.dtype == torch.bool:  # finite, so that a row that sees nothing has no gradient of NaN
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
        attended = (scores.softmax(-1).flatten(2, 3) @ value).unflatten(2, (-1, shape[0]))
    return attended.flatten(1, 2).transpose(1, 2).to(dtype)


def _attend_by_group(query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scale: float | None) -> Tensor:
    """As FlexAttention with the block mask: [1, N, H, d]; scores are made for pairs of one question alone.

    By matrix products in fp32 over all questions of a view set at once: a prefix's keys are not copied for each of its
    questions, and a CPU's fused attention takes ten times as long for the gradients of such short rows.
    """
    dtype, groups, length, width = value.dtype, layout.num_groups, layout.length, layout.width
    rank, most = layout.ranks()
    place = (layout.group * most + rank)[layout.tokens // width] * width + layout.tokens % width
    heads = key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
        """[G, kv heads, r, P, d] of the prefixes, [G, kv heads, K, r, S, d] of the questions, zero where there is no
        token; r is 1 for keys and values."""
        tensor = tensor[0].transpose(0, 1).to(torch.promote_types(dtype, torch.float32))  # [N, heads, d]
        start = groups * length
        own = tensor.new_zeros(groups * most * width, *tensor.shape[1:]).index_copy(0, place, tensor[start:])
        return (
            tensor[:start].view(groups, length, heads, -1, tensor.shape[-1]).permute(0, 2, 3, 1, 4),
            own.view(groups, most, width, heads, -1, tensor.shape[-1]).permute(0, 3, 1, 4, 2, 5).contiguous(),
        )

    with torch.autocast(query.device.type, enabled=False):
        (prefix_query, own_query), (prefix_key, own_key), (prefix_value, own_value) = map(
            parts, (query * scale, key, value)
        )
        prefix_key, prefix_value = prefix_key[:, :, 0], prefix_value[:, :, 0]  # [G, kv heads, P, d]
        own_key, own_value = own_key[:, :, :, 0], own_value[:, :, :, 0]  # [G, kv heads, K, S, d]
        ahead = torch.ones(max(length, width), max(length, width), dtype=torch.bool, device=query.device).triu(1)

        # Of prefixes: the queries of a key head's r heads lie below one another.
        scores = (prefix_query.flatten(2, 3) @ prefix_key.mT).unflatten(2, (-1, length))
        shares = scores.masked_fill(ahead[:length, :length], -torch.inf).softmax(-1)
        of_prefix = (shares.flatten(2, 3) @ prefix_value).unflatten(2, (-1, length))

        # Of questions: all of a view set at once on its prefix, then each on itself, as shares of one sum.
        shape = own_query.shape[:-1]  # [G, kv heads, K, r, S]
        on_prefix = (own_query.flatten(2, 4) @ prefix_key.mT).view(*shape, length)
        on_own = (
            (own_query.flatten(3, 4) @ own_key.mT).view(*shape, width).masked_fill(ahead[:width, :width], -torch.inf)
        )
        highest = torch.maximum(on_prefix.detach().amax(-1), on_own.detach().amax(-1))[..., None]
        on_prefix, on_own = (on_prefix - highest).exp(), (on_own - highest).exp()
        of_questions = (on_prefix.flatten(2, 4) @ prefix_value).view(own_query.shape)
        of_questions = of_questions + (on_own.flatten(3, 4) @ own_value).view(own_query.shape)
        of_questions = of_questions / (on_prefix.sum(-1) + on_own.sum(-1))[..., None]
    attended = [
        of_prefix.permute(0, 3, 1, 2, 4).reshape(groups * length, -1, query.shape[-1]),
        of_questions.permute(0, 2, 4, 1, 3, 5).reshape(groups * most * width, -1, query.shape[-1])[place],
    ]
    return torch.cat(attended)[None].to(dtype)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # of rows that share nothing


def why_not_shared(language_model: nn.Module) -> str:
    """Why questions cannot share a prefix in this language model as if each were alone; "" where they can."""
    config = language_model.config
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if others or getattr(config, "sliding_window", None):
        return f"its layers of {', '.join(sorted(others)) or 'sliding attention'} do not see a whole prefix"
    if config._attn_implementation not in ("sdpa", ATTENTION):
        return f"its attention is {config._attn_implementation}, which takes no such mask; use sdpa"
    dropouts = [m.p for m in language_model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    if dropouts or getattr(config, "attention_dropout", 0.0):
        return "its dropout would be drawn once for a prefix and not once for each question; set it to 0"
    return ""
