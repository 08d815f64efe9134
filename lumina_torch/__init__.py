"""The mirror: the same model and the same training in PyTorch, file for file beside `lumina_jax`."""
