"""Samples, percentiles, the order of runs and readings, against numbers worked out by hand; no real clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime.bench import Ceiling, Samples, interleaved, sampled, timing


def clock(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    """Every look at the clock is `step` seconds after the one before."""
    now = 0.0

    def look() -> float:
        nonlocal now
        now += step
        return now

    monkeypatch.setattr(time, "perf_counter", look)


def noted(calls: list[str], name: str) -> Callable[[], None]:
    return lambda: calls.append(name)


@given(
    st.lists(st.floats(0, 1e3), min_size=1, max_size=40),
    st.sampled_from([0, 1, 10, 20, 25, 50, 75, 80, 90, 99, 100]),
)
@settings(max_examples=100, deadline=None)
def test_percentiles_equal_numpy(seconds: list[float], percent: int) -> None:
    samples = Samples(tuple(seconds))
    assert samples.percentile(percent) == pytest.approx(np.percentile(seconds, percent), rel=1e-9, abs=1e-9)
    assert samples.median == pytest.approx(np.median(seconds))


def test_the_spread_is_said_in_milliseconds() -> None:
    assert Samples((0.001, 0.002, 0.003, 0.004, 0.005, 0.006)).spread() == "2.00-5.00 ms"


def test_fractions_are_taken_sample_by_sample() -> None:
    ceilings = (Ceiling(100.0, 10.0), Ceiling(50.0, 40.0), Ceiling(200.0, 20.0))
    samples = Samples((0.5, 1.0, 0.25), ceilings)
    assert samples.fractions_of_read(25) == (0.5, 0.5, 0.5)
    assert samples.fractions_of_multiply(4) == (0.8, 0.1, 0.8)
    with pytest.raises(ValueError, match="zip"):
        Samples((0.5,)).fractions_of_read(1)


def test_the_median_fraction_does_not_see_a_neighbour_that_slows_down_everything() -> None:
    # two of five samples ran while the machine gave a quarter
    ceilings = tuple(Ceiling(rate, rate) for rate in (100.0, 100.0, 25.0, 25.0, 100.0))
    samples = Samples((0.1, 0.1, 0.4, 0.4, 0.1), ceilings)
    assert statistics.median(samples.fractions_of_read(5)) == pytest.approx(0.5)
    assert 5 / samples.percentile(80) / 100 == pytest.approx(0.125)


def test_the_mean_of_two_readings() -> None:
    assert Ceiling(10.0, 100.0).mean(Ceiling(30.0, 500.0)) == Ceiling(20.0, 300.0)


def test_runs_are_interleaved_after_their_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock(monkeypatch, 5.0)
    found = interleaved([noted(calls, "a"), noted(calls, "b")], repeats=3, warmup=2)
    assert "".join(calls) == "ab" * 5
    assert [each.seconds for each in found] == [(5.0, 5.0, 5.0)] * 2
    assert [each.ceilings for each in found] == [(), ()]


def test_a_reading_stands_before_and_after_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock(monkeypatch, 5.0)

    def probe() -> Ceiling:
        calls.append(".")
        # 1, 2, 3, ... so that a mean says which two it was taken from
        return Ceiling(calls.count("."), 10.0 * calls.count("."))

    found = interleaved([noted(calls, "a"), noted(calls, "b")], repeats=2, warmup=1, probe=probe)
    assert "".join(calls) == "ab" + ".a.b" * 2 + "."
    assert [[each.read_bandwidth for each in samples.ceilings] for samples in found] == [[1.5, 3.5], [2.5, 4.5]]
    assert [[each.multiply_rate for each in samples.ceilings] for samples in found] == [[15, 35], [25, 45]]


def test_a_short_run_finds_its_caches_full_again_behind_a_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock(monkeypatch, timing._SHORT_SECONDS / 2)

    def probe() -> Ceiling:
        calls.append(".")
        return Ceiling(1.0, 1.0)

    (found,) = interleaved([noted(calls, "a")], repeats=2, warmup=1, probe=probe)
    assert "".join(calls) == "a" + ".aa" * 2 + "."
    # only the second one of each pair is timed
    assert found.seconds == pytest.approx((timing._SHORT_SECONDS / 2,) * 2)


def test_timers_say_their_own_seconds() -> None:
    times = iter([1.0, 10.0, 2.0, 20.0])
    fast, slow = sampled([lambda: next(times), lambda: next(times)], 2)
    assert (fast.seconds, slow.seconds) == ((1.0, 2.0), (10.0, 20.0))
