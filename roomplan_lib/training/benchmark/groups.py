"""Training steps on questions about views: the reference code's loop, another trainer on the same cached features, and
ours with and without cache and groups, all of one size and with one loss.

The reference loop is written from what the public vggt-qwen3 code does: every question decodes its own pictures to
float32 in the training process, encodes its own views in every step and keeps the outputs of all layers, passes the
resampler without gradients, trains the whole language model, and has logits at every position. What is changed so that
it runs and does the same work, CORRECTED, makes it faster rather than slower, but for the resampler's longer context.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from roomplan_lib.config import FeaturesConfig, RunConfig
from roomplan_lib.model.vlm import RoomPlanVLM
from roomplan_lib.training.benchmark.measure import Clock, make_trainer, miniature
from roomplan_lib.training.benchmark.peers import Marks, hf_arguments
from roomplan_lib.training.cache import fill_cache
from roomplan_lib.training.collator import Collator, Sample, ViewSet
from roomplan_lib.training.metrics import Metrics
from roomplan_lib.training.trainer import RoomPlanTrainer, count_supervised

QUESTIONS = 32  # of a step, and view sets of a step without groups
PER_VIEW_SET = 16  # questions that are kept of each, so that groups are whole
REFERENCE = "reference loop"
CORRECTED = (
    "the reference code's loop in our words, corrected so far: the resampler sees all tokens of all views, each visual "
    "token replaces its own placeholder, pictures keep their shape; the modules are ours, with fused attention"
)
# By variant of ours: where the encoder's outputs come from, and questions of a group.
OURS = {
    "live, ungrouped": ("live", 1),
    "live, groups of 8": ("live", 8),
    "cached, ungrouped": ("cached", 1),
    "cached, groups of 8": ("cached", 8),
    "cached, groups of 16": ("cached", 16),
    "in memory, groups of 8": ("memory", 8),
}


def measure_groups(config: RunConfig, job: dict) -> dict:
    """Steps of QUESTIONS questions by one variant. `first_loss` is that of the same questions before any step, each
    variant's own way, in batches as it trains on."""
    variant = job["variant"]
    source, group_size = OURS.get(variant, ("live" if variant == REFERENCE else "memory", 1))
    config = sized(config, "" if source == "live" else job["features"], group_size, lora=variant != REFERENCE)
    trainer = own_views_trainer(config)
    clock = Clock(config.training.log_every_steps)
    if variant == REFERENCE:
        reference_loop(trainer, clock)
    elif variant not in OURS:
        train_hf_cached(trainer, clock)
    else:
        train_ours(trainer, clock, in_memory=source == "memory")
    return clock.result(QUESTIONS) | ({"note": CORRECTED} if variant == REFERENCE else {})


def sized(config: RunConfig, features: str = "", group_size: int = 1, lora: bool = True) -> RunConfig:
    """The miniature with steps of QUESTIONS questions and a frozen encoder; features: the cache it reads, filled, and
    read again whenever views are shown, as of a data set that is larger than memory."""
    config = miniature(config)
    language_model = config.model.language_model
    data = dataclasses.replace(config.data, train_files=config.data.train_files[-1:], train_shares=())
    if features:
        data = dataclasses.replace(data, features=FeaturesConfig(folder=features), cache_scenes=0)
    config = dataclasses.replace(
        config,
        data=data,
        model=dataclasses.replace(
            config.model,
            freeze_vggt=True,
            positions=dataclasses.replace(config.model.positions, method="base"),
            language_model=language_model if lora else dataclasses.replace(language_model, lora=None),
        ),
        training=dataclasses.replace(config.training, micro_batch_size=QUESTIONS, group_size=group_size),
    )
    if features:
        fill_cache(config)
    return config


class OwnViewsTrainer(RoomPlanTrainer):
    """Ungrouped questions of a step show different views, as they do when there are many more scenes than here."""

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        loader.batch_sampler.mixed = QUESTIONS // self.config.training.group_size
        return loader


def own_views_trainer(config: RunConfig) -> OwnViewsTrainer:
    """On the first PER_VIEW_SET questions of each view set. RuntimeError where one has fewer, or too few are there."""
    trainer = make_trainer(config, OwnViewsTrainer)
    kept: dict[tuple, list[Sample]] = {}
    for sample in trainer.train_samples:
        kept.setdefault(sample.view_key, []).append(sample)
    fewest = min(map(len, kept.values()))
    if fewest < PER_VIEW_SET or len(kept) < QUESTIONS:
        raise RuntimeError(f"{len(kept)} view sets with {fewest} questions or more; make more rooms")
    trainer.train_samples = [sample for part in kept.values() for sample in part[:PER_VIEW_SET]]
    return trainer


def probe(trainer: RoomPlanTrainer) -> list[list[Sample]]:
    """The first QUESTIONS questions of the file, in batches that share views as far as the trainer's groups do."""
    samples, size = trainer.train_samples[:QUESTIONS], trainer.config.training.group_size
    by_views = [samples[:PER_VIEW_SET], samples[PER_VIEW_SET:]]
    return [[s for part in by_views for s in part[i : i + size]] for i in range(0, PER_VIEW_SET, size)]


@torch.no_grad()
def probe_loss(trainer: RoomPlanTrainer, loss_of) -> float:
    """Mean over the supervised tokens of the probe; loss_of: the mean over those of one batch."""
    batches = [trainer.collator(samples) for samples in probe(trainer)]
    counts = [count_supervised(batch) for batch in batches]
    losses = [float(loss_of(batch)) for batch in batches]
    return float(np.average(losses, weights=counts))


