"""lm-eval: log likelihoods and texts through the server equal those of Transformers' model."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from deepseek_optimizer import load_model
from deepseek_optimizer.serving import make_async_engine
from support.live_server import LiveServer

QUESTIONS = [
    {"question": f"Question {n}: which of these follows?", "choices": ["red", "a green one", "blue"], "answer": n % 3}
    for n in range(6)
]
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}, cache_dir: {cache}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}, cache_dir: {cache}}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{{{question}}}} {{{{question}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
GENERATION = """
task: generation
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}, cache_dir: {cache}}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "red"
generation_kwargs: {{until: ["zzz"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
TASKS = {"choice": CHOICE, "rolling": ROLLING, "generation": GENERATION}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), encoding="utf-8")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.format(data=data, cache=folder / "cache"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def evaluate(tasks):
    """evaluate(model, args) -> the responses to each task's samples, in order."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    def run(model, args):
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        result = lm_eval.simple_evaluate(
            model=model, model_args=args, tasks=list(TASKS), task_manager=manager, batch_size=4, device="cpu", bootstrap_iters=0
        )
        samples = {name: sorted(result["samples"][name], key=lambda sample: sample["doc_id"]) for name in TASKS}
        return {name: [sample["resps"] for sample in of] for name, of in samples.items()}

    return run


@pytest.fixture(scope="module")
def of_transformers(evaluate, tiny_model):
    return evaluate("hf", {"pretrained": str(tiny_model), "dtype": "float32", "max_length": 200})


@pytest.mark.parametrize("tokenized", [True, False])
def test_log_likelihoods_and_texts_equal_transformers(evaluate, of_transformers, tiny_model, tokenized):
    engine = make_async_engine(
        load_model(tiny_model, precision="fp32", kv_cache_memory=1 << 24), AutoTokenizer.from_pretrained(tiny_model)
    )
    with LiveServer(engine) as live:
        args = {
            "base_url": f"{live.url}/v1/completions", "model": engine.model_name, "tokenizer": str(tiny_model),
            "tokenizer_backend": "huggingface", "tokenized_requests": tokenized, "max_length": 200, "num_concurrent": 2,
        }  # fmt: skip
        actual = evaluate("local-completions", args)
    for ours, theirs in zip(actual["choice"], of_transformers["choice"], strict=True):
        for (mine,), (right,) in zip(ours, theirs, strict=True):
            assert mine[0] == pytest.approx(right[0], abs=1e-4) and mine[1] == right[1]
    for ours, theirs in zip(actual["rolling"], of_transformers["rolling"], strict=True):
        assert ours[0][0] == pytest.approx(theirs[0][0], abs=1e-3)  # a sum of about 80 log probabilities
    assert actual["generation"] == of_transformers["generation"]
