"""b50: a hybrid of Mixture-of-Experts and Mixture-of-Depths, 8 experts, top-1, in every layer.

    python -m lumina_jax.train --config configs/b50.py --workdir runs/b50

Parameters: 50.1 B mean active, 59.2 B most active, 400 B total.
Memory, 1 row at a time: weights 1491 GiB, gradients 2982 GiB, optimizer 2982 GiB, activations 193 GiB, temporaries 52.2 GiB.
Steps: about 20 tokens a mean active parameter, 999 B in all. Give it as much text with --config.data.source.
Expected result: not measured.
"""

from lumina.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    MoDConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
    as_variant,
)


def get_config(variant: str = "") -> Config:
    """The preset, or its variant dense, moe or mod."""
    model = ModelConfig(
        vocab_size=100_352,
        d_model=8192,
        num_layers=64,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        d_ff=30976,
        rope_theta=10_000_000.0,
        moe=MoEConfig(pattern="all", num_experts=8, top_k=1),
        mod=MoDConfig(pattern="all", capacity=0.8125),
    )
    data = DataConfig(tokenizer="cl100k_base", sequence_length=128_000)
    optim = OptimConfig(learning_rate=0.00015, warmup_steps=2000)
    train = TrainConfig(
        steps=122_000,
        batch_size=64,
        micro_batches=64,
        compute_dtype="bfloat16",
        remat="full",
        eval_every=1000,
        eval_rows=32,
    )
    mesh, checkpoint = MeshConfig(auto=True), CheckpointConfig(every=1000)
    return as_variant(Config(model, data, optim, train, checkpoint, mesh=mesh), variant)
