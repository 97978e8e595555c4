"""Greedy answers of a model to held-out samples, and to the same samples with the views taken away or swapped."""

from __future__ import annotations

import json
import sys
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from roomplan_lib.actions import ActionError, ActionList, PlaceAnchor, PlanRoom, action_record, parse_action
from roomplan_lib.actions.decoding import GrammarEngine, confidences, generate_constrained
from roomplan_lib.actions.grammar import ActionGrammar
from roomplan_lib.config import RunConfig
from roomplan_lib.evaluation import CONTROLS, manifest_file, predictions_file, read_manifest
from roomplan_lib.files import file_hash, write_whole
from roomplan_lib.geometry import invert_pose
from roomplan_lib.model.vlm import RoomPlanVLM
from roomplan_lib.samples import read_samples
from roomplan_lib.samples.targets import question_text, response_text, sample_world_to_reference, scene_action
from roomplan_lib.scenes import CATEGORIES
from roomplan_lib.training.collator import Collator, Sample, load_samples
from roomplan_lib.training.run import load_model_folder, make_collator, make_model, make_tokenizer, open_run
from roomplan_lib.training.trainer import list_checkpoints, resolve_device

BATCH_KEYS = ("input_ids", "attention_mask", "scene_index")
KEPT_KEYS = (
    "situation", "answers", "question_id", "source", "split", "question_type", "eval_type", "protocol", "object_ids",
)  # fmt: skip


def predict_run(
    config: RunConfig,
    checkpoint: str | Path | None = None,
    *,
    num_scenes: int | None = None,
    max_new_tokens: int | None = None,
    constrained: str | None = None,
    device: str | None = None,
) -> Path:
    """Predictions of a run on its `data.eval_files`: predictions.jsonl and predictions_<control>.jsonl in one folder.

    checkpoint: a model folder or checkpoint; "base" = the model before training (random or pretrained base weights);
    None = the run's trained model, else its newest checkpoint. The other arguments override the config's.
    The folder is the run's own; with a checkpoint or other settings than the config's it is one below
    `predictions/` that is named after them, so that nothing passes for the run's result that is not.
    Files made by the same weights from the same samples and settings are reused.
    Raises ValueError when there is nothing to load, the device is not there, or the tokens cannot hold one action.
    """
    settings = config.prediction
    folder = predictions_folder(config, checkpoint, num_scenes, max_new_tokens, constrained)
    num_scenes = settings.num_scenes if num_scenes is None else num_scenes
    max_new_tokens = max_new_tokens or settings.max_new_tokens
    constrained = constrained or settings.constrained
    device = resolve_device(device or config.training.device)
    if not config.data.eval_paths:
        raise ValueError("data.eval_files is empty; name the files of held-out samples to predict on")
    pool = load_samples(config.data.eval_paths)
    samples = first_scenes(pool, num_scenes)
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
    paths = {name: predictions_file(folder, name) for name in ("model", *settings.controls)}
    made = {name: path for name, path in paths.items() if not is_current(path, fingerprint)}
    if made:
        if weights:
            model, tokenizer = load_model_folder(weights)
        else:
            tokenizer = make_tokenizer(config, load_samples(config.data.train_paths))
            model = make_model(config, tokenizer)
        model.to(device).eval()
        collator = make_collator(model, tokenizer, config.data if weights is None else None)
        constraint = None
        if constrained != "none":
            engine = GrammarEngine(tokenizer, model.language_model.config.vocab_size, constrained)
            records = (record for file in config.data.train_paths for record in read_samples(file))
            constraint = Constraint(engine, training_grammar(records, engine.grammar_kind, collator.data.codec))
            constraint.grammar.require(max_new_tokens)
    for name, path in made.items():
        rows = predict(
            model,
            tokenizer,
            collator,
            samples,
            control=name,
            pool=pool,
            max_new_tokens=max_new_tokens,
            batch_size=settings.batch_size,
            constraint=constraint,
        )
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
        manifest = {"sha256": file_hash(path), "made_from": fingerprint}
        write_whole(manifest_file(path), json.dumps(manifest, indent=1) + "\n")
    for name in paths.keys() - made.keys():
        print(f"{paths[name]}: same weights, samples and settings, reused")
    return folder


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


def is_current(path: Path, fingerprint: dict) -> bool:
    """Whether the predictions at `path` are whole and were made from this."""
    manifest = read_manifest(path)
    return manifest is not None and manifest == {"sha256": file_hash(path), "made_from": fingerprint}


