"""Configs of models that compile in seconds, and batches for them.

B rows, T positions, V vocabulary.
"""

from typing import Any

import numpy as np

from lumina.config import (
    Config,
    DataConfig,
    GuardConfig,
    MoDConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
    validate,
)

KINDS = ("dense", "moe", "dense+mod", "moe+mod")
T, V = 16, 300
FILLED = (16, 13, 4, 0)  # tokens of a packed row, by number


def tiny(
    kind: str = "moe+mod", model: Any = (), moe: Any = (), mod: Any = (), optim: Any = (), guard: Any = (), **train: Any
) -> Config:
    """Two layers of `kind`; mappings change fields of the config's parts, keywords those of `train`."""
    routed = {"pattern": "all" if kind.startswith("moe") else "none", "num_experts": 4, "top_k": 2, "capacity_factor": 1.0}
    depth = {"pattern": "all" if kind.endswith("+mod") else "none", "capacity": 0.6}
    sizes = {"vocab_size": V, "d_model": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "d_ff": 24, "num_layers": 2}
    return validate(
        Config(
            model=ModelConfig(
                **(sizes | dict(model)), moe=MoEConfig(**(routed | dict(moe))), mod=MoDConfig(**(depth | dict(mod)))
            ),
            data=DataConfig(sequence_length=T),
            optim=OptimConfig(**({"warmup_steps": 4, "learning_rate": 1e-2} | dict(optim))),
            train=TrainConfig(**({"steps": 40, "batch_size": 4} | train)),
            guard=GuardConfig(**dict(guard)),
        )
    )


def random_batch(rows: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens in two documents a row, all of weight 1."""
    tokens = np.random.default_rng(seed).integers(0, V, (rows, T + 1)).astype(np.int32)
    place = np.arange(T, dtype=np.int32)
    segments = np.broadcast_to((place >= 10).astype(np.int32), (rows, T))
    positions = np.broadcast_to(place - 10 * (place >= 10), (rows, T)).astype(np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((rows, T), np.float32),
        "segments": segments,
        "positions": positions,
    }


def packed_batch(rows: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """As `random_batch`, with fewer tokens in most rows: in some fewer than a depth router selects, in some none at all. Empty
    positions have random tokens too, which nothing may depend on."""
    batch = random_batch(rows, seed)
    real_BT = np.arange(T) < np.resize(FILLED, rows)[:, None]
    return batch | {
        "weights": real_BT.astype(np.float32),
        "segments": np.where(real_BT, batch["segments"], -1).astype(np.int32),
        "positions": np.where(real_BT, batch["positions"], 0).astype(np.int32),
    }
