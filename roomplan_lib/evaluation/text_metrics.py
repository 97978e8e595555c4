"""Scores of answers and captions: EM, refined EM, BLEU, ROUGE-L, CIDEr and, where Java is there, METEOR.

The same name stands for different numbers in different papers, so every score is made under a protocol and carries its
id. The tokenizer gives the tokens of the Penn-Treebank tokenizer of Stanford CoreNLP 3.4.1, and BLEU, ROUGE-L and CIDEr
the numbers of pycocoevalcap 1.2, without Java.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import numpy as np

from roomplan_lib.evaluation.bootstrap import with_intervals

MAX_ORDER = 4  # longest n-gram of BLEU and CIDEr
ROUGE_BETA = 1.2  # weight of recall against precision
CIDER_SIGMA = 6.0  # tokens of difference in length that cost CIDEr-D 39 %


# Answers --------------------------------------------------------------------------------------------------------------

NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
# Misspelt words of the SQA3D and ScanQA annotations, and words for numbers (LEO, data_utils.clean_answer).
RESPELT = {
    "letf": "left", "let": "left", "tehre": "there", "rigth": "right", "rght": "right", "behine": "behind", "tv": "TV",
    "chai": "chair", "wasing": "washing", "waslked": "walked", "oclock": "o'clock", "none": "zero",
    "23": "twenty-three",
    **{str(number): word for number, word in enumerate(NUMBER_WORDS)},
}  # fmt: skip


def clean_answer(text: str) -> str:
    """An answer as LEO's evaluator cleans it; GPT4Scene, Video-3D-LLM and others do the same.

    Lower case, single blanks, only letters a-z, digits, comma, apostrophe, hyphen and colon; words respelt; no digit at
    the end of a word, no article before a word. A decimal point is lost: "1.5" becomes "15".
    """
    text = re.sub(r" {2,}", " ", text.lower().strip(" "))
    text = re.sub(r"[^a-z0-9,'\s\-:]+", "", text)
    text = re.sub(r"\bo' +clock\b", "o'clock", text)
    text = re.sub(r"\w+", lambda word: RESPELT.get(word.group(), word.group()), text)
    text = re.sub(r"\b([a-zA-Z]+)[0-9]\b", r"\1", text)
    for article in ("a", "an", "the"):
        text = re.sub(rf"\b{article}\b ([a-zA-Z]+)", r"\1", text)
    return re.sub(r"\bbackwards\b", "backward", text)


def normalise_answer(text: str) -> str:
    """An answer as `roomplan-1` compares it: words of `clean_answer`, but decimals and other alphabets stay.

    "1.5" stays what it is; articles go wherever they stand, and punctuation at the ends.
    """
    text = re.sub(r"[^\w,'\s\-:.]+|\.(?!\d)|_", " ", text.lower())
    text = re.sub(r"(?<![\w.])[\w.]+(?![\w.])", lambda word: RESPELT.get(word.group(), word.group()), text)
    text = re.sub(r"\b(?:a|an|the)\b(?![-'])", " ", text.replace("backwards", "backward"))
    return " ".join(text.split()).strip(" ,:-'")


def match_in_order(answer: str, references: Sequence[str]) -> tuple[bool, bool]:
    """(exact, refined) as LEO compares: the first reference that matches in either way decides.

    Refined: one text contains the other once white space is gone. An empty answer is contained in every text.
    """
    for reference in references:
        if answer == reference:
            return True, True
        if _contains(answer, reference):
            return False, True
    return False, False


def match_exact_first(answer: str, references: Sequence[str]) -> tuple[bool, bool]:
    """(exact, refined) as GPT4Scene compares: all references are tried for equality first; an empty answer is wrong."""
    if not answer:
        return False, False
    if answer in references:
        return True, True
    return False, any(_contains(answer, reference) for reference in references)


def match_words(answer: str, references: Sequence[str]) -> tuple[bool, bool]:
    """(exact, refined) of `roomplan-1`.

    Refined: the whole words of one text stand together, in order, in the other, and the answer has at most twice as
    many words as the reference. So neither "e" nor a list of all words is right. Empty texts match nothing.
    """
    references = [reference for reference in references if reference]
    if not answer or not references:
        return False, False
    if answer in references:
        return True, True
    said = f" {answer} "
    return False, any(
        len(answer.split()) <= 2 * len(reference.split()) and (f" {reference} " in said or said in f" {reference} ")
        for reference in references
    )


def match_in_order_guarded(answer: str, references: Sequence[str]) -> tuple[bool, bool]:
    """Exact as `match_in_order`, refined by the words of `match_words`; empty answers and references match nothing."""
    references = [reference for reference in references if reference.strip()]
    if not answer.strip() or not references:
        return False, False
    exact, _ = match_in_order(answer, references)
    words, *wanted = (" ".join(text.split()) for text in (answer, *references))
    return exact, exact or match_words(words, wanted)[1]


def match_raw_guarded(answer: str, references: Sequence[str]) -> tuple[bool, bool]:
    """(exact, refined): exact on the raw texts, refined by `match_words` on the normalised ones."""
    exact = answer in references and bool(answer)
    return exact, exact or match_words(normalise_answer(answer), [normalise_answer(r) for r in references])[1]


def match_raw_cleaned(answer: str, references: Sequence[str]) -> tuple[bool, bool]:
    """(exact, refined): exact on the raw texts, refined by `match_exact_first` on the cleaned ones."""
    exact = answer in references and bool(answer)
    return exact, exact or match_exact_first(clean_answer(answer), [clean_answer(r) for r in references])[1]


def _contains(a: str, b: str) -> bool:
    a, b = "".join(a.split()), "".join(b.split())
    return a in b or b in a


# Tokens ---------------------------------------------------------------------------------------------------------------

# What pycocoevalcap drops. Its list has "-LRB-" and the like in capitals only, so lower-case brackets stay tokens.
PUNCTUATION = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:-;", "--", "..."])
_NUMBER = r"(?:\d*(?:[.:,]\d+)+|\d+)"
_PART = rf"(?:[dDlLoO]['’][A-Za-z0-9])?(?:[A-Za-z0-9]+|{_NUMBER})"
_LETTER = r"[^\W\d_]"
# The longest match wins, the first of equals, as in the published lexer; a group marks the token where the rule looks
# beyond it. Bounded repeats keep the time linear on any text.
_TOKEN_RULES = tuple(
    re.compile(rule)
    for rule in (
        r"(?i:(can)not|(gon|wan)na|(got)ta|(lem|gim)me)(?!\w)|('[tT])(?i:is|was)",  # two words written as one
        rf"{_LETTER}\w*(?:[.!?]{_LETTER}\w*)*",  # words; also "brown.The" without a blank
        rf"({_LETTER}{{0,40}}(?![nN])[A-Za-z])[nN]['’`][tT](?!{_LETTER})|[nN]['’`][tT](?!{_LETTER})",  # do n't
        r"['’](?:[mdsMDS]|re|ve|ll|RE|VE|LL)(?![A-Za-z])",  # 's 're 'll
        r"['’](?:em|til|n['’]?|cause|\d\ds)(?![A-Za-z0-9])|(?i:ma'am|c'mon|o'clock)",
        rf"[-+]?{_NUMBER}",
        r"(?:\d{1,4}[- ])?\d{1,4}/\d{1,4}|\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",  # fractions, dates
        rf"{_PART}(?:-{_PART})*",  # t-shirt, 2-3, o'clock
        r"[A-Za-z0-9][A-Za-z0-9.,]{0,60}(?:-(?:[A-Za-z0-9]+|[A-Za-z](?:\.[A-Za-z])+\.))+",
        r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",  # left/right
        r"[A-Z]+(?:[+&][A-Z]+)+",  # AT&T
        r"[A-Za-z](?:\.[A-Za-z])*\.|[nN][oO]\.(?=\s*\d)|(?i:mr|mrs|ms|dr|st|etc|vs|inc|ltd|co|jr|sr|prof|ft)\.",
        r"([A-Za-z0-9][\w.'-]{0,60}\.)[,;:]",  # a full stop before a comma is taken for an abbreviation's
        r"(?:https?://|www\.)[^\s\"<>|()]*[^\s\"<>|().!?,;]|[\w+.-]{1,60}@(?:[\w-]{1,60}\.){1,8}[a-z]{2,4}",
        r"(?:[\w-]{1,60}\.){1,8}(?:com|net|org|edu)(?![A-Za-z])",
        r"</?[A-Za-z][\w .:-]{0,100}>|@\w{1,60}",  # <OBJ012>, @home
        r"[<>]?[:;=][-o']?[()DP\[\]]",  # :)
        r"\.{3,}|--+|[?!]+|``|''|\*+|_+",
        r"\S",
    )
)
_WRITTEN = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "…": "...", "–": "--",
    "—": "--", "“": "``", "”": "''", "‘": "`", "’": "'", "£": "#", "€": "$", "¢": "cents",
}  # fmt: skip


@lru_cache(maxsize=100_000)
def tokenize(text: str) -> str:
    """Lower-case Penn-Treebank tokens of a text without punctuation, joined by blanks, as pycocoevalcap scores them.

    Brackets become "-lrb-" and the like and stay. No text of SQA3D's test set comes out differently than from the
    published lexer, which knows more rare forms ("completely-T.V.").
    """
    tokens, place, quoted = [], 0, False
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        matches = filter(None, (rule.match(text, place) for rule in _TOKEN_RULES))
        match = max(matches, key=lambda match: match.end())
        token = next(filter(None, match.groups()), match.group())
        place += len(token)
        if token == '"':
            token, quoted = "''" if quoted else "``", not quoted
        elif token.startswith("..."):
            token = "..."
        elif token.startswith("--"):
            token = "--"
        elif not token[0].isalnum():
            token = "".join(_WRITTEN.get(char, char) for char in token)
        tokens.append(token)
    return " ".join(token for token in tokens if token not in PUNCTUATION).lower().replace("’", "'")


# Protocols ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """How answers are compared. `answer` and `reference` prepare the texts for `match`, which gives (exact, refined);
    `said` and `wanted` make the token strings of BLEU, ROUGE-L and CIDEr from the raw texts."""

    description: str
    answer: Callable[[str], str]
    reference: Callable[[str], str]
    match: Callable[[str, Sequence[str]], tuple[bool, bool]]
    said: Callable[[str], str]
    wanted: Callable[[str], str]


def _same(text: str) -> str:
    return text


def _without_final_stop(text: str) -> str:
    return clean_answer(text.removesuffix(".") if len(text) > 1 else text)


PROTOCOLS = {
    "roomplan-1": Protocol(
        "both sides normalised (decimals kept); em: equal; em_refined: the whole words of one stand in the other, the "
        "answer at most twice as long; empty is wrong; PTB tokens of the normalised texts",
        normalise_answer,
        normalise_answer,
        match_words,
        lambda text: tokenize(normalise_answer(text)),
        lambda text: tokenize(normalise_answer(text)),
    ),
    "scanqa-official": Protocol(
        "ScanQA's scorer: em on the raw strings, PTB tokens of the raw texts; it lacks em_refined: roomplan-1's",
        _same,
        _same,
        match_raw_guarded,
        tokenize,
        tokenize,
    ),
    "leo": Protocol(
        "LEO's em: both sides cleaned, the first reference that equals, contains or is contained in the answer "
        "decides, no tokenizer; em_refined by whole words, as roomplan-1 has it; an empty answer is wrong (as "
        "published: leo-parity)",
        clean_answer,
        clean_answer,
        match_in_order_guarded,
        clean_answer,
        clean_answer,
    ),
    "leo-parity": Protocol(
        "LEO's scorer to the digit: em_refined where one text contains the other, letters of a word and nothing too",
        clean_answer,
        clean_answer,
        match_in_order,
        clean_answer,
        clean_answer,
    ),
    "gpt4scene": Protocol(
        "GPT4Scene's scorer to the digit: cleaned answer against references as they are written (on ScanQA the cleaned "
        "ones are overwritten, so that 2 never equals 2), empty is wrong; PTB tokens",
        _without_final_stop,
        _same,
        match_exact_first,
        lambda text: tokenize(_without_final_stop(text)),
        tokenize,
    ),
    "gpt4scene-fixed": Protocol(
        "GPT4Scene's scorer with the references cleaned too; what it does on SQA3D",
        _without_final_stop,
        clean_answer,
        match_exact_first,
        lambda text: tokenize(_without_final_stop(text)),
        lambda text: tokenize(clean_answer(text)),
    ),
    "v3dllm": Protocol(
        "Video-3D-LLM's scorer: em on the raw strings, tokens between blanks, case and punctuation kept, full stops at "
        "the end of an answer dropped; em_refined on cleaned texts, its rule for SQA3D; empty is wrong",
        _same,
        _same,
        match_raw_cleaned,
        lambda text: text.rstrip("."),
        _same,
    ),
}


def score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    protocol: str,
    *,
    meteor: bool = True,
    scenes: Sequence[str] | None = None,
) -> dict:
    """em, em_refined, bleu_1 to bleu_4, rouge_l (fractions) and cider (as pycocoevalcap prints it) of all answers.

    predictions: [N] texts. references: [N] lists of at least one text. protocol: a key of PROTOCOLS, returned too.
    num_samples is N. scenes: [N] the scene of each, for `with_intervals`. meteor is there where Java and the package
    pycocoevalcap are and `meteor` is true; else `skipped` says why it is not. CIDEr weighs n-grams by how many samples
    of this very set have them, so a part of a set scores differently, and a single sample scores 0.
    Raises ValueError for an unknown protocol, no samples, lengths that differ, no reference or anything but text.
    """
    items = answer_items(predictions, references, protocol)
    result = set_scores(items, scenes) | {"protocol": protocol}
    return result | (meteor_entry(*token_strings(predictions, references, protocol)) if meteor else {})


def answer_items(
    predictions: Sequence[str], references: Sequence[Sequence[str]], protocol: str
) -> dict[str, np.ndarray]:
    """What `totals` sums, by sample: em, em_refined [N] and the keys of `caption_items`."""
    rules = _protocol(protocol)
    check_texts(predictions, references)
    matches = [
        rules.match(rules.answer(text), [rules.reference(reference) for reference in texts])
        for text, texts in zip(predictions, references, strict=True)
    ]
    exact, refined = np.array(matches, dtype=np.float64).T
    return {"em": exact, "em_refined": refined, **caption_items(*token_strings(predictions, references, protocol))}


def token_strings(
    predictions: Sequence[str], references: Sequence[Sequence[str]], protocol: str
) -> tuple[list[str], list[list[str]]]:
    """The tokens of answers and references, joined by blanks, that BLEU, ROUGE-L, CIDEr and METEOR compare."""
    rules = _protocol(protocol)
    return [rules.said(text) for text in predictions], [[rules.wanted(text) for text in texts] for texts in references]


def caption_items(said: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """rouge_l [N], cider [N] and bleu [N, 10] (tokens said, tokens of the closest reference, n-grams said and right).

    said: token strings joined by blanks; wanted: those of each sample's references. Empty ones score 0.
    """
    grams = [_ngrams(text) for text in said]
    reference_grams = [[_ngrams(text) for text in texts] for texts in wanted]
    rouge = np.array([_rouge_l(text, texts) for text, texts in zip(said, wanted, strict=True)])
    bleu = np.array([_bleu_counts(*pair) for pair in zip(grams, reference_grams, strict=True)], dtype=np.float64)
    return {"rouge_l": rouge, "cider": _cider_d(grams, reference_grams), "bleu": bleu}


def totals(items: dict[str, np.ndarray], weights: np.ndarray | None = None) -> dict[str, float]:
    """Scores of a whole set from its samples' items: means, and BLEU of the summed counts.

    weights: [N] how often each sample counts (a bootstrap draw), once for None. CIDEr keeps the n-gram weights of the
    whole set.
    """
    weights = np.ones(len(next(iter(items.values())))) if weights is None else weights
    result = {name: float(weights @ values / weights.sum()) for name, values in items.items() if name != "bleu"}
    if "bleu" in items:
        result |= {f"bleu_{n}": value for n, value in enumerate(_bleu(weights @ items["bleu"]), 1)}
    return result


def set_scores(items: dict[str, np.ndarray], scenes: Sequence[str] | None = None) -> dict:
    """`totals` of the items with num_samples; where the scene of each sample is given, `with_intervals` of them."""
    if scenes is None:
        return totals(items) | {"num_samples": len(next(iter(items.values())))}
    return with_intervals(lambda weights: totals(items, weights), scenes)


METEOR_NEEDS = "needs `java` on the PATH and the package pycocoevalcap"


def meteor_entry(said: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict:
    """{"meteor": METEOR 1.5 of token strings by pycocoevalcap}, or {"skipped": {"meteor": what is missing or failed}}.

    Java takes some 20 s to load its tables.
    """
    if shutil.which("java") is None or find_spec("pycocoevalcap") is None:
        return {"skipped": {"meteor": METEOR_NEEDS}}
    from pycocoevalcap.meteor.meteor import Meteor

    def one_line(text: str) -> str:  # the program reads lines, and a line too many leaves both sides waiting
        return " ".join(text.split())

    scorer = Meteor()
    try:
        value, _ = scorer.compute_score(
            {i: list(map(one_line, texts)) for i, texts in enumerate(wanted)},
            {i: [one_line(text)] for i, text in enumerate(said)},
        )
    except (ValueError, OSError) as error:  # Java ended, or wrote something else than numbers
        return {"skipped": {"meteor": f"the Java program failed: {error!s:.200}"}}
    finally:  # its destructor waits for the lock that an error leaves taken
        scorer.meteor_p.kill()
        if scorer.lock.locked():
            scorer.lock.release()
    return {"meteor": float(value)}


def check_texts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise ValueError unless there is at least one prediction, all are text, and each has references that are text."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} lists of references; give one for each")
    if len(predictions) == 0:
        raise ValueError("no predictions; there is nothing to score")
    for i, (text, texts) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(text, str):
            raise ValueError(f"prediction {i}: expected text, got {type(text).__name__}")
        if isinstance(texts, str) or not texts or not all(isinstance(reference, str) for reference in texts):
            raise ValueError(f"references {i}: expected a list of at least one text, got {texts!r:.80}")


def _protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {name!r}")
    return PROTOCOLS[name]


# Formulas -------------------------------------------------------------------------------------------------------------


def _ngrams(text: str) -> Counter:
    """How often each run of 1 to MAX_ORDER tokens occurs."""
    tokens = text.split()
    return Counter(tuple(tokens[i : i + n]) for n in range(1, MAX_ORDER + 1) for i in range(len(tokens) - n + 1))


def _by_order(grams: Counter) -> list[int]:
    counts = [0] * MAX_ORDER
    for gram, count in grams.items():
        counts[len(gram) - 1] += count
    return counts


def _bleu_counts(said: Counter, wanted: list[Counter]) -> list[int]:
    said_by_order = _by_order(said)
    lengths = [_by_order(reference)[0] for reference in wanted]
    closest = min(lengths, key=lambda length: (abs(length - said_by_order[0]), length))
    best: Counter = Counter()
    for reference in wanted:
        best |= reference  # the largest count of any reference
    return [said_by_order[0], closest, *said_by_order, *_by_order(said & best)]


def _bleu(counts: np.ndarray) -> list[float]:
    """BLEU-1 to BLEU-4 of summed `_bleu_counts` (Papineni et al. 2002), smoothed by pycocoevalcap's two constants."""
    said, closest = counts[:2] + [1e-15, 0]
    ratio = said / (closest + 1e-9)
    right = (counts[2 + MAX_ORDER :] + 1e-15) / (counts[2 : 2 + MAX_ORDER] + 1e-9)
    brevity = 1.0 if ratio >= 1 else np.exp(1 - 1 / ratio)
    return [float(brevity * np.prod(right[:n]) ** (1 / n)) for n in range(1, MAX_ORDER + 1)]


