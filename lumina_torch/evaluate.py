"""Held-out loss, weighted by tokens, under the routing that generation uses."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from lumina.runs.evaluation import held_out_figures
from lumina_torch.device import fetch


def evaluate(
    eval_step: Callable, transformer: nn.Module, batches: Iterable[dict[str, Any]], alive: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """`held_out_figures` of all of `batches`, numpy arrays or tensors; `alive` is called after each."""
    return held_out_figures(sums(eval_step, transformer, batches, alive))


def sums(
    eval_step: Callable, transformer: nn.Module, batches: Iterable[dict[str, Any]], alive: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """What `eval_step` finds of each batch, at hand."""
    totals: list[Any] = []
    for batch in batches:
        totals.append(eval_step(transformer, batch))
        if len(totals) > 1:
            totals[-2] = fetch(totals[-2])  # one step behind, so that the device never waits
        alive()
    return [fetch(total) for total in totals]
