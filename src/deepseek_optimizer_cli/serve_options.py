"""The options of `dso serve`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options as o

_REQUESTS: dict[str, Any] = {"rich_help_panel": "Requests and memory"}
_ACCESS: dict[str, Any] = {"rich_help_panel": "Network and access"}
_ADAPTERS: dict[str, Any] = {"rich_help_panel": "LoRA adapters"}
_CHAT: dict[str, Any] = {"rich_help_panel": "Chat"}
_FILES: dict[str, Any] = {"rich_help_panel": "Uploaded files"}
_SEARCH: dict[str, Any] = {"rich_help_panel": "Embeddings and scores"}

Model = Annotated[
    list[str] | None, typer.Argument(metavar="MODEL", help=f"{o.MODEL_HELP} Several are loaded when they are needed.")
]
Host = Annotated[
    str,
    typer.Option("--host", metavar="ADDRESS", help="Address to listen on; 0.0.0.0: all network interfaces.", **_ACCESS),
]
Port = Annotated[
    int, typer.Option("--port", min=0, max=65535, metavar="PORT", help="Port to listen on; 0: any free port.", **_ACCESS)
]
Name = Annotated[
    str | None,
    typer.Option(
        "--served-model-name",
        metavar="NAME",
        help="Model name in the API. Default: the last path component of MODEL.",
        **_ACCESS,
    ),
]
ApiKeyFile = Annotated[
    str | None,
    typer.Option(
        "--api-key-file",
        metavar="FILE",
        help="File of API keys, one per line; # starts a comment. Default: the keys in the environment variable DSO_API_KEYS.",
        **_ACCESS,
    ),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        metavar="NAME",
        help="Name to accept in the Host header, in addition to localhost and 127.0.0.1. Repeatable.",
        **_ACCESS,
    ),
]
AllowOrigin = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-origin",
        metavar="ORIGIN",
        help="Web origin whose pages may use the API (CORS); localhost: any port of this machine; *: any. Repeatable.",
        **_ACCESS,
    ),
]
StrictRequests = Annotated[
    bool,
    typer.Option(
        "--strict-requests",
        help="Refuse requests with unknown fields, or with values of another JSON type such as numbers in quotes. Default: "
        "unknown fields are ignored, and the response header X-Ignored-Fields names them.",
        **_ACCESS,
    ),
]
AccessLog = Annotated[bool, typer.Option("--access-log", help="Log each request to stderr.", **_ACCESS)]
Slots = Annotated[bool, typer.Option("--slots/--no-slots", help="List running requests at /slots.", **_ACCESS)]
Metrics = Annotated[bool, typer.Option("--metrics/--no-metrics", help="Serve Prometheus metrics at /metrics.", **_ACCESS)]
Page = Annotated[bool, typer.Option("--ui/--no-ui", help="Serve the chat page at /.", **_ACCESS)]
LogFormat = Annotated[
    str,
    typer.Option("--log-format", metavar="FORMAT", help="Format of the log: text, or json (an object per line).", **_ACCESS),
]
RootPath = Annotated[
    str,
    typer.Option(
        "--root-path",
        metavar="PATH",
        help="Prefix of all paths under which a reverse proxy serves this server, such as /llm; it may remove it or not.",
        **_ACCESS,
    ),
]
SslCertfile = Annotated[
    str | None,
    typer.Option("--ssl-certfile", metavar="FILE", help="Certificate chain (PEM), to serve HTTPS.", **_ACCESS),
]
SslKeyfile = Annotated[
    str | None,
    typer.Option("--ssl-keyfile", metavar="FILE", help="Private key (PEM). Default: in the file of --ssl-certfile.", **_ACCESS),
]
SslKeyfilePassword = Annotated[
    str | None,
    typer.Option(
        "--ssl-keyfile-password",
        metavar="PASSWORD",
        envvar="DSO_SSL_KEYFILE_PASSWORD",
        show_envvar=False,
        help="Password of an encrypted private key. Other users can see it here; set the environment variable "
        "DSO_SSL_KEYFILE_PASSWORD instead.",
        **_ACCESS,
    ),
]
SslCaCerts = Annotated[
    str | None,
    typer.Option(
        "--ssl-ca-certs",
        metavar="FILE",
        help="Certificates of authorities (PEM); clients must have a certificate that one of them issued.",
        **_ACCESS,
    ),
]
OtlpTracesEndpoint = Annotated[
    str | None,
    typer.Option(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="Export OpenTelemetry traces to this URL of a collector, such as http://localhost:4318/v1/traces.",
        **_ACCESS,
    ),
]
SleepMode = Annotated[
    bool,
    typer.Option(
        "--enable-sleep-mode",
        help="Let clients release the memory of the cache and of mapped weights by POST /sleep, until POST /wake_up.",
        **_REQUESTS,
    ),
]
SleepIdleSeconds = Annotated[
    float | None,
    typer.Option(
        "--sleep-idle-seconds",
        min=0.1,
        metavar="SECONDS",
        help="Release the memory of the cache and of mapped weights after this time without requests, until the next one. "
        "Default: never.",
        **_REQUESTS,
    ),
]
MaxRunningOrProfile = Annotated[
    int | None,
    typer.Option(
        "--max-running",
        min=1,
        metavar="N",
        help="Maximum number of concurrent answers. Default: that of --profile, or 32.",
        **_REQUESTS,
    ),
]
PrefillChunk = Annotated[
    int | None,
    typer.Option(
        "--prefill-chunk",
        min=1,
        metavar="TOKENS",
        help="Maximum number of prompt tokens in a step. Fewer delay other answers less. Default: 512.",
        **_REQUESTS,
    ),
]
MaxWaiting = Annotated[
    int,
    typer.Option(
        "--max-waiting",
        min=0,
        metavar="N",
        help="Maximum number of queued requests of one client; further ones receive status 429 with Retry-After.",
        **_REQUESTS,
    ),
]
KvCacheMemory = Annotated[
    int | None,
    typer.Option(
        "--kv-cache-memory",
        min=1,
        metavar="BYTES",
        help="Memory for the KV cache of all conversations, in bytes. Default: enough for a full batch at the model's "
        "context length, but at most half of the free memory.",
        **_REQUESTS,
    ),
]
PrefixCache = Annotated[
    bool,
    typer.Option("--prefix-cache/--no-prefix-cache", help="Reuse the KV cache of prompts that share a prefix.", **_REQUESTS),
]
Drafts = Annotated[
    bool,
    typer.Option("--drafts/--no-drafts", help="Use speculative decoding, which does not change the answers.", **_REQUESTS),
]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="Make each answer independent of the other requests in the batch, bit for bit. Processes prompts more slowly.",
        **_REQUESTS,
    ),
]
Policy = Annotated[
    str,
    typer.Option(
        "--policy",
        metavar="POLICY",
        help="How steps are filled: fixed; or latency or throughput: what is best for that is learned while serving. Streams "
        "may then pause longer while prompts are processed.",
        **_REQUESTS,
    ),
]
RequestTimeout = Annotated[
    float,
    typer.Option(
        "--request-timeout",
        min=0.1,
        metavar="SECONDS",
        help="Maximum time from a request's arrival to the end of its answer.",
        **_REQUESTS,
    ),
]
DrainSeconds = Annotated[
    float,
    typer.Option(
        "--drain-seconds",
        min=0,
        metavar="SECONDS",
        help="Grace period for requests in flight when the server stops.",
        **_REQUESTS,
    ),
]
MaxBodyBytes = Annotated[
    int | None,
    typer.Option(
        "--max-body-bytes",
        min=1,
        metavar="BYTES",
        help="Maximum size of a request body; by default 4 MiB, or 48 MiB if the model accepts pictures or several are served.",
        **_REQUESTS,
    ),
]
MaxPictures = Annotated[
    int,
    typer.Option(
        "--max-pictures",
        min=1,
        metavar="N",
        help="Maximum number of pictures in a request, those of earlier turns included.",
        **_REQUESTS,
    ),
]
StateDir = Annotated[
    str | None,
    typer.Option(
        "--state-dir",
        metavar="DIR",
        help="Folder for stored responses of /v1/responses and for batches, which survive a restart there. Default: they are "
        "lost when the server stops.",
        **_REQUESTS,
    ),
]
ResponseDays = Annotated[
    float,
    typer.Option(
        "--response-days",
        min=0.001,
        metavar="DAYS",
        help="Time after its last use at which a stored response is deleted.",
        **_REQUESTS,
    ),
]
ResponseMb = Annotated[
    float,
    typer.Option(
        "--response-mb",
        min=0.001,
        metavar="MB",
        help="Maximum size of all stored responses, in megabytes; the oldest are deleted. With API keys, each key may use "
        "half of it.",
        **_REQUESTS,
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="NAME=PATH",
        help="Load the LoRA adapter (PEFT) in directory PATH; requests choose it by the model NAME. Repeatable.",
        **_ADAPTERS,
    ),
]
AllowLoraLoading = Annotated[
    bool,
    typer.Option(
        "--allow-lora-loading",
        help="Let requests load and unload adapters (/v1/load_lora_adapter). Requires --lora-dir.",
        **_ADAPTERS,
    ),
]
LoraDir = Annotated[
    str | None,
    typer.Option("--lora-dir", metavar="DIR", help="Directory of the adapters that requests may load; no others.", **_ADAPTERS),
]
MaxLoras = Annotated[
    int | None,
    typer.Option(
        "--max-loras",
        min=1,
        metavar="N",
        help="Maximum number of adapters at a time. Default: those of --lora, and at least 16 with --allow-lora-loading.",
        **_ADAPTERS,
    ),
]
MaxLoraRank = Annotated[
    int, typer.Option("--max-lora-rank", min=1, max=1024, metavar="N", help="Largest rank of an adapter.", **_ADAPTERS)
]
LoraDtype = Annotated[
    str,
    typer.Option(
        "--lora-dtype",
        metavar="DTYPE",
        help="Storage of adapters: bf16, fp32, or auto: bf16, except fp32 for a model in fp32.",
        **_ADAPTERS,
    ),
]
CacheWindow = Annotated[
    int | None,
    typer.Option(
        "--cache-window",
        min=1,
        metavar="TOKENS",
        help="Maximum length of a conversation in the cache. Longer conversations continue, but lose tokens from the "
        "middle. Default: no window; conversations end at the context length.",
        **_CHAT,
    ),
]
GenerationConfig = Annotated[
    str,
    typer.Option(
        "--generation-config",
        metavar="SOURCE",
        help="Sampling parameters of requests that omit them. model: those of the checkpoint's generation config, else "
        "those that the model's authors publish, else temperature 0.7 and top_p 0.95. vllm: those of the generation "
        "config, else OpenAI's. openai: temperature 1 and top_p 1.",
        **_CHAT,
    ),
]
MaxAnswerTokens = Annotated[
    int,
    typer.Option(
        "--max-answer-tokens",
        min=1,
        metavar="TOKENS",
        help="Maximum length of an answer whose request gives none. It ends earlier if the context is full.",
        **_CHAT,
    ),
]
ToolFormat = Annotated[
    str | None,
    typer.Option(
        "--tool-format",
        metavar="NAME",
        help="Syntax in which the model writes tool calls; generic: for models without tools. Default: detected from the "
        "chat template, or generic.",
        **_CHAT,
    ),
]
Reasoning = Annotated[
    bool | None,
    typer.Option(
        "--reasoning/--no-reasoning",
        help="Return reasoning separately from the answer. Default: detected from the chat template.",
        **_CHAT,
    ),
]
Thinking = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--no-thinking",
        help="Whether the model reasons before its answer, for requests that do not say. Default: as the chat template "
        "decides.",
        **_CHAT,
    ),
]
Pooling = Annotated[
    str | None,
    typer.Option(
        "--pooling",
        metavar="MODE",
        help="How hidden states become an embedding: cls, lasttoken, max, mean, mean_sqrt_len_tokens or weightedmean. "
        "Default: as the checkpoint's modules.json says; without it, mean.",
        **_SEARCH,
    ),
]
Reranker = Annotated[
    str,
    typer.Option(
        "--reranker",
        metavar="HOW",
        help="How a model without a classification head scores pairs of texts: cosine of their embeddings; yes-no, the "
        "probability that a language model judges the document to answer the query; auto: yes-no for a language model "
        "whose files or name say that it is a reranker.",
        **_SEARCH,
    ),
]
PrefillAssistant = Annotated[
    bool,
    typer.Option(
        "--prefill-assistant",
        help="Continue a chat's last message if it is the assistant's, instead of answering it.",
        **_CHAT,
    ),
]
AllowedMediaDomains = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-media-domains",
        metavar="HOST",
        help="Host from which pictures in requests are fetched by their URLs; *: any. It must have a public address, unless "
        "its network is given too, such as 192.168.0.0/16. Repeatable. Default: no URL is fetched.",
        **_ACCESS,
    ),
]
MediaTimeout = Annotated[
    float,
    typer.Option("--media-timeout", min=0.1, metavar="SECONDS", help="Maximum time to fetch a picture by its URL.", **_ACCESS),
]
MaxFileMb = Annotated[
    float,
    typer.Option(
        "--max-file-mb",
        min=0.001,
        metavar="MB",
        help="Maximum size of an uploaded document, and of its text, in megabytes.",
        **_FILES,
    ),
]
FileMemoryMb = Annotated[
    float,
    typer.Option(
        "--file-memory-mb",
        min=0.001,
        metavar="MB",
        help="Memory for all uploaded documents, in megabytes. With API keys, each key may use half of it.",
        **_FILES,
    ),
]
Ocr = Annotated[
    str | None,
    typer.Option(
        "--ocr",
        metavar="MODEL",
        help="A model that sees, by which pictures and scanned pages among uploaded documents are read. Default: they are "
        "reported.",
        **_FILES,
    ),
]
MaxScannedPages = Annotated[
    int,
    typer.Option(
        "--max-scanned-pages",
        min=1,
        metavar="N",
        help="Maximum number of pages of a document that --ocr reads. They take as long as answers of their length, within "
        "--request-timeout.",
        **_FILES,
    ),
]
