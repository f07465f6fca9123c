"""Tool calls found in answers: however the text is cut, the same calls once, and no text lost."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memserve.api.call_formats import (
    CALL_FORMATS,
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    MISTRAL_ARGS,
    QWEN3_CODER,
    CallFormat,
)
from memserve.api.call_parser import CallParser, CallPart

KNOWN = frozenset(("f", "g"))
KINDS = {
    "a": {"type": "integer"}, "t": {"type": "string"}, "b": {"type": "boolean"}, "o": {"$ref": "#/$defs/o"}, "n": {"type": "number"},
    "m": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "u": {"type": ["string", "integer"]}, "e": {"enum": ["x", "y"]}, "l": {"type": "array"},
    "loop": {"$ref": "#/$defs/loop"}, "odd": {"type": {"x": [1]}}, "any": {},
}  # fmt: skip
SCHEMAS = {
    "f": {
        "properties": KINDS,
        "$defs": {"o": {"type": "object"}, "loop": {"anyOf": [{"$ref": "#/$defs/loop"}] * 9}},
    }
}
F1 = '{"name": "f", "arguments": {"a": 1}}'


def read(
    text: str, form: CallFormat = HERMES, cuts: tuple[int, ...] = (), several: bool = True, schemas=SCHEMAS
):
    """The text outside of calls, and the calls with their arguments, of an answer that arrives in these pieces."""
    parser = CallParser(form, KNOWN, several, schemas)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    found = [one for start, end in pairwise(edges) for one in parser.push(text[start:end])]
    found += parser.finish()
    calls: list[list[str]] = []
    for one in found:
        if isinstance(one, CallPart) and one.name is not None:
            assert one.number == len(calls), "calls are counted"
            calls.append([one.name, ""])
        elif isinstance(one, CallPart):
            assert one.number == len(calls) - 1, "arguments are of the last call"
            calls[-1][1] += one.arguments
    assert parser.calls == len(calls)
    return "".join(one for one in found if isinstance(one, str)), [tuple(call) for call in calls]


def tagged(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def forced(form: CallFormat, name: str, arguments: str) -> str:
    """An answer of one call, as a forced one is written."""
    return "".join((*form.before, *call_parts(form, name, arguments), *form.after))


def call_parts(form: CallFormat, name: str, arguments: str) -> tuple[str, ...]:
    """The text and the marks of one call, as a forced answer has them."""
    if form.style == "named":
        return name, form.inner[-1], arguments
    if form.style == "xml":
        return (xml(name, **json.loads(arguments)),)
    return (f'{{"name": "{name}", "{form.key}": {arguments}}}',)


def xml(name: str, **values: object) -> str:
    """A call as Qwen3-Coder's template writes it, without the outer tags."""
    texts = {key: one if isinstance(one, str) else json.dumps(one) for key, one in values.items()}
    parameters = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts.items())
    return f"<function={name}>\n{parameters}</function>"


TAGS = '["</parameter>\\n<parameter=a>", "\\\\", "\\"</function>", {"</tool_call>": 1}]'
TRICKY = {"text": 'a "b" {c} \\', "close": "</tool_call>", "nested": {"x": [{}, {"y": "}"}]}, "é": "\u65e5\n"}


