"""The transformer once more, slowly: loops in numpy and float64, one row at a time, sharing no code with what it checks.

T positions, D model width, H query heads, K key/value heads, h head width, E experts, k choices a token, V vocabulary.
Weights are dictionaries from a tensor's name within its layer, such as `attention.query`, to its array.
"""

import math

import numpy as np

from lumina.architecture import Tensor, layer_kinds

# ------------------------------------------------------------------------------------------------------ comparisons


def assert_close(actual, expected, tolerance=5e-6):
    """The largest difference is at most `tolerance` times the largest value expected; zeros must be exact zeros."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    difference, largest = np.max(np.abs(actual - expected), initial=0), np.max(np.abs(expected), initial=0)
    assert difference <= tolerance * largest, f"off by {difference:.3g}, where the largest value is {largest:.3g}"


def assert_gradients(loss, arrays, gradients, tolerance=1e-5, step=1e-6):
    """Each of `gradients` agrees with a central difference of `loss(arrays)` along a random direction, one for each array."""
    rng = np.random.default_rng(0)
    arrays = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    assert set(arrays) == set(gradients)
    for name, array in arrays.items():
        direction = rng.standard_normal(array.shape)
        above, below = (loss({**arrays, name: array + sign * step * direction}) for sign in (1, -1))
        gradient = np.asarray(gradients[name], np.float64)
        difference = abs(np.sum(gradient * direction) - (above - below) / (2 * step))
        assert difference <= tolerance * np.linalg.norm(gradient), f"{name}: slope off by {difference:.3g}"


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it: where precision is part of the promise, as compilers may exceed it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from equations(value.jaxpr)


def random_weights(tensors: list[Tensor], seed: int = 0) -> dict[str, np.ndarray]:
    """Values for every tensor, float32 and none at its neutral value: norm scales away from 1, biases away from 0."""
    rng = np.random.default_rng(seed)
    spread = {None: 0.2, 0.02: 1.0}  # of constants; and of the embedding, whose rows would otherwise look alike
    return {t.name: (t.constant + spread.get(t.std, t.std) * rng.standard_normal(t.shape)).astype(np.float32) for t in tensors}


# ------------------------------------------------------------------------------------------------------------ layers


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / np.sum(e)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def rotate(x_Th, positions_T, theta):
    """Each pair (x[i], x[i + h/2]) is a complex number, turned by the angle position * theta^(-2i/h)."""
    half = x_Th.shape[-1] // 2
    angles = np.outer(positions_T, [theta ** (-2 * i / (2 * half)) for i in range(half)])
    turned = (x_Th[:, :half] + 1j * x_Th[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attend(q_THh, k_TKh, v_TKh, segments_T):
    T, H, h = q_THh.shape
    group = H // k_TKh.shape[1]
    out_THh = np.zeros((T, H, h))
    for t in range(T):
        seen = [s for s in range(t + 1) if segments_T[s] == segments_T[t]]
        for n in range(H):
            scores = k_TKh[seen, n // group] @ q_THh[t, n] / math.sqrt(h)
            out_THh[t, n] = softmax(scores) @ v_TKh[seen, n // group]
    return out_THh


def attention(model, w, x_TD, segments_T, positions_T):
    q, k, v = (np.einsum("td,dnh->tnh", x_TD, w[f"attention.{n}"]) for n in ("query", "key", "value"))
    if model.qk_norm:
        q = rms_norm(q, w["attention.query_norm.scale"], model.norm_eps)
        k = rms_norm(k, w["attention.key_norm.scale"], model.norm_eps)
    q, k = (np.stack([rotate(x[:, n], positions_T, model.rope_theta) for n in range(x.shape[1])], axis=1) for x in (q, k))
    return np.einsum("tnh,nhd->td", attend(q, k, v, segments_T), w["attention.output"])


def feedforward(model, gate, up, down, x):
    a = x @ gate
    if model.activation == "swiglu":
        a = a * sigmoid(a)
    else:
        a = 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    return (a * (x @ up)) @ down


def queue(experts_Tk, capacity):
    """(slot within its expert, or -1 where the expert is full) of each choice: by position, then by rank."""
    taken: dict[int, int] = {}
    places_Tk = np.full(np.shape(experts_Tk), -1)
    for t, choices in enumerate(experts_Tk):
        for rank, e in enumerate(choices):
            if taken.get(e, 0) < capacity:
                places_Tk[t, rank] = taken.get(e, 0)
                taken[e] = taken.get(e, 0) + 1
    return places_Tk


def moe(model, w, x_TD, training):
    """Returns ([T, D], metrics)."""
    T, c = len(x_TD), model.moe
    logits_TE = x_TD @ w["moe.router"]
    score = softmax if c.score == "softmax" else sigmoid
    scores_TE = np.array([score(logits / c.temperature) for logits in logits_TE])
    experts_Tk = [
        sorted(range(c.num_experts), key=lambda e: (-(scores[e] + w["moe.bias"][e]), e))[: c.top_k] for scores in scores_TE
    ]
    capacity = math.ceil(T * c.top_k * c.capacity_factor / c.num_experts) if training else T
    kept_Tk = queue(experts_Tk, capacity) >= 0
    out_TD = np.zeros(x_TD.shape)
    for t in range(T):
        total = sum(scores_TE[t, e] for e in experts_Tk[t]) if c.top_k > 1 else 1.0
        for rank, e in enumerate(experts_Tk[t]):
            if kept_Tk[t, rank]:
                y = feedforward(model, *(w[f"moe.experts.{n}"][e] for n in ("gate", "up", "down")), x_TD[t])
                out_TD[t] += c.route_scale * scores_TE[t, e] / total * y
    if c.shared_experts:
        out_TD += feedforward(model, *(w[f"moe.shared.{n}"] for n in ("gate", "up", "down")), x_TD)
    load_E = np.bincount(np.ravel(experts_Tk), minlength=c.num_experts)
    share_E = np.mean([scores / np.sum(scores) for scores in scores_TE], axis=0)
    return out_TD, {
        "balance_loss": c.num_experts * np.sum(load_E / (T * c.top_k) * share_E),
        "z_loss": np.mean([np.log(np.sum(np.exp(logits))) ** 2 for logits in logits_TE]),
        "load_E": load_E,
        "dropped": np.mean(~kept_Tk),
    }


def highest(logits_T, count):
    """Positions of the `count` highest in temporal order; of equals the earlier."""
    return sorted(sorted(range(len(logits_T)), key=lambda t: (-logits_T[t], t))[:count])


def mod(model, w, z_TD, inner, training):
    """Returns (gate * inner at the selected positions and zero elsewhere [T, D], inner's training metrics, own metrics)."""
    T = len(z_TD)
    logits_T = z_TD @ w["mod.router"] + w["mod.bias"]
    causal_T = sigmoid(logits_T) > 0.5
    chosen = highest(logits_T, math.ceil(T * model.mod.capacity)) if training else list(np.flatnonzero(causal_T))
    inner_out, metrics = inner(z_TD[chosen]) if chosen else ([], {})
    out_TD = np.zeros(z_TD.shape)
    for place, t in enumerate(chosen):
        out_TD[t] = sigmoid(logits_T[t]) * inner_out[place]
    selected_T = np.isin(range(T), chosen)
    return (
        out_TD,
        metrics if training else {},  # evaluation may choose none
        {
            "predictor_loss": -np.mean(np.log(sigmoid(np.where(selected_T, logits_T, -logits_T)))),
            "causal_capacity": np.mean(causal_T),
            "agreement": np.mean(causal_T == selected_T),
        },
    )


# ------------------------------------------------------------------------------------------------------ whole model


def block(model, kind, w, x_TD, segments_T, positions_T, training):
    """Returns ([T, D], {"moe" and "mod", where the layer has them: metrics})."""
    normed_TD = rms_norm(x_TD, w["attention_norm.scale"], model.norm_eps)
    x_TD = x_TD + attention(model, w, normed_TD, segments_T, positions_T)

    def inner(z):
        if kind.startswith("moe"):
            return moe(model, w, z, training)
        return feedforward(model, *(w[f"feedforward.{n}"] for n in ("gate", "up", "down")), z), {}

    z_TD, metrics = rms_norm(x_TD, w["feedforward_norm.scale"], model.norm_eps), {}
    if kind.endswith("+mod"):
        out_TD, metrics["moe"], metrics["mod"] = mod(model, w, z_TD, inner, training)
    else:
        out_TD, metrics["moe"] = inner(z_TD)
    return x_TD + out_TD, {group: values for group, values in metrics.items() if values}


def transformer(model, w, inputs_BT, segments_BT, positions_BT, training):
    """Logits [B, T, V], and metrics "moe" and "mod": name -> the layers that have it, in order, joined over rows."""
    w = {name: np.asarray(array, np.float64) for name, array in w.items()}
    head_DV = w["embedding.weight"].T if model.tie_embeddings else w["head.weight"]
    logits, per_row = [], []
    for inputs_T, segments_T, positions_T in zip(inputs_BT, segments_BT, positions_BT, strict=True):
        x_TD = w["embedding.weight"][inputs_T]
        if model.scale_embeddings:
            x_TD = x_TD * math.sqrt(model.d_model)
        layers = []
        for i, kind in enumerate(layer_kinds(model)):
            prefix = f"blocks.{i}."
            own = {name.removeprefix(prefix): array for name, array in w.items() if name.startswith(prefix)}
            x_TD, metrics = block(model, kind, own, x_TD, segments_T, positions_T, training)
            layers.append(metrics)
        logits.append(rms_norm(x_TD, w["final_norm.scale"], model.norm_eps) @ head_DV)
        per_row.append(layers)
    joined = {}
    for group in ("moe", "mod"):
        # rows -> layers -> name, to name -> [layers]; counts add up over rows, all else is a mean over them
        rows = [[metrics[group] for metrics in layers if group in metrics] for layers in per_row]
        for name in rows[0][0] if rows[0] else ():
            over_rows = [np.stack([metrics[name] for metrics in row]) for row in rows]
            joined.setdefault(group, {})[name] = np.sum(over_rows, 0) if name == "load_E" else np.mean(over_rows, 0)
    return np.stack(logits), joined
