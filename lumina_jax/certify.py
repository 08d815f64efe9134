"""The leak certificate: measurements on held-out text that show whether anything quoted of a run sees the future.

B rows of a batch, N real rows, T positions, t positions of a prefix, D model width, L layers with Mixture-of-Depths,
V vocabulary, n tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumina.architecture import capacity, depth_capacity_at, layer_kinds
from lumina.config import Config, ModelConfig, load
from lumina.data.rows import EMPTY, Batches, Rows, RowSet
from lumina.data.shards import TokenStream
from lumina.errors import DataError, UsageError
from lumina.generation import Sampling
from lumina.interchange.state import backend_of
from lumina.runs.certificate import FORMAT, Passes, verdict
from lumina.runs.console import Console
from lumina.runs.directory import RunDirectory, config_fingerprint
from lumina.runs.ranks import foretold, in_top, standard_error
from lumina.runs.text import corpora_of, manifest, rows_of
from lumina.tokenizer import Tokenizer
from lumina_jax.device import describe
from lumina_jax.generate import Generator
from lumina_jax.mesh import one_device
from lumina_jax.model import CAUSAL, Mode, Variables
from lumina_jax.passes import TOLERANCE, Comparison, Forward, is_real, padded, settled
from lumina_jax.step import state_shapes

TOP = Mode(top=True)  # the control: depth routing that sees the future, all else as in evaluation
ROUTINGS = {"causal": CAUSAL, "top_k": TOP}
CONTROL = 1e-3  # a control must move logits by this share of the largest, a hundred times what rounding may do
NOISE_ERRORS = 4.0  # standard errors below log V that chance explains once in 30,000 certificates
NOISE_ROWS = 64  # at least: the error of fewer rows is too uncertain for that
PROMPTS, CONTINUED = 4, 32  # of generation: prompts, and tokens after each
LEAST_ROWS = 2  # a swap needs another row, a standard error as well
LAYOUT = ("inputs", "segments", "positions")  # what a pass reads of a batch


def certify(run_directory: str, rows: int, best: bool, console: Console) -> dict[str, Any]:
    """Examine the newest (or best) checkpoint of a run on its first `rows` held-out rows (0: all); see docs/certify.md.

    The run may be of either backend, or a canonical directory; what is computed is lumina_jax's model with its weights.

    Raises:
        UsageError: not a run directory, or too few rows. ConfigError, CheckpointError: of the run.
        DataError: the run's data cannot be had any more, or is not what the run began with.
    """
    from lumina_jax import checkpoint  # orbax takes a second to import

    if rows and rows < LEAST_ROWS:
        raise UsageError(f"--rows = {rows}: must be at least {LEAST_ROWS}, or 0 for all held-out text")
    run, config = RunDirectory(run_directory), load(run_directory)
    held_out, tokenizer, data_fingerprint = held_out_text(run, config, console)
    _, _, variables, step = checkpoint.open_model(run.path, best)
    computed = (
        "; the weights are of lumina_torch, and what is examined is lumina_jax" if backend_of(run.path) == "torch" else ""
    )
    certificate = {
        "run": str(run.path),
        "step": step,
        "checkpoint": "best" if best else "newest",
        "config": config_fingerprint(config),
        "data": data_fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "jax": jax.__version__,
        "device": describe(one_device()) + computed,
    }
    trained = as_trained(config, step)  # the graph definition holds what the modules compute with
    return certificate | examine(trained, state_shapes(trained)[1], variables, tokenizer, held_out, rows, console)


def held_out_text(run: RunDirectory, config: Config, console: Console) -> tuple[RowSet, Tokenizer, str]:
    """The held-out rows of a run's first source, as it evaluates on them, its tokenizer, and the fingerprint of its data, which
    is checked."""
    corpora = corpora_of(run, config, console.status)
    console.done()
    source, corpus = next(iter(corpora.items()))
    rows = rows_of(corpus, "held_out", config.data, config.data.sequence_length, source)
    return rows, corpus.tokenizer, str(manifest(corpora, config.data)["fingerprint"])


def as_trained(config: Config, step: int) -> Config:
    """The config with the depth capacity of the last step trained, and forms for this device: another may have trained it."""
    mod = replace(config.model.mod, capacity=depth_capacity_at(config.model.mod, max(step - 1, 0)), anneal_steps=0)
    moe = replace(config.model.moe, grouped_form="auto")
    return replace(config, model=replace(config.model, moe=moe, mod=mod, attention_form="auto"))


def examine(
    config: Config,
    graphdef: nnx.GraphDef,
    variables: Variables,
    tokenizer: Tokenizer,
    held_out: RowSet,
    rows: int,
    console: Console,
) -> dict[str, Any]:
    """All measures of one model, and the verdict. Raises DataError when the held-out text has too few rows."""
    B, T = config.train.batch_size // config.train.micro_batches, config.data.sequence_length
    batches = list(Batches(held_out, B, seed=0, shuffle=False).evaluation(rows))
    real_NT = np.concatenate([(batch["segments"] >= 0)[is_real(batch)] for batch in batches])
    N = len(real_NT)
    if N < LEAST_ROWS:
        raise DataError(f"the held-out text has {N} row of {T} tokens; a certificate needs {LEAST_ROWS}: hold out more")
    noise_tokens = max(N, NOISE_ROWS) * T + 1
    end = tokenizer.control["<|document_end|>"]
    noise = Batches(Rows(Noise(tokenizer.vocab_size, noise_tokens), T, end), B, seed=0, shuffle=False)
    model, blind = config.model, why_no_control(config.model, T, int(np.max(np.sum(real_NT, axis=1))))
    depth = any(kind.endswith("+mod") for kind in layer_kinds(model))
    modes = ROUTINGS if depth else {"causal": CAUSAL}
    lengths = sorted({n for n in (T // 4, T // 2, 3 * T // 4, T - 1) if 0 < n < T})
    compared = 2 * max(len(batches), len(lengths)) + 3 * len(batches)  # passes for prefixes and swaps
    passes = Passes(console, 2 * len(modes) * len(batches) + compared * (1 if blind else 2))

    with jax.default_matmul_precision("highest"):  # accelerators would round float32 to fewer bits
        forward = Forward(graphdef, variables, jnp.float32, passes)
        passes.begin("cross-entropy")
        quality, seen = cross_entropies(forward, batches, modes, tokenizer.token_bytes())
        passes.begin("random tokens")
        measures: dict[str, Any] = {
            "cross_entropy": quality,
            "noise": noise_losses(forward, noise, modes, tokenizer.vocab_size),
        }
        for name, measure in (
            ("prefix", partial(prefixes, batches=batches, lengths=lengths)),
            ("suffix", partial(swaps, batches=batches, vocab_size=tokenizer.vocab_size)),
        ):
            passes.begin(name)
            causal = settled(partial(measure, mode=CAUSAL), forward)
            measures[name] = with_control(causal, None if blind else measure(forward, mode=TOP), blind)
        passes.begin("generation")
        measures["generation"] = settled(partial(generation, config, tokenizer, batches), forward)
        measures["depth"] = depth_measures(model, seen, real_NT)
    passes.end()
    return verdict(
        {
            "format": FORMAT,
            "layers": layer_kinds(model),
            "rows": N,
            "tokens": int(np.sum(real_NT)),
            "sequence_length": T,
            "precision": "float32, products of matrices in full precision",
            "measures": measures,
        }
    )


def why_no_control(model: ModelConfig, T: int, most: int) -> str:
    """Why top-k routing is no control for this model and rows of T with at most so many tokens; empty where it is one."""
    if not any(kind.endswith("+mod") for kind in layer_kinds(model)):
        return "no depth routing: control not applicable"
    if model.mod.router == "random":
        return "depth is routed at random, which looks at no token: control not applicable"
    if capacity(T, model.mod.capacity) >= most:
        return "depth takes every token of a row: control not applicable"
    return ""


class Noise(TokenStream):
    """A stream of independent, uniformly drawn token ids: what no model can predict better than by log V."""

    def __init__(self, vocab_size: int, num_tokens: int, seed: int = 0):
        self.name, self.num_tokens = "random", num_tokens
        self._tokens = np.random.default_rng(seed).integers(0, vocab_size, num_tokens).astype(np.int32)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Token ids [start, stop), int32."""
        return self._tokens[start:stop]


