"""Canonical directories of tiny random models, which stand for runs, and their tokenizer."""

import functools
from pathlib import Path

import numpy as np

from lumina.config import Config, DataConfig, OptimConfig, TrainConfig, validate
from lumina.data.sources import held_out_texts
from lumina.interchange.exporting import write_canonical
from lumina.interchange.state import State
from lumina.tokenizer import train_bpe
from tests.lumina.interchange.oracle import random_tensors

V, T = 300, 24
DATA = DataConfig(source="synthetic", sequence_length=T, held_out=0.2)


@functools.cache
def tokenizer():
    return train_bpe(held_out_texts(DataConfig(source="synthetic", held_out=0.1)), V)


def run_of(directory: Path, model, whole=False, data=DATA):
    """A directory with this model, its vocabulary made that of the tokenizer; with moments if `whole`. Returns its state."""
    model.vocab_size = V
    config = validate(Config(model=model, data=data, train=TrainConfig(steps=9), optim=OptimConfig(warmup_steps=0)))
    weights = random_tensors(model)
    state = State(5, weights)
    if whole:
        trained = {name: tensor for name, tensor in weights.items() if not name.endswith(".moe.bias")}
        state.first_moment = {name: 0.5 * tensor for name, tensor in trained.items()}
        state.second_moment = {name: tensor**2 for name, tensor in trained.items()}
        state.updates, state.losses_W = 5, np.array([1.5, np.nan], np.float32)
    directory.mkdir(parents=True)
    write_canonical(directory, config, state, tokenizer(), {"step": 5})
    return state
