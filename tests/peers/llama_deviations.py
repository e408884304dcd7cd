"""Tests of llama-server that do not pass on `dso serve`."""

from __future__ import annotations

from .deviations import Deviation

_IMAGES = "images, which need a vision model"
_OWN_TOOLS = "tools that the server itself runs (files, a shell, MCP servers)"
_PROXY = "a proxy for the web page's requests to MCP servers"
_WEIGHTS = "what the models of llama.cpp's tests write, or how many tokens they take"
_SLOTS = "slots of the KV cache, by number; here the cache of prefixes is shared"
_METRICS = "the names of llama-server's metrics"
_PROGRESS = "the progress and the timings of a request in its chunks"
_VERBOSE = "the prompt in the answer, by --verbose"
_LOCALHOST = "an origin of any port of this machine, by --cors-origins localhost"
_MIXED = "prompts of text mixed with tokens, or of objects"
_CHAT = r"unit/test_chat_completion\.py::"
_TEXT = r"unit/test_completion\.py::"
_EMBED = r"unit/test_embedding\.py::"

LLAMA_SERVER: tuple[Deviation, ...] = (
    Deviation("extension", _IMAGES, r"unit/test_vision_api\.py"),
    Deviation("extension", _IMAGES, r"unit/test_slot_save\.py::.*(image|mmproj|media|multimodal).*"),
    Deviation("extension", _IMAGES, r"unit/test_security\.py::test_local_media_file.*"),
    Deviation("extension", _IMAGES, r"unit/test_compat_anthropic\.py::.*vision_base64_with_multimodal.*"),
    Deviation("extension", _OWN_TOOLS, r"unit/test_(tools_builtin|mcp_servers)\.py"),
    Deviation("extension", _OWN_TOOLS, r"unit/test_security\.py::test_cors_origins_defaults_to_localhost_with_tools_enabled"),
    Deviation("extension", _PROXY, r"unit/test_proxy\.py"),
    Deviation("extension", _PROXY, r"unit/test_security\.py::test_cors_proxy_.*"),
    Deviation("extension", _LOCALHOST, r"unit/test_security\.py::test_cors_origins_localhost_.*"),
    Deviation("extension", "the request format of Google's Vertex AI", r"unit/test_compat_gcp\.py"),
    Deviation("extension", "streams that are resumed by a conversation's id", r"unit/test_stream\.py"),
    Deviation("extension", _SLOTS, r"unit/test_kv_keep_only_active\.py"),
    Deviation("extension", _SLOTS, r"unit/test_slot_save\.py::test_slot_(save_restore|restore_legacy_token_list|erase)"),
    Deviation("extension", _SLOTS, r"unit/test_basic\.py::test_server_slots"),
    Deviation("extension", _SLOTS, rf"{_TEXT}test_(cancel_request|completion_parallel_slots.*|completion_unified.*)"),
    Deviation("extension", _METRICS, r"unit/test_metrics\.py"),
    Deviation("extension", "sleep after a time without requests, by --sleep-idle-seconds", r"unit/test_sleep\.py"),
    Deviation("extension", "a process per model, with presets and downloads from a hub", r"unit/test_router\.py"),
    Deviation("extension", "drafts of a second model, and synthetic ones", r"unit/test_speculative\.py"),
    Deviation(
        "extension", "a shift of the context: --cache-window is ours", r"unit/test_ctx_shift\.py::test_ctx_shift_enabled"
    ),
    Deviation("extension", _PROGRESS, rf"{_CHAT}test_(return_progress.*|chat_completion_with_timings_per_token)"),
    Deviation("extension", _PROGRESS, r"unit/test_compat_oai_responses\.py::.*telemetry"),
    Deviation(
        "extension", _VERBOSE, rf"{_CHAT}test_(verbose_debug|chat_template|chat_template_assistant_prefill.*|\w+_vllm_compat)"
    ),
    Deviation("extension", "tags of a model", r"unit/test_basic\.py::test_server_model_aliases_and_tags"),
    Deviation("extension", "two addresses at once", r"unit/test_basic\.py::test_server_multiple_addresses"),
    Deviation("extension", "a server without its page", r"unit/test_basic\.py::test_no_ui"),
    Deviation("extension", "files of llama-server's own page", r"unit/test_security\.py::test_access_static_assets.*"),
    Deviation("extension", "choice of the fields of an answer", rf"{_TEXT}test_completion_response_fields.*"),
    Deviation("extension", "probabilities after sampling", rf"{_TEXT}test_n_probs_post_.*"),
    Deviation("extension", "one embedding per token, by --pooling none", rf"{_EMBED}test_embedding_pooling_none.*"),
    Deviation(
        "extension", _MIXED, rf"{_EMBED}test_embedding_(mixed_input\[input(3|5|7|8|9|10)-.*|content_text_same_as_string)"
    ),
    Deviation("extension", _MIXED, rf"{_TEXT}test_(json_prompt_no_mtmd|completion_with_tokens_input)"),
    Deviation("extension", "reasoning off for all requests, by --reasoning off", r".*", error="no equivalent to reasoning="),
    Deviation("extension", "reasoning off for all requests, by --reasoning off", r".*", error="KeyError: 'off'"),
    Deviation("extension", "a GGUF file in three parts", r"unit/test_basic\.py::test_load_split_model"),
    Deviation("extension", "the number of tokens of a chat", rf"{_CHAT}test_chat_completions_token_count"),
    Deviation("extension", "a chat template by the name command-r", rf"{_CHAT}test_apply_chat_template"),
    Deviation("extension", "biases of a request's end tokens in its answer", r"unit/test_ignore_eos\.py"),
    Deviation("extension", "biases of texts in place of tokens", rf"{_TEXT}test_logit_bias\[False-.*"),
    Deviation("model", _WEIGHTS, rf"{_TEXT}test_nocache_long_input_prompt"),
    Deviation("model", _WEIGHTS, r"unit/test_lora\.py"),
    Deviation("model", _WEIGHTS, r"unit/test_ctx_shift\.py::test_ctx_shift_disabled_(short|long)_prompt.*"),
    Deviation("model", "a model that fills gaps", r"unit/test_infill\.py::test_infill_.*"),
    Deviation("model", "a model in a GGUF file, by its name", r"unit/test_basic\.py::test_server_props"),
    Deviation("model", _WEIGHTS, r"unit/test_rerank\.py::test_(rerank|rerank_tei_format|rerank_usage.*)"),
    Deviation("model", _WEIGHTS, rf"{_EMBED}test_embedding_usage_multiple"),
    Deviation("model", _WEIGHTS, rf"{_CHAT}test_chat_completion_cached_tokens"),
    Deviation("model", _WEIGHTS, rf"{_TEXT}test_completion_prompt_cache"),
    Deviation("model", _WEIGHTS, r"unit/test_tokenize\.py::test_tokenize_with_bos"),
    Deviation("differs", "the first chunk has an empty text, as with OpenAI", rf"{_CHAT}.*stream.*", error="assert '' is None"),
    Deviation("differs", "OpenAI's type of the error", rf"{_CHAT}test_context_size_exceeded.*"),
    Deviation("differs", "an empty text has no embedding", rf"{_EMBED}test_embedding_mixed_input\[-False\]"),
    Deviation("differs", "the words of an error", rf"{_EMBED}test_embedding_error_prompt_too_long"),
    Deviation(
        "differs", "GBNF and schemas bound white space", rf"{_CHAT}test_completion_with_response_format\[response_format1.*"
    ),
    Deviation("differs", "a template without messages is refused", rf"{_CHAT}test_chat_completion\[.*not a chat template.*"),
    Deviation("differs", "names of headers in lower case, and * for origins", r"unit/test_security\.py::test_cors_options.*"),
    Deviation("differs", "/completions is /v1/completions", r"unit/test_security\.py::test_correct_api_key.*"),
    Deviation("differs", "status 400 for images", r"unit/test_compat_anthropic\.py::.*(with_image|vision_format).*"),
    Deviation("differs", "a chat has messages", r"unit/test_compat_anthropic\.py::test_anthropic_empty_messages"),
    Deviation("differs", "prompt and max_tokens must fit the context", r"unit/test_ctx_shift\.py::test_\w+_stream"),
    Deviation("differs", "an answer may follow an answer", rf"{_CHAT}test_invalid_chat_completion_req\[messages7\]"),
)