# ------------------------------------------------------------------------------------------ cross-entropy, noise


def cross_entropies(forward: Forward, batches: list, modes: dict[str, Mode], token_bytes: np.ndarray) -> tuple[dict, dict]:
    """(Cross-entropy by routing, and the gap between them; what the MoD layers told, over real rows, by routing.)"""
    losses: dict[str, np.ndarray] = {}
    seen: dict[str, dict[str, np.ndarray]] = {}
    for name, mode in modes.items():
        per_batch, told = [], []
        for batch in batches:
            hidden_BTD, depth = forward.hidden(batch, mode)
            per_batch.append(forward.losses(hidden_BTD, batch))
            told.append({key: depth[key][:, is_real(batch)] for key in ("logit_BT", "taken_BT") if key in depth})
        losses[name] = np.concatenate(per_batch)
        seen[name] = {key: np.concatenate([each[key] for each in told], axis=1) for key in told[0]}
    counts_N = np.concatenate([np.sum(batch["weights"] > 0, axis=1)[is_real(batch)] for batch in batches])
    targets_n = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
    tokens, count = len(targets_n), int(np.sum(token_bytes[targets_n]))
    found: dict[str, Any] = {
        "what": "cross-entropy of the held-out tokens that count, of conversations the assistant's words unless "
        "data.loss_weights says otherwise; standard errors over rows, of which neighbours share documents",
        "rows": len(counts_N),
        "tokens": tokens,
        "bytes": count,
    }
    for name, losses_N in losses.items():
        total = float(np.sum(losses_N))
        found[name] = {
            "nats_per_token": total / tokens,
            "standard_error": standard_error(losses_N, counts_N),
            "bits_per_byte": total / math.log(2) / max(count, 1),
        }
    if "top_k" in found:
        gap_N = losses["top_k"] - losses["causal"]
        found["top_k"]["label"] = "control: sees the future, never a figure of quality"
        found["gap"] = {"nats_per_token": float(np.sum(gap_N)) / tokens, "standard_error": standard_error(gap_N, counts_N)}
    return found, seen


