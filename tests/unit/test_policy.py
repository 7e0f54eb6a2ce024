"""DirectionPolicy.decide, exhaustively, and what cannot be a policy."""

import errno as e
import math
from dataclasses import FrozenInstanceError
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from healfs.core.policy import Action, DirectionPolicy, Policy, PolicyError
from healfs.core.request import Kind

REPORT, IGNORE, ENOSPC, STOP, RETRY = (
    Action.REPORT,
    Action.IGNORE,
    Action.ENOSPC,
    Action.STOP,
    Action.RETRY,
)

# Once no retrying is left: what each action makes of (a FLUSH or not, ENOSPC or not). Written
# out, so that a slip in decide() cannot hide in the same slip here.
PLAIN = {
    # action: (other+EIO, other+ENOSPC, flush+EIO, flush+ENOSPC)
    REPORT: (REPORT, REPORT, REPORT, REPORT),
    IGNORE: (IGNORE, IGNORE, REPORT, REPORT),
    ENOSPC: (REPORT, STOP, REPORT, STOP),
    STOP: (STOP, STOP, STOP, STOP),
}
THENS = tuple(PLAIN)
ERRNOS = (e.EIO, e.ENOSPC, e.ECONNRESET, e.EDQUOT)
AGES = (0.0, 4.999, 5.0, 5.001, 1e9)


def expected(action: Action, kind: Kind, errno: int) -> Action:
    return PLAIN[action][2 * (kind is Kind.FLUSH) + (errno == e.ENOSPC)]


CASES = list(product(Kind, ERRNOS, AGES))


@pytest.mark.parametrize("error", THENS)
@pytest.mark.parametrize("then", THENS)
def test_without_retry_neither_then_nor_age_counts(error: Action, then: Action) -> None:
    policy = DirectionPolicy(error=error, retry_timeout=5, then=then)
    for kind, errno, age in CASES:
        decided = policy.decide(kind, errno, age)
        assert decided is expected(error, kind, errno), (kind, errno, age)


@pytest.mark.parametrize("then", THENS)
def test_retry_until_the_timeout_and_then_then(then: Action) -> None:
    policy = DirectionPolicy(error=RETRY, retry_timeout=5, then=then)
    for kind, errno, age in CASES:
        wanted = RETRY if age < 5 else expected(then, kind, errno)
        assert policy.decide(kind, errno, age) is wanted, (kind, errno, age)


@pytest.mark.parametrize("then", THENS)
def test_retry_without_timeout_is_for_ever(then: Action) -> None:
    policy = DirectionPolicy(error=RETRY, retry_timeout=0, then=then)
    for kind, errno, age in CASES:
        assert policy.decide(kind, errno, age) is RETRY, (kind, errno, age)


@given(since=st.floats(0, 1e9), timeout=st.floats(0.001, 1e8))
def test_it_ends_when_decide_says_so(since: float, timeout: float) -> None:
    """Not a moment before, were it by rounding: who looks then would look again and again."""
    policy = DirectionPolicy(error=RETRY, retry_timeout=timeout)
    end = policy.ends(since)
    assert policy.decide(Kind.WRITE, e.EIO, end - since) is REPORT
    before = math.nextafter(end, 0)
    assert policy.decide(Kind.WRITE, e.EIO, before - since) is RETRY


def test_what_is_not_retried_or_for_ever_does_not_end() -> None:
    for policy in (DirectionPolicy(), DirectionPolicy(error=STOP, retry_timeout=5)):
        assert policy.ends(1.0) == math.inf and not policy.times_out


def test_the_default_waits_for_ever() -> None:
    policy = Policy()
    assert policy.read == policy.write == DirectionPolicy(RETRY, 1.0, 0.0, REPORT)


@pytest.mark.parametrize("kind", Kind)
def test_which_direction(kind: Kind) -> None:
    policy = Policy(read=DirectionPolicy(STOP), write=DirectionPolicy(REPORT))
    assert policy.of(kind) is (policy.read if kind is Kind.READ else policy.write)


@pytest.mark.parametrize(
    ("keys", "option"),
    [
        ({"then": RETRY}, "then"),
        ({"retry_interval": 0}, "retry-interval"),
        ({"retry_interval": 0.0009}, "retry-interval"),
        ({"retry_interval": -1}, "retry-interval"),
        ({"retry_interval": 86400.1}, "retry-interval"),
        ({"retry_interval": float("nan")}, "retry-interval"),
        ({"retry_timeout": -0.001}, "retry-timeout"),
        ({"retry_timeout": float("inf")}, "retry-timeout"),
        ({"retry_timeout": float("nan")}, "retry-timeout"),
    ],
)
def test_what_cannot_be_says_which_option(keys: dict[str, object], option: str) -> None:
    with pytest.raises(PolicyError, match=f"^{option}: ") as caught:
        DirectionPolicy(**keys)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    with pytest.raises(PolicyError, match=f"^{option}: "):
        Policy().change(write=keys)


@pytest.mark.parametrize("keys", [{"retry_interval": 0.001}, {"retry_interval": 86400}])
def test_the_limits_themselves_are_allowed(keys: dict[str, object]) -> None:
    assert Policy().change(read=keys).read.retry_interval == keys["retry_interval"]


@pytest.mark.parametrize("field", ["error", "then"])
def test_enospc_is_for_writes_only(field: str) -> None:
    assert getattr(Policy().change(write={field: ENOSPC}).write, field) is ENOSPC
    with pytest.raises(PolicyError, match="writes only"):
        Policy().change(read={field: ENOSPC})


def test_change_makes_a_copy() -> None:
    old = Policy()
    new = old.change(read={"error": STOP})
    assert new.read.error is STOP and new.write == old.write and old == Policy()
    with pytest.raises(FrozenInstanceError):
        old.read.error = STOP  # type: ignore[misc]


@pytest.mark.parametrize("error", Action)
@pytest.mark.parametrize("then", THENS)
def test_as_dict_and_back(error: Action, then: Action) -> None:
    policy = Policy(write=DirectionPolicy(error, 0.5, 2.5, then))
    data = policy.as_dict()
    assert set(data["write"]) == {"werror", "retry_interval", "retry_timeout", "then"}
    assert set(data["read"]) == {"rerror", "retry_interval", "retry_timeout", "then"}
    assert Policy.from_dict(data) == policy


@pytest.mark.parametrize(
    "broken",
    [
        {"werror": "perhaps"},
        {"retry_interval": "soon"},
        {"retry_interval": None},
        {"then": "retry"},
        {"retry_timeout": -1},
    ],
)
def test_from_dict_refuses_what_is_no_policy(broken: dict[str, object]) -> None:
    data = Policy().as_dict()
    data["write"].update(broken)
    with pytest.raises(PolicyError):
        Policy.from_dict(data)
