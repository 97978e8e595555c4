"""A run: its folder, its model, its training from the newest whole checkpoint to the end."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils import logging as transformers_logging

from roomplan_lib.config import DataConfig, FeaturesConfig, PretrainConfig, RunConfig, load_run_config, parse, to_dict
from roomplan_lib.files import file_hash, write_whole
from roomplan_lib.model.describe import describe
from roomplan_lib.model.vlm import RoomPlanVLM, build_model
from roomplan_lib.samples.targets import response_text
from roomplan_lib.training.checkpoint import clear_partial, copy_model_folder, list_checkpoints, newest_checkpoint
from roomplan_lib.training.collator import Collator, Sample, load_samples
from roomplan_lib.training.metrics import Metrics
from roomplan_lib.training.plan import settle_checkpointing
from roomplan_lib.training.processes import Processes, is_lost, join_processes
from roomplan_lib.training.prompt import prompt_text
from roomplan_lib.training.residence import hold_features
from roomplan_lib.training.sampler import MIXED
from roomplan_lib.training.start import load_start, start_folder
from roomplan_lib.training.status import Preempted, RunLock, StopRequest, write_status
from roomplan_lib.training.tokenizer import IMAGE_TOKEN, load_tokenizer, train_tokenizer
from roomplan_lib.training.trainer import RoomPlanTrainer, parameter_groups, schedule_factor

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "open3d", "open3d-cpu", "deepspeed")
# Settings that change nothing learned, so a run that goes on may have others.
FREE = (
    "runs_dir", "distributed.", "data.num_workers", "data.cache_scenes", "data.features.folder",
    "data.features.on_missing", "data.features.resident", "training.log_every_steps", "training.eval_every_steps",
    "training.num_eval_samples", "training.num_generated_samples", "training.save_every_steps",
    "training.keep_checkpoints", "training.explosion_factor", "training.device",
    "training.compile", "training.gradient_checkpointing",
)  # fmt: skip
# Settings of which only the product, the global batch size, is learned from.
CUT = ("training.micro_batch_size", "training.gradient_accumulation_steps")


def train(config: RunConfig, on_log: Callable[[dict], None] | None = None) -> Path:
    """Trains the run that `config` describes and returns its folder; a finished run is left as it is.

    This process is the whole run, or one of those that WORLD_SIZE counts. The folder gets run.yaml (every field),
    run.json (versions, devices), metrics.jsonl, status.json, checkpoints/ and, at the end, model/ (weights, config,
    tokenizer). A run that was stopped goes on from its newest undamaged checkpoint.

    on_log: called with each entry of metrics.jsonl, in the first process. Raises Preempted once a requested stop (the
    run's STOP file, USR1, TERM or INT) is saved; ValueError when another process trains the run, when the folder holds
    one of other settings, for wrong input, and for a loss that is no number or explodes; OSError when a checkpoint
    cannot be written.
    """
    with join_processes(config) as processes, _quiet(not processes.is_first):
        lock = RunLock(config.run_dir)
        processes.on_first(lock.take)
        try:
            return _train_alone(config, processes, on_log)
        finally:
            lock.release()


def _train_alone(config: RunConfig, processes: Processes, on_log: Callable[[dict], None] | None) -> Path:
    """`train` by the one group of processes that works in the run's folder."""
    run_dir = config.run_dir
    accumulation = processes.on_first(open_run, config, processes.world_size)
    if processes.on_first((run_dir / "model" / "config.json").is_file):
        print(f"{run_dir}: training is complete, reusing {run_dir / 'model'}")
        return run_dir
    step = 0

    def tell(status: str, error: str = "", asked_by: str = "") -> None:
        if processes.is_first:
            write_status(run_dir, status, step, config.training.max_steps, processes.world_size, error, asked_by)

    def saved(at: int) -> None:
        nonlocal step
        step = at
        tell("running")

    stop = StopRequest(run_dir / "STOP" if processes.is_first else None)
    try:
        with stop.listening():
            step = _train(config, processes, accumulation, stop, saved, on_log)
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        if is_lost(error):
            reason = "another process of this run is gone or hangs; its own output says why"
        with contextlib.suppress(OSError):  # a full disk must not hide the reason
            tell("failed", reason)
        if is_lost(error):
            raise RuntimeError(f"{reason} ({str(error).splitlines()[0]})") from error
        raise
    finished = step == config.training.max_steps
    asked_by = "" if finished else stop.asked_by()
    if processes.is_first:
        stop.stop_file.unlink(missing_ok=True)
    tell("finished" if finished else "preempted", asked_by=asked_by)
    if not finished:
        raise Preempted(
            f"{run_dir}: stopped on request after step {step} of {config.training.max_steps}; a whole checkpoint "
            "is written, and the next start goes on from it"
        )
    return run_dir


def _train(
    config: RunConfig,
    processes: Processes,
    accumulation: int,
    stop: StopRequest,
    saved: Callable[[int], None],
    on_log: Callable[[dict], None] | None,
) -> int:
    """Trains until the end or a stop; the step that it has come to."""
    run_dir = config.run_dir
    transformers_logging.set_verbosity_error()
    train_samples = load_samples(config.data.train_paths)
    eval_samples = load_samples(config.data.eval_paths) if config.data.eval_paths else []
    refuse_hidden_answers([*train_samples, *eval_samples])
    if config.data.augmentation.scale_jitter and any("question" in sample.record for sample in train_samples):
        raise ValueError(
            "data.augmentation.scale_jitter changes all metres, but answers in words would keep theirs; "
            "set it to 0 or train on action records alone"
        )
    found = processes.on_first(_find_checkpoint, run_dir / "checkpoints")
    checkpoint, state = found or (None, {"step": 0})
    saved(state["step"])
    tokenizer = load_tokenizer(checkpoint) if checkpoint else make_tokenizer(config, train_samples)
    config = settle_checkpointing(config, train_samples, tokenizer, processes)
    # The feature cache is found by the weights of the frozen encoder, so they are there before the checkpoint's.
    model = make_model(config, tokenizer, start=checkpoint is None or bool(config.data.features.folder))
    collator = make_collator(model, tokenizer, config.data)
    shown, views = collator(train_samples[:16]), collator.view_set(train_samples[0])
    num_tokens, num_supervised = (int(t.sum(1).max()) for t in (shown["attention_mask"], shown["labels"] >= 0))
    describe(
        model, views.num_views, views.image_size, num_tokens - model.num_visual_tokens, num_supervised,
        features=config.data.features, num_view_sets=len({s.view_key for s in (*train_samples, *eval_samples)}),
    )  # fmt: skip
    count = config.training.num_eval_samples
    metrics = Metrics(run_dir, state["step"], config.training.max_steps, on_log) if processes.is_first else None
    trainer = RoomPlanTrainer(
        config,
        model,
        collator,
        train_samples,
        eval_samples[:: max(1, len(eval_samples) // count)][:count] if count else [],
        processes=processes,
        accumulation=accumulation,
        on_entry=metrics,
        on_save=saved,
        wants_stop=stop,
    )
    _report(config, trainer, state["step"])
    if config.data.features.resident != "none":
        hold_features(config, model, collator, [*train_samples, *trainer.eval_samples], processes)
    torch.manual_seed(config.seed + processes.rank)
    try:
        trainer.train(checkpoint, state)
    finally:
        if metrics:
            metrics.close()
    if trainer.step == config.training.max_steps:
        processes.on_first(_finish, config)
    return trainer.step


def _find_checkpoint(folder: Path) -> tuple[Path, dict] | None:
    clear_partial(folder)
    for name in ("run.yaml", "run.json", "status.json", "metrics.jsonl"):
        for left in folder.parent.glob(f".{name}.*.tmp"):  # of a start that was killed while it wrote
            left.unlink(missing_ok=True)
    found = newest_checkpoint(folder)
    if found:
        print(f"{folder.parent}: going on from {found[0].name}")
    return found


def _finish(config: RunConfig) -> None:
    """The run's model folder, from its last checkpoint; run.json gets the hash of its weights."""
    folder = config.run_dir / "model"
    copy_model_folder(list_checkpoints(config.run_dir / "checkpoints")[-1], folder)
    file = config.run_dir / "run.json"
    surroundings = json.loads(file.read_text()) | {"model_sha256": file_hash(folder / "model.safetensors")}
    write_whole(file, json.dumps(surroundings, indent=1) + "\n")


def _report(config: RunConfig, trainer: RoomPlanTrainer, step: int) -> None:
    """Prints who trains what, how it is shared, and at which rates."""
    settings, processes = config.training, trainer.processes
    alone = processes.world_size == 1 and config.distributed.strategy == "ddp"
    sharing = "one process" if alone else f"{config.distributed.strategy}, WORLD_SIZE {processes.world_size}"
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in trained}))
    frozen = sorted({str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters() if not p.requires_grad})
    partitioned = any(hasattr(p, "ds_id") for p in trainer.model.parameters())
    print(
        f"{sharing} on {processes.device}; trainable: {sum(p.numel() for p in trained):,} in {dtypes}"
        f"{', computed in bfloat16' if settings.bf16 else ''}; frozen: {', '.join(frozen) or 'nothing'}; "
        f"zero.Init {'on' if partitioned else 'off'}"
    )
    print(
        f"global batch {trainer.global_batch_size} samples = micro-batch {settings.micro_batch_size} x accumulation "
        f"{trainer.accumulation} x {processes.world_size} process{'es' * (processes.world_size > 1)}; "
        f"steps {step + 1} to {settings.max_steps}"
    )
    if settings.group_size > 1:
        num_groups, reason = trainer.global_batch_size // settings.group_size, trainer.model.why_not_shared
        if not config.data.visual_first:
            reason = "data.visual_first is false"
        print(
            f"{num_groups} groups a step of up to {settings.group_size} samples of one view set, which share its "
            f"encoding{' and their prefix' if not reason else f', not their prefix: {reason}'}"
        )
        if num_groups < MIXED:
            print(
                f"  few for what a step teaches: at least {MIXED} scenes are advised; raise gradient_accumulation_steps"
            )
    warmup = int(settings.warmup_ratio * settings.max_steps)
    shown = sorted({1, warmup + 1, (warmup + settings.max_steps) // 2 + 1, settings.max_steps})
    groups = parameter_groups(trainer.model, config)
    for rate in sorted({group["lr"] for group in groups}):
        names = ", ".join(dict.fromkeys(group["name"] for group in groups if group["lr"] == rate))
        values = ", ".join(f"{rate * schedule_factor(k - 1, settings):.2e} in step {k}" for k in shown)
        print(f"learning rate of {names}: {values} ({settings.lr_scheduler})")


@contextlib.contextmanager
def _quiet(quiet: bool):
    """Nothing on stdout where `quiet`: one process speaks for all."""
    if not quiet:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def refuse_hidden_answers(samples: list[Sample]) -> None:
    """Raise ValueError for a sample of a test set whose answers are hidden: there is nothing to compute a loss from."""
    for sample in samples:
        if sample.record.get("answers") == []:
            name = sample.record.get("question_id") or sample.record["scene_id"]
            raise ValueError(
                f"{name}: its answers are hidden; such a file can be predicted on, not trained or evaluated on"
            )


def open_run(config: RunConfig, world_size: int = 0) -> int:
    """Makes or checks the run's folder with run.yaml and run.json; the micro-batches of each process per step.

    world_size: processes that train it; 0 = it is not trained now. A run that goes on keeps its global batch size:
    with another number of processes the accumulation is adapted. A start that failed before it saved anything binds
    nobody. Raises ValueError when the folder belongs to other settings or samples, or no accumulation gives that size.
    """
    run_dir, training = config.run_dir, config.training
    settings_file, record_file = run_dir / "run.yaml", run_dir / "run.json"
    begun = list_checkpoints(run_dir / "checkpoints") or [*run_dir.glob("model"), *run_dir.glob("predictions*")]
    old_record = json.loads(record_file.read_text()) if begun and record_file.is_file() else {}
    accumulation = training.gradient_accumulation_steps
    batch_size = old_record.get("global_batch_size", training.micro_batch_size * accumulation * world_size)
    if begun and settings_file.is_file():
        _check_settings(config, load_run_config(settings_file), batch_size, world_size)
    if world_size and training.micro_batch_size * accumulation * world_size != batch_size:
        accumulation, rest = divmod(batch_size, training.micro_batch_size * world_size)
        if rest:
            raise ValueError(
                f"{run_dir} was begun with {batch_size} samples per step, which {world_size} processes with "
                f"training.micro_batch_size {training.micro_batch_size} cannot make; start as many processes as "
                f"before, or choose a micro_batch_size of which {world_size} times is a divisor of {batch_size}"
            )
        print(
            f"{run_dir}: begun with {batch_size} samples per step, so each of {world_size} processes now accumulates "
            f"{accumulation} micro-batches"
        )
    missing = [file for file in (*config.data.train_paths, *config.data.eval_paths) if not file.is_file()]
    if missing or not config.data.train_paths:
        what = f"{missing[0]} is missing" if missing else "data.train_files is empty"
        raise ValueError(f"{what}; make samples with `roomplan prepare` and name them in data.train_files")
    samples = {str(file): file_hash(file) for file in (*config.data.train_paths, *config.data.eval_paths)}
    if old_record and (old_samples := old_record["samples"]) != samples:
        changed = [file for file in samples if old_samples.get(file) != samples[file]]
        raise ValueError(f"{run_dir} was made from other samples than {changed}; choose another run_name or delete it")
    record = surroundings() | {"samples": samples}
    record |= {"global_batch_size": batch_size} if batch_size else {}
    if training.start_from and world_size:  # whoever only predicts, with weights from elsewhere, need not have it
        record["started_from"] = old_record.get("started_from") or _started_from(config)
    if "model_sha256" in old_record:
        record["model_sha256"] = old_record["model_sha256"]
    write_whole(settings_file, yaml.safe_dump(to_dict(config), sort_keys=False))
    write_whole(record_file, json.dumps(record, indent=1) + "\n")
    return accumulation


def _check_settings(config: RunConfig, old_config: RunConfig, batch_size: int, world_size: int) -> None:
    """ValueError for settings that a run of `old_config` cannot go on with; prints those that may differ and do.

    Settings that its run.yaml lacks, being older than they, have their defaults in `old_config`.
    """
    changed = changed_settings(old_config, config)
    cut = [key for key in changed if key in CUT]
    refused = [key for key in changed if not key.startswith(FREE) and key not in cut]
    new_size = config.training.micro_batch_size * config.training.gradient_accumulation_steps * world_size
    sizes = ""
    if cut and new_size != batch_size:
        refused += cut
        sizes = f"; global batch size {batch_size} -> {new_size}"
    if refused:
        listed = "; ".join(f"{key}: {changed[key][0]!r} -> {changed[key][1]!r}" for key in refused)
        raise ValueError(
            f"{config.run_dir} holds a run of other settings ({listed}{sizes}); choose another run_name or delete it"
        )
    for key, (old, new) in changed.items():
        print(f"{config.run_dir}: {key} is now {new!r}, was {old!r}; nothing learned depends on it")


def _started_from(config: RunConfig) -> dict:
    folder = start_folder(config)
    return {"folder": str(folder), "sha256": file_hash(folder / "model.safetensors")}


def make_tokenizer(config: RunConfig, train_samples: list[Sample]) -> PreTrainedTokenizerBase:
    """The run's tokenizer: that of the run it starts from, one by name, or a BPE trained on the prompts and responses
    of its training samples."""
    settings = config.model.language_model
    if config.training.start_from:
        return load_tokenizer(start_folder(config))
    if settings.tokenizer or settings.name:
        return load_tokenizer(settings.tokenizer or settings.name)
    blank = train_tokenizer([], vocab_size=0)
    records = [sample.record for sample in train_samples]
    data = config.data
    texts = (
        prompt_text(r, blank, 1, data.visual_first, codec=data.codec) + response_text(r, codec=data.codec)
        for r in records
    )
    return train_tokenizer(texts, settings.vocab_size)


def make_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase, start: bool = True) -> RoomPlanVLM:
    """The run's model before training: random weights, the pretrained ones that the settings name, and what the run
    of `training.start_from` has learned, unless `start` is off because a checkpoint is loaded over it."""
    set_seed(config.seed)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model = build_model(config.model, config.data, len(tokenizer), image_token_id)
    if start and config.training.start_from:
        load_start(model, start_folder(config))
    return model


def make_collator(
    model: RoomPlanVLM,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig | None = None,
    features: FeaturesConfig | None = None,
) -> Collator:
    """The collator that shows `model` what it was trained on; `data` overrides what its folder remembers.

    features: the cache that it reads, `data`'s own when left out.
    """
    data = data or parse(DataConfig, model.config.data, "data")
    return Collator(
        tokenizer,
        data,
        num_visual_tokens=model.num_visual_tokens,
        share_prefix=not model.why_not_shared,
        patch_size=model.encoder.config.patch_size,
        needs_positions=model.needs_positions,
        features=model.open_features(features or data.features, data.image_size),
    )


def load_model_folder(folder: Path) -> tuple[RoomPlanVLM, PreTrainedTokenizerBase]:
    """The model (eval mode) and tokenizer of a model folder or a checkpoint."""
    return RoomPlanVLM.from_pretrained(folder), load_tokenizer(folder)


def changed_settings(
    old: RunConfig | PretrainConfig, new: RunConfig | PretrainConfig
) -> dict[str, tuple[object, object]]:
    """The settings that differ, by key: the old value and the new one."""
    before, after = _flat(to_dict(old)), _flat(to_dict(new))
    pairs = {key: (before.get(key), after.get(key)) for key in {**before, **after}}
    return {key: (first, second) for key, (first, second) in pairs.items() if first != second}


def _flat(data: dict, prefix: str = "") -> dict:
    items = {}
    for key, value in (data or {}).items():
        items |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return items


def surroundings() -> dict:
    """What a run.json tells of the machine: git commit, versions, devices."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    return {
        "git_commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        "versions": versions,
        "devices": devices,
        "cpu_count": os.cpu_count(),
    }
