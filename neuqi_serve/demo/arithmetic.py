"""Number tasks: sums, differences, products, order, sequences and small word problems."""

from __future__ import annotations

import random

from neuqi_serve.demo.task import Task, phrase
from neuqi_serve.demo.words import NAMES

ADD = (
    "What is {a} + {b}?", "What is {a} plus {b}?", "Add {a} and {b}.", "How much is {a} + {b}?",
    "{a} + {b} = ?", "Work out {a} + {b}.", "What is the sum of {a} and {b}?",
)  # fmt: skip
SUBTRACT = (
    "What is {a} - {b}?", "What is {a} minus {b}?", "Subtract {b} from {a}.", "How much is {a} - {b}?",
    "{a} - {b} = ?", "Take {b} away from {a}.",
)  # fmt: skip
MULTIPLY = (
    "What is {a} x {b}?", "What is {a} times {b}?", "Multiply {a} by {b}.", "How much is {a} x {b}?",
    "{a} x {b} = ?", "What is {a} * {b}?",
)  # fmt: skip
LARGER = (
    "Which is larger, {a} or {b}?", "Which number is bigger: {a} or {b}?",
    "What is the larger of {a} and {b}?", "Compare {a} and {b}: which is larger?",
)  # fmt: skip
SMALLER = (
    "Which is smaller, {a} or {b}?", "Which number is less: {a} or {b}?",
    "What is the smaller of {a} and {b}?", "Compare {a} and {b}: which is smaller?",
)  # fmt: skip
RISING = (
    "Sort these numbers: {n}.", "Sort {n} from small to large.", "Put these numbers in order: {n}.",
    "Put {n} in rising order.",
)  # fmt: skip
FALLING = (
    "Sort {n} from large to small.", "Put these numbers in falling order: {n}.",
    "Sort these numbers from high to low: {n}.",
)  # fmt: skip
LARGEST = ("What is the largest number in {n}?", "Find the largest of {n}.", "Which of {n} is the largest?")
SMALLEST = (
    "What is the smallest number in {n}?",
    "Find the smallest of {n}.",
    "Which of {n} is the smallest?",
)
PARITY = ("Is {a} even or odd?", "Tell me if {a} is even or odd.", "Is the number {a} odd or even?")
NEXT = (
    "What comes next: {n}?", "What is the next number: {n}?", "Continue the sequence {n}.",
    "Which number comes after {n}?",
)  # fmt: skip
GAIN = (
    "{who} has {a} {things} and gets {b} more. How many {things} does {who} have now?",
    "{who} had {a} {things} and found {b} more. How many {things} does {who} have?",
)
LOSS = (
    "{who} has {a} {things} and gives away {b}. How many {things} are left?",
    "{who} had {a} {things} and lost {b} of them. How many {things} are left?",
)
THINGS = ("apples", "books", "balls", "coins", "cups", "stamps", "shells", "cards")


def add(rng: random.Random) -> Task:
    """A sum of two numbers below 100; the small sums are split by phrasing, the others by instance."""
    limit = rng.choice((13, 100, 100, 100))
    a, b = rng.randrange(limit), rng.randrange(limit)
    number, prompt = phrase(rng, ADD, {"a": a, "b": b})
    low, high = sorted((a, b))
    key = f"add {low} {high}" if high > 12 else f"add {low} {high} phrasing {number}"
    return Task("add", prompt, f"{a} + {b} = {a + b}.", key)


def add_columns(rng: random.Random) -> Task:
    """A sum of two three-digit numbers, worked out in columns."""
    a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
    _, prompt = phrase(rng, ADD, {"a": a, "b": b})
    steps, carry = [], 0
    for place, unit in (("ones", 1), ("tens", 10), ("hundreds", 100)):
        x, y = a // unit % 10, b // unit % 10
        total = x + y + carry
        steps.append(f"{place} {x} + {y}{' + 1' if carry else ''} = {total}")
        carry = total // 10
    text = ", ".join(steps)
    answer = f"{text[0].upper()}{text[1:]}. So {a} + {b} = {a + b}."
    return Task("add columns", prompt, answer, f"add {min(a, b)} {max(a, b)}")


