import torch

from deepseek_optimizer.prune.channels import channel_errors


def test_it_is_the_squared_error_of_leaving_out_the_channel():
    generator = torch.Generator().manual_seed(0)
    h, down = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((40, 7), (5, 7)))
    whole = h @ down.T
    for j, error in enumerate(channel_errors(h.square().sum(0), down)):
        without = h.clone()
        without[:, j] = 0
        assert torch.isclose(error, (without @ down.T - whole).square().sum())
