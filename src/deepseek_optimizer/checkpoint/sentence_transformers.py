"""How sentence-transformers turns hidden states into an embedding: the files that it adds to a checkpoint.

`modules.json` lists the modules after the model (Pooling, Dense, Normalize, LogitScore), each with a folder of its own, and
`config_sentence_transformers.json` has the prompts. Source: sentence-transformers 6 (`base/modules`, `sentence_transformer`).
No class that a file names is imported, and no pickle is opened.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, shown
from .files import DataFile, inside, parse_json, read_json
from .safetensors import FLOATS, open_safetensors

POOLING_MODES: Final = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_FLAGS = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip
ACTIVATIONS: Final = ("Identity", "Tanh", "ReLU", "Sigmoid")
_MAX_PROMPTS, _MAX_PROMPT_CHARACTERS, _MAX_MODULES, _MAX_FEATURES = 256, 16_384, 16, 1 << 16
_MAX_JSON_BYTES = 1 << 20


@dataclass(frozen=True)
class Dense:
    """A linear layer on the pooled vector.

    Attributes:
        weight: float32 [out, in].
        bias: float32 [out]; None: none.
        activation: name in `ACTIVATIONS` of the function after it.
        residual: float32 [out, in], the projection of the input that is added to the result; "same": the input itself is
            added; None: nothing is.
    """

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32] | None = None
    activation: str = "Identity"
    residual: npt.NDArray[np.float32] | str | None = None


@dataclass(frozen=True)
class EmbeddingSettings:
    """How a checkpoint's texts are embedded and scored. The defaults are those for a checkpoint without such files.

    Attributes:
        pooling: names in `POOLING_MODES`; the vectors of several are concatenated.
        include_prompt: whether the tokens of a prompt are pooled too.
        dense: layers after pooling, in order.
        prompts: prefixes of texts by name, such as "query" and "document".
        default_prompt: name of the prompt of texts for which none is chosen; None: they have none.
        max_tokens: maximum number of tokens of a text; None: that of the model.
        lower_case: whether texts are converted to lower case.
        score_tokens: for a language model that scores pairs of texts: ids of the tokens that stand for a match and for none;
            None: the checkpoint names none.
        score_activation: "identity" or "sigmoid", the function from a cross-encoder's logit to its score; None: the checkpoint
            names none.
        chat_template: whether sentence-transformers formats each text with the chat template, which is not supported.
    """

    pooling: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    dense: tuple[Dense, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_tokens: int | None = None
    lower_case: bool = False
    score_tokens: tuple[int, int] | None = None
    score_activation: Literal["identity", "sigmoid"] | None = None
    chat_template: bool = False

    def check(self, hidden: int) -> None:
        """Checks that the dense layers fit each other and the model.

        Args:
            hidden: number of elements of a hidden state.

        Raises:
            CheckpointError: they do not.
        """
        size = hidden * len(self.pooling)
        for place, layer in enumerate(self.dense):
            if layer.weight.shape[1] != size:
                raise CheckpointError(f"dense layer {place} takes vectors of {layer.weight.shape[1]}, but gets {size} elements")
            size = layer.weight.shape[0]


def read_embedding_settings(path: Path) -> EmbeddingSettings:
    """Reads the files of a checkpoint.

    Args:
        path: its directory; for a single file, and a directory without `modules.json`, the defaults.

    Raises:
        CheckpointError: a file is damaged, or a module is not supported.
    """
    if not path.is_dir():
        return EmbeddingSettings()
    values: dict[str, Any] = _whole(path)
    if not (path / "modules.json").is_file():
        return EmbeddingSettings(**values)
    folder_of_model, pooled, dense = "", False, []
    for kind, folder in _modules(path):
        if kind == "Transformer":
            folder_of_model = folder
        elif kind == "Pooling":
            values |= _pooling(path, folder)
            pooled = True
        elif kind == "Dense" and pooled:
            dense.append(_dense(path, folder))
        elif kind == "LogitScore":
            values["score_tokens"] = _score_tokens(path, folder)
        elif kind not in ("Normalize", "Dropout"):
            raise CheckpointError(
                f"lists the module {shown(kind)}{' before the pooling' if kind == 'Dense' else ''}, which is not supported; "
                "without modules.json, embeddings are the mean of the hidden states",
                file=path / "modules.json",
            )
    return EmbeddingSettings(**values, **_limits(path, folder_of_model), dense=tuple(dense))


def copy_embedding_files(source: Path, target: Path) -> None:
    """Copies the files that `read_embedding_settings` reads, if there are any.

    Args:
        source: directory of a checkpoint.
        target: directory of its converted copy.

    Raises:
        CheckpointError: a module's folder is outside the checkpoint.
    """
    if not (source / "modules.json").is_file():
        return
    names = ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"]
    for kind, folder in _modules(source):
        if folder:
            names += [f"{folder}/config.json", *([f"{folder}/model.safetensors"] if kind == "Dense" else [])]
    for name in names:
        if (path := inside(source, name)).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)


def _modules(path: Path) -> list[tuple[str, str]]:
    """(last part of the class's name, folder) of each module."""
    file = DataFile(inside(path, "modules.json"))
    try:
        if file.size > _MAX_JSON_BYTES:
            raise CheckpointError(f"has {file.size} bytes, more than {_MAX_JSON_BYTES} for a list of modules", file=file.path)
        value = parse_json(b'{"modules": %b}' % file.read(0, file.size), file.path, "the file")["modules"]
    finally:
        file.close()
    if not isinstance(value, list) or len(value) > _MAX_MODULES:
        raise CheckpointError(f"must be a list of at most {_MAX_MODULES} modules", file=file.path)
    modules = []
    for entry in value:
        kind, folder = (entry.get("type"), entry.get("path", "")) if isinstance(entry, dict) else (None, "")
        if not isinstance(kind, str) or not isinstance(folder, str):
            raise CheckpointError("each module must have a type and a path, both strings", file=file.path)
        modules.append((kind.rpartition(".")[2], folder))
    return modules


def _config(path: Path, folder: str, name: str = "config.json") -> dict[str, Any]:
    return read_json(path, f"{folder}/{name}" if folder else name)


def _pooling(path: Path, folder: str) -> dict[str, Any]:
    config = _config(path, folder)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _FLAGS.items() if config.get(flag)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if (
        not isinstance(modes, list)
        or not 1 <= len(modes) <= len(POOLING_MODES)
        or any(mode not in POOLING_MODES for mode in modes)
    ):
        raise CheckpointError(f"pooling_mode must be one or several of {', '.join(POOLING_MODES)}", file=path / folder)
    return {"pooling": tuple(modes), "include_prompt": config.get("include_prompt", True) is not False}


def _dense(path: Path, folder: str) -> Dense:
    config = _config(path, folder)
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"activation_function {shown(activation)} is not supported (supported: {', '.join(ACTIVATIONS)})",
            file=path / folder,
        )
    tensors = _tensors(path, f"{folder}/model.safetensors" if folder else "model.safetensors")
    weight, bias = tensors.get("linear.weight"), tensors.get("linear.bias")
    if weight is None or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise CheckpointError("must have linear.weight [out, in], and linear.bias [out] if any", file=path / folder)
    residual: Any = None
    if config.get("use_residual"):
        residual = "same" if weight.shape[0] == weight.shape[1] else tensors.get("residual.weight")
        if residual is None or (residual is not None and not isinstance(residual, str) and residual.shape != weight.shape):
            raise CheckpointError("with use_residual, must have residual.weight of linear.weight's shape", file=path / folder)
    return Dense(weight, bias, activation, residual)


