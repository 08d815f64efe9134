"""b200: a hybrid of Mixture-of-Experts and Mixture-of-Depths, 8 experts, top-1, in every layer.

    python -m lumina_jax.train --config configs/b200.py --workdir runs/b200

Parameters: 202 B mean active, 250 B most active, 1.59 T total.
Memory, 1 row at a time: weights 5919 GiB, gradients 11837 GiB, optimizer 11837 GiB, activations 3844 GiB, temporaries 355 GiB.
Steps: about 20 tokens a mean active parameter, 4.03 T in all. Give it as much text with --config.data.source.
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
        d_model=16384,
        num_layers=100,
        num_heads=128,
        num_kv_heads=8,
        head_dim=128,
        d_ff=38912,
        rope_theta=100_000_000.0,
        moe=MoEConfig(pattern="all", num_experts=8, top_k=1),
        mod=MoDConfig(pattern="all", capacity=0.75),
    )
    data = DataConfig(tokenizer="cl100k_base", sequence_length=1_000_000)
    optim = OptimConfig(learning_rate=0.0001, warmup_steps=2000)
    train = TrainConfig(
        steps=252_000,
        batch_size=16,
        micro_batches=16,
        compute_dtype="bfloat16",
        remat="full",
        eval_every=1000,
        eval_rows=16,
    )
    mesh, checkpoint = MeshConfig(auto=True), CheckpointConfig(every=1000)
    return as_variant(Config(model, data, optim, train, checkpoint, mesh=mesh), variant)