@pytest.mark.parametrize(("form", "text", "expected"), [
    (HERMES, tagged(F1), ("", [("f", '{"a": 1}')])),
    (HERMES, "<think>\nso\n</think>\n\n" + tagged(F1, F1) + "\n", ("<think>\nso\n</think>", [("f", '{"a": 1}')] * 2)),
    (HERMES, tagged(F1) + "\n\nDone. ", ("Done. ", [("f", '{"a": 1}')])),
    (HERMES, f"<tool_call>{F1}", ("", [("f", '{"a": 1}')])),
    (HERMES, f"<tool_call>{F1}</tool", ("", [("f", '{"a": 1}')])),
    (HERMES, f"<tool_call>[{F1}, {F1}]</tool_call>x", ("x", [("f", '{"a": 1}')] * 2)),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', ("", [("f", '{"a": 1}')])),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>Done {}', ("Done {}", [("f", '{"a": 1}')])),
    (HERMES, '<tool_call>{"name": "f", "arguments": {}, "id": "}"} </tool_call>', ("", [("f", "{}")])),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', ("", [("f", '{"a":1}')])),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', ("", [("f", "{}")])),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", [("f", '{"a":1}')])),
    (HERMES, '<tool_call>{"name": "other_\\u00e9", "parameters": {}}', ("", [("other_é", "{}")])),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "\\', ("", [("f", '{"a": "\\')])),
    (LLAMA3_JSON, ' {"name": "f", "parameters": {"a": 1}}', ("", [("f", '{"a": 1}')])),
    (LLAMA3_JSON, '<|python_tag|>{"name": "new", "parameters": {"a": 1}}', ("", [("new", '{"a": 1}')])),
    (LLAMA3_JSON, '{"name": "Bob", "parameters": {"a": 1}}', ('{"name": "Bob", "parameters": {"a": 1}}', [])),
    (LLAMA3_JSON, 'Take {"name": "f", "parameters": {}}', ('Take {"name": "f", "parameters": {}}', [])),
    (LLAMA3_JSON, '<|python_tag|>search.call(query="x")', ('<|python_tag|>search.call(query="x")', [])),
    (MISTRAL, f"[TOOL_CALLS] [{F1}, {F1}]", ("", [("f", '{"a": 1}')] * 2)),
    (MISTRAL, f'Yes.[TOOL_CALLS][{F1[:-1]}, "id": "123456789"}}] ', ("Yes.", [("f", '{"a": 1}')])),
    (MISTRAL, f"[TOOL_CALLS][{F1}, none]", (", none]", [("f", '{"a": 1}')])),
    (QWEN3_CODER, "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>", ("", [("f", '{"a": 1}')])),
    (QWEN3_CODER, "So.\n<tool_call>\n<function=f>\n</function>\n</tool_call>\n<tool_call><function=g></function></tool_call> x", ("So.x", [("f", "{}"), ("g", "{}")])),
    (QWEN3_CODER, "<tool_call><function=f><parameter=t>a</parameter><parameter=b>True</parameter></function></tool_call>", ("", [("f", '{"t": "a", "b": true}')])),
    (QWEN3_CODER, "<tool_call><function=f><parameter=t>\n\n a\n\n</parameter></function></tool_call>", ("", [("f", '{"t": "\\n a\\n"}')])),
    (QWEN3_CODER, "<tool_call><function=f><parameter=t>\n</parameter><parameter=e></parameter></function>", ("", [("f", '{"t": "", "e": ""}')])),
    (QWEN3_CODER, '<tool_call><function=f><parameter=t>\n"q" \\ <b> </par </parameter></function>', ("", [("f", '{"t": "\\"q\\" \\\\ <b> </par "}')])),
    (QWEN3_CODER, "<tool_call><function=f><parameter=t>null</parameter><parameter=m>null</parameter><parameter=u>null</parameter></function>",
        ("", [("f", '{"t": "null", "m": null, "u": "null"}')])),
    (QWEN3_CODER, '<tool_call><function=f><parameter=m>"1"</parameter><parameter=u>1</parameter><parameter=u>1.5</parameter></function>',
        ("", [("f", '{"m": "\\"1\\"", "u": 1, "u": "1.5"}')])),
    (QWEN3_CODER, '<tool_call><function=f><parameter=o>\n{"x":\n [1]}\n</parameter><parameter=l>[</parameter></function>', ("", [("f", '{"o": {"x":\n [1]}, "l": "["}')])),
    (QWEN3_CODER, "<tool_call><function=f><parameter=loop>1</parameter><parameter=odd>1</parameter><parameter=any>1</parameter></function>",
        ("", [("f", '{"loop": "1", "odd": "1", "any": "1"}')])),
    (QWEN3_CODER, "<tool_call><function=new><parameter=é>1</parameter> so <b> <parameter=x>2\n</function></tool_call>.", (".", [("new", '{"é": "1", "x": "2"}')])),
    (QWEN3_CODER, "<tool_call><function=f><parameter=t>a<parameter=n>2</parameter></tool_call>.", (".", [("f", '{"t": "a", "n": 2}')])),
    (QWEN3_CODER, "<tool_call><function=f><parameter=t>\nab c\n</par", ("", [("f", '{"t": "ab c')])),
    (QWEN3_CODER, "<tool_call><function=f><parameter=a>\n12", ("", [("f", '{"a": ')])),
    (QWEN3_CODER, f"<tool_call>\n{F1}\n</tool_call>", ("", [("f", '{"a": 1}')])),
    (QWEN3_CODER, f"<tool_call><function=f><parameter=l>\n{TAGS}\n</parameter><parameter=m>{TAGS}</parameter></function>",
        ("", [("f", f'{{"l": {TAGS}, "m": {json.dumps(TAGS)}}}')])),
    (QWEN3_CODER, '<tool_call><function=f><parameter=l>["a</parameter>\n<parameter=a>1</parameter></function>', ("", [("f", '{"l": "[\\"a", "a": 1}')])),
    (QWEN3_CODER, '<tool_call><function=f><parameter=l>["a</parameter><parameter=t>"b"</parameter></function></tool_call>',
        ("", [("f", '{"l": "[\\"a", "t": "\\"b\\""}')])),
    (QWEN3_CODER, '<tool_call><function=f><parameter=l>["a</parameter></function></tool_call>', ("", [("f", '{"l": "[\\"a"}')])),
    (QWEN3_CODER, '<tool_call><function=f><parameter=l>["a\\</parameter>\n</function>', ("", [("f", '{"l": "[\\"a\\\\"}')])),
    (QWEN3_CODER, '<tool_call><function=f><parameter=m>"a" b</parameter></function>', ("", [("f", '{"m": "\\"a\\" b"}')])),
    (QWEN3_CODER, "I look.\n\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>", ("I look.", [("f", '{"a": 1}')])),
    (QWEN3_CODER, "<function=f></function>\n<function=g></function> x", ("x", [("f", "{}"), ("g", "{}")])),
    (QWEN3_CODER, "<function=other></function> <tool_call><function=other></function></tool_call>", ("<function=other></function>", [("other", "{}")])),
    (QWEN3_CODER, f" {F1}\n", ("", [("f", '{"a": 1}')])),
    (HERMES, F1, ("", [("f", '{"a": 1}')])),
    (HERMES, '\n\n{ "name": "g",\n "parameters": {"x": [{"y": "}"}]} }\n', ("", [("g", '{"x": [{"y": "}"}]}')])),
    (MISTRAL_ARGS, '[TOOL_CALLS]f[ARGS]{"a": 1}', ("", [("f", '{"a": 1}')])),
    (MISTRAL_ARGS, 'So.[TOOL_CALLS]f[ARGS]{"a": "[ARGS]}"}[TOOL_CALLS] g [ARGS] {} ', ("So.", [("f", '{"a": "[ARGS]}"}'), ("g", "{}")])),
    (MISTRAL_ARGS, '[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{"a": 1}', ("", [("f", '{"a": 1}')])),
    (MISTRAL_ARGS, '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]new_1.x-y{} Done', ("Done", [("f", '{"a": 1}'), ("new_1.x-y", "{}")])),
    (MISTRAL_ARGS, f'[TOOL_CALLS] [{F1}, {F1}]', ("", [("f", '{"a": 1}')] * 2)),
    (MISTRAL_ARGS, '[TOOL_CALLS]f[ARGS]{"a": "b', ("", [("f", '{"a": "b')])),
    (MISTRAL_ARGS, '[TOOL_CALLS]f[ARGS]{}} x', ("} x", [("f", "{}")])),
    (MISTRAL, "[TOOL_CALLS] none [1]", ("[TOOL_CALLS] none [1]", [])),
])  # fmt: skip
def test_calls_are_found_as_models_write_them(form, text, expected):
    """Calls are found in every form in which models write them."""
    for cuts in ((), tuple(range(len(text)))):
        assert read(text, form, cuts) == expected


