"""Held-out loss, weighted by tokens, under the routing that generation uses."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lumina.data.rows import Batches
from lumina_jax.model import Variables


def evaluate(
    eval_step: Callable, variables: Variables, batches: Batches, token_bytes: np.ndarray, max_rows: int
) -> dict[str, Any]:
    """Evaluate on every held-out row (or the first `max_rows`).

    Returns loss (nats a token), perplexity, bits_per_byte (of the text, so that tokenizers compare), accuracy (share of
    tokens predicted), tokens and bytes counted, and for MoD the realised causal capacity by layer. Sums are over all
    tokens: no mean of batch means.
    """
    totals: list[Any] = []
    count = 0
    for batch in batches.evaluation(max_rows):
        totals.append(eval_step(variables, batch))
        count += int(token_bytes[batch["targets"][batch["weights"] > 0]].sum())
    totals = jax.device_get(totals)
    loss, correct, weight = (sum(float(t[name]) for t in totals) for name in ("loss", "correct", "weight"))
    capacity = sum(t["taken_L"] for t in totals) / weight
    return {
        "loss": loss / weight,
        "perplexity": math.exp(min(loss / weight, 700)),
        "bits_per_byte": loss / math.log(2) / max(count, 1),
        "accuracy": correct / weight,
        "tokens": int(weight),
        "bytes": count,
        **({"mod_capacity": capacity.tolist()} if capacity.size else {}),
    }
