"""An optimised model's `generate`.

A plain request (greedy or sampling, any logits processors and stopping criteria, a streamer) goes through Transformers' own
preparation and then a loop of ours, which drives the plan without building model inputs, masks and outputs at every token.
Everything else (beams, assistants, prompt lookup, ...) runs Transformers' loops over the plan's forward. Given equal logits
both choose the same tokens, and draw the same random numbers.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .cache import PagedCache
from .checks import check_generation, check_prompt
from .compat import CACHE_NAMES, cache_name
from .instance_method import Replacement
from .runtime import Runtime
from .steps import DecodeSteps

_PLAIN = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_HANDS_OFF = ("assistant_model", "synced_gpus", "custom_generate")


class PlanGenerate(Replacement):
    """`model.generate`. Takes what the class's own takes."""

    replaces = "generate"

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.named(args, kwargs)
        model = self.runtime.model
        config, inputs = self._settled(call)
        check_prompt(inputs, call.get("attention_mask"), self.runtime.graph)
        check_generation(config)
        given = next((call[n] for n in CACHE_NAMES if call.get(n) is not None), None)
        reason = self.runtime.changed()
        if reason is not None or config.output_attentions or config.cache_implementation is not None:
            return self._original(model, **call)  # the forward says why it is slower
        if not config.use_cache or not (given is None or isinstance(given, PagedCache)):
            return self._original(model, **call)
        if given is None:
            for name in CACHE_NAMES:
                call.pop(name, None)
            call[cache_name()] = given = PagedCache(model)
            if config.is_assistant:
                given.activate_past_recording()
            owned = True
        else:
            owned = False
        if self._is_plain(call, config):
            _keep_stop_strings(call, config)
            loop = functools.partial(_sample, runtime=self.runtime, streamer=call.get("streamer"), owned=owned)
            return self._original(model, **call, custom_generate=loop)
        criteria = StoppingCriteriaList(call.get("stopping_criteria") or ())
        call["stopping_criteria"] = StoppingCriteriaList([*criteria, ContextLimit(self.runtime.graph.max_positions)])
        return self._original(model, **call)

    def _settled(self, call: dict[str, Any]) -> tuple[Any, Any]:
        """The generation config with all defaults in, and the prompt."""
        arguments = {n: v for n, v in call.items() if n not in self._order}
        config, rest = self.runtime.model._prepare_generation_config(call.get("generation_config"), **arguments)
        inputs = call.get("inputs")
        for name in ("input_ids", "inputs_embeds"):
            inputs = rest.get(name) if inputs is None else inputs
        return config, inputs

    def _is_plain(self, call: dict[str, Any], config: Any) -> bool:
        return (
            self.runtime.config.fast_path
            and not any(call.get(name) for name in _HANDS_OFF)
            and config.get_generation_mode(None) in _PLAIN
            and not config.output_hidden_states
            and not config.token_healing
            and not call.get("output_hidden_states")
            and "prepare_inputs_for_generation" not in self.runtime.model.__dict__
        )


def _keep_stop_strings(call: dict[str, Any], config: Any) -> None:
    """`generate` drops the tokenizer where a custom loop is given, so the criterion that needs it is made here."""
    tokenizer = call.pop("tokenizer", None)
    if config.stop_strings is None:
        return
    if tokenizer is None:
        raise ValueError("stop_strings need the model's tokenizer: generate(..., stop_strings=..., tokenizer=tokenizer)")
    stop = StopStringCriteria(stop_strings=config.stop_strings, tokenizer=tokenizer)
    call["stopping_criteria"] = StoppingCriteriaList([*(call.get("stopping_criteria") or ()), stop])
    call["stop_strings"] = None


class ContextLimit(StoppingCriteria):
    """Stops where the model's context ends, instead of failing there."""

    def __init__(self, max_positions: int) -> None:
        self.max_positions = max_positions

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.max_positions, device=input_ids.device)


