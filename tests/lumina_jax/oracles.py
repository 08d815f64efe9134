"""The transformer once more, slowly: loops in numpy and float64, one row at a time, sharing no code with what it checks.

T positions, D model width, H query heads, K key/value heads, h head width, E experts, A alternatives (the experts, then those
that do nothing), k choices a token, C selected tokens, V vocabulary.
Weights are dictionaries from a tensor's name within its layer, such as `attention.query`, to its array.
"""

import functools
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


def assert_gradients(loss, arrays, gradients, tolerance=5e-6):
    """Each of `gradients` agrees with the slope of `loss(arrays)` along a random direction, one for each array.

    The slope is exact, by a complex step (Squire and Trapp, 1998): Im loss(x + i h v) / h has no difference to lose digits
    in. So `loss` is made of analytic functions, and compares by real parts.
    """
    rng = np.random.default_rng(0)
    arrays = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    assert set(arrays) == set(gradients)
    for name, array in arrays.items():
        direction = rng.standard_normal(array.shape)
        slope = np.imag(loss({**arrays, name: array + 1e-30j * direction})) / 1e-30
        gradient = np.asarray(gradients[name], np.float64)
        assert gradient.shape == array.shape, name
        difference = abs(np.sum(gradient * direction) - slope)
        assert difference <= tolerance * np.linalg.norm(gradient), f"{name}: slope off by {difference:.3g} of {slope:.3g}"


def wide(array):
    """In float64, or complex where a step is taken."""
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


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
    e = np.exp(x - np.max(np.real(x)))
    return e / np.sum(e)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def rotate(x_Th, positions_T, theta):
    """Each pair (x[i], x[i + h/2]) is a point of the plane, turned by the angle position * theta^(-2i/h)."""
    half = x_Th.shape[-1] // 2
    out_Th = np.zeros_like(x_Th)
    for t, position in enumerate(positions_T):
        for i in range(half):
            angle = position * theta ** (-2 * i / (2 * half))
            turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            out_Th[t, [i, i + half]] = turn @ x_Th[t, [i, i + half]]
    return out_Th


def attend(q_THh, k_TKh, v_TKh, segments_T):
    T, H, h = q_THh.shape
    group = H // k_TKh.shape[1]
    out_THh = np.zeros((T, H, h), np.result_type(q_THh, k_TKh, v_TKh))
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


def choices(moe, preference_A):
    """The alternatives that a token chooses, best first; of equals the lower one, and the lower group."""
    alternatives = range(len(preference_A))
    if moe.num_groups > 1:
        size = moe.num_experts // moe.num_groups
        groups = [alternatives[g * size : (g + 1) * size] for g in range(moe.num_groups)]
        worth = [sum(sorted((preference_A[e] for e in group), reverse=True)[:2]) for group in groups]
        best = sorted(range(moe.num_groups), key=lambda g: (-worth[g], g))[: moe.top_groups]
        alternatives = [e for g in best for e in groups[g]]
    return sorted(alternatives, key=lambda e: (-preference_A[e], e))[: moe.top_k]


def queue(experts_Tk, num_experts, capacity):
    """(slot within its expert, or -1 where there is none) of each choice: by position, then by rank."""
    taken = [0] * num_experts
    places_Tk = np.full(np.shape(experts_Tk), -1)
    for t, chosen in enumerate(experts_Tk):
        for rank, e in enumerate(chosen):
            if e < num_experts and taken[e] < capacity:
                places_Tk[t, rank] = taken[e]
                taken[e] += 1
    return places_Tk


