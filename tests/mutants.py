"""Plant known mistakes one at a time, and see that the suite catches each: make mutants [ARGS='part of a name']

Each mistake is a replacement of text in a copy of the project; the tests named beside it must then fail. Exits 1 when one
survives, or when the text to replace is no longer there: then the code has moved, and the lists, here and in
mutants_of_data.py, should follow.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutant import Mutant
from mutants_of_data import DATA

ROOT = Path(__file__).resolve().parent.parent
PARTS = (
    "lumina",
    "lumina_jax",
    "lumina_torch",
    "configs",
    "launch",
    "tests",
    "parity_tests",
    "docs",
    "conftest.py",
    "pyproject.toml",
)

STEP, OPTIMIZER, MODEL = "lumina_jax/test_step.py", "lumina_jax/test_optimizer.py", "lumina_jax/test_model.py"
MOE, MOD, ATTENTION, LOSS = (f"lumina_jax/test_{name}.py" for name in ("moe", "mod", "attention", "loss"))
CERTIFY = "lumina_jax/test_certify.py"
GROUPED = "lumina_jax/test_grouped.py"
ATTEND = "lumina_jax/test_attend.py"
EVALUATE, GENERATE, TRAIN = (f"lumina_jax/test_{name}.py" for name in ("evaluate", "generate", "train"))
CHECKPOINT, ARCHITECTURE, TOKENIZER = "lumina_jax/test_checkpoint.py", "lumina/test_architecture.py", "lumina/test_tokenizer.py"
DIGEST, LOOP, ROWS = "lumina_jax/test_digest.py", "lumina/runs/test_loop.py", "lumina/data/test_rows.py"
CONTEXT, HOSTS, CENSUS = (f"lumina_jax/test_{name}.py::test" for name in ("context", "hosts", "census"))
SHARDING = "lumina_jax/test_sharding.py"
MESH = f"{SHARDING}::test_every_mesh"
TRAFFIC, FOOTPRINT, LAYOUT, EXPLAIN, ROOFLINE, PLANNING = (
    f"lumina/test_{name}.py::test" for name in ("traffic", "footprint", "layout", "explain", "roofline", "planning")
)
PROCESSES, LOCAL = (f"lumina/runs/test_{name}.py::test" for name in ("processes", "local"))
SCRIPTS = "launch/test_scripts.py::test"
# Of the mirror: one test each, as they do not wait for a compiler.
ATTEND_T, ATTENTION_T, DRAW_T, GENERATE_T, GROUPED_T, MOD_T, MODEL_T, MOE_T, OPTIMIZER_T, STEP_T = (
    f"lumina_torch/test_{name}.py::test"
    for name in ("attend", "attention", "draw", "generate", "grouped", "mod", "model", "moe", "optimizer", "step")
)
PARITY_STEP = "parity_tests/test_step.py::test_a_step_in_float32_gives_the_same_numbers"

MUTANTS = [
    # ------------------------------------------------------------------------------------------------- loss and targets
    Mutant(
        "labels shifted twice, in the step",
        "lumina_jax/step.py",
        "_loss(model, hidden_BtD, micro, dtype, axes)",
        '_loss(model, hidden_BtD, micro | {"targets": jnp.roll(micro["targets"], -1, axis=1)}, dtype, axes)',
        f"{STEP}::test_the_reported_loss_is_the_language_model_loss_alone_weighted_over_the_whole_batch",
    ),
    Mutant(
        "labels shifted twice, in the rows",
        "lumina/data/rows.py",
        "tokens[:, :-1].copy(), tokens[:, 1:].copy()",
        "tokens[:, :-1].copy(), np.roll(tokens, -2, axis=1)[:, :-1].copy()",
        STEP,
    ),
    Mutant(
        "balance loss in the reported loss",
        "lumina_jax/step.py",
        '{"loss": loss, "accuracy"',
        '{"loss": loss + _auxiliary(metrics, knobs), "accuracy"',
        STEP,
    ),
    Mutant("padding of the last chunk counted", "lumina_jax/loss.py", "w_n[:, None] * (jnp.exp", "(jnp.exp", LOSS),
    # ----------------------------------------------------------------------------------------------------- accumulation
    Mutant(
        "accumulation averages averages",
        "lumina_jax/step.py",
        "loss = sums.loss / weight\n",
        'loss = sums.loss / jnp.sum(micro["weights"]) / M\n',
        STEP,
    ),
    Mutant("last micro-batch dropped", "lumina_jax/step.py", "fori_loop(0, count,", "fori_loop(0, count - 1,", STEP),
    Mutant(
        "router losses added up over the devices of a row",
        "lumina_jax/step.py",
        "else a / same, metrics)",
        "else a, metrics)",
        MESH,
    ),
    # -------------------------------------------------------------------------------------------------------- optimizer
    Mutant(
        "warm-up computed and not used",
        "lumina_jax/optimizer.py",
        "    return optax.join_schedules([lambda n: peak * (n + 1) / warmup, after], [warmup])",
        "    return after",
        OPTIMIZER,
    ),
    Mutant(
        "first update of rate zero", "lumina_jax/optimizer.py", "[lambda n: peak * (n + 1)", "[lambda n: peak * n", OPTIMIZER
    ),
    Mutant("schedule one step late", "lumina_jax/step.py", "rate(state.step) *", "rate(state.step - 1) *", STEP),
    Mutant(
        "decay on norms and embedding",
        "lumina_jax/optimizer.py",
        "lambda path, _: decayed[canonical_names(plan, path)[0]], params",
        "lambda path, _: True, params",
        OPTIMIZER,
    ),
    Mutant(
        "clip without the square root",
        "lumina_jax/optimizer.py",
        "optax.clip_by_global_norm(optim.clip_norm) if",
        "optax.stateless(lambda g, _: jax.tree.map("
        "lambda x: x * jax.numpy.minimum(1.0, optim.clip_norm / optax.global_norm(g) ** 2), g)) if",
        OPTIMIZER,
    ),
    Mutant("sign of the update flipped", "lumina_jax/step.py", "p - (learning_rate * d)", "p + (learning_rate * d)", STEP),
    Mutant(
        "router bias follows the load",
        "lumina_jax/step.py",
        "below_LA.astype(jnp.float32) - (load_LA > mean_L1)",
        "(load_LA > mean_L1) - below_LA.astype(jnp.float32)",
        STEP,
    ),
    # -------------------------------------------------------------------------------------------------------- attention
    Mutant(
        "segment mask dropped",
        "lumina_jax/attend.py",
        "causal_TS & (q_segments_BT[:, :, None] == k_segments_BS[:, None, :])",
        "jnp.broadcast_to(causal_TS, (q_BTHh.shape[0], T, S))",
        ATTEND,
    ),
    Mutant(
        "a query sees the next key",
        "lumina_jax/attend.py",
        "offset + jnp.arange(T)[:, None] >=",
        "offset + 1 + jnp.arange(T)[:, None] >=",
        ATTEND,
    ),
    Mutant(
        "segment mask dropped, in chunks",
        "lumina_jax/attend.py",
        "causal_ns & (segments_BT[:, a:b, None] == segments_BT[:, None, :b])",
        "jnp.broadcast_to(causal_ns, (B, b - a, b))",
        ATTEND,
    ),
    Mutant(
        "a chunk sees the next key",
        "lumina_jax/attend.py",
        "jnp.arange(a, b)[:, None] >=",
        "jnp.arange(a, b)[:, None] + 1 >=",
        ATTEND,
    ),
    Mutant(
        "a cached query misses itself",
        "lumina_jax/attend.py",
        "<= jnp.maximum(last_BT, 0)",
        "< jnp.maximum(last_BT, 1)",
        ATTEND,
    ),
    Mutant(
        "softmax's own gradient forgotten",
        "lumina_jax/attend.py",
        "dweights_BKGns - dot_BKGT1[:, :, :, a:b]",
        "dweights_BKGns",
        ATTEND,
    ),
    Mutant(
        "rotation turned around",
        "lumina_jax/attention.py",
        "first * cos - second * sin",
        "first * cos + second * sin",
        ATTENTION,
    ),
    Mutant(
        "positions counted through documents",
        "lumina_jax/attention.py",
        "angles = positions_BT[:, :, None, None]",
        "angles = (0 * positions_BT + jnp.arange(positions_BT.shape[1]))[:, :, None, None]",
        ATTENTION,
    ),
    Mutant(
        "epsilon outside the root",
        "lumina_jax/attention.py",
        "jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)",
        "1 / (jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True)) + self.eps)",
        ATTENTION,
    ),
    # --------------------------------------------------------------------------------------------- Mixture-of-Experts
    Mutant(
        "top-1 gate renormalised",
        "lumina_jax/moe.py",
        "if moe.renormalise and moe.top_k > 1:",
        "if moe.renormalise and moe.top_k > 0:",
        MOE,
    ),
    Mutant(
        "gate with the selection bias",
        "lumina_jax/moe.py",
        "jnp.take_along_axis(scores_BTA, experts_BTk, axis=-1)",
        "jnp.take_along_axis(scores_BTA + bias_A, experts_BTk, axis=-1)",
        MOE,
    ),
    Mutant(
        "ties go to the higher expert",
        "lumina_jax/moe.py",
        "    _, experts_BTk = jax.lax.top_k(in_best_groups(moe, scores_BTA + bias_A), moe.top_k)",
        "    reversed_BTA = in_best_groups(moe, scores_BTA + bias_A)[..., ::-1]\n"
        "    experts_BTk = scores_BTA.shape[-1] - 1 - jax.lax.top_k(reversed_BTA, moe.top_k)[1]",
        MOE,
    ),
    Mutant("group limit ignored", "lumina_jax/moe.py", "    if moe.num_groups == 1:\n", "    if True:\n", MOE),
    Mutant(
        "a group is worth its best expert alone",
        "lumina_jax/moe.py",
        "min(2, grouped_BTGa.shape[-1])",
        "1",
        MOE,
    ),
    Mutant("one slot too many", "lumina_jax/moe.py", "(place_BN < capacity)", "(place_BN <= capacity)", MOE),
    Mutant(
        "first choices served before second",
        "lumina_jax/moe.py",
        "    return jnp.where(served_BN, experts_BN",
        "    if k > 1:\n"
        "        by_rank_BN1 = experts_BTk.swapaxes(1, 2).reshape(B, T * k, 1)\n"
        "        return assign_slots(by_rank_BN1, num_experts, capacity).reshape(B, k, T).swapaxes(1, 2)\n"
        "    return jnp.where(served_BN, experts_BN",
        MOE,
    ),
    Mutant(
        "a choice of nothing takes a slot",
        "lumina_jax/moe.py",
        "jax.nn.one_hot(experts_BN, num_experts",
        "jax.nn.one_hot(experts_BN % num_experts, num_experts",
        MOE,
    ),
    Mutant(
        "a choice of nothing counted as dropped",
        "lumina_jax/moe.py",
        "(slot_BTk >= 0) | (experts_BTk >= E)",
        "slot_BTk >= 0",
        MOE,
    ),
    Mutant(
        "load counts tokens that are left out",
        "lumina_jax/moe.py",
        "            experts_BTk = jnp.where(taken_BT1, experts_BTk, alternatives)\n",
        "",
        MOE,
    ),
    Mutant("capacity rounded down", "lumina/architecture.py", "math.ceil(round(", "math.floor(round(", ARCHITECTURE),
    Mutant(
        "evaluation drops",
        "lumina_jax/moe.py",
        'if training and moe.dispatch == "capacity":',
        'if moe.dispatch == "capacity":',
        MOE,
    ),
    Mutant(
        "balance loss not times the alternatives",
        "lumina_jax/moe.py",
        "return share_BA.shape[-1] * jnp.sum",
        "return jnp.sum",
        MOE,
    ),
    Mutant(
        "balance over each row instead of the batch",
        "lumina_jax/step.py",
        'elif balance_over == "batch" and batch_load_LA is not None:',
        "elif False:",
        STEP,
    ),
    Mutant(
        "balance over one device's rows",
        "lumina_jax/step.py",
        "load_LBA = axes.sum(load_LA, ROW_AXES)[:, None]",
        "load_LBA = load_LA[:, None]",
        f"{STEP}::test_devices_and_micro_batches_change_no_metric",
    ),
    Mutant(
        "micro-batches of neighbouring rows",
        "lumina_jax/step.py",
        "a.reshape(a.shape[0] // M, M, *a.shape[1:]).swapaxes(0, 1)",
        "a.reshape(M, a.shape[0] // M, *a.shape[1:])",
        STEP,
    ),
    Mutant(
        "counted again where layers are recomputed",
        "lumina_jax/model.py",
        "            x_BTD, (metrics, caches_out) = jax.lax.scan(body, x_BTD, xs, unroll=unroll)\n",
        "            x_BTD, (metrics, caches_out) = jax.lax.scan(body, x_BTD, xs, unroll=unroll)\n"
        "            metrics = jax.tree.map(lambda a: 2 * a, metrics) if remat else metrics\n",
        MODEL,
    ),
    # --------------------------------------------------------------------------------------------- Mixture-of-Depths
    Mutant(
        "everything computed, then masked",
        "lumina_jax/mod.py",
        "        out_BCD, metrics, cache = inner(selected_row, x_BCD, *selected, self.index_BC >= 0)\n",
        "        out_BTD, metrics, cache = inner(row, x_BTD, *others, self.taken_BT)\n"
        "        out_BCD = jnp.take_along_axis(out_BTD, self.index_BC[:, :, None], axis=1)\n",
        f"{MOD}::test_inner_receives_only_the_selected_tokens_of_a_fixed_number",
    ),
    Mutant(
        "the token at the threshold dropped",
        "lumina_jax/mod.py",
        "    wish_BC, index_BC = jax.lax.top_k(wish_BT, count)\n",
        "    wish_BC, index_BC = jax.lax.top_k(wish_BT, count)\n"
        "    index_BC = jnp.where(wish_BC > wish_BC[:, -1:], index_BC, index_BC[:, :1])\n",
        MOD,
    ),
    Mutant(
        "residual counted twice",
        "lumina_jax/model.py",
        "out, metrics = self.feedforward(z), {}",
        "out, metrics = z + self.feedforward(z), {}",
        f"{MOD}::test_residual_is_not_counted_twice",
    ),
    Mutant(
        "residual of a block counted twice",
        "lumina_jax/model.py",
        "return mixed + out, metrics, after",
        "return x + mixed + out, metrics, after",
        MOD,
    ),
    Mutant(
        "positions counted anew among the selected",
        "lumina_jax/model.py",
        "                mixed, after = attention(row, self.attention_norm(x), segments, positions, written)\n",
        "                if taken is None:\n"
        "                    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), positions.shape)\n"
        "                mixed, after = attention(row, self.attention_norm(x), segments, positions, written)\n",
        f"{MOD}::test_a_layer_equals_the_slow_one_among_the_selected_and_leaves_the_others_bit_for_bit",
    ),
    Mutant(
        "the selected see the others in evaluation",
        "lumina_jax/model.py",
        "segments = jnp.where(taken, segments, -1)",
        "segments = segments + 0",
        MOD,
    ),
    Mutant(
        "the cache keeps tokens that pass by",
        "lumina_jax/model.py",
        "written = taken if written_BT is None else written_BT & taken",
        "written = written_BT",
        MODEL,
    ),
    Mutant(
        "ties go to the later position",
        "lumina_jax/mod.py",
        "    wish_BC, index_BC = jax.lax.top_k(wish_BT, count)\n",
        "    wish_BC, index_BC = jax.lax.top_k(wish_BT[:, ::-1], count)\n    index_BC = T - 1 - index_BC\n",
        MOD,
    ),
    Mutant("evaluation takes the top of a row", "lumina_jax/mod.py", "        if top:\n", "        if True:\n", MOD),
    Mutant(
        "predictor teaches what lies below",
        "lumina_jax/mod.py",
        "still_BTD = jax.lax.stop_gradient(wide_BTD)",
        "still_BTD = wide_BTD",
        MOD,
    ),
    Mutant(
        "a predictor's gate",
        "lumina_jax/mod.py",
        "gate_BT = jax.nn.sigmoid(logit_BT)",
        "gate_BT = jax.nn.sigmoid(causal_BT)",
        MOD,
    ),
    Mutant(
        "random choice the same in all layers",
        "lumina_jax/mod.py",
        "self.mod.capacity - uniform(positions_BT, layer)",
        "self.mod.capacity - uniform(positions_BT, 0)",
        MOD,
    ),
    Mutant(
        "a block's attention counted for all tokens",
        "lumina/architecture.py",
        "queries = capacity(tokens, model.mod.capacity) if routed else tokens",
        "queries = tokens",
        ARCHITECTURE,
    ),
    Mutant(
        "annealing ends above its capacity",
        "lumina/architecture.py",
        "stage / ANNEAL_STAGES",
        "stage / (ANNEAL_STAGES + 1)",
        ARCHITECTURE,
    ),
    # ---------------------------------------------------------------------------------------- evaluation and generation
    Mutant(
        "evaluation averages batch means",
        "lumina/runs/evaluation.py",
        '    capacity = sum(t["taken_L"]',
        '    loss = weight * sum(float(t["loss"]) / float(t["weight"]) for t in totals) / len(totals)\n'
        '    capacity = sum(t["taken_L"]',
        EVALUATE,
    ),
    Mutant(
        "padding's bytes counted",
        "lumina_jax/step.py",
        '[batch["targets"]] * (batch["weights"] > 0))',
        '[batch["targets"]])',
        EVALUATE,
    ),
    Mutant(
        "positions restart in the cache",
        "lumina_jax/generate.py",
        "                start + places_1T,\n",
        "                places_1T,\n",
        GENERATE,
    ),
    Mutant(
        "control tokens drawn",
        "lumina/generation.py",
        'tokenizer.control.items() if name != "<|document_end|>"]',
        "tokenizer.control.items() if False]",
        f"{GENERATE_T}_only_text_and_document_end_are_ever_drawn",
    ),
    Mutant(
        "multi-byte characters broken",
        "lumina/generation.py",
        "held += decoder.feed(token)",
        "held += self.tokenizer.decode([token])",
        f"{GENERATE}::test_multi_byte_characters_stream_whole",
    ),
    Mutant(
        "special tokens in a user's text become control tokens",
        "lumina/tokenizer.py",
        "            return self._encoding.encode_ordinary(text)\n",
        "            return [self.control[text]] if text in self.control else self._encoding.encode_ordinary(text)\n",
        TOKENIZER,
    ),
    # ---------------------------------------------------------------------------------------- counts, checkpoints, runs
    Mutant(
        "a tied head counted twice",
        "lumina/architecture.py",
        "*([] if model.tie_embeddings else [head_tensor(model)])",
        "head_tensor(model)",
        f"{ARCHITECTURE}::test_grouped_queries_and_tied_heads_are_counted_once",
    ),
    Mutant(
        "key/value heads counted as query heads",
        "lumina/architecture.py",
        'matrix("attention.key", (d, kv, h)',
        'matrix("attention.key", (d, heads, h)',
        ARCHITECTURE,
    ),
    Mutant(
        "dtypes cast silently on restore",
        "lumina_jax/checkpoint.py",
        "        check_fits(directory, leaves, shapes_of(self._like))\n",
        "        pass\n",
        CHECKPOINT,
    ),
    Mutant(
        "damaged checkpoints alone begin anew",
        "lumina/runs/checkpoints.py",
        "if self._agreed(self.steps.broken() != []):",
        "if False:",
        CHECKPOINT,
    ),
    Mutant(
        "restored values not compared with the saved ones",
        "lumina_jax/checkpoint.py",
        "named.values()), changed(digests(named), leaves)",
        "named.values()), []",
        CHECKPOINT,
    ),
    Mutant(
        "the best checkpoint goes with the old ones",
        "lumina/runs/checkpoints.py",
        "self.steps.superfluous(self._best)",
        "self.steps.superfluous(None)",
        CHECKPOINT,
    ),
    Mutant(
        "digest blind to order",
        "lumina_jax/digest.py",
        "words ^ place * jnp.uint32(0x9E3779B9)",
        "words",
        f"{DIGEST}::test_any_two_swapped_elements_are_found",
    ),
    # ------------------------------------------------------------------------------------------- devices and processes
    Mutant(
        "each device updates with its own gradient",
        "lumina_jax/step.py",
        "return axes.sum(gradient, axes.not_splitting(tensor))",
        "return gradient",
        f"{STEP}::test_devices_and_micro_batches_change_no_parameter_moment_or_bias",
    ),
    Mutant(
        "each device divides by its own weight",
        "lumina_jax/step.py",
        'of_batch = axes.sum(jnp.sum(batch["weights"]), ROW_AXES)',
        'of_batch = jnp.sum(batch["weights"]) * axes.row_parts',
        f"{STEP}::test_devices_and_micro_batches_change_no_parameter_moment_or_bias",
    ),
    Mutant(
        "dropout by place within the device",
        "lumina_jax/step.py",
        "jax.random.fold_in(step_key, row))(row_b)",
        "jax.random.fold_in(step_key, row))(jnp.arange(row_b.shape[0]))",
        STEP,
    ),
    Mutant(
        "every process reads the first part",
        "lumina/data/rows.py",
        "numbers.reshape(parts, -1)[list(blocks)].ravel()",
        "numbers[: len(blocks) * (len(numbers) // parts)]",
        f"{ROWS}::test_the_parts_of_a_batch_put_together_are_the_batch",
    ),
    # ------------------------------------------------------------------------------------------------------- bad steps
    Mutant(
        "a gradient that is not finite is applied",
        "lumina_jax/step.py",
        "good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)",
        "good = jnp.isfinite(loss)",
        STEP,
    ),
    Mutant(
        "moments move in a skipped step",
        "lumina_jax/step.py",
        "            variables, optimizer_state = jax.tree.map(",
        "            variables, _ = jax.tree.map(",
        STEP,
    ),
    Mutant(
        "router biases move in a skipped step",
        "lumina_jax/step.py",
        "return TrainState(state.step + 1, variables, optimizer_state",
        "return TrainState(state.step + 1, Variables(variables.params, biases), optimizer_state",
        STEP,
    ),
    Mutant(
        "skipped losses enter the window",
        "lumina_jax/step.py",
        "jnp.where(made, losses_W, guard.losses_W)",
        "losses_W",
        STEP,
    ),
    Mutant(
        "spikes before the window is full",
        "lumina_jax/step.py",
        "jnp.mean(guard.losses_W) + config.spike_sigmas * jnp.std(guard.losses_W)",
        "jnp.nanmean(guard.losses_W) + config.spike_sigmas * jnp.nanstd(guard.losses_W)",
        STEP,
    ),
    Mutant("passing over counts as skipping", "lumina_jax/step.py", "skipped=~good & knobs.update)", "skipped=~good)", STEP),
    Mutant(
        "the last step is not judged",
        "lumina/runs/loop.py",
        "                self._judge(self.reporter.flush())\n",
        "                self.reporter.flush()\n",
        LOOP,
    ),
    Mutant(
        "a rewind makes the same steps again",
        "lumina/runs/loop.py",
        "update = not self.progress.passes_over(number + 1)",
        "update = True",
        LOOP,
    ),
    # --------------------------------------------------------------------------------------------------------- going on
    Mutant(
        "resume skips a batch",
        "lumina/runs/loop.py",
        "prefetch(self.batches, self.step, steps, config.data.workers):",
        "prefetch(self.batches, self.step + (self.step > 0), steps, config.data.workers):",
        LOOP,
    ),
    Mutant(
        "another batch size begins elsewhere",
        "lumina/runs/loop.py",
        "        self.batches = batches.following(self.step, self.progress.rows)\n",
        "        self.batches = batches\n",
        LOOP,
    ),
    Mutant(
        "stopped and not saved",
        "lumina/runs/loop.py",
        "saving = last or stopping or",
        "saving = last or",
        LOOP,
    ),
    Mutant(
        "an error costs the steps since the checkpoint",
        "lumina/runs/loop.py",
        "            self._failed(error)\n            raise\n",
        "            raise\n",
        LOOP,
    ),
    Mutant(
        "a changed config accepted",
        "lumina/runs/directory.py",
        "if changed and not accept:\n            raise ConfigError(",
        "if False:\n            raise ConfigError(",
        "lumina/runs/test_directory.py",
    ),
    Mutant(
        "storage that fails for now taken for damage",
        "lumina/runs/steps.py",
        "            if error.errno not in DAMAGE:\n                raise\n",
        "",
        "lumina/runs/test_steps.py",
    ),
    Mutant(
        "a rewind to wherever the run was stopped",
        "lumina/runs/checkpoints.py",
        "if scheduled and step % self._config.every:",
        "if False:",
        CHECKPOINT,
    ),
    Mutant(
        "an error saves a step without its evaluation",
        "lumina/runs/loop.py",
        "if self._due(self.config.train.eval_every) and self.progress.last_step != self.step:",
        "if False:",
        LOOP,
    ),
    # ------------------------------------------------------------------------------------------------ grouped products
    Mutant(
        "as many blocks for each expert as for the fullest",
        "lumina_jax/grouped.py",
        "_over_blocks(sizes, order.first_E[e], order.counts_E[e], block, carry)",
        "_over_blocks(sizes, order.first_E[e], jnp.max(order.counts_E), block, carry)",
        GROUPED,
    ),
    Mutant(
        "the next expert's row in a weight gradient",
        "lumina_jax/grouped.py",
        "own_b = jnp.arange(b) < left",
        "own_b = jnp.arange(b) <= left",
        GROUPED,
    ),
    Mutant(
        "weight gradients added up in bfloat16",
        "lumina_jax/grouped.py",
        "wide = jnp.promote_types(dtype, jnp.float32)",
        "wide = dtype",
        GROUPED,
    ),
    Mutant(
        "a choice of none goes to an expert",
        "lumina_jax/grouped.py",
        "jnp.where((expert_S >= 0) & (expert_S < num_experts), expert_S, num_experts)",
        "jnp.clip(expert_S, 0, num_experts)",
        GROUPED,
    ),
    Mutant(
        "an expert's last rows skipped",
        "lumina_jax/grouped.py",
        "-(-left // b) if b == sizes[-1]",
        "left // b if b == sizes[-1]",
        GROUPED,
    ),
    Mutant(
        "gradient of the first choice alone",
        "lumina_jax/grouped.py",
        ".sum(axis=1).astype(dtype), None",
        "[:, 0].astype(dtype), None",
        GROUPED,
    ),
    Mutant(
        "ragged products where they do the work of all experts",
        "lumina_jax/grouped.py",
        'Form(ragged, ("tpu",)',
        'Form(ragged, ("tpu", "cpu")',
        GROUPED,
    ),
    # ------------------------------------------------------------------------------------------------ rows over devices
    Mutant(
        "late chunk first",
        "lumina_jax/context.py",
        "first = (rank * self.chunk, (2 * self.n - 1 - rank) * self.chunk)",
        "first = ((2 * self.n - 1 - rank) * self.chunk, rank * self.chunk)",
        f"{CONTEXT}_each_device_has_an_early_and_a_late_chunk_and_the_row_comes_back_whole",
    ),
    Mutant(
        "chunks in plain order, without balance",
        "lumina_jax/context.py",
        "first = (rank * self.chunk, (2 * self.n - 1 - rank) * self.chunk)",
        "first = (2 * rank * self.chunk, (2 * rank + 1) * self.chunk)",
        f"{CONTEXT}_each_device_has_an_early_and_a_late_chunk_and_the_row_comes_back_whole",
    ),
    Mutant(
        "late chunks joined from the first device on",
        "lumina_jax/context.py",
        "*late_nBc[::-1]]",
        "*late_nBc]",
        f"{CONTEXT}_each_device_has_an_early_and_a_late_chunk_and_the_row_comes_back_whole",
    ),
    Mutant(
        "a token of the late chunk sought in the early one",
        "lumina_jax/context.py",
        "rank * self.share + late * self.chunk + place",
        "rank * self.share + place",
        f"{CONTEXT}_an_address_is_where_the_token_lies",
    ),
    Mutant(
        "an empty place takes a token",
        "lumina_jax/context.py",
        "jnp.where(ids < 0, -1, rank",
        "jnp.where(ids < -1, -1, rank",
        f"{CONTEXT}_an_address_is_where_the_token_lies",
    ),
    Mutant(
        "both ways round the ring counted alike",
        "lumina_jax/context.py",
        "(1, n - distance))[",
        "(1, distance))[",
        f"{CONTEXT}_tokens_taken_round_the_ring_are_those_of_a_gathered_row_forward_and_backward",
    ),
    Mutant(
        "rings that go the long way round",
        "lumina_jax/context.py",
        "jnp.minimum(ahead_BM, n - ahead_BM)",
        "ahead_BM",
        f"{CONTEXT}_blocks_travel_only_as_far_as_the_farthest_wish",
    ),
    Mutant(
        "rings that stop a round early",
        "lumina_jax/context.py",
        "fori_loop(1, rounds + 1,",
        "fori_loop(1, rounds,",
        f"{CONTEXT}_tokens_taken_round_the_ring_are_those_of_a_gathered_row_forward_and_backward",
    ),
    Mutant(
        "of a token taken twice one gradient alone",
        "lumina_jax/context.py",
        ".reshape(B, N, k, -1).sum(axis=2)",
        ".reshape(B, N, k, -1)[:, :, 0]",
        f"{CONTEXT}_tokens_taken_round_the_ring_are_those_of_a_gathered_row_forward_and_backward",
    ),
    Mutant(
        "a query over devices misses itself",
        "lumina_jax/context.py",
        "jnp.tri(s, dtype=bool)",
        "jnp.tri(s, k=-1, dtype=bool)",
        f"{CONTEXT}_attention_over_devices_equals_that_of_the_whole_row_forward_and_backward",
    ),
    Mutant(
        "a query over devices sees all of its block",
        "lumina_jax/context.py",
        "(pair.key_place < pair.query_place)",
        "(pair.key_place <= pair.query_place)",
        f"{CONTEXT}_attention_over_devices_equals_that_of_the_whole_row_forward_and_backward",
    ),
    Mutant(
        "padding of a block is in the first document",
        "lumina_jax/context.py",
        "count * size - row.chunk)], constant_values=NOWHERE)",
        "count * size - row.chunk)], constant_values=0)",
        f"{CONTEXT}_attention_over_devices_equals_that_of_the_whole_row_forward_and_backward",
    ),
    Mutant(
        "running softmax not rescaled",
        "lumina_jax/context.py",
        "mixed_BKRh * rescale_BKR1 + added_BKRh",
        "mixed_BKRh + added_BKRh",
        f"{CONTEXT}_attention_over_devices_equals_that_of_the_whole_row_forward_and_backward",
    ),
    Mutant(
        "gradients of keys summed over devices in bfloat16",
        "lumina_jax/context.py",
        "psum_scatter(x_VBKsh, AXIS, tiled=True)",
        "psum_scatter(x_VBKsh.astype(jnp.bfloat16), AXIS, tiled=True)",
        f"{CONTEXT}_softmax_and_the_sums_over_devices_run_in_float32_for_bfloat16",
    ),
    Mutant(
        "splash fetches blocks of the future",
        "lumina_jax/context.py",
        "// block >= jnp.arange(keys)",
        "// block >= jnp.zeros(keys, int)",
        f"{CONTEXT}_splash_is_told_which_blocks_are_visible_and_fetches_no_other",
    ),
    Mutant(
        "splash skips the block on the diagonal",
        "lumina_jax/context.py",
        "// block >= jnp.arange(keys)",
        "// block > jnp.arange(keys)",
        f"{CONTEXT}_splash_over_devices_equals_the_whole_row_forward_and_backward",
    ),
    Mutant(
        "a form that needs whole rows takes split ones",
        "lumina_jax/attend.py",
        'Form("reference", split_rows=False)',
        'Form("reference")',
        f"{CONTEXT}_a_form_that_needs_whole_rows_is_refused",
    ),
    # -------------------------------------------------------------------------------------- one model over many devices
    Mutant(
        "gradients of gathered weights summed in bfloat16",
        "lumina_jax/sharding.py",
        "wide = gradient.astype(jnp.promote_types(dtype, jnp.float32))",
        "wide = gradient",
        f"{SHARDING}::test_weights_are_gathered_in_the_compute_dtype_and_their_gradients_summed_in_float32",
    ),
    Mutant(
        "gathered weights kept for the backward pass",
        "lumina_jax/sharding.py",
        "    return jax.lax.all_gather(weight.astype(dtype), axes, axis=dimension, tiled=True), None",
        "    return _gathered(weight, axes, dimension, dtype), None",
        "lumina_jax/test_traffic.py::test_without_remat_gathered_weights_are_not_kept_but_gathered_again",
    ),
    Mutant(
        "gradients of what tensor copies summed over data alone",
        "lumina_jax/step.py",
        "axes.sum(gradient, axes.not_splitting(tensor))",
        'axes.sum(gradient, ("data",))',
        f"{MESH}_makes_the_steps_of_one_device[capacity-tensor-2]",
    ),
    Mutant(
        "every device has the first experts",
        "lumina_jax/moe.py",
        'first = axes.place("expert") * weights[0].shape[0]',
        "first = 0",
        f"{MESH}_makes_the_steps_of_one_device[dropless-expert-2-context-2-tensor-2]",
    ),
    Mutant(
        "a block's feed-forward sees its own heads alone",
        "lumina_jax/model.py",
        "self.feedforward_norm(x + axes.sum(mixed, tensor))",
        "self.feedforward_norm(x + mixed)",
        f"{MESH}_makes_the_steps_of_one_device[dropless-expert-2-context-2-tensor-2]",
    ),
    Mutant(
        "slots of several devices at one address",
        "lumina_jax/moe.py",
        "(device * num_experts + expert) * slots.share",
        "(device + expert) * slots.share",
        f"{MESH}_makes_the_steps_of_one_device[capacity-context-4]",
    ),
    Mutant(
        "a target counted on every part of the vocabulary",
        "lumina_jax/loss.py",
        "jnp.where(own_n, log_total_n - target_n, 0)",
        "log_total_n - target_n",
        f"{MESH}_makes_the_steps_of_one_device[capacity-tensor-2]",
    ),
    Mutant(
        "experts split over one axis twice",
        "lumina/mesh.py",
        'expert_embed: tuple[str, ...] = ("fsdp", "context")',
        'expert_embed: tuple[str, ...] = ("fsdp", "expert", "context")',
        "lumina/test_explain.py::test_every_axis_that_splits_is_told",
    ),
    # ---------------------------------------------------------------------------------------------------- several hosts
    Mutant(
        "a digest that gathers what others have",
        "lumina_jax/digest.py",
        "_UNSIGNED[array.dtype.itemsize]).astype(jnp.uint32)",
        "_UNSIGNED[array.dtype.itemsize]).astype(jnp.uint32).reshape(-1)",
        f"{DIGEST}::test_no_device_gathers_what_others_have",
    ),
    Mutant(
        "hosts of two slices share numbers",
        "lumina/runs/processes.py",
        "number += _number(SLICES[1], place) * len(hosts)",
        "number += _number(SLICES[1], place)",
        f"{PROCESSES}_the_environment_tells_which_process_this_is",
    ),
    Mutant(
        "a shell of salloc taken for several processes",
        "lumina/runs/processes.py",
        "int(step) >= FIRST_SPECIAL_STEP",
        "False",
        f"{PROCESSES}_the_environment_tells_which_process_this_is",
    ),
    Mutant(
        "pieces with a gap between them make up an array",
        "lumina/interchange/orbax.py",
        "if (counts < 1).any():",
        "if (counts < 0).any():",
        f"{HOSTS}_pieces_that_do_not_make_up_an_array_are_refused_by_name",
    ),
    Mutant(
        "a piece read from its beginning",
        "lumina/interchange/orbax.py",
        "for origin in (piece.begin, begin)",
        "for origin in (begin, begin)",
        f"{HOSTS}_what_four_processes_saved_two_restore_and_each_reads_what_its_devices_have",
    ),
    Mutant(
        "another process's full disk goes unheard",
        "lumina/runs/checkpoints.py",
        'raise OSError(f"process {process}: {failure}")',
        "pass",
        f"{HOSTS}_a_disk_that_fails_in_any_process_costs_this_checkpoint_and_hangs_nobody",
    ),
    Mutant(
        "files that this process cannot see make a checkpoint",
        "lumina/runs/checkpoints.py",
        "        require_visible(directory, self.parts)\n",
        "",
        f"{HOSTS}_what_another_process_wrote_elsewhere_or_not_at_all_is_no_checkpoint",
    ),
    Mutant(
        "the first process writes what all have",
        "lumina_jax/checkpoint.py",
        "devices[n % len(devices)]",
        "devices[0]",
        f"{HOSTS}_every_process_writes_the_pieces_of_its_own",
    ),
    Mutant(
        "what processes told each other is kept for ever",
        "lumina_jax/checkpoint.py",
        'forget(f"save/{self._save - 1}")',
        "pass",
        f"{HOSTS}_of_what_processes_told_each_other_for_a_checkpoint_only_the_last_is_kept",
    ),
    Mutant(
        "one that is silent is waited for",
        "lumina_jax/hosts.py",
        "if silent > self.silence:",
        "if silent > 99 * self.silence:",
        f"{HOSTS}_who_is_silent_is_told_and_taken_back_once_there_are_signs_of_life_again",
    ),
    # -------------------------------------------------------------------------------------- what a step sends and holds
    Mutant(
        "gathers of the backward pass not counted",
        "lumina/traffic.py",
        "(passes + 1) * times, times)",
        "passes * times, times)",
        f"{TRAFFIC}_fsdp_gathers_weights_twice_and_scatters_gradients_once_a_micro_batch",
    ),
    Mutant(
        "gradients counted in the compute dtype",
        "lumina/traffic.py",
        'account.add(what, "reduce_scatter", axes, numbers * FLOAT32, scatters)',
        'account.add(what, "reduce_scatter", axes, numbers * compute_width(tensor, config), scatters)',
        f"{TRAFFIC}_fsdp_gathers_weights_twice_and_scatters_gradients_once_a_micro_batch",
    ),
    Mutant(
        "an all-reduce counted as one way",
        "lumina/traffic.py",
        '(2 if kind == "all_reduce" else 1) * size',
        "size",
        f"{TRAFFIC}_a_ring_gathers_scatters_and_reduces_with_the_bytes_that_are_claimed",
    ),
    Mutant(
        "a device sends itself its own part",
        "lumina/traffic.py",
        "size * (n - 1) / n",
        "size",
        f"{TRAFFIC}_a_ring_gathers_scatters_and_reduces_with_the_bytes_that_are_claimed",
    ),
    Mutant(
        "one moment instead of two",
        "lumina/footprint.py",
        "gradients, 2 * trained,",
        "gradients, trained,",
        f"{FOOTPRINT}_one_device_holds_weights_gradients_and_two_moments",
    ),
    Mutant(
        "every device holds the rows of all",
        "lumina/traffic.py",
        "config.train.micro_batches // sizes.row_parts)",
        "config.train.micro_batches)",
        f"{FOOTPRINT}_data_copies_parameters_and_splits_rows",
    ),
    Mutant(
        "residual whole on devices along tensor",
        "lumina/footprint.py",
        "b * T / (sizes.context * sizes.tensor)",
        "b * T / sizes.context",
        f"{FOOTPRINT}_with_remat_another_layer_keeps_the_residual_of_the_devices_tokens",
    ),
    Mutant(
        "a mesh chosen that does not fit",
        "lumina/layout.py",
        "fitting = [one for one in found if one.needed <= limit]",
        "fitting = found",
        f"{LAYOUT}_less_memory_takes_more_micro_batches_then_more_shards",
    ),
    Mutant(
        "the slowest mesh chosen",
        "lumina/layout.py",
        "fitting[0], bool(",
        "fitting[-1], bool(",
        f"{LAYOUT}_of_what_fits_the_choice_is_the_fastest",
    ),
    Mutant(
        "tokens travel while a step computes",
        "lumina/roofline.py",
        "waits.links + waits.network",
        "waits.network",
        f"{ROOFLINE}_weights_travel_while_a_step_computes_and_tokens_are_waited_for",
    ),
    Mutant(
        "a step's memory not waited for",
        "lumina/roofline.py",
        "max(work.compute, work.memory, work.links",
        "max(work.compute, work.links",
        f"{ROOFLINE}_a_step_takes_no_less_than_its_memory",
    ),
    Mutant(
        "half a chip at hand as fast as a whole one",
        "lumina/topology.py",
        "CHIPS[KINDS[kind]].each()",
        "CHIPS[KINDS[kind]]",
        "lumina/test_topology.py::test_devices_at_hand_are_those_of_the_table_where_it_has_them",
    ),
    Mutant(
        "fsdp over the network of slices",
        "lumina/layout.py",
        "if sizes.data % topology.slices == 0]",
        "]",
        f"{LAYOUT}_only_data_goes_over_the_network_between_slices",
    ),
    Mutant(
        "the first layer in no group of tensors",
        "lumina/architecture.py",
        "if other == kind]",
        "if other == kind and i]",
        f"{EXPLAIN}_the_tensors_told_are_those_of_the_table",
    ),
    Mutant(
        "a host said to read all rows",
        "lumina/explain.py",
        '"rows_per_host": max(map(len, read)) * train.batch_size // parts',
        '"rows_per_host": train.batch_size',
        f"{EXPLAIN}_hosts_read_the_rows_of_their_devices",
    ),
    # --------------------------------------------------------------------------------------------------------- the plan
    Mutant(
        "an all-to-all crosses nodes as a ring does",
        "lumina/roofline.py",
        'return (n - n / m) / (n - 1) if kind == "all_to_all" else m / n',
        "return m / n",
        f"{ROOFLINE}_the_last_axes_stay_within_a_node_and_the_first_cross",
    ),
    Mutant(
        "half a chip as fast as a whole one",
        "lumina/roofline.py",
        "compute=flops / (sizes.devices * chip.peak_flops / chip.devices)",
        "compute=flops / (sizes.devices * chip.peak_flops)",
        f"{ROOFLINE}_a_device_that_is_half_a_chip_has_half_of_everything",
    ),
    Mutant(
        "what remat computes again costs nothing",
        "lumina/roofline.py",
        'passes = 4 if remat == "full" else 3',
        "passes = 3",
        f"{ROOFLINE}_remat_adds_a_forward_pass_of_the_layers_and_none_of_the_head",
    ),
    Mutant(
        "MFU counts what is computed again",
        "lumina/planning.py",
        '"mfu": model_flops(config) /',
        '"mfu": executed_flops(config) /',
        f"{PLANNING}_mfu_is_the_models_own_work_over_what_the_chips_could_do",
    ),
    Mutant(
        "what the compiler leaves free is not asked",
        "lumina/planning.py",
        'needed, available = refused["needed_bytes"], refused["available_bytes"]',
        'needed = refused["needed_bytes"]',
        f"{PLANNING}_what_the_compiler_refuses_does_not_fit_by_as_much_as_it_says",
    ),
    Mutant(
        "bits of a network taken for bytes",
        "lumina/topology.py",
        "links * GB, network * GB / 8, *about",
        "links * GB, network * GB, *about",
        "lumina/test_topology.py::test_figures_have_the_units_that_they_say",
    ),
    Mutant(
        "a loop counted as run once",
        "lumina_jax/census.py",
        'equation.params["length"] if name == "scan" else 1',
        "1",
        f"{CENSUS}_the_body_of_a_loop_counts_as_often_as_it_runs",
    ),
    Mutant(
        "collectives counted over a mesh of one",
        "lumina_jax/census.py",
        'inner = dict(equation.params["mesh"].shape) if name == "shard_map" else sizes',
        "inner = sizes",
        f"{CENSUS}_what_a_device_sends_is_counted_by_kind_and_axes",
    ),
    Mutant(
        "what loops carry counted twice",
        "lumina_jax/plan.py",
        "sizes.temp_size_in_bytes if assigned is None else",
        "sizes.temp_size_in_bytes if True else",
        "lumina_jax/test_plan.py::test_a_tpus_temporaries_are_what_it_assigned_beyond_the_arguments",
    ),
    Mutant(
        "a search that ranks what does not fit",
        "lumina/planning.py",
        " if each.needed <= limit]",
        "]",
        f"{PLANNING}_a_search_counts_and_tells_only_what_fits",
    ),
    # ----------------------------------------------------------------------------------------------------------- launch
    Mutant(
        "the last bad exit code counts",
        "lumina/runs/local.py",
        "elif ended and code in (0, STOPPED_AND_SAVED):",
        "elif ended:",
        f"{LOCAL}_the_first_that_ends_badly_ends_the_others_and_gives_its_code",
    ),
    Mutant(
        "Ctrl-C passed on twice",
        "lumina/runs/local.py",
        "signal.SIGKILL if self.at_once else signal.SIGTERM",
        "signal.SIGKILL if self.at_once else number",
        f"{LOCAL}_a_signal_reaches_all_once_ready",
    ),
    Mutant(
        "processes outlive a killed launcher",
        "lumina/runs/local.py",
        "preexec_fn=stop_without_parent",
        "preexec_fn=None",
        f"{LOCAL}_none_is_left_when_the_launcher_is_killed",
    ),
    Mutant(
        "saved counts as done",
        "lumina/runs/local.py",
        "code = code or ended",
        "pass",
        f"{LOCAL}_the_first_that_ends_badly_ends_the_others_and_gives_its_code",
    ),
    Mutant(
        "all take GPU 0",
        "lumina/runs/local.py",
        '{"JAX_LOCAL_DEVICE_IDS": str(number)}',
        '{"JAX_LOCAL_DEVICE_IDS": "0"}',
        f"{LOCAL}_each_is_told_of_the_others",
    ),
    Mutant(
        "logs begun anew at a restart",
        "lumina/runs/local.py",
        '.open("ab")',
        '.open("wb")',
        f"{LOCAL}_logs_are_a_file_each_and_are_added_to",
    ),
    Mutant(
        "port 0 taken as such",
        "lumina/runs/local.py",
        "if not port:",
        "if False:",
        f"{LOCAL}_each_is_told_of_the_others",
    ),
    Mutant(
        "a reserved port that nobody can listen on",
        "lumina/runs/local.py",
        "probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)",
        "pass",
        f"{LOCAL}_a_reserved_port_is_for_who_names_it_alone",
    ),
    Mutant(
        "a dry run loses the quotes",
        "launch/common.sh",
        '        quoted "$@"',
        '        echo "$@"',
        f"{SCRIPTS}_a_dry_run_prints_the_command",
    ),
    Mutant(
        "a stop at the limit is not requeued",
        "launch/slurm.sh",
        "6 | 93",
        "6 | 75 | 93",
        f"{SCRIPTS}_a_job_goes_back_into_the_queue_when_that_can_help",
    ),
    Mutant(
        "requeued for ever",
        "launch/slurm.sh",
        '-lt "$REQUEUES"',
        "-ge 0",
        f"{SCRIPTS}_a_job_goes_back_into_the_queue_when_that_can_help",
    ),
    Mutant(
        "SLURM ends those still saving",
        "launch/slurm.sh",
        "--kill-on-bad-exit=0",
        "--kill-on-bad-exit=1",
        f"{SCRIPTS}_a_dry_run_prints_the_command",
    ),
    Mutant(
        "one GPU of a node alone",
        "launch/slurm.sh",
        "JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((GPUS - 1)))",
        "JAX_LOCAL_DEVICE_IDS=0",
        f"{SCRIPTS}_a_task_of_a_job_learns_its_place",
    ),
    Mutant(
        "pods of two slices share numbers",
        "launch/jobset.yaml",
        "JOB_INDEX * ${HOSTS} + ",
        "",
        f"{SCRIPTS}_each_pod_of_each_slice_has_a_number_of_its_own",
    ),
    Mutant(
        "Kubernetes fills in the user's $",
        "launch/kubernetes.sh",
        "; s/\\$/$$/g",
        "",
        f"{SCRIPTS}_a_manifest_has_what_was_asked_for_tpu_slices",
    ),
    Mutant(
        "a flag that XLA does not know",
        "launch/flags.sh",
        "--xla_gpu_enable_pipelined_all_gather=true'",
        "--xla_gpu_pipelined_all_gather=true'",
        "launch/test_flags.py::test_xla_knows_the_flags",
    ),
    Mutant(
        "a host of a slice counts short",
        "launch/tpu_host.sh",
        " | wc -c) + 1))",
        " | wc -c)))",
        f"{SCRIPTS}_a_host_of_a_slice_asks_who_the_hosts_are",
    ),
    # ------------------------------------------------------------------------------- the mirror in PyTorch: step and optimizer
    Mutant(
        "PyTorch: labels shifted twice",
        "lumina_torch/step.py",
        'hidden_BTD.flatten(0, 1), micro["targets"].flatten()',
        'hidden_BTD.flatten(0, 1), micro["targets"].roll(-1, 1).flatten()',
        PARITY_STEP,
    ),
    Mutant(
        "PyTorch: accumulation averages averages",
        "lumina_torch/step.py",
        "loss = sums.loss / weight\n",
        'loss = sums.loss / micro["weights"].sum() / M\n',
        f"{STEP_T}_micro_batches_report_what_the_whole_batch_does",
    ),
    Mutant(
        "PyTorch: router losses added up over micro-batches",
        "lumina_torch/step.py",
        'micro["segments"] >= 0, tokens, balance_over',
        'micro["segments"] >= 0, _tokens(transformer, micro["segments"], share), balance_over',
        f"{STEP_T}_micro_batches_report_what_the_whole_batch_does",
    ),
    Mutant(
        "PyTorch: a skipped gradient is part of the next",
        "lumina_torch/step.py",
        "        state.optimizer.zero_grad(set_to_none=True)\n",
        "        if good:\n            state.optimizer.zero_grad(set_to_none=True)\n",
        f"{STEP_T}_a_gradient_of_a_skipped_step_is_not_part_of_the_next",
    ),
    Mutant(
        "PyTorch: schedule one step late",
        "lumina_torch/step.py",
        "rate(state.step) *",
        "rate(state.step - 1) *",
        f"{STEP_T}_every_learning_rate_of_the_warm_up_is_used",
    ),
    Mutant(
        "PyTorch: router bias follows the load",
        "lumina_torch/step.py",
        "load_LA.sum(-1, keepdim=True) - load_LA.shape[-1] * load_LA",
        "load_LA.shape[-1] * load_LA - load_LA.sum(-1, keepdim=True)",
        f"{STEP_T}_router_biases_move_once_a_step_against_the_load_of_all_micro_batches_and_stay_centred",
    ),
    Mutant(
        "PyTorch: sign of the update flipped",
        "lumina_torch/optimizer.py",
        'group["lr"] = learning_rate',
        'group["lr"] = -learning_rate',
        f"{OPTIMIZER_T}_updates_are_those_of_adamw_after_clipping_by_the_global_norm",
    ),
    Mutant(
        "PyTorch: decay on norms and embedding",
        "lumina_torch/optimizer.py",
        "tensor.name: tensor.decayed for",
        "tensor.name: True for",
        f"{OPTIMIZER_T}_exactly_the_matrices_decay",
    ),
    Mutant(
        "PyTorch: clip without the square root",
        "lumina_torch/optimizer.py",
        "for t in tensors)]).sum().sqrt()",
        "for t in tensors)]).sum()",
        f"{OPTIMIZER_T}_updates_are_those_of_adamw_after_clipping_by_the_global_norm",
    ),
    Mutant(
        "PyTorch: Adam's epsilon inside the root",
        "lumina_torch/optimizer.py",
        "    optimizer.step()\n",
        "    old = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group['params']]\n"
        "    optimizer.step()\n"
        "    for group in optimizer.param_groups:\n"
        "        (b1, b2), eps, decay = group['betas'], group['eps'], group['weight_decay']\n"
        "        for p, before in ((p, b) for p, b in old if any(p is q for q in group['params'])):\n"
        "            state = optimizer.state[p]\n"
        "            n = float(state['step'])\n"
        "            m, v = state['exp_avg'] / (1 - b1**n), state['exp_avg_sq'] / (1 - b2**n)\n"
        "            p.data = before * (1 - learning_rate * decay) - learning_rate * m / (v + eps).sqrt()\n",
        f"{OPTIMIZER_T}_updates_are_those_of_adamw_after_clipping_by_the_global_norm",
    ),
    # ------------------------------------------------------------------------------------------ the mirror: attention, caches
    Mutant(
        "PyTorch: segment mask dropped",
        "lumina_torch/attend.py",
        "causal_TT & (segments_BT[:, :, None] == segments_BT[:, None, :])",
        "causal_TT.expand(len(segments_BT), T, T)",
        f"{ATTEND_T}_a_form_equals_a_full_softmax_forward_and_backward",
    ),
    Mutant(
        "PyTorch: a query sees the next key",
        "lumina_torch/attend.py",
        "device=segments_BT.device).tril()",
        "device=segments_BT.device).tril(1)",
        f"{ATTEND_T}_no_key_of_the_future_or_of_another_document_reaches_a_query",
    ),
    Mutant(
        "PyTorch: packed documents run together",
        "lumina_torch/attend.py",
        "begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]",
        "begins_BT[:, 1:] = False",
        f"{ATTEND_T}_rows_of_the_variable_length_form_do_not_run_together",
    ),
    Mutant(
        "PyTorch: documents that lie apart packed as they lie",
        "lumina_torch/attend.py",
        "if bool((segments_BT[:, 1:] < segments_BT[:, :-1]).any()):",
        "if False:",
        f"{ATTEND_T}_a_form_equals_a_full_softmax_forward_and_backward",
    ),
    Mutant(
        "PyTorch: what was packed is left in the order of documents",
        "lumina_torch/attend.py",
        "mixed = mixed[torch.argsort(packed.order_N)]",
        "pass",
        f"{ATTEND_T}_a_form_equals_a_full_softmax_forward_and_backward",
    ),
    Mutant(
        "PyTorch: filling is in the first token's document",
        "lumina_torch/attend.py",
        ".masked_fill(index_BC < 0, NO_DOCUMENT)",
        "",
        f"{ATTEND_T}_places_of_some_tokens_are_those_that_they_have_in_the_row",
    ),
    Mutant(
        "PyTorch: query heads take key heads in turns",
        "lumina_torch/attend.py",
        "k_BTKh.repeat_interleave(G, 2)",
        "k_BTKh.repeat(1, 1, G, 1)",
        f"{ATTEND_T}_query_heads_share_key_heads_in_order",
    ),
    Mutant(
        "PyTorch: a cached query misses itself",
        "lumina_torch/attend.py",
        "<= last_BT.clamp(min=0)",
        "< last_BT.clamp(min=1)",
        f"{ATTEND_T}_cached_queries_see_the_places_up_to_their_last",
    ),
    Mutant(
        "PyTorch: rotation turned around",
        "lumina_torch/attention.py",
        "first * cos - second * sin",
        "first * cos + second * sin",
        f"{ATTENTION_T}_rotation_turns_halves_of_a_head_as_the_oracle_does",
    ),
    Mutant(
        "PyTorch: the norm's epsilon outside the root",
        "lumina_torch/attention.py",
        "torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True) + self.eps)",
        "1 / ((wide * wide).mean(dim=-1, keepdim=True).sqrt() + self.eps)",
        f"{ATTENTION_T}_rms_norm_has_its_epsilon_within_the_root_and_runs_in_float32",
    ),
    Mutant(
        "PyTorch: a cache that grows forgets",
        "lumina_torch/attention.py",
        "torch.cat([a, torch.zeros_like(a)], dim=1)",
        "torch.cat([torch.zeros_like(a), a], dim=1)",
        f"{ATTENTION_T}_a_cache_grows_to_hold_what_it_is_given_and_keeps_what_it_has",
    ),
    Mutant(
        "PyTorch: positions restart in the cache",
        "lumina_torch/generate.py",
        "places_1T = start + torch.arange(",
        "places_1T = torch.arange(",
        f"{GENERATE_T}_greedy_tokens_with_the_cache_are_those_without",
    ),
    Mutant(
        "PyTorch: the cache keeps filling",
        "lumina_torch/model.py",
        "selection.index_BC.clamp(min=0)) & taken",
        "selection.index_BC.clamp(min=0))",
        f"{MODEL_T}_tokens_through_the_caches_equal_the_whole_row_and_only_those_taken_are_kept",
    ),
    # --------------------------------------------------------------------------------------- the mirror: Mixture-of-Experts
    Mutant(
        "PyTorch: top-1 gate renormalised",
        "lumina_torch/moe.py",
        "if moe.renormalise and moe.top_k > 1:",
        "if moe.renormalise and moe.top_k > 0:",
        f"{MOE_T}_top1_gate_is_not_renormalised",
    ),
    Mutant(
        "PyTorch: gate with the selection bias",
        "lumina_torch/moe.py",
        "gates_BTk = scores_BTA.gather(",
        "gates_BTk = (scores_BTA + bias_A).gather(",
        f"{MOE_T}_bias_changes_the_choice_but_not_the_gate",
    ),
    Mutant(
        "PyTorch: ties go to the higher expert",
        "lumina_torch/moe.py",
        "    values, indices = torch.sort(x, dim=-1, descending=True, stable=True)\n",
        "    values, indices = torch.sort(x.flip(-1), dim=-1, descending=True, stable=True)\n"
        "    indices = x.shape[-1] - 1 - indices\n",
        f"{MOE_T}_equal_scores_choose_the_lower_and_training_equals_the_loop",
    ),
    Mutant(
        "PyTorch: ties go where topk likes",
        "lumina_torch/moe.py",
        "torch.sort(x, dim=-1, descending=True, stable=True)",
        "torch.topk(x, count, dim=-1)",
        f"{MOE_T}_of_equal_values_the_lower_index_is_highest",
    ),
    Mutant(
        "PyTorch: one slot too many",
        "lumina_torch/moe.py",
        "(place_BN < capacity)",
        "(place_BN <= capacity)",
        f"{MOE_T}_drops_are_those_of_a_queue_by_position_then_rank",
    ),
    Mutant(
        "PyTorch: first choices served before second",
        "lumina_torch/moe.py",
        "    experts_BN = experts_BTk.flatten(1)\n    chosen_BNE",
        "    B, T, k = experts_BTk.shape\n"
        "    if k > 1:\n"
        "        by_rank_BN1 = experts_BTk.transpose(1, 2).reshape(B, T * k, 1)\n"
        "        return assign_slots(by_rank_BN1, num_experts, capacity).reshape(B, k, T).transpose(1, 2)\n"
        "    experts_BN = experts_BTk.flatten(1)\n    chosen_BNE",
        f"{MOE_T}_an_earlier_second_choice_is_served_before_a_later_first",
    ),
    Mutant(
        "PyTorch: evaluation drops",
        "lumina_torch/moe.py",
        'if training and moe.dispatch == "capacity":',
        'if moe.dispatch == "capacity":',
        f"{MOE_T}_evaluation_drops_nothing_and_equals_the_loop",
    ),
    Mutant(
        "PyTorch: load counts tokens that are left out",
        "lumina_torch/moe.py",
        "        experts_BTk = experts_BTk.masked_fill(left_BT1, alternatives)\n",
        "",
        f"{MOE_T}_edges_in_float32_equal_the_loop_forward_and_backward",
    ),
    Mutant(
        "PyTorch: a group is worth its best expert alone",
        "lumina_torch/moe.py",
        "min(2, grouped_BTGa.shape[-1])",
        "1",
        f"{MOE_T}_choices_come_from_the_groups_whose_two_best_add_up_highest",
    ),
    Mutant(
        "PyTorch: a choice of none goes to an expert",
        "lumina_torch/grouped.py",
        "torch.where((expert_S >= 0) & (expert_S < num_experts), expert_S, num_experts)",
        "expert_S.clamp(0, num_experts)",
        f"{GROUPED_T}_choices_are_sorted_by_expert_each_in_the_order_of_its_tokens",
    ),
    Mutant(
        "PyTorch: what a kernel leaves behind is read",
        "lumina_torch/grouped.py",
        "torch.where(expert_S < num_experts, place_S, -1)",
        "place_S",
        f"{GROUPED_T}_rows_beyond_the_last_expert_reach_neither_output_nor_gradient",
    ),
    Mutant(
        "PyTorch: dropout by place in the micro-batch",
        "lumina_torch/draw.py",
        "for row in self.rows_B:",
        "for row in range(len(self.rows_B)):",
        f"{DRAW_T}_a_row_draws_by_its_number_wherever_it_stands",
    ),
    # ---------------------------------------------------------------------------------------- the mirror: Mixture-of-Depths
    Mutant(
        "PyTorch: everything computed, then masked",
        "lumina_torch/mod.py",
        "        out_BCD, metrics = inner(x_BCD, places.at(self.index_BC), self.index_BC >= 0)\n",
        "        out_BTD, metrics = inner(x_BTD, places, self.taken_BT)\n"
        "        out_BCD = take_rows(out_BTD, self.index_BC, self.slot_BT[:, :, None])\n",
        f"{MOD_T}_what_is_skipped_is_not_computed",
    ),
    Mutant(
        "PyTorch: a layer that no token takes is run",
        "lumina_torch/mod.py",
        "[:, : int(taken_BT.sum(dim=1).max())]",
        "[:, : max(1, int(taken_BT.sum(dim=1).max()))]",
        f"{MOD_T}_where_no_token_takes_the_layer_it_is_not_called",
    ),
    Mutant(
        "PyTorch: the token at the threshold dropped",
        "lumina_torch/mod.py",
        "    wish_BC, index_BC = highest(wish_BT, count)\n",
        "    wish_BC, index_BC = highest(wish_BT, count)\n"
        "    index_BC = torch.where(wish_BC > wish_BC[:, -1:], index_BC, index_BC[:, :1])\n",
        f"{MOD_T}_the_token_at_the_threshold_takes_the_layer",
    ),
    Mutant(
        "PyTorch: a gate of one half takes the layer",
        "lumina_torch/mod.py",
        "causal_BT.detach() > 0",
        "causal_BT.detach() >= 0",
        f"{MOD_T}_the_causal_choice_takes_gates_above_one_half",
    ),
    Mutant(
        "PyTorch: the selected out of their order",
        "lumina_torch/mod.py",
        "T).sort(dim=1).values",
        "T)",
        f"{MOD_T}_inner_is_given_the_selected_alone_in_their_order_at_their_positions",
    ),
    Mutant(
        "PyTorch: residual of a block counted twice",
        "lumina_torch/model.py",
        "return mixed + out, metrics",
        "return x + mixed + out, metrics",
        f"{MOD_T}_residual_is_not_counted_twice",
    ),
    Mutant(
        "PyTorch: positions counted anew among the selected",
        "lumina_torch/attend.py",
        "Places(segments_BC, self.positions_BT.gather(1, index))",
        "Places(segments_BC, torch.arange(index.shape[1], device=index.device).expand_as(index))",
        f"{MOD_T}_a_layer_equals_the_slow_one_among_the_selected_and_leaves_the_others_bit_for_bit",
    ),
    Mutant(
        "PyTorch: predictor teaches what lies below",
        "lumina_torch/mod.py",
        "still_BTD = wide_BTD.detach()",
        "still_BTD = wide_BTD",
        f"{MOD_T}_predictor_loss_teaches_what_decides_and_nothing_below_it",
    ),
    Mutant(
        "PyTorch: a predictor's gate",
        "lumina_torch/mod.py",
        "Selection(taken_BT, logit_BT.sigmoid()",
        "Selection(taken_BT, causal_BT.sigmoid()",
        f"{MOD_T}_equals_computing_all_and_masking_forward_and_backward",
    ),
    Mutant(
        "PyTorch: random choice the same in all layers",
        "lumina_torch/mod.py",
        "self.mod.capacity - uniform(places.positions_BT, layer)",
        "self.mod.capacity - uniform(places.positions_BT, 0)",
        f"{MOD_T}_equals_computing_all_and_masking_forward_and_backward",
    ),
    # -------------------------------------------------------------------------------------------- the mirror: the whole model
    Mutant(
        "PyTorch: a tied head read along the wrong axis",
        "lumina_torch/model.py",
        "self.embedding.weight.T if",
        "self.embedding.weight.reshape(self.model.d_model, -1) if",
        f"{MODEL_T}_float32_equals_the_slow_transformer",
    ),
    Mutant(
        "PyTorch: a wrong shape is broadcast",
        "lumina_torch/model.py",
        "        if given != wanted:\n",
        '        if given == "missing" or wanted == "no such tensor":\n',
        f"{MODEL_T}_a_state_that_does_not_fit_is_refused_by_name_and_nothing_is_changed",
    ),
    Mutant(
        "PyTorch: every seed initialises alike",
        "lumina_torch/model.py",
        'f"{seed} {tensor.name}"',
        'f"{tensor.name}"',
        f"{MODEL_T}_every_tensor_and_every_seed_draws_its_own_values_and_the_same_ones_again",
    ),
    Mutant(
        "PyTorch: layers recomputed with other random numbers",
        "lumina_torch/model.py",
        "checkpoint(block, x_BTD, places, mode, *of_layer, use_reentrant=False)",
        "checkpoint(block, x_BTD, places, mode, number, draw, *of_layer[2:], use_reentrant=False)",
        f"{MODEL_T}_rematerialisation_gives_the_same_bits",
    ),
    # --------------------------------------------------------------------------- interchange, export, several PyTorch processes
    Mutant(
        "interchange: a state's values not compared with those saved",
        "lumina/interchange/state.py",
        "        if wrong := changed(found, leaves):\n",
        "        if wrong := []:\n",
        "lumina/interchange/test_state.py",
    ),
    Mutant(
        "interchange: layers unstacked in the wrong order",
        "lumina/interchange/orbax.py",
        "zip(where.names, array if where.stacked",
        "zip(where.names, array[::-1] if where.stacked",
        "lumina/interchange/test_state.py",
    ),
    Mutant(
        "interchange: JAX's moments read as each other",
        "lumina/interchange/orbax.py",
        'mu\\.(.+)", "first_moment")',
        'mu\\.(.+)", "second_moment")',
        "lumina/interchange/test_state.py",
    ),
    Mutant(
        "interchange: Adam corrects its bias by steps, not updates",
        "lumina_torch/checkpoint.py",
        "state.second_moment, state.updates)",
        "state.second_moment, state.step)",
        "lumina_torch/test_checkpoint.py",
    ),
    Mutant(
        "interchange: a state goes on under another config",
        "lumina/runs/origin.py",
        "    if changed and not accept:\n        raise ConfigError(",
        "    if False:\n        raise ConfigError(",
        "lumina/runs/test_origin.py",
    ),
    Mutant(
        "interchange: weights go on with the source's moments",
        "lumina/runs/origin.py",
        'return State(0, state.weights), {"begun_from"',
        'return state, {"begun_from"',
        "lumina/runs/test_origin.py",
    ),
    Mutant(
        "interchange: gate and up exchanged for Mixtral",
        "lumina/interchange/huggingface.py",
        '{"gate": "w1", "up": "w3", "down": "w2"}',
        '{"gate": "w3", "up": "w1", "down": "w2"}',
        "lumina/interchange/test_huggingface.py",
    ),
    Mutant(
        "interchange: Qwen3 always renormalises",
        "lumina/interchange/huggingface.py",
        '"norm_topk_prob": model.moe.renormalise and model.moe.top_k > 1',
        '"norm_topk_prob": True',
        "lumina/interchange/test_huggingface.py",
    ),
    Mutant(
        "interchange: another gelu",
        "lumina/interchange/huggingface.py",
        '"geglu": "gelu_pytorch_tanh"',
        '"geglu": "gelu"',
        "lumina/interchange/test_huggingface.py",
    ),
    Mutant(
        "interchange: top-1 as Mixtral, whose gate is constant",
        "lumina/interchange/huggingface.py",
        'if form == "mixtral" and moe.top_k == 1:',
        'if form == "mixtral" and moe.top_k < 1:',
        "lumina/interchange/test_huggingface.py",
    ),
    Mutant(
        "interchange: an export that is off by more is written",
        "lumina/interchange/verify.py",
        "TOLERANCE = 1e-5",
        "TOLERANCE = 1e-4",
        "lumina/interchange/test_export.py",
    ),
    Mutant(
        "interchange: bfloat16 read a bit to the right",
        "lumina/interchange/safe_tensors.py",
        "upper.astype(np.uint32) << 16",
        "upper.astype(np.uint32) << 15",
        "lumina/interchange/test_import.py",
    ),
    Mutant(
        "interchange: a scaled RoPE imported as a plain one",
        "lumina/interchange/foreign.py",
        "set(rope) - _PLAIN_ROPE or ",
        "",
        "lumina/interchange/test_import.py",
    ),
    Mutant(
        "ZeRO: gradients are the mean of processes",
        "lumina_torch/zero.py",
        "objective * self.place.processes, scale",
        "objective, scale",
        "lumina_torch/test_zero.py",
    ),
    Mutant(
        "ZeRO: loss over a process's own weight",
        "lumina_torch/step.py",
        'share.total(batch["weights"].sum())',
        'batch["weights"].sum()',
        "lumina_torch/test_zero.py",
    ),
    Mutant(
        "ZeRO: a bad step updates",
        "lumina_torch/zero.py",
        "if good and knobs.update else None",
        "if knobs.update else None",
        "lumina_torch/test_zero.py",
    ),
    Mutant(
        "ZeRO: stage 3 loads the first part everywhere",
        "lumina_torch/zero.py",
        "padded_N.narrow(0, own * self.place.number, own)",
        "padded_N.narrow(0, 0, own)",
        "lumina_torch/test_zero.py",
    ),
    # -------------------------------------------------------------------------------------------------- the certificate
    Mutant(
        "float64 has the last word on every finding",
        "lumina_jax/passes.py",
        "if why := why_final(found, forward):",
        'if why := "":',
        CERTIFY,
    ),
    Mutant(
        "a control that was not refused is no matter",
        "lumina/runs/certificate.py",
        'if control.get("applicable") and not control["refused"]:',
        'if control.get("applicable") and False:',
        "lumina/runs/test_certificate.py",
    ),
    Mutant(
        "ties counted whole in AUROC",
        "lumina/runs/ranks.py",
        "rank = np.cumsum(size) - (size - 1) / 2",
        "rank = np.cumsum(size)",
        CERTIFY,
    ),
    Mutant(
        "any first flip passes for a near-tie",
        "lumina_jax/passes.py",
        'if not found["largest_margin_of_a_first_flip"] < NEAR:',
        "if False:",
        CERTIFY,
    ),
    Mutant(
        "certified as configured, not as annealed",
        "lumina_jax/certify.py",
        "state_shapes(trained)[1]",
        "state_shapes(config)[1]",
        CERTIFY,
    ),
]


def plant(mutant: Mutant, directory: Path) -> str:
    """Run the tests of a copy with the mistake in it; the name of the first that failed, "" if none did."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, directory / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, directory)
    file = directory / mutant.file
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(mutant.right, mutant.wrong), encoding="utf-8")
    test = mutant.tests if mutant.tests.startswith("parity_tests/") else f"tests/{mutant.tests}"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=no", test]
    # Most of a run is compiling what the mistake does not touch: a cache serves all of them.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(directory.parent / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | cache | {"PYTHONPATH": str(directory)}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{mutant.name}: pytest did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return failed.group(1) if failed else ""


def main() -> int:
    """Plant every mistake whose name contains the argument; print a line each."""
    chosen = [mutant for mutant in [*MUTANTS, *DATA] if not sys.argv[1:] or sys.argv[1] in mutant.name]
    for mutant in chosen:
        if mutant.right not in (ROOT / mutant.file).read_text(encoding="utf-8"):
            sys.exit(f"error: {mutant.name}: {mutant.file} no longer holds {mutant.right!r}")
    caught, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lumina-mutants-") as scratch:
        for number, mutant in enumerate(chosen, 1):
            directory = Path(scratch) / "copy"
            directory.mkdir()
            failed = plant(mutant, directory)
            shutil.rmtree(directory)
            caught += bool(failed)
            left = (time.monotonic() - began) / number * (len(chosen) - number)
            verdict = f"caught by {failed.removeprefix('tests/')}" if failed else f"SURVIVED {mutant.tests}"
            print(f"{number}/{len(chosen)} ({left:.0f} s left)  {mutant.name}: {verdict}", flush=True)
    print(f"{caught} of {len(chosen)} mistakes caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
