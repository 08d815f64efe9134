"""Plans and counts, against sums done another way."""

import math
import random

import pytest

from lumina import architecture as a
from lumina.config import Config, DataConfig, MoDConfig, ModelConfig, MoEConfig, load, presets

# Mean active and total, as each preset claims them.
CLAIMS = {
    "debug": (0.5e6, 4e6),
    "debug_200m": (200e6, 6e9),
    "b1": (1e9, 8e9),
    "b7": (7e9, 56e9),
    "b14": (14e9, 112e9),
    "b30": (30e9, 240e9),
    "b50": (50e9, 400e9),
    "b100": (100e9, 800e9),
    "b200": (200e9, 1.6e12),
    "b300": (300e9, 2.4e12),
    "small": (86e6, 86e6),
    "base": (124e6, 124e6),
    "medium": (350e6, 350e6),
    "large": (1.4e9, 1.4e9),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_presets_keep_their_claims_within_3_percent(name):
    count = a.counts(load(name))
    assert count.mean_active == pytest.approx(CLAIMS[name][0], rel=0.03)
    assert count.total == pytest.approx(CLAIMS[name][1], rel=0.03)


@pytest.mark.parametrize("name", [p for p in presets() if p != "auto"])
def test_totals_equal_the_sum_over_the_tensor_table(name):
    config = load(name)
    assert a.counts(config).total == sum(math.prod(t.shape) for t in a.tensor_table(config.model) if t.trained)


def by_hand(config: Config) -> tuple[float, float, float, float]:
    """Total, most and mean active parameters and forward FLOPs from a closed formula, for a model of one kind of layer."""
    m, T = config.model, config.data.sequence_length
    moe, mod = m.moe.pattern == "all", m.mod.pattern == "all"
    D, L, V, F = m.d_model, m.num_layers, m.vocab_size, m.d_ff
    attention = D * m.head_dim * (2 * m.num_heads + 2 * m.num_kv_heads)
    c = math.ceil(m.mod.capacity * T) / T if mod else 1.0
    expert = 3 * D * F
    router, depth, norms = (D * m.moe.num_experts if moe else 0), (D + 1 if mod else 0), 2 * D
    outside = V * D + D
    total = outside + L * (attention + norms + depth + router + expert * (m.moe.num_experts if moe else 1))
    used = expert * (m.moe.top_k if moe else 1) + router
    most = outside + L * (attention + norms + depth + used)
    mean = outside + L * (attention + norms + depth + c * used)
    pairs = sum(t + 1 for t in range(T)) / T  # keys that the mean query sees
    flops = 2 * (V * D + L * (attention + (D if mod else 0) + c * used)) + L * 4 * m.num_heads * m.head_dim * pairs
    return total, most, mean, flops


@pytest.mark.parametrize("spec", ["debug", "debug:dense", "debug:moe", "debug:mod", "debug_200m", "b30"])
def test_counts_equal_a_closed_formula(spec):
    config = load(spec)
    count = a.counts(config)
    expected = by_hand(config)
    assert (count.total, count.most_active, count.mean_active, count.forward_flops) == pytest.approx(expected, rel=1e-9, abs=1)
    assert count.training_flops == 3 * count.forward_flops


def test_grouped_queries_and_tied_heads_are_counted_once():
    base = ModelConfig(num_heads=4, num_kv_heads=4)
    grouped = ModelConfig(num_heads=4, num_kv_heads=1)
    untied = ModelConfig(num_heads=4, num_kv_heads=4, tie_embeddings=False)
    total = {name: a.counts(Config(m)).total for name, m in (("base", base), ("grouped", grouped), ("untied", untied))}
    assert total["base"] - total["grouped"] == 2 * 2 * 3 * 128 * 64  # layers, keys and values, three heads fewer
    assert total["untied"] - total["base"] == 1024 * 128
    assert a.counts(Config(untied)).forward_flops == a.counts(Config(base)).forward_flops


def test_shared_experts_and_router_biases_are_counted_as_what_they_are():
    plain = ModelConfig(moe=MoEConfig(pattern="all"))
    shared = ModelConfig(moe=MoEConfig(pattern="all", shared_experts=2))
    more = a.counts(Config(shared)).most_active - a.counts(Config(plain)).most_active
    assert more == 2 * 3 * 128 * 512 * 2
    biases = [t for t in a.tensor_table(plain) if t.name.endswith("moe.bias")]
    assert [(t.shape, t.trained) for t in biases] == [((8,), False)] * 2


def test_exactly_the_matrices_decay():
    for spec in ("debug", "debug:dense"):
        for tensor in a.tensor_table(load(spec).model):
            matrix = not tensor.name.startswith("embedding") and "norm" not in tensor.name and not tensor.name.endswith("bias")
            assert tensor.decayed == matrix, tensor.name
            assert len(tensor.axes) == len(tensor.shape), tensor.name


def test_canonical_names_and_shapes():
    model = ModelConfig(qk_norm=True, tie_embeddings=False, moe=MoEConfig(pattern="1"), mod=MoDConfig(pattern="0"))
    shapes = {t.name: t.shape for t in a.tensor_table(model)}
    assert shapes == {
        "embedding.weight": (1024, 128),
        **{f"blocks.{i}.attention_norm.scale": (128,) for i in (0, 1)},
        **{f"blocks.{i}.attention.query": (128, 2, 64) for i in (0, 1)},
        **{f"blocks.{i}.attention.key": (128, 1, 64) for i in (0, 1)},
        **{f"blocks.{i}.attention.value": (128, 1, 64) for i in (0, 1)},
        **{f"blocks.{i}.attention.output": (2, 64, 128) for i in (0, 1)},
        **{f"blocks.{i}.attention.query_norm.scale": (64,) for i in (0, 1)},
        **{f"blocks.{i}.attention.key_norm.scale": (64,) for i in (0, 1)},
        **{f"blocks.{i}.feedforward_norm.scale": (128,) for i in (0, 1)},
        "blocks.0.feedforward.gate": (128, 512),
        "blocks.0.feedforward.up": (128, 512),
        "blocks.0.feedforward.down": (512, 128),
        "blocks.0.mod.router": (128,),
        "blocks.0.mod.bias": (),
        "blocks.1.moe.router": (128, 8),
        "blocks.1.moe.bias": (8,),
        "blocks.1.moe.experts.gate": (8, 128, 512),
        "blocks.1.moe.experts.up": (8, 128, 512),
        "blocks.1.moe.experts.down": (8, 512, 128),
        "final_norm.scale": (128,),
        "head.weight": (128, 1024),
    }


@pytest.mark.parametrize(
    ("kinds", "plan"),
    [
        ("d" * 120, [(0, "d", 120)]),
        ("dm" * 6, [(0, "dm", 6)]),
        ("dd" + "m" * 8 + "dd", [(0, "d", 2), (2, "m", 8), (10, "d", 2)]),
        ("ddddm" * 3, [(0, "ddddm", 3)]),
        ("d", [(0, "d", 1)]),
    ],
)
def test_plans_compile_the_fewest_layers(kinds, plan):
    assert a.layer_plan(list(kinds)) == [a.Segment(start, tuple(period), repeats) for start, period, repeats in plan]


def test_plans_unroll_to_the_layers_they_were_made_of():
    generator = random.Random(0)
    for _ in range(50):
        kinds = [generator.choice("ab") for _ in range(generator.randint(1, 30))]
        plan = a.layer_plan(kinds)
        assert [kind for segment in plan for kind in segment.kinds * segment.repeats] == kinds
        numbers = [i for s in plan for r in range(s.repeats) for p in range(len(s.kinds)) for i in [s.layers(p)[r]]]
        assert numbers == list(range(len(kinds)))


def test_capacity_rounds_up_and_is_immune_to_binary_fractions():
    assert [a.capacity(30, 0.1), a.capacity(31, 0.1), a.capacity(256, 0.5625), a.capacity(5, 0.01), a.capacity(5, 1.0)] == [
        3,
        4,
        144,
        1,
        5,
    ]


def test_expert_capacity_is_at_most_the_tokens():
    model = ModelConfig(moe=MoEConfig(pattern="all", num_experts=2, top_k=2, capacity_factor=4.0))
    assert a.expert_capacity(model, 10) == 10


# ------------------------------------------------------------------------------------------------- every kind of routing

SMALL = {"vocab_size": 30, "d_model": 10, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "d_ff": 7}
ATTENTION = 10 * 6 * (2 * 4 + 2 * 2)
EXPERT = 3 * 10 * 7


def routed(moe=(), mod=(), T=9):
    model = ModelConfig(**SMALL, moe=MoEConfig(**dict(moe)), mod=MoDConfig(**dict(mod)))
    return Config(model, DataConfig(sequence_length=T))


def test_a_block_that_tokens_skip_is_counted_with_its_attention():
    count = a.counts(routed(mod={"pattern": "all", "capacity": 0.5, "scope": "block"}))
    outside, always, skipped = 30 * 10 + 10, 10 + (10 + 1), ATTENTION + 10 + EXPERT  # a norm and the router; and the rest
    share = 5 / 9
    assert count.total == count.most_active == outside + 2 * (always + skipped)
    assert count.mean_active == round(outside + 2 * (always + share * skipped))
    pairs = sum(range(1, 6)) / 9  # of the 5 that are selected, each sees those before it and itself
    scores = 4 * 4 * 6 * pairs
    matrices = 30 * 10 + 2 * (10 + share * (ATTENTION + EXPERT))
    assert count.forward_flops == round(2 * matrices + 2 * scores)


def test_a_block_takes_no_more_than_its_feed_forward_alone_where_nothing_is_skipped():
    whole, part = (a.counts(routed(mod={"pattern": "all", "capacity": 1.0, "scope": scope})) for scope in ("block", "ffn"))
    assert whole == part


def test_choices_of_nothing_are_routed_to_and_cost_nothing():
    count = a.counts(routed(moe={"pattern": "all", "num_experts": 6, "top_k": 2, "noop_experts": 4}))
    outside, layer = 30 * 10 + 10, 2 * 10 + ATTENTION + 10 * (6 + 4)  # norms, and a router that knows all ten
    assert count.total == outside + 2 * (layer + 6 * EXPERT)
    assert count.most_active == outside + 2 * (layer + 2 * EXPERT)
    assert count.mean_active == outside + round(2 * (layer + 2 * 6 / 10 * EXPERT))
    pairs = sum(range(1, 10)) / 9
    assert count.forward_flops == round(2 * (300 + 2 * (layer - 20 + 1.2 * EXPERT)) + 2 * 4 * 4 * 6 * pairs)
    biases = [t.shape for t in a.tensor_table(routed(moe={"pattern": "0", "noop_experts": 4}).model) if t.name.endswith("bias")]
    assert biases == [(12,)]


def test_a_predictor_is_counted_for_every_token():
    depth = {"pattern": "all", "capacity": 0.5}
    without, with_one = (a.counts(routed(mod=depth | {"predictor_width": width})) for width in (0, 3))
    predictor = 10 * 3 + 3
    assert with_one.total - without.total == 2 * (predictor + 1)
    assert with_one.mean_active - without.mean_active == 2 * (predictor + 1)
    assert with_one.forward_flops - without.forward_flops == 2 * 2 * predictor


def test_experts_in_a_block_that_tokens_skip_are_used_by_the_product_of_both_shares():
    config = routed({"pattern": "all", "num_experts": 6, "top_k": 2, "noop_experts": 4}, {"pattern": "all", "scope": "block"})
    uses = {t.name: a.use_of(t, "moe+mod", config.model, 9) for t in a.tensor_table(config.model) if ".0." in t.name}
    share = 7 / 9  # ceil(0.75 * 9)
    assert uses["blocks.0.moe.experts.up"] == pytest.approx((share * 2 / 10, 2 / 6))
    assert uses["blocks.0.moe.router"] == uses["blocks.0.attention.query"] == pytest.approx((share, 1))
    assert uses["blocks.0.feedforward_norm.scale"] == pytest.approx((share, 1))
    assert uses["blocks.0.attention_norm.scale"] == uses["blocks.0.mod.router"] == (1, 1)


@pytest.mark.parametrize(("steps", "start", "end"), [(8, 1.0, 0.2), (80, 1.0, 0.5), (1000, 0.9, 0.25), (3, 1.0, 0.5)])
def test_an_annealed_capacity_falls_in_stages_from_the_first_to_the_last(steps, start, end):
    mod = MoDConfig(capacity=end, start_capacity=start, anneal_steps=steps)
    values = [a.depth_capacity_at(mod, step) for step in range(steps + 5)]
    assert values[0] == start
    assert values[steps:] == [end] * 5
    assert values[steps - 1] > end
    falls = [i for i in range(1, len(values)) if values[i] != values[i - 1]]
    assert all(values[i] < values[i - 1] for i in falls)
    assert len(falls) == min(8, steps)
    if steps % 8 == 0:
        assert falls == [steps // 8 * n for n in range(1, 9)]
        assert values[steps // 2] == pytest.approx((start + end) / 2)


def test_a_capacity_that_is_not_annealed_is_the_same_in_every_step():
    assert {a.depth_capacity_at(MoDConfig(capacity=0.3), step) for step in (0, 1, 10**6)} == {0.3}
