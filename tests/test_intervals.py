"""Intervals by Student's t agree with printed tables."""

import math

import pytest

from scoring.intervals import half_interval, student


@pytest.mark.parametrize("freedom, value", [(1, 12.706), (2, 4.303), (5, 2.571), (15, 2.131), (59, 2.001)])
def test_student_equals_the_printed_table(freedom, value):
    assert student(freedom) == pytest.approx(value, rel=3e-4)


def test_interval_by_hand():
    # The deviation of 1, 2, 3 is 1; Student's t for two degrees of freedom is 4.3027.
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert half_interval([0.5]) is None and half_interval([]) is None
