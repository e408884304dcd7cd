"""Tests of vLLM's server that do not pass on `dso serve`."""

from __future__ import annotations

from .deviations import Deviation

_ENTRY = r"tests/entrypoints/"
_OPENAI = rf"{_ENTRY}openai/"
_CHAT = rf"{_OPENAI}chat_completion/"
_TEXT = rf"{_OPENAI}completion/"
_POOLING = rf"{_ENTRY}pooling/"
_SCORES = rf"{_POOLING}scoring/"
_LORA = rf"{_ENTRY}serve/lora/test_lora_adapters\.py"
_ANTHROPIC = rf"{_ENTRY}anthropic/test_messages\.py"
_RESPONSES = rf"{_OPENAI}responses/"
_NO_REASONING = r"len\(\[\]\)|no attribute 'reasoning'|None is not None|'message' == 'reasoning'|reasoning_tokens|assert 0 > 0"
_MEDIA = "images, audio and video, which need models of another kind"
_CLASSES = "calls classes of vLLM"
_TEXTS = "what the named model writes, or how many tokens it takes"
_ERRORS = "the words of an error"
_REASONING = "reasoning by a model that has learned it"
_TASKS = "vectors per token, rewards, late interaction"

VLLM: tuple[Deviation, ...] = (
    Deviation(
        "internal", _CLASSES, r".*::.*", error="PeerClassError|Mock object|Expected a BaseException type, but got 'Named'"
    ),
    Deviation("internal", "variables of vLLM", r".*::test_show_version", error="rust_frontend_version"),
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
    Deviation("extension", _TASKS, rf"{_POOLING}(token_.*|reward/.*|.*_late_.*)\.py"),
    Deviation("extension", "embeddings of prompts in place of tokens", rf"{_OPENAI}.*_with_prompt_embeds\.py"),
    Deviation("extension", "embeddings of prompts in place of tokens", rf"{_TEXT}.*::test_disable_prompt_embeds.*"),
    Deviation("extension", "CoreWeave's tensorizer", rf"{_TEXT}test_tensorizer_entrypoint\.py"),
    Deviation("extension", "a Unix domain socket", rf"{_ENTRY}serve/instrumentator/test_uds\.py"),
    Deviation("extension", "ORCA's header with the load", rf"{_ENTRY}serve/instrumentator/test_orca_metrics\.py"),
    Deviation("extension", "ASGI middleware of the user", rf"{_ENTRY}serve/middleware/test_optional_middleware\.py"),
    Deviation("extension", "timings of a request in its answer", rf"{_CHAT}.*::test_per_request_metrics_.*"),
    Deviation(
        "extension", "metrics of vLLM's cache of pictures", r".*test_metrics\.py::.*multimodal\]", error="reads text only"
    ),
    Deviation("extension", "token ids in all log probabilities", r".*", error="--return-tokens-as-token-ids"),
    Deviation("extension", "watermarks in texts", r".*", error="--watermark-config"),
    Deviation("extension", "a budget of tokens for reasoning", r".*", error="--reasoning-config"),
    Deviation(
        "extension", "log probabilities of chosen token ids, or of all", r".*::test_logprob_token_ids(?!_default).*", error="."
    ),
    Deviation(
        "extension", "log probabilities of chosen token ids, or of all", rf"{_CHAT}test_chat_echo\.py::test_\w+_logprobs"
    ),
    Deviation("extension", "a usage that the server adds unasked", r".*", error="--enable-force-include-usage"),
    Deviation("extension", _TASKS, rf"{_POOLING}.*::test_pooling_not_supported\[(token_|plugin).*"),
    Deviation("extension", "chats as input of embeddings and classes", rf"{_POOLING}.*::test_chat_request.*"),
    Deviation("extension", "numbers of a vector in other types than float32", rf"{_POOLING}.*\[(embed_dtype|endianness)-.*"),
    Deviation("extension", "padding of texts to embed", rf"{_POOLING}embed/test_online\.py::test_padding.*"),
    Deviation("extension", "long texts embedded in parts", rf"{_POOLING}embed/test_online_long_text\.py"),
    Deviation(
        "extension", "embeddings of prompts in place of tokens", rf"{_TEXT}test_prompt_validation\.py::test_empty_prompt"
    ),
    Deviation("extension", "token ids of messages in responses", rf"{_RESPONSES}.*::test_enable_response_messages.*"),
    Deviation("extension", "tools in namespaces", rf"{_RESPONSES}test_namespace_tool_separator\.py"),
    Deviation("model", "scores of a real model in a benchmark", rf"{_ENTRY}.*(correctness|_mteb).*\.py"),
    Deviation("model", "tools called by models of several billion weights", rf"{_ENTRY}tool_parsers/.*\.py"),
    Deviation("model", "the chat template of a translation model", rf"{_CHAT}test_extra_content_fields\.py"),
    Deviation("model", _TEXTS, rf"{_CHAT}test_chat\.py::test_single_chat_session.*", error="CompletionUsa"),
    Deviation("model", _TEXTS, rf"{_CHAT}test_chat\.py::test_more_than_one_prompt_logprobs.*", error="2 == 1"),
    Deviation(
        "model",
        _TEXTS,
        rf"{_CHAT}test_chat\.py::test_structured_outputs_(choice|regex|json).*",
        error="JSONDecodeError|!= '",
    ),
    Deviation("model", _TEXTS, rf"{_CHAT}test_chat\.py::test_complex_message_content", error="== '2'"),
    Deviation("model", _TEXTS, rf"{_CHAT}test_comp.*::test_named_tool_use", error="JSONDecodeError"),
    Deviation("extension", "the continued message in an answer", rf"{_CHAT}.*::test_chat_session_with_echo.*", error="keeps'"),
    Deviation("model", _TEXTS, rf"{_TEXT}test_completion\.py::test_completion_streaming\[.*", error="'stop' == 'length'"),
    Deviation("model", _TEXTS, rf"{_TEXT}test_completion\.py::test_parallel_\w+\[.*", error="unique completions"),
    Deviation("model", _TEXTS, rf"{_OPENAI}test_return_token_ids\.py::.*", error="(starts|ends)with"),
    Deviation(
        "model", _TEXTS, rf"{_ANTHROPIC}::test_anthropic_(tool_call|structured_output)", error="== 'tool_use'|JSONDecodeError"
    ),
    Deviation("model", _TEXTS, rf"{_RESPONSES}test_stateful\.py::test_(previous|two)_.*", error="'(Mark|John)' (not )?in "),
    Deviation(
        "model", _TEXTS, rf"{_RESPONSES}test_basic\.py::test_(simple_input|instructions|chat)", error="'(312|30|QED)' in "
    ),
    Deviation("model", _TEXTS, rf"{_RESPONSES}test_function_call\.py::.*expected_arguments.*", error=">= 2"),
    Deviation(
        "model",
        "whether the named model calls a tool unasked",
        rf"{_RESPONSES}test_function_call\.py::.*_forced_tool_choice\[auto.*",
        error="None is not None",
    ),
    Deviation("model", _REASONING, rf"{_RESPONSES}test_function_call\.py::test_function_tool_use.*", error="None is not None"),
    Deviation("model", _TEXTS, rf"{_LORA}::.*replaces_inplace.*", error="Meow Meow Meow"),
    Deviation("model", _REASONING, rf"{_CHAT}test_include_reasoning\.py::.*", error="."),
    Deviation("model", _REASONING, rf"{_CHAT}.*::test_function_.*", error=_NO_REASONING),
    Deviation("model", _REASONING, rf"{_RESPONSES}.*::test_.*reasoning.*", error=_NO_REASONING),
    Deviation("model", "scores of a trained reranker", rf"{_SCORES}test_cross.*::test_rerank_api_t.*", error="relevance_score"),
    Deviation(
        "differs",
        "a response cut off by the limit of its tokens ends with response.incomplete, as with OpenAI",
        rf"{_RESPONSES}test_function_call\.py::test_function_calling_with_streaming_types\[.*",
        error=r"\['response\.created'\]",
    ),
    Deviation("differs", "dimensions may be any number up to the model's", rf"{_POOLING}.*::test_matryoshka.*"),
    Deviation(
        "differs",
        "the last chunk has no text, as with OpenAI and llama-server",
        rf"{_CHAT}test_chat\.py::test_chat_streaming.*",
    ),
    Deviation(
        "differs",
        "the most likely token comes first in top_logprobs, and a text ends with a whole character",
        rf"{_OPENAI}test_return_tokens_as_ids\.py::.*\[False\]",
    ),
    Deviation("differs", "roles that OpenAI does not have are refused", rf"{_CHAT}test_chat\.py::test_custom_role"),
    Deviation("differs", _ERRORS, rf"{_CHAT}test_chat\.py::test_long_seed"),
    Deviation("differs", _ERRORS, rf"{_POOLING}.*::test_pooling_not_supported\[(classify|embed).*"),
    Deviation("differs", _ERRORS, rf"{_POOLING}.*::test_(bigger_truncation_size|rerank_max_tokens_per_doc_validation)"),
    Deviation("differs", _ERRORS, rf"{_POOLING}embed/.*::test_(negative_token_ids|params_not_supported\[encoding_format).*"),
    Deviation("differs", _ERRORS, rf"{_POOLING}classify/.*::test_(score|rerank)\[.*"),
    Deviation("differs", "an adapter that cannot be used is status 400, not 500", rf"{_LORA}::test_dynamic_lora_(inv|bad).*"),
    Deviation(
        "differs",
        "an adapter that cannot be used is status 400, not 500",
        rf"{_LORA}::test_loading_invalid_.*",
        endless=True,
    ),
    Deviation(
        "differs",
        "message_start counts cached tokens apart, as Anthropic's API does",
        rf"{_ANTHROPIC}::test_anthropic_streaming(_cache_usage)?",
    ),
    Deviation(
        "differs",
        "the answer has llama-server's field too",
        rf"{_ENTRY}serve/tokenize/test_tokenization\.py::test_detokenize.*",
    ),
    Deviation(
        "differs",
        "tools are described in the prompt if the template does not describe them",
        rf"{_ENTRY}serve/tokenize/test_tokenization\.py::test_tokenize_chat_with_tools.*",
    ),
)
