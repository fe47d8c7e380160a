"""The analysis of a search, against counts made here."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest

from overnight.report.analysis import analyse, spread_evenly
from overnight.report.story import findings, headline
from overnight.store.errors import InputError
from overnight.store.sql_store import SqlStore
from overnight.store.trajectory import import_trajectory

from ..agent_tests.campaigns import campaign, run
from ..store_tests.suite import Campaigner
from ..store_tests.trajectories import as_bytes, attempt, header, random_history


def taken(store: SqlStore, records: list[dict[str, object]]) -> None:
    import_trajectory(store, as_bytes(records), name="old", origin="x")


def test_windows_of_ten_add_up_to_the_whole(store: SqlStore) -> None:
    taken(store, random_history(34))
    found = analyse(store, "old")
    assert [window.proposals for window in found.windows] == [10, 10, 10, 4]
    assert sum(window.repeats for window in found.windows) == found.stats["repeats"]


def test_a_repeat_of_a_known_failure_is_counted(store: SqlStore) -> None:
    failure = {"stage": "eval_failed", "error": "nan"}
    records = [header(), attempt(1, **failure), attempt(2), attempt(3, **failure), attempt(4, "n_head", 8)]
    taken(store, records)
    assert analyse(store, "old").failure_repeats == 2


def test_the_best_so_far_only_improves(store: SqlStore) -> None:
    taken(store, [header(), *(attempt(i, value=i, metric=m) for i, m in enumerate((10.8, 10.82, 10.7, 10.95), 1))])
    assert analyse(store, "old").best_so_far == [(1, 10.8), (3, 10.7)]


def test_gain_is_told_per_hour_and_per_kilowatt_hour(store: SqlStore) -> None:
    trial = {"purpose": "screening", "metric": 10.791, "wall_s": 7200.0, "energy_wh": 500.0, "ended_at": "2026-04-25"}
    taken(store, [header(), attempt(1, metric=10.791, trials=[trial])])
    found = analyse(store, "old")
    assert (found.gain_per_gpu_hour, found.gain_per_kwh) == (pytest.approx(0.005), pytest.approx(0.02))


def test_noise_says_how_many_keeps_it_explains(store: SqlStore) -> None:
    taken(store, random_history(60))
    found = analyse(store, "old")
    assert found.noise is not None
    z = 0.005 * 10.9 / (found.noise.sd * math.sqrt(2))
    assert found.noise.explained == pytest.approx(60 * (1 - statistics.NormalDist().cdf(z)))


@pytest.mark.parametrize("min_gain", [0.0, 0.05])
def test_confirmed_keeps_are_explained_by_alpha_and_by_the_threshold(
    store: SqlStore, tmp_path: Path, min_gain: float
) -> None:
    run(campaign(tmp_path, decision={"min_gain": min_gain, "alpha": 0.05}), store)
    found = analyse(store, "c")
    assert found.noise is not None
    errors = [turn.gain_se for turn in found.turns if turn.trials == 5 and turn.gain_se]
    reached = 1 - statistics.NormalDist().cdf(min_gain / statistics.median(errors))
    assert found.noise.chance == pytest.approx(min(0.05, reached))
    said = "no keep would" if min_gain else "at most 0.5 keeps would"  # of ten turns
    assert any(said in sentence for sentence in findings(found))


def test_a_campaign_that_kept_nothing_says_so(store: SqlStore) -> None:
    taken(store, [header(), attempt(1, metric=10.95)])
    assert headline(analyse(store, "old")) == "1 turn, nothing kept: no change beat the baseline beyond its noise."


def test_a_campaign_without_a_turn_can_be_analysed(store: SqlStore) -> None:
    Campaigner(store)
    assert "0 turns" in headline(analyse(store, "c"))


def test_an_unknown_campaign_is_an_error(store: SqlStore) -> None:
    with pytest.raises(InputError, match="no campaign `none`"):
        analyse(store, "none")


def test_the_first_trajectory_tells_its_whole_story(first: SqlStore) -> None:
    found = analyse(first, "trajectory")
    story = headline(found) + " " + " ".join(findings(found))
    for words in (
        "50 turns, 8 kept",
        "everything that was kept was also reverted",
        "standard deviation of 0.0198",
        "only 2.0 standard deviations of a difference of two runs",
        "36 of 50 proposals (72%) repeated",
        "6 of 13 knobs were ever touched",
        "over all 7 runs of its configuration (d_model = 768) the mean is 10.8783",
    ):
        assert words in story


@pytest.mark.parametrize("most", [2, 3, 10, 99])
def test_thinning_keeps_the_ends_and_the_order(most: int) -> None:
    thinned = spread_evenly(range(100), most)
    assert (thinned[0], thinned[-1], len(thinned)) == (0, 99, most)
    assert thinned == sorted(set(thinned))
