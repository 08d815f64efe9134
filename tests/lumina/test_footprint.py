"""What a training step holds on a device, against sums done another way."""

import pytest

from lumina.architecture import counts
from lumina.config import PRESET_DIRECTORY, Config, DataConfig, ModelConfig, load, presets
from lumina.footprint import footprint
from lumina.runs.units import gib, si

PRESETS = [name for name in presets() if name != "auto"]


@pytest.mark.parametrize("name", PRESETS)
def test_receipts_state_the_computed_figures(name):
    config = load(name)
    count, needed = counts(config), footprint(config)
    rows = config.train.batch_size // config.train.micro_batches
    receipt = (
        f"Parameters: {si(count.mean_active)} mean active, {si(count.most_active)} most active, {si(count.total)} total.\n"
        f"Memory, {rows} row{'s' if rows > 1 else ''} at a time: weights {gib(needed.parameters)}, "
        f"gradients {gib(needed.gradients)}, optimizer {gib(needed.optimizer)}, activations {gib(needed.activations)}, "
        f"temporaries {gib(needed.temporaries)}.\n"
    )
    docstring = (PRESET_DIRECTORY / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
    assert receipt in docstring, f"if the change was meant, configs/{name}.py should say:\n{receipt}"


def test_one_device_holds_weights_gradients_and_two_moments():
    config = Config(ModelConfig(), DataConfig())
    total, needed = counts(config).total, footprint(config)
    assert (needed.parameters, needed.gradients, needed.optimizer) == (4 * total, 4 * total, 8 * total)
    config.train.micro_batches = 2
    assert footprint(config).gradients == 8 * total
