"""What a run knows of itself, and what it does about a skipped update."""

import json
import math
from types import SimpleNamespace

import pytest

from lumina.config import GuardConfig
from lumina.errors import DoNotRetryError
from lumina.runs.progress import Progress, diagnosis, must_rewind
from lumina.runs.report import Reporter
from lumina.stages import Stage

NAN, INF = math.nan, math.inf


def bad(loss=5.0, norm=1.0, skipped=1, rows=(4, 2), step=7):
    return {"step": step, "loss": loss, "gradient_norm": norm, "skipped": skipped, "row_numbers": list(rows)}


def evaluated(*losses):
    progress = Progress()
    return progress, [progress.evaluated(step, {"loss": loss}, loss) for step, loss in enumerate(losses, 1)]


# ------------------------------------------------------------------------------------------------------ evaluations


def test_the_best_evaluation_is_the_lowest_and_the_first_of_equals():
    progress, better = evaluated(3.0, 2.0, 2.0, 2.5)
    assert better == [True, True, False, False]
    assert (progress.best_loss, progress.best_step) == (2.0, 2)
    assert (progress.last, progress.last_step) == ({"loss": 2.5}, 4)


def test_evaluations_without_improvement_are_counted_anew_after_each_improvement():
    counts = [evaluated(*losses)[0].evaluations_without_improvement for losses in ([3], [3, 4], [3, 4, 3], [3, 4, 4, 2])]
    assert counts == [0, 1, 2, 0]


@pytest.mark.parametrize(("patience", "is_out"), [(0, False), (1, True), (2, True), (3, False)])
def test_patience_ends_after_as_many_evaluations_and_0_is_any_number(patience, is_out):
    assert evaluated(3, 4, 4)[0].without_improvement(patience) is is_out


def test_an_evaluation_that_is_not_finite_is_never_the_best():
    progress, better = evaluated(NAN, 3.0, INF, 2.0)
    assert better == [False, True, False, True]
    assert progress.best_step == 4


def test_progress_outlasts_being_written_as_json():
    progress = Progress(rows=2**40, best_loss=0.1 + 0.2, best_step=3, last={"loss": 1.5}, passed=[[3, 5]], rewinds=1)
    assert Progress(**json.loads(json.dumps(progress.to_dict()))) == progress


# ---------------------------------------------------------------------------------------------------------- rewinds


def test_steps_between_first_and_last_are_passed_over():
    progress = Progress(passed=[[3, 5], [9, 9]])
    assert [step for step in range(1, 12) if progress.passes_over(step)] == [3, 4, 5, 9]


def test_a_rewind_keeps_what_the_checkpoint_knew_and_what_was_passed_over_until_now():
    old, before = Progress(rows=8, best_loss=2.0), Progress(rows=24, best_loss=1.0, passed=[[1, 2]], rewinds=1)
    assert old.rewound(before, 5, 7) == Progress(rows=8, best_loss=2.0, passed=[[1, 2], [5, 7]], rewinds=2)
    assert before == Progress(rows=24, best_loss=1.0, passed=[[1, 2]], rewinds=1)


@pytest.mark.parametrize(
    ("action", "loss", "norm", "rewinds"),
    [("skip", 9.0, 1.0, False), ("rewind", 9.0, 1.0, True), ("rewind", NAN, 1.0, False), ("rewind", 2.0, INF, False)],
)
def test_only_a_spike_rewinds_and_only_when_asked(action, loss, norm, rewinds):
    assert must_rewind(GuardConfig(spike_action=action), bad(loss, norm), 0) is rewinds


def test_after_the_last_rewind_a_spike_ends_the_run():
    guard = GuardConfig(spike_action="rewind", max_rewinds=2)
    assert must_rewind(guard, bad(9.0), 1) is True
    with pytest.raises(
        DoNotRetryError, match=r"step 7: loss jumped to 9.000 \(rows 4, 2\), after 2 rewinds .*lower optim.learn"
    ):
        must_rewind(guard, bad(9.0), 2)


@pytest.mark.parametrize(("loss", "works"), [(NAN, "compute in float32"), (9.0, "raise guard.spike_sigmas")])
def test_more_skips_in_a_row_than_allowed_end_the_run(loss, works):
    guard = GuardConfig(max_skips=3)
    assert must_rewind(guard, bad(loss, skipped=3), 0) is False
    with pytest.raises(DoNotRetryError, match=f"4 updates in a row were skipped: .*{works}") as error:
        must_rewind(guard, bad(loss, skipped=4), 0)
    assert error.value.exit_code == 93


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (bad(NAN), "step 7: loss is nan (rows 4, 2)"),
        (bad(INF, NAN), "step 7: loss is inf (rows 4, 2)"),
        (bad(2.5, NAN), "step 7: loss is 2.500 but the gradient's norm is nan (rows 4, 2)"),
        (bad(9.25, rows=range(8)), "step 7: loss jumped to 9.250 (rows 0, 1, 2, 3, 4, 5, 6, 7)"),
        (bad(9.25, rows=range(9)), "step 7: loss jumped to 9.250 (rows 0, 1, 2, 3, 4, 5, 6, 7, ...)"),
    ],
)
def test_a_diagnosis_names_step_loss_and_rows(step, says):
    assert diagnosis(step) == says


def test_each_stage_has_a_best_and_a_patience_of_its_own():
    progress = Progress()
    better = [progress.evaluated(step, {}, loss, step // 4) for step, loss in enumerate([2.0, 3.0, 3.0, 3.0, 9.0, 8.0, 8.5])]
    assert better == [True, False, False, False, True, True, False]
    assert (progress.best_step, progress.best_loss, progress.evaluations_without_improvement) == (5, 8.0, 1)


def test_a_stage_is_judged_by_the_sources_that_it_reads_as_much_as_its_mixture_says():
    stages = [Stage(1, 8, (("a", 1),)), Stage(1, 8, (("a", 1), ("b", 3)))]
    result = {"loss": 9.0, "sources": {"a": {"loss": 2.0}, "b": {"loss": 6.0}}}
    reporter = SimpleNamespace(stages=stages)
    assert [Reporter.judged(reporter, result, stage) for stage in (0, 1)] == [2.0, 5.0]
    assert Reporter.judged(reporter, {"loss": 9.0}, 1) == 9.0
