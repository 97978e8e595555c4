"""The grammars hold what the writer writes, all of it and nothing else."""

import json
import re

import jsonschema
import numpy as np
import pytest
from typer.testing import CliRunner

from roomplan_lib.actions import (
    CODECS,
    ActionError,
    ActionList,
    Measure,
    Move,
    NoAction,
    PlaceAnchor,
    PlaceDoor,
    PlaceOpening,
    PlaceWall,
    PlaceWindow,
    PlanRoom,
    Remove,
    canonical,
    format_action,
    parse_action,
)
from roomplan_lib.actions.docs import language_docs
from roomplan_lib.actions.grammar import ALL_VERBS, grammar, json_schema, number_regex, seed_schema
from roomplan_lib.actions.spec import AMOUNT, COMPONENT, CONFIDENCE, COORDINATE, DEGREES, INDEX, LENGTH, VERBS
from roomplan_lib.cli import app
from roomplan_lib.scenes import CATEGORIES

ROOMS = 10_000
EDGES = {"coordinate": (-19.99, -0.01, 0.0, -0.0, 0.01, 19.99), "length": (0.01, 19.99), "amount": (0.0, 999.99)}


class Random:
    """Random actions whose numbers have two decimals and lie at the bounds more often than chance would have it."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def number(self, name):
        if self.rng.random() < 0.2:
            return float(self.rng.choice(EDGES[name]))
        low, high = min(EDGES[name]), max(EDGES[name])
        return float(round(self.rng.uniform(low, high), 2))

    def point(self, count=3):
        return tuple(self.number("coordinate") for _ in range(count))

    def index(self):
        return int(self.rng.choice([0, 9, 10, 99, self.rng.integers(100)]))

    def yaw(self):
        return int(self.rng.choice([0, 9, 90, 99, 100, 179, self.rng.integers(180)]))

    def anchor(self, rows=False):
        angle = np.radians(yaw := self.yaw()) if rows else self.rng.uniform(0, np.pi)
        normal = (float(round(np.cos(angle), 2)), float(round(np.sin(angle), 2)), 0.0)
        yaw = yaw if rows else int(round(np.degrees(angle))) if self.rng.random() < 0.5 else None
        if not rows and self.rng.random() < 0.1:
            normal = (0.0, 0.0, float(self.rng.choice([-1.0, 1.0])))
        category = str(self.rng.choice(["", *CATEGORIES]))
        confidence = float(self.rng.choice([0.0, 1.0, 0.57])) if self.rng.random() < 0.3 else None
        extent = tuple(self.number("length") for _ in range(3))
        return PlaceAnchor(category, self.point(), normal, extent, yaw=yaw, confidence=confidence)

    def in_wall(self):
        kind = self.rng.choice([PlaceDoor, PlaceWindow, PlaceOpening])
        return kind(self.index(), self.point(), self.number("length"), self.number("length"))

    def wall(self):
        return PlaceWall(self.point(2), self.point(2), self.number("coordinate"), self.number("length"))

    def single(self, rows=False):
        pick = self.rng.integers(8)
        if pick < 2:
            return self.anchor(rows)
        if pick == 2:
            return self.wall()
        if pick == 3:
            return self.in_wall()
        if pick == 4:
            return Move(self.index(), self.point(), self.yaw() if self.rng.random() < 0.5 else None)
        if pick == 5:
            return Remove(self.index())
        if pick == 6:
            quantity = str(self.rng.choice(["distance", "width", "height", "depth", "area"]))
            return Measure(
                quantity, self.index(), self.index() if quantity == "distance" else None, self.number("amount")
            )
        return NoAction(str(self.rng.choice(["not_visible", "not_present", "ambiguous"])))

    def room(self, rows=False):
        anchors = [self.anchor(rows) for _ in range(self.rng.integers(8))]
        walls = [self.wall() for _ in range(self.rng.integers(6))]
        return PlanRoom((*walls, *(self.in_wall() for _ in range(self.rng.integers(4))), *anchors))

    def any(self, rows=False):
        pick = self.rng.random()
        if pick < 0.2:
            return ActionList(tuple(self.single(rows) for _ in range(self.rng.integers(5))))
        return self.single(rows) if pick < 0.5 else self.room(rows)


class Acceptor:
    """llguidance over single bytes: whether a grammar holds a text, from first to last character."""

    def __init__(self, lark):
        llguidance = pytest.importorskip("llguidance")
        self.tokenizer = llguidance.LLTokenizer("byte")
        self.matcher = llguidance.LLMatcher(self.tokenizer, llguidance.LLMatcher.grammar_from_lark(lark))
        assert not self.matcher.get_error()

    def __call__(self, text):
        matcher = self.matcher.deep_copy()
        tokens = self.tokenizer.tokenize_bytes(text.encode())
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def compiled(gbnf):
    """A GBNF grammar without recursion as one regular expression, by the definition of GBNF alone."""
    rules = dict(line.split(" ::= ", 1) for line in gbnf.splitlines())
    token = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|\{\d+,\d+\}|[a-z_]+|[()|?]')

    def expand(body):
        parts = []
        for part in token.findall(body):
            if part.startswith('"'):
                parts.append(f"(?:{re.escape(json.loads(part))})")
            elif part in rules:
                parts.append(f"(?:{expand(rules[part])})")
            else:
                parts.append("(?:" if part == "(" else part)
        return "".join(parts)

    return re.compile(expand(rules["root"]))


def test_writer_and_reader_of_every_room_are_inverse_and_the_grammar_has_its_text():
    """llguidance for some hundreds, the same grammar as GBNF and a regular expression for all."""
    draw = Random(0)
    accepts, pattern = Acceptor(grammar("lark")), compiled(grammar("gbnf"))
    kinds = set()
    for number in range(ROOMS):
        action = canonical(draw.any()).bound(f"room{number}")
        text = format_action(action)
        assert parse_action(text) == action and "-0.00" not in text
        unbound = format_action(action.bound(""))
        assert parse_action(unbound).bound(f"room{number}") == action
        assert pattern.fullmatch(unbound), unbound
        assert number >= 600 or accepts(unbound), unbound
        kinds.add(action.verb)
    assert kinds == set(ALL_VERBS)


@pytest.mark.slow
def test_llguidance_accepts_every_room():
    draw, accepts = Random(0), Acceptor(grammar("lark", scene="47333462"))
    for _ in range(ROOMS):
        text = format_action(canonical(draw.any()).bound("47333462"))
        assert accepts(text), text


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_is_read_back_and_has_its_grammars(codec):
    draw, rows = Random(1), codec == "rows"
    accepts, pattern = Acceptor(grammar("lark", codec=codec)), compiled(grammar("gbnf", codec=codec))
    schema = jsonschema.Draft202012Validator(json_schema(scene=None, codec=codec))
    for number in range(400):
        action = draw.any(rows)
        text = format_action(action, codec)
        assert parse_action(text, codec=codec) == action
        assert accepts(text) and pattern.fullmatch(text), text
        assert number >= 60 or schema.is_valid(json.loads(text)), text


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("scene", [None, 'Küche "2" \\ 😀', "*"])
def test_whatever_the_grammar_lets_through_is_canonical_text(codec, scene):
    """A random walk through the grammar, byte by byte: read, written again, it is the same; it fits the schema."""
    if codec == "rows" and scene:
        pytest.skip("rows have no scene")
    source = Acceptor(grammar("lark", scene=scene, codec=codec, max_items=2))
    schema = jsonschema.Draft202012Validator(json_schema(scene=scene, codec=codec, max_items=2))
    rng = np.random.default_rng(0)
    verbs = set()
    for _ in range(150):
        matcher, text = source.matcher.deep_copy(), b""
        while not matcher.is_stopped():
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
            token = int(rng.choice(allowed))
            assert matcher.consume_token(token)
            text += bytes([token]) if token < 256 else b""
        text = text.decode()
        action = parse_action(text, codec=codec)
        assert not isinstance(action, ActionError), (text, action)
        assert format_action(action, codec) == text
        assert schema.is_valid(json.loads(text)), text
        verbs.add(action.verb)
    assert len(verbs) > 5


@pytest.mark.parametrize("number", [COORDINATE, LENGTH, COMPONENT, CONFIDENCE, AMOUNT, DEGREES, INDEX], ids=str)
def test_number_forms_are_each_number_of_the_range_once(number):
    pattern = re.compile(number_regex(number))
    step = 1 if number.whole else 100
    for value in range(-2100, 2100) if number is not AMOUNT else range(-10, 100_500):
        text = f"{value / step:.{0 if number.whole else 2}f}"
        assert bool(pattern.fullmatch(text)) == (number.low <= value <= number.high), text
    for text in ("-0.00", "-0", "00", "01", "0.0", "1", "1.0", "1.000", "1e0", "+1.00", "٣.٠٠", ""):
        whole_form = number.whole and text == "1"
        assert bool(pattern.fullmatch(text)) == whole_form, text


def test_normals_of_the_grammar_are_the_unit_vectors_that_are_read():
    template = '{"action":"place_anchor","center":[0.00,0.00,0.00],"normal":[%s,%s,%s],"extent":[1.00,1.00,1.00]}'
    accepts = compiled(grammar("gbnf", verbs=["place_anchor"]))
    written = {}
    for x in range(-100, 101):
        for y in range(-100, 101):
            text = template % (f"{x / 100:.2f}", f"{y / 100:.2f}", "0.00")
            written[x, y] = bool(accepts.fullmatch(text))
            assert written[x, y] == (not isinstance(parse_action(text), ActionError)), text
    angles = np.linspace(0, 2 * np.pi, 100_000)
    for x, y in {(round(100 * np.cos(a)), round(100 * np.sin(a))) for a in angles}:
        assert written[x, y]


TEXT = '{"action":"place_anchor","category":"chair","center":[1.20,-0.84,0.36],"normal":[0.60,0.80,0.00],"extent":[0.37,0.89,1.83],"yaw":53}'  # noqa: E501


@pytest.mark.parametrize(
    "old, new",
    [
        ("1.20", "1.2"),
        ("1.20", "20.00"),
        ("1.20", "-0.00"),
        ("1.20", "01.20"),
        ("1.20", "1E1"),
        ("1.20", "NaN"),
        ("0.37", "0.00"),
        ("0.37", "-0.37"),
        ("0.80,0.00", "0.60,0.00"),
        ("53", "360"),
        ("53", "053"),
        (":[", ": ["),
        ("chair", "spaceship"),
        ('"yaw":53', '"yaw":53,"yaw":53'),
        ('"category":"chair",', '"scene":"a","category":"chair",'),
        ("}", "} "),
    ],
)
def test_grammar_refuses_what_is_not_written(old, new):
    accepts, pattern = Acceptor(grammar("lark")), compiled(grammar("gbnf"))
    assert accepts(TEXT) and pattern.fullmatch(TEXT) and old in TEXT
    text = TEXT.replace(old, new, 1)
    assert not accepts(text) and not pattern.fullmatch(text)


def test_bindings_hold():
    plan = format_action(PlanRoom((PlaceAnchor("bed", (0, 0, 0), (1, 0, 0), (1, 1, 1)),) * 3, "a"))
    anchor = TEXT.replace('{"action":"place_anchor"', '{"action":"place_anchor","scene":"a"')
    assert Acceptor(grammar("lark", scene="a"))(anchor) and not Acceptor(grammar("lark", scene="b"))(anchor)
    assert not Acceptor(grammar("lark", scene="a"))(TEXT)
    assert Acceptor(grammar("lark", scene="*"))(anchor) and Acceptor(grammar("lark", scene="*"))(TEXT)
    assert Acceptor(grammar("lark", scene="a"))(plan)
    assert Acceptor(grammar("lark", scene="a", max_items=3))(plan)
    assert not Acceptor(grammar("lark", scene="a", max_items=2))(plan)
    assert not Acceptor(grammar("lark", scene="a", items=["place_wall"]))(plan)
    assert not Acceptor(grammar("lark", verbs=["place_anchor"], scene="a"))(plan)
    assert not Acceptor(grammar("lark", categories=["bed"]))(TEXT)
    nameless = TEXT.replace('"category":"chair",', "")
    assert Acceptor(grammar("lark"))(nameless) and not Acceptor(grammar("lark", categories=CATEGORIES))(nameless)
    open_word = TEXT.replace("chair", "office_chair_2")
    assert Acceptor(grammar("lark", categories=None))(open_word) and compiled(
        grammar("gbnf", categories=None)
    ).fullmatch(open_word)
    assert not jsonschema.Draft202012Validator(json_schema(categories=["bed"])).is_valid(json.loads(TEXT))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"kind": "bnf"}, "kind"),
        ({"codec": "mm"}, "codec"),
        ({"verbs": []}, "verbs"),
        ({"verbs": ["fly"]}, "verbs"),
        ({"items": ["move"]}, "no place in a plan_room"),
        ({"categories": []}, "categories"),
        ({"categories": ["Chair"]}, "categories"),
        ({"scene": ""}, "scene"),
        ({"scene": "a\n"}, "scene"),
        ({"scene": "a", "codec": "rows"}, "scene"),
        ({"max_items": 0}, "max_items"),
        ({"max_items": 101}, "max_items"),
    ],
)
def test_bindings_that_allow_nothing_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        grammar(**arguments)


def test_schemas_are_schemas_and_the_seed_schema_takes_the_reference_form():
    for schema in (json_schema(), json_schema(codec="cm"), json_schema(scene=None, codec="rows"), seed_schema()):
        jsonschema.Draft202012Validator.check_schema(schema)
    assert json.loads(grammar("json_schema", scene="*")) == json_schema()
    seed = {
        "action": "place_anchor", "scene": "47333462", "center": [1.2345678901234567, -3.0e1, 0],
        "normal": [0.0, 1.0, 0.0], "extent": [0.3, 25.5],
    }  # fmt: skip
    check = jsonschema.Draft202012Validator(seed_schema())
    for extent in ([0.3, 25.5], [0.3, 25.5, 1]):
        assert check.is_valid(seed | {"extent": extent})
        assert not isinstance(parse_action(json.dumps(seed | {"extent": extent})), ActionError)
    for wrong in ({"extent": [0]}, {"extent": [0, 1, 1]}, {"center": [1, 2]}, {"action": "place"}, {"id": 1}):
        assert not check.is_valid(seed | wrong)
        assert isinstance(parse_action(json.dumps(seed | wrong)), ActionError)


def test_documentation_names_every_verb_and_its_examples_are_texts():
    text = language_docs()
    for verb in VERBS:
        assert f"## {verb}\n" in text
    examples = re.findall(r"^(m2|cm|rows): +(.*)$", text, re.MULTILINE)
    assert len(examples) == 3 * len(ALL_VERBS)
    for codec, example in examples:
        action = parse_action(example, codec=codec)
        assert not isinstance(action, ActionError) and format_action(action, codec) == example


@pytest.mark.parametrize("form", ["docs", "schema", "seed-schema", "lark", "gbnf"])
def test_command_prints_each_form(form):
    result = CliRunner().invoke(app, ["actions", form])
    assert result.exit_code == 0 and "place_anchor" in result.stdout
    if form.endswith("schema"):
        jsonschema.Draft202012Validator.check_schema(json.loads(result.stdout))
    if form == "gbnf":
        assert compiled(result.stdout).fullmatch(TEXT)
    if form == "lark":
        assert Acceptor(result.stdout)(TEXT)
    wrong = CliRunner().invoke(app, ["actions", "lark", "--codec", "rows", "--scene", "a"])
    assert wrong.exit_code == 1 and "scene" in wrong.stderr and "Traceback" not in wrong.stderr