def test_arguments_are_passed_on_as_they_were_written():
    """Arguments with braces, quotes or markers in their strings are passed on unchanged."""
    for arguments in (json.dumps(TRICKY), json.dumps(TRICKY, ensure_ascii=False, indent=1)):
        text = tagged(f'{{"name": "f", "arguments": {arguments}}}')
        for cut in range(len(text)):
            assert read(text, cuts=(cut,)) == ("", [("f", arguments)])


@pytest.mark.parametrize("text", [
    "<tool_call>", "<tool_call>\n", "<tool_call>\n{", '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>!', '<tool_call>{"name": "", "arguments": {}}', "<tool_call>{name: f(x)}</tool_call> and",
    '<tool_call>{"name": "f", "arguments": "x"}', '<tool_call>{"name": "f", "arguments": "{"}', "x < y <tool", " \n", "a  <tool_call> b ",
    '<tool_call>{"name": "\\ud800", "arguments": {}}', "<tool_call>[]", "<tool_call>[[{", '<tool_call>{"arguments": {"a": 1}',
    "<tool_call><f", "<tool_call>\n<function=", "<tool_call><function=f", "<tool_call><function=f>", "<tool_call><function=f>\n\n<param", "<tool_call><function=f> x",
    "<tool_call><function=f g></function>", "<tool_call><function=></function>", "<function=other></function>", "<function=f", "<function=f> so", "a <function=<function=", "<tool_call><function=f></tool_call>", "<tool_call> <fun!",
    "[TOOL_CALLS]", "[TOOL_CALLS]f", "[TOOL_CALLS]f[ARGS", "[TOOL_CALLS]f[ARGS]", "[TOOL_CALLS]f[ARGS]null", "[TOOL_CALLS]f[CALL_ID]{}", "[TOOL_CALLS]f g {}",
    "[TOOL_CALLS]f[ARGS][ARGS]{}", '[TOOL_CALLS]é{"a": 1}', "[TOOL_CALLS][f{}]", "[TOOL_CALLS]" + "f" * 300 + "{}", "a [TOOL_CALLS]f" + " " * 200 + "{}", "[TOOL",
    F1 + " so", f"So: {F1}", F1[:-1], f"{F1}{F1}", F1.replace("f", "other"), F1.replace("1}", "1}, \"id\": 1"), '{"name": "f"}', '{"name": "f", "x": {}}',
    '{"name": "f", "arguments": [1]}', f"[{F1}]", "{", "{}", '{"na', '{"name": "f", "arguments": {"a": 1}} }', '{"name": ["f"], "arguments": {}}', f"```json\n{F1}\n```",
    f'<tool_call>{{"name": "{"f" * 300}", "arguments": {{}}}}', "<tool_call>" + '{"a":' * 2000 + "1" + "}" * 2000,
])  # fmt: skip
def test_what_is_no_call_is_text_as_it_was(text):
    """Text that only looks like a call is returned unchanged."""
    form = MISTRAL_ARGS if "[TOOL" in text else QWEN3_CODER if "<f" in text else HERMES
    assert read(text, form) == (text, [])
    assert read(text, form, cuts=tuple(range(len(text)))) == (text, [])


