# SPDX-License-Identifier: Apache-2.0
"""The prices that select_hold tries: finely graded where they are low, to a 64th of themselves where they are high."""

from collections.abc import Callable

UNITS = 32
"""Units of a block."""

_FINE = 64


def price(number: int) -> int:
    """Price `number` >= 0: 0, 1, 2, ... 127, then 128, 130, ... 254, 256, 260, ...; it grows with the number."""
    if number < 2 * _FINE:
        return number
    octave = number // _FINE - 1
    return (_FINE + number % _FINE) << octave


def top_number(width: int, highest_weight: int) -> int:
    """The lowest number whose price is higher than anything a block of UNITS units can cost: it keeps nothing."""
    most = 255 * width * UNITS * highest_weight
    number = 0
    while price(number) <= most:
        number += 1
    return number


def lowest_that_fits(fits: Callable[[int], bool], high: int) -> int:
    """The lowest price number that bisection finds to fit the budget, where 0 does not and `high` does."""
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle
    return high
