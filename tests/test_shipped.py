"""The model that comes with the package: whole, small, and it looks at rooms that it has never seen."""

import numpy as np
import pytest
import torch

from roomplan_lib.actions import parse_action
from roomplan_lib.actions.spec import PlaceAnchor
from roomplan_lib.evaluation.predict import find_weights
from roomplan_lib.model.pretrained import SHIPPED
from roomplan_lib.model.vlm import RoomPlanVLM
from roomplan_lib.samples.targets import response_text
from roomplan_lib.training.answers import greedy_answers
from roomplan_lib.training.collator import load_samples
from roomplan_lib.training.run import load_model_folder, make_collator

NAME = "roomplan-tiny"


@pytest.fixture(scope="module")
def shipped():
    return load_model_folder(NAME)


def center_errors(shipped, samples, shown) -> np.ndarray:
    """Metres for each sample, answered with the views of `shown`; what is no anchor counts as 9."""
    model, tokenizer = shipped
    batch = make_collator(model, tokenizer)(samples, generate=True, views=shown)
    texts = greedy_answers(model, tokenizer, batch, max_new_tokens=60, bf16=False)
    found = []
    for sample, text in zip(samples, texts, strict=True):
        true = parse_action(response_text(sample.record), None)
        said = parse_action(text, None, "rows")
        is_anchor = isinstance(said, PlaceAnchor)
        found.append(np.linalg.norm(np.subtract(said.center, true.center)) if is_anchor else 9.0)
    return np.array(found)


def test_it_needs_nothing_beside_it(shipped, tiny_config):
    model, _ = shipped
    folder = SHIPPED[NAME]
    assert not model.config.references and find_weights(tiny_config, NAME) == folder
    assert sum(file.stat().st_size for file in folder.iterdir()) < 25e6
    assert {"run.yaml", "metrics.jsonl", "scores.json"} <= {file.name for file in folder.iterdir()}
    assert RoomPlanVLM.from_pretrained(NAME).num_visual_tokens == model.num_visual_tokens
    assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())


def test_it_looks(shipped, sample_files):
    """Rooms of another seed, six of their views: right places with their own views, a guess with another room's."""
    samples = [s for split in ("train", "val") for s in load_samples([sample_files[f"anchors_{split}"]])]
    other = {s.record["scene_id"]: s for s in samples}
    scenes = list(other)
    shown = [other[scenes[scenes.index(s.record["scene_id"]) - 1]] for s in samples]
    torch.manual_seed(0)
    own, swapped = (center_errors(shipped, samples, views) for views in (samples, shown))
    assert len(own) > 40
    assert np.median(own) < 1.0 < 1.4 < np.median(swapped)
