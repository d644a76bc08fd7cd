import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small run fifty times slower on threads that wait

import pytest


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Kind -> a run that nobody killed."""
    import tropism
    from again import RECIPES

    folder = tmp_path_factory.mktemp("whole")
    return {kind: tropism.train(make(folder / kind), quiet=True).path for kind, make in RECIPES.items()}
