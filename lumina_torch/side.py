"""A model as `lumina compare` asks it, computed by PyTorch in float32.

T positions, n of them, D model width, V vocabulary.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lumina.interchange.side import Canonical, Pass, Row
from lumina.interchange.state import load_here
from lumina.tokenizer_files import load_tokenizer
from lumina_torch.checkpoint import transformer_of
from lumina_torch.generate import Generator
from lumina_torch.model import Mode


class Side(Canonical):
    """See `lumina.interchange.side.Side`."""

    def __init__(self, name, config, state, tokenizer):
        super().__init__(name, config, state, tokenizer)
        self._generator = Generator(config, transformer_of(config, state), tokenizer)
        self._transformer, self._device = self._generator.transformer, self._generator.device

    @torch.inference_mode()
    def read(self, row: Row) -> Pass:
        arrays = (row.inputs_T, row.segments_T, row.positions_T)
        rows_1T = (torch.tensor(array_T, dtype=torch.long, device=self._device)[None] for array_T in arrays)
        hidden_1TD, metrics, _ = self._transformer(*rows_1T, dtype=torch.float32, mode=Mode(tell=True))
        names = ("logit_BT", "taken_BT", "experts_BTk", "margin_BT")
        told = {name: value[:, 0] for group in metrics.values() for name, value in group.items() if name in names}

        @torch.inference_mode()
        def logits(start: int, stop: int) -> np.ndarray:
            return (hidden_1TD[0, start:stop] @ self._transformer.head_DV(torch.float32)).cpu().numpy()

        return Pass(logits, {name.replace("_BT", "_LT"): value.cpu().numpy() for name, value in told.items()})

    def continuation(self, prompt_T: np.ndarray, count: int) -> list[int]:
        return self._generator.likeliest(prompt_T.tolist(), count)


def open_side(name: str, path: Path) -> Side:
    """The newest state that verifies of a run of either backend, or a canonical directory; raises as `load_here` does."""
    config, state = load_here(path)
    config = replace(config, train=replace(config.train, compute_dtype="float32"))
    return Side(name, config, state, load_tokenizer(str(path / "tokenizer")))