# ------------------------------------------------------------------ ours
def train_ours(trainer: RoomPlanTrainer, clock: Clock, in_memory: bool) -> None:
    """The trainer with its log; in_memory: what it shows was read before, and is never looked for in files."""
    config = trainer.config
    if in_memory:
        trainer.collator = known_views(trainer)
    clock.first_loss = probe_loss(trainer, lambda batch: trainer.model(**batch).loss)
    config.run_dir.mkdir(parents=True)
    metrics = Metrics(
        config.run_dir, 0, config.training.max_steps, lambda entry: clock.mark(entry["step"], entry["loss"])
    )
    trainer.on_entry = metrics
    trainer.train()
    metrics.close()


class KnownViews(Collator):
    """A collator whose view sets are all in memory, in no file's mapping."""

    known: dict[tuple, ViewSet]

    def view_set(self, sample: Sample, *_) -> ViewSet:
        return self.known[sample.view_key]


def known_views(trainer: RoomPlanTrainer) -> KnownViews:
    """The trainer's collator with copies of all that its cache holds of the training samples."""
    collator = same_collator(KnownViews, trainer.collator)
    collator.known = {}
    for sample in trainer.train_samples:
        if sample.view_key not in collator.known:
            views = trainer.collator.view_set(sample)
            tensors = {name: v.clone() if isinstance(v, Tensor) else v for name, v in views.features.items()}
            collator.known[sample.view_key] = dataclasses.replace(views, features=tensors)
    return collator


def same_collator(kind: type[Collator], other: Collator, **data) -> Collator:
    """A collator of another kind that shows the same, without 3D positions; data: settings that differ."""
    settings = dataclasses.replace(other.data, **data)
    return kind(
        other.tokenizer, settings, num_visual_tokens=other.num_visual_tokens, share_prefix=other.share_prefix,
        patch_size=other.patch_size, needs_positions=None, features=other.features,
    )  # fmt: skip


# ------------------------------------------------------------------ the reference code's way
class FloatPictures(Collator):
    """Pictures of every sample decoded when a batch is made, to float32 in [0, 1]; nothing is kept."""

    def load_pictures(self, sample: Sample) -> tuple[Tensor, tuple[int, int]]:
        views = []
        for path, turn in zip(sample.paths(), sample.turns(), strict=True):
            picture = Image.open(path).convert("RGB").rotate(90 * turn, expand=True)
            scale = self.data.image_size / max(picture.size)
            sides = (round(side * scale / self.patch_size) * self.patch_size for side in picture.size)
            resized = picture.resize(tuple(sides), Image.Resampling.BICUBIC)
            views.append(torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255).permute(2, 0, 1))
        return torch.stack(views), picture.size


def reference_loop(trainer: RoomPlanTrainer, clock: Clock) -> None:
    """See the module's docstring; AdamW on the language model and the geometry tokens."""
    settings, model = trainer.config.training, trainer.model.train()
    trainer.collator = same_collator(FloatPictures, trainer.collator, cache_scenes=0)
    trained = [p for part in (model.language_model, model.geometry_encoder) for p in part.parameters()]
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, (0.9, 0.95), weight_decay=settings.weight_decay)
    clock.first_loss = probe_loss(trainer, lambda batch: reference_loss(model, batch))
    for step, batch in enumerate(trainer.get_train_dataloader(), 1):
        loss = reference_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        clock.mark(step, loss.item())


def reference_loss(model: RoomPlanVLM, batch: dict) -> Tensor:
    """The language model's own loss, each row with views that are encoded for it alone."""
    rows = batch["scene_index"].tolist()
    aggregator = model.encoder.aggregator
    with torch.no_grad():
        pixels = torch.stack([batch["pixel_values"][i] for i in rows])
        layers, patch_token_start = aggregator(pixels, tap_layers=range(aggregator.config.depth))
        grid = tuple(side // aggregator.config.patch_size for side in pixels.shape[-2:])
        latents = model.resampler(layers[-1:], patch_token_start, grid, None, None)
    records = torch.stack([batch["geometry_records"][i] for i in rows])
    geometry = model.geometry_encoder(records, batch["has_geometry"][rows], None)
    embeddings = model.embed(batch["input_ids"], torch.cat([latents, geometry], 1))
    return model.language_model(
        inputs_embeds=embeddings, attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss


# ------------------------------------------------------------------ another trainer on the same features
class FeatureRows(nn.Module):
    """Resampler, geometry tokens and language model on rows of cached features, as transformers' Trainer takes them."""

    def __init__(self, model: RoomPlanVLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, num_items_in_batch=None, **views):
        inputs = {"inputs_embeds": self.model.embed(input_ids, self.model.encode_views(**views))}
        inputs |= {"attention_mask": attention_mask, "labels": labels, "num_items_in_batch": num_items_in_batch}
        return self.model.language_model(**inputs)


def train_hf_cached(trainer: RoomPlanTrainer, clock: Clock) -> None:
    """transformers' Trainer and PEFT's LoRA, with the language model's own loss; the features are in memory, and each
    question is a row of its own."""
    collator = known_views(trainer)
    collator.share_prefix = False
    trainer.collator = lambda samples: rows_of_batch(collator(samples))
    model = FeatureRows(trainer.model).train()
    clock.first_loss = probe_loss(trainer, lambda batch: model(**batch).loss)
    arguments = TrainingArguments(**hf_arguments(trainer.config), remove_unused_columns=False)
    Trainer(model, arguments, trainer.collator, trainer.train_samples, callbacks=[Marks(clock)]).train()


def rows_of_batch(batch: dict) -> dict:
    """The batch with one view set for each of its rows."""
    rows = batch.pop("scene_index").tolist()
    del batch["to_store"], batch["pixel_values"]
    batch["has_geometry"] = batch["has_geometry"][rows]
    for name in ("geometry_records", "features"):
        batch[name] = [batch[name][i] for i in rows]
    return batch | {"pixel_values": [None] * len(rows)}
