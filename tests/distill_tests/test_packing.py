"""How rows are cut into packs, whatever their lengths."""

from hypothesis import given
from hypothesis import strategies as st

from overnight.distill.encoding import EncodedRow, shared_prefix
from overnight.distill.packing import build_pack, pack_tokens, split
from overnight.distill.trie import build_tree

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple)


def row(prompt: tuple[int, ...], paths: list[tuple[int, ...]]) -> EncodedRow:
    return EncodedRow(
        id="r",
        prompt=prompt,
        tree=build_tree(paths),
        replies=((0, 1.0),),
        choice=(),
        choice_weight=1.0,
        pairs=(),
        epoch=None,
    )


ROWS = st.lists(st.builds(row, TOKENS, st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=9)


@given(ROWS, st.integers(1, 60))
def test_packs_hold_all_rows_in_order_within_the_limit_or_one_row_alone(rows, most):
    packs = list(split(rows, most))
    assert [one for pack in packs for one in pack] == rows
    assert all(len(pack) == 1 or pack_tokens(pack) <= most for pack in packs)


@given(ROWS)
def test_all_prompts_share_the_prefix_and_keep_a_token_each(rows):
    prompts = [one.prompt for one in rows]
    shared = shared_prefix(prompts)
    assert len({prompt[:shared] for prompt in prompts}) == 1
    assert shared < min(map(len, prompts))
    longer = {prompt[: shared + 1] for prompt in prompts}
    assert len(longer) > 1 or shared + 1 == min(map(len, prompts))


@given(ROWS)
def test_a_pack_has_each_token_once_at_the_position_that_it_has_alone(rows):
    pack = build_pack(rows, masks=None)
    assert pack.tokens == pack_tokens(rows)
    shared = pack.shared
    alone = [(place, token) for place, token in enumerate(rows[0].prompt[:shared])]
    for one in rows:
        alone += list(enumerate(one.prompt))[shared:]
        alone += [(len(one.prompt) + d, t) for d, t in zip(one.tree.depths, one.tree.tokens, strict=True)]
    assert sorted(zip(pack.positions[0].tolist(), pack.ids[0].tolist(), strict=True)) == sorted(alone)


@given(ROWS)
def test_chains_cut_a_tree_into_runs_of_parents_and_children(rows):
    for one in rows:
        runs = one.chains()
        assert [node for start, end in runs for node in range(start, end)] == list(range(len(one.tree.tokens)))
        assert all(one.tree.parents[node] == node - 1 for start, end in runs for node in range(start + 1, end))


def test_the_last_pack_is_not_left_with_one_row():
    rows = [row((0,) * 10 + (n,) * 5, [(1, 2)]) for n in range(10)]
    assert [len(pack) for pack in split(rows, pack_tokens(rows[:9]))] == [5, 5]
