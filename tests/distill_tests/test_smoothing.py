"""The curve through a knob's measured values: near them it follows, far from them it says nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.distill.smoothing import Curve, place
from overnight.rails.menu import Knob

LINEAR = Knob(name="a", type="float", default=0.0, low=0.0, high=1.0)
LOG = Knob(name="lr", type="float", default=1e-3, low=1e-4, high=1e-1, scale="log")
CHOICES = Knob(name="width", type="int", default=64, choices=(128, 32, 64))
WORDS = Knob(name="precision", type="str", default="bf16", choices=("bf16", "fp8"))


@given(st.dictionaries(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.floats(-0.5, 0.5), min_size=2))
def test_it_goes_through_what_was_measured_exactly(gains: dict[float, float]) -> None:
    curve = Curve(LINEAR, {value: (gain, 0.0) for value, gain in gains.items()})
    size = max(abs(gain) for gain in gains.values())
    for value, gain in gains.items():
        assert curve.at(value) == pytest.approx(gain, abs=0.05 * size + 1e-9)


def test_noise_is_smoothed() -> None:
    noisy = {0.4: (0.0, 0.01), 0.5: (0.1, 0.01), 0.6: (0.0, 0.01)}
    found = Curve(LINEAR, noisy).at(0.5)
    assert found is not None
    assert 0.0 < found < 0.06


def test_far_from_any_measurement_it_returns_to_nothing() -> None:
    curve = Curve(LINEAR, {0.0: (0.0, 0.0), 0.1: (-0.3, 0.0)})
    assert curve.at(1.0) == pytest.approx(0.0, abs=0.01)


def test_two_values_close_together_do_not_speak_for_the_whole_range() -> None:
    curve = Curve(LINEAR, {0.5: (0.0, 0.0), 0.45: (-0.015, 0.0)})
    found = [curve.at(value) for value in (0.3, 0.6, 0.7, 0.8)]
    assert all(gain is not None and -0.015 <= gain <= 0.0 for gain in found)


def test_a_range_is_measured_on_its_own_scale() -> None:
    assert place(LINEAR, 0.25) == 0.25
    assert place(LOG, 1e-3) == pytest.approx(1 / 3)
    assert [place(CHOICES, value) for value in (32, 64, 128, 100)] == [0.0, 0.5, 1.0, None]


def test_words_have_no_order() -> None:
    assert place(WORDS, "fp8") is None
    assert Curve(WORDS, {"bf16": (0.0, 0.0), "fp8": (0.1, 0.0)}).at("fp8") is None


def test_one_value_alone_says_nothing() -> None:
    assert Curve(LINEAR, {0.5: (0.2, 0.0)}).at(0.6) is None


def test_where_nothing_matters_the_curve_is_flat() -> None:
    assert Curve(LINEAR, {0.2: (0.0, 0.1), 0.8: (0.0, 0.1)}).at(0.5) == 0.0
