"""Drawing ahead and writing behind: in order, bounded, and no error gets lost."""

import threading

import pytest

from evodiff.background import OneBehind, one_ahead

PATIENCE = 30  # seconds until a test that waits in vain gives up


def test_the_next_is_made_while_this_one_is_used():
    made = {i: threading.Event() for i in range(5)}

    def make(i):
        made[i].set()
        return i * i

    out = []
    for i, value in enumerate(one_ahead(make, range(5))):
        if i + 1 in made:
            assert made[i + 1].wait(PATIENCE)
        assert i + 2 not in made or not made[i + 2].is_set(), "one ahead, not two"
        out.append(value)
    assert out == [0, 1, 4, 9, 16]


def test_an_error_in_making_comes_in_its_turn():
    values = one_ahead(lambda i: 1 // i, [1, 0, 1])
    assert next(values) == 1
    with pytest.raises(ZeroDivisionError):
        next(values)


def test_one_that_is_left_early_waits_for_nothing():
    """The garbage collector closes it at any moment, also while another thread is being started."""
    release, ended = threading.Event(), []

    def make(i):
        if i > 0:
            release.wait(PATIENCE)
        ended.append(i)

    values = one_ahead(make, range(3))
    next(values)
    values.close()
    assert ended == [0], "the next is still being made"
    release.set()


def test_nothing_ahead_of_nothing():
    assert list(one_ahead(str, [])) == []


def test_work_goes_on_behind_and_is_done_at_the_end():
    release, done = threading.Event(), []

    def slow(i):
        assert release.wait(PATIENCE)
        done.append(i)

    with OneBehind() as behind:
        behind(slow, 1)
        assert done == [], "the caller goes on"
        release.set()
        behind(slow, 2)
        assert done[0] == 1, "the last is done before the next is taken"
    assert done == [1, 2]


def test_an_error_behind_is_raised_by_the_next_call_and_at_the_end():
    with OneBehind() as behind:
        behind(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            behind(print)
    with pytest.raises(ZeroDivisionError), OneBehind() as behind:
        behind(lambda: 1 // 0)


def test_an_error_in_front_is_not_hidden_by_one_behind():
    with pytest.raises(KeyError), OneBehind() as behind:
        behind(lambda: 1 // 0)
        raise KeyError
