"""What the routers of a run did: the history, each verdict case by case, warnings while it trains, and typical tokens."""

import copy
import json

import numpy as np
import pytest

from lumina.config import Config, MoDConfig, ModelConfig, MoEConfig, validate
from lumina.runs.directory import RunDirectory
from lumina.runs.routing import RECENT, ExpertWatch, advice, history_of, read_history, summary, verdicts
from lumina.runs.routing_text import by_position, extremes, typical

EVEN = [0.25, 0.25, 0.25, 0.25]
NAN = float("nan")


def config(kind="moe+mod", moe=(), mod=(), **model):
    """Four layers, of which 1 and 3 have what `kind` says, with 4 experts and depth 0.5."""
    routed = {"pattern": "1,3" if "moe" in kind else "none", "num_experts": 4, **dict(moe)}
    depth = {"pattern": "1,3" if "mod" in kind else "none", "capacity": 0.5, **dict(mod)}
    return validate(Config(model=ModelConfig(num_layers=4, moe=MoEConfig(**routed), mod=MoDConfig(**depth), **model)))


def record(step, **changed):
    """A log step of a run in which all is well."""
    well = {
        "moe_load": [EVEN, EVEN],
        "moe_dropped": [0.02, 0.03],
        "moe_entropy": [0.7, 0.8],
        "mod_causal_capacity": [0.52, 0.47],
        "mod_agreement": [0.93, 0.9],
    }
    return {"kind": "train", "step": step, "loss": 2.0, **well, **changed}


def run_of(changes, cfg=None, **always):
    """(history, config) of a run with a record every 100 steps; `changes` is one mapping for each."""
    cfg = cfg or config()
    return history_of([record(100 * (i + 1), **always, **change) for i, change in enumerate(changes)], cfg), cfg


def told(history, cfg):
    """Kinds of the verdicts; and their words."""
    found = verdicts(history, cfg)
    assert advice(history, cfg) == [verdict.says for verdict in found]
    return [verdict.kind for verdict in found], " | ".join(advice(history, cfg))


# ----------------------------------------------------------------------------------------------------------- history


def test_the_history_has_a_row_for_each_layer_that_routes():
    history, _ = run_of([{}, {"moe_dropped": [0.5, 0.25]}])
    assert (history.steps, history.moe_layers, history.mod_layers) == ([100, 200], [1, 3], [1, 3])
    assert history.load_SLA.shape == (2, 2, 4)
    assert history.dropped_SL.tolist() == [[0.02, 0.03], [0.5, 0.25]]
    assert history.agreement_SL.tolist() == [[0.93, 0.9]] * 2


def test_the_busiest_expert_is_over_the_mean_of_the_experts_and_no_ops_are_apart():
    cfg = config(moe={"noop_experts": 2})
    history = history_of([record(1, moe_load=[[0.1, 0.1, 0.3, 0.1, 0.4, 0.0], [0, 0, 0, 0, 0.5, 0.5]])], cfg)
    assert history.peak_SL[0, 0] == pytest.approx(2.0)
    assert np.isnan(history.peak_SL[0, 1])
    assert history.noop_SL.tolist() == [[0.4, 1.0]]


@pytest.mark.parametrize("kind", ["moe", "mod"])
def test_a_run_of_one_kind_of_router_has_no_rows_of_the_other(kind):
    other = "mod" if kind == "moe" else "moe"
    records = [{k: v for k, v in record(s).items() if not k.startswith(other)} for s in range(1, 8)]
    history = history_of(records, cfg := config(kind))
    assert len(history.steps) == 7
    assert (len(history.moe_layers), len(history.mod_layers)) == ((2, 0) if kind == "moe" else (0, 2))
    assert told(history, cfg)[0] == ["healthy"]
    json.dumps(summary(history), allow_nan=False)


def test_records_of_another_shape_or_damaged_are_left_out_and_counted():
    wide = [[0.5, 0.5]] * 2
    records = [record(1, moe_load=wide), record(2, moe_dropped="no"), record(3, mod_agreement=None), record(4), record("5")]
    history = history_of([*records, {"kind": "eval", "step": 4}], config())
    assert (history.steps, history.left_out) == ([4], 4)


