"""Flower's optimisers on the decoded mean, across a restart of the coordinator."""

import numpy as np
import pytest

from foedus_common.plan import Aggregation
from foedus_server.aggregation import ServerOptimizer

CURRENT = np.array([1.0, -2.0, 0.5])
UPDATES = [np.array([0.5, 0.25, -1.0]), np.array([-0.125, 1.0, 2.0]), np.array([0.0, 0.5, 0.5])]


def test_fedavg_adds_the_mean():
    optimizer = ServerOptimizer(Aggregation("fedavg"))
    assert optimizer.step(1, CURRENT, UPDATES[0]).tolist() == (CURRENT + UPDATES[0]).tolist()


def test_fedavgm_is_heavy_ball_momentum():
    optimizer = ServerOptimizer(Aggregation("fedavgm", momentum=0.5))
    vector, velocity = CURRENT, np.zeros(3)
    for number, update in enumerate(UPDATES, start=1):
        velocity = 0.5 * velocity + update
        expected = vector + velocity
        vector = optimizer.step(number, vector, update)
        np.testing.assert_allclose(vector, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedyogi"])
def test_a_restart_between_rounds_changes_no_bit(name):
    settings = Aggregation(name, momentum=0.5)
    whole, vector, restarted = ServerOptimizer(settings), CURRENT, CURRENT
    state = None
    for number, update in enumerate(UPDATES, start=1):
        vector = whole.step(number, vector, update)
        optimizer = ServerOptimizer(settings, state)
        restarted = optimizer.step(number, restarted, update)
        state = optimizer.state()
    assert restarted.tobytes() == vector.tobytes()
