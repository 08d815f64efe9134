"""Passes of one model in two precisions, what tells them apart, and which precision has the last word.

B rows of a batch, T positions, t of them, D model width, V vocabulary, L layers that tell something, A alternatives of an
expert router, k choices, S stages: the depth decisions of a layer, then its choices of experts, layer by layer.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumina.architecture import LOGIT_CHUNK, layer_kinds
from lumina.runs.certificate import Passes
from lumina_jax.attend import choose_attention
from lumina_jax.generate import bucket
from lumina_jax.loss import cross_entropy
from lumina_jax.model import Mode, Variables, make_caches, merge

# Two programs of one model may add up the same numbers in another order. Measured on CPU, prefixes moved logits in float32 by
# nothing (debug), 3e-7 of the largest (2 layers of width 16) and 1e-6 (6 of width 512), in float64 by 3e-16. A model so deep
# that rounding goes beyond the first tolerance is measured again under the second, which no rounding reaches.
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
NEAR = 1e-4  # what float32 is forgiven at most, in logits before any choice differed and in the margins of the first that did


# ------------------------------------------------------------------------------------------------------------ passes


class Forward:
    """The passes of one model in one precision; each shape is compiled once."""

    def __init__(self, graphdef: nnx.GraphDef, variables: Variables, dtype: Any, passes: Passes):
        self.graphdef, self.variables, self.dtype, self._passes = graphdef, variables, dtype, passes
        self.name, self.model = jnp.dtype(dtype).name, merge(graphdef, variables).model
        self.kinds = layer_kinds(self.model)
        self.lengths: set[int] = set()  # of rows, in the passes so far

        def hidden(variables, inputs_BT, segments_BT, positions_BT, mode):
            model, mode = merge(graphdef, variables), mode._replace(tell=True)
            hidden_BTD, metrics, _ = model(inputs_BT, segments_BT, positions_BT, dtype=dtype, mode=mode)
            return hidden_BTD, self._told(metrics)

        def cached(variables, tokens_1t, caches, start, last):
            """As the generator computes: the tokens up to number `last` of these, the first at position `start`."""
            places_1t = jnp.arange(tokens_1t.shape[1])[None]
            hidden_1tD, metrics, caches = merge(graphdef, variables)(
                tokens_1t,
                jnp.zeros_like(places_1t),
                start + places_1t,
                dtype=dtype,
                mode=Mode(tell=True),
                caches=caches,
                written_BT=places_1t <= last,
            )
            return hidden_1tD, self._told(metrics), caches

        def losses(variables, hidden_BTD, targets_BT, weights_BT):
            head_DV = merge(graphdef, variables).head_DV(dtype)
            return jax.lax.map(lambda row: cross_entropy(row[0], head_DV, *row[1:]).loss, (hidden_BTD, targets_BT, weights_BT))

        def differences(variables, one_BTD, other_BTD):
            head_DV = merge(graphdef, variables).head_DV(dtype)

            def of_token(pair):
                one_V, other_V = pair[0] @ head_DV, pair[1] @ head_DV
                return jnp.max(jnp.abs(one_V - other_V)), jnp.max(jnp.abs(one_V))

            B, T, D = one_BTD.shape
            pairs = (one_BTD.reshape(-1, D), other_BTD.reshape(-1, D))
            found = jax.lax.map(of_token, pairs, batch_size=min(LOGIT_CHUNK, B * T))
            return [each.reshape(B, T) for each in found]

        self._hidden, self._cached = jax.jit(hidden, static_argnames="mode"), jax.jit(cached)
        self._losses, self._differences = jax.jit(losses), jax.jit(differences)

    def _told(self, metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Of the MoD layers logit_BT and taken_BT, of the MoE layers experts_BTk and margin_BT, each with an axis L first."""
        of_depth, of_experts = metrics.get("mod", {}), metrics.get("moe", {})
        told: dict[str, Any] = {name: of_depth[name] for name in ("logit_BT", "taken_BT") if name in of_depth}
        told |= {name: of_experts[name] for name in ("experts_BTk", "margin_BT") if name in of_experts}
        return told

    def hidden(self, batch: dict[str, np.ndarray], mode: Mode) -> tuple[jax.Array, dict[str, np.ndarray]]:
        """Last hidden states [B, T, D], and what was chosen: logit_BT, taken_BT, experts_BTk and margin_BT, where there are
        such layers, each with an axis over these first."""
        self.lengths.add(batch["inputs"].shape[1])
        hidden_BTD, told = self._hidden(self.variables, batch["inputs"], batch["segments"], batch["positions"], mode=mode)
        told = jax.device_get(told)
        self._passes.advance()
        return hidden_BTD, told

    def decoded(self, tokens: list[int], prompt: int) -> tuple[jax.Array, dict[str, np.ndarray]]:
        """As `hidden`, of one document: the first `prompt` tokens at once, the others one by one, with a cache."""
        filled = bucket(prompt)
        caches = make_caches(self.model, 1, max(bucket(len(tokens)), filled), self.dtype)
        tokens_1t = np.zeros((1, filled), np.int32)  # what follows the prompt is overwritten before it can be seen
        tokens_1t[0, :prompt] = tokens[:prompt]
        hidden_1tD, told, caches = self._cached(self.variables, tokens_1t, caches, 0, prompt - 1)
        parts = [(hidden_1tD[:, :prompt], {name: value[:, :, :prompt] for name, value in told.items()})]
        for place in range(prompt, len(tokens)):
            *part, caches = self._cached(self.variables, np.array([tokens[place : place + 1]], np.int32), caches, place, 0)
            parts.append(tuple(part))
        told = {name: np.concatenate([part[1][name] for part in parts], axis=2) for name in parts[0][1]}
        return jnp.concatenate([part[0] for part in parts], axis=1), told

    def losses(self, hidden_BTD: jax.Array, batch: dict[str, np.ndarray]) -> np.ndarray:
        """Summed cross-entropy of each real row [N], as training and evaluation compute it."""
        losses_B = self._losses(self.variables, hidden_BTD, batch["targets"], batch["weights"])
        return np.asarray(losses_B, np.float64)[is_real(batch)]

    def differences(self, one_BTD: jax.Array, other_BTD: jax.Array) -> list[np.ndarray]:
        """The largest difference of a token's logits, and its largest logit in the first pass, each [B, T]."""
        return [np.asarray(each, np.float64) for each in self._differences(self.variables, one_BTD, other_BTD)]

    def logits(self, hidden_ND: jax.Array) -> np.ndarray:
        """Logits of a few tokens [N, V]."""
        return np.asarray(hidden_ND @ merge(self.graphdef, self.variables).head_DV(self.dtype))


