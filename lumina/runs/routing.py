"""What the routers of a run did, read from its metrics: the history, what is wrong with it, and what to set.

S log steps, L layers that have such a router, A alternatives of an expert router: E experts, then those that do no work.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lumina.architecture import depth_capacity_at, layer_kinds
from lumina.config import Config
from lumina.runs.directory import RunDirectory
from lumina.runs.journal import read_json_lines
from lumina.runs.ledger import spans

RECENT = 5  # log steps that a verdict is about; fewer say nothing
LONG = 10  # log steps after which a router that is still uniform has had its time
STARVED = 0.1  # of a uniform share
COLLAPSED = 0.5  # of all tokens, to one expert that has at least twice the mean load
DROPPED = 0.1  # share of choices
UNIFORM = 0.98  # entropy of softmax scores; sigmoid scores are near 1 by themselves
CERTAIN = 0.1  # entropy
OFF = 0.1  # realised causal capacity less the configured one
SKILL = 0.5  # of the way from a decision that is always the same to one that is always right
NOOPS_UNUSED, NOOPS_ALONE = 0.01, 0.9  # share of choices that do no work
NAMED = 4  # layers that one piece of advice tells of, and experts of a layer each with its step


# ----------------------------------------------------------------------------------------------------------- history


@dataclass
class History:
    """The routers' metrics at each log step; float64 arrays, NaN where a record had null."""

    steps: list[int]
    moe_layers: list[int]  # numbers of the layers with experts, from 0; rows of the arrays below
    mod_layers: list[int]
    num_experts: int
    load_SLA: np.ndarray  # share of choices
    dropped_SL: np.ndarray  # share of choices beyond capacity
    entropy_SL: np.ndarray  # of the scores, 1 when uniform
    capacity_SL: np.ndarray  # share of tokens that the causal decision takes
    agreement_SL: np.ndarray  # of that decision with the top-k of training
    left_out: int = 0  # records of another shape, such as from before the config was changed

    @property
    def peak_SL(self) -> np.ndarray:
        """Load of the busiest expert over the mean; 1 when uniform, NaN where no expert has any."""
        load_SLE = self.load_SLA[:, :, : self.num_experts]
        mean_SL = load_SLE.mean(axis=-1)
        return load_SLE.max(axis=-1) / np.where(mean_SL > 0, mean_SL, np.nan)

    @property
    def noop_SL(self) -> np.ndarray:
        """Share of choices that do no work."""
        return self.load_SLA[:, :, self.num_experts :].sum(axis=-1)


def history_of(records: Iterable[dict[str, Any]], config: Config) -> History:
    """The history in the `train` records of a metrics.jsonl; of two records of a step the later one counts."""
    kinds, moe = layer_kinds(config.model), config.model.moe
    moe_layers = [i for i, kind in enumerate(kinds) if kind.startswith("moe")]
    mod_layers = [i for i, kind in enumerate(kinds) if kind.endswith("+mod")]
    of_experts, of_depth = (len(moe_layers),), (len(mod_layers),)
    shapes = {
        **({"moe_load": (*of_experts, moe.num_experts + moe.noop_experts)} if moe_layers else {}),
        **({"moe_dropped": of_experts, "moe_entropy": of_experts} if moe_layers else {}),
        **({"mod_causal_capacity": of_depth, "mod_agreement": of_depth} if mod_layers else {}),
    }
    found: dict[int, dict[str, np.ndarray]] = {}
    left_out = 0
    for record in records:
        if record.get("kind") != "train":
            continue
        arrays = {name: _numbers(record.get(name)) for name in shapes}
        step = record.get("step")
        if type(step) is int and all(arrays[name].shape == shape for name, shape in shapes.items()):
            found[step] = arrays
        else:
            left_out += 1
    steps = sorted(found)

    def over_time(name: str, *shape: int) -> np.ndarray:
        values = [found[step][name] for step in steps] if name in shapes else []
        return np.array(values).reshape(len(steps), *shape) if values else np.zeros((len(steps), *shape))

    return History(
        steps,
        moe_layers,
        mod_layers,
        moe.num_experts,
        over_time("moe_load", len(moe_layers), moe.num_experts + moe.noop_experts),
        over_time("moe_dropped", *of_experts),
        over_time("moe_entropy", *of_experts),
        over_time("mod_causal_capacity", *of_depth),
        over_time("mod_agreement", *of_depth),
        left_out,
    )


