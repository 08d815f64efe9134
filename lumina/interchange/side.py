"""One of the two models that `lumina compare` compares: what either backend, or transformers, answers about rows of tokens.

T positions, n of them, V vocabulary, L layers that tell of something, k choices of experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lumina.architecture import layer_kinds
from lumina.config import Config
from lumina.errors import ConfigError
from lumina.generation import allowed
from lumina.interchange.state import State, digests
from lumina.tokenizer import Tokenizer


class Row(NamedTuple):
    """Tokens in a row, what follows each, which document of the row each is in, and its place there; int32 [T]."""

    inputs_T: np.ndarray
    targets_T: np.ndarray
    segments_T: np.ndarray
    positions_T: np.ndarray


def one_document(ids_T: np.ndarray) -> Row:
    """A row whose targets nobody asks for."""
    ids_T = np.asarray(ids_T, np.int32)
    return Row(ids_T, np.zeros_like(ids_T), np.zeros_like(ids_T), np.arange(len(ids_T), dtype=np.int32))


class Pass(NamedTuple):
    """What one model makes of a row."""

    logits: Callable[[int, int], np.ndarray]  # (start, stop) -> float32 [n, V] after these positions
    told: dict[str, np.ndarray]  # logit_LT and taken_LT of layers with depth routing, experts_LTk and margin_LT of experts


class Side(ABC):
    """A model, in float32 and routed causally, as in generation."""

    kinds: list[str] | None = None  # of its layers; None: it tells no decisions
    digests: dict[str, str] | None = None  # of its weights by canonical name; None: they have other names

    def __init__(self, name: str, tokenizer: Tokenizer, positions: int, columns: int):
        """
        Args:
            name: as it was asked for.
            positions: T that a row may have.
            columns: V of its logits.
        """
        self.name, self.tokenizer, self.positions, self.columns = name, tokenizer, positions, columns
        self.end = tokenizer.control["<|document_end|>"]

    @abstractmethod
    def read(self, row: Row) -> Pass:
        """One pass over a row."""

    @abstractmethod
    def continuation(self, prompt_T: np.ndarray, count: int) -> list[int]:
        """The likeliest tokens that follow, one after another, with the key/value cache of generation."""


class Canonical(Side):
    """What both backends' sides have in common: a model under canonical names."""

    def __init__(self, name: str, config: Config, state: State, tokenizer: Tokenizer):
        super().__init__(name, tokenizer, config.data.sequence_length, config.model.vocab_size)
        self.config, self.kinds, self.digests = config, layer_kinds(config.model), digests(state.weights)


class Foreign(Side):
    """A directory of Hugging Face, computed by transformers."""

    def __init__(self, name: str, directory: Path):
        """Raises UsageError, ConfigError, CheckpointError or DataError where it is none that can be loaded."""
        from lumina.interchange import importing, verify
        from lumina.interchange.huggingface import ARCHITECTURES
        from lumina.interchange.safe_tensors import SafeTensors

        verify.require_transformers()
        values = importing.read_config(directory)
        if (form := values["model_type"]) not in ARCHITECTURES:
            raise ConfigError(f"{directory}: model_type = {form!r}: must be one of {', '.join(ARCHITECTURES)}")
        with importing.weights_alone(directory, SafeTensors(directory).files) as alone:
            self._model = verify.Theirs(alone, form)
        super().__init__(name, importing.tokenizer_of(directory), importing.positions_of(values), values["vocab_size"])

    def read(self, row: Row) -> Pass:
        logits_TV = self._model.logits(row.inputs_T)
        return Pass(lambda start, stop: logits_TV[start:stop], {})

    def continuation(self, prompt_T: np.ndarray, count: int) -> list[int]:
        return self._model.continuation(prompt_T, count, allowed(self.tokenizer, self.columns))


def is_foreign(values: dict[str, Any]) -> bool:
    """Whether a config.json is one of Hugging Face; ours have a group for the model."""
    return "model_type" in values and not isinstance(values.get("model"), dict)
