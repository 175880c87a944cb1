"""States of one sequence: rollback is exact, wherever the anchor is and however a text was cut."""

import random
import weakref

import pytest
import torch

from offload_rt.errors import CapacityError
from offload_rt.kv.states import LayerState, MixerStates

ROWS, WIDTH, CHANNELS = 4, 3, 5
TEXT = torch.randn(64, CHANNELS, generator=torch.Generator().manual_seed(0))


def step(rows, before):
    """A convolution over WIDTH rows, then a decaying sum: both need what is before the piece."""
    assert rows.shape == (ROWS, CHANNELS)
    tail = torch.zeros(WIDTH, CHANNELS) if before is None else before.conv[0][0].T
    total = torch.zeros(CHANNELS) if before is None else before.recurrent[0][0]
    full = torch.cat([tail, rows])
    out = []
    for at in range(ROWS):
        total = 0.9 * total + full[at + 1 : at + 1 + WIDTH].sum(0).tanh()
        out.append(total + rows[at])
    return torch.stack(out), LayerState({0: full[-WIDTH:].T[None]}, {0: total[None]})


def fresh(tokens, layers=(0,)):
    """What one pass over a text comes to, and the states it leaves."""
    made = MixerStates(layers, ROWS)
    made.begin_pass(0, keeps_all=True)
    out = [made.mix(layer, TEXT[list(tokens)], step) for layer in layers][0]
    made.commit(range(len(tokens)))
    return out, made


def check_same(one, other, layer=0):
    """Continued with the same rows, both come to the same, to the last bit."""
    assert one.length == other.length
    more = [5, 9, 2, 40, 41, 42, 7]
    results = []
    for each in (one, other):
        each.begin_pass(0, keeps_all=False)
        results.append(each.mix(layer, TEXT[more], step))
        each.truncate(each.length)
    assert torch.equal(*results)


def drawn_tree(dice, nodes):
    """Parents of a root and random nodes behind it."""
    return [-1, *(dice.randrange(at) for at in range(1, nodes + 1))]


def path_of(parents, row):
    path = []
    while row >= 0:
        path.append(row)
        row = parents[row]
    return path[::-1]


def run_drafts(dice, made, tokens, steps=12):
    """Check random drafts, chains and trees, each row against a fresh pass over its own text."""
    for _ in range(steps):
        nodes = dice.randrange(8)
        tree = dice.random() < 0.5
        parents = drawn_tree(dice, nodes) if tree else list(range(-1, nodes))
        drafted = [dice.randrange(len(TEXT)) for _ in parents]
        made.begin_pass(0, keeps_all=False)
        out = made.mix(0, TEXT[drafted], step, parents if tree else None)
        for row in range(len(parents)):
            text = tokens + [drafted[at] for at in path_of(parents, row)]
            assert torch.equal(out[row], fresh(text)[0][-1])
        keep = path_of(parents, dice.randrange(len(parents)))
        made.commit(keep)
        tokens += [drafted[at] for at in keep]
        check_same(made, fresh(tokens)[1])
    return tokens


@pytest.mark.parametrize("seed", range(6))
def test_after_any_commit_states_are_those_of_a_fresh_prefill(seed):
    dice = random.Random(seed)
    tokens = [dice.randrange(len(TEXT)) for _ in range(dice.randrange(1, 11))]
    run_drafts(dice, fresh(tokens)[1], tokens)


