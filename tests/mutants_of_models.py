"""The mistakes of `make mutants` in models: attention, Mixture-of-Experts, Mixture-of-Depths, and their text."""

from mutant import Mutant

STEP, MODEL, MOE, MOD, ATTENTION, GROUPED, ATTEND, EVALUATE, GENERATE = (
    f"lumina_jax/test_{name}.py"
    for name in ("step", "model", "moe", "mod", "attention", "grouped", "attend", "evaluate", "generate")
)
ARCHITECTURE, TOKENIZER = (f"lumina/test_{name}.py" for name in ("architecture", "tokenizer"))
GENERATE_T = "lumina_torch/test_generate.py::test"

MODELS = [
    # -------------------------------------------------------------------------------------------------------------- attention
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
    # ----------------------------------------------------------------------------------------------------- Mixture-of-Experts
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
    Mutant(
        "z-loss of tokens that are left out",
        "lumina_jax/moe.py",
        "axis=-1) ** 2, where=taken_BT)",
        "axis=-1) ** 2)",
        f"{MOE}::test_edges_in_float32_equal_the_loop_forward_and_backward",
    ),
    Mutant(
        "shares count tokens that are left out",
        "lumina_jax/moe.py",
        "jnp.sum(share_BTA, axis=1, where=taken_BT1)",
        "jnp.sum(share_BTA, axis=1)",
        f"{MOE}::test_edges_in_float32_equal_the_loop_forward_and_backward",
    ),
    # ------------------------------------------------------------------------------------------------------ Mixture-of-Depths
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
    Mutant(
        "empty positions are selected",
        "lumina_jax/mod.py",
        "jnp.where(real_BT, jax.lax.stop_gradient(wish_BT), -jnp.inf)",
        "jax.lax.stop_gradient(wish_BT)",
        f"{MOD}::test_equals_computing_all_and_masking_forward_and_backward",
    ),
    Mutant(
        "empty positions take the layer in evaluation",
        "lumina_jax/mod.py",
        "(causal_BT > 0) & real_BT",
        "causal_BT > 0",
        f"{MOD}::test_equals_computing_all_and_masking_forward_and_backward",
    ),
    Mutant(
        "a place that is left over goes to whatever is empty",
        "lumina_jax/mod.py",
        "jnp.where(wish_BC == -jnp.inf, T, index_BC)",
        "index_BC",
        f"{MOD}::test_where_the_wish_is_minus_infinity_nothing_is_selected",
    ),
    Mutant(
        "the predictor learns from empty positions",
        "lumina_jax/mod.py",
        "target_BT * causal_BT, where=real_BT)",
        "target_BT * causal_BT)",
        f"{MOD}::test_equals_computing_all_and_masking_forward_and_backward",
    ),
    # ------------------------------------------------------------------------------------------------------- grouped products
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
    # ---------------------------------------------------------------------------------------------- evaluation and generation
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
]
