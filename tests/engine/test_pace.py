"""How much of a long prompt joins a forward is measured: a piece adds less than an ordinary step, whatever inputs cost."""

import pytest

from trimode.engine.scheduler import Pace


@pytest.mark.parametrize("input_s", [0.0001, 0.001, 0.005])
def test_a_piece_adds_less_than_an_ordinary_step(input_s):
    pace, ordinary_s = Pace(), 0.05
    for _ in range(30):
        pace.note(0, ordinary_s)
        pace.note(pace.allowance, ordinary_s + pace.allowance * input_s)
    if Pace.LEAST < pace.allowance < Pace.MOST:
        assert 0.5 * ordinary_s < pace.allowance * input_s < 0.7 * ordinary_s
    assert (pace.allowance == Pace.MOST) == (input_s == 0.0001)


def test_it_follows_when_inputs_become_dearer_and_never_stops_reading():
    pace = Pace()
    pace.note(0, 0.05)
    assert pace.allowance == Pace.FIRST
    for _ in range(30):
        pace.note(pace.allowance, 0.05 + pace.allowance * 0.001)
    cheap = pace.allowance
    for _ in range(30):
        pace.note(pace.allowance, 0.05 + pace.allowance * 0.5)
    assert pace.allowance == Pace.LEAST < cheap
    for _ in range(60):
        pace.note(pace.allowance, 0.05)
    assert pace.allowance > Pace.LEAST
