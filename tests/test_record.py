# SPDX-License-Identifier: Apache-2.0
"""Records are what frozen dataclasses with slots are."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields, replace

import pytest

from emupmem.record import open_record, record


@record
class Ours:
    """A value."""

    a: int
    b: str = "b"
    c: list[int] = field(default_factory=list)
    d: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Theirs:
    """The same value."""

    a: int
    b: str = "b"
    c: list[int] = field(default_factory=list)
    d: int = field(default=0, compare=False)


@record
class Bare:
    """No value at all."""


@pytest.mark.parametrize("kind", [Ours, Theirs])
def test_it_is_made_compared_and_changed_as_a_dataclass_is(kind: type[Ours]) -> None:
    one = kind(1, c=[2])
    assert (one.a, one.b, one.c, one.d) == (1, "b", [2], 0)
    assert one == kind(1, "b", [2], 9)
    assert one != kind(2, "b", [2])
    assert one != (1, "b", [2], 0)  # type: ignore[comparison-overlap]
    assert replace(one, a=5) == kind(5, "b", [2])
    assert asdict(one) == {"a": 1, "b": "b", "c": [2], "d": 0}
    assert repr(one) == f"{kind.__name__}(a=1, b='b', c=[2], d=0)"
    assert kind(1).c is not kind(1).c
    assert pickle.loads(pickle.dumps(one)) == one
    assert [f.name for f in fields(kind)] == ["a", "b", "c", "d"]
    assert not hasattr(one, "__dict__")


@pytest.mark.parametrize("kind", [Ours, Theirs])
def test_what_is_wrong_is_an_error_as_there(kind: type[Ours]) -> None:
    for given, named in (((), {}), ((1, "", [], 0, 5), {}), ((1,), {"e": 1}), ((1,), {"a": 1})):
        with pytest.raises(TypeError):
            kind(*given, **named)  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        kind(1).a = 2  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        del kind(1).a
    with pytest.raises(TypeError):
        hash(kind(1))  # a list is in it


def test_an_open_record_can_be_set_and_is_no_key() -> None:
    @open_record
    class Open:
        """A value that changes."""

        a: int = 1
        later: int = field(init=False, compare=False, repr=False)

    one = Open()
    one.a = one.later = 3
    assert one == Open(3)
    assert repr(one).endswith("Open(a=3)")
    with pytest.raises(TypeError):
        hash(one)


def test_records_are_keys() -> None:
    @record
    class Key:
        """A key."""

        a: int
        b: str

    assert len({Key(1, "x"), Key(1, "x"), Key(2, "x")}) == 2
    assert Bare() == Bare()
    assert hash(Bare()) == hash(Bare())
