"""The pipeline "conversational": a dialogue with an engine, through Transformers' `pipeline`.

    chat = pipeline("conversational", model=PATH, device="cpu",
                    optimizer_config={"type": "deepseek_realtime", "max_length": 2048, "stream_output": True})
    for token in chat("Explain the basic principles of quantum computing", max_length=100):
        print(token["generated_text"][-1], end="", flush=True)

`pipeline()` loads a model before it passes the arguments to the pipeline's class. It therefore loads an `Unloaded`, which only
holds the name and arguments, and the class packs the weights as it reads them, so that they are in memory only once.

`import deepseek_optimizer` imports this module, so the engine is imported only when a pipeline is created.
"""

from __future__ import annotations

import difflib
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import fields as fields_of
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, Pipeline

from ..config import DeepSeekConfig
from ..errors import BackendError, ConfigError, RequestError, shown
from ..integration.bind.runtime import runtime_of
from ..integration.load.loader import load
from ..integration.load.placement import parse_device
from ..integration.load.resolve import resolve
from ..optimized_model import DynamicGraphOptimizer, load_tokenizer

if TYPE_CHECKING:
    from ..engine.request import Request

TYPE = "deepseek_realtime"
_OWN = ("type", "max_length", "stream_output")
_FIELDS = tuple(f.name for f in fields_of(DeepSeekConfig) if f.name != "quant_method")
_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_HUB = ("revision", "token", "local_files_only", "cache_dir")
_IGNORED = ("trust_remote_code", "code_revision", "_from_pipeline")  # code in a checkpoint is never run
_ROLES = ("system", "user", "assistant", "tool")


class Unloaded:
    """A checkpoint that the pipeline loads later.

    Attributes:
        path: the model argument of `pipeline`.
        kwargs: the arguments that `pipeline` passes to `from_pretrained`.
    """

    device = None

    def __init__(self, path: str, kwargs: Mapping[str, Any]) -> None:
        self.path, self.kwargs = path, dict(kwargs)

    @classmethod
    def from_pretrained(cls, path: str, **kwargs: Any) -> Unloaded:
        return cls(path, kwargs)


