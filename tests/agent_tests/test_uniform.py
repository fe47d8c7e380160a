import json
from collections import Counter

from overnight.agent.proposers.protocol import change_key
from overnight.agent.proposers.testing import ProposerConformance, example_ask
from overnight.agent.proposers.uniform import RandomProposer


class TestRandomProposerConforms(ProposerConformance):
    def make(self) -> RandomProposer:
        return RandomProposer("random")


def test_every_legal_change_comes_up_about_equally_often():
    proposer = RandomProposer("random")
    moves = example_ask().moves
    rounds = 100
    seen = Counter(proposer.propose(example_ask(seed=seed)).reply for seed in range(rounds * len(moves)))
    # Pearson's chi-square against uniform; 27 degrees of freedom, 0.9999 quantile 64.
    assert len(seen) == len(moves)
    assert sum((count - rounds) ** 2 / rounds for count in seen.values()) < 64


def test_propensity_of_the_answer_is_one_over_the_legal_changes():
    ask = example_ask(seed=4)
    answer = RandomProposer("random").propose(ask)
    said = json.loads(answer.reply)
    chosen = next(move for move in ask.moves if (move.knob, move.value) == (said["knob"], said["new_value"]))
    assert answer.probabilities[change_key(chosen)] == 1 / len(ask.moves)
