"""What a trainer tells of a run: compressors beside it, and whether there is anything left to do."""

import gzip
import json
import lzma
import zlib

import pytest

from lumina.config import TrainConfig
from lumina.runs import report
from lumina.runs.directory import RunDirectory

TEXT = "".join(f"line {i * i}\n" for i in range(2000)).encode()


def test_compressors_give_bits_a_byte_of_the_text():
    found = report.compressors(TEXT)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    size = len(deflate.compress(TEXT) + deflate.flush()) + 18  # gzip's header and trailer
    assert found["gzip -9"] == pytest.approx(8 * size / len(TEXT))
    assert found["xz -9"] == pytest.approx(8 * len(lzma.compress(TEXT, preset=9)) / len(TEXT))


def test_compressors_work_as_hard_as_they_can():
    assert report.compressors(TEXT)["gzip -9"] < 8 * len(gzip.compress(TEXT, 1)) / len(TEXT)


@pytest.mark.parametrize(
    ("result", "step", "steps", "early_stopping", "is_finished"),
    [
        ({"step": 8, "stopped_early": False}, 8, 8, 0, True),
        ({"step": 8, "stopped_early": False}, 8, 5, 0, True),
        ({"step": 8, "stopped_early": False}, 8, 10, 0, False),  # more steps were asked for
        ({"step": 8, "stopped_early": False}, 10, 10, 0, False),  # went on, and ended before its result was written
        ({"step": 8, "stopped_early": True}, 8, 20, 3, True),
        ({"step": 8, "stopped_early": True}, 8, 20, 0, False),  # early stopping was switched off
        (None, 8, 8, 0, False),
    ],
)
def test_a_run_is_finished_when_its_result_is_of_its_last_step(tmp_path, result, step, steps, early_stopping, is_finished):
    run = RunDirectory(tmp_path)
    if result:
        run.result.write_text(json.dumps(result))
    found = report.finished(run, TrainConfig(steps=steps, early_stopping=early_stopping), step)
    assert found == (result if is_finished else None)
