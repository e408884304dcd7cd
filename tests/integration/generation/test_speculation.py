"""generate() with drafts: the tokens of plain decoding, whatever the drafts are."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LogitsProcessor, MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer, PagedCache
from deepseek_optimizer.engine.draft import Draft
from deepseek_optimizer.errors import UnsupportedRequestError
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.integration.compat import cache_name
from deepseek_optimizer.integration.generation import generate as generate_module
from deepseek_optimizer.integration.generation import speculation
from support.scripted_proposer import ScriptedProposer

from ..conftest import make_pair
from .test_generate import Recorder

EOS = 2


class Always:
    """A controller that always allows all drafts, in up to five rounds in a call, and records how many were accepted."""

    plain_rounds, drafted_rounds = 1, 5

    def __init__(self, max_drafts, fixed=False):
        self.max_drafts, self.rounds = max_drafts, []

    def choose(self, sequences, max_drafts=None):
        return min(self.max_drafts, self.max_drafts if max_drafts is None else max_drafts)

    def record(self, seconds, outcomes, rounds=1, follows=False):
        self.rounds += [list(outcomes)] * rounds

    def report(self):
        return self.rounds


class Sometimes(Always):
    """Allows drafts in one round of three, and up to five other rounds in a call."""

    plain_rounds = 5

    def choose(self, sequences, max_drafts=None):
        return 0 if len(self.rounds) % 3 else super().choose(sequences, max_drafts)


class Never(Always):
    """Allows no drafts, and up to seven rounds in a call."""

    plain_rounds = 7

    def choose(self, sequences, max_drafts=None):
        return 0


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(speculation, "DraftLengthController", Always)


def script_of(model, ids, mask, new):
    """Plain greedy tokens of each row, without padding."""
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new + 8, do_sample=False, eos_token_id=None)
    mask = torch.nn.functional.pad(mask, (0, out.shape[1] - mask.shape[1]), value=1)
    return {i: row[kept != 0].tolist() for i, (row, kept) in enumerate(zip(out, mask, strict=True))}


def scripted(pair, ids, mask, new, agree=0.7):
    return ScriptedProposer(script_of(pair.fast, ids, mask, new), agree, pair.plain.config.vocab_size)


def both(pair, lengths, proposer=None, agree=0.7, new=24, **options):
    """Tokens of plain decoding and with scripted drafts."""
    ids, mask = pair.ids(*lengths), pair.mask(*lengths)
    proposer = proposer or scripted(pair, ids, mask, new, agree)
    options = {"attention_mask": mask, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **options}
    return pair.fast.generate(ids, **options), pair.fast.generate(ids, proposer=proposer, **options)


GREEDY = {
    "plain": {"eos_token_id": None},
    "eos": {"eos_token_id": list(range(2, 30))},
    "repetition_penalty": {"eos_token_id": EOS, "repetition_penalty": 1.7},
    "no_repeat_ngram": {"eos_token_id": EOS, "no_repeat_ngram_size": 2},
    "min_new_tokens": {"eos_token_id": list(range(2, 60)), "min_new_tokens": 10},
    "bad_words": {"eos_token_id": EOS, "bad_words_ids": [[3], [7, 8]]},
    "forced_eos": {"eos_token_id": None, "forced_eos_token_id": 5},
}


@pytest.mark.parametrize("name", GREEDY)
@pytest.mark.parametrize("lengths", [(9,), (40, 4, 31)], ids=["one", "left-padded"])
def test_greedy_text_equals_plain_decoding(pair, name, lengths):
    plain, drafted = both(pair, lengths, **GREEDY[name])
    assert torch.equal(plain, drafted)
    assert any(held for rounds in pair.fast.dso.speculation for _, held in rounds) or "n" not in name


@pytest.mark.parametrize("name", GREEDY)
@pytest.mark.parametrize("lengths", [(9,), (40, 4, 31)], ids=["one", "left-padded"])
@pytest.mark.parametrize("new", [24, 60])
def test_rounds_without_drafts_in_calls_of_several(pair, monkeypatch, name, lengths, new):
    """Across blocks of the cache, too."""
    monkeypatch.setattr(speculation, "DraftLengthController", Sometimes)
    plan, calls = pair.fast.dso.plan, []
    decode = plan.decode
    monkeypatch.setattr(plan, "decode", lambda *args: (calls.append(decode(*args)), calls[-1])[1])
    ids, mask = pair.ids(*lengths), pair.mask(*lengths)
    proposer = scripted(pair, ids, mask, new)
    calls.clear()
    options = {"attention_mask": mask, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **GREEDY[name]}
    plain = pair.fast.generate(ids, **options)
    calls.clear()
    assert torch.equal(plain, pair.fast.generate(ids, proposer=proposer, **options))
    if pair.fast.dso.backend.name == "cpu" and name == "plain":
        assert max(call.steps for call in calls) > 1


def test_calls_of_several_draw_the_numbers_of_single_rounds(pair, monkeypatch):
    monkeypatch.setattr(speculation, "DraftLengthController", Never)
    ids, texts = pair.ids(9), []
    options = {"do_sample": True, "top_k": 20, "temperature": 1.5, "max_new_tokens": 50, "eos_token_id": None}
    for several in (False, True):
        with monkeypatch.context() as patch:
            if not several:
                patch.setattr(speculation.TokenChoices, "of", lambda *args, **kwargs: None)
            torch.manual_seed(3)
            texts.append(pair.fast.generate(ids, proposer=scripted(pair, ids, pair.mask(9), 50), **options))
    assert torch.equal(*texts)


@pytest.mark.parametrize("agree", [0.0, 1.0])
def test_all_or_no_drafts_are_accepted(pair, agree):
    plain, drafted = both(pair, (9, 5), agree=agree, new=25, eos_token_id=None)
    assert torch.equal(plain, drafted)
    rounds = pair.fast.dso.speculation
    assert all(held == n * (agree == 1) for outcomes in rounds for n, held in outcomes)
    assert len(rounds) == (6 if agree else 24)  # 24 tokens after the prompt, 4 per round


def assert_same_numbers(pair, a, b):
    """Bitwise equal on the native backend; torch's products depend on the number of rows."""
    if pair.fast.dso.backend.name == "cpu":
        assert torch.equal(a, b)
    else:
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_logits_are_bitwise_equal_to_plain_decoding(pair):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "eos_token_id": None}
    plain, drafted = both(pair, (9,), repetition_penalty=1.3, **options)
    assert type(plain) is type(drafted)
    assert len(drafted.scores) == len(drafted.logits) == 24
    for name in ("scores", "logits"):
        for a, b in zip(getattr(plain, name), getattr(drafted, name), strict=True):
            assert_same_numbers(pair, a, b)
    assert getattr(plain, cache_name()).get_seq_length() == getattr(drafted, cache_name()).get_seq_length()


