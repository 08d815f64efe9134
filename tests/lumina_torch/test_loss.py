"""Cross-entropy in chunks, against a whole log-softmax in float64."""

import numpy as np
import pytest
import torch

import lumina_torch.loss
from lumina_torch.loss import cross_entropy
from tests.lumina_jax.oracles import assert_close, assert_gradients, wide

N, D, V = 10, 4, 9
rng = np.random.default_rng(0)
HIDDEN_ND = rng.standard_normal((N, D)).astype(np.float32)
HEAD_DV = (2 * rng.standard_normal((D, V))).astype(np.float32)
TARGETS_N = rng.integers(0, V, N)
TARGETS_N[::3] = np.argmax(HIDDEN_ND @ HEAD_DV, axis=1)[::3]  # some predictions are right
WEIGHTS_N = np.array([1, 0, 0.5, 1, 2, 0, 0, 1, 1, 0.25], np.float32)


def _oracle(hidden_ND, head_DV, weights_N=WEIGHTS_N):
    """(weighted sum of -log p(target), weighted count of the targets that come first)."""
    loss = correct = 0.0
    for hidden_D, target, weight in zip(wide(hidden_ND), TARGETS_N, weights_N, strict=True):
        logits_V = hidden_D @ wide(head_DV)
        top = np.max(np.real(logits_V))
        loss += weight * (top + np.log(np.sum(np.exp(logits_V - top))) - logits_V[target])
        correct += weight * (np.argmax(np.real(logits_V)) == target)
    return loss, correct


def _sums(hidden_ND, head_DV, weights_N=WEIGHTS_N):
    arrays = (hidden_ND, head_DV, TARGETS_N, weights_N)
    return cross_entropy(*(torch.as_tensor(a) for a in arrays))


def _gradients(scale=1.0, hidden_ND=HIDDEN_ND, head_DV=HEAD_DV):
    hidden, head = (torch.tensor(a).requires_grad_() for a in (hidden_ND, head_DV))
    sums = _sums(hidden, head)
    (scale * sums.loss).backward()
    return sums, {"hidden": hidden.grad, "head": head.grad}


@pytest.mark.parametrize("chunk", [3, 5, 512], ids=["not_divisible", "divisible", "one_chunk"])
def test_equals_a_log_softmax_forward_and_backward(chunk, monkeypatch):
    monkeypatch.setattr(lumina_torch.loss, "LOGIT_CHUNK", chunk)
    expected_loss, expected_correct = _oracle(HIDDEN_ND, HEAD_DV)
    alone = _sums(HIDDEN_ND, HEAD_DV)
    differentiated, gradients = _gradients()
    for sums in (alone, differentiated):  # two paths: forward alone, and forward under differentiation
        assert_close(sums.loss.detach(), expected_loss)
        assert_close(sums.correct, expected_correct)
    assert 0 < expected_correct < np.sum(WEIGHTS_N)
    assert_gradients(lambda a: _oracle(a["hidden"], a["head"])[0], {"hidden": HIDDEN_ND, "head": HEAD_DV}, gradients)


def test_gradient_scales_with_the_cotangent():
    _, once = _gradients()
    _, scaled = _gradients(scale=-2.5)
    for name, gradient in once.items():
        assert_close(scaled[name], -2.5 * gradient, 1e-6)


def test_the_count_of_correct_tokens_has_no_gradient():
    hidden = torch.tensor(HIDDEN_ND).requires_grad_()
    sums = _sums(hidden, HEAD_DV)
    assert sums.loss.requires_grad
    assert not sums.correct.requires_grad


def test_a_head_alone_may_be_differentiated():
    head = torch.tensor(HEAD_DV).requires_grad_()
    _sums(HIDDEN_ND, head).loss.backward()
    assert_close(head.grad, _gradients()[1]["head"], 1e-6)


def test_tokens_of_weight_zero_count_for_nothing():
    hidden_ND = HIDDEN_ND.copy()
    hidden_ND[WEIGHTS_N == 0] = 50.0
    before, _ = _gradients()
    after, gradients = _gradients(hidden_ND=hidden_ND)
    assert_close(after.loss.detach(), before.loss.detach(), 1e-6)
    assert_close(after.correct, before.correct, 1e-6)
    assert (gradients["hidden"][WEIGHTS_N == 0] == 0).all()


def test_large_logits_do_not_overflow():
    sums, gradients = _gradients(hidden_ND=1e4 * HIDDEN_ND)
    assert_close(sums.loss.detach(), _oracle(1e4 * HIDDEN_ND, HEAD_DV)[0])
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_hidden_gives_float32_sums(dtype, tolerance):
    hidden_ND, head_DV = (torch.tensor(a).to(dtype) for a in (HIDDEN_ND, HEAD_DV))
    hidden, head = (a.clone().requires_grad_() for a in (hidden_ND, head_DV))
    sums = _sums(hidden, head)
    sums.loss.backward()
    assert sums.loss.dtype == sums.correct.dtype == torch.float32
    # Of the rounded inputs exactly: were the logits rounded too, this would be off by a hundredth.
    assert_close(sums.loss.detach(), _oracle(hidden_ND.float().numpy(), head_DV.float().numpy())[0])
    _, wide_gradients = _gradients(hidden_ND=hidden_ND.float().numpy(), head_DV=head_DV.float().numpy())
    for found, expected in ((hidden.grad, wide_gradients["hidden"]), (head.grad, wide_gradients["head"])):
        assert found.dtype == dtype
        assert_close(found.float(), expected, tolerance)


def test_a_probability_too_small_for_float16_has_its_gradient_when_the_loss_is_scaled():
    # Two tokens of the vocabulary: p of the wrong one is exp(-18) = 1.5e-8, which float16 has as zero.
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.float16).requires_grad_()
    head = torch.tensor([[18.0, 0.0], [0.0, 1.0]], dtype=torch.float16)
    loss = cross_entropy(hidden, head, torch.tensor([0]), torch.ones(1)).loss
    (loss * 65536).backward()
    assert_close(hidden.grad[0, 1].float(), 65536 * np.exp(-18), 1e-3)


def test_float64_is_kept_throughout():
    arrays = (HIDDEN_ND.astype(np.float64), HEAD_DV.astype(np.float64))
    sums = _sums(*arrays, WEIGHTS_N.astype(np.float64))
    assert_close(sums.loss, _oracle(*arrays)[0], 1e-14)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_of_tokens_times_vocabulary_is_formed(monkeypatch):
    tokens, width, vocabulary, chunk = 64, 4, 96, 8
    monkeypatch.setattr(lumina_torch.loss, "LOGIT_CHUNK", chunk)
    targets, weights = torch.zeros(tokens, dtype=torch.long), torch.ones(tokens)

    def largest(loss):
        hidden, head = torch.zeros(tokens, width, requires_grad=True), torch.zeros(width, vocabulary, requires_grad=True)
        with Largest() as seen:
            loss(hidden, head).backward()
        return seen.numel

    assert largest(lambda h, w: torch.nn.functional.cross_entropy(h @ w, targets)) >= tokens * vocabulary
    assert largest(lambda h, w: cross_entropy(h, w, targets, weights).loss) <= chunk * vocabulary