def moe(model, w, x_TD, training, taken_T=None, room=None):
    """Returns ([T, D], metrics of this row, sums over those taken). Tokens that are not taken choose nothing.

    `room` is of how many tokens experts have their share, T if not said.
    """
    T, c = len(x_TD), model.moe
    room = room or T
    E, A = c.num_experts, c.num_experts + c.noop_experts
    taken_T = np.ones(T, bool) if taken_T is None else taken_T
    logits_TA = x_TD @ w["moe.router"]
    score = softmax if c.score == "softmax" else sigmoid
    scores_TA = np.array([score(logits / c.temperature) for logits in logits_TA])
    experts_Tk = [choices(c, np.real(scores + w["moe.bias"])) for scores in scores_TA]
    drops = training and c.dispatch == "capacity"
    slots = max(1, min(room, math.ceil(room * c.top_k * c.capacity_factor / A))) if drops else T
    places_Tk = queue(
        [[e if taken else A for e in chosen] for chosen, taken in zip(experts_Tk, taken_T, strict=True)], E, slots
    )
    out_TD = np.zeros(x_TD.shape, np.result_type(x_TD, *w.values()))
    dropped = 0
    for t in range(T):
        total = sum(scores_TA[t, e] for e in experts_Tk[t]) if c.top_k > 1 and c.renormalise else 1.0
        for rank, e in enumerate(experts_Tk[t]):
            if places_Tk[t, rank] >= 0:
                y = feedforward(model, *(w[f"moe.experts.{n}"][e] for n in ("gate", "up", "down")), x_TD[t])
                out_TD[t] += c.route_scale * scores_TA[t, e] / total * y
            elif e < E and taken_T[t]:
                dropped += 1
    if c.shared_experts:
        out_TD += feedforward(model, *(w[f"moe.shared.{n}"] for n in ("gate", "up", "down")), x_TD)
    taken = [t for t in range(T) if taken_T[t]]
    shares = [scores_TA[t] / np.sum(scores_TA[t]) for t in taken]
    return out_TD, {
        "load_BA": np.array([sum(e in experts_Tk[t] for t in taken) for e in range(A)]),
        "share_BA": sum(shares, np.zeros(A)),
        "z_loss": sum(np.log(np.sum(np.exp(logits_TA[t]))) ** 2 for t in taken),
        "entropy": sum(-sum(p * np.log(p) for p in np.real(share)) for share in shares) / math.log(max(A, 2)),
        "dropped": dropped / c.top_k,
    }


def balance_loss(load_BA, share_BA, parts):
    """`parts` are lists of rows; the rows of one are counted together. The sum over tokens."""
    A = np.shape(load_BA)[1]
    total = 0.0
    for rows in parts:
        load_A = sum(np.asarray(load_BA[b], np.float64) for b in rows)
        for b in rows:
            total += sum(load_A[a] / sum(load_A) * share_BA[b][a] for a in range(A) if load_A[a]) * A
    return total


def highest(logits_T, count):
    """Positions of the `count` highest in temporal order; of equals the earlier."""
    return sorted(sorted(range(len(logits_T)), key=lambda t: (-logits_T[t], t))[:count])


@functools.cache
def draw(layer, position):
    """The number of random routing: the one thing here that cannot be told without its definition."""

    x = (position * 0x9E3779B9 + (layer + 1) * 0x85EBCA6B) % 2**32
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return ((x ^ x >> 16) >> 8) / 2**24


def depth(model, w, z_TD, positions_T, layer, top, real=None):
    """Who takes a Mixture-of-Depths layer: (positions in temporal order, gates [T], metrics of this row, the loss a sum).

    `real` are the positions that are asked at all, every one if not said.
    """
    c, T = model.mod, len(z_TD)
    logits_T = z_TD @ w["mod.router"] + w["mod.bias"]
    still_TD = np.real(z_TD)  # what teaches the causal decision teaches nothing below it
    if c.router == "random":
        causal_T = wish_T = np.array([c.capacity - draw(layer, int(position)) for position in positions_T])
    else:
        causal_T, wish_T = still_TD @ w["mod.router"] + w["mod.bias"], np.real(logits_T)
    if c.predictor_width:
        hidden = still_TD @ w["mod.predictor.hidden"]
        causal_T = (hidden * sigmoid(hidden)) @ w["mod.predictor.output"] + w["mod.predictor.bias"]
    real = list(range(T)) if real is None else real
    best = [real[i] for i in highest([wish_T[t] for t in real], math.ceil(T * c.capacity))]
    chosen = best if top else [t for t in real if np.real(causal_T[t]) > 0]
    taken_T = np.isin(range(T), chosen)
    nats = [-np.log(sigmoid(causal_T[t] if taken_T[t] else -causal_T[t])) for t in real]
    metrics = {
        "predictor_loss": 0.0 if c.router == "random" else sum(nats),
        "logit_BT": np.real(causal_T),
        "taken_BT": taken_T,
    }
    return chosen, sigmoid(logits_T), metrics


