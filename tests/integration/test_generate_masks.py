"""generate(attention_mask=...): masks that only Transformers' loop and forward support, and the message that says so."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from deepseek_optimizer import PagedCache, UnsupportedRequestError
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.integration.compat import cache_name

RIGHT = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
TRIANGLE = torch.tril(torch.ones(4, 6, dtype=torch.long))  # as in Transformers' own testers
HOLES = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1]])


def generated(model, ids, **call):
    return model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, **call)


@pytest.mark.parametrize("mask", [RIGHT, TRIANGLE], ids=["right", "triangle"])
def test_prompts_that_end_in_padding_continue_as_in_transformers(fresh_pair, mask):
    ids = fresh_pair.ids(*[6] * len(mask))
    with pytest.warns(OptimizerWarning, match=r"row \d of the prompt ends in padding.*padding_side.*slower"):
        fast = generated(fresh_pair.fast, ids, attention_mask=mask)
    assert torch.equal(fast, generated(fresh_pair.plain, ids, attention_mask=mask))


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 2}]
)
@pytest.mark.filterwarnings("ignore::deepseek_optimizer.integration.bind.runtime.OptimizerWarning")
def test_other_loops_too(fresh_pair, options):
    rows = 1 if "prompt_lookup_num_tokens" in options else 2
    ids, mask = fresh_pair.ids(6, 6)[:rows], RIGHT.flip(0)[:rows]
    fast, plain = (generated(m, ids, attention_mask=mask, **options) for m in (fresh_pair.fast, fresh_pair.plain))
    assert torch.equal(fast, plain)


def test_masks_with_holes_use_the_plan(pair, recwarn):
    ids = pair.ids(6, 6)
    assert torch.equal(generated(pair.fast, ids, attention_mask=HOLES), generated(pair.plain, ids, attention_mask=HOLES))
    assert not [w for w in recwarn if issubclass(w.category, OptimizerWarning)]


def test_a_paged_cache_is_rejected_with_a_remedy(fresh_pair):
    with pytest.raises(UnsupportedRequestError, match="row 1 of the prompt ends in padding.*DynamicCache"):
        generated(fresh_pair.fast, fresh_pair.ids(6, 6), attention_mask=RIGHT, **{cache_name(): PagedCache(fresh_pair.fast)})
    with pytest.warns(OptimizerWarning, match="ends in padding"):
        fast = generated(fresh_pair.fast, fresh_pair.ids(6, 6), attention_mask=RIGHT, **{cache_name(): DynamicCache()})
    assert torch.equal(fast, generated(fresh_pair.plain, fresh_pair.ids(6, 6), attention_mask=RIGHT))


@torch.no_grad()
def test_four_dimensions(fresh_pair):
    """A mask of four dimensions gives the visible keys of each query: here two documents, without restarting positions."""
    ids, seen = fresh_pair.ids(7), torch.ones(7, 7, dtype=torch.bool).tril()
    seen[4:, :4] = False
    call = {"attention_mask": seen[None, None], "use_cache": False}
    with pytest.warns(OptimizerWarning, match="attention_mask is not a 2-D tensor"):
        fast = fresh_pair.fast(ids, **call).logits
    torch.testing.assert_close(fast, fresh_pair.plain(ids, **call).logits, rtol=1e-4, atol=1e-4)


def test_four_dimensional_masks_in_generate_follow_transformers(fresh_pair):
    """An error if Transformers raises one, otherwise the same text."""
    ids, mask = fresh_pair.ids(4), torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    outcomes = []
    for model in (fresh_pair.plain, fresh_pair.fast):
        try:
            outcomes.append(generated(model, ids, attention_mask=mask).tolist())
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]
