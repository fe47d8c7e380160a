"""Which licence a base model says that it has."""

import pytest

from overnight.distill.base import BaseModel, find_base
from overnight.distill.bundled import bundled_gguf
from overnight.distill.licence import licence_of


def test_the_bundled_model_s_is_known(tmp_path):
    assert licence_of(find_base("smollm2-135m", tmp_path)) == "apache-2.0"


@pytest.mark.slow
def test_a_gguf_file_says_its_own():
    assert licence_of(BaseModel("gguf", str(bundled_gguf()))) == "apache-2.0"


def test_the_3b_of_qwen_is_for_research_only():
    assert "not for commercial use" in licence_of(BaseModel("hub", "Qwen/Qwen2.5-3B-Instruct"))


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("---\nlicense: mit\n---\nText", "mit"),
        ("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n", "own (LICENSE)"),
        ('---\nlicense: "apache-2.0"\n---', "apache-2.0"),
    ],
)
def test_a_folder_says_what_its_model_card_says(tmp_path, card, said):
    (tmp_path / "README.md").write_text(card)
    assert licence_of(BaseModel("folder", str(tmp_path))) == said


@pytest.mark.parametrize("card", [None, "", "license: mit", "---\nlicense: other\n---\n"])
def test_where_nothing_says_it_tells_where_to_look(tmp_path, card):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of(BaseModel("folder", str(tmp_path))) == f"unknown: look at where `{tmp_path}` came from"


def test_a_hub_model_that_is_not_known_is_to_be_looked_up():
    assert licence_of(BaseModel("hub", "some/model")) == "unknown: look at huggingface.co/some/model"
