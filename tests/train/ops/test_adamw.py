"""AdamW's arithmetic: the native form equals the reference bit for bit; properties of masters, moments and rounding."""

import math
from itertools import product

import pytest
import torch

from deepseek_optimizer.train.ops import native
from deepseek_optimizer.train.ops.adamw import Rates, Update, adamw, adamw_reference, join, split, squares, squares_reference
from deepseek_optimizer.train.ops.moments import Moments
from deepseek_optimizer.train.ops.random_bits import keys, random_bits, stochastic_round

needs_native = pytest.mark.skipif(not native.built(), reason="no native library on this machine")
SIZES = (1, 15, 16, 17, 255, 256, 257, 5003, 40000)


def update(master: str, kind: str, weights: torch.Tensor, **options) -> Update:
    parameter = weights.clone() if master == "none" else weights.bfloat16()
    low = torch.zeros(weights.shape, dtype=torch.int16) if master == "split" else None
    return Update(parameter, weights, Moments.zeros(parameter.shape, kind), rates(1), master, low, **options)


def rates(step: int, lr: float = 1e-2, gradient_scale: float = 1.0) -> Rates:
    return Rates.at(step, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, gradient_scale=gradient_scale)


def gradient(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(size) * 10 ** (6 * torch.rand(size) - 6)).to(dtype)  # of many orders of magnitude


@needs_native
@pytest.mark.parametrize(("master", "kind"), list(product(("none", "split", "stochastic"), ("fp32", "bf16", "int8"))))
def test_native_equals_the_reference_bit_for_bit(master, kind):
    torch.manual_seed(0)
    for size, dtype in product(SIZES, (torch.float32, torch.bfloat16)):
        weights = torch.randn(size)
        ours, reference = update(master, kind, weights), update(master, kind, weights)
        for step in range(1, 5):
            g = gradient(size, dtype)
            for u in (ours, reference):
                u.gradient, u.rates, u.key = g, rates(step, gradient_scale=0.7), keys(3, step, 7)
            adamw([ours])
            adamw_reference(reference)
            for name, a, b in zip(
                "parameter gradient m v".split() + ["more"] * 3, ours.tensors(), reference.tensors(), strict=False
            ):
                assert torch.equal(a, b), (size, dtype, step, name)


@needs_native
def test_many_tensors_in_one_call_equal_one_by_one():
    torch.manual_seed(1)
    sizes = (3, 70000, 0, 16384, 257)
    together, alone = (
        [update("split", "bf16", torch.randn(n), key=keys(0, 1, i)) for i, n in enumerate(sizes)] for _ in range(2)
    )
    for a, b in zip(together, alone, strict=True):
        a.parameter.copy_(b.parameter)
        a.gradient = b.gradient
    adamw(together)
    for u in alone:
        adamw([u])
    assert all(
        torch.equal(x, y) for a, b in zip(together, alone, strict=True) for x, y in zip(a.tensors(), b.tensors(), strict=True)
    )


def test_other_layouts_use_the_reference():
    weights = torch.randn(48, 32).t()
    ours, dense = update("none", "fp32", weights), update("none", "fp32", weights.contiguous())
    ours.parameter = weights.clone(memory_format=torch.preserve_format)
    assert not ours.parameter.is_contiguous()
    adamw([ours])
    adamw([dense])
    assert torch.equal(ours.parameter, dense.parameter)


def test_split_is_exact_and_rounds_to_nearest_bf16():
    torch.manual_seed(2)
    weights = torch.cat([gradient(10000), torch.tensor([0.0, -0.0, math.inf, -math.inf, 3.3e38, -1e-40, 1.00390625])])
    upper, low = split(weights)
    assert torch.equal(join(upper, low).view(torch.int32), weights.view(torch.int32))
    ties = weights.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(upper[~ties], weights.bfloat16()[~ties])
    assert join(*split(torch.tensor([math.nan]))).isnan().all() and split(torch.tensor([math.nan]))[0].isnan().all()


def test_split_masters_equal_an_fp32_run_bit_for_bit():
    torch.manual_seed(3)
    weights = torch.randn(3000).bfloat16().float()
    plain, halves = update("none", "bf16", weights), update("split", "bf16", weights)
    for step in range(1, 30):
        for u in (plain, halves):
            u.gradient, u.rates, u.key = (
                gradient(3000) if u is plain else plain.gradient,
                rates(step, lr=1e-5),
                keys(0, step, 0),
            )
        adamw([plain, halves])
        assert torch.equal(join(halves.parameter, halves.low), plain.parameter), step
    assert not torch.equal(plain.parameter.bfloat16(), weights.bfloat16())


