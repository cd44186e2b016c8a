"""Plants one defect at a time in a copy of the packages and sees the named test fail; run as a program.

A defect that no longer finds its text, or that its test survives, is an error: `python tests/planted_defects.py [word]`
(only the defects whose file or test contains `word`).
"""

import gc
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# One thread a process. What takes seconds to import is imported here, once, and of ours nothing is.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import hypothesis  # noqa: F401
import pytest
import torch._dynamo
import torch._inductor.compile_fx
import torch.nn.attention.flex_attention  # noqa: F401

ROOT = Path(__file__).parent.parent


class Defect(NamedTuple):
    path: str  # file, under the project's root
    text: str  # occurs once
    wrong: str  # put in its place
    test: str  # fails then: test_file.py::name, without "tests/"


EACH = "test_mask_mods.py::test_each_mask_equals_its_definition"
BLOCKS = "test_mask_mods.py::test_block_rule_of_each_mask_equals_brute_force"
COMPOSED = "test_mask_mods.py::test_block_rule_of_compositions_equals_brute_force"
PLACED = "test_mask_mods.py::test_each_mask_stands_where_the_call_stands"
PARTS = "test_mask_mods.py::test_compositions_and_runs_of_heads_place_their_parts"
REFUSED = "test_mask_checks.py::test_masks_of_another_call_are_refused"
GRAPHS = "test_mask_graphs.py::test_a_mask_s_graph"
SEQUENCES = "test_mask_sequences.py::test_masks_one_after_another_attend_as_alone"
SHORT = "test_mask_sequences.py::test_padded_sequences_shorter"
ORACLE = "test_selection.py::test_keeps_exactly_the_oracle_s_blocks"
ANY = "test_selection.py::test_any_setting_selects_as_the_oracle"
LONG_ROWS = "test_estimators.py::test_a_scaled_threshold_is_one_on_a_long_row_s_mean_share"
SEARCHES = "test_searches.py::test_both_searches_agree"
STRIPS = "test_head_slices.py::test_a_selection_in_strips_is_the_selection"
DENSE = "test_dense.py::test_a_long_context_is_sparse_and_counted"
SOFTMAX = "test_attention.py::test_soft_caps_and_sinks_are_in_the_softmax"
APART = "test_last_rows.py::test_rows_apart_change_nothing"
LISTS = "test_block_mask.py::test_lists_hold_the_kept_blocks_and_nothing_else"
ANOTHER_PROMPT = "test_state.py::test_what_a_state_is_not_for"
STRANGE = "test_strange_calls.py::test_"
MOVED = f"{STRANGE}a_private_part_that_moved_is_named_with_the_versions_that_were_tested"
SYMBOLS = "test_whoever_runs.py::test_a_caller_s_compiler_that_makes_symbols_of_all_numbers"
LOOKED_UP = "test_compile.py::test_a_kernel_looks_no_kept_block_up"
COUNTS = "test_selection_symmetries.py::test_equal_keys_have_equal_mass"

TRUE_PLACES = "test_distributed.py::test_places_are_those_of_the_true_flags"
TO_RANKS = "test_distributed.py::test_tokens_go_to_ranks_and_come_back"

WHOLE_ROWS = "test_serving_rows.py::test_whole_rows_of_a_chunk_are_sparse"
SHORT_ROWS = "test_serving_rows.py::test_rows_that_end_before_the_shortest_length_are_dense_wherever_the_prompt_is_cut"
SINGLE_FIRST = "test_serving_rows.py::test_the_dense_batch_has_single_queries_first"
POOLED_ONCE = "test_serving_pages.py::test_each_stride_is_pooled_once_when_its_last_token_is_written"
ONTO_PAGES = "test_serving_pages.py::test_lists_name_the_pool_s_blocks"
LAYOUTS = "test_serving_pages.py::test_the_layouts_of_a_server_are_views"
AT_ONCE = "test_serving_paged.py::test_requests_selected_at_once_have_the_blocks_of_each_alone"
PAGE_CHECKED = "test_serving_plugin.py::test_pages_and_page_layouts_are_checked"
CHUNK = "test_dense.py::test_a_chunk_is_dense_through_the_dense_kernel"
DECIDED = "test_break_even.py::test_what_was_said_is_before_what_was_measured"
UNFUSED = "test_break_even.py::test_the_shortest_sparse_prompt_is_sparse_and_one_row_less_is_not"
EXPECTED = "test_break_even.py::test_what_is_expected_is_the_mandatory_blocks_and_what_the_budget_says"
OFF_GRID = "test_state.py::test_whole_rows_of_a_chunk_off_the_grid_are_those_of_one_shot"

