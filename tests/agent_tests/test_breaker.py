import pytest

from overnight.agent.proposers.breaker import Breaker
from overnight.store.errors import ProposerError


class Clock:
    """Time that stands still until told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker("http://127.0.0.1:1/v1", clock=clock)


def fail(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        breaker.record_failure("connection refused")


def test_two_failures_let_the_next_call_through(breaker: Breaker):
    fail(breaker, 2)
    breaker.check()


def test_three_failures_refuse_the_next_call(breaker: Breaker):
    fail(breaker, 3)
    with pytest.raises(ProposerError, match=r"skipped for another 30 s, until \d\d:\d\d:\d\d UTC.*connection refused"):
        breaker.check()


def test_a_refused_call_is_an_llm_error(breaker: Breaker):
    fail(breaker, 3)
    with pytest.raises(ProposerError) as caught:
        breaker.check()
    assert caught.value.failure == "llm_error"


def test_the_endpoint_is_tried_again_by_itself(breaker: Breaker, clock: Clock):
    fail(breaker, 3)
    clock.now += 30.0
    breaker.check()


def test_each_further_failure_doubles_the_interval_up_to_half_an_hour(breaker: Breaker, clock: Clock):
    fail(breaker, 3)
    intervals = []
    for _ in range(9):
        intervals.append(breaker.skip_s)
        clock.now += breaker.skip_s
        fail(breaker, 1)
    assert intervals == [30, 60, 120, 240, 480, 960, 1800, 1800, 1800]


def test_a_success_forgets_the_failures(breaker: Breaker, clock: Clock):
    fail(breaker, 5)
    clock.now += 3600
    breaker.record_success()
    fail(breaker, 2)
    breaker.check()


def test_ten_thousand_failures_still_wait_half_an_hour(breaker: Breaker):
    fail(breaker, 10_000)
    assert breaker.skip_s == 1800
