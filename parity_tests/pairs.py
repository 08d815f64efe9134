"""The same model in both frameworks, and how far apart two sets of tensors are.

B rows, T positions, L layers, k choices of experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pytest
import torch

import lumina_torch.mod
import lumina_torch.moe
import lumina_torch.step
from lumina.architecture import layer_kinds
from lumina.config import Config
from lumina_jax.model import Mode, by_canonical_name, merge
from lumina_jax.step import TrainState, init_state, state_shapes
from lumina_torch.model import load_state, state_by_name
from tests.lumina_jax.tiny import T, packed_batch, random_batch, tiny

CASES = {
    "dense": tiny("dense"),
    "moe top-1, capacity": tiny("moe", moe={"top_k": 1, "capacity_factor": 1.25}),
    "moe top-1, dropless": tiny("moe", moe={"top_k": 1, "dispatch": "dropless"}),
    "moe top-2, capacity": tiny("moe", moe={"bias_rate": 0.01}),
    "moe top-2, dropless": tiny("moe", moe={"dispatch": "dropless"}),
    "mod": tiny("dense+mod"),
    "mod of blocks": tiny("dense+mod", mod={"scope": "block"}),
    "hybrid": tiny("moe+mod"),
    "hybrid of blocks, dropless": tiny("moe+mod", moe={"dispatch": "dropless"}, mod={"scope": "block"}),
}


# XLA compiles the same program without LLVM's optimisations, in half the time: for what is compiled to run a few times.
QUICK = {"xla_backend_optimization_level": 0}


def patterned_batch(seed: int, packed: bool = False) -> dict[str, np.ndarray]:
    """Rows that can be learned, each token but one in ten told by the one before it: on noise alone rounding grows a
    thousandfold in 200 steps, as it does wherever a model learns by heart. Some of `packed` ones end in empty positions."""
    rng, rows = np.random.default_rng(seed), 4
    tokens = np.zeros((rows, T + 1), np.int32)
    tokens[:, 0] = rng.integers(0, 40, rows)
    for place in range(T):
        surprise = rng.random(rows) < 0.1
        tokens[:, place + 1] = np.where(surprise, rng.integers(0, 40, rows), (7 * tokens[:, place] + 3) % 40)
    batch = packed_batch(rows) if packed else random_batch(rows)
    return batch | {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def in_float64(state: TrainState, twin: lumina_torch.step.TrainState) -> TrainState:
    """Both states with parameters and moments in float64; PyTorch's is changed."""
    twin.transformer.double()
    return jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, state)


def pair(config: Config) -> tuple[Any, TrainState, lumina_torch.step.TrainState]:
    """(graph definition, JAX's state, PyTorch's state with the same weights)."""
    graphdef = state_shapes(config)[1]
    state = jax.jit(lambda: init_state(config)[1], compiler_options=QUICK)()
    twin = lumina_torch.step.init_state(config)
    load_state(twin.transformer, named(config, state))
    return graphdef, state, twin


def named(config: Config, state: TrainState) -> dict[str, np.ndarray]:
    """JAX's parameters and router biases by canonical name."""
    variables = jax.device_get(state.variables)
    trees = (by_canonical_name(config.model, tree) for tree in (variables.params, variables.biases))
    return {name: np.array(array) for tree in trees for name, array in tree.items()}


def twin_named(twin: lumina_torch.step.TrainState) -> dict[str, np.ndarray]:
    """PyTorch's."""
    return {name: tensor.detach().numpy().copy() for name, tensor in state_by_name(twin.transformer).items()}


