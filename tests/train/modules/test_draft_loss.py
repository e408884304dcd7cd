"""The loss of a layer that drafts for a frozen model, and the count of accepted drafts: against loops over rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.integration.compat import recompute_layers
from deepseek_optimizer.train.attention_function import DSO_TRAIN, register_train_attention
from deepseek_optimizer.train.modules.draft_layer import add_draft_layer
from deepseek_optimizer.train.modules.draft_loss import DraftObjective
from deepseek_optimizer.train.modules.draft_vocabulary import set_draft_vocabulary
from deepseek_optimizer.train.modules.mtp import head_of, mtp_states
from support.family_configs import deepseek_v3, deepseek_v32, gemma2, llama, qwen3
from support.models import random_ids, random_model, randomize

CONFIGS = {
    "llama": lambda: llama(tie_word_embeddings=True),
    "qwen3": qwen3,
    "v3 with two layers": lambda: deepseek_v3(num_nextn_predict_layers=2),
    "llama with a draft vocabulary": lambda: llama(tie_word_embeddings=True),
    "v3 with two layers and a draft vocabulary": lambda: deepseek_v3(num_nextn_predict_layers=2),
}
TOKENS = torch.tensor([0, 2, *range(3, 90, 2)])  # one of the three likely tokens is missing


@pytest.fixture(params=CONFIGS)
def model(request):
    made = random_model(CONFIGS[request.param]())
    made.set_attn_implementation("sdpa")
    add_draft_layer(made)
    randomize(made.model.layers[made.config.num_hidden_layers :], seed=5)
    with torch.no_grad():
        made.lm_head.weight[3:] *= 0.01  # three tokens are likely, so that some drafts are right
    if "vocabulary" in request.param:
        set_draft_vocabulary(made, TOKENS)
    return made


def packed(model):
    """Two texts of 9 and 14 tokens in a row, of which the first tokens have no labels; and where the texts begin and end."""
    ids = torch.tensor([random_ids(model.config, 23)])
    labels = ids.clone()
    labels[:, :3] = labels[:, 9:11] = -100
    return ids, labels, torch.cat((torch.arange(9), torch.arange(14)))[None], [(0, 9), (9, 23)]


@torch.no_grad()
def drafts_by_row(model, ids, labels, positions, texts, steps):
    """For each draft: row -> (logits, the place of the model's most likely token among them), by the definition; no place if
    the token is not in the draft vocabulary."""
    hidden = model.model(ids, position_ids=positions, use_cache=False).last_hidden_state
    likely = model.lm_head(hidden)[0].argmax(-1).tolist()
    rows = []
    for step, (depth, layer, state) in enumerate(mtp_states(model, hidden, ids, None, positions, steps=steps)):
        logits, found = head_of(layer, model)(state)[0], {}
        vocabulary = getattr(layer.shared_head, "tokens", torch.arange(model.config.vocab_size)).tolist()
        for begin, end in texts:
            for row in range(begin + step - depth, end):
                token = row + depth + 2  # its place in the row of ids
                if token < end and labels[0, token] != -100:
                    wanted = likely[token - 1]
                    found[row] = (logits[row], vocabulary.index(wanted) if wanted in vocabulary else None)
        rows.append(found)
    return hidden, rows


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_loss_is_the_cross_entropy_of_likely_tokens(model, steps):
    ids, labels, positions, texts = packed(model)
    hidden, rows = drafts_by_row(model, ids, labels, positions, texts, steps)
    expected = [
        sum(F.cross_entropy(logits, torch.tensor(token)) for logits, token in each) / len(each)
        for each in ([pair for pair in row.values() if pair[1] is not None] for row in rows)
    ]
    model.train()
    made = DraftObjective(steps)(model, hidden, ids, labels, None, {"position_ids": positions})
    torch.testing.assert_close(made, torch.stack(expected).mean(), rtol=1e-5, atol=1e-5)
    made.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    layers = range(model.config.num_hidden_layers, len(model.model.layers))[:steps]
    names = {n for n, _ in model.named_parameters() if any(f".layers.{k}." in n for k in layers)}
    assert trained == {name for name in names if "shared_head.head" not in name}


def test_accepted_drafts_are_those_up_to_the_first_wrong_one(model):
    ids, labels, positions, texts = packed(model)
    steps, layers = 3, len(model.model.layers) - model.config.num_hidden_layers
    hidden, rows = drafts_by_row(model, ids, labels, positions, texts, steps)
    # The same chain as in drafting: each layer at the first row, then the last layer one row further for each draft.
    objective = DraftObjective(steps)
    model.eval()
    with torch.no_grad():
        objective(model, hidden, ids, labels, None, {"position_ids": positions})
    counts = []
    for row in rows[0]:
        accepted = 0
        for step in range(steps):
            logits, token = rows[step].get(row + max(0, step + 1 - layers), (torch.ones(1), -1))
            if logits.argmax() != token:
                break
            accepted += 1
        counts.append(accepted)
    assert len(set(counts)) > 1
    assert objective.accepted() == pytest.approx(sum(counts) / len(counts))
    assert objective.accepted() is None


@pytest.mark.parametrize("family", [llama, deepseek_v3, partial(deepseek_v32, index_topk=5)], ids=["llama", "v3", "v32"])
def test_the_last_layer_continues_with_its_own_states(family):
    """As in drafting: after the model's states, a state of its own for each draft."""
    model = random_model(family(num_nextn_predict_layers=1))
    model.set_attn_implementation("sdpa")
    add_draft_layer(model)
    randomize(model.model.layers[model.config.num_hidden_layers :], seed=5)
    ids, steps = torch.tensor([random_ids(model.config, 11)]), 4
    with torch.no_grad():
        hidden = model.model(ids, use_cache=False).last_hidden_state
        made = [state[0] for _, _, state in mtp_states(model, hidden, ids, steps=steps)]
        for first in range(11 - steps):
            inputs = hidden[:, : first + 1]
            for step in range(steps):
                known = ids[:, : first + step + 2]
                after = torch.nn.functional.pad(inputs, (0, 0, 0, 1))  # the last token has no state yet, and is not seen
                ((_, _, states),) = mtp_states(model, after, known)
                torch.testing.assert_close(made[step][first + step], states[0, -2], rtol=1e-4, atol=1e-4)
                inputs = torch.cat((inputs, states[:, -2:-1]), 1)


@pytest.mark.parametrize("family", [llama, deepseek_v3], ids=["llama", "v3"])
def test_attention_functions_train_the_same_drafts(family):
    """`eager` adds its mask to the scores; the others take what a row attends to."""
    register_train_attention()
    made = {}
    for name in ("sdpa", "eager", DSO_TRAIN):
        model = random_model(family(num_nextn_predict_layers=1))
        model.config._attn_implementation = name
        add_draft_layer(model)
        randomize(model.model.layers[model.config.num_hidden_layers :], seed=5)
        ids, labels, positions, _ = packed(model)
        hidden = model.model(ids, position_ids=positions, use_cache=False).last_hidden_state.detach()
        model.train()
        made[name] = DraftObjective(3)(model, hidden, ids, labels, None, {"position_ids": positions})
    for loss in made.values():
        torch.testing.assert_close(loss, made["sdpa"], rtol=1e-5, atol=1e-5)
    model.model.layers[-1].self_attn.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="attn_implementation='flash_attention_2' cannot train several drafts"):
        list(mtp_states(model, hidden, ids, steps=2))


