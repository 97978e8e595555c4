"""The model's card: parts, parameters, tokens, FLOPs and memory of one sample; nothing runs to find them.

A multiply-add counts as two FLOPs and only matrix products and attention are counted. The formulas agree with torch's
FlopCounterMode on the modules themselves; attention under the causal mask counts half.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from roomplan_lib.config import RESAMPLER_PRESETS, FeaturesConfig, ResamplerConfig
from roomplan_lib.model.features import entry_bytes, heads_of
from roomplan_lib.model.geometry_tokens import RECORD_WIDTH
from roomplan_lib.model.resampler import build_resampler
from roomplan_lib.model.vggt import VGGT, VGGTConfig
from roomplan_lib.model.vlm import LOGITS_AT_ONCE, RoomPlanVLM, parameter_table

GIB = 2**30
# Of what a layer of Qwen3-4B keeps of a token, as measured: 85.4 kB compiled and 125.4 eager; 6.13 MB of all layers
# where its own weights are trained and 4.51 with LoRA.
COMPILED_SHARE = 85.4 / 125.4
TRAINED_SHARE = 6.13 / 4.51


def aggregator_flops(config: VGGTConfig, num_views: int, grid: tuple[int, int], num_layers: int | None = None) -> float:
    """FLOPs of VGGT's aggregator for one set of views; grid: (rows, columns) of patches.

    num_layers: pairs of frame and global blocks that run; None = all.
    """
    width, patches = config.embed_dim, grid[0] * grid[1]
    tokens = 1 + config.num_register_tokens + patches  # of one view, with or without DINOv2's class token
    linear = (8 + 4 * config.mlp_ratio) * width**2  # one token, one block
    layers = config.depth if num_layers is None else num_layers

    def block(sequences: int, length: int) -> float:
        return sequences * (linear * length + 4 * width * length**2)

    projection = 2 * 3 * config.patch_size**2 * width * num_views * patches
    dino = config.patch_embed_depth * block(num_views, tokens)
    return projection + dino + layers * (block(num_views, tokens) + block(1, num_views * tokens))


def resampler_flops(config: ResamplerConfig, context: int, context_width: int, out_width: int) -> float:
    """FLOPs of one resampler pass over `context` tokens."""
    latents, width = config.num_latents, config.width
    if config.kind == "spatial":  # the means, as a matrix product, and the perceptron
        return 2 * latents * (context * context_width + (context_width + out_width) * config.ffn_width)
    attention = 4 * latents * width**2 + 4 * latents * context * width  # query, output, scores and values
    ffn = 4 * latents * width * config.ffn_width
    if config.kind == "reference":
        layer = attention + 4 * context * width**2 + ffn
        return 2 * context * context_width * width + config.num_layers * layer + 2 * latents * width * out_width
    cross = attention + 4 * context * context_width * width
    own = 8 * latents * width**2 + 4 * latents**2 * width
    return config.num_layers * (cross + own + ffn) + 2 * latents * width * out_width


def language_model_flops(config, length: float, num_logits: float, before: float = 0) -> float:
    """FLOPs of a forward pass of a Qwen3-like decoder over `length` tokens with logits at `num_logits` of them.

    config: its Hugging Face config. before: tokens of a prefix that these see as well, but that are computed elsewhere:
    a prefix once and then each question behind it cost what the whole sequence costs, with one question.
    """
    hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, _head_dim(config)
    projections = hidden * head_dim * 2 * (heads + config.num_key_value_heads)
    linear = 2 * (projections + 3 * hidden * config.intermediate_size) * length
    attention = 4 * heads * head_dim * length * (before + (length + 1) / 2)
    return config.num_hidden_layers * (linear + attention) + 2 * hidden * config.vocab_size * num_logits


def language_model_training_flops(
    model: RoomPlanVLM, length: float, num_logits: float, before: float = 0, *, recompute: bool = False
) -> float:
    """FLOPs of `language_model_flops` with the backward pass: once more for the gradients of inputs, once more for
    those of weights where the model itself is trained, those of LoRA's own weights, and with `recompute` (gradient
    checkpointing) the layers a second time."""
    language_model, config = model.language_model, model.language_model.config
    lora = sum(p.numel() for n, p in language_model.named_parameters() if "lora_" in n)
    forward = language_model_flops(config, length, num_logits, before)
    again = language_model_flops(config, length, 0, before) + 2 * lora * length if recompute else 0.0
    return forward * (3 if _base_is_trained(model) else 2) + 6 * lora * length + again


def language_model_bytes(
    model: RoomPlanVLM, num_tokens: float, num_logits: float, *, compiled: bool = False, recompute: bool = False
) -> float:
    """Bytes that the language model keeps of `num_tokens` tokens for the backward pass, and for the loss at
    `num_logits` of them.

    compiled: its layers are; recompute: gradient checkpointing, which keeps each layer's input, and the rest of one
    layer at a time. The logits exist as themselves, as their log-probabilities and as the gradients of both, in
    float32, of LOGITS_AT_ONCE at most.
    """
    config = model.language_model.config
    kept = activations_per_token(config) * (COMPILED_SHARE if compiled else 1)
    kept *= TRAINED_SHARE if _base_is_trained(model) else 1
    if recompute:
        kept = config.num_hidden_layers * config.hidden_size + kept / config.num_hidden_layers
    logits = min(num_logits * config.vocab_size, max(LOGITS_AT_ONCE, config.vocab_size))
    return num_tokens * kept * _width_of(model.language_model) + 4 * logits * 4


def head_flops(config: VGGTConfig, heads: Sequence[str], num_views: int, image_size_hw: tuple[int, int]) -> float:
    """FLOPs of VGGT's `heads` of camera and depth, counted on tensors without memory."""
    with torch.device("meta"):
        model = VGGT(config).freeze()
        patches = image_size_hw[0] * image_size_hw[1] // config.patch_size**2
        tokens = torch.empty(1, num_views, 1 + config.num_register_tokens + patches, 2 * config.embed_dim)
        with FlopCounterMode(display=False) as counter:
            if "camera" in heads:
                model.camera_head(tokens)
            if "depth" in heads:
                model.depth_head([tokens] * 4, 1 + config.num_register_tokens, image_size_hw)
    return float(counter.get_total_flops())