def noise_losses(forward: Forward, noise: Batches, modes: dict[str, Mode], vocab_size: int) -> dict[str, Any]:
    """Loss on random tokens, cut into rows as text is, beside log V. Below it, targets leak into what predicts them."""
    batches = list(noise.evaluation())
    tokens = sum(int(np.sum(batch["weights"])) for batch in batches)
    best, T = math.log(vocab_size), batches[0]["inputs"].shape[1]
    found: dict[str, Any] = {
        "what": "loss on tokens drawn uniformly from the tokenizer's vocabulary, which nothing that is causal beats log V on",
        "tokens": tokens,
        "vocabulary": vocab_size,
        "log_vocabulary": best,
        "tolerance_in_standard_errors": NOISE_ERRORS,
    }
    for name, mode in modes.items():
        losses_N = np.concatenate([forward.losses(forward.hidden(batch, mode)[0], batch) for batch in batches]) / T
        loss, error = float(np.mean(losses_N)), standard_error(losses_N, np.ones(len(losses_N)))
        # A model that predicts nothing has exactly log V, and its rows differ by rounding alone.
        errors = (loss - best) / max(error, best * TOLERANCE["float32"])
        found[name] = {"nats_per_token": loss, "standard_error": error, "above_in_standard_errors": errors}
    found["holds"] = bool(found["causal"]["above_in_standard_errors"] >= -NOISE_ERRORS)
    return found


# --------------------------------------------------------------------------------------------- prefixes and swaps


def prefixes(forward: Forward, batches: list, lengths: list[int], mode: Mode) -> dict[str, Any]:
    """Logits of prefixes alone against those of the whole rows: of each batch one length, of each length a batch or more."""
    comparison, B = Comparison(), len(batches[0]["inputs"])
    for turn in range(max(len(batches), len(lengths))):  # every batch and every length has its turn
        batch, t = batches[turn % len(batches)], lengths[turn % len(lengths)]
        whole, T = forward.hidden(batch, mode), batch["inputs"].shape[1]
        alone = forward.hidden({name: batch[name][:, :t] for name in ("inputs", "segments", "positions")}, mode)
        counted_BT = (batch["segments"] >= 0) & (np.arange(T) < t)
        comparison.add(forward, whole, padded(alone, T), counted_BT, turn % len(batches) * B)
    return {
        "what": "logits of a prefix alone against those of the whole row at the prefix",
        "lengths": lengths,
        **comparison.found(forward.name),
    }


