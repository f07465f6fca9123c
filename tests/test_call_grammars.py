"""The grammars of answers that call tools: whatever is drawn by them is a call that its tool understands."""

from __future__ import annotations

import json
import re

import attrs
import pytest

from fake_service import IM_END, demo_tokenizer
from memserve.api.call_formats import CALL_FORMATS, HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_ARGS, QWEN3_CODER
from memserve.api.call_grammars import CALLS_MAX, call_grammar
from memserve.api.errors import ApiError
from memserve.api.formats import ResponseFormat, StructuredOutputs, grammar_of
from memserve.api.tools import Function, Offer, Tool
from memserve.tokens import pack
from test_call_parser import call_parts, read, xml
from test_grammars import made, tokens_of, walk

SCHEMA = {
    "type": "object",
    "properties": {"size": {"$ref": "#/$defs/size"}, "tag": {"type": "string", "maxLength": 3}},
    "required": ["size"],
    "$defs": {"size": {"type": "integer", "minimum": 0, "maximum": 99}},
}


def tool(name="f", parameters=SCHEMA, strict=None) -> Tool:
    return Tool(type="function", function=Function(name=name, parameters=parameters, strict=strict))


@pytest.fixture(scope="module")
def grammars():
    return made(demo_tokenizer())


def special(form):
    """The format with control tokens of the demo model as its marks."""
    marks = dict(zip(form.marks, ("<file_sep>", "<empty_output>"), strict=False))
    renamed = {
        name: tuple(marks.get(one, one) for one in getattr(form, name))
        for name in ("before", "between", "after")
    }
    inner = ("<repo_name>",) if form.inner else ()
    return attrs.evolve(
        form, marker=marks[form.marker], close=marks.get(form.close, ""), inner=inner, **renamed
    )


FORMS = [
    *CALL_FORMATS.values(),
    special(HERMES),
    special(MISTRAL),
    special(LLAMA3_JSON),
    special(MISTRAL_ARGS),
    special(QWEN3_CODER),
]


def said(tokens) -> str:
    return demo_tokenizer().decode(tokens, skip_special=False)


def is_good(name: str, arguments: str) -> bool:
    found = json.loads(arguments)
    if name == "g":
        return found == {}
    return set(found) <= {"size", "tag"} and 0 <= found["size"] <= 99 and len(found.get("tag", "")) <= 3


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.name} {form.marker}")
@pytest.mark.parametrize("only", [None, "f"])
def test_a_forced_answer_is_calls_and_nothing_else(grammars, form, only):
    """An answer that must be calls has nothing but valid calls, of the tools that are allowed."""
    offer = Offer((tool("f"), tool("g", None)), must=True, only=only, several=only is None)
    text = call_grammar(offer, form, demo_tokenizer().specials)
    counts = set()
    for seed in range(6):
        content, calls = read(said(walk(grammars, text, seed, most=2000)), form, schemas={"f": SCHEMA})
        assert not content
        assert calls and all(is_good(*call) for call in calls)
        assert {name for name, _ in calls} <= ({"f", "g"} if only is None else {"f"})
        counts.add(len(calls))
    assert max(counts) <= CALLS_MAX
    assert (len(counts) > 1) == (form.several and offer.several)


def follows(grammars, text: str, *parts: str | int) -> bool:
    """Whether an answer of these texts and tokens is complete by the grammar."""
    output = b""
    for part in parts:
        for token in [part] if isinstance(part, int) else demo_tokenizer().encode(part, False):
            if token not in tokens_of(grammars.allowed(text, output)):
                return False
            output += pack([token])
    return IM_END in tokens_of(grammars.allowed(text, output))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.name} {form.marker}")
def test_a_strict_tool_is_called_by_its_schema_or_not_at_all(grammars, form):
    """With a strict tool an answer is free text or a call that follows the schema."""
    text = call_grammar(Offer((tool("f", strict=True),)), form, demo_tokenizer().specials)
    mark = "" if form.bare else demo_tokenizer().specials.get(form.marker, form.marker)

    def call(size: str) -> list[str | int]:
        """The texts and tokens of a call, with neighbouring texts joined: they are encoded together."""
        written = call_parts(form, "f", '{"size": 5}')
        parts = (*form.before[1:], *(part.replace("5", size) for part in written), *form.after)
        found: list[str | int] = [""]
        for part in (demo_tokenizer().specials.get(part, part) for part in parts):
            if isinstance(part, str) and isinstance(found[-1], str):
                found[-1] += part
            else:
                found.append(part)
        return found

    assert follows(grammars, text, "Hello <b> {x} [1]\n")
    assert follows(grammars, text)
    assert follows(grammars, text, *([mark] if mark else []), *call("5"))
    assert not follows(grammars, text, *([mark] if mark else []), *call('"x"'))
    if not form.bare:
        assert not follows(grammars, text, "Well, ", mark, " what?")


