"""Packing loses no token, mixes no texts, and does not change the loss."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.models import FAMILIES, SUPPORTED
from deepseek_optimizer.train.data import Collator, PackedRows, best_fit
from support.family_configs import llama
from support.models import CASES, random_model
from support.training import make_trainer


def documents(lengths, seed=0, vocabulary=211):
    """Documents with some ignored labels, like those of prompts."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,), generator=generator)
        keep = torch.rand(length, generator=generator) < 0.7
        keep[-1] = True
        out.append({"input_ids": ids, "labels": ids.masked_fill(~keep, -100)})
    return out


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_equals_the_simple_algorithm(seed):
    generator = torch.Generator().manual_seed(seed)
    row = int(torch.randint(1, 40, (), generator=generator))
    lengths = torch.randint(1, row + 1, (int(torch.randint(0, 60, (), generator=generator)),), generator=generator).tolist()
    rows = best_fit(lengths, row)
    assert sorted(i for part in rows for i in part) == list(range(len(lengths)))
    free: list[int] = []  # the same with a linear search
    for length in sorted(lengths, reverse=True):
        rooms = [(room, i) for i, room in enumerate(free) if room >= length]
        if rooms:
            free[min(rooms)[1]] -= length
        else:
            free.append(row - length)
    assert sorted(row - sum(lengths[i] for i in part) for part in rows) == sorted(free)


def test_a_document_longer_than_a_row_is_an_error():
    with pytest.raises(ConfigError, match="sequence 1 has 9 tokens, but a row only 8"):
        best_fit([3, 9], 8)


def loss_sum(model, batch):
    """(sum, count) of Transformers' loss."""
    count = int((batch["labels"][:, 1:] != -100).sum())
    return model(**batch).loss.item() * count, count


@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_families_that_pack_keep_documents_apart(family):
    """In Transformers' models, the logits of documents in one row are those of each alone, if and only if the family packs."""
    apart = []
    for case in (case for case in CASES if case.split("-")[0] == family):
        model = random_model(CASES[case]()).double()
        model.config.use_cache = False  # as in training: with a cache, a row is one text
        docs = documents([25, 21, 17], vocabulary=model.config.vocab_size)
        actual = model(**Collator(0)([PackedRows(docs, 63)[0]])).logits[0]
        expected = torch.cat([model(**Collator(0)([document])).logits[0] for document in docs])
        apart.append(bool((actual - expected).abs().max() < 1e-4 * expected.abs().max()))
    assert all(apart) == FAMILIES[family].packs and apart


def test_packing_a_recurrent_family_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="packing=True: lfm2 would join the documents of a row; set packing=False"):
        make_trainer(random_model(CASES["lfm2-mixed"]()), tmp_path, packing=True)


@pytest.mark.parametrize("padding_free", [False, True])
def test_packed_loss_and_gradients_equal_unpacked(padding_free):
    model = random_model(llama(use_cache=False)).double()
    docs = documents([5, 17, 1, 30, 2, 9, 24, 3])
    packed = PackedRows(docs, 40)
    assert len(packed) == 3 and packed.tokens == 91
    batch = Collator(0, padding_free)([packed[i] for i in range(len(packed))])
    assert batch["input_ids"].shape == ((1, 91) if padding_free else (3, 40)) and "attention_mask" not in batch
    total, count = loss_sum(model, batch)
    model(**batch).loss.backward()
    gradient = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    one_by_one = [loss_sum(model, Collator()([doc])) for doc in docs if (doc["labels"][1:] != -100).any()]
    want, wanted = (sum(part) for part in zip(*one_by_one, strict=True))
    assert count == wanted and total == pytest.approx(want, rel=1e-6)
    for doc in docs:
        if (doc["labels"][1:] != -100).any():
            one = Collator()([doc])
            (model(**one).loss * int((one["labels"][:, 1:] != -100).sum()) / count).backward()
    torch.testing.assert_close(
        gradient, model.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-6
    )  # Transformers: logits in fp32


def test_plain_batches_are_padded_on_the_right():
    docs = documents([3, 6])
    batch = Collator(9)(docs)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6] and (batch["input_ids"][0, 3:] == 9).all()
    assert (batch["labels"][:, 0] == -100).all() and (batch["labels"][0, 3:] == -100).all()
    assert (batch["labels"][1, 1:] == docs[1]["labels"][1:]).all()


def test_rows_accept_lists_and_any_dataset():
    class Lists(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return {"input_ids": [1, 2, 3][: i + 1], "labels": [1, 2, 3][: i + 1]}

    (row,) = [PackedRows(Lists(), 6)[0]]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 0] and row["labels"].tolist() == [-100, 2, 3, -100, 2, -100]


def test_the_trainer_packs_on_request(tmp_path):
    from deepseek_optimizer import DeepSeekTrainer, DeepSeekTrainingArguments

    def trainer(data, **options):
        args = DeepSeekTrainingArguments(tmp_path, packing=True, max_steps=1, report_to="none", per_device_train_batch_size=2)
        return DeepSeekTrainer(random_model(llama(max_position_embeddings=40)), args, train_dataset=data, **options)

    docs = documents([5, 17, 30, 24, 3])
    made = trainer(docs, eval_dataset=docs[:2])
    assert isinstance(made.train_dataset, PackedRows) and made.train_dataset.row == 40
    batch = next(iter(made.get_train_dataloader()))
    assert "position_ids" in batch and "attention_mask" in next(iter(made.get_eval_dataloader()))
    assert made.train().global_step == 1 and made.evaluate()["eval_loss"] > 0
    with pytest.raises(ConfigError, match="packing=True needs its own collator"):
        trainer(docs, data_collator=lambda rows: rows)
    with pytest.raises(ConfigError, match="packing=True needs a train_dataset with a length.*labels"):
        trainer([{"input_ids": [1, 2]}])
    with pytest.raises(ConfigError, match="sequence 0 has 41 tokens, but a row only 40"):
        trainer(documents([41]))
