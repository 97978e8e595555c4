"""The assembled model: encode the views, resample them, put them in place of the placeholders, answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, Qwen3Config
from transformers.modeling_outputs import CausalLMOutput

from roomplan_lib.config import DataConfig, LanguageModelConfig, ModelConfig, parse, to_dict
from roomplan_lib.model.geometry_tokens import GeometryEncoder
from roomplan_lib.model.positions import build_positions, encode_positions
from roomplan_lib.model.resampler import PerceiverResampler
from roomplan_lib.model.vggt import VGGT, VGGTConfig, load_vggt

IGNORE_INDEX = -100


class RoomPlanConfig(PretrainedConfig):
    """What a model folder's config.json holds.

    model: plain fields of ModelConfig; language_model: plain fields of its own Hugging Face config; data: the fields of
    DataConfig that decide what the model is shown (image_size, max_length, visual_first).
    """

    model_type = "roomplan_vlm"

    def __init__(
        self,
        model: dict | None = None,
        language_model: dict | None = None,
        data: dict | None = None,
        image_token_id: int = -1,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.model = model or {}
        self.language_model = language_model or {}
        self.data = data or {}
        self.image_token_id = image_token_id


class RoomPlanVLM(PreTrainedModel):
    """VGGT -> (+ 3D positions) -> Perceiver resampler, and geometry tokens -> a causal language model."""

    config_class = RoomPlanConfig
    accepts_loss_kwargs = True

    def __init__(
        self, config: RoomPlanConfig, language_model: nn.Module | None = None, encoder: VGGT | None = None
    ) -> None:
        """Random weights, but for parts that are given loaded; their configs must be those in `config`."""
        super().__init__(config)
        self.settings = parse(ModelConfig, config.model, "model")
        lm_settings = self.settings.language_model
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.language_model))
        width = language_model.config.hidden_size

        self.encoder = encoder if encoder is not None else VGGT(vggt_settings(self.settings))
        token_width = 2 * self.encoder.config.embed_dim
        self.resampler = PerceiverResampler(self.settings.resampler, len(self.settings.tap_layers), token_width, width)
        self.geometry_encoder = (
            GeometryEncoder(self.settings.geometry, width) if self.settings.geometry.num_tokens else None
        )
        self.positions = build_positions(self.settings.positions, token_width)
        for module in (self.resampler, self.geometry_encoder):
            if module is not None:  # visual tokens start at the scale of the text embeddings
                std = getattr(language_model.config, "initializer_range", 0.02)
                nn.init.normal_(module.out.weight, std=std / module.out.in_features**0.5)

        if lm_settings.freeze or lm_settings.lora:
            language_model.requires_grad_(False)
        if lm_settings.lora:
            lora = lm_settings.lora
            language_model = inject_adapter_in_model(
                LoraConfig(
                    r=lora.rank,
                    lora_alpha=lora.alpha,
                    lora_dropout=lora.dropout,
                    target_modules=list(lora.target_modules),
                ),
                language_model,
            )
        self.language_model = language_model
        if self.settings.freeze_vggt:
            self.encoder.freeze()

    @property
    def num_visual_tokens(self) -> int:
        """Placeholders that a prompt holds for one set of views."""
        return self.settings.resampler.num_latents + self.settings.geometry.num_tokens

    @property
    def needs_positions(self) -> bool:
        return self.positions is not None

    def parts(self) -> dict[str, nn.Module]:
        """The named parts that are there, in the order a picture passes them."""
        names = ("encoder", "positions", "resampler", "geometry_encoder", "language_model")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    # ------------------------------------------------------------------ the pathway
    def encode_views(
        self,
        pixel_values: list[Tensor],
        geometry_records: list[Tensor],
        has_geometry: Tensor,
        patch_coordinates: list[Tensor] | None = None,
        patch_valid: list[Tensor] | None = None,
    ) -> Tensor:
        """Visual tokens [S, L + G, D] of S sets of views: resampler output, then geometry tokens.

        pixel_values: S tensors uint8 [V, 3, H, W]; geometry_records: S tensors [V, RECORD_WIDTH];
        has_geometry: [S] bool; patch_coordinates [V, P, 3] metres in the reference frame and patch_valid [V, P],
        S of each, where 3D positions are on (ValueError without them). Sets of different V, H or W are encoded
        apart, so no padding ever reaches the encoder's global attention.
        """
        if self.needs_positions and patch_coordinates is None:
            raise ValueError("3D positions are on, but the batch holds no patch_coordinates")
        groups: dict[torch.Size, list[int]] = {}
        for i, views in enumerate(pixel_values):
            groups.setdefault(views.shape, []).append(i)
        encoded: list[Tensor | None] = [None] * len(pixel_values)
        for members in groups.values():
            pixels = torch.stack([pixel_values[i] for i in members]).to(self.dtype) / 255
            grid = tuple(side // self.encoder.config.patch_size for side in pixels.shape[-2:])
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.settings.freeze_vggt):
                taps, patch_token_start = self.encoder.aggregator(pixels, tap_layers=self.settings.tap_layers)
            positions = None
            if self.needs_positions:
                positions = encode_positions(
                    self.positions,
                    self.settings.positions,
                    torch.stack([patch_coordinates[i] for i in members]).to(self.dtype),
                    torch.stack([patch_valid[i] for i in members]),
                )
            tokens = self.resampler(taps, patch_token_start, grid, positions)
            if self.geometry_encoder is not None:
                records = torch.stack([geometry_records[i] for i in members]).to(self.dtype)
                tokens = torch.cat([tokens, self.geometry_encoder(records, has_geometry[members])], dim=1)
            for row, i in zip(tokens, members, strict=True):
                encoded[i] = row
        return torch.stack(encoded)

    def embed(self, input_ids: Tensor, visual_tokens: Tensor | None) -> Tensor:
        """Input embeddings [B, T, D] with visual_tokens [B, L + G, D] in place of the placeholders, in order.

        Raises ValueError unless each row of input_ids [B, T] holds exactly one placeholder per visual token.
        """
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        is_placeholder = input_ids == self.config.image_token_id
        expected = 0 if visual_tokens is None else visual_tokens.shape[1]
        counts = is_placeholder.sum(1)
        if (counts != expected).any():
            raise ValueError(f"{counts.tolist()} placeholders per row for {expected} visual tokens")
        if visual_tokens is None:
            return embeddings
        return embeddings.masked_scatter(is_placeholder[..., None], visual_tokens.to(embeddings.dtype))

    def _inputs(self, input_ids: Tensor, scene_index: Tensor | None, views: dict) -> Tensor:
        tokens = None
        if views.get("pixel_values") is not None:
            tokens = self.encode_views(**views)[scene_index]  # each set encoded once, shared by its samples
        return self.embed(input_ids, tokens)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        scene_index: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **views,
    ) -> CausalLMOutput:
        """Loss over the supervised tokens, or logits [B, T, vocabulary] when there are no labels.

        input_ids, attention_mask, labels: [B, T]; scene_index: [B] int, the set of views that each row sees;
        views: the arguments of `encode_views`. The loss is summed over supervised tokens and divided by
        num_items_in_batch (their number in the whole optimizer step), or by their number here.
        """
        hidden = self.language_model.get_decoder()(
            inputs_embeds=self._inputs(input_ids, scene_index, views),
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        head = self.language_model.get_output_embeddings()
        if labels is None:
            return CausalLMOutput(logits=head(hidden))
        supervised = labels[:, 1:] != IGNORE_INDEX
        logits = head(hidden[:, :-1][supervised]).float()  # only where there is something to learn
        total = F.cross_entropy(logits, labels[:, 1:][supervised], reduction="sum")
        count = supervised.sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=total / count)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, scene_index: Tensor | None = None, *, views: dict, **kwargs
    ) -> Tensor:
        """New token ids [B, <= max_new_tokens] after prompts padded on the left; kwargs go to `generate` of the
        language model. The prompt passes through the same `embed` as in training."""
        return self.language_model.generate(
            inputs_embeds=self._inputs(input_ids, scene_index, views), attention_mask=attention_mask, **kwargs
        )

    # ------------------------------------------------------------------ files
    def save_pretrained(self, folder: str | Path, **_) -> None:
        """Writes config.json and model.safetensors (every weight, tied ones once)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        save_model(self, str(folder / "model.safetensors"))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_) -> RoomPlanVLM:
        """The model of a folder that `save_pretrained` wrote, in eval mode.

        Raises ValueError when a file is missing or a key is missing, unexpected or misshapen.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: no model here, {name} is missing")
        model = cls(RoomPlanConfig.from_pretrained(folder))
        try:
            load_model(model, folder / "model.safetensors", strict=True)
        except RuntimeError as error:
            raise ValueError(f"{folder}: weights do not fit the config: {error}") from None
        return model.eval()


def vggt_settings(settings: ModelConfig) -> VGGTConfig:
    """The encoder's config; its camera, depth and point heads are built only where the settings ask for them."""
    return parse(VGGTConfig, {**dict.fromkeys(HEAD_FLAGS, False), **settings.vggt}, "model.vggt")


