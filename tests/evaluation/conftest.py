"""A coreset of two images per class, and the networks that the chains sample."""

import pytest

from fbpc_ray.distillation.state import initial_state
from fbpc_ray.execution import session
from fbpc_ray.models.functional import Network


@pytest.fixture(scope="module")
def two_per_class(digits):
    state, labels = initial_state(digits, 2, 0)
    return state.images, labels


@pytest.fixture(scope="module", params=[0, 1], ids=["convnet-in", "convnet-bn"])
def network(request, small, digits):
    return Network(session.network_specs(small, digits)[request.param])
