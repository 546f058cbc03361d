"""What the status port knows and answers: a plain value of the messages so far, and the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# The API processes report once a second while their event loop runs.
NOT_READY_AFTER_SECONDS = 30.0
NOT_ALIVE_AFTER_SECONDS = 120.0
# No start is silent for this long, except while it downloads a model.
STALLED_AFTER_SECONDS = 900.0
DOWNLOAD = "download"


@dataclass
class Phase:
    """One phase of the load: when it began, and how long it took once it is done."""

    name: str
    began: float
    seconds: float | None = None
    progress: dict[int, dict[str, int]] = field(default_factory=dict)

    def slowest(self) -> dict[str, int] | None:
        """Return the progress of the rank that is furthest behind."""
        return min(self.progress.values(), key=lambda one: one["bytes"], default=None)


@dataclass(frozen=True)
class Answer:
    """HTTP status and JSON body of a probe."""

    code: int
    body: dict[str, Any]


class ServerState:
    """Follows one server from its start to its end. ``clock`` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = self._moved = clock()
        self._phases: list[Phase] = []
        self._apis: dict[int, tuple[str, float]] = {}
        self._api_count = 0
        self._error = ""
        self.ended = False

    def update(self, message: Mapping[str, Any]) -> None:
        """Take a message of ``neuqi_serve.load_status`` in; one of another form changes nothing."""
        now = self._clock()
        try:
            self._apply(message, now)
        except (KeyError, TypeError, ValueError):
            return
        self._moved = now

    def _apply(self, message: Mapping[str, Any], now: float) -> None:
        kind = message["kind"]
        if kind == "serving":
            self._apis[int(message["rank"])] = str(message["state"]), now
            self._api_count = int(message["count"])
            if self.phase == "ready":
                self._finish_phases(now)
        elif kind == "begin":
            self._phase(str(message["phase"]), now)
        elif kind == "end":
            self._phase(str(message["phase"]), now).seconds = float(message["seconds"])
        elif kind == "progress":
            names = ("layer", "layers", "bytes", "total_bytes")
            numbers = {name: int(message[name]) for name in names}
            self._phase(str(message["phase"]), now).progress[int(message["pid"])] = numbers
        elif kind == "failed":
            self._error = str(message["message"])
        elif kind == "ended":
            self.ended = True

    def _phase(self, name: str, now: float) -> Phase:
        for phase in self._phases:
            if phase.name == name:
                return phase
        self._phases.append(Phase(name, now))
        return self._phases[-1]

    def _finish_phases(self, now: float) -> None:
        for phase in self._phases:
            if phase.seconds is None:
                phase.seconds = now - phase.began

    @property
    def phase(self) -> str:
        """The current phase: of the load, or ``ready``, ``draining``, ``failed``."""
        states = [state for state, _ in self._apis.values()]
        if self._error or "dead" in states:
            return "failed"
        if "draining" in states:
            return "draining"
        if self._api_count and len(states) >= self._api_count:
            return "ready"
        running = self._current()
        return running.name if running is not None else "start"

    def _current(self) -> Phase | None:
        """The last phase that has begun, or of two at once the one that tells how far it is."""
        running = [phase for phase in self._phases if phase.seconds is None]
        telling = [phase for phase in running if phase.progress]
        return (telling or running)[-1] if running else None

    def _silence(self) -> float:
        """Seconds since the quietest API process was heard."""
        return max((self._clock() - seen for _, seen in self._apis.values()), default=0.0)

    def livez(self) -> Answer:
        """200 while the server lives; a load, however long, is life."""
        silence = self._silence()
        if silence > NOT_ALIVE_AFTER_SECONDS:
            return Answer(503, {"alive": False, "reason": f"an API process is silent for {silence:.0f} s"})
        if self.phase == "failed":
            return Answer(503, {"alive": False, "reason": self._error or "the engine has died"})
        return Answer(200, {"alive": True, "phase": self.phase})

    def readyz(self) -> Answer:
        """200 when every API process serves and its engine is well."""
        phase, silence = self.phase, self._silence()
        if phase == "ready" and silence > NOT_READY_AFTER_SECONDS:
            return Answer(503, {"ready": False, "reason": f"an API process is silent for {silence:.0f} s"})
        if phase == "ready":
            return Answer(200, {"ready": True})
        reasons = {"draining": "stopping", "failed": self._error or "the engine has died"}
        return Answer(503, {"ready": False, "reason": reasons.get(phase, f"loading: {phase}")})

    def startupz(self) -> Answer:
        """200 while the load moves and after it; the body says how far it is."""
        now, phase = self._clock(), self.phase
        stalled = now - self._moved > STALLED_AFTER_SECONDS and phase != DOWNLOAD
        failed = phase == "failed" or stalled
        body: dict[str, Any] = {
            "phase": phase,
            "done": phase in ("ready", "draining"),
            "elapsed_seconds": round(now - self._started, 1),
            "phases": {one.name: round(self._seconds(one), 2) for one in self._phases},
            "last_error": self._error or None,
        }
        current = self._current()
        if current is not None and current.name == phase:
            body |= _progress(current, now)
        if stalled:
            body["last_error"] = f"nothing has moved for {now - self._moved:.0f} s"
        return Answer(503 if failed else 200, body)

    def _seconds(self, phase: Phase) -> float:
        return self._clock() - phase.began if phase.seconds is None else phase.seconds

    def progress_ratio(self) -> float:
        """Share of the current phase's bytes that is done; 1 when the load is."""
        if self.phase in ("ready", "draining"):
            return 1.0
        current = self._current()
        numbers = current.slowest() if current is not None else None
        return numbers["bytes"] / numbers["total_bytes"] if numbers and numbers["total_bytes"] else 0.0

    def metrics(self) -> str:
        """Return the load's metrics in Prometheus' text format, also before there is a server to scrape."""
        phases = "".join(
            f'neuqi_load_phase_duration_seconds{{phase="{one.name}"}} {self._seconds(one):.3f}\n'
            for one in self._phases
        )
        return (
            "# HELP neuqi_load_phase The phase that the server is in; always 1.\n"
            "# TYPE neuqi_load_phase gauge\n"
            f'neuqi_load_phase{{phase="{self.phase}"}} 1\n'
            "# HELP neuqi_load_progress_ratio Share of the phase's weights that is done.\n"
            "# TYPE neuqi_load_progress_ratio gauge\n"
            f"neuqi_load_progress_ratio {self.progress_ratio():.4f}\n"
            "# HELP neuqi_load_phase_duration_seconds Seconds of a load phase.\n"
            "# TYPE neuqi_load_phase_duration_seconds gauge\n"
            f"{phases}"
        )


def _progress(phase: Phase, now: float) -> dict[str, Any]:
    numbers = phase.slowest()
    if numbers is None:
        return {}
    done, total = numbers["bytes"], numbers["total_bytes"]
    left = (now - phase.began) * (total - done) / done if done else None
    return {**numbers, "eta_seconds": None if left is None else round(left, 1)}