def predict(
    model: RoomPlanVLM,
    tokenizer: PreTrainedTokenizerBase,
    collator: Collator,
    samples: list[Sample],
    *,
    control: str = "model",
    pool: list[Sample] | None = None,
    max_new_tokens: int = 96,
    batch_size: int = 64,
    constraint: Constraint | None = None,
    progress: bool = True,
) -> list[dict]:
    """One row per sample, in order: index, scene_id, task, question, prediction and reference (texts; actions in the
    reference frame), view_ids, and what the record says of situation, answers, source and kind of question.

    Rows of action samples also have `action` (None and an `error` where the text is none) and `reference_action`, as
    `action_record` makes them, in the scene's frame. With a constraint they have `confidence` (one per action of the
    text), `unconstrained`, what the same model writes without it, and `finished`; of one that is not, which only a
    grammar's text allows, `error` says where it was cut off, and a printed line how many there are.
    control: "model" shows each sample its own views, "shuffled" another scene's (of `pool`, or of `samples`), "blind"
    none.
    """
    if control not in CONTROLS:
        raise ValueError(f"control: expected one of {', '.join(CONTROLS)}, got {control!r}")
    # Questions of a scene share its encoding; actions go by kind first: a batch takes as long as its longest text.
    order = sorted(range(len(samples)), key=lambda i: _place(samples[i]))
    shown = other_scenes(samples, pool or samples) if control == "shuffled" else samples
    texts: dict[int, str] = {}
    extra: dict[int, dict] = {}
    label = f"predict ({control})"
    with tqdm(total=len(samples), desc=label, unit="sample", disable=not progress, file=sys.stdout) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = collator(
                [samples[i] for i in part],
                generate=True,
                blind=control == "blind",
                views=[shown[i] for i in part],
            )
            batch = to_device(batch, model.device)
            inputs = {key: batch.pop(key) for key in BATCH_KEYS if key in batch}
            prompt = model.prompt_embeddings(inputs["input_ids"], inputs.get("scene_index"), batch)
            mask = inputs["attention_mask"]
            ids = model.language_model.generate(
                inputs_embeds=prompt,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts |= zip(part, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True)
            held = [k for k, i in enumerate(part) if constraint and "instruction" in samples[i].record]
            if held:
                grammars = [constraint.grammar] * len(held)
                generation = generate_constrained(
                    model.language_model, prompt[held], mask[held], constraint.engine, grammars,
                    max_new_tokens=max_new_tokens,
                )  # fmt: skip
                written = tokenizer.batch_decode(generation.ids, skip_special_tokens=True)
                finished = generation.finished.tolist()
                found = confidences(generation, tokenizer)
                for k, text, confidence, ended in zip(held, written, found, finished, strict=True):
                    of_row = {"unconstrained": texts[part[k]], "confidence": confidence, "finished": ended}
                    cut = {"action": None, "error": f"cut off after {max_new_tokens} tokens"}
                    extra[part[k]] = of_row if ended else of_row | cut
                    texts[part[k]] = text
            bar.update(len(part))
    if num_cut := sum(not row["finished"] for row in extra.values()):
        print(f"{label}: {num_cut} of {len(extra)} actions were cut off after {max_new_tokens} tokens; allow more")
    codec = collator.data.codec
    categories = used_language(sample.record for sample in samples).categories
    return [_row(i, sample.record, texts[i], codec, categories) | extra.get(i, {}) for i, sample in enumerate(samples)]


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
        if not (Path(checkpoint) / "model.safetensors").is_file():
            raise ValueError(f"{checkpoint}: no model here, model.safetensors is missing")
        return Path(checkpoint)
    trained = config.run_dir / "model"
    candidates = [trained] if trained.is_dir() else list_checkpoints(config.run_dir / "checkpoints")[-1:]
    if not candidates:
        raise ValueError(f"{config.run_dir} holds no trained model; train the run, or predict with checkpoint 'base'")
    return candidates[0]


def to_device(value, device: torch.device):
    """A batch with its tensors, also those in lists, on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(v, device) for key, v in value.items()}
    return [to_device(v, device) for v in value] if isinstance(value, list) else value


def _row(index: int, record: dict, text: str, codec: str, categories: set[str]) -> dict:
    row = {
        "index": index,
        "scene_id": record["scene_id"],
        "task": record["task"],
        "question": question_text(record, codec=codec),
        "prediction": text,
        "reference": "" if record.get("answers") == [] else response_text(record, codec=codec),
    }
    row |= {key: record[key] for key in KEPT_KEYS if record.get(key) is not None}
    if "action_json" in record:
        reference_to_world = invert_pose(sample_world_to_reference(record))
        action = parse_action(text, categories, codec)
        if isinstance(action, ActionError):
            row |= {"action": None, "error": action.reason}
        else:
            action = action.transformed(reference_to_world).bound(record["scene_id"])
            row["action"] = action_record(action)
        row["reference_action"] = action_record(scene_action(record))
        row |= {} if codec == "m2" else {"codec": codec}
    return row | {"view_ids": record.get("view_ids")}
