"""DeepSeekAdamW: against torch's AdamW in fp64, resumed, scheduled, clipped, with gradients that are not finite."""

import copy
import io
import math
import pickle
from pathlib import Path

import pytest
import torch

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.system.threads import one_torch_thread
from deepseek_optimizer.train.optimizer import DeepSeekAdamW

FORMATS = [(s, m) for s in ("bf16", "int8", "fp32") for m in ("split", "stochastic")]


def model(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Tanh(), torch.nn.Linear(64, 5)).to(dtype)


def parameters_of(optimizer: DeepSeekAdamW) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(parameters, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def run(optimizer: DeepSeekAdamW, steps: range) -> None:
    for step in steps:
        give_gradients(parameters_of(optimizer), step)
        optimizer.step()


def bits(optimizer: DeepSeekAdamW) -> list[torch.Tensor]:
    result = [p.detach().clone() for p in parameters_of(optimizer)]
    return result + [v for p in parameters_of(optimizer) for v in optimizer.state[p].values()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def step_both(ours, optimizer, exact, theirs, seed: int) -> None:
    """A step of each optimizer with the same gradients."""
    give_gradients(ours.parameters(), seed)
    for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
        q.grad = p.grad.double()
    optimizer.step()
    theirs.step()


def test_fp32_equals_torch_adamw_up_to_rounding():
    ours, exact = model(torch.float32), model(torch.float64)
    exact.load_state_dict(ours.state_dict())
    options = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.3}
    optimizer, theirs = (
        DeepSeekAdamW(ours.parameters(), state="fp32", **options),
        torch.optim.AdamW(exact.parameters(), **options),
    )
    for step in range(50):
        step_both(ours, optimizer, exact, theirs, step)
        for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
            assert (p.double() - q).abs().max() < 4e-7 * (step + 1) ** 0.5  # half an ulp of weights up to 2 per step


@pytest.mark.parametrize(("state", "master_weights"), FORMATS)
def test_small_formats_stay_close_to_torch_adamw(state, master_weights):
    ours, exact = model(), model()
    exact = exact.double()
    optimizer = DeepSeekAdamW(ours.parameters(), lr=1e-3, state=state, master_weights=master_weights)
    theirs = torch.optim.AdamW(exact.parameters(), lr=1e-3)
    start = [p.detach().clone() for p in exact.parameters()]
    for step in range(50):
        step_both(ours, optimizer, exact, theirs, step)
    bound = {"fp32": 1e-4, "bf16": 0.03, "int8": 0.15}[state] if master_weights == "split" else 0.4
    for p, q, s in zip(ours.parameters(), exact.parameters(), start, strict=True):
        moved = (q - s).norm()
        assert (optimizer.master(p).double() - q).norm() < bound * moved
        assert torch.equal(p, optimizer.master(p).bfloat16()) or master_weights == "split"


def test_stochastic_weights_accumulate_small_updates_on_average():
    weight = torch.nn.Parameter(torch.ones(20000, dtype=torch.bfloat16))  # the adjacent values are 0.0039 and 0.0078 away
    optimizer = DeepSeekAdamW([weight], lr=1e-4, weight_decay=0.0, master_weights="stochastic")
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.detach().float().mean().item() == pytest.approx(1 - 20e-4, abs=1e-4)


@pytest.mark.parametrize(("state", "master_weights"), FORMATS)
def test_resuming_is_bitwise(state, master_weights):
    whole = DeepSeekAdamW(model().parameters(), state=state, master_weights=master_weights, seed=3, max_norm=2.0)
    run(whole, range(5))
    saved = io.BytesIO()
    torch.save({"optimizer": whole.state_dict(), "weights": [p.detach().clone() for p in parameters_of(whole)]}, saved)
    saved.seek(0)
    actual = torch.load(saved, weights_only=True)
    again = DeepSeekAdamW(model(seed=1).parameters(), state=state, master_weights=master_weights, max_norm=2.0)
    for p, weights in zip(parameters_of(again), actual["weights"], strict=True):
        p.data.copy_(weights)
    again.load_state_dict(actual["optimizer"])
    assert equal(bits(whole), bits(again)) and again.param_groups[0]["seed"] == 3
    run(whole, range(5, 9))
    run(again, range(5, 9))
    assert equal(bits(whole), bits(again))
    copied = copy.deepcopy(again)
    run(copied, range(9, 11))
    run(again, range(9, 11))
    assert equal(bits(copied), bits(again))


def test_rounding_depends_on_the_seed_and_the_tensor():
    def made(seed: int) -> DeepSeekAdamW:
        twice = [torch.nn.Parameter(torch.ones(300, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = DeepSeekAdamW(twice, seed=seed, master_weights="stochastic")
        for p in twice:
            p.grad = torch.full_like(p, 0.3)
        optimizer.step()
        return optimizer

    first, same, other = made(0), made(0), made(1)
    assert equal(bits(first), bits(same)) and not equal(bits(first), bits(other))
    a, b = parameters_of(first)
    assert not torch.equal(first.state[a]["exp_avg"], first.state[b]["exp_avg"])


def test_results_do_not_depend_on_threads():
    pytest.importorskip("deepseek_optimizer.backends.cpu.native")
    from deepseek_optimizer.backends.cpu import native as library
    from deepseek_optimizer.train.ops import native

    if not native.built():
        pytest.skip("no native library on this machine")
    results = []
    for threads in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "context", lambda threads=threads: library.shared_context(None, threads))
            optimizer = DeepSeekAdamW([torch.nn.Parameter(torch.ones(100_000, dtype=torch.bfloat16))], max_norm=0.5)
            run(optimizer, range(3))
            results.append((bits(optimizer), optimizer.grad_norm))
    assert all(equal(actual, results[0][0]) and norm == results[0][1] for actual, norm in results)


def test_clipping_equals_torch():
    ours, theirs = model(torch.float32), model(torch.float32)
    optimizer, plain = DeepSeekAdamW(ours.parameters(), state="fp32", max_norm=0.7), torch.optim.AdamW(theirs.parameters())
    for step in range(3):
        give_gradients(ours.parameters(), step)
        give_gradients(theirs.parameters(), step)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.7)
        optimizer.step()
        plain.step()
        assert optimizer.grad_norm == pytest.approx(norm.item(), rel=1e-6) and norm > 0.7
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_skips_the_step_with_a_warning(value, caplog):
    net = model()
    optimizer = DeepSeekAdamW(net.named_parameters(), max_norm=1.0, free_gradients=True)
    run(optimizer, range(2))
    assert not optimizer.skipped
    before = copy.deepcopy(bits(optimizer))
    give_gradients(net.parameters(), 2)
    net[2].weight.grad[3, 7] = value
    optimizer.step()
    assert optimizer.skipped and optimizer.skipped_steps == 1 and not math.isfinite(optimizer.grad_norm)
    assert equal(bits(optimizer), before) and "2.weight" in caplog.text
    assert all(p.grad is None for p in net.parameters())
    run(optimizer, range(3, 4))
    assert not optimizer.skipped and not equal(bits(optimizer), before)


def test_gradients_are_freed_and_missing_ones_change_nothing():
    net = model()
    optimizer = DeepSeekAdamW(net.parameters(), free_gradients=True)
    give_gradients(net.parameters(), 0)
    net[0].bias.grad = None
    untouched = net[0].bias.detach().clone()
    optimizer.step()
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(net[0].bias, untouched) and not optimizer.state[net[0].bias]
    optimizer.step()  # without any gradient
    assert optimizer.grad_norm == 0 and not optimizer.skipped


def test_accumulated_fp32_gradients_are_used():
    sums, plain = (DeepSeekAdamW(model().parameters()) for _ in range(2))
    for p, q in zip(parameters_of(sums), parameters_of(plain), strict=True):
        q.grad = torch.full_like(q, 0.75)
        p.main_grad, p.grad = torch.full(p.shape, 0.5), torch.full_like(p, 0.25)
    sums.step()
    plain.step()
    assert equal(bits(sums), bits(plain)) and sums.grad_norm == plain.grad_norm
    sums.zero_grad()
    assert all(not p.main_grad.any() for p in parameters_of(sums))


def test_groups_schedulers_and_closures():
    net = model(torch.float32)
    groups = [{"params": net[0].parameters(), "lr": 0.5, "weight_decay": 0.0}, {"params": net[2].parameters()}]
    optimizer = DeepSeekAdamW(groups, lr=0.1, state="fp32")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    start = net[0].weight.detach().clone()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(torch.ones(2, 96)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    step = (net[0].weight - start).abs()
    assert torch.allclose(step[step > 0], torch.tensor(0.5), rtol=1e-3)  # Adam's first step is the learning rate itself
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.05]


def test_state_bytes_equal_the_stored_state():
    for state, master_weights in FORMATS:
        optimizer = DeepSeekAdamW(model().parameters(), state=state, master_weights=master_weights)
        planned = optimizer.state_bytes()
        run(optimizer, range(1))
        kept = [v for p in parameters_of(optimizer) for k, v in optimizer.state[p].items() if k != "step"]
        assert planned == sum(v.numel() * v.element_size() for v in kept)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": -1.0}, "lr"), ({"betas": (1.0, 0.9)}, "betas"), ({"eps": math.nan}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"state": "fp8"}, "state"), ({"master_weights": "both"}, "master_weights"), ({"max_norm": 0.0}, "max_norm"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_named(options, named):
    with pytest.raises(ConfigError, match=named):
        DeepSeekAdamW(model().parameters(), **options)


def test_untrainable_parameters_are_rejected():
    with pytest.raises(ConfigError, match="float16"):
        DeepSeekAdamW(model(torch.float16).parameters())
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = DeepSeekAdamW(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match="gradient of weight is sparse"):
        optimizer.step()


def test_state_of_another_format_is_rejected():
    saved = DeepSeekAdamW(model().parameters(), state="int8").state_dict()
    with pytest.raises(ConfigError, match="state='int8'"):
        DeepSeekAdamW(model().parameters()).load_state_dict(saved)
    with pytest.raises(ConfigError, match="another optimizer"):
        DeepSeekAdamW(model().parameters()).load_state_dict(torch.optim.AdamW(model().parameters()).state_dict())


def test_losses_of_200_steps_are_close_to_fp32():
    text = torch.tensor(list(Path(torch.nn.functional.__file__).read_bytes()))

    def loss_after(dtype: torch.dtype, **options) -> float:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Embedding(256, 24), torch.nn.Flatten(), torch.nn.Linear(192, 128), torch.nn.Tanh())
        net.append(torch.nn.Linear(128, 256)).to(dtype)
        optimizer = DeepSeekAdamW(net.parameters(), lr=2e-3, **options)
        places = torch.randint(0, len(text) - 9, (201, 256), generator=torch.Generator().manual_seed(1))
        for step in range(201):
            windows = text[places[step][:, None] + torch.arange(9)]
            loss = torch.nn.functional.cross_entropy(net(windows[:, :8]).float(), windows[:, 8])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            windows = text[: len(text) // 9 * 9].view(-1, 9)
            return float(torch.nn.functional.cross_entropy(net(windows[:, :8]).float(), windows[:, 8]))

    with one_torch_thread():
        exact = loss_after(torch.float32, state="fp32")
        assert exact < 2.4  # starting from 5.5: it learns
        for state, master_weights in (("bf16", "split"), ("int8", "split"), ("int8", "stochastic")):
            actual = loss_after(torch.bfloat16, state=state, master_weights=master_weights)
            assert actual == pytest.approx(exact, rel=0.003), (state, master_weights)


def test_state_of_other_shapes_is_rejected_before_writing():
    saved = DeepSeekAdamW(torch.nn.Linear(96, 64).bfloat16().named_parameters())
    run(saved, range(1))
    narrower = DeepSeekAdamW(torch.nn.Linear(95, 64).bfloat16().named_parameters())
    with pytest.raises(ConfigError, match=r"state of weight .*\[64, 96\].*\[64, 95\]"):
        narrower.load_state_dict(saved.state_dict())
    run(narrower, range(1))
    for p in parameters_of(saved):
        p.main_grad = torch.zeros(3)
    with pytest.raises(ConfigError, match="main_grad of weight"):
        saved.step()


def test_dithered_masters_round_to_their_weights_and_let_small_updates_through():
    """An update of 0.001 of a bf16 step moves one weight in a thousand by a whole step, so that the mean moves by the update,
    whereas masters that begin at their weights are all rounded back."""
    begin = torch.linspace(1.0, 1.99, 200_000).bfloat16()
    moved = {}
    for dither in (True, False):
        weights = torch.nn.Parameter(begin.clone())
        weights.grad = torch.ones_like(begin)
        optimizer = DeepSeekAdamW([weights], lr=0.0, weight_decay=0.0, dither=dither, seed=3)
        optimizer.step()
        assert torch.equal(optimizer.master(weights).bfloat16(), begin) and torch.equal(weights, begin)
        optimizer.param_groups[0]["lr"] = 2.0**-7 / 1000
        weights.grad = torch.ones_like(begin)
        optimizer.step()
        moved[dither] = float((begin.double() - weights.detach().double()).mean())
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(2.0**-7 / 1000, rel=0.25)  # 200 of 200,000, within three standard deviations


def test_dithered_zeros_stay_finite():
    weights = torch.nn.Parameter(torch.tensor([0.0, -0.0, 1.0] * 2000).bfloat16())
    weights.grad = torch.zeros_like(weights)
    optimizer = DeepSeekAdamW([weights], lr=0.1, dither=True, weight_decay=0.0)
    optimizer.step()
    assert torch.equal(optimizer.master(weights)[:2], torch.zeros(2)) and torch.isfinite(optimizer.master(weights)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_through_modified_weights_is_an_error(dtype):
    net = model(dtype)
    optimizer, loss = DeepSeekAdamW(net.parameters()), net(torch.ones(2, 96, dtype=dtype)).sum()
    give_gradients(net.parameters(), 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_continue_like_the_original():
    plain = DeepSeekAdamW(model().parameters(), dither=True, max_norm=1.0)
    copies = [copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))]
    for optimizer in (plain, *copies):
        run(optimizer, range(2))
    assert all(equal(bits(optimizer), bits(plain)) for optimizer in copies)