def distance(ours: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> float:
    """Relative L2 of all tensors together."""
    assert ours.keys() == others.keys()
    away = sum(float(np.sum((ours[n].astype(np.float64) - others[n]) ** 2)) for n in ours)
    return (away / sum(float(np.sum(array.astype(np.float64) ** 2)) for array in others.values())) ** 0.5


# ------------------------------------------------------------------------------------------------------------- routing


def make_decisions(graphdef: Any, dtype: Any) -> Any:
    """decisions(state, batch) -> what JAX's training step is about to choose, and how nearly it chose otherwise."""

    def decisions(variables: Any, batch: dict[str, Any]) -> dict[str, Any]:
        rows = (batch["inputs"], batch["segments"], batch["positions"])
        mode = Mode(training=True, top=True, tell=True)
        metrics = merge(graphdef, variables)(*rows, dtype=dtype, mode=mode)[1]
        return {name: value for group in metrics.values() for name, value in group.items() if np.ndim(value) > 2}

    compiled = jax.jit(decisions, compiler_options=QUICK)
    return lambda state, batch: jax.device_get(compiled(state.variables, batch))


class Router:
    """Stands in for PyTorch's routing decisions during a step: takes JAX's, or compares its own with them."""

    def __init__(self, config: Config, replay: bool):
        self.config, self.replay = config, replay
        self.decided = self.flipped = 0
        # How far from a tie the first decision that differed was, and all of them at most: with `replay` both frameworks are at
        # the same place at each, otherwise the first flip leads to others.
        self.first_flip = self.widest_flip = 0.0
        self._expected: Iterator[tuple[str, np.ndarray, np.ndarray]]
        self._index_BC: torch.Tensor | None = None

    def expect(self, told: dict[str, np.ndarray]) -> None:
        """What the next step is to choose, in the order in which it will: micro-batches, layers, depth before experts."""
        M, order = self.config.train.micro_batches, []
        for m in range(M):
            depth = experts = 0
            for kind in layer_kinds(self.config.model):
                if kind.endswith("+mod"):
                    order.append(("depth", told["taken_BT"][depth, m::M], told["logit_BT"][depth, m::M]))
                    depth += 1
                if kind.startswith("moe"):
                    order.append(("experts", told["experts_BTk"][experts, m::M], told["margin_BT"][experts, m::M]))
                    experts += 1
        self._expected = iter(order)

    def finished(self) -> bool:
        """Whether the step has asked for every decision."""
        return next(self._expected, None) is None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """PyTorch's selections are this one's."""
        own_top, own_select = lumina_torch.moe.top, lumina_torch.mod.select_top

        def select_top(wish_BT: torch.Tensor, count: int) -> torch.Tensor:
            of, taken_BT, logits_BT = next(self._expected)
            assert of == "depth"
            self._index_BC = own_select(wish_BT, count)
            own_BT = np.any(self._index_BC.numpy()[:, :, None] == np.arange(taken_BT.shape[1]), axis=1)
            real_BT = np.isfinite(wish_BT.numpy())
            last_B1 = np.sort(np.where(real_BT, logits_BT, -np.inf), axis=1)[:, -count, None]
            gap_BT = np.where(real_BT, np.abs(logits_BT - last_B1), 0) / np.abs(logits_BT).max()
            self._count(own_BT != taken_BT, gap_BT)
            if self.replay:
                order_BT = np.argsort(~taken_BT, axis=1, kind="stable")[:, :count]  # those taken, in temporal order
                self._index_BC = torch.tensor(np.where(np.take_along_axis(taken_BT, order_BT, axis=1), order_BT, -1))
            return self._index_BC

        def top(x_BNA: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
            values, own_BNk = own_top(x_BNA, count)
            of, experts_BTk, margin_BT = next(self._expected)
            assert of == "experts"
            if self._index_BC is None or own_BNk.shape[:2] == experts_BTk.shape[:2]:
                experts_BNk, margin_BN = experts_BTk, margin_BT
            else:
                index_BC = self._index_BC.numpy()
                experts_BNk = np.take_along_axis(experts_BTk, np.maximum(index_BC, 0)[:, :, None], axis=1)
                experts_BNk = np.where(index_BC[:, :, None] >= 0, experts_BNk, -1)
                margin_BN = np.take_along_axis(margin_BT, np.maximum(index_BC, 0), axis=1)
            # By JAX; where depth differed, and in empty positions, there is nothing to compare.
            taken_BN = experts_BNk[:, :, 0] >= 0
            self._count(np.any(own_BNk.numpy() != experts_BNk, axis=2) & taken_BN, margin_BN)
            replayed_BNk = np.where(taken_BN[:, :, None], experts_BNk, own_BNk.numpy())
            return values, torch.tensor(replayed_BNk).long() if self.replay else own_BNk

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lumina_torch.moe, "top", top)
            patch.setattr(lumina_torch.mod, "select_top", select_top)
            yield

    def _count(self, flips: np.ndarray, margins: np.ndarray) -> None:
        self.decided += flips.size
        self.flipped += int(flips.sum())
        if flips.any():
            widest = float(margins[flips].max())
            self.first_flip, self.widest_flip = self.first_flip or widest, max(widest, self.widest_flip)
