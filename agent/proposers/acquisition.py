"""Scores configurations by the acquisition of Optuna's own samplers: the one place that looks inside Optuna.

Optuna's public API draws a configuration and keeps its acquisition function to itself. Each class here is Optuna's
sampler, unchanged but for one thing: while it draws, it leaves its acquisition behind, so that the legal one-knob
moves can be ranked by it. Written against Optuna 5.0; `tests/agent_tests/test_sampler.py` fails when the inside moves.
It promises nothing about a draw that had too little history: then there is no acquisition, and `score` says None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from optuna._gp.search_space import SearchSpace
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution
from optuna.samplers import CmaEsSampler, GPSampler, TPESampler
from optuna.trial import create_trial

SamplerName = Literal["tpe", "gp", "cmaes"]
Params = Mapping[str, Any]
"""One configuration in Optuna's own values, one for each parameter of the space."""
Scores = npt.NDArray[np.float64]


class ScoringTpe(TPESampler):  # type: ignore[misc, unused-ignore]
    """TPE; its score is log l(x) - log g(x), the log density ratio of good and other trials (Bergstra et al., 2011)."""

    def __init__(self, space: Mapping[str, BaseDistribution], seed: int) -> None:
        super().__init__(seed=seed)
        self._space = space
        self._ratio: tuple[Any, Any] | None = None

    def _compute_acquisition_func(self, samples: Any, mpe_below: Any, mpe_above: Any) -> Any:
        self._ratio = (mpe_below, mpe_above)
        return super()._compute_acquisition_func(samples, mpe_below, mpe_above)

    def score(self, candidates: Sequence[Params]) -> Scores | None:
        """Return each candidate's score under the last draw, or None when that draw was a start-up draw."""
        if self._ratio is None:
            return None
        samples = {
            name: np.array([distribution.to_internal_repr(params[name]) for params in candidates])
            for name, distribution in self._space.items()
        }
        below, above = self._ratio
        return np.asarray(super()._compute_acquisition_func(samples, below, above), dtype=float)


class ScoringGp(GPSampler):  # type: ignore[misc, unused-ignore]
    """A Gaussian process with a Matern 5/2 kernel; its score is log expected improvement."""

    def __init__(self, space: Mapping[str, BaseDistribution], seed: int, *, search: bool) -> None:
        super().__init__(seed=seed)
        self._space = space
        self._search = search
        self._acquisition: Any = None

    def _optimize_acqf(self, acqf: Any, best_params: Any) -> Any:
        self._acquisition = acqf
        # To score given moves, the search for the best of all configurations is wasted time.
        return super()._optimize_acqf(acqf, best_params) if self._search else best_params[0]

    def score(self, candidates: Sequence[Params]) -> Scores | None:
        """Return each candidate's score under the last draw, or None when that draw was a start-up draw."""
        if self._acquisition is None:
            return None
        space = SearchSpace(dict(self._space))
        points = space.get_normalized_params([create_trial(value=0.0)] * len(candidates), [dict(c) for c in candidates])
        return np.asarray(self._acquisition.eval_acqf_no_grad(points), dtype=float)


class ScoringCmaEs(CmaEsSampler):  # type: ignore[misc, unused-ignore]
    """CMA-ES; its score is the log density of its current Gaussian, up to a constant (Hansen, 2016, eq. 5)."""

    def __init__(self, space: Mapping[str, BaseDistribution], seed: int) -> None:
        super().__init__(seed=seed, warn_independent_sampling=False)
        self._space = space
        self._optimizer: Any = None

    def _restore_optimizer(self, completed_trials: Any) -> Any:
        self._optimizer = super()._restore_optimizer(completed_trials)
        return self._optimizer

    def _init_optimizer(self, trans: Any, direction: Any) -> Any:
        self._optimizer = super()._init_optimizer(trans, direction)
        return self._optimizer

    def score(self, candidates: Sequence[Params]) -> Scores | None:
        """Return each candidate's score under the last draw, or None when that draw was a start-up draw."""
        if self._optimizer is None:
            return None
        transform = _SearchSpaceTransform(dict(self._space), transform_step=True, transform_0_1=True)
        points = np.stack([transform.transform(dict(params)) for params in candidates])
        offsets = points - self._optimizer.mean
        precision_times_offsets = np.linalg.solve(self._optimizer._C, offsets.T).T
        return np.asarray(-0.5 * (offsets * precision_times_offsets).sum(axis=1) / self._optimizer._sigma**2)


ScoringSampler = ScoringTpe | ScoringGp | ScoringCmaEs


def make_sampler(
    name: SamplerName, space: Mapping[str, BaseDistribution], seed: int, *, search: bool
) -> ScoringSampler:
    """Return Optuna's sampler of that name, able to score.

    Args:
        name: Which sampler.
        space: Distribution of each parameter, sorted by name, as the samplers order their own.
        seed: Of every draw; cut to the 32 bits that NumPy takes.
        search: Whether the draw itself is wanted too, and not only the scores.
    """
    seed %= 2**32
    if name == "tpe":
        return ScoringTpe(space, seed)
    return ScoringGp(space, seed, search=search) if name == "gp" else ScoringCmaEs(space, seed)
