"""The prompts of DeepSeek-V3.2 and V4, which their checkpoints publish as programs: the expected texts are what those programs
(encoding_dsv32.py, encoding_dsv4.py) write for the same messages."""

from __future__ import annotations

import copy
import json
import shutil

import pytest

from deepseek_optimizer.chat import tools as formats
from deepseek_optimizer.chat.named_template import read_template
from deepseek_optimizer.chat.template import ChatTemplate
from deepseek_optimizer.checkpoint import load_tokenizer, open_checkpoint

FUNCTION = {"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {"n": {"type": "array"}}}}
TOOL = {"type": "function", "function": FUNCTION}
SYSTEM, USER, NEXT = {"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "user", "content": "V"}
ANSWER = {"role": "assistant", "content": "A", "reasoning_content": "R"}
CALLS = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "R",
    "tool_calls": [
        {"id": "c0", "type": "function", "function": {"name": "add", "arguments": json.dumps({"n": [1, "é"], "text": "x\ny"})}},
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}},
    ],
}
RESULTS = [{"role": "tool", "tool_call_id": f"c{i}", "content": f"r{i}"} for i in range(2)]
SCHEMA = json.dumps(FUNCTION)
V4_TOOLS = (
    "## Tools\n\nYou have access to a set of tools to help answer the user's question. You can invoke tools by writing a "
    '"<｜DSML｜tool_calls>" block like the following:\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="$TOOL_NAME">\n'
    '<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>\n...\n'
    '</｜DSML｜invoke>\n<｜DSML｜invoke name="$TOOL_NAME2">\n...\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>\n\n'
    'String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, '
    'objects), pass the value in JSON format and set `string="false"`.\n\nIf thinking_mode is enabled (triggered by <think>), '
    "you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.\n\nOtherwise, "
    "output directly after </think> with tool calls or final response.\n\n### Available Tool Schemas\n\n"
    f"{SCHEMA}\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
)
V32_TOOLS_END = f"in JSONSchema format:\n<functions>\n{SCHEMA}\n</functions>\n"


def written_calls(block: str) -> str:
    return (
        f'\n\n<｜DSML｜{block}>\n<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="n" string="false">[1, "é"]'
        '</｜DSML｜parameter>\n<｜DSML｜parameter name="text" string="true">x\ny</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        f'<｜DSML｜invoke name="add">\n\n</｜DSML｜invoke>\n</｜DSML｜{block}>[E]'
    )


@pytest.fixture(scope="module")
def render(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_special_tokens({"bos_token": "[B]", "eos_token": "[E]"})
    template = ChatTemplate(tokenizer)

    def rendered(name, messages, tools=None, add_generation_prompt=True, **options):
        tokenizer.chat_template = read_template(name)
        return template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, options=options).text

    yield rendered
    template.close()


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        ([SYSTEM, USER], {}, "[B]S<｜User｜>U<｜Assistant｜><think>"),
        ([USER], {"thinking": False}, "[B]<｜User｜>U<｜Assistant｜></think>"),
        ([USER], {"enable_thinking": False}, "[B]<｜User｜>U<｜Assistant｜></think>"),
        ([USER], {"reasoning_effort": "none"}, "[B]<｜User｜>U<｜Assistant｜></think>"),
        ([USER, ANSWER, NEXT], {}, "[B]<｜User｜>U<｜Assistant｜></think>A[E]<｜User｜>V<｜Assistant｜><think>"),
        (
            [USER, ANSWER, NEXT],
            {"drop_thinking": False},
            "[B]<｜User｜>U<｜Assistant｜><think>R</think>A[E]<｜User｜>V<｜Assistant｜><think>",
        ),
        ([USER, NEXT], {"reasoning_effort": "low"}, "[B]<｜User｜>U\n\nV<｜Assistant｜><think>"),
        (
            [USER, CALLS, *RESULTS],
            {},
            f"[B]<｜User｜>U<｜Assistant｜></think>{written_calls('tool_calls')}"
            "<｜User｜><tool_result>r0</tool_result>\n\n<tool_result>r1</tool_result><｜Assistant｜><think>",
        ),
    ],
)
def test_v4(render, messages, options, expected):
    assert render("deepseek-v4", messages, **options) == expected


def test_v4_with_tools_keeps_reasoning_and_sorts_results(render):
    expected = (
        f"[B]S\n\n{V4_TOOLS}<｜User｜>U<｜Assistant｜><think>R</think>{written_calls('tool_calls')}<｜User｜>"
        "<tool_result>r0</tool_result>\n\n<tool_result>r1</tool_result>\n\nV<｜Assistant｜><think>"
    )
    assert render("deepseek-v4", [SYSTEM, USER, CALLS, *reversed(RESULTS), NEXT], tools=[TOOL]) == expected
    assert render("deepseek-v4", [USER], tools=[TOOL]) == f"[B]\n\n{V4_TOOLS}<｜User｜>U<｜Assistant｜><think>"


def test_v4_efforts_begin_the_prompt(render):
    for effort, begin in (("high", "Absolute maximum with"), ("max", "Beyond maximum —")):
        text = render("deepseek-v4", [SYSTEM, USER], reasoning_effort=effort)
        assert text.startswith(f"[B]Reasoning Effort: {begin}") and text.endswith(".\n\nS<｜User｜>U<｜Assistant｜><think>")


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        ([SYSTEM, USER], {}, "[B]S<｜User｜>U<｜Assistant｜></think>"),
        (
            [USER, ANSWER, NEXT],
            {"thinking": True},
            "[B]<｜User｜>U<｜Assistant｜></think>A[E]<｜User｜>V<｜Assistant｜><think>",
        ),
        (
            [USER, CALLS, *RESULTS],
            {"thinking": True},
            f"[B]<｜User｜>U<｜Assistant｜><think>R</think>{written_calls('function_calls')}\n\n<function_results>\n"
            "<result>r0</result>\n<result>r1</result>\n</function_results>\n\n<think>",
        ),
    ],
)
def test_v32(render, messages, options, expected):
    assert render("deepseek-v3.2", messages, **options) == expected


def test_v32_with_tools(render):
    text = render("deepseek-v3.2", [SYSTEM, USER], tools=[TOOL])
    assert text.startswith("[B]S\n\n## Tools\nYou have access") and text.endswith(
        f"{V32_TOOLS_END}<｜User｜>U<｜Assistant｜></think>"
    )


@pytest.mark.parametrize("name", ["deepseek-v3.2", "deepseek-v4"])
def test_no_start_of_an_answer_unless_asked(render, name):
    assert render(name, [USER, ANSWER, NEXT], add_generation_prompt=False).endswith("<｜User｜>V")


@pytest.mark.parametrize(("name", "parser"), [("deepseek-v3.2", "dsml"), ("deepseek-v4", "dsml_v4")])
def test_calls_are_parsed_in_the_format_of_the_template(name, parser):
    assert formats.detect(read_template(name)).name == parser


def test_checkpoints_without_a_template_get_the_published_one(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "m")
    for file in (tmp_path / "m").glob("*.jinja"):
        file.unlink()
    path = tmp_path / "m" / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    fields.pop("chat_template", None)
    path.write_text(json.dumps(fields))
    checkpoint = open_checkpoint(tmp_path / "m")
    config = checkpoint.config()
    assert load_tokenizer(checkpoint).chat_template is None
    checkpoint.config = lambda: {**config, "model_type": "deepseek_v32"}
    assert load_tokenizer(checkpoint).chat_template == read_template("deepseek-v3.2")
