"""Which part of a retrieval cache is the newest tokens: tried, kept to, tried again."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_rt.kv.recent_share import RecentChoice

SHARES = (0.25, 1.0)
DRAFTS = 3  # between two builds


def built(rates, builds, seed=0, gamma=6):
    """The shares of so many builds, where a share's tokens are accepted at its rate."""
    choice, noise, made = RecentChoice(SHARES), random.Random(seed), []
    for number in range(builds):
        made.append(choice.next())
        for _ in range(DRAFTS):
            rate = rates[made[-1]] if number < builds // 2 else rates.get("later", rates)[made[-1]]
            accepted = 0
            while accepted < gamma and noise.random() < rate:
                accepted += 1
            choice.note(made[-1], accepted=accepted, judged=min(accepted + 1, gamma))
    return made


@settings(deadline=None, max_examples=60, derandomize=True)  # chance alone may miss the bound
@given(
    low=st.floats(0.2, 0.7),
    gap=st.floats(0.2, 0.3),
    newest_wins=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_better_share_is_kept_to(low, gap, newest_wins, seed):
    better, worse = (1.0, 0.25) if newest_wins else (0.25, 1.0)
    made = built({better: low + gap, worse: low}, 200, seed)
    assert set(made[:2]) == set(SHARES)  # both are tried at once
    assert made[100:].count(better) >= 80


@pytest.mark.parametrize("first", SHARES)
def test_a_text_that_changes_its_way_is_noticed(first):
    second = 1.25 - first
    rates = {first: 0.8, second: 0.4, "later": {first: 0.3, second: 0.8}}
    made = built(rates, 400)
    assert made[100:200].count(first) >= 80
    assert made[300:].count(second) >= 80


def test_while_nothing_is_judged_nothing_is_tried():
    choice = RecentChoice(SHARES)
    assert [choice.next() for _ in range(5)] == [0.25] * 5
    choice.note(0.25, accepted=3, judged=4)
    assert choice.next() == 1.0
    assert [choice.next() for _ in range(3)] == [1.0] * 3  # it waits for its trial to tell
    choice.note(1.0, accepted=0, judged=1)
    assert choice.next() == 0.25


def test_a_share_is_not_given_up_before_its_drafts_are_judged():
    """Builds may follow each other while nothing is drafted; late notes are of the build before."""
    choice = RecentChoice(SHARES)
    choice.next()
    choice.note(0.25, accepted=9, judged=10)
    assert choice.next() == 1.0
    choice.note(0.25, accepted=1, judged=2)
    assert choice.next() == 1.0
    choice.note(1.0, accepted=1, judged=2)
    assert choice.next() == 0.25
    for _ in range(20):  # no trial is spent on builds that taught nothing
        assert choice.next() == 0.25


def test_a_late_note_of_the_better_share_does_not_end_a_trial():
    choice, tries = RecentChoice(SHARES), 0
    for _ in range(200):
        if choice.next() == 1.0:
            tries += 1
            choice.note(0.25, accepted=5, judged=6)  # of a draft that was made before the build
            assert choice.next() == 1.0
        choice.note(choice.current, accepted=5 if choice.current == 0.25 else 1, judged=6)
    assert tries > 3


def test_one_share_is_no_choice():
    choice = RecentChoice([0.5])
    for _ in range(40):
        assert choice.next() == 0.5
        choice.note(0.5, accepted=0, judged=1)


def test_another_answer_begins_as_the_first_did():
    choice = RecentChoice(SHARES)
    choice.next()
    choice.note(0.25, accepted=0, judged=5)
    assert choice.next() == 1.0
    choice.forget()
    assert choice.current == 0.25
    assert [choice.next() for _ in range(3)] == [0.25] * 3
