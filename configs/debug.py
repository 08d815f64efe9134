"""debug: a hybrid of Mixture-of-Experts and Mixture-of-Depths, 8 experts, top-1, in all layers: three minutes on two cores.

    python -m lumina_jax.train --config configs/debug.py --workdir runs/debug

Parameters: 494 K mean active, 699 K most active, 3.97 M total.
Memory, 8 rows at a time: weights 15 MiB, gradients 15 MiB, optimizer 30 MiB, activations 40 MiB, temporaries 17 MiB.
Expected result: held-out bits per byte 1.691 (kinds of CPU round differently) on the standard library of Python 3.11.7,
where gzip -9 needs 2.05 and xz -9 1.81; three to four minutes on two x86-64 cores.
"""

from lumina.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    MoDConfig,
    ModelConfig,
    MoEConfig,
    MonitorConfig,
    OptimConfig,
    TrainConfig,
    as_variant,
)


def get_config(variant: str = "") -> Config:
    """The preset, or its variant dense, moe or mod."""
    model = ModelConfig(
        vocab_size=1024,
        d_model=128,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        d_ff=608,
        embedding_std=0.1,
        moe=MoEConfig(pattern="all", num_experts=8, top_k=1, dispatch="dropless"),
        mod=MoDConfig(pattern="all", capacity=0.5625),
    )
    data = DataConfig(sequence_length=256, held_out=0.04)
    optim = OptimConfig(learning_rate=4e-3, schedule="wsd", decay_fraction=0.3, min_ratio=0.0, warmup_steps=50)
    # Many small steps: eight rows at a time also keep the activations in a CPU's cache.
    train = TrainConfig(steps=1500, batch_size=8, eval_every=500)
    monitor = MonitorConfig(log_every=50, sample_every=500)
    return as_variant(Config(model, data, optim, train, CheckpointConfig(every=500), monitor), variant)