# ------------------------------------------------------------------------------------------------------ whole model


def block(model, kind, w, x_TD, segments_T, positions_T, layer, training, top):
    """Returns ([T, D], {"moe" and "mod", where the layer has them: metrics}). Positions of segment -1 are empty: no router
    asks them."""
    metrics, everyone, real_T = {}, list(range(len(x_TD))), np.asarray(segments_T) >= 0
    room = math.ceil(len(x_TD) * model.mod.capacity) if kind.endswith("+mod") and top else None

    def attend_among(x, chosen):
        """Among these tokens alone, at the positions and in the documents that they have in the row."""
        normed = rms_norm(x, w["attention_norm.scale"], model.norm_eps)
        return attention(model, w, normed, np.asarray(segments_T)[chosen], np.asarray(positions_T)[chosen])

    def inner(x):
        z = rms_norm(x, w["feedforward_norm.scale"], model.norm_eps)
        if kind.startswith("moe"):
            out, metrics["moe"] = moe(model, w, z, training, real_T[chosen], room)
            return out
        return feedforward(model, *(w[f"feedforward.{n}"] for n in ("gate", "up", "down")), z)

    whole = kind.endswith("+mod") and model.mod.scope == "block"
    if not whole:
        x_TD = x_TD + attend_among(x_TD, everyone)
    chosen, gate_T = everyone, np.ones(len(x_TD))
    if kind.endswith("+mod"):
        norm = "attention_norm.scale" if whole else "feedforward_norm.scale"
        z_TD, real = rms_norm(x_TD, w[norm], model.norm_eps), list(np.flatnonzero(real_T))
        chosen, gate_T, metrics["mod"] = depth(model, w, z_TD, positions_T, layer, top, real)
    if not chosen:
        if kind.startswith("moe"):
            A = model.moe.num_experts + model.moe.noop_experts
            metrics["moe"] = dict.fromkeys(("z_loss", "entropy", "dropped"), 0.0)
            metrics["moe"] |= {"load_BA": np.zeros(A), "share_BA": np.zeros(A)}
        return x_TD, metrics
    x_CD = x_TD[chosen]
    mixed_CD = attend_among(x_CD, chosen) if whole else 0.0
    out_TD = x_TD.astype(np.result_type(x_TD, *w.values()))
    out_TD[chosen] = x_CD + gate_T[chosen, None] * (mixed_CD + inner(x_CD + mixed_CD))
    return out_TD, metrics


def transformer(model, w, inputs_BT, segments_BT, positions_BT, training, top=None):
    """Logits [B, T, V], and metrics "moe" and "mod": name -> the layers that have it, in order, [L, B, ...] where a row has
    its own, else the sum over rows. `top` without `training` is the control that selects by the future and drops nothing."""
    top = training if top is None else top
    w = {name: wide(array) for name, array in w.items()}
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
            x_TD, metrics = block(model, kind, own, x_TD, segments_T, positions_T, i, training, top)
            layers.append(metrics)
        logits.append(rms_norm(x_TD, w["final_norm.scale"], model.norm_eps) @ head_DV)
        per_row.append(layers)
    joined = {}
    for group in ("moe", "mod"):
        # rows -> layers -> name, to name -> [layers, rows, ...]
        numbers = [i for i, kind in enumerate(layer_kinds(model)) if group in kind]
        for name in per_row[0][numbers[0]].get(group, ()) if numbers else ():
            of_rows = [[row[i][group][name] for row in per_row] for i in numbers]
            joined.setdefault(group, {})[name] = np.array(of_rows) if "_B" in name else np.sum(of_rows, axis=1)
    return np.stack(logits), joined
