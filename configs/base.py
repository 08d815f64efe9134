"""base: a dense transformer.

    python -m lumina_jax.train --config configs/base.py --workdir runs/base

Parameters: 124 M mean active, 124 M most active, 124 M total.
Memory, 4 rows at a time: weights 474 MiB, gradients 948 MiB, optimizer 948 MiB, activations 4.73 GiB, temporaries 348 MiB.
Steps: 2.49 B tokens.
Expected result: not measured.
"""

from lumina.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, as_variant


def get_config(variant: str = "") -> Config:
    """The preset; a dense family has no variants."""
    model = ModelConfig(
        vocab_size=32_768,
        d_model=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        d_ff=2560,
    )
    data = DataConfig(sequence_length=1024)
    optim = OptimConfig(learning_rate=0.0006, warmup_steps=1000)
    train = TrainConfig(steps=9500, batch_size=256, micro_batches=64, eval_every=500)
    return as_variant(Config(model, data, optim, train, CheckpointConfig(every=500)), variant)
