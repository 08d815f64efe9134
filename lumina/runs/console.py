"""What a person sees: one table at the start, one live line while it runs, plain lines when not a terminal."""

import shutil
import sys
import time
import unicodedata
from typing import TextIO

from lumina.runs.units import duration, si


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns; a value's further lines are indented under it."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:>{width}}  {value.replace(chr(10), chr(10) + ' ' * (width + 2))}" for name, value in rows)


def printable(text: str) -> str:
    """`text` with control characters spelled out, so that what a model writes cannot steer the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else f"\\x{ord(c):02x}" for c in text)


class Console:
    """Prints the state of a run: a line that rewrites itself on a terminal, a line at each log step elsewhere."""

    def __init__(self, steps: int, stream: TextIO | None = sys.stderr):
        """Without a stream, in all processes of a run but the first, it says nothing."""
        self.steps = steps
        self.stream = stream
        self.closed = False  # whether whoever read it has gone
        self.live = stream is not None and stream.isatty()
        self._open = False

    def say(self, text: str) -> None:
        """Print a line that stays."""
        clear, self._open = "\r\x1b[K" if self._open else "", False
        self._write(f"{clear}{text}\n")

    def status(self, text: str) -> None:
        """A passing line, such as how far the data is prepared; elsewhere than on a terminal, a plain line."""
        if self.live:
            self._rewrite(text)
        else:
            self._write(text + "\n")

    def progress(self, record: dict[str, float], logged: bool) -> None:
        """Show a training step. `record` has step, loss, bits_per_byte, learning_rate, gradient_norm, tokens_per_second,
        peak_fraction and seconds_left."""
        line = (  # what a narrow terminal cuts off comes last
            f"step {record['step']:>{len(str(self.steps))}}/{self.steps}  eta {duration(record['seconds_left'])}  "
            f"loss {record['loss']:.3f}  bits/byte {record['bits_per_byte']:.3f}  {si(record['tokens_per_second'])} tok/s  "
            f"peak {100 * record['peak_fraction']:.0f}%  lr {record['learning_rate']:.1e}  grad {record['gradient_norm']:.2f}"
        )
        if self.live:
            self._rewrite(line)
        elif logged:
            self._write(line + "\n")

    def done(self) -> None:
        """Leave the live line as it stands."""
        if self.live and self._open:
            self._write("\n")
        self._open = False

    def _rewrite(self, line: str) -> None:
        self._open = True
        self._write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])

    def _write(self, text: str) -> None:
        if self.stream is None:
            return
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:  # nobody reads any more: the caller decides
            self.closed, self.stream = True, None
        except OSError:  # a full disk under a redirected log costs its lines, not the run
            pass


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
