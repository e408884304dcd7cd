"""Tests of llama-server that do not pass on `dso serve`."""

from __future__ import annotations

from .deviations import Deviation

_RAW_PICTURES = "pictures in prompts that are not chats, and embeddings of pictures"
_OWN_TOOLS = "tools that the server itself runs (files, a shell, MCP servers)"
_PROXY = "a proxy for the web page's requests to MCP servers"
_WEIGHTS = "what the models of llama.cpp's tests write, or how many tokens they take"
_LARGE = "a model of 1 to 8 GB, which the suite runs only on request"
_SLOTS = "slots that are saved to files or chosen by number; here the cache of prefixes is shared"
_CHAT = r"unit/test_chat_completion\.py::"
_TEXT = r"unit/test_completion\.py::"
_EMBED = r"unit/test_embedding\.py::"
_TOOLS = r"unit/test_tool_call\.py::"

LLAMA_SERVER: tuple[Deviation, ...] = (
    Deviation("extension", _RAW_PICTURES, r"unit/test_vision_api\.py::test_vision_(completion|embeddings)[\[_].*", error="."),
    Deviation("extension", "a list of models in Ollama's form", r"unit/test_vision_api\.py::test_\w*models_supports_.*"),
    Deviation("extension", "pictures in files of the server", r"unit/test_security\.py::test_local_media_file\[\.\..*"),
    Deviation("extension", _SLOTS, r"unit/test_slot_save\.py::.*(image|mmproj|media|multimodal).*"),
    Deviation("extension", _OWN_TOOLS, r"unit/test_(tools_builtin|mcp_servers)\.py"),
    Deviation("extension", _OWN_TOOLS, r"unit/test_security\.py::test_cors_origins_defaults_to_localhost_with_tools_enabled"),
    Deviation("extension", _PROXY, r"unit/test_proxy\.py"),
    Deviation("extension", _PROXY, r"unit/test_security\.py::test_cors_proxy_.*"),
    Deviation("extension", "the request format of Google's Vertex AI", r"unit/test_compat_gcp\.py"),
    Deviation("extension", "streams that a router resumes by a conversation's id", r"unit/test_stream\.py"),
    Deviation("extension", "lines of llama-server's log", r"unit/test_kv_keep_only_active\.py"),
    Deviation("extension", _SLOTS, r"unit/test_slot_save\.py::test_slot_(save_restore|restore_legacy_token_list|erase)"),
    Deviation("extension", "a process per model, with presets and downloads from a hub", r"unit/test_router\.py"),
    Deviation("extension", "drafts of a second model, and synthetic ones", r"unit/test_speculative\.py"),
    Deviation("extension", "adapters in GGUF files, chosen by number and with a scale", r"unit/test_lora\.py"),
    Deviation(
        "extension", "a shift of the context: --cache-window is ours", r"unit/test_ctx_shift\.py::test_ctx_shift_enabled"
    ),
    Deviation("extension", "tags of a model", r"unit/test_basic\.py::test_server_model_aliases_and_tags"),
    Deviation("extension", "two addresses at once", r"unit/test_basic\.py::test_server_multiple_addresses"),
    Deviation("extension", "files of llama-server's own page", r"unit/test_security\.py::test_access_static_assets.*"),
    Deviation("extension", "one embedding per token, by --pooling none", rf"{_EMBED}test_embedding_pooling_none.*"),
    Deviation("extension", "a GGUF file in three parts, from a hub", r"unit/test_basic\.py::test_load_split_model"),
    Deviation("extension", "a chat template by the name command-r", rf"{_CHAT}test_apply_chat_template"),
    Deviation("internal", "a restart at the same port: here each server has its own", r"unit/test_basic\.py::test_no_ui"),
    Deviation("model", _LARGE, rf"{_TOOLS}test_(completion_with_required_tool_real_model|weather|calc_result|thoughts)\[.*"),
    Deviation("model", _LARGE, rf"{_TOOLS}test_(hello_world|completion_without_tool_call_slow)\[.*"),
    Deviation("model", _LARGE, rf"{_TEXT}test_completion_stream_with_openai_library_stops"),
    Deviation("model", _WEIGHTS, rf"{_TEXT}test_nocache_long_input_prompt"),
    Deviation("model", _WEIGHTS, rf"{_TEXT}test_completion_(response_fields\[.*response_fields1\]|unified\[.*)"),
    Deviation("model", _WEIGHTS, r"unit/test_ctx_shift\.py::test_ctx_shift_disabled_(short_prompt.*|long_prompt|stream)"),
    Deviation("model", "a model in a GGUF file, by its name", r"unit/test_basic\.py::test_server_props"),
    Deviation("model", _WEIGHTS, r"unit/test_rerank\.py::test_(rerank|rerank_tei_format|rerank_usage.*)"),
    Deviation("model", _WEIGHTS, rf"{_EMBED}test_embedding_usage_multiple"),
    Deviation("model", _WEIGHTS, rf"{_CHAT}test_chat_completion_cached_tokens"),
    Deviation("model", _WEIGHTS, rf"{_CHAT}test_chat_template"),
    Deviation("model", _WEIGHTS, rf"{_TEXT}test_completion_prompt_cache"),
    Deviation("model", _WEIGHTS, r"unit/test_tokenize\.py::test_tokenize_with_bos"),
    Deviation("differs", "an empty text has no embedding, as with OpenAI", rf"{_EMBED}test_embedding_mixed_input\[-False\]"),
    Deviation(
        "differs",
        "the first chunk has an empty text, as with OpenAI and vLLM",
        rf"{_CHAT}.*(stream|timings).*",
        error="assert '' is None",
    ),
    Deviation(
        "differs",
        "the first chunk has an empty text, as with OpenAI and vLLM",
        rf"{_TOOLS}.*STREAMED.*",
        error="non empty content",
    ),
    Deviation(
        "differs",
        "the date is that of the template, as with Transformers",
        r"unit/test_template\.py::test_date_inside_prompt\[meta-llama.*",
    ),
    Deviation("differs", "a template without messages is refused", rf"{_CHAT}test_chat_completion\[.*not a chat template.*"),
    Deviation(
        "differs",
        "parts of a message are joined by one line break",
        rf"{_CHAT}test_chat_template_assistant_prefill\[prefill1.*",
    ),
    Deviation(
        "differs",
        "cookies of other origins are not accepted, and permitted headers are listed, since * does not cover Authorization",
        r"unit/test_security\.py::test_cors_options\[.*(Credentials|Allow-Headers).*",
    ),
    Deviation(
        "differs",
        "prefixes are cached in blocks of 16 tokens",
        r"unit/test_metrics\.py::test_metrics_prompt_processed_and_cached",
    ),
    Deviation(
        "differs",
        "a response cut off by max_output_tokens ends with response.incomplete, as with OpenAI",
        r"unit/test_compat_oai_responses\.py::test_responses_stream_with_llama_telemetry",
    ),
    Deviation("differs", "status 400 for images", r"unit/test_compat_anthropic\.py::.*(with_image|vision_format).*"),
    Deviation("differs", "a chat has messages", r"unit/test_compat_anthropic\.py::test_anthropic_empty_messages"),
    Deviation(
        "differs",
        "metrics of HTTP requests change while it sleeps",
        r"unit/test_sleep\.py::test_server_sleep_read_only_endpoints",
    ),
)