def read_history(run: RunDirectory, config: Config) -> History:
    """The history of a run; half a line at the end of its metrics is passed over."""
    return history_of(read_json_lines(run.metrics), config)


def _numbers(values: Any) -> np.ndarray:
    """An array of floats, null becoming NaN; an empty one for whatever a damaged file may hold instead."""
    try:
        return np.array(values, np.float64) if values is not None else np.zeros(0)
    except (ValueError, TypeError):
        return np.zeros(0)


def summary(history: History) -> dict[str, Any]:
    """The history in plain JSON values: what the last RECENT log steps show, by layer."""
    recent = slice(-RECENT, None)
    layers: dict[int, dict[str, Any]] = {layer: {"layer": layer} for layer in {*history.moe_layers, *history.mod_layers}}
    if history.steps:
        for i, layer in enumerate(history.moe_layers):
            experts = {"load": _mean(history.load_SLA[recent, i]), "dropped": _mean(history.dropped_SL[recent, i])}
            about = {"entropy": _mean(history.entropy_SL[recent, i]), "max_over_mean": _mean(history.peak_SL[recent, i])}
            layers[layer] |= {**experts, **about}
        for i, layer in enumerate(history.mod_layers):
            capacity, agreement = (_mean(array_SL[recent, i]) for array_SL in (history.capacity_SL, history.agreement_SL))
            layers[layer] |= {"causal_capacity": capacity, "agreement": agreement}
    steps = history.steps
    return {
        "log_points": len(steps),
        "first_step": steps[0] if steps else None,
        "last_step": steps[-1] if steps else None,
        "averaged_over": steps[recent],
        "left_out": history.left_out,
        "num_experts": history.num_experts if history.moe_layers else 0,
        "layers": [layers[layer] for layer in sorted(layers)],
    }


def _mean(values: np.ndarray) -> Any:
    """Over the first axis."""
    return values.mean(axis=0).tolist()


# ---------------------------------------------------------------------------------------------------------- verdicts


class Verdict(NamedTuple):
    """One thing to know of the routers, with what to set if it is wrong."""

    kind: str  # few, dead, starved, collapse, drops, uniform, capacity, agreement, annealing, noops, healthy
    layers: list[int]
    says: str


class _Case(NamedTuple):
    layer: int
    says: str


def advice(history: History, config: Config) -> list[str]:
    """What to do about the routers, in plain words; layers and experts count from 0."""
    return [verdict.says for verdict in verdicts(history, config)]


def verdicts(history: History, config: Config) -> list[Verdict]:
    """What the last RECENT log steps show, and since when: one `few` where there are fewer, a `healthy` where all is well."""
    count = len(history.steps)
    if count < RECENT:
        every = config.monitor.log_every
        lower = f", or log more often: set monitor.log_every={max(1, every // 10)} (now {every})" if every > 1 else ""
        points = "no log point" if not count else "1 log point" if count == 1 else f"{count} log points"
        return [Verdict("few", [], f"{points} so far, too few to judge by (at least {RECENT}): train on{lower}")]
    found = [
        *_experts_without_tokens(history, config),
        *_collapses(history, config),
        *_drops(history, config),
        *_uniform(history, config),
        *_noops(history, config),
        *_depth(history, config),
    ]
    troubled = any(verdict.kind != "annealing" for verdict in found)
    return found if troubled else [*found, _healthy(history)]


def _experts_without_tokens(history: History, config: Config) -> list[Verdict]:
    E, dead, starved = history.num_experts, [], []
    A = history.load_SLA.shape[-1]
    for i, layer in enumerate(history.moe_layers):
        load_SE = history.load_SLA[:, i, :E]
        recent_E = load_SE[-RECENT:].mean(axis=0)
        idle, little = [], []
        for e in range(E):
            if not load_SE[-RECENT:, e].any():
                idle.append((e, _since(history.steps, load_SE[:, e] == 0)))
            elif recent_E[e] < STARVED / A:
                since = _since(history.steps, load_SE[:, e] < STARVED / A)
                little.append((e, since))
        if idle:
            dead.append(_Case(layer, _experts_since(idle, layer, "had no token")))
        if little:
            share = _percent(max(recent_E[e] for e, _ in little))
            what = f"had at most {share} of the choices ({_percent(1 / A)} is uniform)"
            starved.append(_Case(layer, _experts_since(little, layer, what)))
    return _verdict("dead", dead, _balance(config)) + _verdict("starved", starved, _balance(config))