def _rouge_l(said: str, wanted: Sequence[str]) -> float:
    """F of the longest common subsequence, best precision and best recall over the references (Lin 2004)."""
    words = said.split(" ")  # two blanks hold an empty word, as in pycocoevalcap
    if not said.strip():
        return 0.0
    shared = [(_common_length(words, text.split(" ")), len(text.split(" "))) for text in wanted]
    precision, recall = max(s for s, _ in shared) / len(words), max(s / length for s, length in shared)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _common_length(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def _cider_d(said: list[Counter], wanted: list[list[Counter]]) -> np.ndarray:
    """[N] CIDEr-D (Vedantam et al. 2015): tf-idf vectors of n-grams, clipped cosine, a penalty for another length.

    As pycocoevalcap has it, the length is the number of bigrams and the document frequencies come from `wanted`.
    """
    documents = Counter(gram for references in wanted for gram in set().union(*references))
    log_number = np.log(len(wanted))
    idf = {gram: log_number - np.log(count) for gram, count in documents.items()}

    def vector(grams: Counter) -> tuple[list[dict], np.ndarray, int]:
        parts: list[dict] = [{} for _ in range(MAX_ORDER)]
        for gram, count in grams.items():
            parts[len(gram) - 1][gram] = count * idf.get(gram, log_number)
        return parts, np.array([sum(v * v for v in part.values()) for part in parts]) ** 0.5, _by_order(grams)[1]

    scores = np.zeros(len(said))
    for i, (grams, references) in enumerate(zip(said, wanted, strict=True)):
        parts, norm, length = vector(grams)
        for other_parts, other_norm, other_length in map(vector, references):
            shared = [
                sum(min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b)
                for a, b in zip(parts, other_parts, strict=True)
            ]
            norms = norm * other_norm
            cosine = np.divide(shared, norms, out=np.zeros(MAX_ORDER), where=norms > 0).mean()
            scores[i] += 10 * cosine * np.exp(-((length - other_length) ** 2) / (2 * CIDER_SIGMA**2)) / len(references)
    return scores
