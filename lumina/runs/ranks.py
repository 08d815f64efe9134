"""How well a score foretells membership, and how sure a mean is, of plain arrays.

N rows, or values, T positions.
"""

import math

import numpy as np


def standard_error(sums_N: np.ndarray, counts_N: np.ndarray) -> float:
    """Of the sum of `sums` over that of `counts`, of independent rows (a ratio estimator: Cochran, Sampling Techniques, 1977,
    chapter 6). Where all counts are alike it is that of a mean."""
    N, left_N = len(sums_N), sums_N - counts_N * (np.sum(sums_N) / np.sum(counts_N))
    return float(math.sqrt(N / (N - 1) * np.sum(left_N**2)) / np.sum(counts_N))


def in_top(logit_NT: np.ndarray, count: int) -> np.ndarray:
    """Which tokens are among the `count` highest of their row, ties to the earlier, bool [N, T]."""
    order_NT = np.argsort(-logit_NT, axis=1, kind="stable")
    member_NT = np.zeros(logit_NT.shape, bool)
    np.put_along_axis(member_NT, order_NT[:, :count], True, axis=1)
    return member_NT


def foretold(logit_NT: np.ndarray, member_NT: np.ndarray) -> dict[str, float | None]:
    """AUROC of a logit against membership; precision, recall, F1 and agreement of `logit > 0`. None where undefined."""
    decided_NT = logit_NT > 0
    both, decided, members = (int(np.sum(each)) for each in (decided_NT & member_NT, decided_NT, member_NT))
    return {
        "auroc": auroc(logit_NT.ravel(), member_NT.ravel()),
        "f1": 2 * both / (decided + members) if decided + members else None,
        "precision": both / decided if decided else None,
        "recall": both / members if members else None,
        "agreement": float(np.mean(decided_NT == member_NT)),
    }


def auroc(score_N: np.ndarray, member_N: np.ndarray) -> float | None:
    """How often a member scores above one that is none, ties counted half: exact, by ranks (Mann and Whitney, 1947)."""
    members, rest = int(np.sum(member_N)), int(np.sum(~member_N))
    if not members or not rest:
        return None
    _, group_N, size = np.unique(score_N, return_inverse=True, return_counts=True)
    rank = np.cumsum(size) - (size - 1) / 2  # of equals the mean of their ranks, which count from 1
    return float((np.sum(rank[group_N][member_N]) - members * (members + 1) / 2) / (members * rest))