def _experts_since(experts: list[tuple[int, int | None]], layer: int, what: str) -> str:
    """`expert 5 of layer 3 has had no token since step 400`, or several, each with its step where they differ."""
    steps = {since for _, since in experts}
    if len(steps) == 1:
        names, since = _and([str(e) for e, _ in experts]), _since_step(experts[0][1])
    elif len(experts) > NAMED:
        since = f"{_since_step(min(step for step in steps if step is not None))} (the first of them)"
        return f"{len(experts)} experts of layer {layer} ({spans([e for e, _ in experts], '').strip('s ')}) have {what}{since}"
    else:
        names, since = _and([f"{e}{_in_brackets(_since_step(step))}" for e, step in experts]), ""
    return f"{'expert' if len(experts) == 1 else 'experts'} {names} of layer {layer} {_has(experts)} {what}{since}"


def _collapses(history: History, config: Config) -> list[Verdict]:
    cases, k = [], config.model.moe.top_k
    for i, layer in enumerate(history.moe_layers):
        share_S, peak_S = history.load_SLA[:, i, : history.num_experts].max(axis=-1) * k, history.peak_SL[:, i]
        bad_S = (share_S >= COLLAPSED) & (peak_S >= 2)
        if share_S[-RECENT:].mean() < COLLAPSED or not peak_S[-RECENT:].mean() >= 2:
            continue
        expert = int(np.argmax(history.load_SLA[-RECENT:, i, : history.num_experts].mean(axis=0)))
        entropy = history.entropy_SL[-RECENT:, i].mean()
        certain = f", and its router is certain (entropy {entropy:.2f}, uniform is 1)" if entropy < CERTAIN else ""
        busiest = f"its busiest expert (last of all {expert}) takes {_percent(share_S[-RECENT:].mean())} of the tokens"
        since = _since_step(_since(history.steps, bad_S))
        cases.append(
            _Case(
                layer,
                f"layer {layer} collapses: {busiest}, {peak_S[-RECENT:].mean():.1f} times the mean load"
                f"{certain}{since and ','}{since}",
            )
        )
    rate = config.optim.learning_rate
    return _verdict("collapse", cases, f"{_balance(config)}; or lower optim.learning_rate to {rate / 3:.2g} (now {rate:g})")


def _drops(history: History, config: Config) -> list[Verdict]:
    moe, cases = config.model.moe, []
    if moe.dispatch == "dropless":
        return []
    for i, layer in enumerate(history.moe_layers):
        recent = history.dropped_SL[-RECENT:, i].mean()
        if recent > DROPPED:
            since = _since_step(_since(history.steps, history.dropped_SL[:, i] > DROPPED))
            above = _in_brackets(f"above {_percent(DROPPED)}{since}" if since else "")
            cases.append(_Case(layer, f"layer {layer} drops {_percent(recent)} of its choices{above}"))
    larger = f"{1.6 * moe.capacity_factor:.2g}"
    return _verdict(
        "drops",
        cases,
        f"raise model.moe.capacity_factor to {larger} (now {moe.capacity_factor:g}), or set model.moe.dispatch=dropless "
        f"(now {moe.dispatch}); drops fall as loads even out",
    )


def _uniform(history: History, config: Config) -> list[Verdict]:
    moe, cases = config.model.moe, []
    if moe.score != "softmax" or len(history.steps) < LONG or history.steps[-1] <= config.optim.warmup_steps:
        return []
    for i, layer in enumerate(history.moe_layers):
        flat_S = history.entropy_SL[:, i] > UNIFORM
        if flat_S[-LONG:].all():
            entropy, since = history.entropy_SL[-RECENT:, i].mean(), _since_step(_since(history.steps, flat_S))
            cases.append(
                _Case(layer, f"the router of layer {layer} has not specialised: entropy {entropy:.3f} (1 is uniform){since}")
            )
    if moe.balance_weight:
        remedy = f"lower model.moe.balance_weight to {moe.balance_weight / 10:g} (now {moe.balance_weight:g})"
    else:
        remedy = f"lower model.moe.temperature to {moe.temperature / 2:g} (now {moe.temperature:g})"
    return _verdict("uniform", cases, f"train on, or {remedy}")