class _Stop:
    """Which rows end at a token. The usual criteria cost no tensor work; others are called as Transformers calls them."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        self.eos: set[int] = set()
        self.max_length: int | None = None
        self.has_eos = any(hasattr(c, "eos_token_id") for c in criteria)
        self.others = StoppingCriteriaList()
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self.eos |= set(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is MaxLengthCriteria and self.max_length is None:
                self.max_length = criterion.max_length
            else:
                self.others.append(criterion)

    def __call__(self, input_ids: torch.Tensor, tokens: list[int], scores: Any) -> list[bool]:
        if self.max_length is not None and input_ids.shape[1] >= self.max_length:
            ended = [True] * len(tokens)
        else:
            ended = [token in self.eos for token in tokens]
        if self.others:
            ended = [a or b for a, b in zip(ended, self.others(input_ids, scores).tolist(), strict=True)]
        return ended


def _prefill(model: Any, input_ids: torch.Tensor, config: Any, model_kwargs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """Logits of the last column, float32 [B, V], and the filled cache; copies of a prompt are computed once."""
    cache = model_kwargs[cache_name()]
    copies = config.num_return_sequences
    if copies == 1 or cache.get_seq_length():
        outputs = model._prefill(input_ids, config, model_kwargs, is_first_iteration=not config.is_assistant)
        return outputs.logits[:, -1], cache
    rows = input_ids.shape[0]
    single = {
        name: value[::copies] if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == rows else value
        for name, value in model_kwargs.items()
    }
    outputs = model._prefill(input_ids[::copies], config, single, is_first_iteration=not config.is_assistant)
    cache.batch_repeat_interleave(copies)
    return outputs.logits[:, -1].repeat_interleave(copies, 0), cache


def _sample(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    runtime: Runtime,
    streamer: Any,
    owned: bool,
    **model_kwargs: Any,
) -> Any:
    """Transformers' `_sample` with the plan in place of `model(...)`.

    Rows that ended are left out of the steps that follow, unless someone can see what they would have computed.
    """
    config, stop = generation_config, _Stop(stopping_criteria)
    pad = config._pad_token_tensor
    as_dict = bool(config.return_dict_in_generate)
    scores: tuple[torch.Tensor, ...] | None = () if as_dict and config.output_scores else None
    raw_logits: tuple[torch.Tensor, ...] | None = () if as_dict and config.output_logits else None
    drop_ended = stop.has_eos and owned and not as_dict

    logits, cache = _prefill(model, input_ids, config, model_kwargs)
    logits = logits.to(input_ids.device)
    rows = input_ids.shape[0]
    unseen = not as_dict and not logits_processor and not stop.others  # nobody can keep a step's logits
    steps = DecodeSteps(runtime, cache.state, _next_positions(model_kwargs, cache, rows), overwrite=unseen)
    alive = [True] * rows
    while True:
        if raw_logits is not None:
            raw_logits += (logits,)
        chosen_from = logits_processor(input_ids, logits) if logits_processor else logits
        if scores is not None:
            scores += (chosen_from,)
        if config.do_sample:
            next_tokens = torch.multinomial(chosen_from.softmax(-1), num_samples=1).squeeze(1)
        else:
            next_tokens = _largest(chosen_from)
        if stop.has_eos and not all(alive):
            next_tokens = torch.where(torch.tensor(alive, device=next_tokens.device), next_tokens, pad)
        tokens = next_tokens.tolist()
        input_ids = torch.cat([input_ids, next_tokens[:, None]], dim=-1)
        ended = stop(input_ids, tokens, scores)
        alive = [a and not e for a, e in zip(alive, ended, strict=True)]
        if streamer is not None:
            streamer.put(next_tokens.cpu())
        if not any(alive):
            break
        if steps.next_position >= runtime.graph.max_positions:
            runtime.tell(f"generation stopped at the model's context of {runtime.graph.max_positions} tokens")
            break
        if drop_ended and sum(alive) < len(steps.rows):
            steps.keep([i for i, row in enumerate(steps.rows) if alive[row]])
        made = steps.run([tokens[row] for row in steps.rows])
        if len(steps.rows) == rows:
            logits = made.to(input_ids.device)
        else:  # ended rows keep their old logits: drawn from, so that the others' random numbers stay the same, and padded over
            logits = logits.clone()
            logits[steps.rows] = made.to(input_ids.device)
    if streamer is not None:
        streamer.end()
    if not as_dict:
        return input_ids
    fields: dict[str, Any] = {"sequences": input_ids, "scores": scores, "logits": raw_logits, cache_name(): cache}
    return GenerateDecoderOnlyOutput(**fields)


def _largest(logits: torch.Tensor) -> torch.Tensor:
    """Index of each row's largest logit, the first of equals: float [B, V] -> int64 [B].

    By numpy on the CPU: torch shares a vocabulary among its own threads, which then wait for the cores that the plan's hold.
    """
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return logits.argmax(-1)
    return torch.from_numpy(logits.detach().numpy().argmax(-1))


def _next_positions(model_kwargs: dict[str, Any], cache: PagedCache, rows: int) -> Any:
    """Positions of the first generated tokens, int32 [B]: one past the prompt's last, as Transformers counts on."""
    positions = model_kwargs.get("position_ids")
    if positions is None:
        return np.full(rows, cache.get_seq_length(), np.int32)
    return np.broadcast_to(positions[:, -1].cpu().numpy().astype(np.int32) + 1, (rows,))
