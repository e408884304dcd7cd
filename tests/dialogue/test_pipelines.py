"""The pipeline "conversational", through Transformers' own `pipeline`."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from deepseek_optimizer import CheckpointError, ConfigError, RequestError, load_model, load_tokenizer
from deepseek_optimizer.chat.conversation import prompt_tokens
from deepseek_optimizer.dialogue.pipelines import ConversationalPipeline
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from support import checkpoint_files as files

CONFIG = {"type": "deepseek_realtime", "max_length": 2048}
# An answer long enough to break out of.
LONG = {"min_new_tokens": 200, "temperature": 2.0, "seed": 1}


@pytest.fixture(scope="module")
def made(tiny_model):
    return pipeline("conversational", model=str(tiny_model), device="cpu", optimizer_config=CONFIG)


@pytest.fixture
def chat(made):
    made.system = None
    made.reset()
    return made


def test_registered_when_pipelines_are_imported_first_or_later():
    for lines in (
        "import transformers.pipelines; import deepseek_optimizer",
        "import deepseek_optimizer; from transformers import pipeline; import transformers.pipelines",
    ):
        code = (
            f"{lines}\nfrom transformers.pipelines import PIPELINE_REGISTRY as registry, pipeline\n"
            "import inspect\n"
            "assert registry.check_task('conversational')[1]['impl'].__name__ == 'ConversationalPipeline'\n"
            "assert 'def pipeline' in inspect.getsource(transformers.pipelines)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


def test_a_list_of_messages_by_default(chat):
    (first,) = chat("Hello", max_new_tokens=5)
    roles = [(m["role"], m["content"]) for m in first["generated_text"]]
    assert roles[0] == ("user", "Hello") and roles[1][0] == "assistant" and len(roles) == 2
    (second,) = chat("More", max_new_tokens=5)
    assert second["generated_text"][:2] == first["generated_text"] and len(second["generated_text"]) == 4
    assert second["generated_text"] == chat.messages
    chat.reset()
    assert chat.messages == []


def test_the_answer_equals_generate(chat, byte_tokenizer):
    tokens = prompt_tokens(byte_tokenizer, [{"role": "user", "content": "Hello"}])
    expected = chat.model.generate(torch.tensor([tokens]), max_new_tokens=9, do_sample=False)[0, len(tokens) :]
    answer = chat("Hello", max_new_tokens=9)[0]["generated_text"][-1]["content"]
    assert answer == byte_tokenizer.decode(expected, skip_special_tokens=True)


def test_streaming_yields_all_chunks_newest_last(chat):
    whole = chat("Hello", max_new_tokens=30, temperature=2.0, seed=3)[0]["generated_text"][-1]["content"]
    chat.reset()
    seen = list(chat("Hello", max_length=30, temperature=2.0, seed=3, stream_output=True))
    assert "".join(token["generated_text"][-1] for token in seen) == whole and len(seen) > 3
    assert [len(token["generated_text"]) for token in seen] == list(range(1, len(seen) + 1))
    assert chat.messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": whole}]


def test_breaking_out_of_a_stream_ends_the_answer_and_keeps_its_text(chat):
    steps = chat.engine.core.metrics.steps
    for token in chat("Hello", stream_output=True, **LONG):
        message = token["generated_text"]
        if len(message) == 3:
            break
    gc.collect()
    assert chat.engine.core.idle and chat.engine.core.metrics.steps - steps < 100
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(message)}


def test_a_new_message_ends_an_unfinished_answer(chat):
    first = chat("Hello", stream_output=True, **LONG)
    message = next(first)["generated_text"][0]
    chat("More", max_new_tokens=3)
    assert [m["content"] for m in chat.messages[:3]] == ["Hello", message, "More"] and len(chat.messages) == 4
    assert list(first) == []
    last = chat("Again", stream_output=True, **LONG)
    next(last)
    chat.reset()
    assert chat.messages == [] and list(last) == [] and chat.messages == []


def test_an_unread_stream_generates_nothing(chat):
    chat("Hello", stream_output=True)
    assert chat.messages == [] and chat.engine.core.idle


def test_messages_replace_the_conversation(chat):
    chat("Hello", max_new_tokens=2)
    given = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "me"}]
    (result,) = chat(given, max_new_tokens=2)
    assert [m["content"] for m in result["generated_text"][:2]] == ["Be brief.", "Hi"] and len(chat.messages) == 3
    assert chat.system == "Be brief."
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize(
    "messages", [[], ["Hello"], [[{"role": "user", "content": "Hi"}]], [{"role": "user"}], [{"role": "me", "content": "Hi"}],
    [{"role": "user", "content": 5}], [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], 5],
)  # fmt: skip
def test_invalid_messages(chat, messages):
    chat("Hello", max_new_tokens=2)
    before = chat.messages
    with pytest.raises(RequestError):
        chat(messages)
    assert chat.messages == before


def test_arguments_of_generation(chat):
    seeded = [chat([{"role": "user", "content": "Hi"}], max_new_tokens=20, temperature=2.0, seed=s)[0] for s in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    text = seeded[0]["generated_text"][-1]["content"]
    ended = chat([{"role": "user", "content": "Hi"}], max_new_tokens=20, temperature=2.0, seed=1, stop=text[2:4])[0]
    assert ended["generated_text"][-1]["content"] == text[: text.index(text[2:4])]
    for wrong in ({"temperatur": 1}, {"top_p": 2}, {"max_length": 0}, {"num_beams": 2}, {"stream_output": "yes"}):
        with pytest.raises(RequestError):
            chat("Hi", **wrong)


def test_defaults_for_all_calls(tiny_model):
    chat = pipeline(
        "conversational", model=str(tiny_model), device=-1, max_new_tokens=3, temperature=2.0, seed=1, system="Be brief."
    )
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert chat("Hi") != chat("Hi", seed=2)
    with pytest.raises(RequestError, match="did you mean 'temperature'"):
        pipeline("conversational", model=str(tiny_model), device="cpu", temperatur=1.0)


def test_a_conversation_longer_than_max_length_continues(tiny_model):
    chat = pipeline(
        "conversational", model=str(tiny_model), device="cpu", optimizer_config={**CONFIG, "max_length": 100}, system="S" * 10
    )
    with pytest.warns(OptimizerWarning, match="exceeds its maximum of 100 tokens"):
        for n in range(4):
            chat(f"{n}" * 30, max_new_tokens=8, min_new_tokens=8)
    assert chat.dropped and len(chat.turns) == 8 and chat.engine.core.metrics.prompt_tokens < 400
    with pytest.raises(RequestError, match="leave no room in the model's context of 100"):
        chat("x" * 100)
    assert len(chat.turns) == 8


def test_a_gguf_file(tmp_path, byte_tokenizer, monkeypatch):
    tokens = sorted(byte_tokenizer.get_vocab(), key=byte_tokenizer.get_vocab().get)
    monkeypatch.setattr(files, "VOCAB", len(tokens))
    values = files.model_values(
        tokenizer__ggml__model=(files.STRING, "gpt2"),
        tokenizer__ggml__tokens=(files.ARRAY, (files.STRING, tokens)),
        tokenizer__ggml__token_type=(files.ARRAY, (files.I32, [1] * 256 + [3] * (len(tokens) - 256))),
        tokenizer__ggml__merges=(files.ARRAY, (files.STRING, [])),
        tokenizer__chat_template=(files.STRING, byte_tokenizer.chat_template),
    )
    path = tmp_path / "m.gguf"
    path.write_bytes(files.gguf_bytes(values, files.model_tensors()))
    for chat in (
        ConversationalPipeline(path, optimizer_config=CONFIG),
        pipeline("conversational", model=load_model(path), device="cpu"),
        pipeline("conversational", model=str(path.parent), device="cpu", model_kwargs={"gguf_file": path.name}),
    ):
        assert len(chat("Hi", max_new_tokens=2)[0]["generated_text"]) == 2


def test_weights_are_packed_as_they_stream_in(tiny_model):
    chat = pipeline("conversational", model=str(tiny_model), device="cpu", optimizer_config={**CONFIG, "precision": "int8"})
    assert {row.format for row in chat.model.report().formats} == {"int8"}
    lower = pipeline("conversational", model=str(tiny_model), device="cpu", dtype=torch.bfloat16)
    assert {row.format for row in lower.model.report().formats} == {"bf16"}


def test_a_plain_model_is_optimized_in_place(tiny_model):
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    chat = pipeline("conversational", model=plain, device="cpu", optimizer_config={**CONFIG, "precision": "int4"})
    assert chat.model is plain and "int4" in {row.format for row in plain.report().formats}
    assert len(chat("Hi", max_new_tokens=2)[0]["generated_text"]) == 2


def test_an_optimized_model_is_used_unchanged(tiny_model):
    model = load_model(tiny_model)
    assert pipeline("conversational", model=model, device="cpu", optimizer_config=CONFIG).model is model
    with pytest.raises(ConfigError, match="optimized already; pass precision to load_model"):
        pipeline("conversational", model=model, device="cpu", optimizer_config={"precision": "int8"})


def test_the_tokenizer(tiny_model, tmp_path, byte_tokenizer):
    byte_tokenizer.save_pretrained(tmp_path / "alone")
    model = load_model(tiny_model)
    for given in (byte_tokenizer, str(tmp_path / "alone")):
        chat = pipeline("conversational", model=model, tokenizer=given, device="cpu")
        assert chat.tokenizer.get_vocab() == byte_tokenizer.get_vocab()
    with pytest.raises(ConfigError, match="no tokenizer at .*nowhere"):
        pipeline("conversational", model=model, tokenizer=str(tmp_path / "nowhere"), device="cpu")
    model.config._name_or_path = ""
    with pytest.raises(ConfigError, match="must be given: tokenizer="):
        pipeline("conversational", model=model, device="cpu")
    bare = load_tokenizer(tiny_model)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        pipeline("conversational", model=model, tokenizer=bare, device="cpu")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "deepseek_batch"}, "type must be 'deepseek_realtime'"),
        ({"stream_ouput": True}, "no key 'stream_ouput'; did you mean 'stream_output'"),
        ({"precison": "int8"}, "did you mean 'precision'"),
        ({"modules": {}}, "no key 'modules'"),
        ({"precision": "int5"}, "precision must be one of"),
        ({"max_length": 0}, "max_length must be"),
        ({"max_length": True}, "max_length must be"),
        ({"stream_output": 1}, "stream_output must be True or False"),
        ("deepseek_realtime", "must be a dict"),
    ],
)
def test_a_wrong_optimizer_config(tiny_model, config, message):
    with pytest.raises(ConfigError, match=message):
        pipeline("conversational", model=str(tiny_model), device="cpu", optimizer_config=config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", [0, "cuda", "cuda:1", "mps", "warp"])
def test_a_missing_device(tiny_model, device):
    with pytest.raises(ConfigError, match='use device="cpu"'):
        pipeline("conversational", model=str(tiny_model), device=device)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model_kwargs": {"attn_implementation": "eager"}}, "attn_implementation.* is not supported"),
        ({"model_kwargs": {"device_map": {"": 0}}}, "use device="),
        ({"dtype": torch.float16}, "float32 or bfloat16"),
    ],
)
def test_arguments_that_loading_rejects(tiny_model, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        pipeline("conversational", model=str(tiny_model), **kwargs)


def test_a_damaged_checkpoint_is_reported_once_without_a_fallback(tiny_model, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        pipeline("conversational", model=str(folder), device="cpu")


def test_saved_without_code_and_loaded_again(chat, tmp_path):
    chat.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    again = pipeline("conversational", model=str(tmp_path), device="cpu")
    assert again("Hi", max_new_tokens=4) == chat("Hi", max_new_tokens=4)
