"""One thing looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """``subject``: what was looked at. ``found``: what there is. ``remedy``: what to do, empty where all is well.

    ``level``: ``note`` is worth knowing, with a ``warning`` the server runs worse than it could, with an ``error`` it
    does not run.
    """

    subject: str
    level: Level
    found: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return a JSON object."""
        return {"subject": self.subject, "level": self.level, "found": self.found, "remedy": self.remedy}
