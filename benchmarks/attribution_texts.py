"""Texts whose last clause asks for a word of their first sentence, for `benchmarks.attribution`.

A text is a first sentence with a cue, a few sentences about other things, and a clause that breaks off where the cue
comes again. Everything is drawn from fixed lists with a fixed seed.
"""

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import numpy as np

KINDS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, str], ...]]] = {
    "name": (
        ("Edward", "Martha", "Oliver", "Susan", "Peter", "Alice", "Henry", "Laura", "Simon", "Julia"),
        (
            ("The letter was written by {}.", "Much later we learned that the letter was written by"),
            ("{} has lost a bunch of keys in the park.", "Yesterday the keys were found in the park. They belong to"),
            ("My new neighbour is called {}.", "This morning I met my new neighbour, who is called"),
        ),
    ),
    "colour": (
        ("green", "red", "yellow", "blue", "purple", "white", "black", "orange", "pink", "brown"),
        (
            ("The front door of the house is painted {}.", "You will find it, for the front door is painted"),
            ("Her new bicycle is {}.", "You will know her by her new bicycle, which is"),
            ("The only car in the yard was {}.", "The witness was sure that the car in the yard was"),
        ),
    ),
    "number": (
        ("seven", "three", "nine", "twelve", "eleven", "four", "eight", "five", "fifteen", "twenty"),
        (
            ("The train leaves from platform {}.", "We must hurry now: the train leaves from platform"),
            ("There are {} apples in the basket.", "I have counted the apples in the basket again, and there are"),
            ("The meeting is in room number {}.", "Please tell the others that the meeting is in room number"),
        ),
    ),
    "code word": (
        ("lantern", "pepper", "falcon", "marble", "thunder", "velvet", "copper", "harbor", "meadow", "rocket"),
        (
            ("The secret password is {}.", "The guard at the gate wants to hear the secret password, which is"),
            ("In this game the magic word is {}.", "To open the box in the game, say the magic word:"),
            ("The name of the operation is {}.", "Nobody outside may learn that the name of the operation is"),
        ),
    ),
    "place": (
        ("Paris", "London", "Rome", "Chicago", "Boston", "Berlin", "Madrid", "Tokyo", "Vienna", "Dublin"),
        (
            ("My sister lives in {}.", "Next week I will visit my sister, who lives in"),
            ("The next conference will be held in {}.", "Book your flight soon, since the conference will be held in"),
            ("The parcel was sent from {}.", "The stamp shows that the parcel was sent from"),
        ),
    ),
    "digits": (
        ("4831", "7205", "9364", "2578", "6143", "8920", "3716", "5087", "1492", "7649"),
        (
            ("The safe opens with the code {}.", "To open the safe, he turned the wheel to the code "),
            ("The order has the number {}.", "When you call us, please say that the order has the number "),
            ("The year on the coin is {}.", "She held it to the light and saw that the year on the coin is "),
        ),
    ),
}

BETWEEN = (
    "The weather was fine all week.",
    "Some people went for a long walk.",
    "The shop on the corner sells bread.",
    "A dog was barking somewhere.",
    "The radio played an old song.",
    "It had rained during the night.",
    "The bus was late once more.",
    "Children were playing on the lawn.",
    "There was a smell of fresh coffee.",
    "The museum is closed on Mondays.",
    "Somebody had left a window open.",
    "The newspaper had little to report.",
    "We talked about the garden.",
    "A cold wind came from the sea.",
    "The lamp in the hall was broken.",
    "They had soup for lunch.",
    "The river was higher than usual.",
    "An old clock stood on the shelf.",
)
FEWEST, MOST = 1, 3  # sentences in between


class Text(NamedTuple):
    """A text, its kind, and where its cue stands: characters [start, stop) of the text."""

    kind: str
    text: str
    cue: str
    start: int
    stop: int


def texts(kind: str, seed: int = 0) -> Iterator[Text]:
    """Endless different texts of a kind, each of the kind's clauses in turn."""
    cues, clauses = KINDS[kind]
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    seen = set()
    for number in count():
        first, last = clauses[number % len(clauses)]
        cue = cues[int(rng.integers(len(cues)))]
        chosen = rng.permutation(len(BETWEEN))[: int(rng.integers(FEWEST, MOST + 1))]
        text = " ".join([first.format(cue), *(BETWEEN[i] for i in chosen), last])
        if text not in seen:
            seen.add(text)
            start = first.index("{}")
            yield Text(kind, text, cue, start, start + len(cue))
