"""medium: a dense transformer.

    python -m lumina_jax.train --config configs/medium.py --workdir runs/medium

Parameters: 350 M mean active, 350 M most active, 350 M total.
Memory, 2 rows at a time: weights 1.31 GiB, gradients 2.61 GiB, optimizer 2.61 GiB, activations 429 MiB, temporaries 394 MiB.
Steps: 6.82 B tokens.
Expected result: not measured.
"""

from lumina.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, as_variant


def get_config(variant: str = "") -> Config:
    """The preset; a dense family has no variants."""
    model = ModelConfig(
        vocab_size=50_304,
        d_model=1024,
        num_layers=24,
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
        d_ff=3200,
    )
    data = DataConfig(tokenizer="gpt2", sequence_length=1024)
    optim = OptimConfig(learning_rate=0.0004, warmup_steps=1000)
    train = TrainConfig(steps=13_000, batch_size=512, micro_batches=256, eval_every=500, remat="full")
    return as_variant(Config(model, data, optim, train, CheckpointConfig(every=500)), variant)
