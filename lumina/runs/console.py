"""What a person sees: one table at the start, one live line while it runs, plain lines when not a terminal."""

import shutil
import sys
import time
from typing import TextIO

from lumina.runs.units import duration, si


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns; a value's further lines are indented under it."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:>{width}}  {value.replace(chr(10), chr(10) + ' ' * (width + 2))}" for name, value in rows)


class Console:
    """Prints the state of a run: a line that rewrites itself on a terminal, a line at each log step elsewhere."""

    def __init__(self, steps: int, stream: TextIO = sys.stderr):
        self.steps = steps
        self.stream = stream
        self.live = stream.isatty()
        self._pending = ""

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._clear()
        print(text, file=self.stream, flush=True)
        if self._pending:
            self._write(self._pending)

    def status(self, text: str) -> None:
        """A passing line, such as how far the data is prepared; elsewhere than on a terminal, a plain line."""
        if self.live:
            self._write(text)
        else:
            print(text, file=self.stream, flush=True)

    def progress(self, record: dict[str, float], logged: bool) -> None:
        """Show a training step. `record` has step, loss, bits_per_byte, learning_rate, gradient_norm, tokens_per_second,
        peak_fraction and seconds_left."""
        line = (
            f"step {record['step']:>{len(str(self.steps))}}/{self.steps}  loss {record['loss']:.4f}  "
            f"bits/byte {record['bits_per_byte']:.3f}  lr {record['learning_rate']:.2e}  "
            f"grad {record['gradient_norm']:.2f}  {si(record['tokens_per_second'])} tok/s  "
            f"peak {100 * record['peak_fraction']:.0f}%  eta {duration(record['seconds_left'])}"
        )
        if self.live:
            self._write(line)
        elif logged:
            print(line, file=self.stream, flush=True)

    def done(self) -> None:
        """Leave the live line as it stands."""
        if self.live and self._pending:
            print(file=self.stream, flush=True)
        self._pending = ""

    def _write(self, line: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._pending = line
        self.stream.write("\r\x1b[K" + line[:width])
        self.stream.flush()

    def _clear(self) -> None:
        if self.live and self._pending:
            self.stream.write("\r\x1b[K")


class Rate:
    """Tokens a second over the recent past, leaving out compilation, evaluation and whatever else is not a step."""

    def __init__(self, memory: float = 0.95):
        self.memory = memory
        self.seconds = self.tokens = 0.0
        self._last: float | None = time.perf_counter()

    def pause(self) -> None:
        """Do not count the time until the next step."""
        self._last = None

    def step(self, tokens: int) -> float:
        now = time.perf_counter()
        if self._last is not None:
            self.seconds = self.memory * self.seconds + (now - self._last)
            self.tokens = self.memory * self.tokens + tokens
        self._last = now
        return self.tokens / self.seconds if self.seconds else 0.0
