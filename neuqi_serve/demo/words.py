"""The fixed tables of words and facts that the demo's tasks are made of."""

from __future__ import annotations

NAMES = (
    "Tom", "Ann", "Ben", "Mia", "Sam", "Lily", "Max", "Zoe", "Leo", "Emma", "Jack", "Ruby", "Noah", "Ella",
    "Oscar", "Nora", "Finn", "Clara", "Hugo", "Alice",
)  # fmt: skip

GROUPS: dict[str, tuple[str, ...]] = {
    "animal": (
        "dog", "cat", "horse", "cow", "pig", "duck", "lion", "tiger", "bear", "mouse", "frog", "owl", "fox",
        "wolf", "goat", "rabbit", "snake", "bee", "whale", "zebra",
    ),
    "fruit": (
        "apple", "banana", "pear", "cherry", "grape", "lemon", "orange", "peach", "plum", "mango", "kiwi",
        "melon",
    ),
    "colour": ("red", "blue", "green", "yellow", "purple", "brown", "black", "white", "pink", "grey"),
    "vehicle": ("car", "bus", "train", "boat", "plane", "truck", "bike", "tram", "ship", "taxi"),
    "tool": ("hammer", "saw", "drill", "spoon", "knife", "brush", "shovel", "needle"),
    "body part": ("hand", "foot", "nose", "ear", "eye", "knee", "arm", "leg"),
}  # fmt: skip

NOUNS = (
    *(word for group in GROUPS.values() for word in group),
    "table", "chair", "house", "river", "garden", "window", "kettle", "island", "cloud", "forest", "castle",
    "bridge", "lamp", "ring", "sugar", "paper", "clock", "stone", "violin", "jacket",
)  # fmt: skip

OBJECTS = (
    "ball", "kite", "book", "hat", "cup", "bag", "box", "lamp", "drum", "coat", "key", "ring", "map", "toy",
)  # fmt: skip

OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "young"), ("happy", "sad"),
    ("light", "dark"), ("high", "low"), ("long", "short"), ("full", "empty"), ("open", "closed"),
    ("early", "late"), ("wet", "dry"), ("hard", "soft"), ("loud", "quiet"), ("rich", "poor"),
    ("strong", "weak"), ("thick", "thin"), ("wide", "narrow"), ("clean", "dirty"), ("near", "far"),
    ("up", "down"), ("left", "right"), ("in", "out"), ("day", "night"), ("start", "finish"), ("win", "lose"),
    ("buy", "sell"), ("push", "pull"), ("love", "hate"), ("true", "false"), ("first", "last"),
    ("easy", "difficult"),
)  # fmt: skip

PLURALS: dict[str, str] = {
    "child": "children", "foot": "feet", "tooth": "teeth", "mouse": "mice", "man": "men", "woman": "women",
    "goose": "geese", "sheep": "sheep", "fish": "fish", "wolf": "wolves", "knife": "knives", "leaf": "leaves",
    "box": "boxes", "bus": "buses", "fox": "foxes", "brush": "brushes", "peach": "peaches",
    "cherry": "cherries", "baby": "babies", "city": "cities", "dog": "dogs", "cat": "cats",
    "apple": "apples", "book": "books", "car": "cars", "lamp": "lamps", "tree": "trees", "house": "houses",
    "boat": "boats", "duck": "ducks", "bear": "bears", "table": "tables",
}  # fmt: skip

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)  # fmt: skip

SOUNDS: dict[str, str] = {
    "dog": "woof", "cat": "meow", "cow": "moo", "pig": "oink", "duck": "quack", "lion": "roar",
    "frog": "ribbit", "owl": "hoot", "bee": "buzz", "sheep": "baa", "snake": "hiss", "horse": "neigh",
    "mouse": "squeak", "wolf": "howl",
}  # fmt: skip

LEGS: dict[str, int] = {
    "dog": 4, "cat": 4, "horse": 4, "cow": 4, "duck": 2, "owl": 2, "bee": 6, "ant": 6, "spider": 8,
    "snake": 0, "frog": 4, "zebra": 4, "hen": 2, "lion": 4,
}  # fmt: skip

HOMES: dict[str, str] = {
    "bee": "a hive", "bird": "a nest", "fish": "the water", "dog": "a kennel", "horse": "a stable",
    "bear": "a cave", "rabbit": "a burrow", "spider": "a web", "whale": "the sea", "pig": "a sty",
    "camel": "the desert", "king": "a castle",
}  # fmt: skip

SHADES: dict[str, str] = {
    "grass": "green", "the sky": "blue", "snow": "white", "coal": "black", "a banana": "yellow",
    "a lemon": "yellow", "blood": "red", "milk": "white", "chocolate": "brown", "a tomato": "red",
    "an elephant": "grey", "a flamingo": "pink", "a frog": "green", "the sun": "yellow", "the sea": "blue",
    "an aubergine": "purple",
}  # fmt: skip

RHYMES: dict[str, str] = {
    "cat": "hat", "dog": "frog", "house": "mouse", "tree": "bee", "moon": "spoon", "star": "car",
    "cake": "lake", "king": "ring", "night": "light", "bear": "chair", "snow": "crow", "boat": "goat",
    "fox": "box", "sun": "bun", "nose": "rose", "sand": "hand", "bed": "red", "wall": "ball",
    "train": "rain", "book": "cook",
}  # fmt: skip

RIDDLES: tuple[tuple[str, str], ...] = (
    ("I have hands but cannot clap. What am I?", "You are a clock."),
    ("I have keys but open no door. What am I?", "You are a piano."),
    ("I get wetter the more I dry. What am I?", "You are a towel."),
    ("I have teeth but cannot bite. What am I?", "You are a comb."),
    ("I have a neck but no head. What am I?", "You are a bottle."),
    ("I have pages but I am not a tree. What am I?", "You are a book."),
    ("I fall but never get hurt. What am I?", "You are the rain."),
    ("I have one eye but cannot see. What am I?", "You are a needle."),
    ("I go up but never come down. What am I?", "You are your age."),
    ("I follow you in the sun but not in the dark. What am I?", "You are a shadow."),
)

PLACES = ("forest", "garden", "river", "castle", "market", "beach", "village", "island", "mountain", "park")

FEELINGS = ("happy", "brave", "kind", "clever", "shy", "curious", "gentle", "cheerful")
