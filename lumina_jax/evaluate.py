"""Held-out loss, weighted by tokens, under the routing that generation uses."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from lumina.runs.evaluation import held_out_figures
from lumina_jax.model import Variables


def evaluate(
    eval_step: Callable, variables: Variables, batches: Iterable[dict[str, Any]], alive: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """`held_out_figures` of all of `batches`, placed on the devices; `alive` is called after each."""
    return held_out_figures(sums(eval_step, variables, batches, alive))


def sums(
    eval_step: Callable, variables: Variables, batches: Iterable[dict[str, Any]], alive: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """What `eval_step` finds of each batch, at hand."""
    totals: list[Any] = []
    for batch in batches:
        totals.append(eval_step(variables, batch))
        if len(totals) > 1:
            totals[-2] = jax.device_get(totals[-2])  # one step behind, so that the devices never wait
        alive()
    return list(jax.device_get(totals))
