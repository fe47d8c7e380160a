"""An adapter's folder is whole or not there, and is loaded only as it was written, for the base that it belongs to."""

import json
import shutil
from pathlib import Path

import pytest

from overnight.distill.adapter import (
    CARD,
    CONFIG,
    RECORD,
    WEIGHTS,
    AdapterFacts,
    AdapterRecord,
    read_record,
    verify_adapter,
    write_adapter,
)
from overnight.store.errors import CampaignError, ProposerError

BASE = "b" * 64
FACTS = AdapterFacts(campaign="night", version="v1", objective="outcome", corpus_sha256="c" * 64, cut=25)


def record(files: dict[str, str]) -> AdapterRecord:
    return AdapterRecord(
        files=files,
        base_model="Qwen/Qwen2.5-3B-Instruct",
        base_sha256=BASE,
        licence="Qwen Research License",
        facts=FACTS.plain(),
        recipe={"r": 16, "alpha": 32, "dropout": 0.05},
        rows=42,
        too_long=["turn 3"],
        steps=30,
        losses=[2.0, 1.0],
        held_out_before=2.5,
        held_out_after=1.5,
        wall_s=5.6,
        energy_j=None,
        peak_memory_gib=17.7,
        device="cpu",
        versions={"torch": "2.13.0"},
        created_at="2026-11-22T00:00:00+00:00",
    )


def write(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"weights")
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 16, "auto_mapping": None}))


@pytest.fixture(name="adapter")
def _adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters" / "night" / "v1"
    write_adapter(folder, write, record)
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_adapter_as_it_was_written_is_accepted(adapter):
    verify_adapter(adapter, BASE)
    assert set(everything(adapter)) == {WEIGHTS, CONFIG, RECORD, CARD}
    assert read_record(adapter).held_out_after == 1.5


def test_the_card_names_the_licence_of_the_base_model(adapter):
    assert "Its licence binds this adapter too: **Qwen Research License**" in (adapter / CARD).read_text()


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_changed_file_is_refused(adapter, name):
    text = (adapter / name).read_bytes()
    (adapter / name).write_bytes(text.replace(b"w", b"W").replace(b"16", b"61"))
    with pytest.raises(CampaignError, match=f"`{name}` was changed"):
        verify_adapter(adapter, BASE)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file_is_refused_by_name(adapter, name):
    (adapter / name).unlink()
    with pytest.raises(CampaignError, match=f"no `{name}`"):
        verify_adapter(adapter, BASE)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CampaignError, match="no such folder"):
        verify_adapter(tmp_path / "nowhere", BASE)


def test_another_base_model_is_refused_by_its_name(adapter):
    with pytest.raises(CampaignError, match=r"trained on base model `Qwen/Qwen2.5-3B-Instruct`"):
        verify_adapter(adapter, "a" * 64)


@pytest.mark.parametrize("name", ["adapter_model.bin", "training.pt", "optimizer.pkl"])
def test_pickles_beside_the_weights_are_refused(adapter, name):
    (adapter / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CampaignError, match=f"pickled weights .`{name}`"):
        verify_adapter(adapter, BASE)


def test_pickles_instead_of_the_weights_are_refused(adapter):
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(CampaignError, match="pickled weights are refused"):
        verify_adapter(adapter, BASE)


def test_code_in_the_folder_is_refused(adapter):
    (adapter / "modeling.py").write_text("")
    with pytest.raises(CampaignError, match="code of its own"):
        verify_adapter(adapter, BASE)


@pytest.mark.parametrize(
    "config", ['{"peft_type": "LORA", "auto_mapping": {"base_model_class": "x"}}', '{"peft_type": "IA3"}', "[]", "{"]
)
def test_a_foreign_adapter_that_is_no_plain_lora_is_refused(tmp_path, config):
    (tmp_path / WEIGHTS).write_bytes(b"")
    (tmp_path / CONFIG).write_text(config)
    with pytest.raises(CampaignError, match="adapter `"):
        verify_adapter(tmp_path, BASE)


def test_a_foreign_adapter_in_peft_s_format_is_accepted(tmp_path):
    write(tmp_path)
    verify_adapter(tmp_path, BASE)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"files": {}}'])
def test_a_record_that_is_none_is_refused(adapter, text):
    (adapter / RECORD).write_text(text)
    with pytest.raises(CampaignError, match=f"`{RECORD}` is not what distilling writes"):
        read_record(adapter)


def test_a_record_cannot_point_outside_its_folder(adapter):
    found = json.loads((adapter / RECORD).read_text())
    found["files"]["../../../secret"] = "0" * 64
    (adapter / RECORD).write_text(json.dumps(found))
    with pytest.raises(CampaignError, match="secret"):
        verify_adapter(adapter, BASE)


def test_an_adapter_is_never_overwritten(adapter):
    before = everything(adapter)
    with pytest.raises(CampaignError, match="never overwritten"):
        write_adapter(adapter, write, record)
    assert everything(adapter) == before


def test_a_full_disk_is_said_and_leaves_the_old_adapter_and_nothing_else(adapter):
    def fill(folder: Path) -> None:
        write(folder)
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to("/dev/full")  # every write to it fails as on a full disk
        (folder / WEIGHTS).write_bytes(b"weights")

    before = everything(adapter.parent)
    with pytest.raises(ProposerError, match="No space left on device; free space"):
        write_adapter(adapter.with_name("v2"), fill, record)
    assert everything(adapter.parent) == before
    assert list(adapter.parent.iterdir()) == [adapter]


def test_whatever_stops_the_writing_leaves_nothing(adapter):
    def stop(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_adapter(adapter.with_name("v2"), stop, record)
    assert list(adapter.parent.iterdir()) == [adapter]


def test_a_moved_adapter_stays_good(adapter, tmp_path):
    moved = shutil.move(adapter, tmp_path / "elsewhere")
    verify_adapter(Path(moved), BASE)
