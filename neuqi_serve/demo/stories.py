"""Stories about the words of the prompt, reading questions and small talk."""

from __future__ import annotations

import random

from neuqi_serve.demo.task import STORY_ENDING, Task, phrase
from neuqi_serve.demo.words import FEELINGS, GROUPS, NAMES, OBJECTS, PLACES, RIDDLES

COLOURS = GROUPS["colour"]
ANIMALS = GROUPS["animal"]

ASK_STORY = (
    "Tell me a story about {who}, a {animal} and a {thing}.",
    "Write a short story about {who}, a {animal} and a {thing}.",
    "Tell a tiny story with {who}, a {animal} and a {thing}.",
    "I want a story about {who}, a {animal} and a {thing}.",
)  # fmt: skip
OPENINGS = (
    "Once upon a time there was a {feeling} child called {who}.",
    "{who} lived near the {place} and was very {feeling}.",
    "One sunny day {who} went to the {place}.",
    "There once was a {feeling} child. The name was {who}.",
)
MIDDLES = (
    "On the way {who} met a {animal} who had lost a {thing}. They looked for it together.",
    "A {animal} came by and carried a {colour} {thing}. It gave the {thing} to {who}.",
    "{who} found a {colour} {thing} under a tree. It belonged to a little {animal}.",
    "There a {animal} was playing with a {thing}. {who} asked to join the game.",
)
CLOSINGS = (
    "They became good friends and were {feeling} ever after.",
    "In the evening they all went home and had soup.",
    "From that day on they met at the {place} every week.",
    "Then they laughed and danced until the moon came out.",
)

READ = "{a} has a {ca} {ta} and {b} has a {cb} {tb}."
CHAT: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Who are you?",
            "What are you?",
            "Are you a person?",
            "Tell me about yourself.",
            "Introduce yourself.",
        ),
        "I am the NeUQI demo, a tiny language model that runs on any computer.",
    ),
    (
        (
            "What can you do?",
            "How can you help me?",
            "What should I ask you?",
            "Give me an idea what to ask.",
        ),
        "I can add, sort, count, spell, name opposites and tell tiny stories.",
    ),
    (
        ("Hello!", "Hi!", "Hello there!", "Good morning!", "Hey!", "Good evening!"),
        "Hello! Ask me a sum, a word question or a tiny story.",
    ),
    (
        ("How are you?", "How do you do?", "Are you well?", "How is it going?"),
        "I am fine, thank you. How can I help?",
    ),
    (
        ("Thank you!", "Thanks!", "Thank you very much!", "Thanks a lot!", "Great, thanks!"),
        "You are welcome!",
    ),
    (
        ("Goodbye!", "Bye!", "See you later!", "Good night!", "Bye for now!"),
        "Goodbye! It was nice to talk to you.",
    ),
    (
        ("Who made you?", "Who trained you?", "Where do you come from?", "How were you made?"),
        "The neuqi-serve project trained me on text that a script wrote.",
    ),
    (
        (
            "How big are you?",
            "Are you a big model?",
            "How many parameters do you have?",
            "What is your size?",
        ),
        "I am tiny: about five million parameters.",
    ),
    (
        ("Do you know everything?", "Are you clever?", "Are you always right?"),
        "No, I am tiny and I make mistakes.",
    ),
)


def story(rng: random.Random) -> Task:
    """A story of three parts with a name, an animal and a thing; split by the three words."""
    who, animal, thing = rng.choice(NAMES), rng.choice(ANIMALS), rng.choice(OBJECTS)
    slots = {
        "who": who, "animal": animal, "thing": thing, "place": rng.choice(PLACES), "colour":
        rng.choice(COLOURS), "feeling": rng.choice(FEELINGS),
    }  # fmt: skip
    _, prompt = phrase(rng, ASK_STORY, slots)
    parts = [phrase(rng, part, slots)[1] for part in (OPENINGS, MIDDLES, CLOSINGS)]
    prompt, answer = (_articles(text) for text in (prompt, " ".join(parts)))
    return Task(
        "story", prompt, f"{answer} {STORY_ENDING}", f"story {who} {animal} {thing}", (who, animal, thing)
    )


def _articles(text: str) -> str:
    words = text.split(" ")
    for i in range(len(words) - 1):
        if words[i] in ("a", "A") and words[i + 1][0] in "aeiou":
            words[i] += "n"
    return " ".join(words)


def reading(rng: random.Random) -> Task:
    """A question about one sentence in which two people have two things; split by people and things."""
    a, b = rng.sample(NAMES, 2)
    ca, cb = rng.sample(COLOURS, 2)
    ta, tb = rng.sample(OBJECTS, 2)
    slots = {"a": a, "b": b, "ca": ca, "cb": cb, "ta": ta, "tb": tb}
    who, colour, thing = rng.choice(((a, ca, ta), (b, cb, tb)))
    question, answer = rng.choice(
        (
            (f"What does {who} have?", f"{who} has a {colour} {thing}."),
            (f"Who has the {thing}?", f"{who} has the {thing}."),
            (f"Who has the {colour} {thing}?", f"{who} has the {colour} {thing}."),
            (f"What colour is the {thing}?", f"The {thing} is {colour}."),
        )
    )
    text = _articles(READ.format(**slots))
    return Task("reading", f"{text} {question}", _articles(answer), f"reading {a} {b} {ta} {tb}")


def name(rng: random.Random) -> Task:
    """The user says a name and is greeted by it; split by name and phrasing."""
    who = rng.choice(NAMES)
    number, prompt = phrase(
        rng,
        ("My name is {w}.", "I am {w}.", "Hello, I am {w}.", "You can call me {w}.", "Call me {w}."),
        {"w": who},
    )
    return Task("name", prompt, f"Nice to meet you, {who}!", f"name {who} phrasing {number}")


def chat(rng: random.Random) -> Task:
    """Small talk. There are too few ways to say these, so none is held out (the key is fixed)."""
    phrasings, answer = rng.choice(CHAT)
    return Task("chat", rng.choice(phrasings), answer, CHAT_KEY)


def riddle(rng: random.Random) -> Task:
    """A riddle from a fixed table, never held out."""
    prompt, answer = rng.choice(RIDDLES)
    return Task("riddle", prompt, answer, CHAT_KEY)


CHAT_KEY = "chat"
