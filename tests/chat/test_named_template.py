"""Templates that a user names: those of this package render as their models were trained, and files are checked."""

from __future__ import annotations

import pytest

from deepseek_optimizer.chat.named_template import read_template, template_names, use_template
from deepseek_optimizer.chat.template import ChatTemplate
from deepseek_optimizer.errors import ConfigError

SYSTEM, USER = {"role": "system", "content": "S"}, {"role": "user", "content": "U"}
CHAT = [SYSTEM, USER, {"role": "assistant", "content": "A"}, {"role": "user", "content": "V"}]
# As the templates of the models' checkpoints render CHAT; [B] and [E] are the tokens that begin and end a text.
RENDERED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
    "llama2": "[B][INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A [E][B][INST] V [/INST]",
    "llama3": "[B]<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "deepseek-v2": "[B]S\n\nUser: U\n\nAssistant: A[E]User: V\n\nAssistant:",
    "deepseek-v3": "[B]S<｜User｜>U<｜Assistant｜>A[E]<｜User｜>V<｜Assistant｜>",
    "mistral": "[B][INST] S\n\nU [/INST]A[E][INST] V [/INST]",
    "gemma": "[B]<start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
    "<start_of_turn>user\nV<end_of_turn>\n<start_of_turn>model\n",
    "phi3": "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\nA<|end|>\n<|user|>\nV<|end|>\n<|assistant|>\n",
    "zephyr": "<|system|>\nS[E]\n<|user|>\nU[E]\n<|assistant|>\nA[E]\n<|user|>\nV[E]\n<|assistant|>\n",
    "vicuna": "[B]S USER: U ASSISTANT: A[E]USER: V ASSISTANT:",
}


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    import copy

    made = copy.deepcopy(byte_tokenizer)
    made.add_special_tokens({"bos_token": "[B]", "eos_token": "[E]"})
    return made


@pytest.fixture(scope="module")
def template(tokenizer):
    made = ChatTemplate(tokenizer)
    yield made
    made.close()


def test_every_template_has_a_rendering():
    assert sorted([*RENDERED, "deepseek-v3.2", "deepseek-v4"]) == template_names()  # those two: test_deepseek_prompts.py


@pytest.mark.parametrize("name", RENDERED)
def test_templates_render_as_those_of_the_checkpoints(tokenizer, template, name):
    tokenizer.chat_template = read_template(name)
    assert template.render(CHAT).text == RENDERED[name]
    assert "U" in template.render([USER]).text
    assert template.knows_system() and not template.knows_tools()
    assert "A" in template.render(CHAT[:3], add_generation_prompt=False).text


def test_files(tmp_path, tokenizer):
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    for name in ("chatml", str(path)):
        use_template(tokenizer, read_template(name))
    assert "<x>" in tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "not UTF-8"),
        (b"x" * (1 << 21), "larger"),
        (b"{% for %}", "rejects"),
        (b"{{ raise_exception('no') }}", "no"),
        (b"fixed text", "does not render messages"),
    ],
)
def test_files_that_are_no_templates(tmp_path, tokenizer, content, message):
    path = tmp_path / "bad.jinja"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"--chat-template: .*{message}"):
        use_template(tokenizer, read_template(str(path)))


def test_unknown_names():
    with pytest.raises(ConfigError, match="there is no file 'nothing'; give a file, or one of chatml"):
        read_template("nothing")
