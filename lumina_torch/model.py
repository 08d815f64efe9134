"""The transformer: embedding, layers, final norm, head.

B rows, T positions, D model width, V vocabulary, L layers.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lumina.architecture import layer_kinds, tensor_table
from lumina.config import ModelConfig
from lumina_torch.attend import Places
from lumina_torch.attention import Attention, Cache, RMSNorm
from lumina_torch.draw import Draw
from lumina_torch.feedforward import FeedForward
from lumina_torch.mod import MoD
from lumina_torch.moe import MoE

Metrics = dict[str, dict[str, Any]]  # "moe" and "mod" -> name -> tensor with a leading axis over the layers that have it


class Mode(NamedTuple):
    """What routing does."""

    training: bool = False  # MoE drops beyond its capacity; jitter and dropout draw
    top: bool = False  # MoD selects the top of each row, which sees the future: in training, and as control in a certificate
    tell: bool = False  # experts' metrics have what each token chose, and how nearly it chose another


TRAINING, CAUSAL = Mode(training=True, top=True), Mode()


class Block(nn.Module):
    """x = x + attention(norm(x)); x = x + feedforward(norm(x)), the feed-forward dense or MoE, with MoD around it, around
    both, or not."""

    def __init__(self, model: ModelConfig, kind: str, param: Callable[[str], Tensor]):
        super().__init__()
        self.attention_norm = RMSNorm(param("attention_norm.scale"), model.norm_eps)
        self.attention = Attention(model, param)
        self.feedforward_norm = RMSNorm(param("feedforward_norm.scale"), model.norm_eps)
        if kind.startswith("moe"):
            self.moe = MoE(model, param)
        else:
            self.feedforward = FeedForward("feedforward", model.activation, param)
        if kind.endswith("+mod"):
            self.mod = MoD(model, param)
        self.routes_block = model.mod.scope == "block"
        self.dropout = model.dropout

    def forward(
        self,
        x_BTD: Tensor,
        places: Places,
        mode: Mode,
        layer: int = 0,
        draw: Draw | None = None,
        cache: Cache | None = None,
        written_BT: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Returns ([B, T, D], metrics). `layer` is its number; see `Transformer` for the others.

        Empty positions, those in no document, take no part in routing.
        """

        def attention(x: Tensor, places: Places, written: Tensor | None) -> Tensor:
            mixed = self.attention(self.attention_norm(x), places, cache, written)
            return self._drop(mixed, mode, draw, "attention")

        def feedforward(z: Tensor, taken: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            out, metrics = (
                self.moe(z, taken, mode.training, draw, mode.tell) if hasattr(self, "moe") else (self.feedforward(z), {})
            )
            return self._drop(out, mode, draw, "feedforward"), metrics

        def both(x: Tensor, places: Places, taken: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            """Attention and feed-forward among the tokens taken."""
            written = None
            if cache is not None and written_BT is not None:
                written = written_BT.gather(1, selection.index_BC.clamp(min=0)) & taken
            mixed = attention(x, places, written)
            out, metrics = feedforward(self.feedforward_norm(x + mixed), taken)
            return mixed + out, metrics

        def idle(x: Tensor) -> dict[str, Tensor]:
            return self.moe.idle(x, mode.tell) if hasattr(self, "moe") else {}

        depth: dict[str, Tensor] = {}
        if hasattr(self, "mod") and self.routes_block:
            selection, depth = self.mod(self.attention_norm(x_BTD), places, layer, mode.top)
            change_BTD, experts = selection.run(both, x_BTD, places, idle)
            x_BTD = x_BTD + change_BTD
        else:
            x_BTD = x_BTD + attention(x_BTD, places, written_BT)
            z_BTD = self.feedforward_norm(x_BTD)
            if hasattr(self, "mod"):
                selection, depth = self.mod(z_BTD, places, layer, mode.top)
                out_BTD, experts = selection.run(lambda z, _, taken: feedforward(z, taken), z_BTD, places, idle)
            else:
                out_BTD, experts = feedforward(z_BTD, places.real_BT)
            x_BTD = x_BTD + out_BTD
        return x_BTD, {group: of for group, of in (("moe", experts), ("mod", depth)) if of}

    def _drop(self, x: Tensor, mode: Mode, draw: Draw | None, use: str) -> Tensor:
        if not (mode.training and self.dropout and draw is not None):
            return x
        return torch.where(draw.uniform(use, x) < self.dropout, 0, x / (1 - self.dropout))


class Embedding(nn.Module):
    """Holds the embedding, which is the head as well when they are tied."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight


class Transformer(nn.Module):
    """Parameters and buffers have the canonical names and layouts of `lumina.architecture.tensor_table`, all in float32."""

    def __init__(self, model: ModelConfig, device: torch.device | str | None = None):
        """The values are left uninitialised; see `create` and `load_state`."""
        super().__init__()
        table = {tensor.name: tensor for tensor in tensor_table(model)}

        def param(name: str) -> Tensor:
            empty = torch.empty(table[name].shape, dtype=torch.float32, device=device)
            return nn.Parameter(empty) if table[name].trained else empty

        def block(i: int, kind: str) -> Block:
            return Block(model, kind, lambda name: param(f"blocks.{i}.{name}"))

        self.embedding = Embedding(param("embedding.weight"))
        self.blocks = nn.ModuleList(block(i, kind) for i, kind in enumerate(layer_kinds(model)))
        self.final_norm = RMSNorm(param("final_norm.scale"), model.norm_eps)
        if not model.tie_embeddings:
            self.head = Embedding(param("head.weight"))
        self.model = model

    def forward(
        self,
        inputs_BT: Tensor,
        segments_BT: Tensor,
        positions_BT: Tensor,
        *,
        dtype: torch.dtype,
        mode: Mode = CAUSAL,
        remat: bool = False,
        draw: Draw | None = None,
        caches: list[Cache] | None = None,
        written_BT: Tensor | None = None,
    ) -> tuple[Tensor, Metrics, list[Cache] | None]:
        """The last hidden state, normed [B, T, D] in `dtype`, with metrics, and with caches when given some.

        Args:
            inputs_BT, segments_BT, positions_BT: token ids, documents from 0 and positions within them, int64. A position of
                segment -1 is empty: it takes no part in routing, and no other sees it.
            dtype: of activations and of the parameters as they are used.
            mode: how layers route. In training dropout and jitter need `draw`: what a row draws depends on nothing else,
                neither micro-batches nor the devices.
            remat: recompute each layer in the backward pass.
            caches: from `make_caches`: what each row's tokens follow, all in one document. They are changed in place.
            written_BT: with caches: the tokens that count; the others are filling, and neither cached nor seen.
        """
        x_BTD = F.embedding(inputs_BT, self.embedding.weight.to(dtype))
        if self.model.scale_embeddings:
            wide = torch.promote_types(dtype, torch.float32)
            x_BTD = x_BTD * torch.tensor(math.sqrt(self.model.d_model), dtype=wide).to(dtype).item()
        places = Places(segments_BT, positions_BT)
        by_layer: list[Metrics] = []
        for number, block in enumerate(self.blocks):
            of_layer = (number, replace(draw, layer=number) if draw else None, caches[number] if caches else None, written_BT)
            if remat and torch.is_grad_enabled():
                x_BTD, metrics = checkpoint(block, x_BTD, places, mode, *of_layer, use_reentrant=False)
            else:
                x_BTD, metrics = block(x_BTD, places, mode, *of_layer)
            by_layer.append(metrics)
        return self.final_norm(x_BTD), _stacked(by_layer), caches

    def head_DV(self, dtype: torch.dtype) -> Tensor:
        """The output projection [D, V]."""
        return (self.embedding.weight.T if self.model.tie_embeddings else self.head.weight).to(dtype)


def _stacked(by_layer: list[Metrics]) -> Metrics:
    """One tensor a name, over the layers that have it."""
    joined: Metrics = {}
    for group in ("moe", "mod"):
        having = [metrics[group] for metrics in by_layer if group in metrics]
        if having:
            joined[group] = {name: torch.stack([metrics[name] for metrics in having]) for name in having[0]}
    return joined


def make_caches(model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device | str) -> list[Cache]:
    """Empty key/value caches, one a layer; each grows with what it holds."""
    return [Cache(batch, model.num_kv_heads, model.head_dim, dtype, device) for _ in range(model.num_layers)]


def create(model: ModelConfig, seed: int, device: torch.device | str = "cpu") -> Transformer:
    """Initialise. A tensor's values depend on the seed and its canonical name, and on no device."""
    transformer = Transformer(model, device)
    load_state(transformer, dict(initial_values(model, seed)))
    return transformer


def initial_values(model: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """What `create` sets, on the host, by canonical name in the order of the table, one at a time."""
    for tensor in tensor_table(model):
        if tensor.std is None:
            yield tensor.name, torch.full(tensor.shape, tensor.constant)
        else:
            # The generator takes 32 bits and ignores the rest.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {tensor.name}".encode()))
            yield tensor.name, tensor.std * torch.randn(tensor.shape, generator=generator)


def state_by_name(transformer: Transformer) -> dict[str, Tensor]:
    """Parameters and router biases under their canonical names, in the order of the table."""
    named = {**dict(transformer.named_parameters()), **dict(transformer.named_buffers())}
    return {tensor.name: named[tensor.name] for tensor in tensor_table(transformer.model)}


def load_state(transformer: Transformer, named: dict[str, Any]) -> None:
    """Copy arrays or tensors in by canonical name; raises ValueError for one that is missing, unknown or does not fit."""
    own = state_by_name(transformer)
    for name in sorted(own.keys() | named.keys()):
        given = (tuple(named[name].shape), str(named[name].dtype).removeprefix("torch.")) if name in named else "missing"
        wanted = (tuple(own[name].shape), "float32") if name in own else "no such tensor"
        if given != wanted:
            raise ValueError(f"{name}: is {given}, the model needs {wanted}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(torch.tensor(np.asarray(named[name])))
