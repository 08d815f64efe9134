"""b30: a hybrid of Mixture-of-Experts and Mixture-of-Depths, 8 experts, top-1, in every layer.

    python -m lumina_jax.train --config configs/b30.py --workdir runs/b30

Parameters: 30.6 B mean active, 34.2 B most active, 237 B total.
Memory, 1 row at a time: weights 882 GiB, gradients 1765 GiB, optimizer 1765 GiB, activations 8.97 GiB, temporaries 20.7 GiB.
Steps: about 20 tokens a mean active parameter, 612 B in all. Give it as much text with --config.data.source.
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
        d_model=6656,
        num_layers=48,
        num_heads=52,
        num_kv_heads=4,
        head_dim=128,
        d_ff=30208,
        rope_theta=500_000.0,
        moe=MoEConfig(pattern="all", num_experts=8, top_k=1),
        mod=MoDConfig(pattern="all", capacity=0.875),
    )
    data = DataConfig(tokenizer="cl100k_base", sequence_length=8192)
    optim = OptimConfig(learning_rate=0.0002, warmup_steps=2000)
    train = TrainConfig(
        steps=73_000,
        batch_size=1024,
        micro_batches=1024,
        compute_dtype="bfloat16",
        remat="full",
        eval_every=1000,
        eval_rows=512,
    )
    mesh, checkpoint = MeshConfig(auto=True), CheckpointConfig(every=1000)
    return as_variant(Config(model, data, optim, train, checkpoint, mesh=mesh), variant)
