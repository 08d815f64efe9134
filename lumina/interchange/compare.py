"""How far two models are apart on the same tokens: sums over rows as they come, and what they amount to.

T positions, n of them, V vocabulary, L layers that tell something, k choices of experts. A stage is one kind of decision in one
layer: where tokens take the layer (depth), then which experts they take, layer by layer.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lumina.interchange.side import Row
from lumina.interchange.verify import NEAR_TIE, TOLERANCE

IN_CACHE = 1 << 16  # logits of a side in float64 at once: 64 times as many take three times as long (measured)
SEEN = 1e-4  # what a router sees has changed when it moves this far, as a share: beyond what rounding does
SHOWN = 3  # first flips that are told of one by one


def logarithms(logits_nV: np.ndarray) -> np.ndarray:
    """Log of the probabilities [n, V]."""
    shifted_nV = logits_nV - logits_nV.max(axis=1, keepdims=True)
    return shifted_nV - np.log(np.exp(shifted_nV).sum(axis=1, keepdims=True))


@dataclass
class Distance:
    """Logits of A and B over the tokens so far."""

    top: int  # k of the overlap
    rows: int = 0
    tokens: int = 0
    largest: float = 0.0  # absolute logit, of either
    difference: float = 0.0  # largest, absolute
    untouched: float = 0.0  # the same at tokens that no routing decision that differs is at, or before in their row
    where: tuple[int, int] = (0, 0)  # row and position of the largest
    kl: float = 0.0  # sum of KL(A || B), nats
    kl_most: float = 0.0
    kl_where: tuple[int, int] = (0, 0)
    overlap: int = 0  # of the k likeliest tokens of each
    same: int = 0  # likeliest tokens
    losses: np.ndarray = field(default_factory=lambda: np.zeros(2))  # sums of A's and of B's, nats
    finite: bool = True

    def add(
        self, place: tuple[int, int], a_nV: np.ndarray, b_nV: np.ndarray, targets_n: np.ndarray, reached_n: np.ndarray
    ) -> None:
        """Logits after the tokens of a row from `place`, its number and the first position, on.

        `reached`: which of them a routing decision that differs may have reached.
        """
        row, start = place
        for first in range(0, len(targets_n), step := max(1, IN_CACHE // a_nV.shape[1])):
            part = slice(first, first + step)
            a_mV, b_mV = (logits_nV[part].astype(np.float64) for logits_nV in (a_nV, b_nV))
            self._add(row, start + first, a_mV, b_mV, targets_n[part], reached_n[part])

    def _add(
        self, row: int, start: int, a_nV: np.ndarray, b_nV: np.ndarray, targets_n: np.ndarray, reached_n: np.ndarray
    ) -> None:
        self.tokens += len(targets_n)
        if not (np.isfinite(a_nV).all() and np.isfinite(b_nV).all()):
            self.finite = False
            return
        difference_n = np.max(np.abs(a_nV - b_nV), axis=1)
        self.largest = max(self.largest, *(float(np.max(np.abs(x))) for x in (a_nV, b_nV)))
        most = int(np.argmax(difference_n))
        if difference_n[most] > self.difference:
            self.difference, self.where = float(difference_n[most]), (row, start + most)
        self.untouched = max(self.untouched, float(np.max(difference_n[~reached_n], initial=0)))
        count, each_n = min(self.top, a_nV.shape[1]), np.arange(len(targets_n))
        best_a_nk, best_b_nk = (np.argpartition(x, -count, axis=1)[:, -count:] for x in (a_nV, b_nV))
        self.overlap += int((best_a_nk[:, :, None] == best_b_nk[:, None, :]).sum())
        self.same += int((a_nV.argmax(axis=1) == b_nV.argmax(axis=1)).sum())
        a_log_nV, b_log_nV = logarithms(a_nV), logarithms(b_nV)
        kl_n = np.einsum("nv,nv->n", np.exp(a_log_nV), a_log_nV - b_log_nV)
        self.kl += float(kl_n.sum())
        most = int(np.argmax(kl_n))
        if kl_n[most] > self.kl_most:
            self.kl_most, self.kl_where = float(kl_n[most]), (row, start + most)
        self.losses -= [a_log_nV[each_n, targets_n].sum(), b_log_nV[each_n, targets_n].sum()]

    def figures(self, columns: int, text_bytes: int) -> dict[str, Any]:
        """What is told of it; `text_bytes` are those of the targets."""
        tokens, share = self.tokens, self.largest or 1.0

        def at(where: tuple[int, int]) -> dict[str, int]:
            return {"row": where[0], "position": where[1]}

        def loss(of: float) -> dict[str, float]:
            return {"nats_per_token": of / tokens, "bits_per_byte": of / math.log(2) / max(text_bytes, 1)}

        return {
            "tokens": tokens,
            "finite": self.finite,
            "logits": {
                "largest_difference": self.difference / share,  # relative to the largest logit
                "largest_difference_before_flips": self.untouched / share,
                "tolerance": TOLERANCE,
                "largest_logit": self.largest,
                "where": at(self.where),
            },
            "kl": {"mean": self.kl / tokens, "max": self.kl_most, "where": at(self.kl_where)},
            "top": {"k": min(self.top, columns), "overlap": self.overlap / (tokens * min(self.top, columns))},
            "same_likeliest": self.same / tokens,
            "loss": {"a": loss(float(self.losses[0])), "b": loss(float(self.losses[1]))},
        }


# ------------------------------------------------------------------------------------------------------------ routing


@dataclass
class Stage:
    """One kind of decision in one layer, over the tokens so far."""

    layer: int
    of: str  # depth or experts
    decisions: int = 0
    flips: int = 0  # decisions that differ
    first: int = 0  # of those, the ones that no flip of a stage before can have caused
    margin: float = 0.0  # the largest of these
    shown: list[dict[str, Any]] = field(default_factory=list)  # the first of these, with row, position and margin
    seen: float = 0.0  # how far what the router sees moved, before any flip, as a share


class Routing:
    """Decisions of A and B; all that a token chooses in a stage is one decision."""

    def __init__(self, kinds: list[str]):
        self.stages = []
        for layer, kind in enumerate(kinds):
            self.stages += [Stage(layer, "depth")] if kind.endswith("+mod") else []
            self.stages += [Stage(layer, "experts")] if kind.startswith("moe") else []

    def add(self, number: int, row: Row, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> np.ndarray:
        """Compare what A and B told of a row; returns the tokens [T] that a flip is at or before."""
        reached_T = np.zeros(len(row.inputs_T), bool)
        index = {"depth": 0, "experts": 0}
        for stage in self.stages:
            i, index[stage.of] = index[stage.of], index[stage.of] + 1
            flips_T, margin_T, moved_T = (_depth if stage.of == "depth" else _experts)(i, a, b)
            stage.decisions += len(flips_T)
            stage.flips += int(flips_T.sum())
            first = np.flatnonzero(flips_T & ~reached_T)  # so far both were one model but for rounding
            stage.first += len(first)
            stage.margin = max(stage.margin, float(np.max(margin_T[first], initial=0)))
            shown = [{"row": number, "position": int(t), "margin": float(margin_T[t])} for t in first[:SHOWN]]
            stage.shown = (stage.shown + shown)[:SHOWN]
            stage.seen = max(stage.seen, float(np.max(moved_T[~(reached_T | flips_T)], initial=0)))
            reached_T = reached_T | _from_first(flips_T, row.segments_T)
        return reached_T

    def found(self) -> dict[str, Any]:
        """What is told of it."""
        flipped = [stage for stage in self.stages if stage.flips]
        return {
            "decisions": sum(stage.decisions for stage in self.stages),
            "flips": sum(stage.flips for stage in self.stages),
            "largest_margin_of_a_first_flip": max((stage.margin for stage in self.stages), default=0.0),
            "near_tie": NEAR_TIE,
            "first_layer_with_a_flip": flipped[0].layer if flipped else None,
            "stages": [
                {
                    "layer": stage.layer,
                    "of": stage.of,
                    "decisions": stage.decisions,
                    "flips": stage.flips,
                    "first_flips": stage.first,
                    "largest_margin": stage.margin,
                    "shown": stage.shown,
                    "largest_change": stage.seen,
                }
                for stage in self.stages
            ],
        }


def _from_first(flips_T: np.ndarray, segments_T: np.ndarray) -> np.ndarray:
    """The tokens that follow a flip in their document, or have one themselves."""
    reached_T = np.zeros_like(flips_T)
    for segment in np.unique(segments_T[flips_T]):
        within_T = segments_T == segment
        reached_T |= within_T & (np.cumsum(flips_T & within_T) > 0)
    return reached_T


def _depth(i: int, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(flips, margins, how far the logit moved) [T] of the i-th layer with depth routing, shares of its largest logit."""
    a_T, b_T = (side["logit_LT"][i].astype(np.float64) for side in (a, b))
    size_T = np.maximum(np.abs(a_T), np.abs(b_T))
    largest = float(np.max(size_T)) or 1.0
    return a["taken_LT"][i] != b["taken_LT"][i], size_T / largest, np.abs(a_T - b_T) / largest


