"""Whatever a path, a glob or a link comes to outside the campaign's folder is named; what stays inside is not."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.agent.outside import outside_file, outside_glob, outside_tree


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A campaign's folder beside a secret that it has no business with."""
    (tmp_path / "secrets" / "deep").mkdir(parents=True)
    (tmp_path / "secrets" / "key.txt").write_text("secret")
    (tmp_path / "mine" / "data" / "sub").mkdir(parents=True)
    for name in ("brief.md", "data/a.txt", "data/sub/b.txt"):
        (tmp_path / "mine" / name).write_text("mine")
    return tmp_path / "mine"


@pytest.mark.parametrize("name", ["brief.md", "data/a.txt", "./data/../brief.md", "not-there.md"])
def test_a_file_inside_is_nobodys_business(folder: Path, name: str) -> None:
    assert outside_file(folder, name) == []


@pytest.mark.parametrize("name", ["../secrets/key.txt", "{}/secrets/key.txt", "link.txt", "far/key.txt", "~/x"])
def test_a_file_outside_is_named_by_its_real_place(folder: Path, name: str) -> None:
    (folder / "link.txt").symlink_to("../secrets/key.txt")
    (folder / "far").symlink_to(folder.parent / "secrets")
    (found,) = outside_file(folder, name.format(folder.parent))
    assert found == (os.path.expanduser(name) if "~" in name else str(folder.parent / "secrets" / "key.txt"))


@pytest.mark.parametrize("pattern", ["data/*.txt", "**/*.txt", "data/**", "*", "data/./a.txt", "{}/mine/data/*.txt"])
def test_a_glob_that_stays_inside_is_nobodys_business(folder: Path, pattern: str) -> None:
    (folder / "data" / "again.txt").symlink_to("a.txt")
    (folder / "data" / "round").symlink_to("..")
    assert outside_glob(folder, pattern.format(folder.parent)) == []


@pytest.mark.parametrize("pattern", ["../secrets/*.txt", "data/../../secrets/*", "/etc/*", "{}/secrets/**"])
def test_a_glob_that_leaves_the_folder_is_named_without_being_expanded(folder: Path, pattern: str) -> None:
    (found,) = outside_glob(folder, pattern.format(folder.parent))
    assert found == os.path.normpath(folder / pattern.format(folder.parent))


@pytest.mark.parametrize("pattern", ["data/*.txt", "**/*.txt", "data/x.txt", "d*/x*", "data/**"])
def test_a_link_that_a_glob_matches_is_named_by_where_it_goes(folder: Path, pattern: str) -> None:
    (folder / "data" / "x.txt").symlink_to("../../secrets/key.txt")
    assert outside_glob(folder, pattern) == [str(folder.parent / "secrets" / "key.txt")]


@pytest.mark.parametrize("pattern", ["data/far/*.txt", "data/*/key.txt", "**/key.txt", "data/round/data/far/key.txt"])
def test_a_linked_folder_on_the_way_is_named_and_not_entered(folder: Path, pattern: str) -> None:
    (folder / "data" / "far").symlink_to("../../secrets")
    (folder / "data" / "round").symlink_to("..")
    assert outside_glob(folder, pattern) == [str(folder.parent / "secrets")]


def test_a_link_that_the_glob_does_not_reach_is_nobodys_business(folder: Path) -> None:
    (folder / "other").symlink_to("../secrets")
    (folder / "data" / "x.key").symlink_to("../../secrets/key.txt")
    assert outside_glob(folder, "data/*.txt") == []


def test_a_folder_is_named_for_any_link_in_it(folder: Path) -> None:
    (folder / "data" / "sub" / "config.json").symlink_to("../../../secrets/key.txt")
    assert outside_tree(folder, "data") == [str(folder.parent / "secrets" / "key.txt")]
    assert outside_tree(folder, "../secrets") == [str(folder.parent / "secrets")]
    assert outside_tree(folder, "Some/hub-id") == []


NAMES = st.sampled_from(["a", "b", "c.txt"])
PARTS = st.lists(NAMES | st.sampled_from(["*", "**", "?", "*.txt", "[ab]", "."]), min_size=1, max_size=4)
# One link: `glob` follows a loop forty times, and two loops in one folder forty times each other.
LINKS = st.lists(st.tuples(NAMES, NAMES, st.sampled_from(["", "..", "../..", "a", "../b", "../../out"])), max_size=1)


@settings(max_examples=60, deadline=None)
@given(parts=PARTS, links=LINKS)
def test_no_glob_reads_outside_without_something_being_named(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], links: list[tuple[str, str, str]]
) -> None:
    root = tmp_path_factory.mktemp("walk")
    folder, out = root / "in", root / "out"
    for where in (out, folder / "a", folder / "b" / "a"):
        where.mkdir(parents=True, exist_ok=True)
        (where / "c.txt").write_text("text")
    for place, name, target in links:
        link = folder / place / name
        if link.parent.is_dir() and not link.exists() and not link.is_symlink():
            link.symlink_to(target or "c.txt")
    pattern = "/".join(parts)
    read = {os.path.realpath(folder / name) for name in glob.glob(pattern, root_dir=folder, recursive=True)}
    escaped = {path for path in read if not Path(path).is_relative_to(os.path.realpath(folder))}
    named = outside_glob(folder, pattern)
    assert all(any(Path(path).is_relative_to(name) for name in named) for path in escaped)