def test_calls_that_must_follow_a_grammar_have_their_marker():
    """Where a grammar says what follows the marker, what looks like a call without one is text."""
    for form, text in ((HERMES, F1), (QWEN3_CODER, F1), (QWEN3_CODER, "<function=f></function>")):
        parser = CallParser(form, KNOWN, unmarked=False)
        assert "".join(map(str, [*parser.push(text), *parser.finish()])) == text
        assert parser.calls == 0


@pytest.mark.parametrize(
    "text",
    ['{"name": "x y', '{"city": "Paris",', '{"name": "f", "age', "{ so", '{"name": "other", "arguments": {'],
)
def test_json_that_is_no_call_is_not_held_back(text):
    """An answer in JSON streams as soon as it cannot be a call any more."""
    parser = CallParser(HERMES, KNOWN)
    assert "".join(map(str, parser.push(text))) == text


PIECES = st.sampled_from([
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<tool", "_call>", "[", "]", "{", "}", ",", '"', "\\", "\\u00e9", "\\\\", ":",
    " ", "\n", '"name"', '"f"', '"arguments"', '"parameters"', '{"name": "f", "arguments": {', '{"name": "f", "parameters": {"a": "}', F1, "é日", "text",
    "<function=f>", "<parameter=t>", "<parameter=a>", "</parameter>", "</function>", "</par", "<tool_call><function=f><parameter=t>", "1", "<",
    tagged(F1), f"[TOOL_CALLS] [{F1}", "[ARGS]", F1, "<function=", "f></function>", "[CALL_ID]", "f[ARGS]{", "f{", "[TOOL_CALLS]f[ARGS]{}", '"id": 1',
])  # fmt: skip


