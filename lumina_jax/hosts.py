"""The processes of one run, one a host or several on one: how they join, agree, tell each other things, and learn of a loss."""

import atexit
import contextlib
import os
import re
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lumina.errors import ConfigError, UsageError
from lumina.runs.processes import Part, part

HEARTBEAT_SECONDS = 60  # a process that is silent for so long ends all others, in threads of JAX's that nothing holds up
SHUTDOWN_SECONDS = 60  # for others to come to an end as well
BEAT_SECONDS, SILENT_BEATS = 2.0, 5  # of our own signs of life, which only tell who it is
MEET_SECONDS, DAY_SECONDS = 3600.0, 86_400.0
# What XLA, gloo, NCCL and gRPC say when another process is at fault.
_OF_ANOTHER = re.compile("gloo|nccl|peer|connect|socket|closed|unavailable|deadline|heartbeat|coordination|timed out", re.I)


def join() -> None:
    """Join the other processes of this run, if the environment names any, and say so. Before anything asks JAX for devices.

    Raises UsageError for an environment that cannot be right.
    """
    own = part(os.environ)
    if not own.coordinator or jax.distributed.is_initialized():
        return
    print(own, file=sys.stderr, flush=True)
    # JAX's would take SIGTERM from whoever handles it, for its own agreement on when to stop; see `Loop`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        own.coordinator,
        own.count,
        own.number,
        local_device_ids=own.local_device,
        cluster_detection_method="deactivate",  # it would take one device of this host for each process
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    if (found := (jax.process_index(), jax.process_count())) != (own.number, own.count):
        raise UsageError(f"{own}: to JAX it is process {found[0]} of {found[1]}; set them to JAX's, such as by a launch script")
    if own.count > 1:
        global _pulse
        _pulse = _Pulse(own)
        _pulse.start()
        atexit.register(_pulse.stop)  # before JAX's own end, which was registered before it


# -------------------------------------------------------------------------------------------- over the devices, together


def agreed(value: Any) -> Any:
    """What the first process says, so that all do the same: None, a truth value, or a number from 0."""
    if jax.process_count() == 1:
        return value
    number = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if value is None else value)))
    return type(value)(number) if isinstance(value, bool) else None if number < 0 else number


def in_any(value: bool) -> bool:
    """Whether it holds in any process."""
    return value if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.int32(value)).any())


def require_same(what: str, digest: str) -> None:
    """Raise a ConfigError, in all processes, unless each has the same: 64 hexadecimal digits."""
    if jax.process_count() > 1:
        found = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(digest), np.uint8))
        different = [number for number, each in enumerate(found) if (each != found[0]).any()]
        if different:
            raise ConfigError(f"{what}: process {different[0]} has another than process 0; start all with the same")


# ---------------------------------------------------------------------------- over the coordination service, in any thread


def tell(key: str, word: str) -> None:
    """Let other processes hear `word`."""
    _client().key_value_set(f"lumina/{key}", word)


def hear(key: str, seconds: float) -> str:
    """What was or will be told, waited for at most so long; raises TimeoutError."""
    try:
        return str(_client().blocking_key_value_get(f"lumina/{key}", int(1000 * seconds)))
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(str(error).splitlines()[0]) from error


def forget(keys: str) -> None:
    """Drop all that was told under `keys`."""
    _client().key_value_delete(f"lumina/{keys}")


def meet(place: str) -> None:
    """Wait for all processes, once at each place: for an hour, where gloo gives up those that it first connects after 30 s."""
    if _pulse is not None:
        _client().wait_at_barrier(f"lumina/meet/{place}", int(1000 * MEET_SECONDS))


def leave_together() -> None:
    """At an end in order: wait for the first process, which may still copy a backup."""
    if _pulse is not None:
        if _pulse.own.number == 0:
            tell("over", "")
        else:
            hear("over", DAY_SECONDS)


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


# ---------------------------------------------------------------------------------------------------- who is gone


