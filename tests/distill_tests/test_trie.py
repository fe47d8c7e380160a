import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.distill.trie import ROOT, TokenTree, build_tree

CANDIDATES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple), min_size=1, max_size=20)


def spelled(tree: TokenTree, node: int) -> tuple[int, ...]:
    """Return the tokens from the root to `node`."""
    return () if node == ROOT else (*spelled(tree, tree.parents[node]), tree.tokens[node])


@given(CANDIDATES)
def test_the_edges_of_a_path_spell_the_candidate(candidates):
    tree = build_tree(candidates)
    for candidate, path in zip(candidates, tree.paths, strict=True):
        assert tuple(tree.edges[edge][1] for edge in path) == candidate


@given(CANDIDATES)
def test_each_edge_starts_where_the_one_before_it_ends(candidates):
    tree = build_tree(candidates)
    for candidate, path in zip(candidates, tree.paths, strict=True):
        assert [spelled(tree, tree.edges[edge][0]) for edge in path] == [candidate[:n] for n in range(len(candidate))]


@given(CANDIDATES)
def test_only_what_something_follows_is_fed_and_only_once(candidates):
    tree = build_tree(candidates)
    beginnings = {candidate[:end] for candidate in candidates for end in range(1, len(candidate))}
    assert sorted(spelled(tree, node) for node in range(len(tree.tokens))) == sorted(beginnings)


@given(CANDIDATES)
def test_a_node_sees_itself_and_its_ancestors_and_nobody_else(candidates):
    tree = build_tree(candidates)
    seen = tree.visible()
    for node in range(len(tree.tokens)):
        line = {node}
        while tree.parents[min(line, key=lambda n: tree.depths[n])] != ROOT:
            line.add(tree.parents[min(line, key=lambda n: tree.depths[n])])
        assert {other for other in range(len(tree.tokens)) if seen[node, other]} == line


@given(CANDIDATES)
def test_depth_counts_the_tokens_before_a_node(candidates):
    tree = build_tree(candidates)
    assert [len(spelled(tree, node)) - 1 for node in range(len(tree.tokens))] == list(tree.depths)


def test_a_candidate_that_begins_another_has_a_total_of_its_own():
    tree = build_tree([(1, 2), (1, 2, 3)])
    assert tree.totals([-1.0, -2.0, -4.0]) == [-3.0, -7.0]


@pytest.mark.parametrize("candidates", [[], [()], [(1,), ()]])
def test_nothing_to_score_is_refused(candidates):
    with pytest.raises(ValueError, match="at least one"):
        build_tree(candidates)
