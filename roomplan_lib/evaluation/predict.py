"""Greedy answers of a model to held-out samples, and to the same samples with the views taken away or swapped."""

from __future__ import annotations

import os
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import yaml
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from roomplan_lib.actions import ActionList, PlaceAnchor, PlanRoom
from roomplan_lib.actions.decoding import GrammarEngine, confidences
from roomplan_lib.actions.grammar import ActionGrammar
from roomplan_lib.config import RunConfig, to_dict
from roomplan_lib.evaluation import CONTROLS, predictions_file
from roomplan_lib.evaluation.parts import (
    Part,
    PartFile,
    is_current,
    merge_parts,
    remove_parts,
    run_parts,
    split_rows,
)
from roomplan_lib.evaluation.rows import prediction_row
from roomplan_lib.files import file_hash
from roomplan_lib.model.generation import generate_texts
from roomplan_lib.model.pretrained import SHIPPED
from roomplan_lib.model.vlm import RoomPlanVLM
from roomplan_lib.samples import PER_VIEW, read_samples
from roomplan_lib.samples.targets import scene_action
from roomplan_lib.scenes import CATEGORIES
from roomplan_lib.training.answers import prompt_of
from roomplan_lib.training.checkpoint import list_checkpoints
from roomplan_lib.training.collator import Collator, Sample, load_samples
from roomplan_lib.training.processes import resolve_device
from roomplan_lib.training.run import load_model_folder, make_collator, make_model, make_tokenizer, open_run
from roomplan_lib.training.trainer import to_device


def predict_run(
    config: RunConfig,
    checkpoint: str | Path | None = None,
    *,
    num_scenes: int | None = None,
    max_new_tokens: int | None = None,
    constrained: str | None = None,
    device: str | None = None,
    part: Part | None = None,
    num_processes: int | None = None,
) -> Path:
    """Predictions of a run on its `data.eval_files`: predictions.jsonl and predictions_<control>.jsonl in one folder.

    checkpoint: a model folder or checkpoint; "base" = the model before training (random or pretrained base weights);
    None = the run's trained model, else its newest checkpoint. The other arguments override the config's.
    The folder is the run's own; with a checkpoint or other settings than the config's it is one below
    `predictions/` that is named after them, so that nothing passes for the run's result that is not.
    Files made by the same weights from the same samples and settings are reused, and a stopped call goes on behind the
    last row that it wrote.
    part: make the rows of this part alone and leave them for `merge_run`. num_processes: so many parts at a time, each
    in a process (and on a GPU) of its own, and merged; 0 = one per GPU; None = `distributed.num_processes`.
    Raises ValueError when there is nothing to load, the device is not there, or the tokens cannot hold one action;
    ChildProcessError when a process of several failed.
    """
    job = make_job(config, checkpoint, num_scenes, max_new_tokens, constrained, device)
    if part is None:
        gpus = visible_gpus() if job.device == "cuda" else []
        count = (config.distributed.num_processes if num_processes is None else num_processes) or len(gpus) or 1
        if count > 1:
            options = {
                "--checkpoint": checkpoint, "--num-scenes": num_scenes, "--max-new-tokens": max_new_tokens,
                "--constrained": constrained, "--device": job.device,
            }  # fmt: skip
            if missing := job.missing():
                settings = yaml.safe_dump(to_dict(config), sort_keys=False)
                run_parts(settings, options, list(missing.values()), len(job.samples), count, gpus)
        else:
            make_part(job, Part(1, 1))
        merge_job(job, count)
    elif num_processes is not None:
        raise ValueError("part and num_processes: give one; a part is made by one process")
    else:
        make_part(job, part)
    return job.folder


def merge_run(
    config: RunConfig,
    checkpoint: str | Path | None = None,
    *,
    num_parts: int,
    num_scenes: int | None = None,
    max_new_tokens: int | None = None,
    constrained: str | None = None,
) -> Path:
    """Puts the parts together that `predict_run` made one by one with the same arguments; returns the folder.

    Raises ValueError for parts that `merge_parts` refuses.
    """
    job = make_job(config, checkpoint, num_scenes, max_new_tokens, constrained, "cpu")
    merge_job(job, num_parts)
    return job.folder