class ConversationalPipeline(Pipeline):
    """A conversation with a model, see the module's docstring.

    Its length is not limited: when the dialogue exceeds its maximum number of tokens, the oldest messages, but never the system
    prompt, are omitted from the prompt.

    Args:
        model: a path or hub name; an optimized model; or a float Transformers model, which is optimized in place as by
            `DynamicGraphOptimizer`. A .gguf file can be passed to this class by its path; `pipeline` itself requires a
            config.json, so pass it `model=load_model("x.gguf")`, or `model=FOLDER, model_kwargs={"gguf_file": "x.gguf"}`.
        tokenizer: the tokenizer or its path; None: the one in the model's checkpoint.
        device: "cpu", or a CUDA device, on which the reference backend runs. None: the model's device, which is the CPU for a
            model loaded here.
        optimizer_config: {"type": "deepseek_realtime"} and any of: "max_length", the maximum number of tokens of the dialogue
            (limited by the model's context); "stream_output", see `__call__`; fields of `DeepSeekConfig`.
        system: system prompt.
        generation: defaults of the arguments of `__call__`.

    Attributes:
        engine: the engine that generates the answers.
        system, turns: the conversation so far.
        dropped: number of messages that were omitted from the last prompt.

    Raises:
        ConfigError: a key or value is invalid, or the device is not available.
        CheckpointError: the checkpoint or its tokenizer is damaged or missing.
    """

    _load_tokenizer: Any = False  # loaded here, from the resolved checkpoint
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _load_video_processor: Any = False
    _defaults: Any = None  # of the arguments of `__call__`

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        task: str = "conversational",
        device: Any = None,
        optimizer_config: Mapping[str, Any] | None = None,
        system: str | None = None,
        **generation: Any,
    ) -> None:
        from ..chat.local import default_sampling
        from ..serving import make_engine

        own, fields = _split(optimizer_config)
        where = None if device is None else parse_device(device)
        if isinstance(model, (str, os.PathLike)):
            model = Unloaded(os.fspath(model), {"dtype": generation.get("dtype")})
        if isinstance(model, Unloaded):
            path = _path(model)
            model = _loaded(path, model.kwargs, fields, where)
        else:
            path = getattr(getattr(model, "config", None), "name_or_path", None) or ""
            model = _optimized(model, fields)
        tokenizer = _tokenizer(tokenizer, path)
        if where is not None and model.device != where:
            model.to(where)
        mapped = getattr(model, "hf_device_map", None) is not None  # Transformers then accepts no device, not even this one
        super().__init__(model=model, tokenizer=tokenizer, task=task, device=None if mapped else model.device, **generation)
        if not tokenizer.chat_template:
            raise ConfigError("the model's tokenizer has no chat template; use the pipeline text-generation")
        default_sampling(model, **self._defaults)  # raises an error now if one is invalid
        self.engine = make_engine(model, tokenizer)
        self.stream_output: bool = own.get("stream_output", False)
        self.max_length: int | None = own.get("max_length")
        self.system = system
        self.turns: list[dict[str, str]] = []
        self.dropped = 0
        self._open: weakref.ref[Any] | None = None  # the stream that is being read

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, a system prompt first."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def reset(self) -> None:
        """Clears the conversation; the system prompt stays."""
        self._close()
        self.turns = []

    def __call__(self, text: Any, **generation: Any) -> Any:  # type: ignore[override]
        """Generates the answer to the next message and adds both to the conversation.

        A partly read stream is added too. After an error, the conversation is unchanged.

        Args:
            text: the next message; or a list of messages as dicts with role and content, the user's last, which replaces the
                conversation.
            generation: max_new_tokens (or max_length, which means the same here; the length of the dialogue is limited by
                optimizer_config), do_sample, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, and others of
                `chat.sampling.sampling_params`. The defaults are those of the model's generation config.
            stream_output: overrides the value in optimizer_config.

        Returns:
            With stream_output, an iterator of {"generated_text": list of pieces so far, the newest last}; the concatenated
            pieces are the answer. The model runs while the iterator is read; closing it ends the answer within a step.
            Otherwise [{"generated_text": the conversation's messages, the answer last}], as from the pipeline text-generation
            for chats.

        Raises:
            RequestError: a message or an argument is invalid, or the message alone exceeds the maximum length of a dialogue.
        """
        stream = generation.pop("stream_output", self.stream_output)
        if not isinstance(stream, bool):
            raise RequestError("stream_output", f"must be True or False, got {shown(stream)}")
        self._close()
        _, forward, _ = self._sanitize_parameters(**generation)
        if stream:
            return self._stream(self.preprocess(text)["messages"], **{**self._defaults, **forward})
        return self.run_single(text, {}, {**self._defaults, **forward}, {})

    def _sanitize_parameters(self, **generation: Any) -> Any:
        if (length := generation.pop("max_length", None)) is not None:
            generation.setdefault("max_new_tokens", length)
        if self._defaults is None:  # the first call is Pipeline's own, at construction
            self._defaults = generation
        return {}, generation, {}

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> dict[str, Any]:
        """Returns the messages to answer."""
        if isinstance(input_, str):
            return {"messages": [*self.messages, {"role": "user", "content": input_}]}
        _check_messages(input_)
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in input_]}

    def _forward(self, input_tensors: Any, **forward_parameters: Any) -> Any:
        for _ in self._stream(input_tensors["messages"], **forward_parameters):
            pass
        return {"messages": self.messages}

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> list[dict[str, Any]]:
        return [{"generated_text": model_outputs["messages"]}]

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Saves the model and its tokenizer, but not the pipeline's code as Transformers would, since it is installed."""
        self.model.save_pretrained(save_directory, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)

    def _stream(self, messages: list[dict[str, str]], **generation: Any) -> Iterator[dict[str, list[str]]]:
        from ..chat.local import default_sampling, dialogue_tokens, request_for, room_of

        sampling, whole = default_sampling(self.model, **generation), room_of(self.engine, self.max_length)
        tokens, self.dropped = dialogue_tokens(self.tokenizer, messages, sampling, whole)
        if self.dropped:
            runtime_of(self.model).warn_once(f"the dialogue exceeds its maximum of {whole} tokens: oldest messages are omitted")
        request = request_for(self.engine, tokens, sampling, whole)
        pieces = self._pieces(messages, request)
        self._open = weakref.ref(pieces)
        return pieces

    def _pieces(self, messages: list[dict[str, str]], request: Request) -> Iterator[dict[str, list[str]]]:
        pieces: list[str] = []
        try:
            with closing(self.engine.stream(request)) as outputs:  # type: ignore[type-var]  # a generator, which can be closed
                for output in outputs:
                    if output.finish == "error":
                        raise BackendError(output.error or "the engine failed")
                    if output.text:
                        pieces.append(output.text)
                        yield {"generated_text": list(pieces)}
        except GeneratorExit:
            self._remember(messages, "".join(pieces))
            raise
        self._remember(messages, "".join(pieces))

    def _close(self) -> None:
        """Ends a stream that is still being read, since the engine runs one at a time."""
        pieces = self._open() if self._open is not None else None
        if pieces is not None:
            pieces.close()

    def _remember(self, messages: list[dict[str, str]], answer: str) -> None:
        """Sets the conversation to these messages and the answer."""
        whole = [*messages, {"role": "assistant", "content": answer}]
        self.system = whole.pop(0)["content"] if whole[0]["role"] == "system" else None
        self.turns = whole


