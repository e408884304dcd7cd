"""Tests of llama-server that do not pass on `dso serve`."""

from __future__ import annotations

from .deviations import Deviation

_IMAGES = "images, which need a vision model"
_OWN_TOOLS = "tools that the server itself runs (files, a shell, MCP servers)"
_WEIGHTS = "what two tiny models of llama.cpp's tests write"

LLAMA_SERVER: tuple[Deviation, ...] = (
    Deviation("extension", _IMAGES, r"unit/test_vision_api\.py"),
    Deviation("extension", _IMAGES, r"unit/test_slot_save\.py::.*(image|mmproj|media|multimodal).*"),
    Deviation("extension", _IMAGES, r"unit/test_security\.py::test_local_media_file.*"),
    Deviation("extension", _IMAGES, r"unit/test_compat_anthropic\.py::.*vision_base64_with_multimodal.*"),
    Deviation("extension", _OWN_TOOLS, r"unit/test_(tools_builtin|mcp_servers)\.py"),
    Deviation("extension", _OWN_TOOLS, r"unit/test_security\.py::test_cors_origins_defaults_to_localhost_with_tools_enabled"),
    Deviation("extension", "a proxy for the web page's requests to MCP servers", r"unit/test_proxy\.py"),
    Deviation("extension", "a proxy for the web page's requests to MCP servers", r"unit/test_security\.py::test_cors_proxy_.*"),
    Deviation("extension", "the request format of Google's Vertex AI", r"unit/test_compat_gcp\.py"),
    Deviation("extension", "streams that are resumed by a conversation's id", r"unit/test_stream\.py"),
    Deviation("extension", "the log lines about slots of the KV cache", r"unit/test_kv_keep_only_active\.py"),
    Deviation("model", _WEIGHTS, r"unit/test_lora\.py::test_lora(\[.*|_per_request)"),
)