def test_activation_checkpointing_does_not_change_the_loss():
    model = random_model(llama())
    model.set_attn_implementation("sdpa")
    add_draft_layer(model)
    ids, labels, positions, _ = packed(model)
    losses, gradients = [], []
    for checkpointing in (False, True):
        if checkpointing:
            recompute_layers(model)
        model.train().zero_grad()
        hidden = model.model(ids, position_ids=positions, use_cache=False).last_hidden_state.detach()
        loss = DraftObjective(3)(model, hidden, ids, labels, None, {"position_ids": positions})
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*losses)
    assert gradients[0]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_texts_in_a_row_and_padding_do_not_change_drafts(model):
    ids, _, positions, texts = packed(model)
    pad = lambda tensor, *before: torch.nn.functional.pad(tensor, (*before, 3, 0))  # noqa: E731
    hidden = model.model(ids, position_ids=positions, use_cache=False).last_hidden_state
    together = [state[0] for _, _, state in mtp_states(model, hidden, ids, None, positions, steps=4)]
    for begin, end in texts:
        where = hidden[:, begin:end], ids[:, begin:end]
        alone = [state[0] for _, _, state in mtp_states(model, *where, steps=4)]
        behind = pad(where[0], 0, 0), pad(where[1])
        mask, place = pad(torch.ones_like(where[1])), pad(positions[:, begin:end])
        padded = [state[0] for _, _, state in mtp_states(model, *behind, mask, place, steps=4)]
        for step in range(4):
            rows = slice(step, end - begin - 2)  # whose tokens are of the text
            torch.testing.assert_close(together[step][begin:end][rows], alone[step][rows], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(padded[step][3:][rows], alone[step][rows], rtol=1e-4, atol=1e-4)


def test_only_the_layer_is_trained():
    model = random_model(llama())
    assert add_draft_layer(model) == (["MTP layer 0: initialized at random, since no checkpoint contains it"], True)
    assert model.config.num_nextn_predict_layers == 1
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("model.layers.3.")} != set()


def test_a_family_without_such_layers_is_refused():
    with pytest.raises(ConfigError, match=r"a gemma2 model can have no layer that drafts; families that can: llama, qwen2"):
        add_draft_layer(random_model(gemma2()))
