"""One question with its checkable answer, and the split that keeps held-out questions out of training."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STORY_ENDING = "The end."
STORY_MIN_WORDS = 12
HELD_OUT_BYTES = 26
"""A key is held out when the first byte of its SHA-256 is below this: about one key in ten."""


@dataclass(frozen=True)
class Task:
    """A prompt, the answer that training shows, and what the checker needs.

    ``key`` names what the split is about: the numbers or words of the question for kinds with many instances,
    the pair (phrasing, item) for kinds that ask about a small table. ``required`` is empty for kinds with one
    right answer; for stories it lists the words that must occur.
    """

    kind: str
    prompt: str
    answer: str
    key: str
    required: tuple[str, ...] = ()

    @property
    def held_out(self) -> bool:
        """True when this task's key belongs to the held-out part."""
        return is_held_out(self.key)

    def accepts(self, text: str) -> bool:
        """Whether a reply is right.

        Letter case matters only for the kind ``capitals``; white space at the ends and a final full stop
        never do. A story is right when it uses every required word, is at least 12 words long, uses no
        template marks and stops with "The end.".
        """
        given = " ".join(text.split())
        if not self.required:
            if self.kind != "capitals":
                return _plain(given).casefold() == _plain(self.answer).casefold()
            return _plain(given) == _plain(self.answer)
        words = re.findall(r"[a-z]+", given.casefold())
        complete = given.endswith(STORY_ENDING) and given.count(STORY_ENDING) == 1
        used = all(word.casefold() in words for word in self.required)
        return complete and used and len(words) >= STORY_MIN_WORDS and "{" not in given and "<|" not in given


def _plain(text: str) -> str:
    return text.strip().rstrip(".!").strip()


def is_held_out(key: str) -> bool:
    """The split: a function of the key alone, the same in every process and on every machine."""
    return hashlib.sha256(key.encode("utf-8")).digest()[0] < HELD_OUT_BYTES


def phrase(rng: random.Random, phrasings: Sequence[str], slots: Mapping[str, object]) -> tuple[int, str]:
    """Choose one of the phrasings and fill it; returns (number of the phrasing, text)."""
    number = rng.randrange(len(phrasings))
    return number, phrasings[number].format(**slots)


def decorate(rng: random.Random, prompt: str) -> str:
    """Vary how a prompt is typed: a greeting, a polite word, no capital, no final mark."""
    draw = rng.random()
    if draw < 0.6:
        return prompt
    if draw < 0.7:
        return prompt.rstrip("?.")
    if draw < 0.78:
        return "Hi! " + prompt
    if draw < 0.84:
        return "Please help me. " + prompt
    if prompt.split(" ", 1)[0] in _LOWERABLE:
        lowered = prompt[0].lower() + prompt[1:]
        if draw < 0.92 and not prompt.endswith("?"):
            return "Please " + lowered
        return lowered
    return prompt


_LOWERABLE = frozenset(
    ("What", "Which", "How", "Add", "Sort", "Put", "Count", "Tell", "Write", "Name", "Give", "Spell",
    "Reverse",
     "Is", "Find", "Work", "Say", "Turn", "Subtract", "Multiply", "Take", "Continue", "Compare", "Where",
     "In")
)  # fmt: skip
