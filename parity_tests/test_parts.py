"""Parts of the JAX model against PyTorch's own: the first witnesses, before a whole mirror stands beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lumina.config import Config, ModelConfig, OptimConfig, TrainConfig
from lumina_jax.attend import attend
from lumina_jax.attention import RMSNorm
from lumina_jax.loss import cross_entropy
from lumina_jax.model import by_canonical_name, create
from lumina_jax.optimizer import decay_mask, make_optimizer, schedule


def assert_close(actual, expected, tolerance: float) -> None:
    """The largest difference, relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.max(np.abs(actual - expected)) <= tolerance * np.max(np.abs(expected))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("T", [7, 130, 300])
def test_attention_equals_torch_with_a_document_mask(T):
    B, H, K, h = 2, 4, 2, 8
    q, k, v, weight = normal(0, B, T, H, h), normal(1, B, T, K, h), normal(2, B, T, K, h), normal(3, B, T, H, h)
    segments = np.cumsum(np.random.default_rng(4).random((B, T)) < 0.1, axis=1).astype(np.int32)

    def objective(q, k, v):
        out = attend(q, k, v, jnp.asarray(segments))
        return jnp.sum(out * weight), out

    grads, out = jax.jit(jax.grad(objective, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    tensors = [torch.tensor(a, requires_grad=True) for a in (q, k, v)]
    visible = torch.tensor(segments[:, None, :, None] == segments[:, None, None, :]) & torch.ones(T, T, dtype=torch.bool).tril()
    heads_first = [t.transpose(1, 2) for t in tensors]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=visible, enable_gqa=True).transpose(
        1, 2
    )
    (expected * torch.tensor(weight)).sum().backward()
    assert_close(out, expected.detach(), 5e-6)
    for grad, tensor in zip(grads, tensors, strict=True):
        assert_close(grad, tensor.grad, 5e-6)


def test_rms_norm_equals_torch():
    from flax import nnx

    x, scale = normal(0, 5, 16), normal(1, 16)
    expected = torch.nn.functional.rms_norm(torch.tensor(x), (16,), torch.tensor(scale), eps=1e-6)
    assert_close(RMSNorm(nnx.Param(jnp.asarray(scale)), 1e-6)(jnp.asarray(x)), expected, 1e-6)


def test_cross_entropy_equals_torch(monkeypatch):
    monkeypatch.setattr("lumina_jax.loss.LOGIT_CHUNK", 16)
    hidden, head, weights = normal(0, 37, 8), normal(1, 8, 50), np.abs(normal(2, 37))
    targets = np.random.default_rng(3).integers(0, 50, 37).astype(np.int32)
    loss, grads = jax.value_and_grad(lambda h, w: cross_entropy(h, w, targets, weights).loss, argnums=(0, 1))(hidden, head)
    h, w = torch.tensor(hidden, requires_grad=True), torch.tensor(head, requires_grad=True)
    each = torch.nn.functional.cross_entropy(h @ w, torch.tensor(targets, dtype=torch.long), reduction="none")
    expected = (each * torch.tensor(weights)).sum()
    expected.backward()
    assert_close(loss, expected.detach(), 5e-6)
    assert_close(grads[0], h.grad, 5e-6)
    assert_close(grads[1], w.grad, 5e-6)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_fifty_adamw_steps_equal_torch(clip):
    """Clipping, warm-up, schedule and decoupled decay of the marked tensors, on gradients that are the same for both."""
    model = ModelConfig(vocab_size=32, d_model=16, num_layers=1, head_dim=8, d_ff=24)
    config = Config(model, optim=OptimConfig(1e-2, "cosine", warmup_steps=5, clip_norm=clip), train=TrainConfig(steps=50))
    _, variables = create(model, seed=0)
    params, optimizer, rate = variables.params, make_optimizer(config), schedule(config.optim, 50)
    decayed = by_canonical_name(model, jax.tree.map(lambda m, p: jnp.full(p.shape, m), decay_mask(config, params), params))
    mirror = {name: torch.tensor(np.asarray(a), requires_grad=True) for name, a in by_canonical_name(model, params).items()}
    groups = [
        {"params": [t for name, t in mirror.items() if np.all(decayed[name])], "weight_decay": config.optim.weight_decay},
        {"params": [t for name, t in mirror.items() if not np.all(decayed[name])], "weight_decay": 0.0},
    ]
    twin = torch.optim.AdamW(groups, lr=1.0, betas=(config.optim.beta1, config.optim.beta2), eps=config.optim.eps)

    @jax.jit
    def update(params, state, grads, learning_rate):
        direction, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, d: p - learning_rate * d, params, direction), state

    state = optimizer.init(params)
    for step in range(50):
        leaves, tree = jax.tree.flatten(params)
        grads = tree.unflatten([jnp.asarray(normal(1000 * step + i, *leaf.shape)) for i, leaf in enumerate(leaves)])
        for name, grad in by_canonical_name(model, grads).items():
            mirror[name].grad = torch.tensor(np.asarray(grad))
        params, state = update(params, state, grads, rate(step))
        if clip:
            torch.nn.utils.clip_grad_norm_(mirror.values(), clip)
        for group in twin.param_groups:
            group["lr"] = float(rate(step))
        twin.step()
    for name, array in by_canonical_name(model, params).items():
        assert_close(array, mirror[name].detach(), 1e-5)