@pytest.mark.parametrize("seed", range(9))
def test_states_go_when_no_row_continues_them_any_more(seed):
    """Of a draft of N rows N // A wait, the one before it, and two while a piece is computed."""
    dice, alive, most = random.Random(seed), [0], [0]

    def gone():
        alive[0] -= 1

    def counting(rows, before):
        made, state = step(rows, before)
        weakref.finalize(state.recurrent[0], gone)
        alive[0] += 1
        most.append(alive[0])
        return made, state

    made, nodes = fresh(range(dice.randrange(1, 9)))[1], 8 * ROWS
    parents = drawn_tree(dice, nodes)
    if seed < 3:  # all beside each other; a chain; one that branches wherever a piece ends
        parents = [-1, *([0] * nodes)] if seed == 0 else [*range(-1, nodes)]
    if seed == 2:
        tips, parents = list(range(nodes - nodes // ROWS)), [*range(-1, nodes - nodes // ROWS - 1)]
        parents += [tip for tip in tips if tip % ROWS == 0]
    made.begin_pass(0, keeps_all=False)
    made.mix(0, TEXT[[dice.randrange(64) for _ in parents]], counting, parents)
    assert max(most) <= 3 + len(parents) // ROWS
    assert alive[0] <= 1  # but for an anchor that was moved


@pytest.mark.parametrize("seed", range(4))
def test_a_text_may_be_cut_anywhere(seed):
    dice, tokens = random.Random(seed), list(range(40))
    whole, expected = fresh(tokens)
    made, rows, at = MixerStates([0], ROWS), [], 0
    while at < len(tokens):
        count = min(dice.randrange(1, 12), len(tokens) - at)
        made.begin_pass(0, keeps_all=dice.random() < 0.5)
        for part in (tokens[at : at + count // 2], tokens[at + count // 2 : at + count]):
            rows.append(made.mix(0, TEXT[part], step) if part else TEXT[:0])
        made.commit(range(count))
        at += count
    assert torch.equal(torch.cat(rows), whole)
    check_same(made, expected)


@pytest.mark.parametrize("length", range(31))
def test_truncate_goes_back_as_far_as_it_must(length):
    tokens = list(range(10))
    made = fresh(tokens)[1]
    while made.length < 30:
        run_drafts(random.Random(made.length), made, tokens, steps=1)
    anchor = made.state(0)[0]
    assert 10 < anchor < made.length
    # To any place from the anchor on, else to the prompt's end or behind its own anchor, else to 0.
    expected = length if length >= anchor else 10 if length >= 10 else length if length >= 8 else 0
    assert made.reach(length) == made.truncate(length) == made.length == expected
    if expected:
        check_same(made, fresh(tokens[:expected])[1])


def test_truncating_again_finds_the_same_prompt():
    made = fresh(range(10))[1]
    for _ in range(3):
        run_drafts(random.Random(1), made, list(range(10)), steps=6)
        assert made.truncate(10) == 10
        check_same(made, fresh(range(10))[1])
    assert made.truncate(9) == 9
    assert made.truncate(9) == 9
    assert made.truncate(7) == 0


def test_a_prompt_that_is_broken_off_leaves_a_place_it_can_go_back_to():
    made = fresh(range(10), layers=(0, 1))[1]
    made.begin_pass(0, keeps_all=True)
    made.mix(0, TEXT[20:33], step)  # and layer 1 never gets there
    assert made.truncate(made.length) == 10
    for layer in (0, 1):
        check_same(made, fresh(range(10), layers=(0, 1))[1], layer)


@pytest.mark.parametrize("near", [(0, 2), ()])
@pytest.mark.parametrize("seed", range(3))
def test_states_on_another_machine_follow_wherever_a_pass_was_given_up(near, seed):
    dice, far = random.Random(seed), (1, 3)
    lead, guest = MixerStates(near, ROWS, elsewhere=True), MixerStates(far, ROWS)
    tokens, layers, back = [], sorted((*near, *far)), 0
    for _ in range(60):
        keeps_all, count = dice.random() < 0.4, dice.randrange(1, 14)
        drafted = [dice.randrange(len(TEXT)) for _ in range(count)]
        for each in (lead, guest):
            each.begin_pass(count, keeps_all=keeps_all)
        reached = dice.choice([len(layers)] * 2 + [*range(len(layers))])
        for layer in layers[:reached]:
            (guest if layer in far else lead).mix(layer, TEXT[drafted], step)
        if reached == len(layers):
            kept = count if keeps_all else dice.randrange(1, count + 1)
            keep = sorted(dice.sample(range(count), kept))
            lead.commit(keep)
            guest.commit(keep)
            tokens += [drafted[row] for row in keep]
        if reached < len(layers) or dice.random() < 0.3:
            length = lead.truncate(dice.randrange(lead.length + 1))
            assert guest.truncate(length) == length == lead.length
            back += 0 < length < len(tokens)
            del tokens[length:]
        assert lead.length == guest.length == len(tokens)
        if tokens:
            check_same(guest, fresh(tokens, far)[1], 3)
    assert back


def test_rows_that_do_not_pend_cannot_be_kept():
    made = fresh(range(5))[1]
    made.begin_pass(0, keeps_all=False)
    made.mix(0, TEXT[:2], step)
    with pytest.raises(CapacityError, match="2 rows are pending"):
        made.commit([0, 2])
    with pytest.raises(CapacityError, match="cannot go back to 6 tokens: 5 are cached"):
        made.truncate(6)
    made.begin_pass(0, keeps_all=True)
    with pytest.raises(CapacityError, match="1 of 2 rows of a prompt"):
        made.commit([0])


def test_an_anchor_that_rejected_rows_move_is_found(monkeypatch):
    monkeypatch.setattr(MixerStates, "_standing", lambda self, kept, rows: rows)
    with pytest.raises(AssertionError):
        for seed in range(6):
            run_drafts(random.Random(seed), fresh(range(9))[1], list(range(9)))
