"""metrics.jsonl and TensorBoard events: what a run measured, by step."""

import os
import time
from collections.abc import Callable
from typing import Any

from lumina.config import MonitorConfig
from lumina.runs.directory import RunDirectory
from lumina.runs.journal import Journal


class MetricsLog:
    """Appends records to metrics.jsonl, and their numbers to TensorBoard. Going on from a step drops what came after it."""

    def __init__(self, run: RunDirectory, monitor: MonitorConfig, start: int, warn: Callable[[str], None]):
        self.path = run.metrics
        self._journal = Journal(self.path, warn, start)
        self._run, self._warn = run, warn
        self._tensorboard = self._guarded(lambda: TensorBoard(run, start)) if monitor.tensorboard else None

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """`kind` is train or eval; `record` has a step, and values that are numbers, lists of numbers by layer, or more such by
        name."""
        self._journal.append({"kind": kind, **record})
        if (tensorboard := self._tensorboard) is not None:
            self._guarded(lambda: tensorboard.write(kind, record))

    def trim(self, step: int) -> None:
        """Forget the records of steps after `step`."""
        self._journal.trim(step)
        if (tensorboard := self._tensorboard) is not None:
            self._guarded(lambda: tensorboard.start_after(step))

    def close(self) -> None:
        if (tensorboard := self._tensorboard) is not None:
            self._guarded(tensorboard.close)

    def _guarded(self, act: Callable[[], Any]) -> Any:
        """A disk that takes no TensorBoard events costs those events."""
        try:
            return act()
        except OSError as error:
            self._tensorboard = None
            self._warn(f"{self._run.tensorboard}: cannot be written ({error.strerror}); metrics.jsonl has it all")
            return None


class TensorBoard:
    """An events file. tensorboardX's SummaryWriter writes in a thread, and hangs its caller once a full disk has ended it."""

    def __init__(self, run: RunDirectory, start: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        run.tensorboard.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(run.tensorboard / "events"), f".{os.getpid()}")  # two starts in a second, two files
        self._event, self._begins = Event, SessionLog(status=SessionLog.START)
        self.start_after(start)

    def start_after(self, step: int) -> None:
        """TensorBoard drops what it has of later steps."""
        self._put(step + 1, session_log=self._begins)
        self._writer.flush()

    def write(self, kind: str, record: dict[str, Any]) -> None:
        from tensorboardX.summary import scalar

        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._put(record["step"], summary=scalar(f"{kind}/{name}", value))
            elif isinstance(value, list):
                for layer, number in enumerate(value):
                    if isinstance(number, int | float):
                        self._put(record["step"], summary=scalar(f"{kind}/{name}/{layer}", number))
            elif isinstance(value, dict):
                self.write(f"{kind}/{name}", {"step": record["step"], **value})
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _put(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))
