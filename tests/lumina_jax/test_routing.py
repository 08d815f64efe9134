"""What the routers of a checkpoint decide about held-out text: beside the model's own counts, and beside each token alone.

R rows, T positions, k choices, L layers.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lumina.architecture import layer_kinds
from lumina.data.rows import segments_and_positions
from lumina.runs.directory import RunDirectory
from lumina_jax import checkpoint
from lumina_jax.model import CAUSAL, create, merge
from lumina_jax.routing import TELLING, decisions, look
from tests.lumina_jax.tiny import T, V, random_batch, tiny

END = 7


def rows(count=5, seed=0):
    return np.random.default_rng(seed).integers(0, V, (count, T)).astype(np.int32)


def laid_out(tokens_RT):
    segments_RT, positions_RT = segments_and_positions(tokens_RT, END)
    weights_RT = np.ones(tokens_RT.shape, np.float32)
    return {"inputs": tokens_RT, "segments": segments_RT, "positions": positions_RT, "weights": weights_RT}


def decided(config, tokens_RT):
    graphdef, variables = create(config.model, 0)
    return decisions(config, graphdef, variables, laid_out(tokens_RT), step=3), graphdef, variables


def own_metrics(config, graphdef, variables, tokens_RT):
    """What the model itself tells, of all rows at once."""

    def forward(variables, *rows):
        return merge(graphdef, variables)(*rows, dtype=np.float32, mode=CAUSAL)[1]

    return jax.jit(forward)(variables, tokens_RT, *segments_and_positions(tokens_RT, END))


CASES = {
    "moe": tiny("moe"),
    "mod": tiny("dense+mod"),
    "hybrid": tiny("moe+mod"),
    "block scope": tiny("moe+mod", mod={"scope": "block"}),
    "no-op experts": tiny("moe", moe={"noop_experts": 2}),
    "groups": tiny("moe", moe={"num_groups": 2, "top_groups": 1}),
    "sigmoid": tiny("moe", moe={"score": "sigmoid"}),
    "predictor": tiny("dense+mod", mod={"predictor_width": 4}),
    "random": tiny("dense+mod", mod={"router": "random"}),
    "some layers": tiny("moe+mod", model={"num_layers": 3}, moe={"pattern": "0,2"}, mod={"pattern": "1,2"}),
}


@pytest.mark.parametrize("case", CASES)
def test_choices_add_up_to_the_loads_that_the_model_counts(case):
    config, tokens_RT = CASES[case], rows()
    found, graphdef, variables = decided(config, tokens_RT)
    metrics = own_metrics(config, graphdef, variables, tokens_RT)
    kinds = layer_kinds(config.model)
    assert len(found.experts_LRTk) == sum(kind.startswith("moe") for kind in kinds)
    assert len(found.taken_LRT) == sum(kind.endswith("mod") for kind in kinds)
    assert found.step == 3
    if "moe" in metrics:
        A = config.model.moe.num_experts + config.model.moe.noop_experts
        load_LRA = (found.experts_LRTk[..., None] == np.arange(A)).sum(axis=(2, 3))
        assert np.array_equal(load_LRA, metrics["moe"]["load_BA"])
        assert len(np.unique(found.experts_LRTk)) > 2  # else any order of tokens would do
    if "mod" in metrics:
        assert np.array_equal(found.taken_LRT, metrics["mod"]["taken_BT"])
        assert 0 < found.taken_LRT.mean() < 1


def test_a_choice_is_that_of_its_token_and_not_of_another():
    """In the first layer, with the attention's output at zero, a token's choice depends on the token alone."""
    config = tiny("moe", moe={"top_k": 1})
    graphdef, variables = create(config.model, 0)
    for segment in variables.params["segments"].values():
        for block in segment.values():
            block["attention"]["output"][...] *= 0
    tokens_RT = rows()
    tokens_RT[1] = tokens_RT[0][::-1]
    found = decisions(config, graphdef, variables, laid_out(tokens_RT)).experts_LRTk[0]
    assert np.array_equal(found[1], found[0][::-1])
    assert len(np.unique(found[0])) > 1


@pytest.mark.parametrize("scope", ["ffn", "block"])
def test_a_token_that_skips_a_layer_chooses_no_expert_of_it(scope):
    config = tiny("moe+mod", mod={"scope": scope})
    found, _, _ = decided(config, rows())
    assert ((found.experts_LRTk >= 0).all(axis=-1) == found.taken_LRT).all()
    assert ((found.experts_LRTk >= 0).any(axis=-1) == found.taken_LRT).all()


def test_a_layer_that_no_token_takes_has_no_choices():
    config = tiny("moe+mod")
    graphdef, variables = create(config.model, 0)
    for segment in variables.params["segments"].values():
        for block in segment.values():
            block["mod"]["bias"][...] = block["mod"]["bias"][...] - 1e6
    found = decisions(config, graphdef, variables, laid_out(rows()))
    assert not found.taken_LRT.any()
    assert (found.experts_LRTk == -1).all()


def test_batches_of_any_size_decide_the_same():
    tokens_RT = rows(5)
    whole, _, _ = decided(tiny("moe+mod", batch_size=5), tokens_RT)
    parts, _, _ = decided(tiny("moe+mod", batch_size=4), tokens_RT)
    assert np.array_equal(whole.experts_LRTk, parts.experts_LRTk)
    assert np.array_equal(whole.taken_LRT, parts.taken_LRT)


def test_telling_changes_nothing_that_the_model_computes():
    config, batch = tiny("moe+mod"), random_batch()
    graphdef, variables = create(config.model, 0)
    inputs = [batch[name] for name in ("inputs", "segments", "positions")]
    plain, _, _ = merge(graphdef, variables)(*inputs, dtype=np.float32, mode=CAUSAL)
    told, _, _ = merge(graphdef, variables)(*inputs, dtype=np.float32, mode=TELLING)
    assert np.array_equal(plain, told)


class HeldOutStream:
    """Twenty rows, in which a token is the number of its row."""

    name, num_tokens = "held_out", 20 * T + 1

    def read(self, start, stop):
        return (np.arange(start, stop) // T).astype(np.int32)


@pytest.mark.parametrize(("rows", "numbers"), [(3, [0, 9, 19]), (1, [0]), (99, list(range(20)))])
def test_rows_are_spread_over_the_held_out_text_and_read_with_the_checkpoint_that_was_asked_for(rows, numbers, monkeypatch):
    config, asked = tiny("moe+mod"), []
    opened = (config, *create(config.model, 0), 40)
    monkeypatch.setattr(checkpoint, "open_model", lambda path, best: (asked.append(best), opened)[1])
    corpus = SimpleNamespace(kind="text", held_out=HeldOutStream(), document_end_id=END)
    found = look(RunDirectory("nowhere"), config, corpus, rows, best=True)
    assert asked == [True]
    assert found.step == 40
    assert found.tokens_RT[:, 0].tolist() == numbers
    assert found.tokens_RT.shape == (len(numbers), T)