@dataclass(frozen=True, eq=False)
class Job:
    """What the arguments of `predict_run` come to."""

    config: RunConfig
    folder: Path  # where the predictions go
    weights: Path | None  # folder with the model's weights; None = the model before training
    pool: list[Sample]  # all held-out samples, of which the shuffled control shows views
    samples: list[Sample]
    max_new_tokens: int
    constrained: str
    device: str
    fingerprint: dict  # what the manifest of the predictions says they were made from

    @property
    def paths(self) -> dict[str, Path]:
        """The predictions file of each control."""
        return {name: predictions_file(self.folder, name) for name in ("model", *self.config.prediction.controls)}

    def missing(self) -> dict[str, Path]:
        """Those of `paths` that are not there yet or were made from something else."""
        return {name: path for name, path in self.paths.items() if not is_current(path, self.fingerprint)}

    def split(self, num_parts: int) -> list[list[int]]:
        """The indices of the samples of each part."""
        return split_rows([sample.record["scene_id"] for sample in self.samples], num_parts)


def make_job(
    config: RunConfig,
    checkpoint: str | Path | None,
    num_scenes: int | None,
    max_new_tokens: int | None,
    constrained: str | None,
    device: str | None,
) -> Job:
    """The job of these arguments, see `predict_run`; the run's folder is opened where it is new."""
    settings = config.prediction
    folder = predictions_folder(config, checkpoint, num_scenes, max_new_tokens, constrained)
    num_scenes = settings.num_scenes if num_scenes is None else num_scenes
    max_new_tokens = max_new_tokens or settings.max_new_tokens
    constrained = constrained or settings.constrained
    device = resolve_device(device or config.training.device)
    if not config.data.eval_paths:
        raise ValueError("data.eval_files is empty; name the files of held-out samples to predict on")
    pool = load_samples(config.data.eval_paths)
    weights = find_weights(config, checkpoint)
    if not (config.run_dir / "run.yaml").is_file():
        open_run(config)
    source = weights / "model.safetensors" if weights else config.run_dir / "run.yaml"
    fingerprint = {
        "checkpoint": weights.name if weights else "base",
        "weights": file_hash(source),
        "samples": [[str(file), file_hash(file)] for file in config.data.eval_paths],
        "num_scenes": num_scenes,
        "max_new_tokens": max_new_tokens,
        "constrained": constrained,
    }
    if (features := config.data.features).folder:  # which are rounded to this
        fingerprint["features"] = features.dtype if features.pool == 1 else f"{features.dtype}, pool {features.pool}"
    samples = first_scenes(pool, num_scenes)
    return Job(config, folder, weights, pool, samples, max_new_tokens, constrained, device, fingerprint)


def make_part(job: Job, part: Part) -> None:
    """Makes the rows of a part that are not there yet, of every control, each batch written as it is done."""
    config, settings = job.config, job.config.prediction
    rows = job.split(part.count)[part.number - 1]
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(PartFile(path, part, rows, job.fingerprint))
            for name, path in job.missing().items()
        }
        num_todo = sum(len(file.todo) for file in files.values())
        if not num_todo:
            return
        if job.weights:
            model, tokenizer = load_model_folder(job.weights)
        else:
            tokenizer = make_tokenizer(config, load_samples(config.data.train_paths))
            model = make_model(config, tokenizer)
        model.to(job.device).eval()
        collator = make_collator(model, tokenizer, config.data if job.weights is None else None, config.data.features)
        constraint = None
        if job.constrained != "none":
            engine = GrammarEngine(tokenizer, model.language_model.config.vocab_size, job.constrained)
            records = (record for file in config.data.train_paths for record in read_samples(file))
            constraint = Constraint(engine, training_grammar(records, engine.grammar_kind, collator.data.codec))
            constraint.grammar.require(job.max_new_tokens)
        label = "predict" if part.count == 1 else f"predict {part}"
        total = len(rows) * len(files)
        with tqdm(total=total, initial=total - num_todo, desc=label, unit="sample", file=sys.stdout) as bar:
            for name, file in files.items():
                bar.set_postfix_str(name)
                made = predict_rows(
                    model,
                    tokenizer,
                    collator,
                    job.samples,
                    file.todo,
                    control=name,
                    pool=job.pool,
                    max_new_tokens=job.max_new_tokens,
                    batch_size=settings.batch_size,
                    constraint=constraint,
                )
                for batch in made:
                    file.append(batch)
                    bar.update(len(batch))