def test_a_step_that_was_made_again_counts_once_as_it_was_the_second_time():
    history = history_of([record(2), record(1), record(2, moe_dropped=[0.5, 0.5])], config())
    assert history.steps == [1, 2]
    assert history.dropped_SL.tolist() == [[0.02, 0.03], [0.5, 0.5]]


def test_half_a_line_at_the_end_of_a_killed_run_is_passed_over(tmp_path):
    run = RunDirectory(tmp_path)
    lines = "".join(json.dumps(record(step)) + "\n" for step in range(1, 4))
    run.metrics.write_text(lines + json.dumps(record(4))[:100])
    assert read_history(run, config()).steps == [1, 2, 3]


def test_a_run_without_metrics_has_an_empty_history(tmp_path):
    history = read_history(RunDirectory(tmp_path), cfg := config())
    assert history.steps == []
    assert told(history, cfg)[0] == ["few"]
    assert summary(history)["last_step"] is None


def test_the_summary_is_of_the_last_log_steps():
    changes = [{"moe_dropped": [0.9, 0.9]}] * 3 + [{"moe_dropped": [0.1, 0.2]}] * RECENT
    found = summary(run_of(changes)[0])
    assert (found["log_points"], found["first_step"], found["last_step"]) == (8, 100, 800)
    assert [layer["layer"] for layer in found["layers"]] == [1, 3]
    assert [layer["dropped"] for layer in found["layers"]] == pytest.approx([0.1, 0.2])
    assert found["layers"][0]["load"] == pytest.approx(EVEN)


# ------------------------------------------------------------------------------------------------------------ advice


def test_too_few_log_points_say_only_that():
    kinds, words = told(*run_of([{"moe_load": [[0, 0, 0, 1], EVEN]}] * (RECENT - 1)))
    assert kinds == ["few"]
    assert "4 log points so far, too few" in words
    assert "monitor.log_every=1 (now 10)" in words


def test_a_healthy_run_says_what_was_looked_at():
    kinds, words = told(*run_of([{}] * RECENT))
    assert kinds == ["healthy"]
    for figure in ("all 4 experts of every layer that has them are in use", "1.0 times", "3.0%", "50%", "90%"):
        assert figure in words.replace("47% to 52%", "50%")


def test_a_dead_expert_is_named_with_its_layer_since_when_and_what_to_set():
    dead = {"moe_load": [EVEN, [0.4, 0.3, 0.0, 0.3]]}
    kinds, words = told(*run_of([{}, dead, {}, *[dead] * RECENT]))
    assert kinds == ["dead"]
    assert words == (
        "expert 2 of layer 3 has had no token since step 400: raise model.moe.balance_weight to 0.03 (now 0.01), or set "
        "model.moe.bias_rate=0.001 (now 0)"
    )


def test_several_dead_experts_are_named_each_with_its_step():
    one, two = {"moe_load": [[0.5, 0.0, 0.25, 0.25], EVEN]}, {"moe_load": [[0.45, 0.0, 0.0, 0.55], EVEN]}
    cfg = config(moe={"balance_weight": 0.0, "bias_rate": 0.002})
    kinds, words = told(*run_of([one, *[two] * RECENT], cfg))
    assert "dead" in kinds
    assert "experts 1 (since step 100) and 2 (since step 200) of layer 1 have had no token" in words
    assert "set model.moe.balance_weight=0.01 (now 0), or raise model.moe.bias_rate to 0.006 (now 0.002)" in words


def test_an_expert_with_a_token_of_late_is_not_dead():
    dead, back = {"moe_load": [EVEN, [0.4, 0.3, 0.0, 0.3]]}, {"moe_load": [EVEN, [0.3, 0.2, 0.3, 0.2]]}
    assert told(*run_of([*[dead] * (RECENT - 1), back]))[0] == ["healthy"]
    assert told(*run_of([*[back] * (RECENT - 1), dead]))[0] == ["healthy"]


