"""Trainers are found by name without importing the others; a plugin that cannot be used says why."""

import subprocess
import sys
from pathlib import Path

import pytest

from overnight.store.errors import CampaignError
from overnight.trainer.protocol import TrainerContext
from overnight.trainer.registry import build_trainer, installed_trainers, trainer_class
from overnight.trainer.scripted import ScriptedTrainer


def install(folder: Path, name: str, target: str, source: str = "") -> None:
    """Put a distribution with one entry point, and its module, into `folder`."""
    info = folder / f"{name}_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[overnight.trainers]\n{name} = {target}\n")
    if source:
        (folder / f"{target.partition(':')[0]}.py").write_text(source)


def test_the_built_in_trainers_are_installed() -> None:
    assert {"gpt", "command", "scripted"} <= set(installed_trainers())


def test_a_trainer_is_built_from_its_name_and_settings(tmp_path: Path) -> None:
    context = TrainerContext(campaign_dir=tmp_path, cache_dir=tmp_path, knobs={"lr": "float"}, metric="m")
    assert isinstance(build_trainer("scripted", {"optimum": {"lr": 1.0}}, context), ScriptedTrainer)


def test_only_the_trainer_asked_for_is_imported(tmp_path: Path) -> None:
    code = "import sys; from overnight.trainer.registry import trainer_class; trainer_class('scripted'); "
    code += "sys.exit(any(m in sys.modules for m in ('overnight.trainer.gpt', 'overnight.trainer.command')))"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("target", "source", "words"),
    [
        ("no_such_module:Trainer", "", "does not import: No module named 'no_such_module'"),
        ("lacking_one:Trainer", "x = 1\n", "does not import"),
        ("lacking_two:Trainer", "class Trainer: ...\n", "is not a class with the methods of"),
        ("lacking_three:Trainer", "Trainer = 3\n", "is not a class with the methods of"),
    ],
)
def test_a_plugin_that_cannot_be_used_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, source: str, words: str
) -> None:
    install(tmp_path, "broken", target, source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CampaignError, match=words):
        trainer_class("broken")


def test_a_name_that_two_packages_claim_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "gpt", "mine:Trainer")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CampaignError, match="offered by both"):
        installed_trainers()
