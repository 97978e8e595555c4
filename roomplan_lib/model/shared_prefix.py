"""Questions about one set of views share what comes before them: each sees that prefix and itself, and nothing else.

The tokens of a batch lie in one row without padding: the prefixes of all view sets, then what is each question's own.
Everything but attention works on tokens one by one, so it is done once per prefix; attention is told who sees whom, by
a FlexAttention block mask on a GPU and by dense masks per question elsewhere. Positions are those that each question
has alone, so losses and gradients are those of separate rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "shared_prefix"  # the name under which transformers finds `attend`
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


def lay_out(attention_mask: Tensor, labels: Tensor, length: int) -> dict:
    """What `RoomPlanVLM.forward` needs to share the prefixes of a batch [B, T] that is padded on the right.

    length: tokens of the prefix that all rows begin with, each longer; none of them supervised. `length`, `tokens`:
    see PrefixLayout; `predicting` [C] int: for each supervised token, which of the M tokens predicts it; `targets` [C]:
    their labels.
    """
    own = attention_mask[:, length:].bool()
    number = (torch.cumsum(own.flatten(), 0) - 1).view_as(own)
    supervised = labels[:, length + 1 :] != IGNORE_INDEX
    return {
        "length": length,
        "tokens": own.flatten().nonzero()[:, 0],
        "predicting": number[:, :-1][supervised],
        "targets": labels[:, length + 1 :][supervised],
    }


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
    H, d]. Without a layout it is transformers' own by `scaled_dot_product_attention`."""
    if prefix_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if prefix_layout.block_mask is not None:
        query, key = query.to(value.dtype), key.to(value.dtype)
        attended = _flex(query, key, value, prefix_layout.block_mask, scaling)
        return attended.transpose(1, 2), None
    return _attend_by_question(query, key, value, prefix_layout, scaling), None


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    function = flex_attention
    if query.device.type == "cuda":  # which alone is made fast by compiling, and would write all scores down without
        global _compiled
        _compiled = _compiled or torch.compile(flex_attention)
        function = _compiled
    return function(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


_compiled = None


def _attend_by_question(query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scale: float | None) -> Tensor:
    """As FlexAttention with the block mask: [1, N, H, d]; scores are made for pairs of one question alone."""
    start, groups = layout.num_groups * layout.length, layout.num_groups
    num_questions = len(layout.group)

    def parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
        """[G, heads, P, d] of the prefixes and [B, heads, S, d] of the questions, zero where a row has no token."""
        tensor = tensor[0].transpose(0, 1)  # [N, heads, d]
        own = tensor.new_zeros(num_questions * layout.width, *tensor.shape[1:]).index_copy(
            0, layout.tokens, tensor[start:]
        )
        return (
            tensor[:start].unflatten(0, (groups, -1)).transpose(1, 2),
            own.unflatten(0, (num_questions, -1)).transpose(1, 2),
        )

    (prefix_query, own_query), (prefix_key, own_key), (prefix_value, own_value) = map(parts, (query, key, value))
    grouped = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    of_prefix = F.scaled_dot_product_attention(prefix_query, prefix_key, prefix_value, is_causal=True, **grouped)
    keys = torch.cat([prefix_key[layout.group], own_key], dim=2)
    values = torch.cat([prefix_value[layout.group], own_value], dim=2)
    ones = torch.ones(layout.width, layout.length + layout.width, dtype=torch.bool, device=query.device)
    mask = ones.tril(layout.length)[None, None]  # the dense 4-D mask: the prefix, and what is not behind it
    of_questions = F.scaled_dot_product_attention(own_query, keys, values, attn_mask=mask, **grouped)
    attended = [
        of_prefix.transpose(1, 2).flatten(0, 1),
        of_questions.transpose(1, 2).flatten(0, 1)[layout.tokens],
    ]
    return torch.cat(attended)[None]


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