def test_an_expert_far_below_a_uniform_share_is_starved_since_it_stayed_there():
    little = {"moe_load": [[0.01, 0.33, 0.33, 0.33], EVEN]}
    kinds, words = told(*run_of([{}, *[little] * RECENT]))
    assert kinds == ["starved"]
    assert "expert 0 of layer 1 has had at most 1.0% of the choices (25% is uniform) since step 200" in words


def test_many_starved_experts_are_told_of_together():
    share = [0.2] * 4 + [0.002] * 10 + [0.09] * 2
    cfg = config("moe", moe={"num_experts": 16})
    _, words = told(*run_of([{}] + [{}] * RECENT, cfg, moe_load=[share, [1 / 16] * 16]))
    assert "10 experts of layer 1" not in words  # all have starved since one step: they are named
    assert "experts 4, 5, 6, 7, 8, 9, 10, 11, 12 and 13 of layer 1 have had" in words
    early = [{"moe_load": [[*share[:4], 0.05, *share[5:]], [1 / 16] * 16]}] * 2
    _, words = told(*run_of([*early, *[{"moe_load": [share, [1 / 16] * 16]}] * RECENT], cfg))
    assert "10 experts of layer 1 (4-13) have had at most" in words
    assert "since step 100 (the first of them)" in words


def test_one_expert_with_half_of_the_tokens_is_a_collapse():
    cfg = config()
    load = {"moe_load": [EVEN, [0.1, 0.1, 0.7, 0.1]], "moe_entropy": [0.7, 0.02]}
    kinds, words = told(*run_of([{}, {}, *[load] * RECENT], cfg))
    assert kinds == ["collapse"]
    assert "layer 3 collapses: its busiest expert (last of all 2) takes 70% of the tokens, 2.8 times the mean load" in words
    assert "its router is certain (entropy 0.02, uniform is 1), since step 300" in words
    assert "optim.learning_rate to 0.0001 (now 0.0003)" in words


def test_of_two_choices_the_share_of_tokens_is_twice_that_of_choices():
    load = {"moe_load": [EVEN, [0.06, 0.5, 0.37, 0.07]]}
    assert told(*run_of([load] * RECENT, config(moe={"top_k": 2})))[0] == ["collapse"]
    assert "takes 100% of the tokens, 2.0 times" in told(*run_of([load] * RECENT, config(moe={"top_k": 2})))[1]
    low = {"moe_load": [EVEN, [0.1, 0.45, 0.35, 0.1]]}  # 90% of the tokens, but only 1.8 times the mean
    assert told(*run_of([low] * RECENT, config(moe={"top_k": 2})))[0] == ["healthy"]


def test_certain_routers_with_even_loads_are_no_collapse():
    assert told(*run_of([{"moe_entropy": [0.01, 0.01]}] * RECENT))[0] == ["healthy"]


def test_high_drops_ask_for_capacity_or_none():
    kinds, words = told(*run_of([{}, *[{"moe_dropped": [0.3, 0.05]}] * RECENT]))
    assert kinds == ["drops"]
    assert "layer 1 drops 30% of its choices (above 10% since step 200)" in words
    assert "layer 3" not in words
    assert "model.moe.capacity_factor to 2 (now 1.25), or set model.moe.dispatch=dropless (now capacity)" in words


def test_dropless_runs_are_not_told_of_drops():
    cfg = config(moe={"dispatch": "dropless"})
    assert told(*run_of([{"moe_dropped": [0.3, 0.3]}] * RECENT, cfg))[0] == ["healthy"]


def test_a_router_that_stays_uniform_has_not_specialised():
    flat = [{"moe_entropy": [0.999, 0.7]}] * 11
    kinds, words = told(*run_of([{}, *flat]))
    assert kinds == ["uniform"]
    assert "the router of layer 1 has not specialised: entropy 0.999 (1 is uniform) since step 200" in words
    assert "lower model.moe.balance_weight to 0.001 (now 0.01)" in words
    assert told(*run_of([{}, *flat[:9]]))[0] == ["healthy"]  # not for long
    assert told(*run_of([{}, *flat], config(moe={"score": "sigmoid"})))[0] == ["healthy"]
    unbalanced = config(moe={"balance_weight": 0.0})
    assert "lower model.moe.temperature to 0.5 (now 1)" in told(*run_of([{}, *flat], unbalanced))[1]
    warming = config()
    warming.optim.warmup_steps = 5000
    assert told(*run_of([{}, *flat], warming))[0] == ["healthy"]