HEAD_FLAGS = tuple(f.name for f in dataclasses.fields(VGGTConfig) if f.name.startswith("enable_"))


def build_model(settings: ModelConfig, data: DataConfig, vocab_size: int, image_token_id: int) -> RoomPlanVLM:
    """The model that the settings describe, with the pretrained weights that they name.

    vocab_size: entries of the tokenizer; read when the language model is built from `language_model.config`.
    """
    shown = {name: getattr(data, name) for name in ("image_size", "max_length", "visual_first")}
    language_model = None
    if settings.language_model.name:
        language_model = AutoModelForCausalLM.from_pretrained(settings.language_model.name)
        lm_config = language_model.config.to_dict()
    else:
        lm_config = qwen3_config(settings.language_model, vocab_size)
    config = RoomPlanConfig(to_dict(settings), lm_config, shown, image_token_id)
    encoder = load_vggt(settings.vggt_weights, vggt_settings(settings)) if settings.vggt_weights else None
    return RoomPlanVLM(config, language_model, encoder)


def qwen3_config(settings: LanguageModelConfig, vocab_size: int) -> dict:
    """Plain fields of a Qwen3Config; ValueError for a key that Qwen3Config does not have."""
    known = Qwen3Config().to_dict()
    unknown = [key for key in settings.config if key not in known]
    if unknown:
        raise ValueError(f"model.language_model.config: unknown Qwen3Config fields {unknown}")
    return {"model_type": "qwen3", **settings.config, "vocab_size": vocab_size}


def parameter_table(model: RoomPlanVLM) -> list[tuple[str, int, int]]:
    """(part, parameters, trainable parameters) per part, and the total; tied weights count once."""
    rows = []
    for name, part in [*model.parts().items(), ("total", model)]:
        parameters = list(part.parameters())
        rows.append((name, sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)))
    return rows