def _noops(history: History, config: Config) -> list[Verdict]:
    moe, unused, alone = config.model.moe, [], []
    if not moe.noop_experts:
        return []
    for i, layer in enumerate(history.moe_layers):
        share_S = history.noop_SL[:, i]
        recent = share_S[-RECENT:].mean()
        if recent < NOOPS_UNUSED:
            since = _since_step(_since(history.steps, share_S < NOOPS_UNUSED))
            unused.append(_Case(layer, f"the no-op experts of layer {layer} get {_percent(recent)} of the choices{since}"))
        if recent > NOOPS_ALONE:
            since = _since_step(_since(history.steps, share_S > NOOPS_ALONE))
            alone.append(_Case(layer, f"the no-op experts of layer {layer} get {_percent(recent)} of the choices{since}"))
    fewer = f"{_balance(config)}; or lower model.moe.noop_experts (now {moe.noop_experts})"
    return _verdict("noops", unused, f"they save no work: {_balance(config)}, which counts them as alternatives") + _verdict(
        "noops", alone, f"the layer does next to nothing: {fewer}"
    )


def _depth(history: History, config: Config) -> list[Verdict]:
    mod, steps = config.model.mod, history.steps
    if not history.mod_layers or mod.router == "random":  # random routing has nothing to learn
        return []
    wanted_S = np.array([depth_capacity_at(mod, step - 1) for step in steps])
    # What a decision that is always the same would agree with; the rest is what can be learned.
    same_S = np.maximum(wanted_S, 1 - wanted_S)
    low_S = same_S + SKILL * (1 - same_S)
    off_cases, low_cases = [], []
    for i, layer in enumerate(history.mod_layers):
        off_S, agreement_S = history.capacity_SL[:, i] - wanted_S, history.agreement_SL[:, i]
        off = off_S[-RECENT:].mean()
        if abs(off) > OFF:
            since = _since_step(_since(steps, np.sign(off) * off_S > OFF))
            takes = _percent(history.capacity_SL[-RECENT:, i].mean())
            wanted = _percent(wanted_S[-RECENT:].mean())
            off_cases.append(_Case(layer, f"layer {layer} decides to take {takes} of the tokens where {wanted} is set{since}"))
        if wanted_S[-1] < 1 and agreement_S[-RECENT:].mean() < low_S[-RECENT:].mean():
            since = _since_step(_since(steps, agreement_S < low_S))
            agrees = f"agrees with the top-k of training on {_percent(agreement_S[-RECENT:].mean())} of the tokens"
            low_cases.append(
                _Case(
                    layer,
                    f"the causal decision of layer {layer} {agrees}, where always deciding the same would on "
                    f"{_percent(same_S[-1])}{since}",
                )
            )
    weight = mod.predictor_weight
    stronger = f"raise model.mod.predictor_weight to {3 * weight:g} (now {weight:g})" if weight else ""
    stronger = stronger or "set model.mod.predictor_weight=0.1 (now 0)"
    width = "" if mod.predictor_width else f", or set model.mod.predictor_width={max(16, config.model.d_model // 4)} (now 0)"
    found = _verdict("capacity", off_cases, f"generation uses this decision: {stronger}")
    found += _verdict("agreement", low_cases, f"held-out loss suffers: {stronger}{width}")
    if steps[-1] < mod.anneal_steps:
        now = depth_capacity_at(mod, steps[-1] - 1)
        says = (
            f"the capacity of depth is still being annealed: {_percent(now)} at step {steps[-1]}, {_percent(mod.capacity)} "
            f"from step {mod.anneal_steps} on (model.mod.anneal_steps={mod.anneal_steps}); judge depth after that"
        )
        found.append(Verdict("annealing", history.mod_layers, says))
    return found


def _healthy(history: History) -> Verdict:
    """Every figure that was looked at, at its worst."""
    recent, said = slice(-RECENT, None), []
    if history.moe_layers:
        peak = history.peak_SL[recent].mean(axis=0).max()
        dropped = history.dropped_SL[recent].mean(axis=0).max()
        where = "every layer that has them" if len(history.moe_layers) > 1 else f"layer {history.moe_layers[0]}"
        said.append(f"all {history.num_experts} experts of {where} are in use")
        said.append(f"the busiest has {peak:.1f} times the mean load")
        said.append(f"drops are at most {_percent(dropped)}")
    if history.mod_layers:
        low, high = (f(history.capacity_SL[recent].mean(axis=0)) for f in (np.min, np.max))
        takes = _percent(low) if _percent(low) == _percent(high) else f"{_percent(low)} to {_percent(high)}"
        agrees = _percent(history.agreement_SL[recent].mean(axis=0).min())
        said.append(f"depth takes {takes} of the tokens, its causal decision as the top-k for at least {agrees}")
    return Verdict("healthy", sorted({*history.moe_layers, *history.mod_layers}), "; ".join(said) + ": nothing to change")