@pytest.mark.parametrize(("share", "says"), [(0.8, "80%"), (0.3, "30%")])
def test_a_causal_capacity_far_from_the_one_set_is_told_on_either_side(share, says):
    kinds, words = told(*run_of([{}, {}, *[{"mod_causal_capacity": [0.5, share]}] * RECENT]))
    assert kinds == ["capacity"]
    assert f"layer 3 decides to take {says} of the tokens where 50% is set since step 300" in words
    assert "raise model.mod.predictor_weight to 0.3 (now 0.1)" in words


def test_agreement_is_measured_from_what_always_deciding_the_same_would_give():
    low = [{"mod_agreement": [0.93, 0.74]}] * RECENT
    kinds, words = told(*run_of([{}, *low]))
    assert kinds == ["agreement"]
    assert "layer 3 agrees with the top-k of training on 74% of the tokens, where always deciding the same" in words
    assert "deciding the same would on 50% since step 200" in words
    assert "model.mod.predictor_width=32 (now 0)" in words
    eighth = config(mod={"capacity": 0.125})
    always = {"mod_causal_capacity": [0.125, 0.125]}
    assert told(*run_of([always | {"mod_agreement": [0.93, 0.95]}] * RECENT, eighth))[0] == ["agreement"]
    assert told(*run_of([always | {"mod_agreement": [0.94, 0.95]}] * RECENT, eighth))[0] == ["healthy"]


def test_a_predictor_that_is_switched_off_is_to_be_switched_on():
    cfg = config(mod={"predictor_weight": 0.0, "predictor_width": 8})
    words = told(*run_of([{"mod_agreement": [0.5, 0.9]}] * RECENT, cfg))[1]
    assert "set model.mod.predictor_weight=0.1 (now 0)" in words
    assert "predictor_width" not in words


def test_depth_that_takes_every_token_has_nothing_to_agree_on():
    cfg = config(mod={"capacity": 1.0})
    assert told(*run_of([{"mod_causal_capacity": [1, 1], "mod_agreement": [0.97, 1]}] * RECENT, cfg))[0] == ["healthy"]


def test_random_routing_gets_no_advice_on_depth():
    cfg = config(mod={"router": "random"})
    assert told(*run_of([{"mod_causal_capacity": [0.9, 0.1], "mod_agreement": [0.2, 0.2]}] * RECENT, cfg))[0] == ["healthy"]


def test_while_capacity_is_annealed_it_is_compared_with_that_of_its_step():
    cfg = config(mod={"anneal_steps": 800, "start_capacity": 1.0})
    shares = [1.0 - 0.5 * stage / 8 for stage in (0, 1, 2, 3, 4)]  # steps 100 to 500: stages begin with steps 0, 100, ...
    changes = [{"mod_causal_capacity": [share, share], "mod_agreement": [0.99, 0.99]} for share in shares]
    kinds, words = told(*run_of(changes, cfg))
    assert kinds == ["annealing", "healthy"]
    assert "75% at step 500, 50% from step 800 on" in words
    fixed = [{"mod_causal_capacity": [0.5, 0.5], "mod_agreement": [0.99, 0.99]}] * RECENT
    assert "capacity" in told(*run_of(fixed, cfg))[0]


def test_no_op_experts_that_get_nearly_nothing_or_nearly_all_are_told_of():
    cfg = config(moe={"noop_experts": 1})
    unused, alone = [0.25, 0.25, 0.25, 0.249, 0.001], [0.015, 0.015, 0.015, 0.015, 0.94]
    well = [0.2] * 5
    kinds, words = told(*run_of([{}] * RECENT, cfg, moe_load=[unused, well]))
    assert kinds == ["noops"]
    assert "the no-op experts of layer 1 get 0.1% of the choices since step 100: they save no work" in words
    kinds, words = told(*run_of([{}] * RECENT, cfg, moe_load=[well, alone]))
    assert "noops" in kinds
    assert "layer 3 get 94% of the choices since step 100" in words
    assert "model.moe.noop_experts (now 1)" in words
    assert told(*run_of([{}] * RECENT, cfg, moe_load=[well, well]))[0] == ["healthy"]


