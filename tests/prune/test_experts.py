import torch

from deepseek_optimizer.prune.experts import Uses


def test_tokens_are_counted():
    uses = Uses(3)
    for expert, tokens in ((2, 5), (0, 1), (2, 2)):
        uses.add(expert, torch.zeros(tokens, 4), torch.zeros(tokens, 6))
    assert uses.counts.tolist() == [1, 0, 7]
