"""Generation as far as it is not about arrays: settings, the limits of a request, ids to text as they come.

V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lumina.config import Config
from lumina.errors import UsageError
from lumina.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits."""

    temperature: float = 0.8  # 0 takes the most likely token
    top_k: int = 0  # keep the k most likely; 0 keeps all
    top_p: float = 1.0  # keep the most likely until their probability reaches this
    min_p: float = 0.0  # keep those at least this share as likely as the most likely
    repetition_penalty: float = 1.0  # divide (or multiply, where negative) the logits of tokens in the context
    seed: int = 0

    def __post_init__(self) -> None:
        for name, holds, right in (
            ("temperature", self.temperature >= 0, "must be at least 0"),
            ("top_k", self.top_k >= 0, "must be at least 0; 0 keeps all"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "must be from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "must be above 0; 1 is off"),
        ):
            if not holds:
                raise UsageError(f"{name} = {getattr(self, name)}: {right}")


def allowed(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """What may be drawn [V]: text and the document end; no other control token, no row that only fills the embedding up."""
    ids = np.arange(vocab_size)
    control = [id for name, id in tokenizer.control.items() if name != "<|document_end|>"]
    return (ids < tokenizer.vocab_size) & ~np.isin(ids, control)


class TextGenerator(ABC):
    """What follows a prompt; each backend says how."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.context = config.data.sequence_length
        self.end = tokenizer.control["<|document_end|>"]
        self.allowed_V = allowed(tokenizer, config.model.vocab_size)

    @abstractmethod
    def _continue(self, prompt: Sequence[int], count: int, sampling: Sampling, first: bool) -> Iterator[int]:
        """Yield `count` ids that follow the prompt; the `first` of a document is drawn by a seed of its own."""

    def tokens(self, prompt: Sequence[int], max_tokens: int, sampling: Sampling) -> Iterator[int]:
        """Yield up to `max_tokens` ids that follow `prompt`, the document end, if it comes, as the last one.

        An empty prompt begins a new document: its first token is drawn after a document end, which later tokens do not see,
        as in training. Raises UsageError when prompt and new tokens exceed the sequence length the model was trained on.
        """
        if len(prompt) + max_tokens > self.context:
            raise UsageError(
                f"{len(prompt)} prompt tokens and {max_tokens} new ones exceed the {self.context} positions that the model was "
                f"trained on; at most {max(0, self.context - len(prompt))} new ones fit"
            )
        if max_tokens < 1:
            return
        if not prompt:
            first = next(self._continue([self.end], 1, sampling, first=True))
            yield first
            if first == self.end or max_tokens == 1:
                return
            prompt, max_tokens = [first], max_tokens - 1
        for token in self._continue(prompt, max_tokens, sampling, first=False):
            yield token
            if token == self.end:
                return

    def likeliest(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest ids that follow, one after another, whether a document ends among them or not."""
        return list(self._continue(prompt, count, Sampling(temperature=0.0), first=False)) if count else []

    def room(self, prompt: str) -> int:
        """How many tokens may follow `prompt`."""
        return max(0, self.context - len(self.tokenizer.encode(prompt)))

    def text(self, prompt: str, max_tokens: int, sampling: Sampling, stop: Sequence[str] = ()) -> Iterator[str]:
        """Yield the continuation of `prompt` in whole characters, ending before the first of the `stop` strings."""
        decoder = StreamDecoder(self.tokenizer)
        held = ""  # text that may be the beginning of a stop string
        for token in self.tokens(self.tokenizer.encode(prompt), max_tokens, sampling):
            if token == self.end:
                break
            held += decoder.feed(token)
            cut, safe = _find_stop(held, stop)
            if cut is not None:
                yield held[:cut]
                return
            if safe:
                yield held[:safe]
                held = held[safe:]
        held += decoder.flush()
        cut, _ = _find_stop(held, stop)
        yield held[:cut]


def _find_stop(text: str, stop: Sequence[str]) -> tuple[int | None, int]:
    """Where the first stop string begins, if one is there, and up to where the text can no longer belong to one."""
    found = [text.find(s) for s in stop if s in text]
    if found:
        return min(found), min(found)
    pending = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    return None, len(text) - max(pending, default=0)