NO_MASK = "test_mask_checks.py::test_what_is_no_mask"
CAPTURED = "test_captured.py::test_every_chunk_is_what_it_is_alone"

DEFECTS = [
    Defect(
        "rr_flex/kernels/break_even.py", "rising + after * keys", "rising", "test_break_even.py::test_visible_pairs_are"
    ),
    Defect(
        "rr_flex/kernels/break_even.py",
        "Decision(density < most",
        "Decision(density > most",
        "test_break_even.py::test_sparse_is_chosen",
    ),
    Defect(
        "rr_flex/kernels/break_even.py",
        "if costs.host >= allowed:",
        "if costs.host > 2 * allowed:",
        "test_break_even.py::test_sparse_is_chosen",
    ),
    Defect("mask_mods/spans.py", "(kv_idx <= last)", "(kv_idx < last)", EACH),
    Defect("mask_mods/spans.py", "value[0] if value.shape[0] == 1 else value[b]", "value[0]", EACH),
    Defect("mask_mods/causal.py", "self.position(b, q_idx)", "self.position(b, q_idx) + 1", EACH),
    Defect("mask_mods/sliding_window.py", "position - (self.window - 1)", "position - self.window", EACH),
    Defect("mask_mods/document.py", "only_where(inside, first, last)", "(first, last)", EACH),
    Defect("mask_mods/prefix.py", "per_batch(self.length, b) - 1", "per_batch(self.length, b)", EACH),
    Defect("mask_mods/padding.py", "only_where(real, first, last)", "(first, last)", EACH),
    Defect("mask_mods/spans.py", "last * 0 - 1", "-1", GRAPHS),
    Defect("mask_mods/spans.py", "value.expand(max(B, 2)).contiguous()", "value", GRAPHS),
    Defect("mask_mods/sink.py", "(0, self.count - 1)", "(0, self.count)", EACH),
    Defect("mask_mods/frames.py", "(frame - self.past)", "(frame - self.past + 1)", EACH),
    Defect("mask_mods/bidirectional.py", "((0, 2 * LARGEST", "((1, 2 * LARGEST", EACH),
    Defect(
        "mask_mods/compose.py",
        "reduce(smaller, [last for",
        "reduce(larger, [last for",
        "test_mask_mods.py::test_compositions_equal_their_definition",
    ),
    Defect("mask_mods/positions.py", "offset=q_offset) if", "offset=0) if", PLACED),
    Defect(
        "mask_mods/positions.py", "if self.offset is None else self", "", "test_mask_mods.py::test_an_offset_of_its_own"
    ),
    Defect("mask_mods/compose.py", "[place(mask, q_offset) for mask in", "[mask for mask in", PARTS),
    Defect("mask_mods/heads.py", "place(self.mask_mod, q_offset)", "self.mask_mod", PARTS),
    Defect("mask_mods/checks.py", "value.shape[0] != B", "value.shape[0] > B", REFUSED),
    Defect(
        "mask_mods/checks.py",
        " and type(torch.empty(0)) is not Tensor",
        "",
        "test_mask_checks.py::test_what_another_thread_exports",
    ),
    Defect("rr_flex/level.py", "torch.full((), share, ", "torch.full((), level[0], ", f"{STRANGE}levels_are_the_same"),
    Defect(
        "mask_mods/compose.py",
        "for mask in self.masks:\n            check_mask_mod",
        "for mask in self.masks[:1]:\n            check_mask_mod",
        REFUSED,
    ),
    Defect("mask_mods/checks.py", "if shown.dtype != torch.bool:", "if False:", NO_MASK),
    Defect("mask_mods/checks.py", "if function in READS:", "if False:", NO_MASK),
    Defect("mask_mods/padding.py", "self.total != Lk", "self.total < Lk", REFUSED),
    Defect("mask_mods/document.py", "if returns.any():", "if returns.all():", REFUSED),
    Defect("mask_mods/blocks.py", "buffered(mask_mod.keys(b, h, kv_idx))", "mask_mod.keys(b, h, kv_idx)", SHORT),
    Defect(
        "rr_flex/cli/output.py", "except BrokenPipeError", "except EOFError", "test_cli.py::test_a_reader_that_has_gone"
    ),
    Defect(
        "rr_flex/view/page/runs.py",
        ' or path.suffix == ".jsonl"',
        "",
        "test_page.py::test_json_lines_of_records",
    ),
    Defect("rr_flex/runtime/private.py", "ImportError | AttributeError", "ImportError", MOVED),
    Defect("rr_flex/fields.py", "if value != value:", "if __import__('math').isnan(value):", SYMBOLS),
    Defect("rr_flex/kernels/deciding.py", "if keeps.most < math.inf", "if not math.isinf(keeps.most)", SYMBOLS),
    Defect("rr_flex/runtime/is_kept.py", "constant(True, ", "constant(False, ", LOOKED_UP),
    Defect("rr_flex/level.py", "@lru_cache(maxsize=4096)\n", "", f"{STRANGE}levels_are_the_same"),
    Defect(
        "rr_flex/tasks/results.py", "if config.budget == first", "if True", "test_tasks.py::test_settings_are_named"
    ),
    Defect(
        "rr_flex/cli/tasks.py",
        "        check_samples(suite, plan, tokenizer)\n",
        "",
        "test_arguments.py::test_tasks_look_at",
    ),
    Defect(
        "rr_flex/tasks/results.py",
        "for name in differing",
        "for name in ()",
        "test_tasks.py::test_a_table_hides_no_cell",
    ),
    Defect(
        "rr_flex/runtime/mends.py",
        "        with _lock:\n            _mend_once()",
        "        _mend_once()",
        "test_compile.py::test_threads_mend_torch_once",
    ),
    Defect("rr_flex/runtime/mends.py", "[*names, *(symbol", "[*names, *(() and symbol", SEQUENCES),
    Defect(
        "rr_flex/runtime/mends.py",
        "inner if inner.is_Number else None",
        "None",
        "test_compile.py::test_a_padded_index_is_a_number_where_it_stands_at_one",
    ),
    Defect(
        "rr_flex/runtime/mends.py",
        'if len(getattr(self, "launchers", ())) != 1:',
        "if True:",
        "test_compile.py::test_one_thread_chooses_a_kernel_s_form",
    ),
    Defect("mask_mods/blocks.py", "== q_block\n", "> 0\n", BLOCKS),
    Defect("mask_mods/blocks.py", "torch.where(first <= last, last // k_block, -1)", "last // k_block", BLOCKS),
    Defect("mask_mods/blocks.py", "((row + 1) * q_block).clamp(max=Lq) - 1)", "row * q_block)", BLOCKS),
    Defect("mask_mods/blocks.py", "(k_last <= last)", "(k_first <= last)", BLOCKS),
    Defect("mask_mods/compose.py", "all(mask.growing for", "any(mask.growing for", COMPOSED),
    Defect("rr_flex/kernels/last_rows.py", "and Lk >= SHORT_CHUNK_KEYS", "", "test_last_rows.py::test_a_short_chunk"),
    Defect("mask_mods/blocks.py", "other_first <= last + 1,", "other_first <= last,", COMPOSED),
    Defect(
        "mask_mods/blocks.py",
        "smaller(k_first + length, Lk) - 1",
        "k_first + length - 1",
        "test_mask_mods.py::test_any_key_visible_equals_brute_force",
    ),
    Defect("rr_flex/geometry.py", "head % stride", "0 * head", ORACLE),
    Defect("rr_flex/geometry.py", "(column <= last)", "(column < last)", ORACLE),
    Defect("rr_flex/kernels/last_rows.py", "h // PIECES", "h % 2", APART),
    Defect("rr_flex/kernels/last_rows.py", "smaller(q_idx + first_query, last_query)", "q_idx", APART),
    Defect(
        "rr_flex/kernels/last_rows.py",
        "(place[:, :, None] < stop)",
        "(place[:, :, None] <= stop)",
        "test_last_rows.py::test_pieces_share",
    ),
    Defect(
        "rr_flex/kernels/last_rows.py", "(lse == -torch.inf)", "(lse == torch.inf)", "test_last_rows.py::test_merged"
    ),
    Defect(
        "rr_flex/kernels/last_rows.py",
        "smaller(q_idx + first_query, last_query)",
        "q_idx + first_query",
        "test_last_rows.py::test_rows_apart_ask_for_no_query_past_the_last",
    ),
    Defect(
        "rr_flex/fields.py",
        '"tau": ("(0, 1]", lambda share: 0 < share <= 1)',
        '"tau": ("(0, 1]", lambda share: 0 <= share <= 1)',
        "test_errors.py::test_a_bad_setting_dies_at",
    ),
    Defect("rr_flex/checks.py", "if Hq % k.shape[1]:", "if False:", "test_errors.py::test_a_bad_tensor_is_refused"),
    Defect(
        "rr_flex/sampling.py",
        "live.sum(3).clamp(min=1)",
        "live.sum(3).clamp(min=stride)",
        "test_sampling.py::test_padding_keys_are_left_out_of_the_mean",
    ),
    Defect(
        "rr_flex/sampling.py",
        "device=device)).clamp(max=stride)",
        "device=device)).clamp(min=stride)",
        "test_sampling.py::test_pools_each_stride_to_its_mean",
    ),
    Defect(
        "rr_flex/estimate.py",
        "queries = with_square(queries, config.variance_weight * request.scale)",
        "queries = with_square(queries, request.scale)",
        ORACLE,
    ),
    Defect("rr_flex/mass.py", "scores = torch.where(visible, scores, -torch.inf)", "pass", ORACLE),
    Defect("rr_flex/mass.py", "else scores + weights.log()", "else scores", COUNTS),
    Defect("rr_flex/estimate.py", "queries, keys)._replace(valid_keys=valid)", "queries, keys)", COUNTS),
    Defect(
        "rr_flex/mass_by_attention.py",
        "values = values * weights.to(dtype)",
        "pass",
        "test_mass_by_attention.py::test_both_forms_agree_on_any_real_keys",
    ),
    Defect(
        "rr_flex/mass.py",
        "stride_index.split(size), strict=True",
        "stride_index[:size].split(1) * 5000, strict=False",
        "test_mass_by_attention.py::test_the_size",
    ),
    Defect(
        "rr_flex/mass_by_attention.py",
        "(b // B * segment + kv_idx)",
        "(b * segment + kv_idx)",
        "test_mass_by_attention.py::test_both_forms_agree",
    ),
    Defect(
        "rr_flex/mass_by_attention.py",
        "share = weight / _total(",
        "share = weight / weight[:1]\n    _total(",
        "test_mass_by_attention.py::test_segments_are_merged_exactly",
    ),
    Defect(
        "rr_flex/selection.py",
        "(before < need)",
        "(before <= need)",
        "test_selection.py::test_keeps_the_fewest_blocks_that_reach_tau",
    ),
    Defect(
        "rr_flex/selection.py",
        "descending=True, stable=True",
        "descending=False, stable=True",
        "test_selection.py::test_the_rule_and_its_ties_equal_the_oracle",
    ),
    Defect("rr_flex/selection.py", "keepdim=True) >= need", "keepdim=True) > need", SEARCHES),
    Defect("rr_flex/selection.py", "(level.cumsum(-1) <= take)", "level", SEARCHES),
    Defect(
        "rr_flex/selection.py",
        "torch.isfinite(total) & (total > 0)",
        "total > 0",
        "test_selection.py::test_a_row_without_a_finite_total_keeps_what_is_visible",
    ),
    Defect("rr_flex/selection.py", "(mass > threshold * total)", "(mass > threshold)", ANY),
    Defect("rr_flex/selection.py", "level * long_row_factor(visible)", "level", LONG_ROWS),
    Defect(
        "rr_flex/selection.py",
        "visible.sum(-1, dtype=torch.float32).clamp(min=LONG_ROW)",
        "torch.full(visible.shape[:-1], visible.shape[-1]).clamp(min=LONG_ROW)",
        LONG_ROWS,
    ),
    Defect("rr_flex/mandatory.py", "stop - config.dense_last_rows", "stop + 1 - config.dense_last_rows", ANY),
    Defect(
        "rr_flex/mandatory.py",
        "column < start + config.sink_blocks",
        "column < config.sink_blocks",
        "test_mandatory.py::test_the_sink_of",
    ),
    Defect(
        "mask_mods/heads.py",
        "mask_mod.spans(b, h + per_batch(self.first, b), q_idx)",
        "mask_mod.spans(b, h, q_idx)",
        STRIPS,
    ),
    Defect("mask_mods/heads.py", "mask_mod(b, h + per_batch(self.first, b), q_idx", "mask_mod(b, h, q_idx", STRIPS),
    Defect("rr_flex/request.py", "self.head_offset + heads.start", "self.head_offset", STRIPS),
    Defect("rr_flex/request.py", "level=self.level[heads]", "level=self.level[: len(self.level[heads])]", STRIPS),
    Defect(
        "rr_flex/runtime/head_slices.py",
        "slice(first // group, ",
        "slice(0, ",
        "test_head_slices.py::test_strips_cover_the_heads_and_share_keys_rightly",
    ),
    Defect("rr_flex/pipeline.py", "k.shape[2] < min_length", "k.shape[2] <= min_length", DENSE),
    Defect("rr_flex/kernels/dense.py", ".tril(keys - queries)", ".tril()", CHUNK),
    Defect("rr_flex/kernels/dense.py", "0 <= first <= k.shape[2] - q.shape[2]", "0 <= first", CHUNK),
    Defect("rr_flex/kernels/deciding.py", "work.keys >= shortest", "work.keys > shortest", DECIDED),
    Defect("rr_flex/kernels/deciding.py", "decide(work, costs if fused", "decide(work, costs if True", UNFUSED),
    Defect("rr_flex/kernels/deciding.py", "max(fixed, keeps.share)", "keeps.share", EXPECTED),
    Defect("rr_flex/kernels/deciding.py", "keeps.long_row * rows / visible)", "1.0)", EXPECTED),
    Defect("rr_flex/attention.py", "request.placed_at(first - before)", "request.placed_at(first)", OFF_GRID),
    Defect("rr_flex/attention.py", "row - before)", "row)", OFF_GRID),
    Defect(
        "rr_flex/packed.py",
        "[out[number] for number in range(len(sizes))]",
        "list(out.values())",
        "test_packed.py::test_a_pack_is_each_prompt_alone",
    ),
    Defect("rr_flex/kernels/score_mods.py", "(kv_idx >= k_block) & seen", "seen", SOFTMAX),
    Defect("rr_flex/kernels/score_mods.py", ".where(lse > -torch.inf, 0)", "", "test_attention.py::test_what_is_left"),
    Defect("rr_flex/kernels/dense.py", "x.stride()[:-1])", "x.stride()[:-2])", "test_dense.py::test_rows_for_torch"),
    Defect("rr_flex/block_mask.py", "list_blocks(kept & ~whole)", "list_blocks(kept)", LISTS),
    Defect("rr_flex/block_mask.py", "place - 1, nK", "place - 1 + (place > 1).int(), nK", LISTS),
    Defect(
        "rr_flex/block_mask.py",
        "return kept & self.mask_mod",
        "return self.mask_mod",
        "test_block_mask.py::test_eager_attention_sees_the_kept_blocks_only",
    ),
    Defect(
        "rr_flex/request.py",
        "both(causal_mask(q_offset), own) if self.causal else own",
        "own",
        "test_mandatory.py::test_causal_cuts_a_mask_that_looks_ahead",
    ),
    Defect(
        "rr_flex/estimate.py",
        "config.strides[1], config.order, valid)",
        "config.strides[1], config.order)",
        "test_selection_symmetries.py::test_what_padding_holds_never_matters",
    ),
    Defect(
        "rr_flex/estimate.py",
        "sample_queries(q, config.strides[0], request.head_offset)",
        "sample_queries(q, config.strides[0])",
        "test_selection_symmetries.py::test_a_shard_of_heads_selects_its_slice",
    ),
    Defect("rr_flex/kernels/options.py", "if size == 64:", "if False:", "test_kernel.py::test_tiles_divide_the_blocks"),
    Defect(
        "rr_flex/runtime/compiling.py", "if compiler_disabled():", "if False:", "test_whoever_runs.py::test_a_compiler"
    ),
    Defect("rr_flex/runtime/compiling.py", '("ESTIMATORS", "BUDGETS")', "()", "test_kernel.py::test_what_a_user_may"),
    Defect("rr_flex/runtime/compiling.py", "|torch)", "|torch|users_masks)", "test_kernel.py::test_what_a_user_may"),
    Defect(
        "rr_flex/runtime/compiling.py",
        ", fullgraph=True, dynamic",
        ", dynamic",
        "test_kernel.py::test_past_the_limit_a_call_raises",
    ),
    Defect(
        "rr_flex/kernels/flex.py",
        '{"scale": request.scale, ',
        '{"scale": None, ',
        "test_attention.py::test_a_scale_is_used_by_the_estimate_and_by_attention",
    ),
    Defect(
        "rr_flex/mass.py",
        "(0, q_stride - 1)",
        "(q_stride - 1,)",
        "test_estimators.py::test_pooled_queries_obey_any_mask",
    ),
    Defect(
        "rr_flex/estimate.py",
        "_by_pooled_queries(q, k, request, 1)",
        "_by_pooled_queries(q, k, request, request.config.order)",
        "test_estimators.py::test_both_is_the_mean_of_two_shares",
    ),
    Defect(
        "rr_flex/selection.py",
        "torch.where(count + fixed > wanted, edge, low)",
        "torch.where(count > wanted, edge, low)",
        "test_estimators.py::test_a_density_is_kept_by_one_threshold_a_sequence",
    ),
    Defect(
        "rr_flex/selection.py",
        "(count.flatten(1).cumsum(1, dtype=torch.int32) - count.flatten(1)).view_as(count)",
        "torch.zeros_like(count)",
        "test_estimators.py::test_equal_blocks_fill_a_density_from_the_first",
    ),
    Defect(
        "rr_flex/level.py",
        "torch.where((level >= 0) & (level < 1), level, -1.0)",
        "level * 2",
        "test_estimators.py::test_a_threshold_may_be_one_a_head",
    ),
    Defect(
        "rr_flex/evaluation/block_outputs.py",
        "row * TOKENS // q_block]",
        "row * TOKENS // q_block - 1]",
        "test_evaluation_study.py::test_output_errors_are_those_of_attention_over_the_kept_blocks",
    ),
    Defect(
        "rr_flex/calibration/sensitivity.py",
        "-torch.ones_like(share",
        "-0.5 * torch.ones_like(share",
        "test_auto_budget.py::test_the_divergence_is_half_the_mean_square_of_gradient_times_error",
    ),
    Defect(
        "rr_flex/calibration/auto.py",
        'density = profile.measured["density"] if by_kl else value',
        "density = 0.5",
        "test_auto_budget.py::test_a_divergence_is_met_at_the_length_of_its_texts",
    ),
    Defect(
        "rr_flex/profiles/__init__.py",
        "first * (second / first) ** share",
        "first",
        "test_auto_budget.py::test_thresholds_lie_on_lines_between_lengths",
    ),
    Defect(
        "rr_flex/calibration/auto.py",
        "if not (by_kl or leaves_room(longest, config, value)):",
        "if False:",
        "test_auto_budget.py::test_the_block_before_the_diagonal_is_kept_where_the_density_leaves_room",
    ),
    Defect(
        "rr_flex/estimate.py",
        "partial(block_mass, compiled=False)",
        "partial(block_mass, compiled=True)",
        "test_evaluation_study.py::test_a_plain_selection_compiles_no_strips",
    ),
    Defect(
        "rr_flex/calibration/thresholds.py",
        "cost.flip(2).argmin(2)",
        "cost.flip(2).argmax(2)",
        "test_calibration.py::test_no_other_choice_of_that_density_has_less_error",
    ),
    Defect(
        "rr_flex/tasks/results.py",
        '"device", "dtype", "data")',
        '"device", "dtype")',
        "test_tasks.py::test_a_run_resumes",
    ),
    Defect(
        "rr_flex/cli/flags.py",
        "lambda value: 0 < value <= 1)",
        "lambda value: True)",
        "test_evaluation_cli.py::test_calibrate_checks_before_it_loads",
    ),
    Defect(
        "rr_flex/profiles/__init__.py",
        "if own_heads != {heads}:",
        "if False:",
        "test_calibration.py::test_another_model_s_profile_is_refused",
    ),
    Defect("rr_flex/serving/step_rows.py", "last = stop // row * row", "last = ceil_div(stop, row) * row", WHOLE_ROWS),
    Defect(
        "rr_flex/serving/step_rows.py", "first = ceil_div(start, row) * row", "first = start // row * row", WHOLE_ROWS
    ),
    Defect("rr_flex/serving/step_rows.py", "ceil_div(min_length, row) - 1", "ceil_div(min_length, row)", SHORT_ROWS),
    Defect("rr_flex/serving/step_rows.py", "key=lambda piece: len(piece) > 1", "key=len", SINGLE_FIRST),
    Defect("rr_flex/serving/pages.py", "(stride - 1 - start) % stride", "(stride - start) % stride", POOLED_ONCE),
    Defect("rr_flex/serving/pages.py", "page = page * folded_heads + head", "page = page * folded_heads", ONTO_PAGES),
    Defect(
        "rr_flex/serving/pages.py",
        "keys.unflatten(-1, (both // 2, P)).mT",
        "keys.unflatten(-1, (P, both // 2))",
        LAYOUTS,
    ),
    Defect("rr_flex/serving/pages.py", "[row, indices", "[0 * row, indices", ONTO_PAGES),
    Defect("rr_flex/serving/batches.py", "minimum(own_pages - 1)", "minimum(own_pages.min() - 1)", AT_ONCE),
    Defect("rr_flex/serving/batches.py", "q_offset=batch.starts)", "q_offset=batch.starts[:1])", AT_ONCE),
    Defect("rr_flex/serving/vllm/support.py", "if page % ROW:", "if page < ROW:", PAGE_CHECKED),
    Defect(
        "rr_flex/models/hf_masks.py",
        "isinstance(captured.get(key), kind)",
        "key in captured",
        "test_models_masks.py::test_a_mask_of_another_form_is_dense_and_counted",
    ),
    Defect(
        "rr_flex/models/hf_masks.py",
        "q_idx + at.offset - (sliding_window - 1)",
        "q_idx + at.offset - sliding_window",
        "test_models_masks.py::test_masks_are_read_as_they_are",
    ),
    Defect(
        "rr_flex/models/forward.py",
        "        if not traced():\n            plan_of",
        "        if not torch.compiler.is_compiling():\n            plan_of",
        "test_models_threads.py::test_what_another_thread_compiles_changes_no_count",
    ),
    Defect(
        "rr_flex/models/attention_by.py",
        " and handed.thread == get_ident()",
        "",
        "test_models_threads.py::test_two_threads_at_once",
    ),
    Defect(
        "rr_flex/models/states.py",
        "        kept.state.trim(tokens)",
        "        pass",
        "test_models_states.py::test_a_crop_takes_back",
    ),
    Defect(
        "rr_flex/models/switches.py",
        "            switches[-1].apply()",
        "            pass",
        "test_models_threads.py::test_enabled_ends_in_any_order",
    ),
    Defect("rr_flex/state.py", "if Lq > Lk - state.tokens:", "if Lk < state.tokens:", ANOTHER_PROMPT),
    Defect("rr_flex/state.py", "self._check_last(pooled_features(*new)[:, :, 0])", "pass", ANOTHER_PROMPT),
    Defect(
        "rr_flex/checks.py", "if x.is_nested or x.layout != torch.strided:", "if x.is_nested:", STRANGE + "tensors_of"
    ),
    Defect("rr_flex/checks.py", "if x.is_neg():", "if False:", STRANGE + "tensors_of"),
    Defect("rr_flex/checks.py", "if forward_ad.unpack_dual(x).tangent is not None:", "if False:", STRANGE + "a_deriv"),
    Defect("mask_mods/checks.py", "except (IndexError, RuntimeError) as error:", "except OSError as error:", NO_MASK),
    Defect("rr_flex/checks.py", "if not SINGLE.tiny <= factor", "if not 0 < factor", STRANGE + "values_that"),
    Defect("rr_flex/selection.py", "if mass.dtype in (torch.bfloat16, torch.float16):", "if False:", STRANGE + "half"),
    Defect("rr_flex/attention.py", "v = torch.where(valid[..., None], v, 0)", "v = v", STRANGE + "what_padding_holds"),
    Defect("rr_flex/attention.py", "q, k, v = q.detach(), k.detach(), v.detach()", "pass", STRANGE + "tensors_that"),
    Defect(
        "rr_flex/kernels/flash.py",
        "except torch.OutOfMemoryError as error:",
        "except MemoryError as error:",
        STRANGE + "memory",
    ),
    Defect(
        "rr_flex/state.py",
        "self._whole = Lk // stride",
        "self._whole = -(-Lk // stride)",
        "test_state.py::test_any_cut",
    ),
    Defect("rr_flex/captured.py", "row = first // stride +", "row =", CAPTURED),
    Defect("rr_flex/captured.py", "check_backend_name(backend)", "pass", "test_captured.py::test_what_it_refuses_at"),
    Defect("rr_flex/captured.py", "and first % GRID == 0 and", "and", CAPTURED),
    Defect("rr_flex/captured.py", "shared.first.fill_(first)", "pass", CAPTURED),
    Defect("rr_flex/captured.py", "cache.state.trim(first)", "pass", CAPTURED),
    Defect(
        "rr_flex/captured.py", " or not self._caches[place].lies_at(k, v)", "", "test_captured.py::test_a_cache_that_is"
    ),
    Defect(
        "rr_flex/runtime/recording.py",
        "if not self._busy.acquire(blocking=False):",
        "if self._busy.acquire(blocking=False) and False:",
        "test_captured.py::test_one_thread",
    ),
    Defect("rr_flex/captured.py", "if traced():", "if False:", "test_captured.py::test_what_a_call_refuses"),
    Defect("rr_flex/captured.py", "state.note(", "cache.state.note(", "test_captured.py::test_what_is_let_go_of"),
    Defect(
        "rr_flex/state.py",
        "with torch.inference_mode(False):  # it must",
        "with torch.no_grad():  # it must",
        "test_state.py::test_in_inference_mode",
    ),
    Defect("rr_flex/packed.py", "check_differentiable(q, k, v, sinks)", "pass", "test_packed.py::test_gradients"),
    Defect(
        "rr_flex/mass.py",
        "last_query, Lk = samples.ends",
        "last_query, Lk = samples.seq_lengths[0] - 1, samples.seq_lengths[1]",
        "test_mass_by_attention.py::test_strips_are",
    ),
    Defect(
        "rr_flex/state.py",
        "min(self._whole, tokens // self._layout.stride)",
        "self._whole",
        "test_state.py::test_trimmed",
    ),
    Defect(
        "rr_flex/runtime/tracing.py",
        "torch.compiler.is_dynamo_compiling()",
        "torch.compiler.is_compiling()",
        "test_whoever_runs.py::test_another_thread",
    ),
    Defect(
        "rr_flex/registry.py",
        "ESTIMATORS[name] = Estimator(estimate, reads)",
        "ESTIMATORS[name] = Estimator(estimate, (*reads, 'query_pool'))",
        "test_errors.py::test_a_setting_that_no_rule_reads",
    ),
    Defect("rr_flex/distributed/fetch.py", "flat.cumsum(0) - 1", "flat.cumsum(0)", TRUE_PLACES),
    Defect("rr_flex/distributed/transfer.py", "taken[owner] += n", "taken[owner] += 0", TO_RANKS),
]


