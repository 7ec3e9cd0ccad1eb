"""Chunked log-probabilities against log_softmax, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rllib_gtpo.ops import logprobs as module
from rllib_gtpo.ops.logprobs import selected_logprobs


@pytest.fixture(
    params=[(module.TILE, 0), (6, 0), (6, module.KEPT)],
    ids=["one_part", "parts", "kept"],
    autouse=True,
)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every test with the whole vocabulary in a tile, with a part of it, and with logits kept."""
    tile, kept = request.param
    monkeypatch.setattr(module, "TILE", tile)
    monkeypatch.setattr(module, "KEPT", kept)
    return int(tile)


def problem(
    n: int = 7, h: int = 5, v: int = 11, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(v, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(0, v, (n,), generator=g)


def full(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.T + (0 if bias is None else bias)) / temperature
    logp = logits.log_softmax(1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


def test_by_hand() -> None:
    # logits [0, ln 3]: probabilities 1/4 and 3/4
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [3.0]]).log1p().clone()
    weight[1] = torch.tensor(3.0).log()
    got, entropy = selected_logprobs(hidden, weight, torch.tensor([0, 1]), with_entropy=True)
    assert entropy is not None
    torch.testing.assert_close(got.exp(), torch.tensor([0.25, 0.75]))
    expected = -(0.25 * torch.tensor(0.25).log() + 0.75 * torch.tensor(0.75).log())
    torch.testing.assert_close(entropy, expected.expand(2))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_log_softmax(temperature: float, chunk: int, biased: bool) -> None:
    hidden, weight, bias, targets = problem()
    inputs = [hidden, weight, *([bias] if biased else [])]
    used = bias if biased else None
    got = selected_logprobs(
        hidden,
        weight,
        targets,
        temperature=temperature,
        chunk=chunk,
        bias=used,
        with_entropy=True,
    )
    expected = full(hidden, weight, used, targets, temperature)
    pull = torch.linspace(-1, 2, 7, dtype=torch.float64)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, theirs)
        mine_grads = torch.autograd.grad(mine @ pull, inputs, retain_graph=True)
        their_grads = torch.autograd.grad(theirs @ pull, inputs, retain_graph=True)
        for a, b in zip(mine_grads, their_grads, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradcheck(with_entropy: bool) -> None:
    hidden, weight, bias, targets = problem(n=5)

    def function(h: Tensor, w: Tensor, b: Tensor) -> Any:
        logprobs, entropy = selected_logprobs(
            h, w, targets, temperature=0.7, chunk=2, bias=b, with_entropy=with_entropy
        )
        return logprobs if entropy is None else (logprobs, entropy)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.tensor([[200.0], [200.0]], requires_grad=True)
    got, entropy = selected_logprobs(
        hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]), with_entropy=True
    )
    assert entropy is not None
    assert got.tolist() == [0.0, -400.0]
    assert entropy.tolist() == [0.0, 0.0]
    (got.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [0.0, -2.0]


def test_entropy_is_none_unless_asked_for() -> None:
    hidden, weight, _, targets = problem()
    assert selected_logprobs(hidden, weight, targets)[1] is None


def test_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, _, targets = problem()
    expected = torch.autograd.grad(full(hidden, weight, None, targets, 1.0)[0].sum(), hidden)[0]
    frozen = weight.detach()
    selected_logprobs(hidden, frozen, targets, chunk=2)[0].sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, expected)
    assert frozen.grad is None


def test_frozen_hidden_trains_the_weight() -> None:
    hidden, weight, _, targets = problem()
    expected = torch.autograd.grad(full(hidden, weight, None, targets, 1.0)[0].sum(), weight)[0]
    selected_logprobs(hidden.detach(), weight, targets, chunk=2)[0].sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected)


def test_no_positions_backpropagate_zeros() -> None:
    hidden, weight, bias, targets = problem(n=0, dtype=torch.float32)
    logprobs, entropy = selected_logprobs(hidden, weight, targets, bias=bias, with_entropy=True)
    assert entropy is not None
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    for tensor in (hidden, weight, bias):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert tensor.grad.abs().sum() == 0


def test_bfloat16() -> None:
    hidden, weight, _, targets = problem(n=64, h=32, v=50, dtype=torch.bfloat16)
    got, _ = selected_logprobs(hidden, weight, targets, chunk=10)
    assert got.dtype == torch.float32
    exact_hidden, exact_weight = (t.detach().float().requires_grad_() for t in (hidden, weight))
    expected, _ = full(exact_hidden, exact_weight, None, targets, 1.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.1)
    got.sum().backward()
    expected.sum().backward()
    for mine, exact in ((hidden, exact_hidden), (weight, exact_weight)):
        assert mine.grad is not None
        assert exact.grad is not None
        assert mine.grad.dtype == torch.bfloat16
        error = (mine.grad.float() - exact.grad).norm() / exact.grad.norm()
        assert error < 0.02


def test_weight_gradient_is_summed_in_float32() -> None:
    # 2000 equal positions, one per chunk: a bfloat16 sum stops growing after 256 of them
    hidden = torch.ones(2000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(2000, dtype=torch.long)
    selected_logprobs(hidden, weight, targets, chunk=1)[0].sum().backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [1000.0, -1000.0]


def test_mixed_dtypes_and_autocast_compute_in_the_dtype_of_hidden() -> None:
    hidden, weight, _, targets = problem(n=6, dtype=torch.float32)
    expected, _ = full(hidden, weight, None, targets, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = selected_logprobs(hidden, weight, targets)
    torch.testing.assert_close(got, expected)
    low = hidden.detach().bfloat16().requires_grad_()
    mixed, _ = selected_logprobs(low, weight, targets)
    mixed.sum().backward()
    assert low.grad is not None
    assert weight.grad is not None
    assert (low.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=0.1)


def test_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    seen: list[tuple[int, ...]] = []
    real = module._logits

    def spy(*args: Any) -> None:
        real(*args)
        seen.append(tuple(args[-1].shape))

    monkeypatch.setattr(module, "_logits", spy)
    monkeypatch.setattr(module, "KEPT", 10 * 11 - 1)
    hidden, weight, _, targets = problem(n=10)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        got = selected_logprobs(hidden, weight, targets, chunk=3)[0]
    got.sum().backward()
    widths = [2, 2, 2, 2, 2, 1] if tile == 6 else [11]
    assert seen == [(rows, width) for rows in (3, 3, 3, 1) for width in widths] * 2
    assert all(t.shape != (10, 11) for t in saved)


def test_few_logits_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = module._logits
    monkeypatch.setattr(module, "_logits", lambda *args: made.append(real(*args)))
    monkeypatch.setattr(module, "KEPT", 10 * 11)
    hidden, weight, _, targets = problem(n=10)
    got = selected_logprobs(hidden, weight, targets, chunk=3)[0]
    once = len(made)
    (first,) = torch.autograd.grad(got.sum(), weight, retain_graph=True)
    (again,) = torch.autograd.grad(got.sum(), weight)
    assert len(made) == once
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"chunk": 0}, "chunk"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, "targets"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"weight": torch.zeros(11, 4)}, "hidden"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    hidden, weight, _, targets = problem()
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, **change}
    with pytest.raises(ValueError, match=message):
        selected_logprobs(**arguments)
