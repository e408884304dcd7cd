"""Where optimized models deviate from what Transformers' tests expect of every model: at most ten kinds, each with a reason.

A test that passes on the plain model and fails on the optimized one must match an entry by its name and its error. An entry
that no test matches any more is an error too, where every family is run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX = 10


@dataclass(frozen=True)
class Kind:
    """One kind of deviation.

    Attributes:
        name, why: its name, and the reason for it.
        tests: a regular expression that matches the whole name of each test.
        error: a regular expression that matches in the error of each, or in its reason to skip.
        families: the families that it applies to; (): all.
    """

    name: str
    why: str
    tests: str
    error: str
    families: tuple[str, ...] = ()

    def fits(self, family: str, test: str, error: str) -> bool:
        if self.families and family not in self.families:
            return False
        return re.fullmatch(self.tests, test) is not None and re.search(self.error, error, re.DOTALL) is not None


KINDS = (
    Kind(
        "frozen weights",
        "packed weights have no gradient: adapters are trained on them, or the float model is",
        r"test_(training\w*|retain_grad_hidden_states_attentions|enable_input_require_grads_with_gradient_checkpointing)",
        r"does not require grad|can require gradients|can't retain_grad|No model with a differentiable loss",
    ),
    Kind(
        "packed parameters",
        "a parameter is a uint8 tensor of tiles, not a float matrix: other shapes and dtypes, other names in a file",
        r"test_(from_pretrained_no_checkpoint|resize_\w+|reverse_loading_mapping)",
        r"ignore_mismatched_sizes|AssertionError",
    ),
    Kind(
        "complete checkpoints",
        "a checkpoint that lacks weights is refused, where Transformers draws random ones and warns",
        r"test_(correct_missing_keys|model_weights_reload_no_missing_tied_weights)",
        r"CheckpointError.*is missing",
    ),
    Kind(
        "no casts",
        "packed weights are not cast: the error says to load them in another dtype, and what is packed in fp32 stays in that",
        r"test_(generate_with_static_cache|eager_matches_batched_and_grouped_inference\w*|keep_in_fp32_modules)",
        r"cannot be cast|was upcasted but it should NOT",
    ),
    Kind(
        "native plan",
        "the plan computes natively: what a test watches (torch.compile, Transformers' functions) is not called",
        r"test_(eager_matches_batched_and_grouped_inference\w*|generate_compil\w+|static_cache_no_recompile\w+)",
        r"to have been called|False is not true",
    ),
    Kind(
        "factors of embeddings",
        "Gemma's factor of embeddings is an attribute of the packed embedding, not a buffer that is initialized",
        r"test_init_weights_can_init_buffers",
        r"embed_tokens\.embed_scale",
    ),
    Kind(
        "compressed padding",
        "Transformers compresses padding with the text, so that a row depends on how long others are; the plan computes each "
        "row as by itself (`test_padded_rows_equal_rows_by_themselves`)",
        r"test_(generate_(\w+_left_padding|repetition|sample_warped|several_sequences|without_cache|goes_on_from_padded_rows)"
        r"|forward_takes_padding)",
        r"Tensor-likes are not close|Lists differ",
        families=("deepseek_v4",),
    ),
)
