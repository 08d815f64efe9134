"""b7: a hybrid of Mixture-of-Experts and Mixture-of-Depths, 8 experts, top-1, in every layer.

    python -m lumina_jax.train --config configs/b7.py --workdir runs/b7

Parameters: 6.89 B mean active, 8.60 B most active, 56.5 B total.
Memory, 1 row at a time: weights 211 GiB, gradients 421 GiB, optimizer 421 GiB, activations 2.11 GiB, temporaries 7.57 GiB.
Steps: about 20 tokens a mean active parameter, 138 B in all. Give it as much text with --config.data.source.
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
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        d_ff=17408,
        rope_theta=500_000.0,
        moe=MoEConfig(pattern="all", num_experts=8, top_k=1),
        mod=MoDConfig(pattern="all", capacity=0.75),
    )
    data = DataConfig(tokenizer="cl100k_base", sequence_length=4096)
    optim = OptimConfig(learning_rate=0.0003, warmup_steps=2000)
    train = TrainConfig(
        steps=33_000,
        batch_size=1024,
        micro_batches=1024,
        compute_dtype="bfloat16",
        remat="full",
        eval_every=1000,
        eval_rows=1024,
    )
    mesh, checkpoint = MeshConfig(auto=True), CheckpointConfig(every=1000)
    return as_variant(Config(model, data, optim, train, checkpoint, mesh=mesh), variant)