def say_who_is_gone(error: Exception) -> None:
    """When `error` ended this process: tell the others why, or say in one line which of them is the reason, if that shows."""
    if _pulse is None:
        return
    own, says = _pulse.own, f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if not isinstance(error, (jax.errors.JaxRuntimeError, TimeoutError)) or not _OF_ANOTHER.search(str(error)):
        _pulse.tell_why(f"process {own.number} of {own.count} failed: {says}")
    elif not _pulse.known.wait(_pulse.patience):
        return
    if own.number == 0:  # when this process ends, so does what the others hear it from
        _pulse.until_others_know()


class _Pulse(threading.Thread):
    """Signs of life of this process; the first looks whether all others give theirs, and tells them who does not."""

    def __init__(self, own: Part):
        super().__init__(name="pulse", daemon=True)
        self.own = own
        self.period = BEAT_SECONDS + own.count / 100  # a thousand processes are not to keep the first busy
        self.silence = SILENT_BEATS * self.period
        self.patience = 3 * self.silence  # who is gone is known after a silence and some beats, late ones on a busy machine
        self.known = threading.Event()  # that one is gone
        self._says = ""  # which, or why
        self._over = threading.Event()
        self._beats = 0
        self._silent = ""
        self._seen: dict[str, tuple[str, float]] = {}  # last sign of each, and when it changed

    def run(self) -> None:
        client = _client()
        while not self._over.wait(self.period):
            self.beat(client)

    def beat(self, client: Any) -> None:
        """Give a sign of life, and hear who gives none."""
        self._beats += 1
        try:
            client.key_value_set(f"lumina/beat/{self.own.number}", str(self._beats), True)
            if self.own.number == 0:
                self._look(client)
            gone = {_last(key): says for key, says in client.key_value_dir_get("lumina/gone")}
            says = gone.get("failed") or gone.get("silent", "")
        except jax.errors.JaxRuntimeError:
            says = f"process 0 of {self.own.count} is gone: it does not answer"
        self._hear(client, says)

    def stop(self) -> None:
        self._over.set()
        self.join()

    def tell_why(self, says: str) -> None:
        """What the first to fail says stands."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was before, or there is nobody to tell it to
            _client().key_value_set("lumina/gone/failed", says)
            self._hear(_client(), says)

    def until_others_know(self) -> None:
        """Wait until each process that gives signs of life has heard, or could not in a long time."""
        end = time.monotonic() + self.patience
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while time.monotonic() < end:
                know = {_last(key) for key, says in _client().key_value_dir_get("lumina/known") if says}
                if know.issuperset(_last(key) for key, silent in self._silences() if silent <= self.silence):
                    return
                time.sleep(self.period / 8)

    def _hear(self, client: Any, says: str) -> None:
        """Say it, unless it was said, and let the first process know."""
        if says == self._says:
            return
        self._says = says
        if says:
            print(says, file=sys.stderr, flush=True)
            self.known.set()
        else:
            self.known.clear()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"lumina/known/{self.own.number}", says, True)

    def _look(self, client: Any) -> None:
        """Tell who is silent for longest, by the clock of this process; take it back of who is no longer."""
        now = time.monotonic()
        for key, sign in client.key_value_dir_get("lumina/beat"):
            if self._seen.get(key, ("", 0.0))[0] != sign:
                self._seen[key] = (sign, now)
        key, silent = max(self._silences(), key=lambda each: each[1])
        says = ""
        if silent > self.silence:
            who = f"process {_last(key)} of {self.own.count}"
            says = f"{who} is gone, or hangs: no sign of life for {self.silence:.0f} s"
        if says != self._silent:
            self._silent = says
            client.key_value_set("lumina/gone/silent", says, True)

    def _silences(self) -> list[tuple[str, float]]:
        now = time.monotonic()
        return [(key, now - when) for key, (_, when) in tuple(self._seen.items())]


def _last(key: str) -> str:
    """Part of it; the number of a process."""
    return key.rpartition("/")[2]


_pulse: _Pulse | None = None
