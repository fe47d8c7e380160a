"""Loading: dequantized once, checked each time, nothing that runs code."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from overnight.distill.base import BaseModel
from overnight.distill.bundled import bundled_gguf
from overnight.distill.model import dequantized, load_base, pick_device
from overnight.store.errors import CampaignError

CPU = torch.device("cpu")


def test_a_model_is_loaded_in_float32_on_a_cpu(tiny_model, tmp_path):
    loaded = load_base(BaseModel("folder", str(tiny_model)), cache_dir=tmp_path, device=CPU)
    assert loaded.model.dtype == torch.float32


def test_a_model_s_hash_is_of_its_weights(tiny_model, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    hashes = {
        load_base(BaseModel("folder", str(f)), cache_dir=tmp_path, device=CPU).sha256 for f in (tiny_model, other)
    }
    assert len(hashes) == 2


def test_a_file_that_is_not_the_pinned_one_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(CampaignError, match="as pinned"):
        dequantized(file, "0" * 64, tmp_path)


def test_a_file_that_is_no_gguf_leaves_nothing_in_the_cache(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"something else")
    with pytest.raises(CampaignError, match="cannot be read as a GGUF model"):
        dequantized(file, None, tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_model_with_code_of_its_own_is_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "unheard_of",
        "auto_map": {"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.Config"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CampaignError, match="cannot be loaded"):
        load_base(BaseModel("folder", str(folder)), cache_dir=tmp_path, device=CPU)
    assert not (tmp_path / "ran").exists()


def test_a_truncated_model_is_refused_by_name(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CampaignError, match=str(folder)):
        load_base(BaseModel("folder", str(folder)), cache_dir=tmp_path, device=CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_asking_for_a_device_that_is_not_there_says_what_to_set():
    with pytest.raises(CampaignError, match='device = "auto"'):
        pick_device("cuda")


@pytest.fixture(scope="module", name="cache")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
def test_the_second_use_of_a_gguf_file_converts_nothing(cache):
    folder = dequantized(bundled_gguf(), None, cache)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert dequantized(bundled_gguf(), None, cache) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_damaged_copy_is_made_again(cache):
    weights = dequantized(bundled_gguf(), None, cache) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    dequantized(bundled_gguf(), None, cache)
    assert weights.read_bytes() == whole