def test_a_forced_answer_has_an_end(grammars):
    """A forced answer has at most CALLS_MAX calls."""
    text = call_grammar(Offer((tool("g", None),), must=True), HERMES, {})
    calls = ["<tool_call>\n" + '{"name": "g", "arguments": {}}' + "\n</tool_call>"] * (CALLS_MAX + 1)
    assert follows(grammars, text, "\n".join(calls[1:]))
    assert not follows(grammars, text, "\n".join(calls))


@pytest.mark.parametrize("strict", [None, False])
def test_tools_that_are_not_strict_do_not_bind_an_answer(strict):
    """Tools that are not strict give no grammar, which would cost time at each token."""
    assert call_grammar(Offer((tool(strict=strict),)), HERMES, {}) == ""


@pytest.mark.parametrize(("answer", "good"), [
    (grammar_of(ResponseFormat(type="json_object"), None), '{"x": 1}'),
    (grammar_of(None, StructuredOutputs(choice=("yes", "no"))), "no"),
    (grammar_of(None, StructuredOutputs(regex="a+b")), "aab"),
    (grammar_of(None, StructuredOutputs(grammar='root ::= "x" | "y"')), "y"),
])  # fmt: skip
def test_an_answer_has_its_form_or_is_a_call(grammars, answer, good):
    """With a response format and tools, an answer follows the format or is a call."""
    text = call_grammar(Offer((tool("g", None),)), HERMES, {}, answer)
    assert follows(grammars, text, good)
    assert follows(grammars, text, '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>')
    assert not follows(grammars, text, "Hello")


@pytest.mark.parametrize(("parameters", "arguments", "fits"), [
    (None, "{}", True), ({}, "{}", True), ({}, '{"x": 1}', False), ({"properties": {}}, '{"x": 1}', False),
    ({"type": "object", "additionalProperties": True}, '{"x": 1}', True), ({"properties": {"x": {"not": {"const": 1}}}}, '{"x": 1}', True),
    ({"properties": {"x": {"type": "string", "format": "odd"}}}, '{"x": "1"}', True), ({"type": ["object", "null"]}, '{"x": 1}', True),
    ({"$ref": "#/$defs/o", "$defs": {"o": {"type": "object", "required": ["x"]}}}, '{"x": 1}', True),
    ({"$ref": "#/$defs/o", "$defs": {"o": {"type": "object", "required": ["x"]}}}, "{}", False),
])  # fmt: skip
def test_arguments_are_an_object_of_what_the_schema_names(grammars, parameters, arguments, fits):
    """Arguments are an object with the properties that the schema allows, also for schemas with unsupported parts."""
    text = call_grammar(Offer((tool("f", parameters),), must=True), HERMES, {})
    call = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    assert follows(grammars, text, call) == fits


XML = [
    ({"type": "string"}, ["", "a\nb", "null", "{", "<b>"], ["</parameter>", "<parameter=", "a</function>b"]),
    ({"type": "string", "maxLength": 2, "minLength": 1}, ["é", "ab"], ["", "abc"]),
    ({"enum": ["x y", "z", 5]}, ["x y", "z", "5"], ["x", '"z"']),
    ({"const": "k"}, ["k"], ["l"]),
    ({"type": "integer"}, ["5", "-1"], ["x", "1.5", ""]),
    ({"type": "boolean"}, ["true"], ["True", "1"]),
    ({"type": "array", "items": {"$ref": "#/$defs/d"}}, ['["p", "q"]'], ['["x"]', "p"]),
    (
        {"type": "array", "items": {"type": "string"}},
        ['["</parameter>"]', '["<parameter=v>\\\\", "\\"</function>"]'],
        ['["\n"]'],
    ),
    (
        {"type": "object"},
        ['{"</function>": "</parameter>\\n</function>\\n</tool_call>"}'],
        ["{}</parameter>"],
    ),
    ({"$ref": "#/$defs/d"}, ["p"], ["r"]),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ["null", "x"], ["<parameter="]),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, ["null", "7"], ["x"]),
    ({}, ["anything"], ["</function>"]),
    (True, ["anything"], ["</function>"]),
]


@pytest.mark.parametrize("strict", [True, None])
@pytest.mark.parametrize(("schema", "good", "bad"), XML)
def test_an_argument_in_xml_follows_its_schema(grammars, schema, good, bad, strict):
    """A strict tool would be called with what it does not understand, or a file's text be impossible to write."""
    parameters = {"properties": {"v": schema}, "required": ["v"], "$defs": {"d": {"enum": ["p", "q"]}}}
    text = call_grammar(Offer((tool("f", parameters, strict),), must=True), QWEN3_CODER, {})
    for value, fits in (*((one, True) for one in good), *((one, False) for one in bad)):
        answer = "<tool_call>\n" + xml("f", v=value) + "\n</tool_call>"
        assert follows(grammars, text, answer) == fits, value
        if fits:
            ((_, arguments),) = read(answer, QWEN3_CODER, schemas={"f": parameters})[1]
            found = json.loads(arguments)["v"]
            assert found == value or json.dumps(found) == value