def _experts(i: int, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of the i-th layer with experts, by their margins. In which order a token took its experts is no matter."""
    chosen_a_Tk, chosen_b_Tk = (np.sort(side["experts_LTk"][i], axis=1) for side in (a, b))
    a_T, b_T = (side["margin_LT"][i].astype(np.float64) for side in (a, b))
    both_T = np.isfinite(a_T) & np.isfinite(b_T)  # a token that takes every expert is no nearer to one than to another
    moved_T = np.zeros(len(a_T))
    np.subtract(a_T, b_T, out=moved_T, where=both_T)
    return np.any(chosen_a_Tk != chosen_b_Tk, axis=1), np.maximum(a_T, b_T), np.abs(moved_T)


# ------------------------------------------------------------------------------------------------------------ verdict


def weights_that_differ(a: dict[str, str], b: dict[str, str]) -> list[str]:
    """Names of the tensors that only one has, or that are not the same bits, in A's order and then B's."""
    return [name for name in {**a, **b} if a.get(name) != b.get(name)]


def verdict(figures: dict[str, Any]) -> tuple[bool, str]:
    """Whether the two are one model but for rounding, and the line that says so."""
    logits, routing = figures["logits"], figures["routing"]
    flips = routing.get("flips", 0)
    if not figures["finite"]:
        return False, "differ: there are logits that are not finite"
    if logits["largest_difference"] == 0 and not flips:
        return True, "equal, bit for bit"
    if logits["largest_difference"] <= TOLERANCE and not flips:
        return True, "equal within float32 rounding"
    near = flips and routing["largest_margin_of_a_first_flip"] <= NEAR_TIE
    if near and logits["largest_difference_before_flips"] <= TOLERANCE:
        first = routing["first_layer_with_a_flip"]
        return True, f"equal within float32 rounding, up to near-ties that fall either way, the first in layer {first}"
    return False, f"differ{_from(figures)}"


def _from(figures: dict[str, Any]) -> str:
    """Where that begins: by the weights where these differ, else by what the routers see and decide."""
    weights, routing = figures["weights"], figures["routing"]
    if weights and weights["differ"]:
        first = weights["first"]
        return (
            f" from layer {first.split('.')[1]} on: {first} is another" if first.startswith("blocks.") else f" from {first} on"
        )
    same = "; the weights are the same" if weights else ""
    for stage in routing.get("stages", ()):
        if stage["largest_margin"] > NEAR_TIE:
            return f" from layer {stage['layer']} on: its {stage['of']} routing decides otherwise, at no near-tie{same}"
        if stage["largest_change"] > SEEN:
            return f" from layer {stage['layer']} on, or before: its {stage['of']} router sees something else{same}"
    return f", and nothing tells in which layer{same}"