def is_real(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Which rows are text [B], and not filling of the last batch."""
    return np.any(batch["weights"] > 0, axis=1)


def padded(found: tuple, T: int) -> tuple:
    """(hidden, told) of a pass, with zeros after it up to T positions."""

    def places(value, axis: int) -> list[tuple[int, int]]:
        return [(0, T - value.shape[axis]) if i == axis else (0, 0) for i in range(value.ndim)]

    told = {name: np.pad(value, places(value, 2)) for name, value in found[1].items()}
    return jnp.pad(found[0], places(found[0], 1)), told


# -------------------------------------------------------------------------------------------------------- comparison


def _numbers(kinds: list[str], of: str) -> list[int]:
    """The layers whose kind has this in it."""
    return [i for i, kind in enumerate(kinds) if of in kind]


@dataclass
class Comparison:
    """Two passes that must agree at some tokens, over many batches."""

    difference: float = 0.0  # the largest of any logit
    untouched: float = 0.0  # the largest at tokens that no choice that differs is at, or before in their row
    logit: float = 0.0  # the largest
    tokens: int = 0
    where: dict[str, int] = field(default_factory=dict)  # of the largest difference
    decisions: int = 0  # of depth
    flips: int = 0  # decisions that differ
    margin: float = 0.0  # the largest |logit| of a flip, of either pass
    depth_logit: float = 0.0  # the largest of depth
    choices: int = 0  # of experts, all of a token's in a layer counted as one
    expert_flips: int = 0  # choices that differ
    first_margin: float = 0.0  # the largest of the flips in the first stage of a row that has any, as a share

    def add(self, forward: Forward, one: tuple, other: tuple, counted_BT: np.ndarray, first_row: int) -> np.ndarray:
        """Compare (hidden, told) of two passes at the tokens that count; returns those that a flip may have reached."""
        difference_BT, logit_BT = forward.differences(one[0], other[0])
        row, position = np.unravel_index(np.argmax(np.where(counted_BT, difference_BT, -1.0)), counted_BT.shape)
        largest = difference_BT[row, position]
        if not largest <= self.difference:
            self.where = {"row": first_row + int(row), "position": int(position)}
        self.difference = float(np.maximum(self.difference, largest))  # unlike max(), passes NaN on
        self.logit = float(np.maximum(self.logit, np.max(logit_BT[counted_BT])))
        self.tokens += int(np.sum(counted_BT))
        reached_BT = self._add_choices(forward.kinds, one[1], other[1], counted_BT)
        self.untouched = float(np.maximum(self.untouched, np.max(difference_BT[counted_BT & ~reached_BT], initial=0)))
        return reached_BT

    def _add_choices(self, kinds: list[str], one: dict, other: dict, counted_BT: np.ndarray) -> np.ndarray:
        if "taken_BT" in one:
            self._add_depth(one, other, counted_BT)
        stages = sorted(_stages(kinds, one, other, counted_BT), key=lambda stage: stage[0])
        if not stages:
            return np.zeros_like(counted_BT)
        flips_SBT, margin_SBT = (np.stack([stage[i] for stage in stages]) for i in (1, 2))
        of_experts = [bool(stage[0] % 2) for stage in stages]
        self.choices += sum(of_experts) * int(np.sum(counted_BT))
        self.expert_flips += int(np.sum(flips_SBT[of_experts]))
        # Up to the first stage that has a flip the two passes of a row were one but for rounding.
        before_SB = np.cumsum(np.any(flips_SBT, axis=2), axis=0) - np.any(flips_SBT, axis=2)
        first_SBT = flips_SBT & (before_SB == 0)[:, :, None]
        self.first_margin = float(np.maximum(self.first_margin, np.max(margin_SBT[first_SBT], initial=0)))
        return np.logical_or.accumulate(np.any(flips_SBT, axis=0), axis=1)

    def _add_depth(self, one: dict[str, np.ndarray], other: dict[str, np.ndarray], counted_BT: np.ndarray) -> None:
        flips_LBT = (one["taken_BT"] != other["taken_BT"]) & counted_BT
        logit_LBT = np.maximum(np.abs(one["logit_BT"]), np.abs(other["logit_BT"]))
        self.decisions += flips_LBT.shape[0] * int(np.sum(counted_BT))
        self.flips += int(np.sum(flips_LBT))
        self.margin = max(self.margin, float(np.max(logit_LBT[flips_LBT], initial=0)))
        self.depth_logit = max(self.depth_logit, float(np.max(logit_LBT[:, counted_BT], initial=0)))

    def found(self, dtype: str) -> dict[str, Any]:
        relative = self.difference / self.logit if self.logit else math.nan
        depth = {
            "decisions": self.decisions,
            "flips": self.flips,
            "largest_margin_of_a_flip": self.margin,
            "largest_depth_logit": self.depth_logit,
        }
        return {
            "tokens": self.tokens,
            "precision": dtype,
            "largest_difference": self.difference,
            "largest_logit": self.logit,
            "relative": relative,
            "where": self.where,
            "tolerance": TOLERANCE[dtype],
            **(depth if self.decisions else {}),
            **({"expert_choices": self.choices, "expert_flips": self.expert_flips} if self.choices else {}),
            **(self.before_flips() if self.decisions or self.choices else {}),
            "holds": bool(relative <= TOLERANCE[dtype]) and not self.flips,
        }

    def before_flips(self) -> dict[str, float]:
        """What only rounding explains, if anything but a leak does."""
        untouched = self.untouched / self.logit if self.logit else math.nan
        return {"relative_before_flips": untouched, "largest_margin_of_a_first_flip": self.first_margin}


def _stages(kinds: list[str], one: dict, other: dict, counted_BT: np.ndarray) -> Iterator[tuple]:
    """(Number in the order of computation, which tokens' choices differ [B, T], their margins as shares [B, T])."""
    for index, layer in enumerate(_numbers(kinds, "+mod") if "taken_BT" in one else []):
        logit_BT = np.maximum(np.abs(one["logit_BT"][index]), np.abs(other["logit_BT"][index]))
        largest = max(float(np.max(logit_BT[counted_BT], initial=0)), np.finfo(np.float32).tiny)
        yield 2 * layer, (one["taken_BT"][index] != other["taken_BT"][index]) & counted_BT, logit_BT / largest
    for index, layer in enumerate(_numbers(kinds, "moe") if "experts_BTk" in one and "experts_BTk" in other else []):
        experts = [np.sort(each["experts_BTk"][index], axis=-1) for each in (one, other)]  # in which order is no matter
        margin_BT = np.maximum(one["margin_BT"][index], other["margin_BT"][index])
        yield 2 * layer + 1, np.any(experts[0] != experts[1], axis=-1) & counted_BT, margin_BT


# ------------------------------------------------------------------------------------------------------- precisions


def settled(measure: Callable[[Forward], dict[str, Any]], forward: Forward) -> dict[str, Any]:
    """What `measure` finds in float32; when rounding alone may have made it fail, in float64, with the first finding beside it.

    A choice of experts or of depth whose margin is within rounding may fall either way in float32, and then moves everything
    after it. In float64 it does not. But what leaks in float32 alone is quoted in float32: `settled` says why which counts.
    """
    found = measure(forward)
    if found["holds"]:
        return found
    if why := why_final(found, forward):
        return {**found, "settled": f"float32 counts: {why}"}
    with jax.enable_x64(True):
        again = measure(Forward(forward.graphdef, forward.variables, jnp.float64, forward._passes))
    return {**again, "in_float32": found, "settled": "float64 counts: what differed in float32 was within rounding at first"}


def why_final(found: dict[str, Any], forward: Forward) -> str:
    """Why a finding in float32 is not rounding, and float64 has no say; empty if it may be."""
    model, platform = forward.model, jax.default_backend()
    for length in sorted(forward.lengths):
        one, other = (choose_attention(model.attention_form, platform, dtype, length)[0] for dtype in ("float32", "float64"))
        if one != other:
            return f"attention over {length} tokens would be {other} in float64, and not {one}, which is what was examined"
    if all(kind == "dense" for kind in forward.kinds):
        if found["relative"] < NEAR:
            return ""
        return f"nothing is routed, and rounding moves no logit by {found['relative']:.1e} of the largest"
    if not found.get("flips", 0) + found.get("expert_flips", 0):
        return "no choice of depth or of experts differed"
    if not found["relative_before_flips"] < NEAR:
        return f"before any choice differed, logits did by {found['relative_before_flips']:.1e} of the largest"
    if not found["largest_margin_of_a_first_flip"] < NEAR:
        return f"a first choice that differed was no near-tie: {found['largest_margin_of_a_first_flip']:.1e} from one"
    return ""
