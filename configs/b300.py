"""b300: a hybrid of Mixture-of-Experts and Mixture-of-Depths, 8 experts, top-1, in every layer.

    python -m lumina_jax.train --config configs/b300.py --workdir runs/b300

Parameters: 302 B mean active, 391 B most active, 2.37 T total.
Memory, 1 row at a time: weights 8839 GiB, gradients 17678 GiB, optimizer 17678 GiB, activations 1113 GiB, temporaries 135 GiB.
Steps: about 20 tokens a mean active parameter, 6.04 T in all. Give it as much text with --config.data.source.
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
        d_model=20480,
        num_layers=120,
        num_heads=160,
        num_kv_heads=8,
        head_dim=128,
        d_ff=38400,
        rope_theta=10_000_000.0,
        moe=MoEConfig(pattern="all", num_experts=8, top_k=1),
        mod=MoDConfig(pattern="all", capacity=0.6875),
    )
    data = DataConfig(tokenizer="cl100k_base", sequence_length=204_800)
    optim = OptimConfig(learning_rate=8e-05, warmup_steps=2000)
    train = TrainConfig(
        steps=307_000,
        batch_size=96,
        micro_batches=96,
        compute_dtype="bfloat16",
        remat="full",
        eval_every=1000,
        eval_rows=20,
    )
    mesh, checkpoint = MeshConfig(auto=True), CheckpointConfig(every=1000)
    return as_variant(Config(model, data, optim, train, checkpoint, mesh=mesh), variant)
