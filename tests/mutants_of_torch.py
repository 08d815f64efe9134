"""The mistakes of `make mutants` in the mirror in PyTorch."""

from mutant import Mutant

ATTEND_T, ATTENTION_T, DRAW_T, GENERATE_T, GROUPED_T, MOD_T, MODEL_T, MOE_T, OPTIMIZER_T, STEP_T = (
    f"lumina_torch/test_{name}.py::test"
    for name in ("attend", "attention", "draw", "generate", "grouped", "mod", "model", "moe", "optimizer", "step")
)
PARITY_STEP = "parity_tests/test_step.py::test_a_step_in_float32_gives_the_same_numbers"

TORCH = [
    # ------------------------------------------------------------------------------ the mirror in PyTorch: step and optimizer
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
    Mutant(
        "PyTorch: empty positions counted as tokens",
        "lumina_torch/step.py",
        "real_B = (segments_BT >= 0).sum(1)",
        "real_B = (segments_BT >= -1).sum(1)",
        f"{STEP_T}_router_metrics_equal_the_slow_ones_summarised",
    ),
    Mutant(
        "PyTorch: experts of a layer that tokens skip counted as seeing all",
        "lumina_torch/step.py",
        'if hasattr(block, "mod") else real_B',
        "if False else real_B",
        f"{STEP_T}_router_metrics_equal_the_slow_ones_summarised",
    ),
    Mutant(
        "PyTorch: agreement over empty positions",
        "lumina_torch/step.py",
        '((decided_LBT == depth["taken_BT"]) & real_BT)',
        '(decided_LBT == depth["taken_BT"])',
        f"{STEP_T}_router_metrics_equal_the_slow_ones_summarised",
    ),
    Mutant(
        "PyTorch: causal capacity over empty positions",
        "lumina_torch/step.py",
        "(decided_LBT & real_BT)",
        "decided_LBT",
        f"{STEP_T}_router_metrics_equal_the_slow_ones_summarised",
    ),
    Mutant(
        "PyTorch: a tie decided by how a mean is rounded",
        "lumina_torch/step.py",
        "torch.sign(load_LA.sum(-1, keepdim=True) - load_LA.shape[-1] * load_LA).float()",
        "torch.sign(load_LA.float().sum(-1, keepdim=True) * (1 / load_LA.shape[-1]) - load_LA.float())",
        f"{STEP_T}_a_tie_is_one_however_many_alternatives_there_are",
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
    Mutant(
        "PyTorch: empty positions are a document",
        "lumina_torch/attend.py",
        "segments_BT.masked_fill(segments_BT < 0, NO_DOCUMENT)",
        "segments_BT",
        f"{MODEL_T}_what_empty_positions_hold_changes_nothing_of_the_others",
    ),
    # ----------------------------------------------------------------------------------------- the mirror: Mixture-of-Experts
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
    Mutant(
        "PyTorch: z-loss of tokens that are left out",
        "lumina_torch/moe.py",
        "(logits_BTA.logsumexp(dim=-1) ** 2).masked_fill(~taken_BT, 0).sum()",
        "(logits_BTA.logsumexp(dim=-1) ** 2).sum()",
        f"{MOE_T}_edges_in_float32_equal_the_loop_forward_and_backward",
    ),
    Mutant(
        "PyTorch: shares count tokens that are left out",
        "lumina_torch/moe.py",
        "share_BTA = share_BTA.masked_fill(left_BT1, 0)",
        "pass",
        f"{MOE_T}_edges_in_float32_equal_the_loop_forward_and_backward",
    ),
    Mutant(
        "PyTorch: a row without tokens divides by zero",
        "lumina_torch/moe.py",
        ".sum(dim=-1, keepdim=True).clamp(min=1)",
        ".sum(dim=-1, keepdim=True)",
        f"{STEP_T}_router_metrics_equal_the_slow_ones_summarised",
    ),
    # ------------------------------------------------------------------------------------------ the mirror: Mixture-of-Depths
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
    Mutant(
        "PyTorch: empty positions are selected",
        "lumina_torch/mod.py",
        "select_top(wish_BT.detach().masked_fill(~real_BT, -torch.inf), ",
        "select_top(wish_BT.detach(), ",
        f"{MOD_T}_equals_computing_all_and_masking_forward_and_backward",
    ),
    Mutant(
        "PyTorch: a place that is left over goes to whatever is empty",
        "lumina_torch/mod.py",
        "index_BC = index_BC.masked_fill(wish_BC == -torch.inf, T).sort(dim=1).values",
        "index_BC = index_BC.sort(dim=1).values",
        f"{MOD_T}_where_the_wish_is_minus_infinity_nothing_is_selected",
    ),
    Mutant(
        "PyTorch: empty positions take the layer in evaluation",
        "lumina_torch/mod.py",
        "(causal_BT.detach() > 0) & real_BT",
        "causal_BT.detach() > 0",
        f"{MOD_T}_equals_computing_all_and_masking_forward_and_backward",
    ),
    Mutant(
        "PyTorch: the predictor learns from empty positions",
        "lumina_torch/mod.py",
        "nats_BT.masked_fill(~real_BT, 0).sum()",
        "nats_BT.sum()",
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
    Mutant(
        "PyTorch: experts see empty positions",
        "lumina_torch/model.py",
        "feedforward(z_BTD, places.real_BT)",
        "feedforward(z_BTD, torch.ones_like(places.real_BT))",
        f"{MODEL_T}_what_empty_positions_hold_changes_nothing_of_the_others",
    ),
    # ------------------------------------------------------------------------------------------ the mirror: several processes
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
]
