"""Word tasks: lists, letters, and questions about the small fixed tables."""

from __future__ import annotations

import random

from neuqi_serve.demo.task import Task, phrase
from neuqi_serve.demo.words import (
    DAYS,
    GROUPS,
    HOMES,
    LEGS,
    MONTHS,
    NOUNS,
    OPPOSITES,
    PLURALS,
    RHYMES,
    SHADES,
    SOUNDS,
)

COUNT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _list(rng: random.Random, least: int, most: int) -> list[str]:
    return rng.sample(NOUNS, rng.randint(least, most))


def sort_words(rng: random.Random) -> Task:
    """Three to five different words in alphabetical order."""
    words = _list(rng, 3, 5)
    _, prompt = phrase(
        rng,
        (
            "Sort these words: {w}.", "Put these words in alphabetical order: {w}.",
            "Sort {w} alphabetically.", "Sort from A to Z: {w}.",
        ),
        {"w": ", ".join(words)},
    )  # fmt: skip
    return Task("sort words", prompt, ", ".join(sorted(words)), f"words {sorted(words)}")


def reverse_list(rng: random.Random) -> Task:
    """Three to six different words in reverse order."""
    words = _list(rng, 3, 6)
    _, prompt = phrase(
        rng,
        ("Reverse this list: {w}.", "Write this list backwards: {w}.", "Turn the list around: {w}."),
        {"w": ", ".join(words)},
    )
    return Task("reverse list", prompt, ", ".join(reversed(words)), f"words {sorted(words)}")


def count_items(rng: random.Random) -> Task:
    """How many words a list of two to nine words has."""
    words = _list(rng, 2, 9)
    _, prompt = phrase(
        rng,
        (
            "How many words are in this list: {w}?", "Count the words: {w}.",
            "How many things are these: {w}?", "Count the items in this list: {w}.",
        ),
        {"w": ", ".join(words)},
    )  # fmt: skip
    return Task("count items", prompt, f"There are {len(words)}.", f"words {sorted(words)}")


def count_word(rng: random.Random) -> Task:
    """How often one of two words occurs in a list of four to eight."""
    word, other = rng.sample(NOUNS, 2)
    draws = [rng.choice((word, other)) for _ in range(rng.randint(4, 8))]
    _, prompt = phrase(
        rng,
        ("How many times does {a} appear in: {w}?", "Count the word {a} in this list: {w}."),
        {"a": word, "w": ", ".join(draws)},
    )
    found = draws.count(word)
    answer = f"The word {word} appears {COUNT_NAMES[found]} {'time' if found == 1 else 'times'}."
    return Task("count word", prompt, answer, f"count {word} {other} {len(draws)} {found}")


def member(rng: random.Random) -> Task:
    """Which of three words belongs to a named group."""
    name = rng.choice(sorted(GROUPS))
    right = rng.choice(GROUPS[name])
    wrong = rng.sample([word for group, words in GROUPS.items() if group != name for word in words], 2)
    words = [right, *wrong]
    rng.shuffle(words)
    article = "an" if name[0] in "aeiou" else "a"
    _, prompt = phrase(
        rng,
        ("Which of these is {x} {g}: {w}?", "Find the {g}: {w}.", "Which word is {x} {g}: {w}?"),
        {"x": article, "g": name, "w": ", ".join(words)},
    )
    return Task("member", prompt, f"The {name} is {right}.", f"member {name} {sorted(words)}")


def odd_one_out(rng: random.Random) -> Task:
    """The one word of four that is not of the group of the others."""
    name, other = rng.sample(sorted(GROUPS), 2)
    strange = rng.choice(GROUPS[other])
    words = [strange, *rng.sample(GROUPS[name], 3)]
    rng.shuffle(words)
    _, prompt = phrase(
        rng,
        ("Which is the odd one out: {w}?", "Find the odd one out: {w}.", "Which word does not belong: {w}?"),
        {"w": ", ".join(words)},
    )
    return Task("odd one out", prompt, f"The odd one out is {strange}.", f"odd {sorted(words)}")


def letters(rng: random.Random) -> Task:
    """The number of letters of a word, spelled first."""
    word = rng.choice(NOUNS)
    number, prompt = phrase(
        rng,
        (
            "How many letters are in the word {w}?", "Count the letters in {w}.",
            "How many letters does {w} have?", "How long is the word {w}?",
            "Spell {w} and count its letters.", "Tell me how many letters {w} has.",
        ),
        {"w": word},
    )  # fmt: skip
    return Task(
        "letters", prompt, f"{'-'.join(word)} has {len(word)} letters.", f"letters {word} phrasing {number}"
    )


def spell(rng: random.Random) -> Task:
    """A word spelled forwards or backwards."""
    word = rng.choice(NOUNS)
    back = rng.random() < 0.5
    number, prompt = phrase(
        rng,
        ("Spell {w} backwards.", "Spell the word {w} from back to front.", "What is {w} spelled backwards?")
        if back
        else ("Spell {w}.", "How do you spell {w}?", "Spell the word {w} for me."),
        {"w": word},
    )
    answer = "-".join(word)
    answer = f"{answer}, backwards {answer[::-1]}." if back else f"{answer}."
    return Task("spell", prompt, answer, f"spell {back} {word} phrasing {number}")


