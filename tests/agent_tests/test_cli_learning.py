"""Learning from the command line: an imported history is distilled by hand, reported on, exported as conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from click.testing import CliRunner, Result

from overnight.agent.cli import overnight
from overnight.store.errors import CampaignError, InputError
from overnight.store.hashing import text_digest
from overnight.store.sql_store import SqlStore

from ..store_tests.trajectories import as_bytes, attempt, header

KNOBS: dict[str, Any] = {
    "lr": {"type": "float", "range": [1e-4, 1e-3], "scale": "log", "default": 3e-4},
    "n_head": {"type": "int", "choices": [8, 16, 32], "default": 16},
    "d_model": {"type": "int", "choices": [768, 1024, 1536], "default": 1024},
    "precision": {"type": "str", "choices": ["bf16", "fp8"], "default": "fp8"},
}
HISTORY = [
    header(),
    attempt(1, "lr", 0.0002, 10.8),
    attempt(2, "n_head", 8, 10.95),
    attempt(3, "d_model", 768, 10.7),
    attempt(4, "d_model", 1536, 11.2),
    attempt(5, "precision", "bf16", 10.91),
    attempt(6, "n_head", 32, 10.85),
    attempt(7, "lr", 0.0004, 10.88),
    attempt(8, "d_model", 1536, 11.1),
]


def tables(model: Path, **sections: Any) -> dict[str, Any]:
    return {
        "campaign": {"name": "old", "trainer": "scripted", "baseline": "fixed"},
        "metric": {"name": "val_bpb"},
        "budget": {"iterations": 8},
        "decision": {"rule": "single_shot", "calibration_trials": 1},
        "knobs": KNOBS,
        "proposers": {
            "random": {"kind": "random"},
            "student": {"kind": "student", "base_model": str(model), "device": "cpu"},
        },
        "rails": {"skip": ["R6_novelty"]},
        "router": {"champion": "random", "challenger": "student"},
        "distill": {
            "min_rows": 8, "holdout": 2, "objective": "clone", "epochs": 2, "augment": [], "min_pairs": 2, "r": 2
        },
        **sections,
    }  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(place: Path, model: Path, **sections: Any) -> None:
    """Write a campaign file and a trajectory, and import the one under the other's name."""
    (place / "old").mkdir()
    (place / "old" / "campaign.toml").write_text(tomlkit.dumps(tables(model, **sections)))
    (place / "history.jsonl").write_bytes(b"".join(as_bytes(HISTORY)))
    ask("import", "history.jsonl", "--campaign", "old")


def ask(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(overnight, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_an_import_takes_the_name_of_its_campaign_file(place: Path, tiny_model: Path) -> None:
    imported(place, tiny_model)
    store = SqlStore.open("overnight.db")
    assert store.campaigns() == ["old"]
    store.close()


def test_an_imported_history_is_distilled_by_hand_into_versions(place: Path, tiny_model: Path) -> None:
    imported(place, tiny_model)
    first = json.loads(ask("distill", "old", "--allow", "--format", "json").stdout)[0]
    assert (first["contestant"], first["trained"], first["held_out"], first["rows"]) == ("student@v1", 6, 2, 8)
    assert (first["reconstructed"], first["steps"], len(first["losses"])) == (8, 2, 2)
    assert (place / "adapters" / "old" / "v1" / "overnight.json").is_file()
    again = ask("distill", "old", "--allow")
    assert again.stdout.splitlines()[0].split() == ["contestant", "student@v2"]
    assert "distilling: step 2/2 epoch 2/2" in again.stderr
    status = json.loads(ask("status", "old", "--format", "json").stdout)[0]
    assert status["learning"] == "student@v2 after turn 8"


def test_the_corpus_report_trains_nothing_and_json_stands_alone(place: Path, tiny_model: Path) -> None:
    imported(place, tiny_model)
    (report,) = json.loads(ask("distill", "old", "--report", "--allow", "--format", "json").stdout)
    assert (report["pairs"], report["knobs"], report["top_pair"], report["cut_turn"]) == (6, 4, "lr = 0.0002", 6)
    assert not (place / "adapters").exists()


def test_a_history_that_cannot_teach_is_a_clear_no(place: Path, tiny_model: Path) -> None:
    imported(place, tiny_model, distill={"min_rows": 100})
    refused = ask("distill", "old", "--allow", code=1)
    assert refused.stdout == ""
    assert "8 rows teach, 100 are needed" in refused.stderr.splitlines()[-1]
    store = SqlStore.open("overnight.db")
    state = store.campaign("old")
    assert state is not None
    assert store.distillations(state.id) == []
    store.close()


def test_a_campaign_without_a_student_is_told_what_to_add(place: Path, tiny_model: Path) -> None:
    imported(place, tiny_model, proposers={"random": {"kind": "random"}}, router={})
    with pytest.raises(CampaignError, match=r"no proposer of kind `student`; set `router.challenger`"):
        ask("distill", "old", "--allow")


def test_an_unknown_campaign_is_told_what_there_is(place: Path, tiny_model: Path) -> None:
    imported(place, tiny_model)
    with pytest.raises(InputError, match=r"no campaign `new` in this database; it has `old`"):
        ask("distill", "new", "--allow")


def test_conversations_are_what_the_tools_of_others_read(place: Path, tiny_model: Path) -> None:
    datasets = pytest.importorskip("datasets")
    imported(place, tiny_model)
    ask("distill", "old", "--report", "--allow")  # renders the prompts of the imported attempts
    ask("export", "old", "--format", "chat", "-o", "chat.jsonl")
    table = datasets.load_dataset("json", data_files="chat.jsonl", split="train", cache_dir=str(place / "cache"))
    assert table.column_names == ["messages", "metadata"]
    assert [row["metadata"]["split"] for row in table] == ["train"] * 6 + ["held_out"] * 2
    for row in table:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert text_digest(row["messages"][0]["content"]) == row["metadata"]["prompt_sha256"]
    said = [json.loads(row["messages"][1]["content"]) for row in table]
    assert said[0] == {"knob": "lr", "new_value": 0.0002, "reason": "may help"}
    assert table[2]["metadata"]["outcome"] == "kept"


def test_without_stored_prompts_there_is_nothing_to_export(place: Path, tiny_model: Path) -> None:
    imported(place, tiny_model)
    with pytest.raises(InputError, match="have no prompts yet; `overnight distill old --report` renders them"):
        ask("export", "old", "--format", "chat")