@given(
    form=st.sampled_from(list(CALL_FORMATS.values())),
    text=st.lists(PIECES, max_size=14).map("".join),
    cuts=st.lists(st.integers(0, 300), max_size=20).map(tuple),
    several=st.booleans(),
)
@example(HERMES, tagged(F1), (3,), True)
@example(QWEN3_CODER, "<tool_call><function=f><parameter=t>a \n \n</parameter>", (38,), True)
@example(HERMES, f"<tool_call>{F1[:-1]}\\", (42,), True)
def test_pieces_do_not_matter(form, text, cuts, several):
    """However an answer is cut into pieces, its text and calls are the same."""
    whole = read(text, form, (), several)
    assert read(text, form, cuts, several) == whole
    assert read(text, form, tuple(range(len(text))), several) == whole
    assert several or len(whole[1]) <= 1


@given(text=st.lists(PIECES, max_size=14).map("".join))
def test_an_answer_that_has_no_call_is_whole(text):
    """An answer without a call is returned whole, whatever it looks like."""
    for form in CALL_FORMATS.values():
        found, calls = read(text, form)
        assert calls or found == text


@given(arguments=st.dictionaries(st.text(max_size=5), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5,
), max_size=3), plain=st.booleans())  # fmt: skip
def test_every_object_of_arguments_comes_out(arguments, plain):
    """Any object of arguments is passed on as it was written, in every format."""
    written = json.dumps(arguments, ensure_ascii=plain)
    for form in CALL_FORMATS.values():
        if form.style == "xml":
            continue
        text = forced(form, "f", written)
        assert read(text, form, tuple(range(len(text)))) == ("", [("f", written)])


@given(
    values=st.dictionaries(
        st.sampled_from(list(KINDS)), st.text('<>/=parmetfuncio\n "\\é', max_size=30), max_size=4
    )
)
def test_every_text_comes_out_of_xml(values):
    """A file that a model writes would lose lines at its ends, or be cut where it holds a tag that is none."""
    if any(end in text for text in values.values() for end in ("</parameter>", "<parameter=", "</function>")):
        return
    schemas = {"f": {"properties": {key: {"type": "string"} for key in values}}}
    text = "".join((*QWEN3_CODER.before, xml("f", **values), *QWEN3_CODER.after))
    content, ((name, arguments),) = read(text, QWEN3_CODER, tuple(range(len(text))), schemas=schemas)
    assert (content, name, json.loads(arguments)) == ("", "f", values)
    assert read(text, QWEN3_CODER, schemas=schemas) == (content, [(name, arguments)])


