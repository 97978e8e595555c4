"""The assembled model: encode the views, resample them, put them in place of the placeholders, answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.modeling_outputs import CausalLMOutput

from roomplan_lib.config import (
    DataConfig,
    FeaturesConfig,
    LanguageModelConfig,
    LoraSettings,
    ModelConfig,
    PositionsConfig,
    parse,
    to_dict,
)
from roomplan_lib.model.features import FeatureCache, encode, heads_of, pool_coordinates, pooled_grid, unpack
from roomplan_lib.model.generation import Prompt, prefill, rows_of
from roomplan_lib.model.geometry_tokens import GeometryEncoder, record_intrinsics, record_poses
from roomplan_lib.model.positions import build_positions, encode_positions, vggt_patch_coordinates
from roomplan_lib.model.pretrained import check_reference, find_source, load_encoder, load_language_model, reference_to
from roomplan_lib.model.resampler import SpatialResampler, build_resampler
from roomplan_lib.model.shared_prefix import (
    ATTENTION,
    BLOCK,
    IGNORE_INDEX,
    PrefixLayout,
    prefix_length,
    takes_block_mask,
    why_not_shared,
)
from roomplan_lib.model.vggt import VGGT, VGGTConfig

LOGITS_AT_ONCE = 2**28  # 1.1 GB in float32: 1,766 tokens of Qwen3's vocabulary
_LISTED = 20  # keys per kind in an error message


class RoomPlanConfig(PretrainedConfig):
    """What a model folder's config.json holds.

    model: plain fields of ModelConfig; language_model: plain fields of its own Hugging Face config; data: the fields of
    DataConfig that decide what the model is shown and how it writes (image_size, max_length, visual_first, codec);
    references: for the parts whose frozen weights the folder does not hold, where they come from (see `reference_to`).
    """

    model_type = "roomplan_vlm"

    def __init__(
        self,
        model: dict | None = None,
        language_model: dict | None = None,
        data: dict | None = None,
        image_token_id: int = -1,
        references: dict | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.model = model or {}
        self.language_model = language_model or {}
        self.data = data or {}
        self.image_token_id = image_token_id
        self.references = references or {}


AutoConfig.register(RoomPlanConfig.model_type, RoomPlanConfig)  # else AutoTokenizer warns of a folder of this type


class RoomPlanVLM(PreTrainedModel, GenerationMixin):
    """VGGT -> (+ 3D positions) -> Perceiver resampler, and geometry tokens -> a causal language model.

    Weights that are not trained are kept in `model.frozen_dtype`, trained ones in float32.
    `sets_with_positions` [S] bool tells which sets of views of the last `encode_views` had a patch with coordinates;
    None without 3D positions. `features`: the cache of the frozen encoder's outputs, where one is open.
    """

    config_class = RoomPlanConfig
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True

    def __init__(
        self, config: RoomPlanConfig, language_model: nn.Module | None = None, encoder: VGGT | None = None
    ) -> None:
        """Random weights, but for parts that are given loaded; their configs must be those in `config`.

        Under `torch.device("meta")` nothing is allocated: the full size can be counted on any machine.
        """
        super().__init__(config)
        self.settings = parse(ModelConfig, config.model, "model")
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.language_model))
        width = language_model.config.hidden_size

        self.encoder = encoder if encoder is not None else VGGT(vggt_settings(self.settings))
        token_width = 2 * self.encoder.config.embed_dim
        self.resampler = build_resampler(self.settings.resampler, len(self.settings.tap_layers), token_width, width)
        self.geometry_encoder = (
            GeometryEncoder(self.settings.geometry, width) if self.settings.geometry.num_tokens else None
        )
        self.positions = build_positions(self.settings.positions, token_width)
        self.sets_with_positions: Tensor | None = None
        self.features: FeatureCache | None = None
        for module in (self.resampler, self.geometry_encoder):
            if module is not None:  # visual tokens start at the scale of the text embeddings
                std = getattr(language_model.config, "initializer_range", 0.02)
                nn.init.normal_(module.out.weight, std=std / module.out.in_features**0.5)

        self.language_model = language_model
        self.generation_config = language_model.generation_config
        if self.settings.language_model.freeze or self.settings.language_model.lora:
            freeze(language_model, self.settings.frozen_dtype)
        if self.settings.language_model.lora:
            self._inject(self.settings.language_model.lora)
        if self.settings.freeze_vggt:
            freeze(self.encoder.freeze(), self.settings.frozen_dtype)

    @property
    def num_visual_tokens(self) -> int:
        """Placeholders that a prompt holds for one set of views."""
        return self.settings.resampler.num_latents + self.settings.geometry.num_tokens

    @property
    def needs_positions(self) -> PositionsConfig | None:
        """The patch coordinates that batches must hold, if any: with VGGT's own points they need none."""
        settings = self.settings.positions
        return settings if self.positions is not None and settings.source == "depth" else None

    def parts(self) -> dict[str, nn.Module]:
        """The named parts that are there, in the order a picture passes them."""
        names = ("encoder", "positions", "resampler", "geometry_encoder", "language_model")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    # ------------------------------------------------------------------ the language model's own matters
    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """Rows for at least `new_num_tokens` tokens. Never shrinks: Qwen3's 151,936 rows are padded on purpose."""
        if new_num_tokens is not None and new_num_tokens > self.get_input_embeddings().num_embeddings:
            self.language_model.resize_token_embeddings(new_num_tokens, *args, **kwargs)
            self.config.language_model["vocab_size"] = self.get_input_embeddings().num_embeddings
        return self.get_input_embeddings()

    def attach_lora(self, lora: LoraSettings) -> None:
        """Freezes the language model and puts trainable low-rank adapters beside `lora.target_modules`.

        Raises ValueError when there are adapters already or a target names no module.
        """
        if self.settings.language_model.lora:
            raise ValueError("the language model has LoRA adapters already; merge_lora() or unload_lora() first")
        freeze(self.language_model, self.settings.frozen_dtype)
        self._inject(lora)
        self._change_language_settings(lora=lora)

    def _inject(self, lora: LoraSettings) -> None:
        names = {name.rsplit(".", 1)[-1] for name, _ in self.language_model.named_modules()}
        unknown = [target for target in lora.target_modules if target not in names]
        if unknown or not lora.target_modules:
            raise ValueError(f"model.language_model.lora.target_modules: no module is called {unknown or 'so: []'}")
        inject_adapter_in_model(
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(lora.target_modules),
            ),
            self.language_model,
        )
        for name, parameter in self.language_model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()

    def merge_lora(self) -> None:
        """Adds the adapters to the weights they stand beside and removes them. The language model is frozen after it,
        and no longer the one it was loaded as: `save_pretrained` stores it whole."""
        self._remove_lora(merge=True)
        self.config.references.pop("language_model", None)

    def unload_lora(self) -> None:
        """Removes the adapters: the language model is again the frozen one that they were attached to."""
        self._remove_lora(merge=False)

    def _remove_lora(self, merge: bool) -> None:
        if not self.settings.language_model.lora:
            raise ValueError("the language model has no LoRA adapters; see attach_lora")
        for name, module in list(self.language_model.named_modules()):
            if isinstance(module, LoraLayer):
                if merge:
                    module.merge(safe_merge=True)  # refuses adapters that are not finite
                parent, _, child = name.rpartition(".")
                setattr(self.language_model.get_submodule(parent), child, module.get_base_layer())
        del self.language_model.peft_config
        self._change_language_settings(lora=None, freeze=True)

    def _change_language_settings(self, **changes) -> None:
        language_model = dataclasses.replace(self.settings.language_model, **changes)
        self.settings = dataclasses.replace(self.settings, language_model=language_model)
        self.config.model = to_dict(self.settings)

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs) -> None:
        super()._set_gradient_checkpointing(enable, *args, **kwargs)  # the language model's and resampler's layers
        aggregator = self.encoder.aggregator
        aggregator.config = dataclasses.replace(aggregator.config, gradient_checkpointing=enable)

    def open_features(self, settings: FeaturesConfig, image_size: int) -> FeatureCache | None:
        """The cache of this model's frozen encoder, for the collator to read from; None without a folder.

        What the collator does not find there is encoded by `encode_views`, which then stores it.
        image_size: pixels of a view's longest side. Raises ValueError for an encoder that is trained.
        """
        self.features = None
        if settings.folder:
            self.features = FeatureCache(settings, self.encoder, self.settings, image_size)
        return self.features

    # ------------------------------------------------------------------ the pathway
    def encode_views(
        self,
        pixel_values: list[Tensor | None],
        geometry_records: list[Tensor],
        has_geometry: Tensor,
        patch_coordinates: list[Tensor] | None = None,
        patch_valid: list[Tensor] | None = None,
        features: list[dict | None] | None = None,
        to_store: list[dict | None] | None = None,
        view_mask: list[Tensor] | None = None,
    ) -> Tensor:
        """Visual tokens [S, L + G, D] of S sets of views: resampler output, then geometry tokens.

        pixel_values: S tensors uint8 [V, 3, H, W]; geometry_records: S tensors [V, RECORD_WIDTH];
        has_geometry: [S] bool; patch_coordinates [V, P, 3] metres in the reference frame ([V, P, n_points, 3] with
        more points than one) and patch_valid [V, P], S of each, where 3D positions from depth are on (ValueError
        without them; positions from VGGT's own points need a geometry record instead). features: for sets whose
        pixel_values are None, what the cache holds of them: `tokens` [num_taps, V, T, E] with their `scale` where they
        are int8, `image_size` (width, height), VGGT's `pose_enc` and `depth` where its points are used; to_store: for
        the others, as what it is to keep them. All sets have the pooled patches of the cache that is open.
        view_mask: S tensors bool [V], False for views that the encoder sees and nothing after it; None = all are seen.
        Sets of different V, H or W are encoded apart, so no padding ever reaches the encoder's global attention.
        """
        if self.needs_positions and patch_coordinates is None:
            raise ValueError("3D positions are on, but the batch holds no patch_coordinates")
        cached = features or [None] * len(pixel_values)
        if self.features is not None and (residence := self.features.residence):
            cached = [known and residence.resolve(known, has_geometry.device) for known in cached]
        groups: dict[tuple, list[int]] = {}
        for i, (views, known) in enumerate(zip(pixel_values, cached, strict=True)):
            shape = views.shape if known is None else (*known["tokens"].shape, *known["image_size"])
            groups.setdefault(tuple(shape), []).append(i)
        encoded: list[Tensor | None] = [None] * len(pixel_values)
        pool = 1 if self.features is None else self.features.settings.pool
        self.sets_with_positions = None if self.positions is None else torch.zeros_like(has_geometry)
        for members in groups.values():
            records, has, seen = torch.stack([geometry_records[i] for i in members]), has_geometry[members], None
            if view_mask is not None:
                seen = torch.stack([view_mask[i] for i in members])
            if cached[members[0]] is None:
                to_keep = [None if to_store is None else to_store[i] for i in members]
                taps, predictions, size = self._encode(torch.stack([pixel_values[i] for i in members]), to_keep)
            else:
                taps, predictions, size = self._cached([cached[i] for i in members])
            grid = tuple(side // self.encoder.config.patch_size for side in size)
            patch_token_start = self.encoder.aggregator.patch_token_start
            dtype, positions, places = self.resampler.out.weight.dtype, None, None
            kind = taps[0].device.type
            if not torch.is_autocast_enabled(kind) or taps[0].dtype != torch.get_autocast_dtype(kind):
                taps = [tap.to(dtype) for tap in taps]  # under autocast a copy would only be rounded again
            if self.positions is not None:
                if self.needs_positions:
                    coordinates = torch.stack([patch_coordinates[i] for i in members]).float()
                    valid = torch.stack([patch_valid[i] for i in members])
                else:
                    coordinates, valid = self._own_coordinates(predictions, records, has, size)
                if pool > 1:
                    coordinates, valid = pool_coordinates(coordinates, valid, grid, pool)
                positions = partial(encode_positions, self.positions, self.settings.positions, coordinates, valid)
                if self.settings.positions.add_to == "encoder" or not isinstance(self.resampler, SpatialResampler):
                    positions = positions().to(dtype)
                places = coordinates if coordinates.ndim == 4 else coordinates.mean(3), valid
                valid = valid if seen is None else valid & seen[..., None]
                self.sets_with_positions[members] = valid.flatten(1).any(1)
                if self.settings.positions.add_to == "encoder":
                    on_patches = F.pad(positions, (0, 0, patch_token_start, 0))  # zero on camera and registers
                    taps, positions = [tap + on_patches for tap in taps], None
            tokens = self.resampler(taps, patch_token_start, pooled_grid(grid, pool), positions, seen, places)
            if self.geometry_encoder is not None:
                records = records.to(self.geometry_encoder.null_record.dtype)
                tokens = torch.cat([tokens, self.geometry_encoder(records, has, seen)], dim=1)
            for row, i in zip(tokens, members, strict=True):
                encoded[i] = row
        return torch.stack(encoded)

    def _encode(
        self, pixels: Tensor, to_store: list[dict | None]
    ) -> tuple[list[Tensor], dict[str, Tensor], tuple[int, int]]:
        """Tapped tokens [S, V, T, E], VGGT's own cameras and depth where they are used, and (H, W) of the pictures."""
        taps, predictions = encode(self.encoder, pixels, self.settings.tap_layers, heads_of(self.settings))
        size = tuple(pixels.shape[-2:])
        if self.features is not None:
            packed = self.features.pack(torch.stack(taps, dim=1), size)
            for i, kept in enumerate(to_store):
                if kept is not None:
                    self.features.store(**kept, tensors={k: v[i] for k, v in (packed | predictions).items()})
            if self.features.settings.is_lossy:  # what is learned from must not depend on what the cache held already
                taps = list(unpack(packed).unbind(1))
        return taps, predictions, size

    def _cached(self, features: list[dict]) -> tuple[list[Tensor], dict[str, Tensor], tuple[int, int]]:
        """As `_encode`, from the cache."""
        tensors = {
            name: torch.stack([known[name] for known in features]) for name in features[0] if name != "image_size"
        }
        return list(unpack(tensors).unbind(1)), tensors, tuple(features[0]["image_size"][::-1])

    def _own_coordinates(
        self, predictions: dict[str, Tensor], records: Tensor, has_geometry: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Patch coordinates and their validity from VGGT's own depth. They are data, whoever measured them, and as
        precise as data."""
        if not has_geometry.all():
            raise ValueError(
                f"model.positions.source is {self.settings.positions.source}, whose points belong to no known frame; "
                "every sample needs a geom_token, whose poses give them one"
            )
        settings, records = self.settings.positions, records.float()
        with torch.no_grad(), torch.autocast(records.device.type, enabled=False):
            return vggt_patch_coordinates(
                predictions,
                record_poses(records),
                size,
                self.encoder.config.patch_size,
                settings.n_points,
                settings.min_valid_share,
                record_intrinsics(records, size) if settings.source == "vggt_depth" else None,
                self.encoder.config.metres_per_unit,
            )

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

    def prompt_embeddings(self, input_ids: Tensor, scene_index: Tensor | None, views: dict) -> Tensor:
        """What the language model reads, [B, T, D]: embeddings of input_ids with the encoded views in their places.

        For generation by other means than `generate`; arguments as there.
        """
        tokens = self._visual_tokens(views)
        return self.embed(input_ids, None if tokens is None else tokens[scene_index])

    def _visual_tokens(self, views: dict) -> Tensor | None:
        """[S, L + G, D] of each set of views, encoded once however many samples it has; None without views."""
        return self.encode_views(**views) if views.get("geometry_records") is not None else None

    @property
    def why_not_shared(self) -> str:
        """Why the questions of a scene cannot share a prefix in the language model; "" where they can."""
        return why_not_shared(self.language_model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        scene_index: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shared_prefix: dict | None = None,
        loss_weights: Tensor | None = None,
        **views,
    ) -> CausalLMOutput:
        """Loss over the supervised tokens, or logits [B, T, vocabulary] when there are no labels.

        input_ids, attention_mask, labels: [B, T]; scene_index: [B] int, the set of views that each row sees;
        views: the arguments of `encode_views`. The loss is summed over supervised tokens and divided by
        num_items_in_batch (their number in the whole optimizer step), or by their number here. loss_weights: [B, T],
        of the supervised tokens; their sum then takes the place of their number.
        shared_prefix: what `lay_out` says of these rows; with it (and labels) rows of one set of views pass their
        common prefix through the language model once, with the same loss and gradients.
        """
        visual_tokens = self._visual_tokens(views)
        if labels is not None and shared_prefix is not None:
            hidden = self._hidden_of_questions(input_ids, scene_index, visual_tokens, shared_prefix)
            predicting, targets = hidden[shared_prefix["predicting"]], shared_prefix["targets"]
            weights = shared_prefix.get("weights")
        else:
            on_cpu = input_ids.device.type == "cpu"
            if labels is not None and on_cpu and self.language_model.config._attn_implementation == "sdpa":
                self.language_model.set_attn_implementation(ATTENTION)  # whose gradients are faster there
            hidden = self.language_model.get_decoder()(
                inputs_embeds=self.embed(input_ids, None if visual_tokens is None else visual_tokens[scene_index]),
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            ).last_hidden_state
            if labels is None:
                return CausalLMOutput(logits=self.get_output_embeddings()(hidden))
            supervised = labels[:, 1:] != IGNORE_INDEX
            predicting, targets = hidden[:, :-1][supervised], labels[:, 1:][supervised]
            weights = None if loss_weights is None else loss_weights[:, 1:][supervised]
        head = self.get_output_embeddings()
        total = summed_loss(head, predicting, targets, weights)  # only where there is something to learn
        count = num_items_in_batch
        if count is None:
            count = len(targets) if weights is None else weights.sum()
        return CausalLMOutput(loss=total / count)

    def _hidden_of_questions(
        self, input_ids: Tensor, scene_index: Tensor, visual_tokens: Tensor, shared_prefix: dict
    ) -> Tensor:
        """Last hidden states [M, D] of the tokens behind the prefixes, in the order of `shared_prefix["tokens"]`."""
        length, tokens = shared_prefix["length"], shared_prefix["tokens"]
        layout = PrefixLayout(length, input_ids.shape[1] - length, scene_index, tokens, len(visual_tokens))
        own = input_ids[:, length:].flatten()[tokens]
        row = torch.cat([input_ids[0, :length].repeat(len(visual_tokens)), own])
        # One look-up, as of a batch that shares nothing: under ZeRO-3 each fetches weights from the other processes.
        embeddings = self.embed(row[None], visual_tokens.flatten(0, 1)[None])[0]
        position_ids = layout.position_ids()
        if takes_block_mask(embeddings.device):
            fill = -layout.num_tokens % BLOCK
            embeddings, position_ids = F.pad(embeddings, (0, 0, 0, fill)), F.pad(position_ids, (0, fill))
            layout = layout.with_block_mask(len(embeddings))
        if self.language_model.config._attn_implementation != ATTENTION:
            self.language_model.set_attn_implementation(ATTENTION)
        hidden = self.language_model.get_decoder()(
            inputs_embeds=embeddings[None],
            position_ids=position_ids[None],
            # Of four dimensions it is passed on as it is; for None a dense mask of the row would be made for nothing.
            attention_mask=embeddings.new_empty(1, 1, 0, 0) if layout.block_mask is None else layout.block_mask,
            prefix_layout=layout,
            use_cache=False,
        ).last_hidden_state[0]
        return hidden[len(visual_tokens) * length : layout.num_tokens]

    @torch.no_grad()
    def read_prompt(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        scene_index: Tensor | None = None,
        *,
        views: dict,
        share_prefix: bool = True,
    ) -> Prompt:
        """Prompts padded on the left, as `generate_texts` takes them.

        With share_prefix what all rows begin with, up to the last visual token, passes through the language model once
        for each set of views, where that is fewer times than there are rows.
        """
        visual_tokens, length = self._visual_tokens(views), 0
        if visual_tokens is None:
            return Prompt(self.embed(input_ids, None), attention_mask)
        if share_prefix and len(visual_tokens) < len(input_ids) and not self.why_not_shared:
            rows = [row[seen].tolist() for row, seen in zip(input_ids, attention_mask.bool(), strict=True)]
            length = prefix_length(rows, self.config.image_token_id)
        if not length:
            return Prompt(self.embed(input_ids, visual_tokens[scene_index]), attention_mask)
        prefix = torch.tensor(rows[0][:length], device=input_ids.device).expand(len(visual_tokens), -1)
        cache = rows_of(prefill(self.language_model, self.embed(prefix, visual_tokens)), scene_index)
        own = max(map(len, rows)) - length
        mask = attention_mask[:, -own:].clone()
        for row, ids in zip(mask, rows, strict=True):
            row[: own + length - len(ids)] = 0  # its part of the prefix
        embeddings = self.get_input_embeddings()(input_ids[:, -own:])
        return Prompt(embeddings, torch.cat([mask.new_ones(len(mask), length), mask], 1), cache)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, scene_index: Tensor | None = None, *, views: dict, **kwargs
    ) -> Tensor:
        """New token ids [B, <= max_new_tokens] after prompts padded on the left.

        The plain path beside `generate_texts`: nothing is shared. The prompt passes through the same `embed` as in
        training; the rest is `generate` of the language model, which takes kwargs (`max_new_tokens`,
        `cache_implementation="static"`, `logits_processor`, ...).
        """
        prompt = self.prompt_embeddings(input_ids, scene_index, views)
        return self.language_model.generate(inputs_embeds=prompt, attention_mask=attention_mask, **kwargs)

    # ------------------------------------------------------------------ files
    def stored_state(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights that a folder holds: all but those that `config.references` says where to find."""
        state = self.state_dict() if state is None else state
        references = self.config.references
        base = references.get("language_model")
        grown = base is not None and self.config.language_model["vocab_size"] != base["vocab_size"]
        embeddings = {id(m.weight) for m in (self.get_input_embeddings(), self.get_output_embeddings())}
        own = {name for name, p in self.named_parameters(remove_duplicate=False) if grown and id(p) in embeddings}

        def elsewhere(key: str) -> bool:
            part = key.split(".", 1)[0]
            return part in references and "lora_" not in key and key not in own

        return {key: value for key, value in state.items() if not elsewhere(key)}

    def save_pretrained(
        self, save_directory: str | Path, *, state_dict: Mapping[str, Tensor] | None = None, **_
    ) -> None:
        """Writes config.json and model.safetensors: trained parts, and parts that no file or hub id stands for.

        A frozen VGGT and a frozen language model that were loaded by name are written down as source and sha256.
        state_dict: the weights to write instead of this process's own (those gathered by DeepSpeed).
        Raises ValueError when a part that would be left to its source has been made trainable.
        """
        for part in self.config.references:
            trained = [n for n, p in getattr(self, part).named_parameters() if p.requires_grad and "lora_" not in n]
            if trained:
                raise ValueError(
                    f"{part}.{trained[0]} and others are trainable, but the {part} is saved by reference to its "
                    "pretrained weights; build the model with that part not frozen to train it"
                )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        stored, seen = {}, set()
        for key, value in self.stored_state(state_dict).items():
            if (place := (value.data_ptr(), value.shape)) not in seen:  # tied weights once
                seen.add(place)
                stored[key] = value.contiguous()
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    def load_trained(self, folder: str | Path) -> None:
        """Loads the model.safetensors that `save_pretrained` of a model of this config wrote, into this model.

        Raises ValueError that lists every missing, unexpected or misshapen key; nothing is loaded then.
        """
        file = Path(folder) / "model.safetensors"
        if not file.is_file():
            raise ValueError(f"{folder}: no model here, model.safetensors is missing")
        try:
            weights = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or cut off: {error}") from None
        state = self.stored_state()
        given = {state[key].data_ptr() for key in weights if key in state}  # a tied weight is there under one name
        problems = {
            "missing": [key for key, value in state.items() if key not in weights and value.data_ptr() not in given],
            "unexpected": [key for key in weights if key not in state],
            "misshapen": [
                f"{key} (expected {list(state[key].shape)}, got {list(value.shape)})"
                for key, value in weights.items()
                if key in state and value.shape != state[key].shape
            ],
        }
        if any(problems.values()):
            listed = "; ".join(f"{len(k)} {kind}: {', '.join(k[:_LISTED])}" for kind, k in problems.items() if k)
            raise ValueError(f"{folder}: weights do not fit the config. {listed}")
        self.load_state_dict(weights, strict=False)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, encoder: str | Path | None = None, language_model: str | Path | None = None
    ) -> RoomPlanVLM:
        """The model of a folder (or hub id) that `save_pretrained` wrote, in eval mode, on the CPU.

        encoder, language_model: where the frozen weights lie that the folder refers to, if not where they were.
        Raises ValueError when a file is missing, a key is missing, unexpected or misshapen, or a part that the folder
        refers to has other weights than those that the model was trained with.
        """
        folder = find_source(str(folder), "from_pretrained")
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: no model here, {name} is missing")
        config = RoomPlanConfig.from_pretrained(folder)
        settings = parse(ModelConfig, config.model, f"{folder / 'config.json'}: model")
        elsewhere = {"encoder": encoder, "language_model": language_model}
        parts: dict[str, nn.Module] = {}
        for part, given in elsewhere.items():
            reference = config.references.get(part)
            if reference is None:
                if given is not None:
                    raise ValueError(f"{folder} holds its {part} itself; leave out from_pretrained(..., {part}=...)")
                continue
            source, revision = (reference["source"], reference["revision"]) if given is None else (str(given), None)
            where = f"the {part} of {folder}"
            if part == "encoder":
                parts[part], path = load_encoder(source, vggt_settings(settings), where, revision)
            else:
                parts[part], path = load_language_model(source, getattr(torch, settings.frozen_dtype), where, revision)
                if config.language_model["vocab_size"] > reference["vocab_size"]:
                    parts[part].resize_token_embeddings(config.language_model["vocab_size"], mean_resizing=False)
            check_reference(part, reference, path, part)
        model = cls(config, **parts)
        model.load_trained(folder)
        return model.eval()


def summed_loss(head: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of head(hidden) [N, vocabulary] and targets [N], times weights [N] if given, summed, in float32.

    Of more logits than LOGITS_AT_ONCE, parts are made one after another and again for their gradients, so that no more
    are in memory; not where ZeRO-3 shards the head, which all processes must call equally often.
    """
    vocabulary = head.out_features

    def part(hidden: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        if weights is None:
            return F.cross_entropy(head(hidden).float(), targets, reduction="sum")
        return F.cross_entropy(head(hidden).float(), targets, reduction="none") @ weights

    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    if len(hidden) <= rows or hasattr(head.weight, "ds_id"):
        return part(hidden, targets, weights)
    splits = [hidden.split(rows), targets.split(rows)]
    splits.append([None] * len(splits[0]) if weights is None else weights.split(rows))
    return sum(checkpoint(part, *some, use_reentrant=False) for some in zip(*splits, strict=True))


def freeze(part: nn.Module, dtype: str) -> None:
    """No gradients for the part's weights, kept in `dtype`; buffers stay: rotary frequencies are no weights."""
    for parameter in part.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(getattr(torch, dtype))


def vggt_settings(settings: ModelConfig) -> VGGTConfig:
    """The encoder's config; its camera, depth and point heads are built only where the settings ask for them."""
    read = heads_of(settings)
    heads = {flag: flag.removeprefix("enable_") in read for flag in HEAD_FLAGS}
    config = parse(VGGTConfig, {**heads, **settings.vggt}, "model.vggt")
    absent = [name for name in read if name not in config.heads]
    if absent:
        source = settings.positions.source
        raise ValueError(f"model.positions.source {source} reads the heads {absent}, which model.vggt disables")
    return config


HEAD_FLAGS = tuple(f.name for f in dataclasses.fields(VGGTConfig) if f.name.startswith("enable_"))


def build_model(settings: ModelConfig, data: DataConfig, vocab_size: int, image_token_id: int) -> RoomPlanVLM:
    """The model that the settings describe, with the pretrained weights that they name.

    vocab_size: entries of the tokenizer; the language model has at least so many embedding rows.
    Raises ValueError for weights that are missing or do not fit.
    """
    shown = {name: getattr(data, name) for name in ("image_size", "max_length", "visual_first", "codec")}
    lm_settings, language_model, encoder, references = settings.language_model, None, None, {}
    if lm_settings.name:
        frozen = bool(lm_settings.freeze or lm_settings.lora)
        dtype = getattr(torch, settings.frozen_dtype) if frozen else torch.float32
        language_model, folder = load_language_model(lm_settings.name, dtype)
        rows = language_model.get_input_embeddings().num_embeddings
        if frozen:
            references["language_model"] = reference_to(lm_settings.name, folder) | {"vocab_size": rows}
        if vocab_size > rows:
            language_model.resize_token_embeddings(vocab_size)
        lm_config = language_model.config.to_dict()
    else:
        lm_config = qwen3_config(lm_settings, vocab_size)
    if settings.vggt_weights:
        encoder, path = load_encoder(settings.vggt_weights, vggt_settings(settings))
        if settings.freeze_vggt:
            references["encoder"] = reference_to(settings.vggt_weights, path)
        else:
            encoder.float()  # trained in float32, whatever the file holds
    config = RoomPlanConfig(to_dict(settings), lm_config, shown, image_token_id, references)
    return RoomPlanVLM(config, language_model, encoder)


def qwen3_config(settings: LanguageModelConfig, vocab_size: int) -> dict:
    """Plain fields of a Qwen3Config with at least `vocab_size` rows; ValueError for a key that it does not have."""
    known = Qwen3Config().to_dict()
    unknown = [key for key in settings.config if key not in known]
    if unknown:
        raise ValueError(f"model.language_model.config: unknown Qwen3Config fields {unknown}")
    rows = max(settings.config.get("vocab_size", 0), vocab_size)
    return {"model_type": "qwen3", **settings.config, "vocab_size": rows}


def parameter_table(model: RoomPlanVLM) -> list[tuple[str, int, int]]:
    """(part, parameters, trainable parameters) per part, and the total; tied weights count once."""
    rows = []
    for name, part in [*model.parts().items(), ("total", model)]:
        parameters = list(part.parameters())
        rows.append((name, sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)))
    return rows
