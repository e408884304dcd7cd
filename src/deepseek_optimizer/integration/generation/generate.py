"""The `generate` method of an optimized model.

A plain request (greedy or sampling, any logits processors and stopping criteria, a streamer) is prepared by Transformers and
run by the loop here, which drives the plan without building model inputs, masks and outputs for every token; with `use_mtp`,
`prompt_lookup_num_tokens`, an optimized `assistant_model` or a `proposer`, by the loop in `speculation.py`. Everything else
(beam search, other assistant models, ...) runs Transformers' loops over the plan's forward. Given equal logits, both choose the
same tokens, and without drafts they draw the same random numbers.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import torch
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ...backends.base import Int32
from ...engine.sampling.torch_sampler import largest
from ...errors import UnsupportedRequestError
from ...graph.analysis import dynamic_rope
from ..bind.instance_method import PLANNED, Replacement
from ..bind.runtime import Runtime
from ..compat import CACHE_NAMES, cache_name
from .cache import PagedCache, PagedState
from .checks import check_generation, check_prompt, unserved_mask
from .loop import ContextLimit, RowStops, next_positions, prefill
from .speculation import assistant_runtime, requested_drafts, speculative_sample
from .steps import DecodeSteps
from .token_choice import TokenChoices
from .torch_generator import GENERATOR_LOCK

_SERVED = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
_DRAFTING = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
_TRANSFORMERS_ONLY = ("synced_gpus", "custom_generate")


class PlanGenerate(Replacement):
    """`model.generate`: the arguments of the class's `generate`, and `proposer`, an `engine.speculative.base.Proposer`.

    Raises:
        ValueError: the prompt or a generation option is not valid.
        UnsupportedRequestError: the plan would have to serve the request, but cannot.
    """

    replaces = "generate"

    @torch.compiler.disable(reason=PLANNED)
    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.runtime.backend.thread_context():
            return self._generate(self.named(args, kwargs))

    def _generate(self, call: dict[str, Any]) -> Any:
        proposer = call.pop("proposer", None)
        model = self.runtime.model
        config, inputs = self._settled(call)
        check_prompt(inputs, call.get("attention_mask"), self.runtime.graph)
        check_generation(config)
        longest = self._longest(call, config, inputs)
        cache = next((call[n] for n in CACHE_NAMES if call.get(n) is not None), None)
        reason = self.runtime.unserved()
        if (mask_reason := unserved_mask(call.get("attention_mask"))) is not None:
            if isinstance(cache, PagedCache):
                raise UnsupportedRequestError(
                    f"the plan cannot continue this prompt ({mask_reason}), and a PagedCache can be used only by the plan; pad "
                    "on the left, or pass a transformers.DynamicCache()"
                )
            self.runtime.warn_once(f"{mask_reason}: such prompts run on Transformers' own loop and forward, which is slower")
            reason = mask_reason
        if config.output_hidden_states and self.runtime.graph.hidden_states == 1 and cache is None:
            reason = "hidden states of several residual streams are requested"
        if reason is not None or config.output_attentions or config.cache_implementation is not None:
            self._warn_beyond_context(longest)
            return self._by_transformers(call, config, proposer)  # the forward warns about the reason
        assistant = None if proposer is not None else call.get("assistant_model")
        alike = call.get("assistant_tokenizer") is None
        other = assistant_runtime(self.runtime, assistant) if assistant is not None and alike else None
        if assistant is not None and other is None:
            return self._by_transformers(call, config, proposer)
        asked = [_given(call, model, name, assistant) for name in _DRAFTING]
        drafts = requested_drafts(self.runtime, config, asked[0], asked[1], proposer, asked[2], other)
        if not config.use_cache or not (cache is None or isinstance(cache, PagedCache)):
            return self._by_transformers(call, config, proposer)
        if cache is None:
            for name in CACHE_NAMES:
                call.pop(name, None)
            call[cache_name()] = cache = PagedCache(model)
            if config.is_assistant:
                cache.activate_past_recording()
            owned = True
        else:
            owned = False
        self._expect(cache.state, None if config.is_assistant else longest)
        if self._is_plain(call, config):
            _keep_stop_strings(call, config)
            options: dict[str, Any] = {"runtime": self.runtime, "streamer": call.get("streamer"), "owned": owned}
            if drafts is None:
                return self._original(model, **call, custom_generate=functools.partial(_sample, **options))
            call.pop("assistant_model", None)
            loop = functools.partial(speculative_sample, drafts=drafts, plain=_sample, **options)
            return self._original(model, **_without(call, model, "use_mtp", "prompt_lookup_num_tokens"), custom_generate=loop)
        criteria = StoppingCriteriaList(call.get("stopping_criteria") or ())
        call["stopping_criteria"] = StoppingCriteriaList([*criteria, ContextLimit(self.runtime.graph.max_positions)])
        return self._by_transformers(call, config, proposer)

    def _by_transformers(self, call: dict[str, Any], config: Any, proposer: Any) -> Any:
        """Runs Transformers' own `generate`, without MTP: it would load the MTP layers from the checkpoint again."""
        model = self.runtime.model
        if config.use_mtp or proposer is not None:
            call = _without(call, model, "use_mtp")
            self.runtime.warn_once("a request ran without drafts: its options need Transformers' own loop")
        return self._original(model, **call)

    def _longest(self, call: dict[str, Any], config: Any, inputs: Any) -> int:
        """Maximum number of columns of a row, computed as Transformers does."""
        columns = 1 if inputs is None else int(inputs.shape[1])
        if config.max_new_tokens is not None:
            return columns + int(config.max_new_tokens)
        if (given := _given(call, self.runtime.model, "max_length")) is not None:
            return int(given)
        if self.runtime.graph.max_positions > self.runtime.model.config.get_text_config().max_position_embeddings:
            call["max_new_tokens"] = (
                config.max_length
            )  # Transformers' default ends at the trained length; the context is longer
        return columns + int(config.max_length)

    def _expect(self, state: PagedState, longest: int | None) -> None:
        """Sets the maximum length of a cache's rows. Existing rows keep their RoPE frequencies; warns if these do not fit."""
        state.length = longest
        rope, reach = dynamic_rope(self.runtime.graph), int(state.reach.max(initial=0))
        if rope is not None and longest is not None and reach and longest > max(reach, rope.context):
            self.runtime.warn_once(
                f"the cache uses RoPE frequencies for {reach} tokens, but may grow to {longest} tokens, which lowers quality; "
                "set max_length to the final length from the first call on"
            )

    def _warn_beyond_context(self, longest: int) -> None:
        context = self.runtime.graph.max_positions
        if longest > context:
            self.runtime.warn_once(
                f"Transformers' own loop continues beyond the model's context of {context} tokens, where quality is not assured"
            )

    def _settled(self, call: dict[str, Any]) -> tuple[Any, Any]:
        """The generation config with all defaults filled in, and the prompt."""
        arguments = {n: v for n, v in call.items() if n not in self._order}
        config, rest = self.runtime.model._prepare_generation_config(call.get("generation_config"), **arguments)
        inputs = call.get("inputs")
        for name in ("input_ids", "inputs_embeds"):
            inputs = rest.get(name) if inputs is None else inputs
        return config, inputs

    def _is_plain(self, call: dict[str, Any], config: Any) -> bool:
        return (
            self.runtime.config.fast_path
            and not any(call.get(name) for name in _TRANSFORMERS_ONLY)
            and config.get_generation_mode(None) in _SERVED
            and config.assistant_early_exit is None
            and not config.output_hidden_states
            and not config.token_healing
            and not call.get("output_hidden_states")
            and "prepare_inputs_for_generation" not in self.runtime.model.__dict__
        )