def test_of_many_layers_in_one_state_a_few_are_told_of_and_all_are_listed():
    cfg = config("moe", moe={"pattern": "all"}, qk_norm=True)
    cfg.model.num_layers = 12
    change = {"moe_load": [EVEN] * 12, "moe_dropped": [0.5] * 12, "moe_entropy": [0.5] * 12}
    history = history_of([record(step, **change) for step in range(1, 9)], cfg)
    (verdict,) = verdicts(history, cfg)
    assert verdict.layers == list(range(12))
    assert "layer 3 drops" in verdict.says
    assert "layer 4 drops" not in verdict.says
    assert "; and so on in layers 4-11: raise" in verdict.says


def test_metrics_that_are_no_numbers_give_no_nonsense():
    kinds, words = told(*run_of([{"moe_entropy": [None, None], "moe_dropped": [None, 0.0]}] * RECENT))
    assert kinds == ["healthy"]
    assert "nan" not in words


def test_every_option_that_advice_names_exists():
    cfg = config()
    bad = {
        "moe_load": [[0.9, 0.1, 0.0, 0.0], [0.005, 0.335, 0.33, 0.33]],
        "moe_dropped": [0.5, 0.5],
        "moe_entropy": [1.0, 1.0],
        "mod_causal_capacity": [1.0, 0.0],
        "mod_agreement": [0.5, 0.5],
    }
    kinds, words = told(*run_of([bad] * 12, cfg))
    assert kinds == ["dead", "starved", "collapse", "drops", "uniform", "capacity", "agreement"]
    for word in words.replace(",", " ").replace(":", " ").split():
        if word.startswith(("model.", "optim.", "monitor.")):
            part = cfg
            for name in word.partition("=")[0].split("."):
                part = getattr(part, name)


# ---------------------------------------------------------------------------------------------------------- warnings

DEAD = [EVEN, [0.5, 0.5, 0.0, 0.0]]
ALIVE = [EVEN, EVEN]


def watched(watch, loads, start=1):
    return [watch.warnings(record(10 * (start + i), moe_load=load)) for i, load in enumerate(loads)]


def test_an_expert_without_tokens_is_warned_of_once_after_some_log_steps():
    found = watched(ExpertWatch(config()), [DEAD] * (RECENT + 3))
    assert [len(says) for says in found] == [0] * (RECENT - 1) + [1] + [0] * 3
    assert found[RECENT - 1] == [
        "experts 2 and 3 of layer 3 have had no token for 5 log steps; `lumina routing` says what to do"
    ]


def test_a_token_in_between_begins_the_count_anew():
    assert not any(watched(ExpertWatch(config()), [*[DEAD] * (RECENT - 1), ALIVE, *[DEAD] * (RECENT - 1)]))


def test_an_expert_that_came_back_is_warned_of_again():
    found = watched(ExpertWatch(config()), [*[DEAD] * RECENT, ALIVE, *[DEAD] * RECENT])
    assert [i for i, says in enumerate(found) if says] == [RECENT - 1, 2 * RECENT]


def test_a_run_that_goes_on_neither_repeats_a_warning_nor_forgets_the_count():
    cfg = config()
    records = [record(10 * (i + 1), moe_load=DEAD) for i in range(RECENT + 1)]
    for split in range(RECENT + 1):
        first = ExpertWatch(cfg)
        said = [says for each in records[:split] for says in first.warnings(each)]
        second = ExpertWatch(cfg, records[:split][-RECENT:])
        said += [says for each in records[split:] for says in second.warnings(each)]
        assert len(said) == 1, split