def test_stochastic_rounding_is_unbiased_and_keeps_bf16_values():
    x = torch.tensor([1.0 + 2**-10, -3.14159, 1e-39, 5e20])
    many = torch.stack([stochastic_round(x, random_bits(4, *keys(seed, 1, 0)[:2]) & 0xFFFF).double() for seed in range(4000)])
    step = torch.tensor([2**-7, 2**-6, 2**-133, 5e20 * 2**-7]).double()  # at most the distance to the next bf16 value
    assert ((many.mean(0) - x.double()).abs() < 4 * step / 4000**0.5).all()
    assert all(len(many[:, i].unique()) == 2 for i in range(4))
    exact = torch.randn(1000).bfloat16().float()
    odd = torch.tensor([math.inf, -math.inf, math.nan])
    assert torch.equal(stochastic_round(exact, torch.full((1000,), 65535)).float(), exact)
    assert torch.equal(stochastic_round(odd, torch.full((3,), 65535)).float().nan_to_num(7), odd.nan_to_num(7))


def test_random_bits_look_random():
    bits = random_bits(1 << 18, *keys(5, 9, 2)[:2])
    other = random_bits(1 << 18, *keys(5, 10, 2)[:2])
    ones = torch.stack([(bits >> i & 1).double().mean() for i in range(32)])
    assert ((ones - 0.5).abs() < 5 * 0.5 / 512).all()
    for a, b in ((bits & 0xFFFF, bits >> 16), (bits, other), (bits[1:], bits[:-1]), (bits[256:], bits[:-256])):
        assert abs(torch.corrcoef(torch.stack([a, b]).double())[0, 1]) < 5 / 512
    counts = torch.bincount(bits >> 24, minlength=256).double()
    assert (counts - 1024).square().sum() / 1024 < 255 + 5 * (2 * 255) ** 0.5  # chi squared


def test_bf16_moments_follow_fp32_ones_where_rounding_to_nearest_would_freeze():
    torch.manual_seed(4)
    kept, exact = (update("none", kind, torch.zeros(4096)) for kind in ("bf16", "fp32"))
    for step in range(1, 1001):
        g = torch.randn(4096) * (10.0 if step < 200 else 1.0)  # v has to fall by a factor of two, by 0.1% per step
        for u in (kept, exact):
            u.gradient, u.rates, u.key = g, rates(step, lr=0.0), keys(0, step, 0)
        adamw([kept, exact])
    ratio = kept.moments.v.float() / exact.moments.v
    assert abs(ratio.mean() - 1) < 0.005 and ratio.std() < 0.1


def test_8_bit_moments_stay_within_half_a_code():
    torch.manual_seed(5)
    m, v = gradient(5000), gradient(5000).square()
    kept = Moments.zeros(m.shape, "int8")
    kept.write(m, v, (0, 0, 0, 0))
    read_m, read_v = kept.read()
    top_m = torch.nn.functional.pad(m.abs(), (0, 120)).view(-1, 256).amax(1).repeat_interleave(256)[:5000]
    top_v = torch.nn.functional.pad(v, (0, 120)).view(-1, 256).amax(1).repeat_interleave(256)[:5000]
    y = (m / top_m).abs()
    assert ((read_m - m).abs() <= top_m * (1 + y) ** 2 / 2 * 0.502 / 127).all()  # the slope of y / (2 - y)
    assert (
        (read_v.sqrt() - v.sqrt()).abs() <= top_v.sqrt() * torch.where(v.sqrt() < top_v.sqrt() / 510, 1.001, 0.501) / 255
    ).all()
    assert (read_v[v > 0] > 0).all()
    nothing = Moments.zeros(m.shape, "int8")
    nothing.write(torch.zeros(5000), torch.zeros(5000), (0, 0, 0, 0))
    assert all(not t.any() for t in nothing.read())


def test_squares_are_exact_and_count_non_finite_elements():
    torch.manual_seed(6)
    tensors = [torch.randn(n).to(d) for n in (0, 1, 31, 33, 16385, 100003) for d in (torch.float32, torch.bfloat16)]
    tensors += [torch.full((50000,), 1e30), torch.randn(3, 5, 7).transpose(0, 2)]
    sums, counts = squares(tensors)
    for tensor, total, count in zip(tensors, sums, counts, strict=True):
        assert total == pytest.approx(squares_reference(tensor)[0], rel=1e-13) and count == 0
    damaged = torch.randn(40000)
    damaged[[0, 17, 39999]] = torch.tensor([math.nan, math.inf, -math.inf])
    assert squares([torch.ones(3), damaged])[1] == [0, 3] and squares_reference(damaged)[1] == 3
