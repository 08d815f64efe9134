"""Generation with a key/value cache: prefill once, then a token at a time.

B rows (one here), T positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lumina.config import Config
from lumina.generation import Sampling, TextGenerator
from lumina.runs.directory import RunDirectory
from lumina.tokenizer import Tokenizer
from lumina.tokenizer_files import load_tokenizer
from lumina_torch.attention import Cache, at_least_float32
from lumina_torch.checkpoint import load
from lumina_torch.model import Transformer, make_caches


def filter_logits(logits_V: Tensor, seen_V: Tensor, allowed_V: Tensor, sampling: Sampling) -> Tensor:
    """Logits after repetition penalty (CTRL, section 4.1), temperature, top-k, top-p and min-p; what is out is -inf.

    The most likely token always stays. With temperature 0 the order is all that counts.
    """
    penalty = sampling.repetition_penalty
    penalised_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    logits_V = torch.where(seen_V, penalised_V, logits_V).masked_fill(~allowed_V, -torch.inf)
    logits_V = logits_V / (sampling.temperature or 1.0)
    sorted_V, order_V = torch.sort(logits_V, descending=True, stable=True)
    share_V = sorted_V.softmax(dim=-1)
    keep_V = torch.arange(len(share_V), device=share_V.device) < (sampling.top_k or len(share_V))
    kept_V = torch.where(keep_V, share_V, 0)
    kept_V = kept_V / kept_V.sum()
    keep_V &= kept_V.cumsum(0) - kept_V < sampling.top_p
    keep_V &= share_V >= sampling.min_p * share_V[0]
    keep_V[0] = True
    return logits_V.masked_fill(~torch.zeros_like(keep_V).scatter_(0, order_V, keep_V), -torch.inf)


class Generator(TextGenerator):
    """Holds a model; each request makes its own caches."""

    def __init__(self, config: Config, transformer: Transformer, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        self.transformer, self.device = transformer, transformer.embedding.weight.device
        self.dtype = getattr(torch, config.train.compute_dtype)
        self._allowed_V = torch.from_numpy(self.allowed_V).to(self.device)

    @torch.inference_mode()
    def _logits(self, tokens: Sequence[int], caches: list[Cache], start: int) -> Tensor:
        """Logits [V] after these tokens, the first of which is at position `start`."""
        tokens_1T = torch.tensor([list(tokens)], device=self.device)
        places_1T = start + torch.arange(len(tokens), device=self.device)[None]
        written_1T = torch.ones_like(tokens_1T, dtype=torch.bool)
        hidden_1TD, _, _ = self.transformer(
            tokens_1T, torch.zeros_like(tokens_1T), places_1T, dtype=self.dtype, caches=caches, written_BT=written_1T
        )
        return at_least_float32(hidden_1TD[0, -1] @ self.transformer.head_DV(self.dtype))

    def _continue(self, prompt: Sequence[int], count: int, sampling: Sampling, first: bool) -> Iterator[int]:
        caches = make_caches(self.config.model, 1, self.dtype, self.device)
        random = torch.Generator().manual_seed(2 * sampling.seed + first)
        seen_V = torch.zeros(self.config.model.vocab_size, dtype=torch.bool, device=self.device)
        seen_V[list(prompt)] = True
        tokens, start = list(prompt), 0
        for _ in range(count):
            kept_V = filter_logits(self._logits(tokens, caches, start), seen_V, self._allowed_V, sampling)
            # Drawn on the host, so that every device draws the same from the same logits.
            drawn = torch.multinomial(kept_V.softmax(dim=-1).cpu(), 1, generator=random) if sampling.temperature else None
            token = int(drawn) if drawn is not None else int(torch.sort(kept_V, descending=True, stable=True).indices[0])
            yield token
            seen_V[token] = True
            start += len(tokens)
            tokens = [token]


def load_generator(run_directory: Path, best: bool = False) -> Generator:
    """The newest (or best) checkpoint of a run of either backend, or a canonical directory, ready to generate; needs no data.

    Raises:
        UsageError: not such a directory. CheckpointError: it has no finished checkpoint, or one of another shape.
    """
    config, transformer, _ = load(run_directory, best=best)
    return Generator(config, transformer, load_tokenizer(str(RunDirectory(run_directory).tokenizer)))