@pytest.mark.parametrize(("parameters", "good", "bad"), [
    (None, [{}], [{"x": "1"}]),
    ({"properties": {"a": {}, "b": {"type": "integer"}}, "required": ["b"]}, [{"b": 1}, {"a": "x", "b": 1}], [{}, {"a": "x"}, {"b": 1, "a": "x"}, {"b": 1, "c": "x"}]),
    ({"properties": {"a": {}}, "additionalProperties": {"type": "integer"}}, [{}, {"a": "x", "c": 5, "d": 6}], [{"c": "x"}]),
    ({"type": "object"}, [{}, {"any": "x"}], []),
    ({"type": "object", "required": ["x"]}, [{"x": "1"}, {"x": "1", "y": "2"}], [{}, {"y": "2"}]),
    ({"$ref": "#/$defs/o", "$defs": {"o": {"properties": {"x": {"type": "integer"}}, "required": ["x"]}}}, [{"x": 1}], [{}, {"x": "a"}, {"y": 1}]),
    ({"properties": {"a": False, "b": {}}}, [{"b": "x"}], [{"a": "x"}]),
])  # fmt: skip
def test_the_arguments_in_xml_are_those_of_the_schema(grammars, parameters, good, bad):
    """A small model would make up arguments, or leave out what its tool needs."""
    text = call_grammar(Offer((tool("f", parameters),), must=True), QWEN3_CODER, {})
    for values, fits in (*((one, True) for one in good), *((one, False) for one in bad)):
        assert follows(grammars, text, "<tool_call>\n" + xml("f", **values) + "\n</tool_call>") == fits, (
            values
        )


@pytest.mark.parametrize(("parameters", "reason"), [
    ({"properties": {"x": {"type": "string", "pattern": "a+"}}}, "'pattern' cannot be followed"),
    ({"properties": {"x": {"type": "string", "maxLength": 9999}}}, "lengths of at most 2000"),
    ({"properties": {"x": {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 5}]}}}, "'minimum' cannot be followed"),
    ({"properties": {"x": {}}, "minProperties": 1}, "'minProperties' cannot be followed"),
    ({"properties": {"x": {"type": "array", "uniqueItems": True}}}, "Unimplemented keys"),
    ({"properties": {"x": {"$ref": "#/required"}}, "required": ["x"]}, "the reference '#/required' does not lead to a type"),
    ({"properties": {"x": {"$ref": "#/properties/x"}}}, "the reference '#/properties/x' does not lead to a type"),
    ({"properties": {"a<b": {}}}, "the name 'a<b' cannot be written"),
    ({"properties": {"x": {"enum": ["</parameter>"]}}}, "a value that holds a tag"),
])  # fmt: skip
def test_what_xml_cannot_follow_is_refused_of_strict_tools(parameters, reason):
    """A strict tool would be called with what it does not understand."""
    with pytest.raises(ApiError, match=re.escape(reason)) as refused:
        call_grammar(Offer((tool("f", parameters, True),), must=True), QWEN3_CODER, {})
    assert refused.value.param == "tools[0].function.parameters"
    assert refused.value.status == 400
    if "cannot be followed" in reason or "lengths" in reason or "Unimplemented" in reason:
        assert call_grammar(Offer((tool("f", parameters),), must=True), QWEN3_CODER, {})


@pytest.mark.parametrize(("tools", "param", "reason"), [
    ([tool("a"), tool("b", {"properties": {"x": {"not": {}}}}, True)], "tools[1].function.parameters", "Unimplemented keys"),
    ([tool("a", {"type": "thing"})], "tools[0].function.parameters", 'the schema of an object, got one of "thing"'),
    ([tool("a", {"properties": {"x": {"type": "thing"}}})], "tools[0].function.parameters", "Invalid type: thing"),
    ([tool("a", {"type": "string"})], "tools[0].function.parameters", "expected the schema of an object"),
    ([tool("a", {"description": "x" * 300_000})], "tools", "at most 131072 bytes"),
])  # fmt: skip
def test_a_schema_that_cannot_be_followed_is_named(tools, param, reason):
    """A tool's schema that cannot be followed is refused with the tool's place."""
    with pytest.raises(ApiError) as refused:
        call_grammar(Offer(tuple(tools), must=True), HERMES, {})
    assert refused.value.param == param
    assert reason in str(refused.value)
    assert refused.value.status == 400


def test_a_forced_call_is_not_beside_another_form():
    """A required call together with a response format is refused."""
    with pytest.raises(ApiError, match=r"^tool_choice: not beside response_format"):
        call_grammar(Offer((tool(),), must=True), HERMES, {}, "start: /x/")