def fault_of(defect: Defect, folder: Path) -> str:
    """What is wrong with this entry: "" if its text occurs once; then `folder` holds the packages with the defect."""
    source = (ROOT / defect.path).read_text()
    if source.count(defect.text) != 1:
        return f"the text occurs {source.count(defect.text)} times, not once"
    for name in ("mask_mods", "rr_flex", "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")  # some tests compare with the study's rules
    (folder / defect.path).write_text(source.replace(defect.text, defect.wrong))
    return ""


def run_test(defect: Defect, folder: Path) -> int:
    """pytest's exit status on the copy in `folder`; in a process of its own, where none of ours is imported yet."""
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # This file's folder and an installation's would lead to the code without the defect.
    others = (path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "tests"))
    sys.path[:] = [str(folder), *others]
    # No test needs a plugin, and importing those that are installed takes longer than most tests.
    os.environ |= {"PYTHONPATH": str(folder), "HYPOTHESIS_PROFILE": "planted", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    sys.dont_write_bytecode = True
    file, name = defect.test.split("::")
    imported_before = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
    options = ["-x", "-q", "-p", "no:cacheprovider", "-W", imported_before]
    return pytest.main([*options, f"tests/{file}", "-k", name])


def start(defect: Defect, folder: Path) -> int:
    """The process id of a fork, which has torch and pytest imported already, that ends with `run_test`'s status."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        status = int(run_test(defect, folder))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def verdict(status: int, folder: Path) -> str:
    if status == 0:
        return "the test passed"
    # 1: a test failed. Anything else (no such test, a syntax error in the defect) says nothing.
    return "" if status == 1 else f"pytest ended with {status}:\n{(folder / 'output.txt').read_text()}"


def faults(chosen: list[Defect], jobs: int) -> Iterator[tuple[Defect, str]]:
    """Each defect with what is wrong with it, in order of their ends."""
    running: dict[int, tuple[Defect, tempfile.TemporaryDirectory]] = {}
    waiting = list(reversed(chosen))
    while waiting or running:
        if waiting and len(running) < jobs:
            defect, folder = waiting.pop(), tempfile.TemporaryDirectory()
            if fault := fault_of(defect, Path(folder.name)):
                folder.cleanup()
                yield defect, fault
            else:
                running[start(defect, Path(folder.name))] = defect, folder
            continue
        child, status = os.wait()
        defect, folder = running.pop(child)
        yield defect, verdict(os.waitstatus_to_exitcode(status), Path(folder.name))
        folder.cleanup()


def main() -> int:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [defect for defect in DEFECTS if word in defect.path or word in defect.test]
    failures = 0
    # pytest and hypothesis collect garbage several times a run: in the forks not among what is imported here.
    gc.freeze()
    for defect, fault in faults(chosen, jobs=max(1, os.cpu_count() or 2)):
        outcome = "missed" if fault else "caught"
        print(f"{outcome}  {defect.path}: {defect.wrong!r:.60} by {defect.test} {fault}", flush=True)
        failures += bool(fault)
    print(f"{len(chosen) - failures} of {len(chosen)} planted defects caught")
    return 1 if failures or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
