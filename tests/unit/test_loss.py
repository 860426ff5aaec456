"""The chunked loss agrees with the plain formula over all logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core import chunked_loss
from nanochat_core.chunked_loss import loss_and_gradients, softcapped_cross_entropy

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
VOCAB, ROWS, DIM, TOKENS = 70, 128, 16, 37


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """The reference: the loss in double precision, with all logits in one tensor."""
    logits = 15 * torch.tanh(hidden.double() @ weight[:VOCAB].double().T / 15)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


def drawn(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with logits of about 10: at this size, the softcap matters. Every fifth target is ignored."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, DIM, generator=generator).to(device, dtype).requires_grad_()
    weight = (2.5 * torch.randn(ROWS, DIM, generator=generator)).to(device).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    targets[::5] = -1
    return hidden, weight, targets.to(device)


@pytest.fixture(params=[1, 5, 37, 100], ids=lambda tokens: f"chunks of {tokens}")
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CPU_CHUNK", "GPU_CHUNK"):
        monkeypatch.setattr(chunked_loss, name, request.param * ROWS)
    monkeypatch.setattr(chunked_loss, "ROWS_MULTIPLE", 4)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.1}


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_are_those_of_the_plain_formula(reduction: str, dtype: torch.dtype, device: str) -> None:
    hidden, weight, targets = drawn(dtype, device)
    loss = softcapped_cross_entropy(hidden, weight, targets, VOCAB, reduction)
    expected = plain(hidden, weight, targets, reduction)
    torch.testing.assert_close(loss.double(), expected, **tolerance(dtype))
    upstream = torch.linspace(0.5, 2, loss.numel(), device=device).view(loss.shape)
    gradients = torch.autograd.grad(loss, (hidden, weight), upstream)
    wanted = torch.autograd.grad(expected, (hidden, weight), upstream.double())
    assert [gradient.dtype for gradient in gradients] == [dtype, torch.float32]
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), want.double(), **tolerance(dtype))


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_gradients_the_loss_is_the_same(reduction: str) -> None:
    hidden, weight, targets = drawn()
    with torch.no_grad():
        loss = softcapped_cross_entropy(hidden, weight, targets, VOCAB, reduction)
    torch.testing.assert_close(
        loss.double(), plain(hidden, weight, targets, reduction).detach(), **tolerance(loss.dtype)
    )


def test_a_compiled_step_gives_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations inside each chunk are compiled too."""
    dtype = torch.bfloat16
    monkeypatch.setattr(chunked_loss, "CPU_CHUNK", 20 * ROWS)
    compiled = torch.compile(
        lambda h, w, t: softcapped_cross_entropy(1.5 * h, w, t, VOCAB, "sum") / 7, fullgraph=True, backend="aot_eager"
    )
    hidden, weight, targets = drawn(dtype)
    expected = plain(1.5 * hidden, weight, targets, "sum") / 7
    loss = compiled(hidden, weight, targets)
    torch.testing.assert_close(loss.double(), expected, **tolerance(dtype))
    for gradient, want in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(gradient.double(), want.double(), **tolerance(dtype))


def test_gradients_of_micro_batches_add_up() -> None:
    hidden, weight, targets = drawn()
    for part in (slice(0, 11), slice(11, 37)):
        softcapped_cross_entropy(hidden[part], weight, targets[part], VOCAB, "sum").backward()
    expected = torch.autograd.grad(plain(hidden, weight, targets, "sum"), (hidden, weight))
    torch.testing.assert_close(hidden.grad, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight.grad, expected[1], rtol=1e-4, atol=1e-4)


def test_a_token_that_is_not_counted_gets_no_gradient() -> None:
    hidden, weight, targets = drawn()
    softcapped_cross_entropy(hidden, weight, targets, VOCAB).backward()
    assert hidden.grad is not None
    assert not hidden.grad[targets == -1].any()
    assert hidden.grad[targets != -1].any(1).all()


def test_padding_rows_of_the_head_count_for_nothing() -> None:
    hidden, weight, targets = drawn()
    with torch.no_grad():
        weight[VOCAB:] = 1e4
    softcapped_cross_entropy(hidden, weight, targets, VOCAB).backward()
    assert weight.grad is not None
    assert not weight.grad[VOCAB:].any()
    assert weight.grad.isfinite().all()


def test_logits_far_beyond_the_softcap_are_finite() -> None:
    hidden, weight, targets = drawn()
    loss = softcapped_cross_entropy(1e6 * hidden, weight, targets, VOCAB)
    assert float(loss.detach()) < 30 + math.log(VOCAB)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_no_more_logits_than_a_chunk_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(raw: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        seen.append(len(raw))
        return raw.sum(), raw

    monkeypatch.setattr(chunked_loss, "CPU_CHUNK", 16 * ROWS)
    monkeypatch.setattr(chunked_loss, "loss_and_logit_gradient", spy)
    loss_and_gradients(*drawn(), VOCAB, False)
    assert seen == [16, 16, 5]


def test_logits_are_made_where_a_target_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(raw: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        seen.append(len(raw))
        return raw.sum(), raw

    monkeypatch.setattr(chunked_loss, "ROWS_MULTIPLE", 10)
    monkeypatch.setattr(chunked_loss, "loss_and_logit_gradient", spy)
    hidden, weight, targets = drawn()
    targets[:20] = -1
    assert 0 < int((targets != -1).sum()) < 20
    loss_and_gradients(hidden, weight, targets, VOCAB, False)
    assert seen == [20]
    targets[:] = -1
    loss_and_gradients(hidden, weight, targets, VOCAB, False)
    assert seen == [20]
