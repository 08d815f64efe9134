"""metrics.jsonl and TensorBoard events: what a run measured, by step."""

from typing import Any

from lumina.config import MonitorConfig
from lumina.runs.directory import RunDirectory, append_json, trim_after


class MetricsLog:
    """Appends records to metrics.jsonl, and their numbers to TensorBoard. Going on from a step drops what came after it."""

    def __init__(self, run: RunDirectory, monitor: MonitorConfig, start: int):
        trim_after(run.metrics, start)
        trim_after(run.ledger, start)
        self._run = run
        self._writer = None
        if monitor.tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(run.tensorboard), purge_step=start + 1)

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """`kind` is train or eval; `record` has a step, and values that are numbers or lists of numbers by layer."""
        append_json(self._run.metrics, {"kind": kind, **record})
        if self._writer is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(f"{kind}/{name}", value, record["step"])
                elif isinstance(value, list):
                    for layer, number in enumerate(value):
                        if isinstance(number, int | float):
                            self._writer.add_scalar(f"{kind}/{name}/{layer}", number, record["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
