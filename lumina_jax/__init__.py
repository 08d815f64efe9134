"""The trainer, in JAX and Flax. Imports lumina, never torch."""
