"""What routers decided about held-out text: tokens that are typical of an expert, tokens that take or skip a layer, places.

L layers, R rows, T positions, N tokens in all, k choices, n parts of a row.
"""

from typing import NamedTuple

import numpy as np


class HeldOut(NamedTuple):
    """What the routers decided about held-out text, as in generation: nothing is dropped, depth is decided causally.

    R rows, T positions, k choices; -1 is no choice, of a token that skips the layer.
    """

    step: int  # of the checkpoint
    tokens_RT: np.ndarray
    filled_RT: np.ndarray  # bool: what holds text; nothing is told of the rest
    experts_LRTk: np.ndarray  # L layers with experts
    taken_LRT: np.ndarray  # bool; L layers with depth


class Typical(NamedTuple):
    """A token and how much more often than any other place it is found among some."""

    token: int
    times: int  # among them
    share: float  # of its occurrences that are among them
    lift: float  # its share of them over its share of the text


def typical(tokens_N: np.ndarray, among_N: np.ndarray, least: int, most: int) -> list[Typical]:
    """The `most` tokens of highest lift among those that `among` (bool, or how often) picks, at least `least` times there.

    Of equal lift the more frequent comes first, then the lower id. A token of lift 1 or less is typical of nothing.
    """
    ids, inverse_N = np.unique(tokens_N, return_inverse=True)
    in_text = np.bincount(inverse_N, minlength=len(ids))
    among = np.bincount(inverse_N, weights=among_N, minlength=len(ids))
    if not among.sum():
        return []
    lift = (among / among.sum()) / (in_text / in_text.sum())
    order = np.lexsort((ids, -among, -np.round(lift, 9)))
    chosen = [i for i in order if among[i] >= least and lift[i] > 1 + 1e-9][:most]
    return [Typical(int(ids[i]), int(among[i]), float(among[i] / in_text[i]), float(lift[i])) for i in chosen]


def extremes(tokens_N: np.ndarray, taken_N: np.ndarray, least: int, most: int) -> tuple[list[Typical], list[Typical]]:
    """(the tokens that most often take a layer, those that most often skip it), of tokens that occur `least` times.

    Those above the layer's mean share and those below it; of equal shares the more frequent comes first.
    """
    ids, inverse_N = np.unique(tokens_N, return_inverse=True)
    in_text = np.bincount(inverse_N, minlength=len(ids))
    share = np.bincount(inverse_N, weights=taken_N, minlength=len(ids)) / in_text
    mean = float(np.mean(taken_N))
    found = []
    for sign in (-1, 1):
        order = [i for i in np.lexsort((ids, -in_text, sign * share)) if in_text[i] >= least and sign * (share[i] - mean) < 0]
        lifts = [(i, share[i] / mean if mean else 0.0) for i in order[:most]]
        found.append([Typical(int(ids[i]), int(in_text[i]), float(share[i]), float(lift)) for i, lift in lifts])
    return found[0], found[1]


def by_position(taken_LRT: np.ndarray, filled_RT: np.ndarray, bins: int) -> np.ndarray:
    """The share of tokens that take each layer [L, n], by place in the row in n equal parts, at most `bins`; NaN where a part
    holds no text."""
    T = filled_RT.shape[1]
    parts = [filled_RT & np.isin(np.arange(T), part) for part in np.array_split(np.arange(T), min(bins, T))]
    counts_n = np.array([np.sum(part_RT) for part_RT in parts], float)
    taken_Ln = np.array([[np.sum(taken_RT & part_RT) for part_RT in parts] for taken_RT in taken_LRT])
    return taken_Ln.reshape(-1, len(parts)) / np.where(counts_n, counts_n, np.nan)
