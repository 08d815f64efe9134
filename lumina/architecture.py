"""What a model consists of, without any array: its layer plan, its tensors, its parameters and FLOPs.

D model width, H query heads, K key/value heads, h head width, F feed-forward width, E experts, V vocabulary, L layers,
T positions, B rows, c the share of tokens that a Mixture-of-Depths layer works on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lumina.config import Config, MoDConfig, ModelConfig
from lumina.validation import layer_pattern


class Segment(NamedTuple):
    """`kinds`, a short period of layers, repeated; the layers are `start`, `start + 1`, ... in order."""

    start: int
    kinds: tuple[str, ...]
    repeats: int

    def layers(self, position: int) -> range:
        """Numbers of the layers at `position` of the period."""
        return range(self.start + position, self.start + len(self.kinds) * self.repeats, len(self.kinds))


@dataclass(frozen=True)
class Tensor:
    """One named array of the model: the row of the table from which it is made, counted, sharded, saved and exported."""

    name: str  # canonical, such as blocks.3.attention.query
    shape: tuple[int, ...]  # [in, out]
    axes: tuple[str, ...]  # logical, one a dimension
    std: float | None  # of the normal initialiser; None for constants
    constant: float = 0.0  # what constants start from
    decayed: bool = False  # whether AdamW shrinks it
    trained: bool = True  # False: state that is counted, not differentiated

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def layer_kinds(model: ModelConfig) -> list[str]:
    """The kind of each layer: dense, moe, dense+mod or moe+mod."""
    moe = layer_pattern(model.moe.pattern, model.num_layers)
    mod = layer_pattern(model.mod.pattern, model.num_layers)
    return [("moe" if a else "dense") + ("+mod" if b else "") for a, b in zip(moe, mod, strict=True)]


def layer_plan(kinds: list[str]) -> list[Segment]:
    """Cut the layers into segments such that the fewest distinct layers are compiled.

    A dynamic programme over cuts: a segment costs the length of its period, ties go to fewer segments.
    """
    count = len(kinds)
    best: list[tuple[int, int, list[Segment]]] = [(0, 0, []), *[(count + 1, 0, [])] * count]
    for start in range(count):
        cost, pieces, plan = best[start]
        for period in range(1, count - start + 1):
            repeats = 1
            while True:
                end = start + period * repeats
                if (cost + period, pieces + 1) < best[end][:2]:
                    best[end] = (
                        cost + period,
                        pieces + 1,
                        [*plan, Segment(start, tuple(kinds[start : start + period]), repeats)],
                    )
                if kinds[end : end + period] != kinds[start : start + period]:
                    break
                repeats += 1
    return best[count][2]


def canonical_names(plan: list[Segment], path: Sequence[str]) -> list[str]:
    """The tensors in a leaf of a tree that stacks layers by segment, at a `path` such as segments, 0, 1, moe, router."""
    if path[0] != "segments":
        return [path[0] + ".weight" if len(path) == 1 else ".".join(path)]
    return [f"blocks.{i}.{'.'.join(path[3:])}" for i in plan[int(path[1])].layers(int(path[2]))]


# ------------------------------------------------------------------------------------------------ table of tensors


def block_tensors(model: ModelConfig, kind: str) -> list[Tensor]:
    """The tensors of one layer of this kind, named relative to `blocks.i.`."""
    d, h, heads, kv, f, experts = (
        model.d_model,
        model.head_dim,
        model.num_heads,
        model.num_kv_heads,
        model.d_ff,
        model.moe.num_experts,
    )
    residual = 1 / math.sqrt(2 * model.num_layers)  # GPT-2, section 2.3: the residual sum keeps its scale over depth

    def matrix(name: str, shape: tuple[int, ...], axes: str, fan_in: int, scale: float = 1.0) -> Tensor:
        return Tensor(name, shape, tuple(axes.split()), std=scale / math.sqrt(fan_in), decayed=True)

    def norm(name: str, width: int, axis: str) -> Tensor:
        return Tensor(name, (width,), (axis,), std=None, constant=1.0)

    def feedforward(name: str, width: int, stack: tuple[int, ...] = (), first: str = "", embed: str = "embed") -> list[Tensor]:
        return [
            matrix(f"{name}.gate", (*stack, d, width), f"{first} {embed} mlp", d),
            matrix(f"{name}.up", (*stack, d, width), f"{first} {embed} mlp", d),
            matrix(f"{name}.down", (*stack, width, d), f"{first} mlp {embed}", width, residual),
        ]

    table = [
        norm("attention_norm.scale", d, "embed"),
        matrix("attention.query", (d, heads, h), "embed heads head", d),
        matrix("attention.key", (d, kv, h), "embed kv_heads head", d),
        matrix("attention.value", (d, kv, h), "embed kv_heads head", d),
        matrix("attention.output", (heads, h, d), "heads head embed", heads * h, residual),
    ]
    if model.qk_norm:
        table += [norm("attention.query_norm.scale", h, "head"), norm("attention.key_norm.scale", h, "head")]
    table.append(norm("feedforward_norm.scale", d, "embed"))
    if kind.startswith("moe"):
        choices = experts + model.moe.noop_experts
        table.append(matrix("moe.router", (d, choices), "embed choices", d))
        table.append(Tensor("moe.bias", (choices,), ("choices",), std=None, trained=False))
        table += feedforward("moe.experts", f, (experts,), "expert", "expert_embed")
        if model.moe.shared_experts:
            table += feedforward("moe.shared", f * model.moe.shared_experts)
    else:
        table += feedforward("feedforward", f)
    if kind.endswith("+mod"):
        table.append(matrix("mod.router", (d,), "embed", d))
        table.append(Tensor("mod.bias", (), (), std=None))
        if width := model.mod.predictor_width:
            table.append(matrix("mod.predictor.hidden", (d, width), "embed predictor", d))
            table.append(matrix("mod.predictor.output", (width,), "predictor", width))
            table.append(Tensor("mod.predictor.bias", (), (), std=None))
    return table


def embedding_tensor(model: ModelConfig) -> Tensor:
    return Tensor("embedding.weight", (model.vocab_size, model.d_model), ("vocab", "embed"), std=model.embedding_std)


def head_tensor(model: ModelConfig) -> Tensor:
    """The output projection, where it is not the embedding."""
    shape, std = (model.d_model, model.vocab_size), 1 / math.sqrt(model.d_model)
    return Tensor("head.weight", shape, ("embed", "vocab"), std=std, decayed=True)


def outer_tensors(model: ModelConfig) -> list[Tensor]:
    """The tensors that belong to no layer: the embedding, then what follows the layers."""
    final_norm = Tensor("final_norm.scale", (model.d_model,), ("embed",), std=None, constant=1.0)
    return [embedding_tensor(model), final_norm, *([] if model.tie_embeddings else [head_tensor(model)])]


def tensor_table(model: ModelConfig) -> list[Tensor]:
    """Every tensor of the model, in order from input to output."""
    embedding, *last = outer_tensors(model)
    table = [embedding]
    for i, kind in enumerate(layer_kinds(model)):
        table += [Tensor(f"blocks.{i}.{t.name}", *_rest(t)) for t in block_tensors(model, kind)]
    return [*table, *last]


def _rest(t: Tensor) -> tuple:
    return t.shape, t.axes, t.std, t.constant, t.decayed, t.trained


class Group(NamedTuple):
    """A tensor and the layers that have one like it."""

    tensor: Tensor  # of a layer: named relative to `blocks.i.`
    layers: tuple[int, ...] = ()  # none: it belongs to no layer

    @property
    def copies(self) -> int:
        return max(1, len(self.layers))

    @property
    def name(self) -> str:
        """Such as blocks.0-39.attention.query, or blocks.1-39:2.moe.router for every second layer."""
        return f"blocks.{numbered(self.layers)}.{self.tensor.name}" if self.layers else self.tensor.name


def tensor_groups(model: ModelConfig) -> list[Group]:
    """The table of tensors, those of several layers that are alike taken together."""
    kinds = layer_kinds(model)
    layers: dict[Tensor, list[int]] = {}
    for kind in dict.fromkeys(kinds):
        numbers = [i for i, other in enumerate(kinds) if other == kind]
        for tensor in block_tensors(model, kind):
            layers.setdefault(tensor, []).extend(numbers)
    embedding, *last = outer_tensors(model)
    inner = [Group(tensor, tuple(sorted(numbers))) for tensor, numbers in layers.items()]
    return [Group(embedding), *inner, *map(Group, last)]


def numbered(layers: Sequence[int]) -> str:
    """Ascending numbers of layers in a word: 0-39, 1-39:2 for every second, 0,1,5 for no pattern."""
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1, step)):
        return f"{layers[0]}-{layers[-1]}" + (f":{step}" if step > 1 else "")
    return ",".join(map(str, layers)) if len(layers) != 2 or step > 1 else f"{layers[0]}-{layers[1]}"


# --------------------------------------------------------------------------------------------- parameters and FLOPs


def capacity(tokens: int, fraction: float) -> int:
    """Slots for `fraction` of `tokens`, rounded up, from 1 to `tokens`. Immune to 0.1 * 30 being above 3."""
    return max(1, min(tokens, math.ceil(round(tokens * fraction, 6))))


def expert_capacity(model: ModelConfig, tokens: int) -> int:
    """C: slots that one expert has in a row of `tokens`."""
    moe = model.moe
    return capacity(tokens, moe.top_k * moe.capacity_factor / (moe.num_experts + moe.noop_experts))


ANNEAL_STAGES = 8  # falls of an annealed capacity; each is compiled anew, so that its work is really skipped


def depth_capacity_at(mod: MoDConfig, step: int) -> float:
    """The share of tokens that a Mixture-of-Depths layer takes in training step `step`, counted from 0."""
    if step >= mod.anneal_steps:
        return mod.capacity
    stage = step * ANNEAL_STAGES // mod.anneal_steps
    return mod.start_capacity + (mod.capacity - mod.start_capacity) * stage / ANNEAL_STAGES


def at_capacity(config: Config, depth_capacity: float) -> Config:
    """`config` with another depth capacity: what a stage of annealing computes."""
    mod = replace(config.model.mod, capacity=depth_capacity)
    return replace(config, model=replace(config.model, mod=mod))


def at_length(config: Config, sequence_length: int) -> Config:
    """`config` with rows of this length alone: what a stage of growing length computes."""
    return replace(config, data=replace(config.data, sequence_length=sequence_length, stages=""))


def skippable(name: str, mod: MoDConfig) -> bool:
    """Whether a token that a Mixture-of-Depths layer skips passes by the tensor `name`."""
    inner = (".feedforward.", ".moe.") + ((".attention.", ".feedforward_norm.") if mod.scope == "block" else ())
    return any(part in name for part in inner)


def use_of(tensor: Tensor, kind: str, model: ModelConfig, tokens: int) -> tuple[float, float]:
    """The share of `tensor` that a token multiplies with: (the mean token, a token that no layer skips)."""
    moe, mean, most = model.moe, 1.0, 1.0
    if ".experts." in tensor.name:
        most = moe.top_k / moe.num_experts
        mean = moe.top_k / (moe.num_experts + moe.noop_experts)
    if kind.endswith("+mod") and skippable(tensor.name, model.mod):
        mean *= capacity(tokens, model.mod.capacity) / tokens
    return mean, most


class Counts(NamedTuple):
    """Trained parameters, and floating-point operations a token."""

    total: int
    most_active: int  # of a token that no layer skips
    mean_active: int  # of the average token
    forward_flops: int  # a token; attention counted causally, Mixture-of-Depths at its capacity
    training_flops: int  # a token; three times the forward pass, recomputation not counted


def counts(config: Config) -> Counts:
    """Count the model of `config` at its sequence length."""
    model, tokens = config.model, config.data.sequence_length
    kinds = layer_kinds(model)
    total = most = mean = flops = 0.0
    for tensor in tensor_table(model):
        if not tensor.trained:
            continue
        kind = kinds[int(tensor.name.split(".")[1])] if tensor.name.startswith("blocks.") else ""
        mean_use, most_use = use_of(tensor, kind, model, tokens)
        total += tensor.size
        most += tensor.size * most_use
        mean += tensor.size * mean_use
        if tensor.decayed:  # exactly the matrices; a multiplication and an addition each
            flops += 2 * tensor.size * mean_use
    if model.tie_embeddings:
        flops += 2 * model.d_model * model.vocab_size
    # Scores and weighted values: N queries see (N + 1) / 2 keys each in the mean, N being T or those that a block takes.
    for kind in kinds:
        routed = kind.endswith("+mod") and model.mod.scope == "block"
        queries = capacity(tokens, model.mod.capacity) if routed else tokens
        flops += 2 * 2 * model.num_heads * model.head_dim * queries * (queries + 1) / 2 / tokens
    return Counts(round(total), round(most), round(mean), round(flops), 3 * round(flops))


LOGIT_CHUNK = (
    512  # tokens whose logits the loss holds at once; measured: at 512 x 1024 they stay in a CPU's cache, twice as fast
)
