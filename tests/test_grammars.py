"""Grammars in the demo model's tokens: what may follow, whatever was asked before."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from itertools import islice

import pytest
from structlog.testing import capture_logs

import memserve.engine.grammars as grammars_module
from fake_service import MODEL_PATH, demo_tokenizer
from memserve.api.formats import JsonSchema, ResponseFormat, StructuredOutputs, grammar_of
from memserve.drawing import Adjustments, Sampling
from memserve.engine.checkpoint import read_spec
from memserve.engine.grammars import Grammars
from memserve.engine.guide import Guide
from memserve.engine.plans import BatchPlan, Past, Row
from memserve.engine.spec import find_model
from memserve.tokens import count, pack, span, unpack

SPEC = read_spec(find_model(MODEL_PATH))
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b\\"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def grammar(**asked: object) -> str:
    """The grammar of these ``structured_outputs``."""
    return grammar_of(None, StructuredOutputs(**asked))


PERSONS = grammar_of(ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=PERSON)), None)


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer()


def made(tokenizer, padding: int = 0) -> Grammars:
    return Grammars(tokenizer, SPEC.vocab + padding, SPEC.eos)


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Grammars:
    return made(tokenizer)


def tokens_of(mask: bytes) -> list[int]:
    return [8 * at + bit for at, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1]


def walk(grammars: Grammars, text: str, seed: int, most: int = 300) -> Iterator[int]:
    """A random answer: each token is one of those that are allowed, until the one that ends it."""
    generator, output = random.Random(seed), b""
    for _ in range(most):
        token = generator.choice(tokens_of(grammars.allowed(text, output)))
        if token in SPEC.eos:
            return
        yield token
        output += pack([token])
    raise AssertionError("an answer without an end")


def is_person(text: str) -> bool:
    found = json.loads(text)
    good = set(found) <= {"name", "age", "tags"} and len(found["name"]) <= 12 and 0 <= found["age"] <= 150
    return good and all(tag in ("a", "b\\") for tag in found.get("tags", []))


@pytest.mark.parametrize(("text", "right"), [
    (PERSONS, is_person),
    (grammar(choice=("yes", "no, never", 'a "quote"')), {"yes", "no, never", 'a "quote"'}.__contains__),
    (grammar(regex=r"[0-9]{2,5}-(ja|nein)"), re.compile(r"[0-9]{2,5}-(ja|nein)").fullmatch),
    (grammar(grammar='root ::= "(" root ")" | "x"'), lambda found: re.fullmatch(r"\(*x\)*", found) and found.count("(") == found.count(")")),
    (grammar(grammar='start: "Größe " /[1-9]/ " €"'), re.compile(r"Größe [1-9] €").fullmatch),
])  # fmt: skip
def test_whatever_is_drawn_follows_the_grammar(grammars, tokenizer, text, right):
    """Whatever allowed tokens are drawn, the answer follows its JSON schema, choice, regex or grammar."""
    for seed in range(10):
        answer = tokenizer.decode(walk(grammars, text, seed))
        assert right(answer), answer


def test_what_is_allowed_depends_on_the_answer_alone(tokenizer):
    """The allowed tokens depend on grammar and answer only, so that another worker can resume the stream."""
    first = made(tokenizer)
    answers = [pack(walk(first, PERSONS, seed)) for seed in range(2)]
    generator = random.Random(1)
    places = [(answer, 4 * generator.randrange(len(answer) // 4 + 1)) for answer in answers for _ in range(3)]
    for answer, at in generator.sample(places, len(places)):
        assert first.allowed(PERSONS, answer[:at]) == made(tokenizer).allowed(PERSONS, answer[:at])


def test_two_answers_that_begin_alike_do_not_disturb_one_another(grammars):
    """Two answers with the same grammar and the same beginning do not affect each other."""
    text = grammar(choice=("yes", "yellow"))
    begun = [(), ()]
    for _ in range(2):
        masks = [tokens_of(grammars.allowed(text, pack(one))) for one in begun]
        assert masks[0] == masks[1]
        begun = [(*one, masks[0][0]) for one in begun]
        grammars.allowed(text, pack(begun[0]))


def test_what_ended_answers_leave_behind_is_limited(grammars, tokenizer, monkeypatch):
    """States are dropped by the size of their grammars: a thousand answers by large schemas would take gigabytes."""
    texts = [grammar(regex=f"[a-c]{{9}}{'x' * 1000}{i}") for i in range(6)]
    answers = [[*islice(walk(grammars, text, 1), 3)] for text in texts]
    masks = [
        [grammars.allowed(text, pack(one[:at])) for text, one in zip(texts, answers, strict=True)]
        for at in range(3)
    ]
    monkeypatch.setattr(grammars_module, "FOLLOWED_BYTES", 3 * len(texts[0]))
    found = made(tokenizer)
    for at in range(3):
        assert [
            found.allowed(text, pack(one[:at])) for text, one in zip(texts, answers, strict=True)
        ] == masks[at]
        assert [text for text, _ in found._followed] == texts[3:]


def test_ids_beyond_the_tokenizer_and_special_tokens_are_never_allowed(tokenizer):
    """Padding ids and control tokens, except those that end an answer, are never allowed."""
    found = set(tokens_of(made(tokenizer, 7).allowed(grammar(regex=r"(.|\n)*"), b"")))
    assert len(found) > 40_000
    assert max(found) < SPEC.vocab
    assert found & set(tokenizer.specials.values()) == set(SPEC.eos)


def test_a_grammar_that_cannot_be_followed_ends_the_answer(grammars):
    """An answer that left its grammar may only end, and a log line says why."""
    with capture_logs() as logs:
        found = grammars.allowed(grammar(choice=("yes",)), pack([5, 6]))
    assert tokens_of(found) == list(SPEC.eos)
    assert [line["event"] for line in logs] == ["grammar given up"]
    assert "\n" not in logs[0]["reason"]


def test_a_panic_of_the_library_ends_the_answer_and_no_more(grammars, monkeypatch):
    """A panic of the grammar library ends the answer, and not the worker."""

    class PanicException(BaseException):
        """Like the exception that pyo3 raises when a library in Rust panics: not an Exception."""

    def panics(*_given, **_named):
        raise PanicException("index out of bounds")

    asked = grammar(choice=("never read before",))
    monkeypatch.setattr(grammars_module, "LLMatcher", panics)
    with capture_logs() as logs:
        found = grammars.allowed(asked, b"")
    assert tokens_of(found) == list(SPEC.eos)
    assert "index out of bounds" in logs[0]["reason"]


def test_rows_with_a_grammar_get_what_it_allows(grammars):
    """Rows with a grammar get the tokens that it allows, and other rows stay as they are."""
    loaded = []
    guide = Guide(lambda: loaded.append(grammars) or grammars)
    text = grammar(choice=("yes", "no"))
    free = Row(pack([1]), 0, (0,), Sampling())
    other = Row(pack([1]), 0, (0,), Sampling(adjust=Adjustments(presence=1.0)), Past(b"", pack([3])))
    unwanted = Row(pack([1, 2]), 0, (0,), None)
    assert guide.filled(BatchPlan((free, other, unwanted))).rows == (free, other, unwanted)
    assert not loaded, "a worker would load a tokenizer that nobody needs"
    bound = Row(pack([1]), 0, (0,), Sampling(adjust=Adjustments(grammar=text)), Past(b"", b""))
    for _ in range(2):
        found = guide.filled(BatchPlan((free, bound, other))).rows
        assert (found[0], found[2]) == (free, other)
        assert found[1].past == Past(b"", b"", allowed=grammars.allowed(text, b""))
    assert len(loaded) == 1


def ahead(grammars, text, output=b"", guess=(), most=20):
    """The draft of :meth:`Grammars.ahead`, whose masks are checked against those of an answer with these tokens."""
    draft, masks = grammars.ahead(text, output, grammars.allowed(text, output), pack(guess), most)
    for place, mask in enumerate(masks, 1):
        assert mask == grammars.allowed(text, output + span(draft, 0, place)), place
    assert len(masks) == count(draft)
    return list(unpack(draft))


def test_what_a_grammar_forces_goes_ahead(grammars, tokenizer):
    """Tokens that the grammar leaves no choice about become a draft, whatever was guessed."""
    schema = {
        "type": "object",
        "properties": {"city_of_birth": {"enum": ["Ulm"]}},
        "required": ["city_of_birth"],
    }
    text = grammar_of(ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=schema)), None)
    begun = tokenizer.encode('{"', allow_special=False)
    forced = ahead(grammars, text, pack(begun))
    assert tokenizer.decode(forced) == 'city_of_birth": "Ulm'
    assert ahead(grammars, text, pack(begun), most=2) == forced[:2]
    assert ahead(grammars, text, pack(begun), most=0) == []
    assert ahead(grammars, text, pack(begun), guess=[5, 6, 7]) == forced  # whatever was guessed


def test_what_was_guessed_goes_ahead_as_far_as_it_is_allowed(grammars, tokenizer):
    """A guess is cut where the grammar does not allow it."""
    text = grammar(regex=r"[a-z ]* end[.]")
    guess = tokenizer.encode("the cat sat; the", allow_special=False)
    found = ahead(grammars, text, guess=guess)
    assert tokenizer.decode(found) == "the cat sat"
    assert ahead(grammars, text, guess=guess, most=2) == found[:2]
    assert ahead(grammars, text, pack(found), guess=guess) != []
    assert ahead(grammars, text) == []


def test_nothing_goes_ahead_of_the_end(grammars):
    """Nothing is drafted after the end of an answer."""
    text = grammar(choice=("yes",))
    (token,) = tokens_of(grammars.allowed(grammar(regex="yes"), b""))[-1:]
    assert ahead(grammars, text, pack([token])) == []
    assert ahead(grammars, text, pack([token]), guess=list(SPEC.eos) * 3) == []


def test_an_answer_that_goes_on_by_several_tokens_is_not_read_again(grammars, tokenizer):
    """An answer that grows by several tokens is continued, not read from its beginning."""
    text, output = grammar(regex=r"x*"), b""
    token = tokens_of(grammars.allowed(text, b""))[-1]
    grammars_new, read = grammars._new, []
    grammars._new = lambda text: read.append(text) or grammars_new(text)
    try:
        for step in (1, 3, 1, 9, 64, 65):
            output += pack([token] * step)
            assert grammars.allowed(text, output) == made(tokenizer).allowed(text, output)
    finally:
        del grammars._new
    assert not read


def test_a_guide_lengthens_and_cuts_drafts(grammars, tokenizer):
    """A guide cuts a draft where the grammar ends it and gives the allowed tokens for each of its positions."""
    guide = Guide(lambda: grammars)
    text = grammar(regex=r"[a-z ]*[.]")
    guess = pack(tokenizer.encode("the cat; the", allow_special=False))
    row = Row(
        pack([1]),
        0,
        (0,),
        Sampling(adjust=Adjustments(grammar=text)),
        Past(b"", b""),
        draft=guess,
        draft_most=8,
    )
    (found,) = guide.filled(BatchPlan((row,))).rows
    assert tokenizer.decode(unpack(found.draft)) == "the cat"
    assert found.past.then == tuple(
        grammars.allowed(text, span(found.draft, 0, place)) for place in range(1, count(found.draft) + 1)
    )
    assert [found.past_at(place).allowed for place in range(count(found.draft) + 1)] == [
        found.past.allowed, *found.past.then
    ]  # fmt: skip
    assert found.past_at(2).output == span(found.draft, 0, 2)


def test_blank_lines_in_a_grammar_take_no_time():
    """One request would stop its Frontend for half a minute, with the streams of all clients."""
    began = time.perf_counter()
    assert grammar(grammar='root ::= "x"' + 60_000 * "\n")
    assert time.perf_counter() - began < 5  # 0.1 s where nothing else runs


RULES = "start: a0\n" + "".join(f"a{at}: a{at + 1}\n" for at in range(4000)) + 'a4000: "x"'
SCHEMAS = {f"a{at}": {"properties": {"p": {"$ref": f"#/$defs/a{at + 1}"}}} for at in range(1100)}
DEEP = {"$ref": "#/$defs/a0", "$defs": SCHEMAS | {"a1100": {"type": "string"}}}


@pytest.mark.parametrize("asked", [{"grammar": RULES}, {"json": DEEP}])
def test_rules_that_refer_to_one_another_far_overflow_no_stack(grammars, asked):
    """One request would end its Frontend, with the streams of all clients, or one worker after the other."""
    text = grammar(**asked)
    assert any(grammars.allowed(text, b""))


def test_an_answer_is_read_token_by_token(grammars):
    """An answer that grows token by token is never read from its beginning."""
    text, output = grammar(regex=r"x*"), b""
    token = tokens_of(grammars.allowed(text, b""))[-1]
    read = []
    grammars_new, grammars._new = grammars._new, lambda text: read.append(text) or grammars_new(text)
    try:
        for _ in range(50):
            output += pack([token])
            assert token in tokens_of(grammars.allowed(text, output))
    finally:
        del grammars._new
    assert not read
    assert len(unpack(output)) == 50
