"""Tests of vLLM's server that do not pass on `dso serve`."""

from __future__ import annotations

from .deviations import Deviation

_ENTRY = r"tests/entrypoints/"
_OPENAI = rf"{_ENTRY}openai/"
_CHAT = rf"{_OPENAI}chat_completion/"
_TEXT = rf"{_OPENAI}completion/"
_POOLING = rf"{_ENTRY}pooling/"
_CROSS = rf"{_POOLING}scoring/test_cross_encoder_online\.py"
_NO_REASONING = r"len\(\[\]\)|no attribute 'reasoning'|None is not None"
_MEDIA = "images, audio and video, which need models of another kind"
_CLASSES = "calls classes of vLLM"
_TEXTS = "what the named model writes, or how many tokens it takes"
_ERRORS = "the words of an error"

VLLM: tuple[Deviation, ...] = (
    Deviation(
        "internal", _CLASSES, r".*::.*", error="PeerClassError|Mock object|Expected a BaseException type, but got 'Named'"
    ),
    Deviation("internal", _CLASSES, rf"{_CHAT}test_(serving_chat|batched_chat_completions)\.py"),
    Deviation("internal", _CLASSES, rf"{_ENTRY}unit_tests/.*\.py"),
    Deviation("internal", "processes of vLLM: several API servers, their shutdown", rf"{_ENTRY}launchers/.*\.py"),
    Deviation("internal", "requests that a tool draws from vLLM's own schema", rf"{_OPENAI}test_openai_schema\.py"),
    Deviation("extension", _MEDIA, rf"{_ENTRY}(multimodal|speech_to_text)/.*\.py"),
    Deviation("extension", _MEDIA, rf"{_ENTRY}.*_(vision|vlm)\.py"),
    Deviation("extension", "prefill and decoding on different servers", rf"{_ENTRY}scale_out/.*\.py"),
    Deviation("extension", "prefill and decoding on different servers", rf"{_CHAT}.*::test_kv_transfer_.*"),
    Deviation("extension", "training by reinforcement: weights and experts", rf"{_ENTRY}rl/(?!state).*\.py"),
    Deviation("extension", "routes and variables of Amazon SageMaker", rf"{_ENTRY}serve/sagemaker/.*\.py"),
    Deviation("extension", "routes and variables of Amazon SageMaker", r".*::test_invocations.*"),
    Deviation("extension", "calls of functions in vLLM's workers", rf"{_ENTRY}serve/dev/rpc/.*\.py"),
    Deviation("extension", "Cohere's API", rf"{_ENTRY}(cohere/.*|pooling/embed/test_cohere_.*)\.py"),
    Deviation("extension", "vLLM's routes for decisions of a language model", rf"{_ENTRY}(generate|openai/decisions)/.*\.py"),
    Deviation("extension", "tools that the server itself runs", rf"{_OPENAI}responses/test_(harmony|mcp_\w+|parsable_\w+)\.py"),
    Deviation("extension", "vectors per token, rewards, late interaction", rf"{_POOLING}(token_.*|reward/.*|.*_late_.*)\.py"),
    Deviation("extension", "embeddings of prompts in place of tokens", rf"{_OPENAI}.*_with_prompt_embeds\.py"),
    Deviation("extension", "embeddings of prompts in place of tokens", rf"{_TEXT}.*::test_disable_prompt_embeds.*"),
    Deviation("extension", "CoreWeave's tensorizer", rf"{_TEXT}test_tensorizer_entrypoint\.py"),
    Deviation("extension", "a Unix domain socket", rf"{_ENTRY}serve/instrumentator/test_uds\.py"),
    Deviation("extension", "ORCA's header with the load", rf"{_ENTRY}serve/instrumentator/test_orca_metrics\.py"),
    Deviation("extension", "ASGI middleware of the user", rf"{_ENTRY}serve/middleware/test_optional_middleware\.py"),
    Deviation("extension", "timings of a request in its answer", rf"{_CHAT}.*::test_per_request_metrics_.*"),
    Deviation("extension", "watermarks in texts", r".*", error="--watermark-config"),
    Deviation("extension", "a budget of tokens for reasoning", r".*", error="--reasoning-config"),
    Deviation(
        "extension", "log probabilities of chosen token ids, or of all", r".*::test_(logprob_token_ids|\w+_token_ids_).*"
    ),
    Deviation(
        "extension", "log probabilities of chosen token ids, or of all", rf"{_CHAT}test_chat_echo\.py::test_\w+_logprobs"
    ),
    Deviation("extension", "a usage that the server adds unasked", r".*", error="--enable-force-include-usage"),
    Deviation("extension", "truncation of the prompt by the server", rf"{_TEXT}.*::test_\w+_truncation_\w+.*"),
    Deviation("model", "scores of a real model in a benchmark", rf"{_ENTRY}.*(correctness|_mteb).*\.py"),
    Deviation("model", "tools called by models of several billion weights", rf"{_ENTRY}tool_parsers/.*\.py"),
    Deviation("model", "the chat template of a translation model", rf"{_CHAT}test_extra_content_fields\.py"),
    Deviation("model", _TEXTS, rf"{_CHAT}test_chat\.py::test_(single_chat_session|more_than_one_prompt_logprobs)\w*.*"),
    Deviation("model", _TEXTS, rf"{_CHAT}test_chat\.py::test_(structured_outputs_regex_chat|complex_message_content)"),
    Deviation("model", _TEXTS, rf"{_CHAT}test_chat_echo\.py::test_chat_session_with_echo_and_continue.*"),
    Deviation("model", _TEXTS, rf"{_TEXT}test_completion\.py::test_(completion_streaming|parallel_\w+)\[.*"),
    Deviation("model", "reasoning by a model that has learned it", rf"{_CHAT}test_include_reasoning\.py::(?!.*false).*"),
    Deviation("differs", "fields that a request did not ask for are left out", r".*", error="no attribute 'prompt_logprobs'"),
    Deviation(
        "differs", "the last chunk has no text, as with OpenAI", rf"{_CHAT}test_chat\.py::test_chat_(streaming|completion_s).*"
    ),
    Deviation("model", "reasoning by a model that has learned it", rf"{_CHAT}.*::test_function_.*", error=_NO_REASONING),
    Deviation("internal", "compares with the suite's own runner of models", rf"{_POOLING}.*", error="fixture 'hf_runner'"),
    Deviation(
        "model",
        "scores of a trained reranker",
        rf"{_CROSS}::test_(basic|rerank_api_t.*)",
    ),
    Deviation(
        "differs",
        _ERRORS,
        rf"{_CROSS}::test_(\w+_max_\w+|pooling_not_\w+)(\[(?!embed).*)?",
    ),
    Deviation("differs", "roles that OpenAI does not have are refused", rf"{_CHAT}test_chat\.py::test_custom_role"),
    Deviation("differs", _ERRORS, rf"{_CHAT}test_chat\.py::test_long_seed"),
    Deviation("differs", _ERRORS, rf"{_CHAT}.*::test_chat_logit_bias_multiple_non_integer_keys"),
    Deviation("differs", _ERRORS, rf"{_TEXT}test_prompt_validation\.py::test_(empty_prompt|out_of_vocab_token_ids)"),
    Deviation("differs", "logprobs: 0 reports no alternatives", rf"{_TEXT}.*::test_(zero_logprobs|echo_logprob_\w+\[0).*"),
)