def merge_job(job: Job, num_parts: int) -> None:
    """Predictions files from their parts; those that are there from the same weights, samples and settings stay."""
    missing = job.missing()
    for name, path in job.paths.items():
        if name in missing:
            merge_parts(path, job.fingerprint, job.split(num_parts))
        else:
            remove_parts(path, num_parts)
            print(f"{path}: same weights, samples and settings, reused")


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs of this process, or their numbers."""
    count = torch.cuda.device_count()
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")[:count]


def predictions_folder(
    config: RunConfig,
    checkpoint: str | Path | None,
    num_scenes: int | None,
    max_new_tokens: int | None,
    constrained: str | None = None,
) -> Path:
    """Where `predict_run` puts its files for these arguments."""
    settings = config.prediction
    parts = [Path(checkpoint).name] if checkpoint else []
    parts += [f"scenes-{num_scenes}"] if num_scenes not in (None, settings.num_scenes) else []
    parts += [f"tokens-{max_new_tokens}"] if max_new_tokens not in (None, settings.max_new_tokens) else []
    parts += [f"constrained-{constrained}"] if constrained not in (None, settings.constrained) else []
    return config.run_dir / "predictions" / "_".join(parts) if parts else config.run_dir


@dataclass(frozen=True, eq=False)
class Constraint:
    """What actions are held to while they are written: a grammar, by an engine that knows the tokenizer.

    With a `ActionGrammar` every action ends within its tokens; with a grammar's text it may be cut off.
    """

    engine: GrammarEngine
    grammar: ActionGrammar | str


@dataclass
class Language:
    """What a set of actions uses of the language; `longest`: most actions in one list or plan."""

    verbs: set[str] = field(default_factory=set)
    items: set[str] = field(default_factory=set)  # verbs inside lists and plans
    categories: set[str] = field(default_factory=lambda: {*CATEGORIES})
    longest: int = 1


def used_language(records: Iterable[dict]) -> Language:
    """What the records' actions use; the 17 categories are always there."""
    used = Language()
    for record in records:
        if "action_json" in record:
            action = scene_action(record)
            inner = action.actions if isinstance(action, ActionList | PlanRoom) else ()
            used.verbs.add(action.verb)
            used.items |= {item.verb for item in inner}
            used.categories |= {item.category for item in inner or (action,) if isinstance(item, PlaceAnchor)}
            used.longest = max(used.longest, len(inner))
    return used


def training_grammar(records: Iterable[dict], kind: str, codec: str) -> ActionGrammar:
    """The language of the verbs and categories that a run's training actions use, in lists no longer than theirs.

    It is one for all questions: a grammar of its own for each kind of question would tell the answer of one that
    should be refused. Raises ValueError without any action.
    """
    used = used_language(records)
    if not used.verbs:
        raise ValueError("data.train_files hold no action, so there is nothing to constrain; predict without")
    verbs, categories, items = (tuple(sorted(part)) for part in (used.verbs, used.categories, used.items))
    return ActionGrammar(kind, verbs, None, categories, codec, used.longest, items or None)


def predict(
    model: RoomPlanVLM,
    tokenizer: PreTrainedTokenizerBase,
    collator: Collator,
    samples: list[Sample],
    *,
    progress: bool = True,
    **settings,
) -> list[dict]:
    """The rows of all samples, in order, as `predict_rows` makes them with these settings; progress: show a bar."""
    label = f"predict ({settings.get('control', 'model')})"
    rows = []
    with tqdm(total=len(samples), desc=label, unit="sample", disable=not progress, file=sys.stdout) as bar:
        for made in predict_rows(model, tokenizer, collator, samples, **settings):
            rows += made
            bar.update(len(made))
    return sorted(rows, key=lambda row: row["index"])


