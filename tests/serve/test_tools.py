"""Calls of tools read out of an answer, whole and in any pieces, and demanded by a grammar."""

import json

import pytest

from jaxscale.serve import tools
from jaxscale.serve.tools import ToolStream, chosen_name, find_form, forced_grammar
from jaxscale.types import InputError

CALL = '{"name": "add", "arguments": {"a": 1}}'
PHI, MISTRAL, HERMES, LLAMA = tools.FORMS


def read(form, text, size):
    stream, said, calls = ToolStream(form), "", []
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for piece in pieces:
        more, found = stream.add(piece)
        said, calls = said + more, calls + found
    more, found = stream.flush()
    return said + more, [(call.name, json.loads(call.arguments)) for call in calls + found]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("form", "text", "said", "num_calls"),
    [
        (HERMES, f"Well.<tool_call>\n{CALL}\n</tool_call>", "Well.", 1),
        (HERMES, f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "\n", 2),
        (HERMES, "a <tool_calm> <tool_call>none</tool_call>", None, 0),
        (HERMES, f"cut <tool_call>{CALL[:9]}", None, 0),
        (MISTRAL, f"[TOOL_CALLS] [{CALL}, {CALL}]", "", 2),
        (PHI, f"<|tool_call|>[{CALL}]<|/tool_call|>", "", 1),
        (LLAMA, '{"name": "add", "parameters": {"a": 1}}', "", 1),
        (LLAMA, '{"name": "Bob"}', None, 0),
        (LLAMA, "No call {at all}.", None, 0),
    ],
)
def test_calls_are_told_from_text_in_any_pieces(form, text, said, num_calls, size):
    wanted = text if said is None else said
    assert read(form, text, size) == (wanted, [("add", {"a": 1})] * num_calls)


def test_the_form_is_that_which_the_template_teaches():
    assert find_form("... <tool_call>\n{...}") is HERMES
    assert find_form("{{ '[TOOL_CALLS]' }}") is MISTRAL
    assert find_form("'<|tool|>' + message['tools'] + '<|/tool|>'") is PHI
    assert find_form("{{ messages }}") is None


def test_a_call_may_be_demanded_by_name():
    given = [{"type": "function", "function": {"name": name}} for name in ("add", "sub")]
    assert len(json.loads(forced_grammar(given, None).text)["anyOf"]) == 2
    assert len(json.loads(forced_grammar(given, "sub").text)["anyOf"]) == 1
    assert chosen_name({"type": "function", "function": {"name": "sub"}}) == (True, "sub")
    with pytest.raises(InputError, match="tool_choice"):
        forced_grammar(given, "mul")
    with pytest.raises(InputError, match="functions with names"):
        forced_grammar([*given, {"type": "function"}], None)
    with pytest.raises(InputError, match="tool_choice"):
        chosen_name("sometimes")
