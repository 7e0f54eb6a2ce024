"""The last look at a request comes when its retry timeout is over, as the policy counts it."""

from __future__ import annotations

import random

from healfs.core.policy import Action, DirectionPolicy
from healfs.core.request import Kind, Request
from healfs.core.retries import Retries


def test_the_time_is_up_when_its_end_is_due() -> None:
    rng = random.Random(7)
    for _ in range(2000):
        timeout = rng.uniform(0.1, 100)
        policy = DirectionPolicy(error=Action.RETRY, retry_interval=1000, retry_timeout=timeout)
        request = Request(Kind.FLUSH, 0, 0, lambda *_: None)
        request.first_error, request.attempts = rng.uniform(0, 1e6), 40
        when = Retries(random.Random(0), 1000).add(request, policy, request.first_error)
        assert when - request.first_error >= timeout