def end_letter(rng: random.Random) -> Task:
    """The first or last letter of a word."""
    word = rng.choice(NOUNS)
    place, index = rng.choice((("first", 0), ("last", -1)))
    number, prompt = phrase(
        rng,
        (
            "What is the {p} letter of {w}?", "Which letter is the {p} one in {w}?",
            "Tell me the {p} letter of {w}.", "Give the {p} letter of the word {w}.",
        ),
        {"p": place, "w": word},
    )  # fmt: skip
    return Task(
        "end letter", prompt, f"The {place} letter is {word[index]}.", f"{place} {word} phrasing {number}"
    )


def capitals(rng: random.Random) -> Task:
    """A word in capital letters."""
    word = rng.choice(NOUNS)
    number, prompt = phrase(
        rng,
        (
            "Write {w} in capital letters.", "Write the word {w} in capitals.", "Put {w} in upper case.",
            "Turn {w} into capital letters.",
        ),
        {"w": word},
    )  # fmt: skip
    return Task("capitals", prompt, word.upper(), f"capitals {word} phrasing {number}")


def opposite(rng: random.Random) -> Task:
    """The opposite of a word from a fixed table."""
    a, b = rng.choice(OPPOSITES)
    if rng.random() < 0.5:
        a, b = b, a
    number, prompt = phrase(
        rng,
        (
            "What is the opposite of {a}?", "Give the opposite of {a}.", "Tell me the opposite of {a}.",
            "Which word is the opposite of {a}?", "Name the opposite of {a}.", "What is not {a}?",
        ),
        {"a": a},
    )  # fmt: skip
    return Task("opposite", prompt, f"The opposite of {a} is {b}.", f"opposite {a} phrasing {number}")


def plural(rng: random.Random) -> Task:
    """The plural of a noun from a fixed table."""
    word = rng.choice(sorted(PLURALS))
    number, prompt = phrase(
        rng,
        (
            "What is the plural of {w}?", "Give the plural of {w}.", "One {w}, two what?",
            "Write the plural of {w}.", "Tell me the plural of {w}.",
        ),
        {"w": word},
    )  # fmt: skip
    return Task("plural", prompt, f"One {word}, two {PLURALS[word]}.", f"plural {word} phrasing {number}")


def calendar(rng: random.Random) -> Task:
    """The day or month before, after, or up to six places from a given one."""
    names, unit = rng.choice(((DAYS, "day"), (MONTHS, "month")))
    start = rng.randrange(len(names))
    if rng.random() < 0.5:
        step, side = rng.choice(((1, "after"), (-1, "before")))
        phrasings: tuple[str, ...] = (
            "Which {u} comes {s} {a}?", "What {u} is {s} {a}?", "Name the {u} {s} {a}.",
            "Tell me the {u} {s} {a}.",
        )  # fmt: skip
        answer = "The {u} {s} {a} is {b}."
    else:
        step, side = rng.randint(2, 6), "after"
        phrasings = (
            "Which {u} is {n} {u}s after {a}?", "What {u} comes {n} {u}s after {a}?",
            "Name the {u} {n} {u}s after {a}.", "If it is {a}, which {u} is it in {n} {u}s?",
        )  # fmt: skip
        answer = "{n} {u}s after {a} is {b}."
    slots = {"u": unit, "s": side, "a": names[start], "n": step, "b": names[(start + step) % len(names)]}
    number, prompt = phrase(rng, phrasings, slots)
    key = f"calendar {names[start]} {step} phrasing {number}"
    return Task("calendar", prompt, answer.format(**slots), key)


def rhyme(rng: random.Random) -> Task:
    """A rhyme from a fixed table."""
    word = rng.choice(sorted(RHYMES))
    number, prompt = phrase(
        rng,
        (
            "What rhymes with {w}?", "Give me a rhyme for {w}.", "Tell me a word that rhymes with {w}.",
            "Find a rhyme for {w}.", "Which word rhymes with {w}?",
        ),
        {"w": word},
    )  # fmt: skip
    return Task(
        "rhyme", prompt, f"{word} rhymes with {RHYMES[word]}.".capitalize(), f"rhyme {word} phrasing {number}"
    )


def fact(rng: random.Random) -> Task:
    """A colour, sound, home or number of legs from a fixed table."""
    table = rng.choice(("sound", "legs", "home", "colour"))
    if table == "sound":
        item = rng.choice(sorted(SOUNDS))
        phrasings = ("What sound does a {x} make?", "What does a {x} say?", "Tell me the sound of a {x}.")
        answer = f"A {item} says {SOUNDS[item]}."
    elif table == "legs":
        item = rng.choice(sorted(LEGS))
        phrasings = (
            "How many legs does {ax} have?", "Tell me how many legs {ax} has.",
            "What number of legs has {ax}?",
        )  # fmt: skip
        answer = f"{_a(item).capitalize()} has {COUNT_NAMES[LEGS[item]]} legs."
    elif table == "home":
        item = rng.choice(sorted(HOMES))
        phrasings = ("Where does a {x} live?", "Tell me where a {x} lives.", "What is the home of a {x}?")
        answer = f"A {item} lives in {HOMES[item]}."
    else:
        item = rng.choice(sorted(SHADES))
        phrasings = ("What colour is {x}?", "Tell me the colour of {x}.", "What is the colour of {x}?")
        answer = f"{item.capitalize()} is {SHADES[item]}."
    number, prompt = phrase(rng, phrasings, {"x": item, "ax": _a(item)})
    return Task("fact", prompt, answer, f"{table} {item} phrasing {number}")


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