def swaps(forward: Forward, batches: list, vocab_size: int, mode: Mode) -> dict[str, Any]:
    """Logits before a point of each row against those after what follows was replaced: by another row, whose documents begin
    anew at the point; by noise, in the documents that there are; and by nothing, as after the last document of a packed row."""
    comparison, first_row = Comparison(), 0
    rows_NT = {name: np.concatenate([batch[name][is_real(batch)] for batch in batches]) for name in LAYOUT}
    N, T = rows_NT["inputs"].shape
    filled_N = np.sum(rows_NT["segments"] >= 0, axis=1)
    points_N = 1 + np.arange(N) * (filled_N - 1) // N  # spread over all places from 1 to T - 1, of what holds text
    another = {name: np.roll(each_NT, 1, axis=0) for name, each_NT in rows_NT.items()}
    another["segments"] += (T + 1) * (another["segments"] >= 0)
    nothing = {name: np.full_like(each_NT, EMPTY if name == "segments" else 0) for name, each_NT in rows_NT.items()}
    noise = rows_NT | {"inputs": np.random.default_rng(1).integers(0, vocab_size, (N, T), np.int32)}
    for batch in batches:
        number = int(np.sum(is_real(batch)))
        chosen = slice(first_row, first_row + number)
        counted_BT = np.zeros(batch["inputs"].shape, bool)
        counted_BT[:number] = np.arange(T) < points_N[chosen, None]
        whole = forward.hidden(batch, mode)
        for other in (another, noise, nothing):
            changed = {name: batch[name].copy() for name in LAYOUT}
            for name, each_BT in changed.items():
                each_BT[:number] = np.where(counted_BT[:number], each_BT[:number], other[name][chosen])
            comparison.add(forward, whole, forward.hidden(changed, mode), counted_BT, first_row)
        first_row += number
    return {
        "what": "logits before a point, one in each row, when those from there on become another row's, random, and none",
        "points": {"rows": N, "first": int(points_N[0]), "last": int(points_N[-1])},
        **comparison.found(forward.name),
    }


def with_control(causal: dict[str, Any], control: dict[str, Any] | None, blind: str) -> dict[str, Any]:
    """A measure under causal routing, with the same under top-k, which it must refuse to be worth anything."""
    if control is None:
        return {**causal, "control": {"applicable": False, "why": blind}}
    numbers = {name: value for name, value in control.items() if name not in ("what", "holds", "lengths", "points")}
    label = "control: top-k routing, which sees the future and must be refused"
    detected = bool(control["relative"] > CONTROL)
    return {**causal, "control": {"applicable": True, "label": label, **numbers, "needed": CONTROL, "refused": detected}}


# ------------------------------------------------------------------------------------------------------ generation


