"""Which seeds are whose: no decision, audit, race, duel or holdout ever looks at a seed that another kind used.

A campaign decides on the seeds from its own thousand on, all below `ASIDE`; calibration and turns never get as far as
the holdout's (both are at most 200 long). Those aside are cut into thousands too: audits take the eighth hundred of
each, races the ninth, duels the last.
"""

from __future__ import annotations

THOUSANDS = 1_000_000
ASIDE = 1000 * THOUSANDS
"""Decisions look at seeds below this, everything else at seeds from here on; all fit in 31 bits."""
AUDIT_TRIALS = 5
"""Seeds of one audit, on which candidate and baseline are both measured."""
HOLDOUT_SEEDS = 5
"""Pairs behind the holdout's interval: 4 degrees of freedom."""
RACE_SEED = ASIDE + 800
"""The same for all picks of all races, so that they compare."""


def decision_seeds(campaign_seed: int) -> range:
    """Return the seeds that a campaign's decisions may use; the calibration takes the first of them."""
    return range(1000 * (campaign_seed % THOUSANDS), ASIDE)


def holdout_seeds(campaign_seed: int) -> range:
    """Return the seeds of the one look at the locked holdout, too far from the calibration's for a turn to use."""
    return decision_seeds(campaign_seed)[500 : 500 + HOLDOUT_SEEDS]


def audit_seeds(iteration: int) -> range:
    """Return the seeds of the audit of a turn, which nothing else ever uses: no decision, no other audit.

    Audits that shared a baseline's trials were biased: a baseline whose audit trials scatter raises the estimate, a
    high estimate keeps fewer candidates, so that baseline stays and is audited more (benchmarks/LOG.md). On fresh
    seeds the expected sum of squares of each audit, given all that went before, is its degrees of freedom times the
    variance of that pair, whatever was decided; so their pool is unbiased for noise of any shape that has a variance.
    """
    blocks, place = divmod(iteration, 100 // AUDIT_TRIALS)
    first = ASIDE + 700 + 1000 * blocks + AUDIT_TRIALS * place
    return range(first, first + AUDIT_TRIALS)


def duel_seed(iteration: int) -> int:
    """Return the seed of the duel that begins in a turn."""
    return ASIDE + 900 + 1000 * (iteration // 100) + iteration % 100
