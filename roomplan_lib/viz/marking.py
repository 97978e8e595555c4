"""Two texts beside each other as HTML, with the words and numbers marked in which they differ.

The texts come from models and files of others: every character of theirs is escaped, none becomes markup.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from functools import lru_cache
from html import escape

from roomplan_lib.viz.style import PREDICTED_COLOR, TRUE_COLOR

TOKEN = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|\w+|\s+|[^\w\s]")
MOST_TOKENS = 3_000  # of each text; beyond, comparing takes longer than a reader waits, and the texts stand unmarked
MOST_SHOWN = 20_000  # characters of a text


@lru_cache(maxsize=64)
def marked_texts(true: str, predicted: str) -> tuple[str, str]:
    """HTML of the true and of the predicted text; what the other lacks is underlined, in blue and in orange.

    Words, numbers and signs are compared whole; white space alone is no difference. Of a text beyond MOST_SHOWN
    characters the rest is left out, and said to be.
    """
    rests = [_rest(text) for text in (true, predicted)]
    true, predicted = true[:MOST_SHOWN], predicted[:MOST_SHOWN]
    tokens = [TOKEN.findall(text) for text in (true, predicted)]
    differs = [[False] * len(part) for part in tokens]
    if max(map(len, tokens)) <= MOST_TOKENS:
        words = [[i for i, token in enumerate(part) if not token.isspace()] for part in tokens]
        compared = [[part[i] for i in places] for part, places in zip(tokens, words, strict=True)]
        differs = [[not token.isspace() for token in part] for part in tokens]
        for a, b, size in SequenceMatcher(None, *compared, autojunk=False).get_matching_blocks():
            for k in range(size):
                differs[0][words[0][a + k]] = differs[1][words[1][b + k]] = False
    colors = (TRUE_COLOR, PREDICTED_COLOR)
    pages = [_html(*part) for part in zip(tokens, differs, colors, strict=True)]
    return pages[0] + rests[0], pages[1] + rests[1]


def _html(tokens: list[str], differs: list[bool], color: str) -> str:
    """Neighbouring marked tokens share one element; a line ends after each item of a list of JSON objects."""
    start = f'<span style="color:{color};text-decoration:underline;font-weight:600">'
    parts, marking, space, before = [], False, "", ""
    for token, differing in zip(tokens, differs, strict=True):
        if token.isspace():
            space += token  # belongs to a mark only when the mark goes on behind it
            continue
        if marking and not differing:
            parts.append("</span>")
        parts.append(space)
        if differing and not marking:
            parts.append(start)
        parts.append(escape(token))
        marking, space = differing, ""
        if token == "," and before == "}":
            parts.append("</span><br>" if marking else "<br>")
            marking = False
        before = token
    return "".join(parts) + ("</span>" if marking else "") + space


def _rest(text: str) -> str:
    return f"<br><i>... {len(text) - MOST_SHOWN:,} more characters</i>" if len(text) > MOST_SHOWN else ""