def generation(config: Config, tokenizer: Tokenizer, batches: list, forward: Forward) -> dict[str, Any]:
    """Greedy continuations by the generator, with its cache, against the most likely token by one pass without."""
    generator = Generator(config, forward.graphdef, forward.variables, tokenizer)
    generator.dtype = forward.dtype
    T, B = config.data.sequence_length, len(batches[0]["inputs"])
    most = min(CONTINUED, T // 2)
    prompts = list(_prompts(batches, T // 4))
    written = [list(generator.tokens(prompt, most, Sampling(temperature=0.0))) for prompt in prompts]
    allowed_V = np.zeros(config.model.vocab_size, bool)
    allowed_V[: tokenizer.vocab_size] = True
    allowed_V[list(set(tokenizer.control.values()) - {generator.end})] = False
    differ, margin, largest, rows = 0, 0.0, 0.0, []
    for start in range(0, len(prompts), B):
        inputs_BT = np.full((B, T), generator.end, np.int32)
        pairs = list(zip(prompts, written, strict=True))[start : start + B]
        for row, (prompt, tokens) in enumerate(pairs):
            inputs_BT[row, : len(prompt) + len(tokens)] = [*prompt, *tokens]
        whole = np.zeros((B, T), np.int32)  # one document, as the generator takes it
        positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
        hidden_BTD, told = forward.hidden({"inputs": inputs_BT, "segments": whole, "positions": positions_BT}, CAUSAL)
        for row, (prompt, tokens) in enumerate(pairs):
            places = slice(len(prompt) - 1, len(prompt) - 1 + len(tokens))
            logits_nV = np.where(allowed_V, forward.logits(hidden_BTD[row, places]), -np.inf)
            missed_n = np.max(logits_nV, axis=-1) - logits_nV[np.arange(len(tokens)), tokens]
            differ += int(np.sum(np.argmax(logits_nV, axis=-1) != tokens))
            margin = float(np.maximum(margin, np.max(missed_n)))
            rows.append((hidden_BTD[row : row + 1], {name: value[:, row : row + 1] for name, value in told.items()}, missed_n))
            largest = float(np.maximum(largest, np.max(np.abs(logits_nV[:, allowed_V]))))
    relative = margin / largest if largest else math.nan
    holds = bool(relative <= TOLERANCE[forward.name])
    return {
        "what": "greedy continuations with the cache against the most likely token of one pass without it",
        "prompts": len(prompts),
        "tokens": sum(map(len, written)),
        "precision": forward.name,
        "different_tokens": differ,
        "relative": relative,  # how much less likely a generated token's logit is than the largest: 0 when all are equal
        "tolerance": TOLERANCE[forward.name],
        **({} if holds else flips_of_cache(forward, prompts, written, rows, largest)),
        "holds": holds,
    }


def flips_of_cache(forward: Forward, prompts: list, written: list, rows: list, largest: float) -> dict[str, Any]:
    """Which choices differ between passes without the cache and the same tokens with it, and what differs before them.

    `rows` are (hidden [1, T, D], told, how much likelier [n] another token was than the generated one) of the first.
    """
    if all(kind == "dense" for kind in forward.kinds):
        return {}
    comparison, missed = Comparison(), 0.0
    for number, (prompt, tokens, (hidden_1TD, told, missed_n)) in enumerate(zip(prompts, written, rows, strict=True)):
        T, fed = hidden_1TD.shape[1], [*prompt, *tokens[:-1]]
        with_cache = padded(forward.decoded(fed, len(prompt)), T)
        reached_1T = comparison.add(forward, (hidden_1TD, told), with_cache, np.arange(T)[None] < len(fed), number)
        before_n = ~reached_1T[0, len(prompt) - 1 : len(fed)]
        missed = float(np.maximum(missed, np.max(missed_n[before_n], initial=0)))
    before = comparison.before_flips()
    before["relative_before_flips"] = float(
        np.maximum(before["relative_before_flips"], missed / largest if largest else math.nan)
    )
    return {"flips": comparison.flips, "expert_flips": comparison.expert_flips, **before}


def _prompts(batches: list, length: int) -> Iterator[list[int]]:
    """Beginnings of held-out rows, of about `length` tokens, each from within one document."""
    rows = [row for batch in batches for row in zip(batch["inputs"], batch["segments"], strict=True) if np.any(row[1] >= 0)]
    for number, row in enumerate(np.linspace(0, len(rows) - 1, min(PROMPTS, len(rows))).astype(int)):
        inputs_T, segments_T = rows[row]
        last = min(max(1, length - number), int(np.sum(segments_T >= 0))) - 1
        yield inputs_T[: last + 1][segments_T[: last + 1] == segments_T[last]].tolist()


# ----------------------------------------------------------------------------------------------------------- depth


def depth_measures(model: ModelConfig, seen: dict[str, dict[str, np.ndarray]], real_NT: np.ndarray) -> dict[str, Any] | None:
    """How well each layer's causal decision foretells membership in the top of its row, over the positions that hold text; None
    without such layers."""
    if not seen["causal"]:
        return None
    top, causal = seen["top_k"], seen["causal"]
    numbers = [i for i, kind in enumerate(layer_kinds(model)) if kind.endswith("+mod")]
    T = real_NT.shape[1]
    count = capacity(T, model.mod.capacity)
    # A predictor's logit is not what the top is chosen by, and the logit that is, no causal pass tells.
    told = [] if model.mod.predictor_width else [np.where(real_NT, each_NT, -np.inf) for each_NT in causal["logit_BT"]]
    of_causal = [in_top(each_NT, count) for each_NT in told]
    layers = []
    for index, number in enumerate(numbers):
        layer: dict[str, Any] = {
            "layer": number,
            "realised_capacity": float(np.mean(causal["taken_BT"][index][real_NT])),
            **foretold(top["logit_BT"][index][real_NT], top["taken_BT"][index][real_NT]),
        }
        if of_causal:
            layer["of_causal_states"] = foretold(causal["logit_BT"][index][real_NT], of_causal[index][real_NT])
        layers.append(layer)
    return {
        "what": "the causal logit against membership in the top-k of its row, over all tokens of all rows; the hidden "
        "states are those of the top-k pass, as in training, and in of_causal_states those of the causal pass; realised "
        "capacity is of the causal pass",
        "label": "how well a causal decision stands in for top-k: no figure of quality",
        "tokens": int(np.sum(real_NT)),
        "capacity": model.mod.capacity,
        "share_of_top": float(np.mean(top["taken_BT"][:, real_NT])),
        "router": model.mod.router,
        "predictor_width": model.mod.predictor_width,
        "scope": model.mod.scope,
        "layers": layers,
    }
