"""The pipeline "conversational": a dialogue with an engine behind Transformers' own entry point.

    chat = pipeline("conversational", model=PATH, device="cpu",
                    optimizer_config={"type": "deepseek_realtime", "max_length": 2048, "stream_output": True})
    for token in chat("Explain the basic principles of quantum computing", max_length=100):
        print(token["generated_text"][-1], end="", flush=True)

`pipeline()` loads a model before it tells the pipeline's class what was asked for. So what it loads is `Unloaded`, a name with
its arguments, and the class packs the weights as they stream in: they are in memory once.

`import deepseek_optimizer` imports this module, so the engine is imported only when a pipeline is made.
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
from ..integration.load.resolve import resolve
from ..optimizer import DynamicGraphOptimizer, load_tokenizer

if TYPE_CHECKING:
    from ..engine.request import Request

TYPE = "deepseek_realtime"
_OWN = ("type", "max_length", "stream_output")
_FIELDS = tuple(f.name for f in fields_of(DeepSeekConfig) if f.name != "quant_method")
_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_HUB = ("revision", "token", "local_files_only", "cache_dir")
_IGNORED = ("trust_remote_code", "code_revision", "_from_pipeline")  # no code of a checkpoint is ever run
_ROLES = ("system", "user", "assistant", "tool")


class Unloaded:
    """A checkpoint that the pipeline will load.

    Attributes:
        path: as it was given to `pipeline`.
        kwargs: what `pipeline` gives a model's `from_pretrained`.
    """

    device = None

    def __init__(self, path: str, kwargs: Mapping[str, Any]) -> None:
        self.path, self.kwargs = path, dict(kwargs)

    @classmethod
    def from_pretrained(cls, path: str, **kwargs: Any) -> Unloaded:
        return cls(path, kwargs)


class ConversationalPipeline(Pipeline):
    """See the module's docstring. A dialogue may go on for ever: once it has outgrown its tokens, its oldest messages, never
    the system prompt, are left out of what the model reads.

    Args:
        model: a path or hub name; an optimised model; or a float model of Transformers, which is optimised in place, as
            `DynamicGraphOptimizer` does it. A .gguf file is a path here; `pipeline` itself, which wants a config.json, takes it
            as `model=load_model("x.gguf")`, or as `model=FOLDER, model_kwargs={"gguf_file": "x.gguf"}`.
        tokenizer: the object or its path; None: the one beside the weights.
        device: "cpu", or a CUDA device, where the reference backend runs it. None: where the model is, which is the CPU for one
            that is loaded here.
        optimizer_config: {"type": "deepseek_realtime"}, and any of: "max_length", tokens that the whole dialogue may have
            (never more than the model's context); "stream_output", see `__call__`; fields of `DeepSeekConfig`.
        system: system prompt.
        generation: defaults of what `__call__` takes.

    Attributes:
        engine: what answers.
        system, turns: the conversation so far.
        dropped: how many of its messages the last answer did without.

    Raises:
        ConfigError: a key or value that is wrong, or a device that is not there.
        CheckpointError: the checkpoint or its tokenizer is damaged or missing.
    """

    _load_tokenizer: Any = False  # it is found here, beside the weights, where they were found
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _load_video_processor: Any = False
    _defaults: Any = None  # of what `__call__` takes

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
        where = _device(device)
        if isinstance(model, (str, os.PathLike)):
            model = Unloaded(os.fspath(model), {"dtype": generation.get("dtype")})
        if isinstance(model, Unloaded):
            path = _path(model)
            model = _loaded(path, model.kwargs, fields)
        else:
            path = getattr(getattr(model, "config", None), "name_or_path", None) or ""
            model = _optimised(model, fields)
        tokenizer = _tokenizer(tokenizer, path)
        if where is not None and model.device != where:
            model.to(where)
        mapped = getattr(model, "hf_device_map", None) is not None  # then a device is not to be named, not even this one
        super().__init__(model=model, tokenizer=tokenizer, task=task, device=None if mapped else model.device, **generation)
        if not tokenizer.chat_template:
            raise ConfigError("this model has no chat template, so it can't hold a conversation; use text-generation")
        default_sampling(model, **self._defaults)  # raises now where one is wrong
        self.engine = make_engine(model, tokenizer)
        self.stream_output: bool = own.get("stream_output", False)
        self.max_length: int | None = own.get("max_length")
        self.system = system
        self.turns: list[dict[str, str]] = []
        self.dropped = 0
        self._open: weakref.ref[Any] | None = None  # the answer that is being read

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, a system prompt first."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def reset(self) -> None:
        """Forgets the turns; the system prompt stays."""
        self._close()
        self.turns = []

    def __call__(self, text: Any, **generation: Any) -> Any:  # type: ignore[override]
        """The answer to one more message. What is said becomes history, also where a stream was left early; after an error the
        conversation is as before.

        Args:
            text: the next message; or all messages, as dicts of role and content, the user's last: they take the
                conversation's place.
            generation: max_new_tokens (or max_length, which means the same here: a dialogue's own length is bounded by
                optimizer_config), do_sample, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, and others of
                `chat.sampling.sampling_params`. Without any the model's generation config decides.
            stream_output: True or False in place of what optimizer_config says.

        Returns:
            With stream_output an iterator of {"generated_text": pieces so far, the newest last}; the pieces add up to the
            answer. The model runs while it is read; leaving it ends the answer within a step. Otherwise, as the pipeline
            text-generation does for chats, [{"generated_text": the conversation's messages, the answer last}].

        Raises:
            RequestError: a message or an argument is wrong, or the message alone is longer than a dialogue may be.
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
        """The messages to answer."""
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
        """The model and its tokenizer. Not the pipeline's code, which Transformers would put beside them: it is installed."""
        self.model.save_pretrained(save_directory, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)

    def _stream(self, messages: list[dict[str, str]], **generation: Any) -> Iterator[dict[str, list[str]]]:
        from ..chat.local import default_sampling, dialogue_tokens, request_for, room_of

        sampling, whole = default_sampling(self.model, **generation), room_of(self.engine, self.max_length)
        tokens, self.dropped = dialogue_tokens(self.tokenizer, messages, sampling, whole)
        if self.dropped:
            runtime_of(self.model).warn_once(f"the dialogue has outgrown its {whole} tokens: its oldest messages are left out")
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
                        raise BackendError(output.error or "the engine could not go on")
                    if output.text:
                        pieces.append(output.text)
                        yield {"generated_text": list(pieces)}
        except GeneratorExit:
            self._remember(messages, "".join(pieces))
            raise
        self._remember(messages, "".join(pieces))

    def _close(self) -> None:
        """An answer that is still being read ends here: the engine has one at a time."""
        pieces = self._open() if self._open is not None else None
        if pieces is not None:
            pieces.close()

    def _remember(self, messages: list[dict[str, str]], answer: str) -> None:
        """Makes an answered chat the conversation."""
        whole = [*messages, {"role": "assistant", "content": answer}]
        self.system = whole.pop(0)["content"] if whole[0]["role"] == "system" else None
        self.turns = whole


def _split(given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pipeline's own keys, checked, and the fields of DeepSeekConfig."""
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"optimizer_config must be a dict, got {type(given).__name__}")
    for name in given:
        if name not in _OWN and name not in _FIELDS:
            near = difflib.get_close_matches(str(name), [*_OWN, *_FIELDS], n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join([*_OWN, *_FIELDS])}"
            raise ConfigError(f"optimizer_config has no key {name!r}; {hint}")
    own = {name: value for name, value in given.items() if name in _OWN}
    if own.get("type", TYPE) != TYPE:
        raise ConfigError(f"optimizer_config's type must be {TYPE!r}, got {own['type']!r}")
    length = own.get("max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise ConfigError(f"optimizer_config's max_length must be a number of tokens above 0, got {length!r}")
    if not isinstance(own.get("stream_output", False), bool):
        raise ConfigError(f"optimizer_config's stream_output must be True or False, got {own['stream_output']!r}")
    fields = {name: value for name, value in given.items() if name in _FIELDS}
    DeepSeekConfig(**fields)  # a wrong value is said before anything is loaded
    return own, fields


def _device(device: Any) -> torch.device | None:
    """Raises ConfigError where it cannot be had."""
    if device is None:
        return None
    try:
        index = isinstance(device, int) and not isinstance(device, bool)
        found = torch.device("cpu" if device == -1 else f"cuda:{device}") if index else torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f'device={device!r} is none; use device="cpu"') from error
    if found.type == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", found.index or 0)
    if found.type == "cuda":
        raise ConfigError(f'device={device!r} names a CUDA device, and none can be reached here; use device="cpu"')
    if found.type != "cpu":
        raise ConfigError(f'device={device!r}: optimised models run on the CPU; use device="cpu"')
    return found


def _path(unloaded: Unloaded) -> str:
    """Where the weights are, fetched if need be.

    Raises:
        ConfigError: `model_kwargs` has what a load does not take.
    """
    kwargs = unloaded.kwargs
    device_map = kwargs.get("device_map")
    if device_map not in (None, "auto", "cpu") and device_map != {"": "cpu"}:
        raise ConfigError(f"device_map={device_map!r}: say device= instead")
    known = ("dtype", "torch_dtype", "device_map", "gguf_file", *_HUB, *_IGNORED)
    for name in kwargs:
        if name not in known:
            raise ConfigError(f"model_kwargs={{{name!r}: ...}} means nothing to an optimised model; leave it out")
    path = resolve(unloaded.path, **{name: kwargs[name] for name in _HUB if kwargs.get(name) is not None})
    return str(path / kwargs["gguf_file"] if kwargs.get("gguf_file") else path)


def _loaded(path: str, kwargs: Mapping[str, Any], fields: dict[str, Any]) -> Any:
    dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
    if dtype not in (None, "auto") and "precision" not in fields:
        if dtype not in _PRECISIONS:
            raise ConfigError(f"dtype={dtype} is no precision of an optimised model; use float32 or bfloat16")
        fields = {**fields, "precision": _PRECISIONS[dtype]}
    return load(path, None, fields)


def _optimised(model: Any, fields: dict[str, Any]) -> Any:
    if "dso" not in getattr(model, "__dict__", {}):
        return DynamicGraphOptimizer(model, config=DeepSeekConfig(**fields)).optimize()
    if fields:
        raise ConfigError(f"the model is optimised already: give {', '.join(fields)} to load_model, not to the pipeline")
    return model


def _tokenizer(given: Any, path: str) -> Any:
    """What was given, or what lies at the path that was, or beside the weights."""
    if given is not None and not isinstance(given, (str, os.PathLike)):
        return given
    source = os.fspath(given) if given is not None else path
    if not source:
        raise ConfigError("the model does not say where it was loaded from, so its tokenizer must be given: tokenizer=...")
    if source.endswith(".gguf") or (given is None and os.path.exists(source)):
        return load_tokenizer(source)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer at {source}; give one with tokenizer=...: {' '.join(str(error).split())}") from error


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise RequestError("text", "must be a message or a list of messages; a conversation takes one at a time")
    for message in messages:
        if message.get("role") not in _ROLES or not isinstance(message.get("content"), str):
            raise RequestError(
                "text", f"a message has a role ({', '.join(_ROLES)}) and a content that is text, got {shown(message)}"
            )
    if messages[-1]["role"] == "assistant":
        raise RequestError("text", "the last message is an answer already; end with the user's")
