"""What two processes do together for test_zero.py: python zero_worker.py OUT, started twice with RANK 0 and 1.

Everything is done in one start, as that takes longest; OUT/told-RANK.json and the states below OUT are what the tests look at.
"""

import copy
import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch

from lumina.config import load as load_config
from lumina.errors import ConfigError
from lumina.interchange.state import State, read, write
from lumina_torch.device import choose_device, fetch
from lumina_torch.processes import agreed, in_any, place_of, require_same
from lumina_torch.step import controls
from lumina_torch.train import train_and_evaluate
from lumina_torch.zero import Zero, join, make_shared_eval_step, make_train_step
from tests.lumina.interchange.states import every_kind
from tests.lumina_jax.tiny import T, V, packed_batch, tiny

STEPS, HALF, ROWS = 10, 5, 4
OPTIM = {"learning_rate": 1e-3, "clip_norm": 0.5}
TOKEN_BYTES = np.arange(V) % 7
STAGES = (0, 1, 2, 3)


def cases():
    """Configs by name: of the four kinds of layers, and what else may differ between one process and several."""
    made = {
        "hybrid": every_kind(
            optim=OPTIM,
            model={"dropout": 0.1},
            moe={"jitter": 0.1, "bias_rate": 0.01, "balance_over": "batch", "balance_weight": 0.1},
            micro_batches=2,
        ),
        "moe": tiny(
            "moe",
            optim=OPTIM,
            model={"tie_embeddings": False, "d_model": 18},
            moe={"balance_over": "micro_batch", "balance_weight": 0.1, "shared_experts": 1, "dispatch": "dropless"},
            remat="full",
        ),
        "mod": tiny("dense+mod", optim=OPTIM, mod={"scope": "block", "predictor_weight": 0.1}, micro_batches=2),
    }
    for config in made.values():
        config.torch.deepspeed.bucket_size = 2000  # several buckets
    return made


def batch(step):
    """Rows of very different weight: a mean of processes' means would be far off."""
    packed = packed_batch(ROWS, seed=step)
    weights = np.random.default_rng(step).uniform(0, 1, (ROWS, T)) * np.array([[8], [1], [0.1], [3]])
    return packed | {"weights": (weights * packed["weights"]).astype(np.float32)}


def own(place, whole):
    rows = ROWS // place.processes
    return {name: array[place.number * rows : (place.number + 1) * rows] for name, array in whole.items()}