def model_card(
    model: RoomPlanVLM,
    num_views: int,
    image_size: int | tuple[int, int],
    num_text_tokens: int = 72,
    num_response_tokens: int = 16,
    *,
    recompute: bool = False,
) -> dict:
    """The numbers behind `describe`, for one sample.

    image_size: pixels of a square view, or (width, height); multiples of the patch size. num_text_tokens: prompt and
    response without the placeholders; num_response_tokens of them are supervised. recompute: with gradient
    checkpointing. The model may be on the meta device.
    Raises ValueError for sizes that are no multiples and for more views than the resampler tells apart.
    """
    settings, encoder = model.settings, model.encoder.config
    width, height = (image_size, image_size) if isinstance(image_size, int) else image_size
    if width % encoder.patch_size or height % encoder.patch_size or min(width, height) < 1:
        raise ValueError(f"image_size: expected multiples of {encoder.patch_size} pixels, got {width} x {height}")
    if not 1 <= num_views <= settings.resampler.max_views:
        raise ValueError(f"num_views: expected 1..{settings.resampler.max_views}, got {num_views}")
    grid = (height // encoder.patch_size, width // encoder.patch_size)
    patches, taps = grid[0] * grid[1], len(settings.tap_layers)
    context = num_views * (1 + patches) * taps
    lm = model.language_model.config
    length = model.num_visual_tokens + num_text_tokens

    heads = heads_of(settings)
    wanted = model.encoder.aggregator.layer_indices(settings.tap_layers)
    if heads:
        wanted = [*wanted, *model.encoder.head_layers(heads)]
    forward = {
        "encoder": aggregator_flops(encoder, num_views, grid, max(wanted) + 1)
        + (head_flops(encoder, heads, num_views, (height, width)) if heads else 0.0),
        "positions": num_views * patches * _linear_flops(model.positions),
        "resampler": resampler_flops(settings.resampler, context, 2 * encoder.embed_dim, lm.hidden_size),
        "geometry_encoder": _geometry_flops(model, num_views),
        "language_model": language_model_flops(lm, length, num_response_tokens),
    }
    rows = parameter_table(model)
    encoder_trained = any(p.requires_grad for p in model.encoder.parameters())
    train = {  # the backward pass costs once more for the gradients of inputs, once more for those of weights
        "encoder": forward["encoder"] * (3 + recompute if encoder_trained else 1),
        "positions": forward["positions"] * 3,
        "resampler": forward["resampler"] * (3 + recompute),
        "geometry_encoder": forward["geometry_encoder"] * 3,
        "language_model": language_model_training_flops(model, length, num_response_tokens, recompute=recompute),
    }
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    encoder_bytes, bytes_per_value = _width_of(model.encoder), _width_of(model.language_model)
    tapped = num_views * (1 + encoder.num_register_tokens + patches) * 2 * encoder.embed_dim
    memory = {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradients and AdamW": 3 * trainable,
        "encoder activations": _encoder_activations(encoder, num_views, patches, encoder_trained, recompute)
        * encoder_bytes
        + taps * tapped * encoder_bytes,
        "resampler activations": _resampler_activations(settings.resampler, context, 2 * encoder.embed_dim, recompute)
        * bytes_per_value,
        "language model activations": language_model_bytes(model, length, num_response_tokens, recompute=recompute),
    }
    return {
        "parts": rows,
        "tokens": {
            "encoder": num_views * (1 + encoder.num_register_tokens + patches),
            "context": context,
            "visual": model.num_visual_tokens,
            "text": num_text_tokens,
            "sequence": length,
            "max_length": model.config.data.get("max_length"),
        },
        "forward_flops": forward,
        "train_flops": train,
        "memory_bytes": memory,
    }


def describe(
    model: RoomPlanVLM,
    num_views: int = 8,
    image_size: int | tuple[int, int] = 448,
    num_text_tokens: int = 72,
    num_response_tokens: int = 16,
    features: FeaturesConfig | None = None,
    num_view_sets: int = 0,
) -> None:
    """Prints the model's card: parameters per part, tokens, FLOPs and memory of one sample. See `model_card`.

    With `features` that name a folder also what the cache saves and takes, for `num_view_sets` of this size.
    """
    card = model_card(model, num_views, image_size, num_text_tokens, num_response_tokens)
    size = f"{image_size} x {image_size}" if isinstance(image_size, int) else f"{image_size[0]} x {image_size[1]}"
    print(f"{num_views} views of {size} pixels")
    print(f"{'part':<18} {'parameters':>15} {'trainable':>13} {'forward':>11} {'training':>11}  TFLOP per sample")
    for name, total, trainable in card["parts"]:
        flops = (card["forward_flops"], card["train_flops"])
        values = [sum(f.values()) if name == "total" else f.get(name, 0.0) for f in flops]
        print(f"{name:<18} {total:>15,} {trainable:>13,} " + " ".join(f"{value / 1e12:>11.4f}" for value in values))
    tokens = card["tokens"]
    limit = f" of {tokens['max_length']} allowed" if tokens["max_length"] else ""
    print(
        f"tokens: {tokens['encoder']:,} in the encoder, {tokens['context']:,} into the resampler, "
        f"{tokens['visual']} visual + {tokens['text']} text = {tokens['sequence']}{limit}"
    )
    if tokens["max_length"] and tokens["sequence"] > tokens["max_length"]:
        print("  longer than data.max_length: the collator refuses such a sample")
    memory = card["memory_bytes"]
    print(
        f"memory, estimated, training on one sample: {sum(memory.values()) / GIB:.2f} GiB = "
        + " + ".join(f"{name} {value / GIB:.2f}" for name, value in memory.items())
    )
    if features and features.folder:
        cached = cache_card(model, num_views, image_size, features.dtype, pool=features.pool)
        live, without = cached["live_flops"] / 1e12, cached["cached_flops"] / 1e12
        print(
            f"feature cache: once a view set is encoded, training on a sample takes {without:.4f} TFLOP in place of "
            f"{live:.4f}, {live / without:.1f} times less"
        )
        stored = f"  {cached['set_bytes'] / 1e6:,.2f} MB per view set in {features.dtype}"
        whole = f", {num_view_sets * cached['set_bytes'] / 1e9:,.2f} GB for {num_view_sets:,}" if num_view_sets else ""
        print(stored + whole)


def cache_card(
    model: RoomPlanVLM,
    num_views: int,
    image_size: int | tuple[int, int],
    dtype: str,
    group_size: int = 1,
    pool: int = 1,
) -> dict:
    """What the feature cache changes for one sample: training FLOPs live and cached, bytes per view set.

    group_size: samples that share one encoding of their views, one pass of the resampler and geometry tokens, and one
    of their visual tokens through the language model where it can share them.
    pool: as in FeaturesConfig; the resampler's FLOPs are those of patches that are not pooled.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    flops = model_card(model, num_views, size)["train_flops"]
    prefix = 0.0 if model.why_not_shared else language_model_training_flops(model, model.num_visual_tokens, 0)
    shared = sum(flops[part] for part in ("positions", "resampler", "geometry_encoder")) + prefix
    own, taps = flops["language_model"] - prefix, len(model.settings.tap_layers)
    return {
        "live_flops": (flops["encoder"] + shared) / group_size + own,
        "cached_flops": shared / group_size + own,
        "set_bytes": entry_bytes(model.encoder, taps, num_views, size, dtype, heads_of(model.settings), pool),
    }


def resampler_table(
    context_width: int = 2048, out_width: int = 2560, context: int = 8 * 1025
) -> list[tuple[str, int, float]]:
    """Prints (preset, parameters, training TFLOP per sample) of the resampler presets, and returns the rows."""
    rows = []
    print(f"{'resampler':<16} {'parameters':>14} {'training TFLOP':>15}  for {context:,} context tokens")
    for name, config in RESAMPLER_PRESETS.items():
        with torch.device("meta"):
            resampler = build_resampler(config, 1, context_width, out_width)
        parameters = sum(p.numel() for p in resampler.parameters())
        rows.append((name, parameters, 3 * resampler_flops(config, context, context_width, out_width) / 1e12))
        print(f"{name:<16} {parameters:>14,} {rows[-1][2]:>15.2f}")
    return rows


def activations_per_token(config) -> float:
    """Values that a decoder with LoRA keeps of one token for the backward pass: of each layer four times the FFN's and
    the hidden width, three times the queries' and twice the keys' (125 kB in bf16 measured for Qwen3-4B, 127 kB so).

    config: its Hugging Face config.
    """
    heads, keys, head_dim = config.num_attention_heads, config.num_key_value_heads, _head_dim(config)
    layer = 4 * config.intermediate_size + 4 * config.hidden_size + (3 * heads + 2 * keys) * head_dim
    return config.num_hidden_layers * layer


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _base_is_trained(model: RoomPlanVLM) -> bool:
    """Whether the language model's own weights are trained, beside those of LoRA."""
    return any(p.requires_grad for n, p in model.language_model.named_parameters() if "lora_" not in n)


def _width_of(part: torch.nn.Module) -> int:
    """Bytes per value of the type that most of the part's weights have."""
    sizes = [(p.numel(), p.element_size()) for p in part.parameters()]
    return max(sizes)[1]


def _encoder_activations(
    config: VGGTConfig, num_views: int, patches: int, trained: bool, recompute: bool = False
) -> float:
    """Values: of one block (its input, queries, keys, values, hidden layer) without gradients, of every block with.

    A block that is trained keeps 13 of its width and two of the hidden layer: its input and what its norms, linear
    layers, turned queries and keys, attention, activation and LayerScale make of it.
    recompute: of the frame and global blocks their inputs alone, and all of one at a time.
    """
    tokens = num_views * (1 + config.num_register_tokens + patches)
    if not trained:
        return tokens * config.embed_dim * (6 + 2 * config.mlp_ratio)
    block = tokens * config.embed_dim * (13 + 2 * config.mlp_ratio)
    if recompute:
        return block * (config.patch_embed_depth + 1) + 2 * config.depth * tokens * config.embed_dim
    return block * (config.patch_embed_depth + 2 * config.depth)


def _resampler_activations(config: ResamplerConfig, context: int, context_width: int, recompute: bool = False) -> float:
    """Values: the context before and after its norm and, per layer, keys, values and what the latents leave.

    recompute: of a layer its latents alone, and all of one at a time.
    """
    if config.kind == "spatial":
        return 3 * context * context_width + config.num_latents * (context_width + 2 * config.ffn_width)
    per_layer = 2 * context * config.width + config.num_latents * (12 * config.width + 2 * config.ffn_width)
    layers = config.num_layers * per_layer
    if recompute:
        layers = per_layer + config.num_layers * config.num_latents * config.width
    return 2 * context * context_width + layers


def _linear_flops(part: torch.nn.Module | None) -> float:
    """FLOPs of the linear layers, each run once for one token."""
    linear = [] if part is None else [m for m in part.modules() if isinstance(m, torch.nn.Linear)]
    return sum(2.0 * m.in_features * m.out_features for m in linear)


def _geometry_flops(model: RoomPlanVLM, num_views: int) -> float:
    config, encoder = model.settings.geometry, model.geometry_encoder
    if encoder is None:
        return 0.0
    per_view = RECORD_WIDTH * config.width + 8 * config.width**2 + 2 * config.width**2
    per_token = 2 * config.width**2 + 2 * num_views * config.width + config.width * encoder.out.out_features
    return 2.0 * (num_views * per_view + config.num_tokens * per_token)
