"""Held-out figures from sums over tokens: the arithmetic, whatever computed the sums."""

import math
from collections.abc import Iterable
from typing import Any


def figures_by_source(totals: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """`held_out_figures` over all tokens, given each source's sums; of several, also those of each, as `sources`."""
    whole = held_out_figures([each for of_source in totals.values() for each in of_source])
    if len(totals) == 1:
        return whole
    return whole | {"sources": {source: held_out_figures(of_source) for source, of_source in totals.items()}}


def held_out_figures(totals: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Figures of all batches, given each one's sums: loss (nats), correct, weight, text_bytes, and taken_L, an array.

    Returns loss (nats a token), perplexity, bits_per_byte (of the text, so that tokenizers compare), accuracy (share of
    tokens predicted), tokens and bytes counted, and for MoD the realised causal capacity by layer. Sums are over all
    tokens: no mean of batch means.
    """
    totals = list(totals)
    loss, correct, weight = (sum(float(t[name]) for t in totals) for name in ("loss", "correct", "weight"))
    weight = weight or math.nan  # nothing that counts was held out
    count = sum(int(t["text_bytes"]) for t in totals)
    capacity = sum(t["taken_L"] for t in totals) / weight
    return {
        "loss": loss / weight,
        "perplexity": math.exp(min(loss / weight, 700)),
        "bits_per_byte": loss / math.log(2) / max(count, 1),
        "accuracy": correct / weight,
        "tokens": 0 if math.isnan(weight) else int(weight),
        "bytes": count,
        **({"mod_capacity": capacity.tolist()} if capacity.size else {}),
    }