JSONS = st.recursive(
    st.none() | st.integers() | st.text(alphabet=st.sampled_from('</>"\\\n a')) | st.sampled_from(["</parameter>", "<parameter=a>\n1\n", "\n</function>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "</parameter>"]), inner, max_size=3), max_leaves=6,
)  # fmt: skip


@given(
    values=st.lists(JSONS.filter(lambda one: not isinstance(one, str)), min_size=1, max_size=3),
    indent=st.none() | st.just(1),
)
def test_every_json_comes_out_of_xml(values, indent):
    """A value that is JSON is never cut at what looks like a tag in one of its texts."""
    named = {f"k{i}": one for i, one in enumerate(values)}
    schemas = {"f": {"properties": {key: {"type": ["object", "array", "integer", "null"]} for key in named}}}
    call = xml("f", **{key: json.dumps(one, indent=indent) for key, one in named.items()})
    text = "".join((*QWEN3_CODER.before, call, *QWEN3_CODER.after))
    content, ((name, arguments),) = read(text, QWEN3_CODER, tuple(range(len(text))), schemas=schemas)
    assert (content, name, json.loads(arguments)) == ("", "f", named)
    assert read(text, QWEN3_CODER, schemas=schemas) == (content, [(name, arguments)])


def test_texts_in_xml_come_as_they_are_written():
    """A client would wait for the end of a long file without a sign of life."""
    parser = CallParser(QWEN3_CODER, KNOWN, schemas=SCHEMAS)
    assert parser.push("<tool_call>\n<function=f>") == []
    assert parser.push("\n<parameter=") == [CallPart(0, "f"), CallPart(0, None, "{")]
    assert parser.push("t>\nab") == [CallPart(0, None, '"t": "ab')]
    assert parser.push(' "c\n') == [CallPart(0, None, ' \\"c')]
    assert parser.push("</para") == []
    assert parser.cut
    assert parser.push("meter>\n</function>") == [CallPart(0, None, '"}')]
    assert not parser.cut


def test_what_follows_the_first_call_can_be_left_out():
    """If only one call is wanted, what follows it is left out."""
    parser = CallParser(HERMES, KNOWN, several=False)
    found = parser.push(tagged(F1, F1))
    assert [one.name for one in found if isinstance(one, CallPart) and one.name] == ["f"]
    assert parser.enough
    assert parser.finish() == []


def test_text_comes_as_soon_as_it_is_known():
    """Text and arguments are passed on as soon as they cannot be anything else."""
    parser = CallParser(HERMES, KNOWN)
    assert parser.push("Let me see") == ["Let me see"]
    assert parser.push("  <tool") == []
    assert parser.push("box>") == ["  <toolbox>"]
    assert parser.push('\n<tool_call>{"name": "f", "arguments":') == []
    assert parser.push(' {"city": "Pa') == [CallPart(0, "f"), CallPart(0, None, '{"city": "Pa')]
    assert parser.push("ris") == [CallPart(0, None, "ris")]


@pytest.mark.parametrize(("begun", "piece"), [
    ("<tool_call><function=f><parameter=t>", "0123456789"), ("<tool_call><function=f><parameter=l>", "0123456789"), ("<tool_call><function=f>", "\n" * 9),
    ("<tool_call><function=f><parameter=t>", "<"), ("<tool_call><function=f><parameter=t>", "\n"), ('<tool_call><function=f><parameter=l>["', "</parameter>"),
    ('<tool_call><function=f><parameter=l>["', "\\"), ('<tool_call><function=f><parameter=l>["', '"'), ("<tool_call><function=f></tool", "<parameter=t"), ("<tool_call><function=", "f"),
    ("[TOOL_CALLS]", "f"), ("[TOOL_CALLS]f", "["), ("[TOOL_CALLS]f", " "), ("[TOOL_CALLS]f[ARGS]{", "{"), ("", "[TOOL_CALLS]f"),
    ("", "<tool_call>{"), ('{"name": "f", "arguments": {"a": "', "{ }"), ("{", "\n"), ("<tool_call></tool_call>", "<function="), (F1, "\n"), ("<tool_call>{", "{"), ("<tool_call>{", '{"name": "'), ("<tool_call>{", "\n"), ("<tool_call>", "\n"), ("", "\n"), ("", "<"),
    ('<tool_call>{"name": "', "0123456789"), ('<tool_call>{"name": "f", "arguments": {', "\\"), (tagged(F1), "\n"),
])  # fmt: skip
def test_no_answer_takes_long_to_read(begun, piece):
    """Repetitive answers take linear time to read, so that a stream does not hold up the others."""
    began = time.perf_counter()
    form = MISTRAL_ARGS if "[" in begun + piece else QWEN3_CODER if "<f" in begun else HERMES
    parser = CallParser(form, KNOWN, schemas=SCHEMAS)
    for one in (begun, *[piece] * 10_000):
        parser.push(one)
    parser.finish()
    assert time.perf_counter() - began < 5
