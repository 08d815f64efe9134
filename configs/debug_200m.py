"""debug_200m: a hybrid of Mixture-of-Experts and Mixture-of-Depths, 32 experts, top-2, in every layer.

    python -m lumina_jax.train --config configs/debug_200m.py --workdir runs/debug_200m

Parameters: 194 M mean active, 454 M most active, 6.12 B total.
Memory, 1 row at a time: weights 22.8 GiB, gradients 45.6 GiB, optimizer 45.6 GiB, activations 192 MiB, temporaries 2.53 GiB.
Steps: about 20 tokens a mean active parameter, 4.19 B in all. Give it as much text with --config.data.source.
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
        d_model=640,
        num_layers=12,
        num_heads=10,
        num_kv_heads=2,
        head_dim=64,
        d_ff=8192,
        rope_theta=10_000.0,
        moe=MoEConfig(pattern="all", num_experts=32, top_k=2),
        mod=MoDConfig(pattern="all", capacity=0.3125),
    )
    data = DataConfig(tokenizer="cl100k_base", sequence_length=2048)
    optim = OptimConfig(learning_rate=0.0006, warmup_steps=2000)
    train = TrainConfig(
        steps=8000,
        batch_size=256,
        micro_batches=256,
        compute_dtype="bfloat16",
        remat="full",
        eval_every=1000,
        eval_rows=1024,
    )
    mesh, checkpoint = MeshConfig(auto=True), CheckpointConfig(every=1000)
    return as_variant(Config(model, data, optim, train, checkpoint, mesh=mesh), variant)