def _balance(config: Config) -> str:
    """What spreads tokens over experts."""
    weight, rate = config.model.moe.balance_weight, config.model.moe.bias_rate
    first = f"raise model.moe.balance_weight to {3 * weight:g} (now {weight:g})" if weight else ""
    first = first or "set model.moe.balance_weight=0.01 (now 0)"
    second = f"raise model.moe.bias_rate to {3 * rate:g} (now {rate:g})" if rate else "set model.moe.bias_rate=0.001 (now 0)"
    return f"{first}, or {second}"


def _verdict(kind: str, cases: list[_Case], remedy: str) -> list[Verdict]:
    """One verdict for all layers in the same state; none without any."""
    if not cases:
        return []
    rest = f"; and so on in {spans([case.layer for case in cases[NAMED:]], 'layer')}" if cases[NAMED:] else ""
    told = "; ".join(case.says for case in cases[:NAMED])
    return [Verdict(kind, [case.layer for case in cases], f"{told}{rest}: {remedy}")]


def _since(steps: list[int], holds_S: np.ndarray) -> int | None:
    """The log step from which on it holds without a break up to the last one; None where it does not hold at the last."""
    if not holds_S[-1]:
        return None
    breaks = np.flatnonzero(~holds_S)
    return steps[int(breaks[-1]) + 1] if breaks.size else steps[0]


def _since_step(step: int | None) -> str:
    return f" since step {step}" if step is not None else ""


def _in_brackets(text: str) -> str:
    return f" ({text.strip()})" if text else ""


def _has(experts: list[Any]) -> str:
    return "has" if len(experts) == 1 else "have"


def _and(names: list[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])


def _percent(share: float) -> str:
    """Two digits: `56%`, `0.4%`, `99.7%`. Rounding never makes a little none, nor nearly all all."""
    if not math.isfinite(share):
        return "an unknown share"
    percent = 100 * float(share)
    close = 0 < percent < 9.95 or 99.5 <= percent < 100
    return f"{percent:.2g}%" if 0 < percent < 0.1 else f"{percent:.1f}%" if close else f"{percent:.0f}%"


# ------------------------------------------------------------------------------------------------------ while it runs


class ExpertWatch:
    """Tells, once for as long as it lasts, of experts that had no token in RECENT log steps in a row."""

    def __init__(self, config: Config, records: Iterable[dict[str, Any]] = ()):
        """`records`, the last RECENT of a run that goes on, or more, were told of by the process that wrote them."""
        kinds = layer_kinds(config.model)
        self._layers = [i for i, kind in enumerate(kinds) if kind.startswith("moe")]
        self._num_experts = config.model.moe.num_experts
        self._idle: deque[tuple[int, set[tuple[int, int]]]] = deque(maxlen=RECENT)  # step, (layer, expert) without a token
        self._told: set[tuple[int, int]] = set()
        for record in records:
            self.warnings(record)

    def warnings(self, record: dict[str, Any]) -> list[str]:
        """What there is to say after a record of metrics.jsonl, a line for each layer. After a rewind steps come again."""
        step, load_LA = record.get("step"), _numbers(record.get("moe_load"))
        if type(step) is not int or load_LA.ndim != 2 or len(load_LA) != len(self._layers):
            return []
        while self._idle and self._idle[-1][0] >= step:
            self._idle.pop()
        rows, experts = np.nonzero(load_LA[:, : self._num_experts] == 0)
        idle = {(self._layers[row], int(expert)) for row, expert in zip(rows, experts, strict=True)}
        self._idle.append((step, idle))
        starved = set.intersection(*(each for _, each in self._idle)) if len(self._idle) == RECENT else set()
        new, self._told = starved - self._told, (self._told & idle) | starved
        return [self._says(layer, sorted(e for i, e in new if i == layer)) for layer in sorted({layer for layer, _ in new})]

    def _says(self, layer: int, experts: list[int]) -> str:
        names = _and([str(expert) for expert in experts])
        who = f"{'expert' if len(experts) == 1 else 'experts'} {names} of layer {layer} {_has(experts)}"
        return f"{who} had no token for {RECENT} log steps; `lumina routing` says what to do"