def subtract(rng: random.Random) -> Task:
    """A difference of two numbers below 100 that is not negative."""
    limit = rng.choice((13, 100, 100, 100))
    b, a = sorted((rng.randrange(limit), rng.randrange(limit)))
    number, prompt = phrase(rng, SUBTRACT, {"a": a, "b": b})
    key = f"subtract {a} {b}" if a > 12 else f"subtract {a} {b} phrasing {number}"
    return Task("subtract", prompt, f"{a} - {b} = {a - b}.", key)


def times_table(rng: random.Random) -> Task:
    """The table up to 12 x 12, split by phrasing."""
    a, b = rng.randrange(1, 13), rng.randrange(1, 13)
    number, prompt = phrase(rng, MULTIPLY, {"a": a, "b": b})
    return Task("times table", prompt, f"{a} x {b} = {a * b}.", f"times {a} {b} phrasing {number}")


def multiply(rng: random.Random) -> Task:
    """A two-digit number times a digit, worked out in two parts."""
    a, b = rng.randrange(13, 100), rng.randrange(2, 10)
    _, prompt = phrase(rng, MULTIPLY, {"a": a, "b": b})
    tens, ones = a // 10 * 10, a % 10
    work = f"{tens} x {b} = {tens * b} and {ones} x {b} = {ones * b}. So {a} x {b} = {a * b}."
    return Task("multiply", prompt, work, f"multiply {a} {b}")


def compare(rng: random.Random) -> Task:
    """The larger or smaller of two different numbers below 1000."""
    limit = rng.choice((100, 1000))
    a, b = rng.sample(range(limit), 2)
    larger = rng.random() < 0.5
    _, prompt = phrase(rng, LARGER if larger else SMALLER, {"a": a, "b": b})
    answer = f"{max(a, b)} is larger." if larger else f"{min(a, b)} is smaller."
    return Task("compare", prompt, answer, f"compare {min(a, b)} {max(a, b)}")


def _numbers(rng: random.Random, least: int, most: int) -> list[int]:
    return rng.sample(range(1, 100), rng.randint(least, most))


def sort_numbers(rng: random.Random) -> Task:
    """Three to five different numbers below 100 in rising or falling order."""
    numbers = _numbers(rng, 3, 5)
    falling = rng.random() < 0.4
    _, prompt = phrase(rng, FALLING if falling else RISING, {"n": ", ".join(map(str, numbers))})
    ordered = sorted(numbers, reverse=falling)
    key = f"numbers {sorted(numbers)}"
    return Task("sort numbers", prompt, ", ".join(map(str, ordered)), key)


def extreme(rng: random.Random) -> Task:
    """The largest or smallest of three to five numbers below 100."""
    numbers = _numbers(rng, 3, 5)
    largest = rng.random() < 0.5
    _, prompt = phrase(rng, LARGEST if largest else SMALLEST, {"n": ", ".join(map(str, numbers))})
    answer = f"The largest is {max(numbers)}." if largest else f"The smallest is {min(numbers)}."
    return Task("extreme", prompt, answer, f"numbers {sorted(numbers)}")


def parity(rng: random.Random) -> Task:
    """Whether a number below 1000 is even or odd."""
    a = rng.randrange(1000)
    _, prompt = phrase(rng, PARITY, {"a": a})
    return Task("parity", prompt, f"{a} is {'odd' if a % 2 else 'even'}.", f"parity {a}")


def sequence(rng: random.Random) -> Task:
    """The next number after four numbers with a constant step of 1 to 10, rising or falling."""
    step = rng.randint(1, 10) * rng.choice((1, 1, -1))
    first = rng.randint(0, 50) if step > 0 else rng.randint(-4 * step, 90)
    numbers = [first + step * i for i in range(5)]
    _, prompt = phrase(rng, NEXT, {"n": ", ".join(map(str, numbers[:4]))})
    return Task("sequence", prompt, f"The next number is {numbers[4]}.", f"sequence {first} {step}")


def word_problem(rng: random.Random) -> Task:
    """Someone gains or loses things; numbers below 50."""
    who, things = rng.choice(NAMES), rng.choice(THINGS)
    gain = rng.random() < 0.5
    b, a = sorted((rng.randint(2, 49), rng.randint(2, 49)))
    _, prompt = phrase(rng, GAIN if gain else LOSS, {"who": who, "a": a, "b": b, "things": things})
    if gain:
        answer = f"{a} + {b} = {a + b}. {who} has {a + b} {things}."
    else:
        answer = f"{a} - {b} = {a - b}. There are {a - b} {things} left."
    return Task("word problem", prompt, answer, f"problem {who} {things} {a} {b}")