def predict_rows(
    model: RoomPlanVLM,
    tokenizer: PreTrainedTokenizerBase,
    collator: Collator,
    samples: list[Sample],
    indices: Sequence[int] | None = None,
    *,
    control: str = "model",
    pool: list[Sample] | None = None,
    max_new_tokens: int = 96,
    batch_size: int = 64,
    constraint: Constraint | None = None,
    share_prefix: bool = True,
) -> Iterator[list[dict]]:
    """Batches of rows, one row for each of `samples`, or for those of `indices`; in an order that saves work.

    A row: index (in `samples`), scene_id, task, question, prediction and reference (texts; actions in the reference
    frame), view_ids, and what the record says of situation, answers, source and kind of question. What it says does not
    depend on the rows that it is made with.
    Rows of action samples also have `action` (None and an `error` where the text is none) and `reference_action`, as
    `action_record` makes them, in the scene's frame. With a constraint they have `confidence` (one per action of the
    text), `unconstrained`, what the same model writes without it, and `finished`; of one that is not, which only a
    grammar's text allows, `error` says where it was cut off, and a printed line how many there are.
    control: "model" shows each sample its own views, "one_view" the first of them, "shuffled" another scene's (of
    `pool`, or of `samples`), "blind" none. share_prefix: what the questions of a scene begin with passes through the
    language model once; the texts are the same without.
    """
    if control not in CONTROLS:
        raise ValueError(f"control: expected one of {', '.join(CONTROLS)}, got {control!r}")
    # Questions of a scene share its encoding; actions go by kind first: a batch takes as long as its longest text.
    order = sorted(range(len(samples)) if indices is None else indices, key=lambda i: _place(samples[i]))
    shown = samples
    if control == "shuffled":
        shown = other_scenes(samples, pool or samples)
    elif control == "one_view":
        shown = [first_view(sample) for sample in samples]
    codec = collator.data.codec
    categories = used_language(sample.record for sample in samples).categories
    alone = GrammarEngine(tokenizer, model.language_model.config.vocab_size, "none")
    num_actions = num_cut = 0
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = collator(
            [samples[i] for i in part], generate=True, blind=control == "blind", views=[shown[i] for i in part]
        )
        prompt = prompt_of(model, to_device(batch, model.device), share_prefix)
        texts: dict[int, str] = {}
        extra: list[dict] = [{} for _ in part]
        held = [k for k, i in enumerate(part) if constraint and "instruction" in samples[i].record]
        if held:
            generation = generate_texts(
                model.language_model, prompt.of(held), constraint.engine, [constraint.grammar] * len(held),
                max_new_tokens=max_new_tokens,
            )  # fmt: skip
            texts = dict(zip(held, tokenizer.batch_decode(generation.ids, skip_special_tokens=True), strict=True))
            finished = generation.finished.tolist()
            for k, confidence, ended in zip(held, confidences(generation, tokenizer), finished, strict=True):
                extra[k] = {"confidence": confidence, "finished": ended}
                if not ended:
                    extra[k] |= {"action": None, "error": f"cut off after {max_new_tokens} tokens"}
            for k, is_same in zip(held, generation.is_greedy.tolist(), strict=True):
                if is_same:
                    extra[k]["unconstrained"] = texts[k]
            num_actions, num_cut = num_actions + len(held), num_cut + finished.count(False)
        free = [k for k, more in enumerate(extra) if "unconstrained" not in more]
        if free:
            generation = generate_texts(model.language_model, prompt.of(free), alone, max_new_tokens=max_new_tokens)
            for k, text in zip(free, tokenizer.batch_decode(generation.ids, skip_special_tokens=True), strict=True):
                if k in texts:
                    extra[k]["unconstrained"] = text
                else:
                    texts[k] = text
        yield [prediction_row(i, samples[i].record, texts[k], codec, categories) | extra[k] for k, i in enumerate(part)]
    if num_cut:
        print(
            f"predict ({control}): {num_cut} of {num_actions} actions were cut off after {max_new_tokens} tokens; "
            "allow more"
        )


def _place(sample: Sample) -> tuple[str, str, str]:
    task = sample.record["task"]
    return task if "instruction" in sample.record else "", str(sample.view_key), task


def other_scenes(samples: list[Sample], pool: list[Sample]) -> list[Sample]:
    """For each sample one of `pool` whose views show another scene: the next one in order of scene ids, round about.

    Raises ValueError when the pool holds no other scene.
    """
    by_scene = {sample.record["scene_id"]: sample for sample in pool}
    ids = sorted(by_scene)
    others = []
    for sample in samples:
        scene_id = sample.record["scene_id"]
        following = ids[bisect_right(ids, scene_id) % len(ids)]
        if following == scene_id:
            raise ValueError(f"the shuffled control needs a second scene beside {scene_id}")
        others.append(by_scene[following])
    return others


def first_view(sample: Sample) -> Sample:
    """The sample without its views but the first, whose camera fixes the reference frame."""
    record, geometry = sample.record, sample.record["geom_token"]
    cut = {key: record[key][:1] for key in PER_VIEW if record.get(key)}
    if geometry:
        cut["geom_token"] = {key: value[:1] for key, value in geometry.items()}
    return replace(sample, record=record | cut)


def first_scenes(samples: list[Sample], num_scenes: int) -> list[Sample]:
    """The samples of the first `num_scenes` scenes in order of appearance, all for 0."""
    ids = list(dict.fromkeys(sample.record["scene_id"] for sample in samples))
    kept = set(ids[:num_scenes] if num_scenes else ids)
    return [sample for sample in samples if sample.record["scene_id"] in kept]


def find_weights(config: RunConfig, checkpoint: str | Path | None) -> Path | None:
    """The folder with weights that `checkpoint` means for this run; None for "base"."""
    if checkpoint == "base":
        return None
    if checkpoint is not None:
        folder = Path(checkpoint)
        if not folder.exists():
            folder = SHIPPED.get(str(checkpoint), folder)
        if not (folder / "model.safetensors").is_file():
            raise ValueError(f"{checkpoint}: no model here, model.safetensors is missing")
        return folder
    trained = config.run_dir / "model"
    candidates = [trained] if trained.is_dir() else list_checkpoints(config.run_dir / "checkpoints")[-1:]
    if not candidates:
        raise ValueError(f"{config.run_dir} holds no trained model; train the run, or predict with checkpoint 'base'")
    return candidates[0]
