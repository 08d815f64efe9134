"""tiny: a dense transformer.

    python -m lumina_jax.train --config configs/tiny.py --workdir runs/tiny

Parameters: 5.77 M mean active, 5.77 M most active, 5.77 M total.
Memory, 8 rows at a time: weights 22 MiB, gradients 44 MiB, optimizer 44 MiB, activations 720 MiB, temporaries 72 MiB.
Steps: 16.4 M tokens.
Expected result: not measured.
"""

from lumina.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, as_variant


def get_config(variant: str = "") -> Config:
    """The preset; a dense family has no variants."""
    model = ModelConfig(
        vocab_size=4096,
        d_model=256,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        d_ff=768,
    )
    data = DataConfig(sequence_length=512)
    optim = OptimConfig(learning_rate=0.002, warmup_steps=200)
    train = TrainConfig(steps=2000, batch_size=16, micro_batches=2, eval_every=500)
    return as_variant(Config(model, data, optim, train, CheckpointConfig(every=500)), variant)