@pytest.mark.parametrize("new", range(1, 10))
def test_max_new_tokens_is_exact(pair, new):
    plain, drafted = both(pair, (6,), agree=1.0, new=new, eos_token_id=None)
    assert drafted.shape[1] == 6 + new
    assert torch.equal(plain, drafted)
    assert all(n <= 3 for outcomes in pair.fast.dso.speculation for n, _ in outcomes)


def test_copies_of_a_prompt(pair):
    ids = pair.ids(33, 5)
    mask = pair.mask(33, 5)
    plain = pair.fast.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
    scripts = script_of(pair.fast, ids, mask, 12)
    proposer = ScriptedProposer({i: scripts[i // 2] for i in range(4)}, 0.7, pair.plain.config.vocab_size)
    torch.manual_seed(0)
    drafted = pair.fast.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=True, top_k=1, eos_token_id=None, num_return_sequences=2,
        proposer=proposer,
    )  # fmt: skip
    assert torch.equal(plain.repeat_interleave(2, 0), drafted)


@pytest.mark.parametrize("lengths", [(5,), (7, 3, 5)], ids=["one", "left-padded"])
def test_a_streamer_gets_every_token_in_order(pair, lengths):
    ids, mask = pair.ids(*lengths), pair.mask(*lengths)
    made = []
    for proposer in (None, scripted(pair, ids, mask, 30)):
        streamer = Recorder()
        options = {"eos_token_id": list(range(2, 40)), "pad_token_id": 0, "max_new_tokens": 30, "do_sample": False}
        out = pair.fast.generate(ids, attention_mask=mask, streamer=streamer, proposer=proposer, **options)
        assert streamer.ended
        made.append((out.tolist(), streamer.pieces))
    assert made[0] == made[1]


class EachOnce(StoppingCriteria):
    """Ends at a length; records its inputs."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids[0].tolist())
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 17)


class EachPrefix(LogitsProcessor):
    """Depends on the whole prefix, and on the number of its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.roll(int(input_ids.sum() + self.calls) % 7, dims=-1)


def test_processors_and_criteria_get_the_inputs_of_plain_decoding(pair):
    """Each token once, with its own prefix, in order: even processors that count their calls give the plain text."""
    ids, seen, texts = pair.ids(5), [], []
    script = pair.fast.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None, logits_processor=[EachPrefix()])
    for proposer in (None, ScriptedProposer({0: script[0].tolist()}, 0.8, pair.plain.config.vocab_size)):
        criterion = EachOnce()
        texts.append(
            pair.fast.generate(
                ids, max_new_tokens=30, do_sample=False, eos_token_id=None, logits_processor=[EachPrefix()],
                stopping_criteria=StoppingCriteriaList([criterion]), proposer=proposer,
            )
        )  # fmt: skip
        seen.append(criterion.seen)
    assert any(held for outcomes in pair.fast.dso.speculation for _, held in outcomes)
    assert seen[0] == seen[1]
    assert torch.equal(texts[0], texts[1])
    assert texts[1].shape[1] == 17


def test_processors_that_may_use_other_rows_disable_drafts():
    pair = make_pair()
    with pytest.warns(OptimizerWarning, match="without drafts: EachPrefix"):
        drafted = pair.fast.generate(
            pair.ids(5, 5), max_new_tokens=24, do_sample=False, logits_processor=[EachPrefix()], eos_token_id=None,
            proposer=scripted(pair, pair.ids(5, 5), pair.mask(5, 5), 24),
        )  # fmt: skip
    plain = pair.fast.generate(
        pair.ids(5, 5), max_new_tokens=24, do_sample=False, logits_processor=[EachPrefix()], eos_token_id=None
    )
    assert torch.equal(plain, drafted)
    assert pair.fast.dso.speculation is None


def test_row_wise_criteria_keep_drafts(pair):
    criteria = StoppingCriteriaList([MaxTimeCriteria(1000.0)])
    plain, drafted = both(pair, (5, 5), stopping_criteria=criteria, eos_token_id=None)
    assert torch.equal(plain, drafted)
    assert pair.fast.dso.speculation


def test_a_conversation_with_one_cache(pair):
    """Rejected drafts are removed from the caller's cache, and so are tokens after an end token."""
    caches, ids = [PagedCache(pair.fast), PagedCache(pair.fast)], pair.ids(30)
    for turn in range(4):
        options = {"max_new_tokens": 11, "do_sample": False, "eos_token_id": list(range(2, 16)), "pad_token_id": 0}
        mask = torch.ones_like(ids)
        plain = pair.fast.generate(ids, **{cache_name(): caches[0]}, **options)
        drafted = pair.fast.generate(ids, **{cache_name(): caches[1]}, proposer=scripted(pair, ids, mask, 11), **options)
        assert torch.equal(plain, drafted)
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == drafted.shape[1] - 1
        assert_same_numbers(pair, caches[0].layers[1].keys, caches[1].layers[1].keys)
        ids = torch.cat([drafted, pair.ids(4, seed=turn)], dim=1)


def test_an_exception_in_the_caller_leaves_a_valid_cache(pair):
    class Full(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.pieces) == 8:
                raise RuntimeError("full")

    cache, ids, mask = PagedCache(pair.fast), pair.ids(6), pair.mask(6)
    with pytest.raises(RuntimeError, match="full"):
        pair.fast.generate(
            ids, max_new_tokens=30, do_sample=False, eos_token_id=None, streamer=Full(),
            proposer=scripted(pair, ids, mask, 30, 1.0), **{cache_name(): cache},
        )  # fmt: skip
    state = cache.state
    assert cache.get_seq_length() == state.sequences[0].tokens == 6 + 7 - 1
    plain = pair.fast.generate(ids, max_new_tokens=14, do_sample=False, eos_token_id=None)
    after = pair.fast.generate(plain[:, :14], max_new_tokens=6, do_sample=False, eos_token_id=None, **{cache_name(): cache})
    assert torch.equal(plain, after)


def test_blocks_are_freed(fresh_pair):
    both(fresh_pair, (40, 33), eos_token_id=None, new=40)
    manager = fresh_pair.fast.dso.arena.manager
    assert manager.free_blocks == manager.num_blocks


def test_prompt_lookup_uses_our_loop(pair):
    ids = torch.cat([pair.ids(8)] * 3, dim=1)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    plain = pair.plain.generate(ids, **options)
    assert torch.equal(plain, pair.fast.generate(ids, prompt_lookup_num_tokens=3, **options))
    assert any(n for outcomes in pair.fast.dso.speculation for n, _ in outcomes)
    both_rows = torch.cat([ids, pair.ids(24, seed=5)])  # Transformers' own supports only one row
    plain = pair.plain.generate(both_rows, **options)
    assert torch.equal(plain, pair.fast.generate(both_rows, prompt_lookup_num_tokens=3, **options))


def test_prompt_lookup_of_a_generation_config(pair):
    config = pair.fast.generation_config
    given = type(config)(prompt_lookup_num_tokens=2, max_new_tokens=9, do_sample=False, eos_token_id=None)
    ids = torch.cat([pair.ids(8)] * 3, dim=1)
    plain = pair.plain.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
    pair.fast.dso.speculation = None
    assert torch.equal(plain, pair.fast.generate(ids, generation_config=given))
    assert pair.fast.dso.speculation
    assert given.prompt_lookup_num_tokens == 2


@pytest.fixture(scope="module")
def assistant(pair):
    """The model in a smaller format."""
    small = copy.deepcopy(pair.plain)
    config = DeepSeekConfig(precision="int8", backend=pair.fast.dso.backend.name)
    return DynamicGraphOptimizer(small, config=config).optimize()


@pytest.mark.parametrize("lengths", [(9,), (40, 4, 31)], ids=["one", "left-padded"])
def test_an_optimized_assistant_model_drafts(pair, assistant, lengths):
    ids, mask = pair.ids(*lengths), pair.mask(*lengths)
    options = {
        "attention_mask": mask,
        "max_new_tokens": 40,
        "do_sample": False,
        "eos_token_id": list(range(2, 9)),
        "pad_token_id": 0,
    }
    plain = pair.fast.generate(ids, **options)
    assert torch.equal(plain, pair.fast.generate(ids, assistant_model=assistant, **options))
    drafted, accepted = map(sum, zip(*(n for rounds in pair.fast.dso.speculation for n in rounds), strict=True))
    assert accepted > drafted / 2
    manager = assistant.dso.arena.manager
    assert manager.free_blocks == manager.num_blocks


def test_number_of_drafts_of_an_assistant_model(pair, assistant, monkeypatch):
    options = {"assistant_model": assistant, "max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    for given, expected in ((None, 3), (2, 2)):
        monkeypatch.setattr(assistant.generation_config, "num_assistant_tokens", given)
        pair.fast.generate(pair.ids(9), **options)
        assert max(n for rounds in pair.fast.dso.speculation for n, _ in rounds) == expected
    pair.fast.generate(pair.ids(9), **options, num_assistant_tokens=1)
    assert max(n for rounds in pair.fast.dso.speculation for n, _ in rounds) == 1


def test_a_model_is_its_own_assistant(fresh_pair):
    ids, options = fresh_pair.ids(9), {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    plain = fresh_pair.fast.generate(ids, **options)
    assert torch.equal(plain, fresh_pair.fast.generate(ids, assistant_model=fresh_pair.fast, **options))
    assert all(drafted == accepted for rounds in fresh_pair.fast.dso.speculation for drafted, accepted in rounds)
    manager = fresh_pair.fast.dso.arena.manager
    assert manager.free_blocks == manager.num_blocks


def test_other_assistant_models_use_transformers_loop(pair):
    """One that is not optimized, and one with another vocabulary, for which Transformers names what is missing."""
    ids, options = pair.ids(9), {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    pair.fast.dso.speculation = None
    plain = pair.fast.generate(ids, **options)
    assert torch.equal(plain, pair.fast.generate(ids, assistant_model=pair.plain, **options))
    other = make_pair("qwen3-gqa").fast
    if other.config.vocab_size != pair.plain.config.vocab_size:
        with pytest.raises(ValueError, match="assistant_tokenizer"):
            pair.fast.generate(ids, assistant_model=other, **options)
    with pytest.raises(ValueError, match="assistant_tokenizer"):
        pair.fast.generate(ids, assistant_model=pair.fast, tokenizer=object(), assistant_tokenizer=object(), **options)
    assert pair.fast.dso.speculation is None


def test_use_mtp_without_mtp_layers(pair):
    with pytest.raises(UnsupportedRequestError, match="no MTP layers.*prompt_lookup_num_tokens"):
        pair.fast.generate(pair.ids(5), use_mtp=True, max_new_tokens=5)


def test_a_proposer_in_transformers_loop():
    pair = make_pair()
    ids = pair.ids(5)
    with pytest.warns(OptimizerWarning, match="without drafts"):
        made = pair.fast.generate(ids, num_beams=2, max_new_tokens=5, proposer=scripted(pair, ids, pair.mask(5), 5))
    assert torch.equal(made, pair.plain.generate(ids, num_beams=2, max_new_tokens=5))


def test_the_context_ends_generation():
    pair = make_pair()
    scripts = scripted(pair, pair.ids(10), pair.mask(10), 30, 1.0)
    pair.fast.dso.graph.max_positions = 20
    with pytest.warns(OptimizerWarning, match="context of 20"):
        out = pair.fast.generate(pair.ids(10), max_new_tokens=50, do_sample=False, eos_token_id=None, proposer=scripts)
    assert torch.equal(out, pair.plain.generate(pair.ids(10), max_new_tokens=11, do_sample=False, eos_token_id=None))


class Drawn:
    """Drafts sampled uniformly from some tokens, or always the same one."""

    name, wants_states = "drawn", False

    def __init__(self, tokens, vocab):
        self.tokens = torch.tensor(tokens)
        self.q = torch.zeros(vocab).index_fill(0, self.tokens, 1 / len(tokens)).numpy()

    def propose(self, sequences, max_drafts):
        result = []
        for n in max_drafts:
            tokens = self.tokens[torch.randint(len(self.tokens), (n,))].tolist()
            result.append(Draft(tokens, [self.q] * n if len(self.tokens) > 1 else None))
        return result

    def catch_up(self, sequences):
        """Reads no text."""

    def forget(self, sequence):
        """Keeps nothing of a sequence."""


@pytest.mark.parametrize("certain", [False, True], ids=["drawn", "certain"])
def test_sampling_preserves_the_distribution(certain):
    """The second and third token with top-k and temperature, against plain sampling: chi-square over the pairs."""
    pair = make_pair()
    ids = pair.ids(6).repeat(250, 1)
    options = {"do_sample": True, "top_k": 4, "temperature": 1.5, "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    plain = torch.cat([pair.fast.generate(ids, **options)[:, 6:] for _ in range(4)])
    common = plain[:, 1:].flatten().mode().values.item()
    proposer = Drawn([common] if certain else plain[:, 1:].unique().tolist(), pair.plain.config.vocab_size)
    drafted = torch.cat([pair.fast.generate(ids, proposer=proposer, **options)[:, 6:] for _ in range(4)])
    counts = [{}, {}]
    for side, rows in zip(counts, (plain, drafted), strict=True):
        for row in rows.tolist():
            side[tuple(row)] = side.get(tuple(row), 0) + 1
    keys = [k for k in counts[0].keys() | counts[1].keys() if sum(c.get(k, 0) for c in counts) >= 10]
    assert len(keys) > 20
    statistic = sum((counts[0].get(k, 0) - counts[1].get(k, 0)) ** 2 / sum(c.get(k, 0) for c in counts) for k in keys)
    freedom = len(keys)  # two samples of equal size
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    assert any(held for outcomes in pair.fast.dso.speculation for _, held in outcomes)


def test_the_draft_length_controller_gives_the_plain_text(pair, monkeypatch):
    from deepseek_optimizer.engine.speculative.draft_length import DraftLengthController

    monkeypatch.setattr(speculation, "DraftLengthController", DraftLengthController)
    plain, drafted = both(pair, (12, 30), agree=0.8, new=60, eos_token_id=None)
    assert torch.equal(plain, drafted)
    report = pair.fast.dso.speculation
    assert report.rounds > 0
    assert sum(count for _, count in report.chosen) == report.rounds


def test_requests_without_drafts_use_the_plain_loop(pair, monkeypatch):
    served = []
    sample = generate_module._sample
    monkeypatch.setattr(generate_module, "_sample", lambda *a, **k: (served.append(1), sample(*a, **k))[1])
    pair.fast.generate(pair.ids(5), max_new_tokens=3, do_sample=False)
    assert served == [1]


def test_a_constant_number_of_drafts_disables_the_controller(pair, monkeypatch):
    """The number of drafts then does not depend on time, so that a seed reproduces the text."""
    from deepseek_optimizer.engine.speculative.draft_length import DraftLengthController

    monkeypatch.setattr(speculation, "DraftLengthController", DraftLengthController)
    ids, texts = torch.cat([pair.ids(8)] * 3, dim=1), []
    options = {"num_assistant_tokens_schedule": "constant", "max_new_tokens": 30, "do_sample": True, "top_k": 3}
    for _ in range(2):
        torch.manual_seed(0)
        texts.append(pair.fast.generate(ids, prompt_lookup_num_tokens=2, eos_token_id=None, **options))
        assert pair.fast.dso.speculation.chosen[0][0] == 2
    assert torch.equal(*texts)
