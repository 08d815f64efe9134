"""small: a dense transformer.

    python -m lumina_jax.train --config configs/small.py --workdir runs/small

Parameters: 85.8 M mean active, 85.8 M most active, 85.8 M total.
Memory, 4 rows at a time: weights 327 MiB, gradients 655 MiB, optimizer 655 MiB, activations 2.95 GiB, temporaries 379 MiB.
Steps: 1.84 B tokens.
Expected result: not measured.
"""

from lumina.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, as_variant


def get_config(variant: str = "") -> Config:
    """The preset; a dense family has no variants."""
    model = ModelConfig(
        vocab_size=50_304,
        d_model=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        d_ff=1024,
    )
    data = DataConfig(tokenizer="gpt2", sequence_length=1024)
    optim = OptimConfig(learning_rate=0.0006, warmup_steps=1000)
    train = TrainConfig(steps=7000, batch_size=256, micro_batches=64, eval_every=500)
    return as_variant(Config(model, data, optim, train, CheckpointConfig(every=500)), variant)
