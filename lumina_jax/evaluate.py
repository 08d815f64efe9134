"""Held-out loss, weighted by tokens, under the routing that generation uses."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

from lumina_jax.model import Variables


def evaluate(
    eval_step: Callable, variables: Variables, batches: Iterable[dict[str, Any]], alive: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Evaluate on all of `batches`, placed on the devices; `alive` is called after each.

    Returns loss (nats a token), perplexity, bits_per_byte (of the text, so that tokenizers compare), accuracy (share of
    tokens predicted), tokens and bytes counted, and for MoD the realised causal capacity by layer. Sums are over all
    tokens: no mean of batch means.
    """
    totals: list[Any] = []
    for batch in batches:
        totals.append(eval_step(variables, batch))
        if len(totals) > 1:
            totals[-2] = jax.device_get(totals[-2])  # one step behind, so that the devices never wait
        alive()
    totals = jax.device_get(totals)
    loss, correct, weight = (sum(float(t[name]) for t in totals) for name in ("loss", "correct", "weight"))
    count = sum(int(t["text_bytes"]) for t in totals)
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