def _tensors(path: Path, name: str) -> dict[str, npt.NDArray[np.float32]]:
    file = DataFile(inside(path, name))
    try:
        tensors = {}
        for info in open_safetensors(file).tensors.values():
            if info.dtype not in FLOATS or max(info.shape, default=1) > _MAX_FEATURES:
                raise CheckpointError(
                    f"must be a float tensor with at most {_MAX_FEATURES} rows and columns", file=file.path, tensor=info.name
                )
            values = file.read_tensor(info.offset, info.nbytes).view(FLOATS[info.dtype]).reshape(info.shape)
            tensors[info.name] = values.float().numpy()
        return tensors
    finally:
        file.close()


def _score_tokens(path: Path, folder: str) -> tuple[int, int]:
    config = _config(path, folder)
    ids = config.get("true_token_id"), config.get("false_token_id")
    if not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError("true_token_id and false_token_id must be token ids", file=path / folder)
    return ids  # type: ignore[return-value]  # checked


def _whole(path: Path) -> dict[str, Any]:
    """The settings in config_sentence_transformers.json: prompts, and the activation of a cross-encoder."""
    name = "config_sentence_transformers.json"
    if not (path / name).is_file():
        return {}
    config = read_json(path, name)
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    valid = isinstance(prompts, dict) and len(prompts) <= _MAX_PROMPTS
    if not valid or not all(isinstance(text, str) and len(text) <= _MAX_PROMPT_CHARACTERS for text in prompts.values()):
        raise CheckpointError(
            f"prompts must map at most {_MAX_PROMPTS} names to strings of at most {_MAX_PROMPT_CHARACTERS} characters",
            file=path / name,
        )
    if default is not None and default not in prompts:
        raise CheckpointError("default_prompt_name must be the name of one of the prompts", file=path / name)
    activation = score_activation(config.get("activation_fn"), path / name)
    return {"prompts": prompts, "default_prompt": default, "score_activation": activation}


def score_activation(name: Any, file: Path) -> Literal["identity", "sigmoid"] | None:
    """The function from a cross-encoder's logit to its score, given the name of a module of torch; None: there is none.

    Raises:
        CheckpointError: it is another function.
    """
    if name is None:
        return None
    known: dict[str, Literal["identity", "sigmoid"]] = {"Identity": "identity", "Sigmoid": "sigmoid"}
    if (kind := str(name).rpartition(".")[2]) not in known:
        raise CheckpointError(f"the activation function {shown(kind)} of scores is not supported", file=file)
    return known[kind]


def _limits(path: Path, folder: str) -> dict[str, Any]:
    place = f"{folder}/sentence_bert_config.json" if folder else "sentence_bert_config.json"
    if not (path / place).is_file():
        return {}
    config = read_json(path, place)
    limit = config.get("max_seq_length")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise CheckpointError("max_seq_length must be a number of tokens", file=path / place)
    modalities = config.get("modality_config")
    messages = isinstance(modalities, dict) and "message" in modalities
    return {"max_tokens": limit, "lower_case": config.get("do_lower_case") is True, "chat_template": messages}