def _split(given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Checks optimizer_config and splits it into the pipeline's own keys and fields of DeepSeekConfig."""
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"optimizer_config must be a dict, got {type(given).__name__}")
    for name in given:
        if name not in _OWN and name not in _FIELDS:
            near = difflib.get_close_matches(str(name), [*_OWN, *_FIELDS], n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join([*_OWN, *_FIELDS])}"
            raise ConfigError(f"optimizer_config has no key {name!r}; {hint}")
    own = {name: value for name, value in given.items() if name in _OWN}
    if own.get("type", TYPE) != TYPE:
        raise ConfigError(f"optimizer_config's type must be {TYPE!r}, got {own['type']!r}")
    length = own.get("max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise ConfigError(f"optimizer_config's max_length must be a positive number of tokens, got {length!r}")
    if not isinstance(own.get("stream_output", False), bool):
        raise ConfigError(f"optimizer_config's stream_output must be True or False, got {own['stream_output']!r}")
    fields = {name: value for name, value in given.items() if name in _FIELDS}
    DeepSeekConfig(**fields)  # raises an error for an invalid value before anything is loaded
    return own, fields


def _path(unloaded: Unloaded) -> str:
    """Returns the path of the weights, downloaded if necessary.

    Raises:
        ConfigError: `model_kwargs` has an unsupported argument.
    """
    kwargs = unloaded.kwargs
    device_map = kwargs.get("device_map")
    if device_map not in (None, "auto", "cpu") and device_map != {"": "cpu"}:
        raise ConfigError(f"device_map={device_map!r} is not supported; use device= instead")
    known = ("dtype", "torch_dtype", "device_map", "gguf_file", *_HUB, *_IGNORED)
    for name in kwargs:
        if name not in known:
            raise ConfigError(f"model_kwargs={{{name!r}: ...}} is not supported for optimized models; remove it")
    path = resolve(unloaded.path, **{name: kwargs[name] for name in _HUB if kwargs.get(name) is not None})
    return str(path / kwargs["gguf_file"] if kwargs.get("gguf_file") else path)


def _loaded(path: str, kwargs: Mapping[str, Any], fields: dict[str, Any], device: torch.device | None) -> Any:
    dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
    if dtype not in (None, "auto") and "precision" not in fields:
        if dtype not in _PRECISIONS:
            raise ConfigError(f"dtype={dtype} is not supported for optimized models; use float32 or bfloat16")
        fields = {**fields, "precision": _PRECISIONS[dtype]}
    return load(path, None, fields, "the pipeline takes text", device)


def _optimized(model: Any, fields: dict[str, Any]) -> Any:
    if "dso" not in getattr(model, "__dict__", {}):
        return DynamicGraphOptimizer(model, config=DeepSeekConfig(**fields)).optimize()
    if fields:
        raise ConfigError(f"the model is optimized already; pass {', '.join(fields)} to load_model, not to the pipeline")
    return model


def _tokenizer(given: Any, path: str) -> Any:
    """Returns the tokenizer: the given one, or the one at the given path, or the one in the model's checkpoint."""
    if given is not None and not isinstance(given, (str, os.PathLike)):
        return given
    source = os.fspath(given) if given is not None else path
    if not source:
        raise ConfigError("the model has no path, so its tokenizer must be given: tokenizer=...")
    if source.endswith(".gguf") or (given is None and os.path.exists(source)):
        return load_tokenizer(source)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer at {source}; pass one as tokenizer=...: {' '.join(str(error).split())}") from error


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise RequestError("text", "must be a message or a list of messages as dicts")
    for message in messages:
        if message.get("role") not in _ROLES or not isinstance(message.get("content"), str):
            raise RequestError(
                "text", f"a message must have a role ({', '.join(_ROLES)}) and text as content, got {shown(message)}"
            )
    if messages[-1]["role"] == "assistant":
        raise RequestError("text", "the last message is an answer; end with the user's message")
