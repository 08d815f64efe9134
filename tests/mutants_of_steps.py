"""The mistakes of `make mutants` in a training step: loss, micro-batches, optimizer, bad steps."""

from mutant import Mutant

STEP, OPTIMIZER, LOSS = (f"lumina_jax/test_{name}.py" for name in ("step", "optimizer", "loss"))
LOOP = "lumina/runs/test_loop.py"
ROWS = "lumina/data/test_rows.py"

STEPS = [
    # ------------------------------------------------------------------------------------------------------- loss and targets
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
    # ----------------------------------------------------------------------------------------------------------- accumulation
    Mutant(
        "accumulation averages averages",
        "lumina_jax/step.py",
        "loss = sums.loss / weight\n",
        'loss = sums.loss / jnp.sum(micro["weights"]) / M\n',
        STEP,
    ),
    Mutant("last micro-batch dropped", "lumina_jax/step.py", "fori_loop(0, count,", "fori_loop(0, count - 1,", STEP),
    # -------------------------------------------------------------------------------------------------------------- optimizer
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
    Mutant(
        "a tie decided by how a mean is rounded",
        "lumina_jax/step.py",
        "below_LA = (load_LA < mean_L1) | ((load_LA == mean_L1) & (rest_L1 > 0))",
        "below_LA = load_LA < jnp.sum(load_LA, axis=-1, keepdims=True).astype(jnp.float32) * (1 / load_LA.shape[-1])",
        f"{STEP}::test_a_tie_is_one_however_many_alternatives_there_are",
    ),
    Mutant(
        "a load that is below the mean by a fraction is left alone",
        "lumina_jax/step.py",
        " | ((load_LA == mean_L1) & (rest_L1 > 0))",
        "",
        f"{STEP}::test_a_tie_is_one_however_many_alternatives_there_are",
    ),
    # -------------------------------------------------------------------------------------------------- devices and processes
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
    # -------------------------------------------------------------------------------------------------------------- bad steps
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
]