def _given(call: dict[str, Any], model: Any, name: str, assistant: Any = None) -> Any:
    """A generation option set by the caller, or in the generation config of an assistant model or the model; None if none of
    them sets it."""
    configs = (call.get("generation_config"), getattr(assistant, "generation_config", None), model.generation_config)
    values = (call.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def _without(call: dict[str, Any], model: Any, *names: str) -> dict[str, Any]:
    """The call with these generation options turned off, wherever they were set."""
    call, config = dict(call), copy.deepcopy(call.get("generation_config"))
    for name in names:
        off = False if name == "use_mtp" else None
        if config is None or getattr(model.generation_config, name):  # which would replace None
            call[name] = off
        else:
            call.pop(name, None)
    if config is not None:
        config.update(**dict.fromkeys(names))
        call["generation_config"] = config
    return call


def _keep_stop_strings(call: dict[str, Any], config: Any) -> None:
    """Creates the stop string criterion: with a custom loop, `generate` drops the tokenizer that it needs."""
    tokenizer = call.pop("tokenizer", None)
    if config.stop_strings is None:
        return
    if tokenizer is None:
        raise ValueError("stop_strings requires the tokenizer; call generate(..., stop_strings=..., tokenizer=tokenizer)")
    stop = StopStringCriteria(stop_strings=config.stop_strings, tokenizer=tokenizer)
    call["stopping_criteria"] = StoppingCriteriaList([*(call.get("stopping_criteria") or ()), stop])
    call["stop_strings"] = None


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

    Rows that have ended are left out of later steps, unless the caller can observe what they would have computed.
    """
    config, stop = generation_config, RowStops(stopping_criteria)
    pad = config._pad_token_tensor
    as_dict = bool(config.return_dict_in_generate)
    scores: tuple[torch.Tensor, ...] | None = () if as_dict and config.output_scores else None
    raw_logits: tuple[torch.Tensor, ...] | None = () if as_dict and config.output_logits else None
    drop_ended = stop.has_eos and owned and not as_dict

    logits, cache = prefill(model, input_ids, config, model_kwargs)
    logits = logits.to(input_ids.device)
    rows, context = input_ids.shape[0], runtime.graph.max_positions
    choices = None
    if runtime.backend.capabilities.decode_calls and input_ids.device.type == "cpu" and scores is None and raw_logits is None:
        choices = TokenChoices.of(config, logits_processor, stop, rows, streamed=streamer is not None)
    overwrite = not as_dict and not logits_processor and not stop.others  # no caller can keep a step's logits
    steps = DecodeSteps(runtime, cache.state, next_positions(model_kwargs, cache.get_seq_length(), rows), overwrite=overwrite)
    alive = [True] * rows
    chosen: torch.Tensor | None = None  # int64 [rows, n], tokens that the backend chose in several steps
    undecided = False  # `logits` are those after `chosen`
    while True:
        if chosen is None:
            if raw_logits is not None:
                raw_logits += (logits,)
            chosen_from = logits_processor(input_ids, logits) if logits_processor else logits
            if scores is not None:
                scores += (chosen_from,)
            if config.do_sample:
                with GENERATOR_LOCK:
                    chosen = torch.multinomial(chosen_from.softmax(-1), num_samples=1)
            else:
                chosen = largest(chosen_from)[:, None]
            if stop.has_eos and not all(alive):
                chosen = torch.where(torch.tensor(alive, device=chosen.device, dtype=torch.bool)[:, None], chosen, pad)
        input_ids = torch.cat([input_ids, chosen], dim=-1)
        tokens = chosen[:, -1].tolist()  # only the last ones can end a row
        ended = stop(input_ids, tokens, scores)
        alive = [a and not e for a, e in zip(alive, ended, strict=True)]
        if streamer is not None:
            for column in chosen.cpu().unbind(1):
                streamer.put(column)
        if not any(alive):
            break
        if undecided:
            chosen, undecided = None, False
            continue
        if steps.next_position >= context:
            runtime.warn_once(f"generation stopped at the model's context of {context} tokens")
            break
        if drop_ended and sum(alive) < len(steps.rows):
            steps.keep([i for i, row in enumerate(steps.rows) if alive[row]])
        chosen = None
        tokens = [tokens[row] for row in steps.rows]
        if choices is not None and all(alive[row] for row in steps.rows):
            count = min(steps.room, context - steps.next_position)
            if stop.max_length is not None:
                count = min(count, stop.max_length - input_ids.shape[1])
            decoded = choices.decode(steps, input_ids.__getitem__, tokens, count)
            if len(decoded.tokens):
                chosen = _in_rows(decoded.tokens, steps.rows, rows, pad)
            new_logits = decoded.logits
            undecided = chosen is not None and new_logits is not None
        else:
            new_logits = steps.run(tokens)
        if new_logits is None:
            continue
        if len(steps.rows) == rows:
            logits = new_logits.to(input_ids.device)
        else:  # ended rows keep their logits: sampling from them leaves the random numbers of other rows unchanged
            logits = logits.clone()
            logits[steps.rows] = new_logits.to(input_ids.device)
    if streamer is not None:
        streamer.end()
    if not as_dict:
        return input_ids
    fields: dict[str, Any] = {"sequences": input_ids, "scores": scores, "logits": raw_logits, cache_name(): cache}
    return GenerateDecoderOnlyOutput(**fields)


def _in_rows(tokens: Int32, running: list[int], rows: int, pad: Any) -> torch.Tensor:
    """int64 [rows, steps] of the tokens [steps, running rows]; rows that have ended get `pad`."""
    chosen = torch.from_numpy(tokens.T.astype(np.int64))
    if len(running) == rows:
        return chosen
    whole = pad.expand(rows, chosen.shape[1]).clone()
    whole[running] = chosen
    return whole
