"""A few answers of a run in words: what was asked, what is true, what the model said."""

from __future__ import annotations

import numpy as np

from roomplan_lib.viz.answers import Answer, Answers
from roomplan_lib.viz.tables import markdown_table, text_cell

SHOWN = ("right", "wrong", "invalid")
MAX_LETTERS = 240  # of a text in a cell


def examples_table(answers: Answers, count: int = 4, run: int = 0) -> str:
    """A Markdown table of up to `count` right, wrong and invalid answers of a run, evenly spaced in its file.

    Anchors are in metres in the frame of the first view; beside them how far they lie from the truth.
    """
    rows, totals = [], []
    for outcome in SHOWN:
        places = answers.choose(run=run, outcome=outcome)
        totals.append(f"{len(places)} {outcome}")
        for k in np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)):
            answer = answers.answers[places[k]][run]
            error, iou = (answers.errors[name][places[k], run] for name in ("center_error_m", "iou_3d"))
            verdict = outcome if np.isnan(error) else f"{outcome}: {error:.2f} m off, IoU {iou:.2f}"
            asked = " ".join(filter(None, (str(answer.row.get(key) or "") for key in ("situation", "question"))))
            texts = (asked, answer.row["reference"], _said(answer))
            # Lines may break behind the commas of an action.
            rows.append([verdict, *(text_cell(text.replace(',"', ', "'), MAX_LETTERS) for text in texts)])
    return f"{', '.join(totals)}\n\n{markdown_table(['', 'asked', 'true', 'predicted'], rows)}"


def _said(answer: Answer) -> str:
    return f"{answer.row['prediction']} ({answer.reason})" if answer.reason else answer.row["prediction"]
