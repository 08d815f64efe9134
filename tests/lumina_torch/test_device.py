"""What each kind of device is asked to do and refuses, decided without having one; and what this one tells of itself."""

import numpy as np
import pytest
import torch

from lumina.config import Config, load, override
from lumina.errors import ConfigError
from lumina_torch.device import (
    be_exact,
    choose_device,
    chosen_forms,
    decide,
    describe,
    fetch,
    matmul_peak,
    peak_memory,
    place,
)

MAC, WORKSTATION, LAPTOP = ("cpu", "mps"), ("cpu", "cuda"), ("cpu",)


@pytest.mark.parametrize(
    ("asked", "available", "kind"),
    [
        ("auto", MAC, "mps"),
        ("auto", WORKSTATION, "cuda"),
        ("auto", (*MAC, "cuda"), "cuda"),
        ("auto", LAPTOP, "cpu"),
        ("cpu", WORKSTATION, "cpu"),
        ("mps", MAC, "mps"),
    ],
)
def test_the_device_is_the_fastest_there_is_or_the_one_asked_for(asked, available, kind):
    assert decide(asked, available, "float32", compile=False).device == torch.device(kind)


@pytest.mark.parametrize(("asked", "available"), [("cuda", MAC), ("mps", WORKSTATION), ("cuda", LAPTOP)])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(asked, available):
    with pytest.raises(ConfigError, match=f"torch.device = '{asked}': not on this machine, which has {available[0]}"):
        decide(asked, available, "float32", compile=False)


@pytest.mark.parametrize("asked", ["auto", "mps"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dtype": "float16"}, "train.compute_dtype = 'float16': not on mps; float32, or bfloat16, would work"),
        ({"compile": True}, "torch.compile = True: not on mps"),
        ({"deepspeed": True}, "torch.deepspeed.zero_stage: DeepSpeed has no mps"),
    ],
)
def test_what_metal_cannot_do_is_refused_before_anything_runs(asked, changes, says):
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        decide(asked, MAC, **({"dtype": "float32", "compile": False} | changes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_metal_works_in_float32_or_bfloat16_without_pinned_copies_and_without_compiling(dtype):
    policy = decide("mps", MAC, dtype, compile=False)
    assert (policy.dtype, policy.compile, policy.pin_memory) == (getattr(torch, dtype), False, False)
    assert policy.notes == ("mps: one process, not compiled, and no float64",)


def test_only_cuda_copies_from_pinned_pages():
    assert [decide(k, ("cpu", "cuda", "mps"), "float32", False).pin_memory for k in ("cpu", "cuda", "mps")] == [0, 1, 0]


def test_float16_on_a_processor_works_and_is_said_to_be_slow():
    assert "slow" in decide("cpu", LAPTOP, "float16", compile=False).notes[0]
    assert not decide("cuda", WORKSTATION, "float16", compile=False).notes


def test_compiling_without_a_compiler_is_refused_and_is_none_of_a_run_that_does_not():
    with pytest.raises(ConfigError, match=r"torch\.compile = True: needs a C\+\+ compiler"):
        decide("cpu", LAPTOP, "float32", compile=True, no_compiler="needs a C++ compiler, and there is no g++")
    assert not decide("cpu", LAPTOP, "float32", compile=False, no_compiler="needs a C++ compiler").compile


def test_a_missing_compiler_is_found_missing(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = override(load("debug"), ["--config.torch.compile=True", "--config.torch.device=cpu"])
    with pytest.raises(ConfigError, match=r"there is no no-such-compiler; False would work"):
        choose_device(config)


def test_a_batch_is_placed_with_integers_of_64_bits_and_weights_as_they_are():
    batch = {"inputs": np.arange(4, dtype=np.int32), "weights": np.ones(4, np.float32), "targets": torch.arange(4)}
    placed = place(batch, torch.device("cpu"))
    assert [tensor.dtype for tensor in placed.values()] == [torch.int64, torch.float32, torch.int64]
    assert placed["inputs"].tolist() == [0, 1, 2, 3]


def test_metrics_are_fetched_as_numpy_whatever_they_are_in():
    tree = {"loss": torch.tensor(1.5, requires_grad=True), "moe": {"load_A": torch.arange(3)}, "half": torch.ones(2).bfloat16()}
    found = fetch(tree)
    assert (found["loss"], found["moe"]["load_A"].tolist(), found["half"].dtype) == (1.5, [0, 1, 2], np.float32)


def test_this_device_describes_itself_and_its_forms():
    config = override(load("debug"), ["--config.torch.device=cpu", "--config.model.moe.dispatch=dropless"])
    policy = choose_device(config)
    assert describe(policy).startswith("1 x cpu (1 threads), torch 2.")
    assert chosen_forms(config, policy).startswith("attention: ")
    assert "dropless experts: " in chosen_forms(config, policy)


def test_peaks_are_of_this_machine():
    assert matmul_peak("float32", seconds=0.01) > 1e8
    assert peak_memory() > 50 << 20


def test_float32_products_are_made_exact():
    torch.set_float32_matmul_precision("high")
    be_exact(decide("cpu", LAPTOP, "float32", compile=False))
    assert torch.get_float32_matmul_precision() == "highest"


def test_compiling_for_capacities_that_fall_is_refused():
    config = Config()
    config.torch.compile, config.model.mod.anneal_steps = True, 5
    with pytest.raises(ConfigError, match=r"torch.compile = True: each of the capacities of model.mod.anneal_steps"):
        choose_device(config)
