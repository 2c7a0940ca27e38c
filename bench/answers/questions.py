# SPDX-License-Identifier: Apache-2.0
"""What is asked about a scene of `bench.answers`, read off what is seen in each of its units.

Questions are words of a small vocabulary, an answer is one word. A question is only asked where it has one answer that
a look at every unit gives: not what a third of the scene something came in when it came at the border of two.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from bench.answers.scenes import COLOURS, COLUMNS, ROWS, SHAPES, Seen

Units = Sequence[tuple[Seen, ...]]
"""For each unit, the objects that are there."""

NUMBERS = ("none", "one", "two", "three", "four", "five", "six")
TIMES = ("start", "early", "halfway", "late", "never")
WAYS = ("leftwards", "rightwards", "up", "down", "not")
BORDER = 0.05
"""Shares of the scene or of the frame: closer to a border nothing is asked."""


class Question(NamedTuple):
    """A question.

    Attributes:
        task: Its kind, a name in `TASKS`.
        words: The question, ending in "?".
        answer: The right word.
    """

    task: str
    words: tuple[str, ...]
    answer: str


class _Object:
    """What is known of one object over all units."""

    def __init__(self, units: Units, number: int) -> None:
        found = [(t, seen) for t, unit in enumerate(units) for seen in unit if seen.number == number]
        self.begin, self.first = found[0]
        self.end, self.last = found[-1]
        self.colours = list(dict.fromkeys(seen.colour for _, seen in found))
        self.moved = (self.last.x - self.first.x, self.last.y - self.first.y)


def _objects(units: Units) -> list[_Object]:
    numbers = dict.fromkeys(seen.number for unit in units for seen in unit)
    return [_Object(units, number) for number in numbers]


def _named(objects: list[_Object]) -> list[_Object]:
    """The objects that one colour tells from all others at all times."""
    return [
        each
        for each in objects
        if len(each.colours) == 1 and not any(each.colours[0] in o.colours for o in objects if o is not each)
    ]


def _first(units: Units, rng: np.random.Generator) -> tuple[str, str] | None:
    objects = sorted(_objects(units), key=lambda each: each.begin)
    if not objects or (len(objects) > 1 and objects[0].begin == objects[1].begin):
        return None
    return "what colour came first", objects[0].first.colour


def _newest(units: Units) -> _Object | None:
    objects = sorted(_objects(units), key=lambda each: each.begin)
    return objects[-1] if len(objects) > 1 and objects[-1].begin > objects[-2].begin else None


def _last(units: Units, rng: np.random.Generator) -> tuple[str, str] | None:
    newest = _newest(units)
    return ("what colour came last", newest.first.colour) if newest else None


def _shape(units: Units, rng: np.random.Generator) -> tuple[str, str] | None:
    newest = _newest(units)
    return ("what shape came last", newest.first.shape) if newest else None


def _where(units: Units, rng: np.random.Generator) -> tuple[str, str] | None:
    asked = _any(_named(_objects(units)), rng)
    if asked is None:
        return None
    at = [asked.last.y * 3, asked.last.x * 3]
    if any(min(abs(each - 1), abs(each - 2)) < 3 * BORDER for each in at):
        return None
    row, column = (min(2, max(0, int(each))) for each in at)
    return f"where was {asked.colours[0]} in the end", f"{ROWS[row]}-{COLUMNS[column]}"


def _when(units: Units, rng: np.random.Generator) -> tuple[str, str] | None:
    objects = _objects(units)
    absent = sorted(set(COLOURS) - {colour for each in objects for colour in each.colours})
    if absent and rng.random() < 0.2:
        return f"when came {rng.choice(absent)}", "never"
    asked = _any(_named(objects), rng)
    if asked is None:
        return None
    share = asked.begin / len(units)
    if asked.begin and min(abs(share - 1 / 3), abs(share - 2 / 3)) < BORDER:
        return None
    return f"when came {asked.colours[0]}", TIMES[1 + int(3 * share)] if asked.begin else "start"


def _stays(units: Units, rng: np.random.Generator) -> tuple[str, str] | None:
    asked = _any(_named(_objects(units)), rng)
    if asked is None:
        return None
    return f"was {asked.colours[0]} there in the end", "yes" if asked.end == len(units) - 1 else "no"


def _count(units: Units, rng: np.random.Generator) -> tuple[str, str] | None:
    return "how many were there", NUMBERS[len(_objects(units))]


def _change(units: Units, rng: np.random.Generator) -> tuple[str, str] | None:
    objects = _objects(units)
    alone = [each for each in objects if not any(each.first.colour in o.colours for o in objects if o is not each)]
    changed = [each for each in alone if len(each.colours) == 2]
    asked = _any(changed if changed and rng.random() < 0.8 else alone, rng)
    if asked is None:
        return None
    return f"what became of {asked.first.colour}", asked.colours[1] if len(asked.colours) > 1 else "not"


def _move(units: Units, rng: np.random.Generator) -> tuple[str, str] | None:
    named = _named(_objects(units))
    far = [max(abs(each.moved[0]), abs(each.moved[1])) for each in named]
    clear = [each for each, by in zip(named, far, strict=True) if by < 0.01 or by > 0.2]
    moving = [each for each in clear if max(map(abs, each.moved)) > 0.2]
    asked = _any(moving if moving and rng.random() < 0.7 else clear, rng)
    if asked is None:
        return None
    x, y = asked.moved
    way = WAYS[(0 if x < 0 else 1) if abs(x) > abs(y) else (2 if y < 0 else 3)] if max(abs(x), abs(y)) > 0.2 else "not"
    return f"how did {asked.colours[0]} move", way


def _at(units: Units, rng: np.random.Generator) -> tuple[str, str] | None:
    tenth = int(rng.integers(1, 10))
    middle = round(tenth * len(units) / 10)
    near = units[max(0, middle - 1) : middle + 2]
    colours = [tuple(seen.colour for seen in unit) for unit in near]
    if len(near) < 3 or len(set(colours)) > 1 or len(colours[0]) > 1:
        return None
    return f"what was there at {NUMBERS[tenth] if tenth < 7 else ('seven', 'eight', 'nine')[tenth - 7]} tenths", (
        colours[0][0] if colours[0] else "nothing"
    )


def _order(units: Units, rng: np.random.Generator) -> tuple[str, str] | None:
    named = _named(_objects(units))
    pairs = [(a, b) for a in named for b in named if a.begin < b.begin]
    if not pairs:
        return None
    earlier, later = pairs[rng.integers(len(pairs))]
    one, other = (earlier, later) if rng.random() < 0.5 else (later, earlier)
    return f"came {one.colours[0]} or {other.colours[0]} first", earlier.colours[0]


TASKS: dict[str, Callable[[Units, np.random.Generator], tuple[str, str] | None]] = {
    "first": _first,
    "last": _last,
    "shape": _shape,
    "where": _where,
    "when": _when,
    "stays": _stays,
    "count": _count,
    "change": _change,
    "move": _move,
    "at": _at,
    "order": _order,
}
"""By name: what is seen and a generator to question and answer, or None where nothing can be asked."""


def ask_about(units: Units, rng: np.random.Generator, tasks: Sequence[str] = tuple(TASKS)) -> list[Question]:
    """One question of each task that can be asked, in the order of `tasks`."""
    found = []
    for task in tasks:
        asked = TASKS[task](units, rng)
        if asked is not None:
            found.append(Question(task, (*asked[0].split(), "?"), asked[1]))
    return found


_WORDS = (
    "a at became came change colour did end first how in last many move of or shape tenths the there was were what "
    "when where yes no nothing seven eight nine ?"
)
VOCABULARY = tuple(dict.fromkeys([
    "<start>", *_WORDS.split(), *COLOURS, *SHAPES, *NUMBERS, *TIMES, *WAYS,
    *(f"{row}-{column}" for row in ROWS for column in COLUMNS),
]))  # fmt: skip
"""All words; the first one begins every prompt."""
NUMBER_OF = {word: number for number, word in enumerate(VOCABULARY)}
"""The number of each word."""


def _any(objects: list[_Object], rng: np.random.Generator) -> _Object | None:
    return objects[rng.integers(len(objects))] if objects else None