def test_a_rewind_counts_no_step_twice_and_repeats_nothing():
    watch = ExpertWatch(config())
    assert not any(watched(watch, [DEAD] * (RECENT - 1)))
    assert not any(watched(watch, [DEAD] * 2, start=RECENT - 2))  # steps that came before, again
    assert watched(watch, [DEAD], start=RECENT)[0]
    assert not any(watched(watch, [DEAD] * (RECENT + 2), start=2))


def test_no_ops_without_tokens_are_no_dead_experts():
    watch = ExpertWatch(config(moe={"noop_experts": 2}))
    assert not any(watched(watch, [[[0.25, 0.25, 0.25, 0.25, 0.0, 0.0]] * 2] * (RECENT + 1)))


@pytest.mark.parametrize("damage", [{"moe_load": None}, {"moe_load": [[0, 0, 0, 1]]}, {"step": None}, {"moe_load": "x"}])
def test_a_damaged_record_is_no_reason_to_warn_or_fail(damage):
    watch = ExpertWatch(config(), [record(1) | damage])
    assert not any(watched(watch, [DEAD] * (RECENT - 1)))


def test_a_dense_run_has_nothing_to_warn_of():
    assert ExpertWatch(config("dense")).warnings({"step": 1}) == []


# ---------------------------------------------------------------------------------------------------- held-out text


def test_lift_is_the_share_among_some_over_the_share_in_the_text():
    tokens = np.array([7] * 10 + [8] * 10 + [9] * 20)
    among = np.zeros(40, bool)
    among[:8] = among[10:12] = True  # 8 of token 7 and 2 of token 8
    assert [each[:3] for each in typical(tokens, among, 1, 9)] == [(7, 8, 0.8)]
    assert typical(tokens, among, 1, 9)[0].lift == pytest.approx((8 / 10) / (10 / 40))
    assert typical(tokens, among, 9, 9) == []  # none often enough


def test_of_equal_lift_the_more_frequent_token_comes_first_and_then_the_lower_id():
    tokens = np.array([5, 5, 5, 6, 4, 4, 4, 0, 0, 0, 0, 0, 0])
    found = typical(tokens, tokens > 0, 1, 3)
    assert [each.token for each in found] == [4, 5, 6]


def test_an_expert_without_tokens_has_no_typical_ones():
    assert typical(np.array([1, 2, 3]), np.zeros(3), 1, 3) == []


def test_takers_and_skippers_are_on_either_side_of_the_mean():
    tokens = np.array([1] * 10 + [2] * 10 + [3] * 10 + [4] * 3)
    taken = np.zeros(33, bool)
    taken[:9] = taken[10:16] = taken[30:] = True  # 9, 6, 0 of ten; token 4, always, is too rare
    take, skip = extremes(tokens, taken, 10, 5)
    assert [(each.token, each.share) for each in take] == [(1, 0.9), (2, 0.6)]
    assert [(each.token, each.share) for each in skip] == [(3, 0.0)]


def test_a_layer_that_every_token_takes_has_neither():
    assert extremes(np.arange(5), np.ones(5, bool), 1, 5) == ([], [])


def test_depth_by_position_is_the_share_of_each_part_of_the_rows():
    taken = np.zeros((1, 2, 6), bool)
    taken[0, 0, :2] = taken[0, :, 4] = True
    everywhere = np.ones((2, 6), bool)
    assert by_position(taken, everywhere, 3).tolist() == [[0.5, 0.0, 0.5]]
    assert by_position(taken, everywhere, 64).shape == (1, 6)


def test_depth_by_position_is_of_text_alone():
    taken = np.ones((1, 2, 6), bool)
    taken[0, 0, 2] = False
    filled = np.array([[True] * 4 + [False] * 2, [True] * 2 + [False] * 4])
    assert np.array_equal(by_position(taken, filled, 3), [[1.0, 0.5, np.nan]], equal_nan=True)


def test_advice_does_not_change_its_arguments():
    history, cfg = run_of([{}] * RECENT)
    before = copy.deepcopy((history, cfg))
    advice(history, cfg)
    assert cfg == before[1]
    assert np.array_equal(history.load_SLA, before[0].load_SLA)
