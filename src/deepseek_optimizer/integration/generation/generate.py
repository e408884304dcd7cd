"""An optimised model's `generate`.

A plain request (greedy or sampling, any logits processors and stopping criteria, a streamer) goes through Transformers' own
preparation and then a loop of ours, which drives the plan without building model inputs, masks and outputs at every token; with
`use_mtp`, `prompt_lookup_num_tokens` or a `proposer`, the loop of `speculation.py`. Everything else (beams, assistants, ...)
runs Transformers' loops over the plan's forward. Given equal logits both choose the same tokens, and, without drafts, draw the
same random numbers.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ...engine.sampling.sampler import largest
from ...errors import UnsupportedRequestError
from ...graph.analysis import dynamic_rope
from ..bind.instance_method import PLANNED, Replacement
from ..bind.runtime import Runtime
from ..compat import CACHE_NAMES, cache_name
from .cache import PagedCache, PagedState
from .checks import check_generation, check_prompt, unserved_mask
from .loop import ContextLimit, RowStops, next_positions, prefill
from .speculation import speculative_sample, wanted_drafts
from .steps import DecodeSteps

_SERVED = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
_HANDS_OFF = ("assistant_model", "synced_gpus", "custom_generate")


class PlanGenerate(Replacement):
    """`model.generate`. Takes what the class's own takes, and `proposer`: an `engine.speculative.base.Proposer`."""

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
        reason = self.runtime.changed()
        if (mask_reason := unserved_mask(call.get("attention_mask"))) is not None:
            if isinstance(cache, PagedCache):
                raise UnsupportedRequestError(
                    f"the plan cannot continue this prompt ({mask_reason}), and only it can use a PagedCache; pad on the left, "
                    "or pass a transformers.DynamicCache()"
                )
            self.runtime.warn_once(f"{mask_reason}: Transformers' own loop and forward serve such prompts, slower")
            reason = mask_reason
        if reason is not None or config.output_attentions or config.cache_implementation is not None:
            self._may_go_beyond(longest)
            return self._handed_on(call, config, proposer)  # the forward says why it is slower
        most, schedule = (_given(call, model, f"num_assistant_tokens{part}") for part in ("", "_schedule"))
        drafts = wanted_drafts(self.runtime, config, most, schedule, proposer)
        if not config.use_cache or not (cache is None or isinstance(cache, PagedCache)):
            return self._handed_on(call, config, proposer)
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
            loop = functools.partial(speculative_sample, drafts=drafts, plain=_sample, **options)
            return self._original(model, **_without(call, model, "use_mtp", "prompt_lookup_num_tokens"), custom_generate=loop)
        criteria = StoppingCriteriaList(call.get("stopping_criteria") or ())
        call["stopping_criteria"] = StoppingCriteriaList([*criteria, ContextLimit(self.runtime.graph.max_positions)])
        return self._handed_on(call, config, proposer)

    def _handed_on(self, call: dict[str, Any], config: Any, proposer: Any) -> Any:
        """Transformers' own `generate`. Its MTP layers would be read from the checkpoint anew, so it gets none."""
        model = self.runtime.model
        if config.use_mtp or proposer is not None:
            call = _without(call, model, "use_mtp")
            self.runtime.warn_once("a request ran without drafts: its options need Transformers' own loop")
        return self._original(model, **call)

    def _longest(self, call: dict[str, Any], config: Any, inputs: Any) -> int:
        """Columns that a row may come to have, as Transformers will settle it."""
        columns = 1 if inputs is None else int(inputs.shape[1])
        if config.max_new_tokens is not None:
            return columns + int(config.max_new_tokens)
        if (given := _given(call, self.runtime.model, "max_length")) is not None:
            return int(given)
        if self.runtime.graph.max_positions > self.runtime.model.config.max_position_embeddings:
            call["max_new_tokens"] = config.max_length  # the default would end at the trained length, and there is more room
        return columns + int(config.max_length)

    def _expect(self, state: PagedState, longest: int | None) -> None:
        """Tells a cache how long its rows may become. Those that it holds keep the frequencies that they have."""
        state.length = longest
        rope, begun = dynamic_rope(self.runtime.graph), int(state.reach.max(initial=0))
        if rope is not None and longest is not None and begun and longest > max(begun, rope.context):
            self.runtime.warn_once(
                f"the cache was begun for {begun} tokens, whose frequencies it keeps, and may come to hold {longest}: quality "
                "suffers; begin it with as large a max_length"
            )

    def _may_go_beyond(self, longest: int) -> None:
        context = self.runtime.graph.max_positions
        if longest > context:
            self.runtime.warn_once(
                f"Transformers' own loop goes on beyond the model's context of {context} tokens, where quality is not assured"
            )

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
            and config.get_generation_mode(None) in _SERVED
            and config.assistant_early_exit is None
            and not config.output_hidden_states
            and not config.token_healing
            and not call.get("output_hidden_states")
            and "prepare_inputs_for_generation" not in self.runtime.model.__dict__
        )


def _given(call: dict[str, Any], model: Any, name: str) -> Any:
    """A generation option as the caller or the model's generation config has it, without Transformers' default; or None."""
    found = (call.get(name), getattr(call.get("generation_config"), name, None), getattr(model.generation_config, name, None))
    return next((value for value in found if value is not None), None)


def _without(call: dict[str, Any], model: Any, *names: str) -> dict[str, Any]:
    """The call with these generation options off, wherever they were set."""
    call, config = dict(call), copy.deepcopy(call.get("generation_config"))
    for name in names:
        off = False if name == "use_mtp" else None
        if config is None or getattr(model.generation_config, name):  # which fills in what is None
            call[name] = off
        else:
            call.pop(name, None)
    if config is not None:
        config.update(**dict.fromkeys(names))
        call["generation_config"] = config
    return call


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
    config, stop = generation_config, RowStops(stopping_criteria)
    pad = config._pad_token_tensor
    as_dict = bool(config.return_dict_in_generate)
    scores: tuple[torch.Tensor, ...] | None = () if as_dict and config.output_scores else None
    raw_logits: tuple[torch.Tensor, ...] | None = () if as_dict and config.output_logits else None
    drop_ended = stop.has_eos and owned and not as_dict

    logits, cache = prefill(model, input_ids, config, model_kwargs)
    logits = logits.to(input_ids.device)
    rows = input_ids.shape[0]
    unseen = not as_dict and not logits_processor and not stop.others  # nobody can keep a step's logits
    steps = DecodeSteps(runtime, cache.state, next_positions(model_kwargs, cache.get_seq_length(), rows), overwrite=unseen)
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
            next_tokens = largest(chosen_from)
        if stop.has_eos and not all(alive):
            next_tokens = torch.where(torch.tensor(alive, device=next_tokens.device, dtype=torch.bool), next_tokens, pad)
        tokens = next_tokens.tolist()
        input_ids = torch.cat([input_ids, next_tokens[:, None]], dim=-1)
        ended = stop(input_ids, tokens, scores)
        alive = [a and not e for a, e in zip(alive, ended, strict=True)]
        if streamer is not None:
            streamer.put(next_tokens.cpu())
        if not any(alive):
            break
        if steps.next_position >= runtime.graph.max_positions:
            runtime.warn_once(f"generation stopped at the model's context of {runtime.graph.max_positions} tokens")
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
