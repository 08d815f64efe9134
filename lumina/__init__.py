"""What both backends share: config, architecture, tokenizer, data, runs. Never imports jax, flax or torch."""

__version__ = "0.1.0"
