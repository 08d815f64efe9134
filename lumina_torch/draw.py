"""Random numbers of dropout and jitter, from seed, step, row, layer and use alone: none are stored.

B rows.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """What one step's rows draw by; `layer` is that of the layer that draws."""

    seed: int
    step: int
    rows_B: tuple[int, ...]  # numbers of the rows in the batch
    layer: int = -1

    def uniform(self, use: str, like_BTD: Tensor) -> Tensor:
        """Numbers from 0 to 1 of the shape and device of `like`, in at least float32, drawn on the host: every device and
        every precision has the same."""
        rows = []
        for row in self.rows_B:
            key = hashlib.sha256(repr((self.seed, self.step, row, self.layer, use)).encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
            rows.append(torch.rand(like_BTD.shape[1:], generator=generator, dtype=torch.float32))
        return torch.stack(rows).to(like_BTD.device, torch.promote_types(like_BTD.dtype, torch.float32))
