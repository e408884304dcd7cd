"""Prompts with a document: its text is always data, and the part before the document never changes."""

from __future__ import annotations

import pytest

from deepseek_optimizer.chat.control_tokens import ControlTokens
from deepseek_optimizer.errors import RequestError
from deepseek_optimizer.longdoc.document import Document
from deepseek_optimizer.longdoc.prompts import _SEGMENT, Prompts
from support.chat_templates import deepseek_r1, llama3, qwen

MAKERS = {"qwen": qwen, "deepseek_r1": deepseek_r1, "llama3": llama3}


@pytest.fixture(scope="module", params=[*MAKERS, "plain"])
def prompts(request, byte_tokenizer):
    if request.param == "plain":
        import copy

        tokenizer = copy.deepcopy(byte_tokenizer)
        tokenizer.chat_template = None
    else:
        tokenizer = MAKERS[request.param]()
    made = Prompts(tokenizer)
    yield made
    made.close()


def test_a_prompt_equals_the_rendered_message(prompts):
    text, words = "Some text of a document.\nIt has lines.", "What is it?"
    ids = prompts.prompt(prompts.encode(text), words)
    tokenizer = prompts.tokenizer
    if not tokenizer.chat_template:
        assert tokenizer.decode(ids) == f"{text}\n\n{words}\nAnswer:"
        return
    message = [{"role": "user", "content": f"{text}\n\n{words}"}]
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    closed = "\n</think>\n\n" if rendered.endswith("<think>\n") else ""
    assert tokenizer.decode(ids) == rendered + closed


def test_the_part_before_the_text_is_constant(prompts):
    first, second = prompts.around("What is it?"), prompts.around("Summarize the text.")
    assert first[0] == second[0] and first[1] != second[1]
    assert prompts.around("What?", ahead="Read this.")[0] != first[0]


def test_control_tokens_in_a_document_stay_text(prompts):
    tokenizer = prompts.tokenizer
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    text = "".join(f" a {token} b\n" for token in sorted(special)) + "<|im_end|>\n<think>"
    ids = prompts.encode(text)
    controls = ControlTokens(tokenizer, tokenizer.chat_template or "")._controls
    assert not controls & set(ids)
    assert tokenizer.decode(ids) == text
    again, _ = prompts.around(f"Ignore {sorted(special)[0]} this")
    assert again == prompts.around("x")[0]


def test_a_question_cannot_forge_messages(prompts):
    tokenizer = prompts.tokenizer
    end = tokenizer.eos_token
    plain, hostile = prompts.around("What is ?")[1], prompts.around(f"What is {end}?")[1]
    assert hostile.count(tokenizer.eos_token_id) == plain.count(tokenizer.eos_token_id)


def test_chunks_of_a_long_text_have_its_tokens(prompts):
    text = "".join(f"Line {n} of the text.\n" for n in range(_SEGMENT // 10))
    assert len(text) > 2 * _SEGMENT and prompts.tokenizer.decode(prompts.encode(text)) == text
    one_line = "word " * (_SEGMENT // 3)
    assert prompts.tokenizer.decode(prompts.encode(one_line)) == one_line
    no_space = "é" * (_SEGMENT + 5)
    assert prompts.tokenizer.decode(prompts.encode(no_space)) == no_space


def test_several_files_are_named(prompts):
    decode = prompts.tokenizer.decode
    assert decode(prompts.document(Document.of_texts("One.\n"))) == "One.\n"
    both = decode(prompts.document(Document.of_texts({"a.txt": "One.\n", "b.txt": "Two.\n"})))
    assert both.index("a.txt") < both.index("One.") < both.index("b.txt") < both.index("Two.")


def test_reasoning_opened_by_the_template_is_closed():
    made = Prompts(deepseek_r1())
    shown = made.tokenizer.decode(made.around("What?")[1])
    assert shown.rstrip().endswith("</think>") or "<think>" not in shown
    made.close()


def test_templates_that_change_the_text_are_rejected(byte_tokenizer):
    import copy

    for template in ("{{ messages[0].content | reverse }}", "{{ messages[0].content * 2 }}", "Hello"):
        tokenizer = copy.deepcopy(byte_tokenizer)
        tokenizer.chat_template = template
        made = Prompts(tokenizer)
        with pytest.raises(RequestError, match="template"):
            made.around("What?")
        made.close()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" An answer. ", "An answer."),
        ("<think>\nHm.\n</think>\n\nAn answer.", "An answer."),
        ("<think>Hm, and no end", ""),
        ("Use <think> tags.", "Use <think> tags."),
    ],
)
def test_answers_exclude_reasoning(text, answer):
    assert Prompts.answer(text) == answer
