"""b1: a hybrid of Mixture-of-Experts and Mixture-of-Depths, 8 experts, top-1, in every layer.

    python -m lumina_jax.train --config configs/b1.py --workdir runs/b1

Parameters: 991 M mean active, 1.24 B most active, 8.11 B total.
Memory, 1 row at a time: weights 30.2 GiB, gradients 60.4 GiB, optimizer 60.4 GiB, activations 435 MiB, temporaries 2.59 GiB.
Steps: about 20 tokens a mean active parameter, 19.9 B in all. Give it as much text with --config.data.source.
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
        d_model=1536,
        num_layers=16,
        num_heads=12,
        num_kv_heads=4,
        head_dim=128,
        d_ff=13312,
        rope_theta=10_000.0,
        moe=MoEConfig(pattern="all", num_experts=8, top_k=1),
        mod=MoDConfig(pattern="all", capacity=0.75),
    )
    data = DataConfig(tokenizer="cl100k_base", sequence_length=2048)
    optim = OptimConfig(learning_rate=0.0004, warmup_steps=2000)
    train = TrainConfig(
        steps=19_000,
        batch_size=512,
        micro_batches=512,
        compute_dtype="bfloat16",
        remat="full",
        eval_every=1000,
        eval_rows=1024,
    )
    mesh, checkpoint = MeshConfig(auto=True), CheckpointConfig(every=1000)
    return as_variant(Config(model, data, optim, train, checkpoint, mesh=mesh), variant)