def numbers(tree):
    return {k: numbers(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree).tolist()


def run(place, zero, state, first, last, told, **turned):
    step = make_train_step(zero, TOKEN_BYTES)
    for number in range(first, last):
        state, metrics = step(state, own(place, batch(number)), controls(zero.config)._replace(**turned))
        told.append(numbers(fetch(metrics)))
    return state


def keep(zero, state, path):
    host = zero.to_state(state)
    if host is not None:
        path.mkdir(parents=True)
        write(path, host)


def bytes_held():
    """Of all tensors of this process, each storage once."""
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def memory(policy, place, stage):
    """Bytes a parameter at the fullest moment that can be looked at: gradients are summed, nothing is updated."""
    gc.collect()
    before, found = bytes_held(), []
    sizes = {"d_model": 64, "d_ff": 256, "num_layers": 4}
    config = tiny("moe", model=sizes, remat="full")
    config.torch.deepspeed.bucket_size = 10_000
    zero = Zero(config, policy, place, stage)
    norm_of = zero.gate.norm_of
    zero.gate.norm_of = lambda: found.append(bytes_held()) or norm_of()
    run(place, zero, zero.fresh(), 0, 1, [])
    zero.engine.destroy()
    return (found[0] - before) / sum(tensor.size for tensor in zero.table.values())


def refused_updates(place, zero, told):
    """A loss that is not finite, a gradient that is not, a batch that is passed over; then a step like any other."""
    state = zero.fresh()
    step = make_train_step(zero)
    before = zero.to_state(state)
    infinite = batch(0) | {"weights": np.full((ROWS, T), np.inf, np.float32)}
    for whole, turned in ((infinite, {}), (batch(0), {"z_weight": float("inf")}), (batch(0), {"update": False})):
        state, metrics = step(state, own(place, whole), controls(zero.config)._replace(**turned))
        told.append({"skipped": int(metrics["skipped"]), "finite": bool(np.isfinite(float(metrics["gradient_norm"])))})
        after = zero.to_state(state)
        if before is not None:
            same = [
                np.array_equal(getattr(before, p)[n], a)
                for p in ("weights", "first_moment")
                for n, a in getattr(after, p).items()
            ]
            told[-1] |= {"same": all(same), "updates": after.updates}
    asked = np.full(1, place.number, np.int32)  # the second was asked to stop
    state, metrics = step(state, own(place, batch(0)), controls(zero.config, stop_N=asked))
    told.append({name: float(metrics[name]) for name in ("skipped", "gradient_norm", "stop")})


def main(out):
    """Everything, in one order for both processes."""
    torch.set_num_threads(1)
    place, told = place_of(), {}
    policy = choose_device(tiny())
    join(policy, place)
    told["agreed"] = [
        agreed(each, policy.device) for each in (place.number == 0, place.number, None if place.number == 0 else 5)
    ]
    told["in_any"] = [in_any(place.number == 1, policy.device), in_any(False, policy.device)]
    for name, digest in (("same", "00" * 32), ("different", f"0{place.number}" * 32)):
        try:
            told[name] = require_same("the data", digest, policy.device)
        except ConfigError as error:
            told[name] = str(error)
    for stage in STAGES:
        told[f"memory {stage}"] = memory(policy, place, stage)
        for name, config in cases().items():
            zero = Zero(config, policy, place, stage)
            history = told.setdefault(f"{name} {stage}", [])
            state = run(place, zero, zero.fresh(), 0, HALF, history)
            keep(zero, state, out / f"{name} {stage} {HALF}")
            state = run(place, zero, state, HALF, STEPS, history)
            keep(zero, state, out / f"{name} {stage} {STEPS}")
            if name == "hybrid":
                eval_step = make_shared_eval_step(zero, TOKEN_BYTES)
                told[f"eval {stage}"] = numbers(fetch(eval_step(state.transformer, own(place, batch(0)))))
                told[f"copied {stage}"] = (transformer := zero.copy()) is not None and float(transformer.embedding.weight.sum())
                # The state at half the steps, written at stage 2, goes on at this one.
                if stage != 2:
                    half = out / f"{name} 2 {HALF}" if stage == 3 else out / "begin"
                    begun = zero.load(read(half) if place.number == 0 else None)
                    run(place, zero, begun, HALF, STEPS, told.setdefault(f"resumed {stage}", []))
                    keep(zero, begun, out / f"resumed {stage}")
                else:
                    weights = State(7, read(out / "begin").weights) if place.number == 0 else None
                    keep(zero, zero.load(weights), out / "weights alone")
            zero.engine.destroy()
        zero = Zero(cases()["moe"], policy, place, stage)
        refused_updates(place, zero, told.setdefault(f"refused {stage}", []))
        zero.engine.destroy()
    for stage in (2, 3):
        config = copy.deepcopy(cases()["moe"])
        config.torch.deepspeed.offload_optimizer = "cpu"
        zero = Zero(config, policy, place, stage)
        state = run(place, zero, zero.fresh(), 0, STEPS, told.setdefault(f"offload {stage}", []))
        keep(zero, state, out / f"offload {stage}")
        zero.engine.destroy()
    for stage, dtype in ((3, "bfloat16"), (2, "float16")):
        config = copy.deepcopy(cases()["moe"])
        config.train.compute_dtype, config.torch.loss_scale = dtype, 2.0**60
        zero = Zero(config, policy, place, stage)
        run(place, zero, zero.fresh(), 0, 3, told.setdefault(f"{dtype} {stage}", []))
        zero.engine.destroy()
    (out / f"told-{place.number}.json").write_text(json.dumps(told))
    for steps, stage in ((3, "2"), (6, "3")):
        config = load_config(str(out / "config.json"))
        config.train.steps, config.torch.deepspeed.zero_stage = steps, stage
        assert train_and_evaluate(config, out / "run") == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
