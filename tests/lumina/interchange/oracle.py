"""A slow forward pass in float64 with loops over heads, tokens and experts, which shares no code with either backend.

T positions, D model width, h head width, F feed-forward width, V vocabulary.
"""

import math

import numpy as np

from lumina.architecture import layer_kinds, tensor_table


def random_tensors(model, seed=0, std=0.3):
    """Random arrays for every tensor of the model, float32; router biases are 0."""
    draw = np.random.default_rng(seed)
    return {
        tensor.name: (std * draw.normal(size=tensor.shape) + (tensor.constant or 0)).astype(np.float32)
        if tensor.trained
        else np.zeros(tensor.shape, np.float32)
        for tensor in tensor_table(model)
    }


def norm(x, scale, eps):
    return x / math.sqrt(np.mean(x * x) + eps) * scale


def rotate(x_h, position, theta):
    half = len(x_h) // 2
    turned = np.empty_like(x_h)
    for i in range(half):
        angle = position * theta ** (-i / half)
        turned[i] = x_h[i] * math.cos(angle) - x_h[half + i] * math.sin(angle)
        turned[half + i] = x_h[half + i] * math.cos(angle) + x_h[i] * math.sin(angle)
    return turned


def activate(x, activation):
    if activation == "swiglu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def feedforward(x_D, gate_DF, up_DF, down_FD, activation):
    return (activate(x_D @ gate_DF, activation) * (x_D @ up_DF)) @ down_FD


def attention(x_TD, weights, model):
    T, H, K = len(x_TD), model.num_heads, model.num_kv_heads
    query, key, value, output = (weights[f"attention.{name}"] for name in ("query", "key", "value", "output"))
    out_TD = np.zeros_like(x_TD)
    for head in range(H):
        kv = head // (H // K)
        q, k, v = x_TD @ query[:, head], x_TD @ key[:, kv], x_TD @ value[:, kv]
        if model.qk_norm:
            q = np.stack([norm(row, weights["attention.query_norm.scale"], model.norm_eps) for row in q])
            k = np.stack([norm(row, weights["attention.key_norm.scale"], model.norm_eps) for row in k])
        q = np.stack([rotate(row, t, model.rope_theta) for t, row in enumerate(q)])
        k = np.stack([rotate(row, t, model.rope_theta) for t, row in enumerate(k)])
        for t in range(T):
            scores = q[t] @ k[: t + 1].T / math.sqrt(model.head_dim)
            shares = np.exp(scores - scores.max())
            out_TD[t] += (shares / shares.sum()) @ v[: t + 1] @ output[head]
    return out_TD


def experts(x_D, weights, model):
    logits = x_D @ weights["moe.router"]
    scores = np.exp(logits - logits.max())
    scores /= scores.sum()
    chosen = sorted(range(len(scores)), key=lambda e: -scores[e])[: model.moe.top_k]
    total = sum(scores[e] for e in chosen) if model.moe.renormalise and model.moe.top_k > 1 else 1.0
    stacked = [weights[f"moe.experts.{name}"] for name in ("gate", "up", "down")]
    return sum(scores[e] / total * feedforward(x_D, *(part[e] for part in stacked), model.activation) for e in chosen)


def logits_TV(model, tensors, ids_T):
    """Logits after each token of one document, float64."""
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x_TD = wide["embedding.weight"][ids_T] * (math.sqrt(model.d_model) if model.scale_embeddings else 1.0)
    for i, kind in enumerate(layer_kinds(model)):
        prefix = f"blocks.{i}."
        weights = {name.removeprefix(prefix): tensor for name, tensor in wide.items() if name.startswith(prefix)}
        z_TD = np.stack([norm(x, weights["attention_norm.scale"], model.norm_eps) for x in x_TD])
        x_TD = x_TD + attention(z_TD, weights, model)
        for t in range(len(x_TD)):
            z_D = norm(x_TD[t], weights["feedforward_norm.scale"], model.norm_eps)
            if kind == "moe":
                x_TD[t] += experts(z_D, weights, model)
            else:
                x_TD[t] += feedforward(z_D, *(weights[f"feedforward.{n}"] for n in ("gate", "up", "down")), model.activation)
    normed_TD = np.stack([norm(x, wide["final_norm.scale"], model.norm_eps) for x in x_TD])
    return normed_TD @ (wide["embedding.weight"].T if model.tie_embeddings else wide["head.weight"])
