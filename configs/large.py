"""large: a dense transformer.

    python -m lumina_jax.train --config configs/large.py --workdir runs/large

Parameters: 1.40 B mean active, 1.40 B most active, 1.40 B total.
Memory, 1 row at a time: weights 5.20 GiB, gradients 10.4 GiB, optimizer 10.4 GiB, activations 926 MiB, temporaries 457 MiB.
Steps: 28.3 B tokens.
Expected result: not measured.
"""

from lumina.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, as_variant


def get_config(variant: str = "") -> Config:
    """The preset; a dense family has no variants."""
    model = ModelConfig(
        vocab_size=50_304,
        d_model=2048,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        d_ff=4864,
    )
    data = DataConfig(tokenizer="gpt2", sequence_length=2048)
    optim = OptimConfig(learning_rate=0.0003, warmup_steps=1000)
    train = TrainConfig(steps=27_000, batch_size=512, micro_batches=512, eval_every=500, remat="full")
    return as_variant(Config(model, data, optim, train, CheckpointConfig(every=500)), variant)
