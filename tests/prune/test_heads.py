import pytest
import torch

from deepseek_optimizer.prune.heads import head_errors, moments_of


@pytest.mark.parametrize("units, width", [(3, 4), (1, 6), (5, 1)])
def test_it_is_the_squared_error_of_leaving_out_the_head(units, width):
    generator = torch.Generator().manual_seed(0)
    x, output = (torch.randn(shape, generator=generator) for shape in ((2, 20, units * width), (9, units * width)))
    whole = x @ output.T
    errors = head_errors(moments_of(x, units), output)
    assert errors.shape == (units,)
    for u, error in enumerate(errors):
        without = x.clone()
        without[..., u * width : (u + 1) * width] = 0
        assert torch.isclose(error.float(), (without @ output.T - whole).square().sum(), rtol=1e-4)
