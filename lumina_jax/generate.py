"""Generation with a key/value cache: prefill once, then a token at a time.

B rows (one here), T positions, S length of the cache, D model width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumina.config import Config
from lumina.generation import Sampling, TextGenerator
from lumina.runs.directory import RunDirectory
from lumina.tokenizer import Tokenizer
from lumina.tokenizer_files import load_tokenizer
from lumina_jax.attention import at_least_float32
from lumina_jax.model import Variables, fit_caches, make_caches, merge, routed_caches


class Knobs(NamedTuple):
    """Sampling as traced numbers: turning one compiles nothing."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float


def filter_logits(logits_V, seen_V, allowed_V, knobs: Knobs):
    """Logits after repetition penalty (CTRL, section 4.1), temperature, top-k, top-p and min-p; what is out is -inf.

    The most likely token always stays. With temperature 0 the order is all that counts.
    """
    penalised_V = jnp.where(logits_V > 0, logits_V / knobs.repetition_penalty, logits_V * knobs.repetition_penalty)
    logits_V = jnp.where(allowed_V, jnp.where(seen_V, penalised_V, logits_V), -jnp.inf)
    logits_V = logits_V / jnp.where(knobs.temperature > 0, knobs.temperature, 1.0)
    order_V = jnp.argsort(-logits_V, stable=True)
    sorted_V = jax.nn.softmax(logits_V[order_V])
    rank_V = jnp.arange(logits_V.shape[0])
    keep_V = (knobs.top_k == 0) | (rank_V < knobs.top_k)
    kept_V = jnp.where(keep_V, sorted_V, 0)
    kept_V = kept_V / jnp.sum(kept_V)
    keep_V &= jnp.cumsum(kept_V) - kept_V < knobs.top_p
    keep_V &= sorted_V >= knobs.min_p * sorted_V[0]
    keep_V = keep_V.at[0].set(True)
    return jnp.where(jnp.zeros_like(keep_V).at[order_V].set(keep_V), logits_V, -jnp.inf)


def bucket(length: int, least: int = 16) -> int:
    """The next power of two: few lengths are compiled."""
    return max(least, 1 << (length - 1).bit_length())


class Generator(TextGenerator):
    """Holds a model and its compiled prefill and decode."""

    def __init__(self, config: Config, graphdef: nnx.GraphDef, variables: Variables, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        self.variables = variables
        self.dtype = jnp.dtype(config.train.compute_dtype)
        allowed_V = jnp.asarray(self.allowed_V)

        def forward(variables, tokens_1T, caches, start, last):
            """The tokens up to number `last` of these, the first at position `start`; what follows them is filling."""
            model = merge(graphdef, variables)
            places_1T = jnp.arange(tokens_1T.shape[1])[None]
            hidden, _, caches = model(
                tokens_1T,
                jnp.zeros_like(places_1T),
                start + places_1T,
                dtype=self.dtype,
                caches=caches,
                written_BT=places_1T <= last,
            )
            return at_least_float32(hidden[0, last] @ model.head_DV(self.dtype)), caches

        def draw(logits_V, seen_V, knobs, key):
            kept_V = filter_logits(logits_V, seen_V, allowed_V, knobs)
            drawn = jax.random.categorical(key, kept_V)
            token = jnp.where(knobs.temperature > 0, drawn, jnp.argmax(kept_V)).astype(jnp.int32)
            return token, seen_V.at[token].set(True)

        def fullest(caches):
            lengths = [jnp.max(cache.length) for cache in routed_caches(config.model, caches)]
            return jnp.max(jnp.stack(lengths)) if lengths else 0

        def prefill(variables, tokens_1T, length, caches, seen_V, knobs, key):
            logits_V, caches = forward(variables, tokens_1T, caches, 0, length - 1)
            token, seen_V = draw(logits_V, seen_V, knobs, jax.random.fold_in(key, length))
            return (token, fullest(caches)), caches, seen_V

        def decode(variables, token, index, caches, seen_V, knobs, key):
            logits_V, caches = forward(variables, token[None, None], caches, index, 0)
            token, seen_V = draw(logits_V, seen_V, knobs, jax.random.fold_in(key, index + 1))
            return (token, fullest(caches)), caches, seen_V

        self._prefill = jax.jit(prefill, donate_argnames=("caches", "seen_V"))
        self._decode = jax.jit(decode, donate_argnames=("caches", "seen_V"))

    def _continue(self, prompt: Sequence[int], count: int, sampling: Sampling, first: bool) -> Iterator[int]:
        key = jax.random.key(sampling.seed)
        key = jax.random.fold_in(key, 0) if first else key
        knobs = Knobs(
            float(sampling.temperature),
            sampling.top_k,
            float(sampling.top_p),
            float(sampling.min_p),
            float(sampling.repetition_penalty),
        )
        (token, fullest), caches, seen_V = self._start(prompt, bucket(len(prompt) + count), knobs, key)
        places = 0
        for index in range(len(prompt), len(prompt) + count):
            yield int(token)
            if index == len(prompt) + count - 1:
                return
            if int(fullest) + 1 > places:
                places = bucket(int(fullest) + 1)
                caches = fit_caches(self.config.model, caches, places)
            (token, fullest), caches, seen_V = self._decode(self.variables, token, index, caches, seen_V, knobs, key)

    def _start(self, prompt: Sequence[int], cache_length: int, knobs: Knobs, key: jax.Array):
        T = bucket(len(prompt))
        tokens_1T = np.full((1, T), self.end, np.int32)  # what follows the prompt is overwritten before it can be seen
        tokens_1T[0, : len(prompt)] = prompt
        seen_V = np.zeros(self.config.model.vocab_size, bool)
        seen_V[list(prompt)] = True
        caches = make_caches(self.config.model, 1, max(cache_length, T), self.dtype)
        return self._prefill(self.variables, tokens_1T, len(prompt), caches, jnp.asarray(seen_V), knobs, key)


def load_generator(run_directory: Path, best: bool = False) -> Generator:
    """The newest (or best) checkpoint of a run of either backend, or a canonical directory, ready to generate; needs no data.

    Raises:
        UsageError: not such a directory. CheckpointError: it has no finished checkpoint, or one of another shape.
    """
    from lumina_jax import checkpoint  # orbax takes a second to import

    config, graphdef, variables, _ = checkpoint.open_model(run_directory, best)
    return Generator(config, graphdef, variables, load_tokenizer(str(RunDirectory(run_directory).tokenizer)))
