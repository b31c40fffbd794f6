from __future__ import annotations

import pytest
import torch

SEED = 0
SHARED_RUNS = ("shards", "uninterrupted")
"""Fixtures that take long and that several files read."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the tests of a file to one process, and to the same one the files that read the same run."""
    group_of = {item.path: str(item.path) for item in items}
    for item in items:
        for shared in SHARED_RUNS:
            if shared in item.fixturenames:  # type: ignore[attr-defined]
                group_of[item.path] = shared
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of[item.path]))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws does not depend on the tests before it. pytest shows the seed where one fails."""
    print(f"torch.manual_seed({SEED})")
    torch.manual_seed(SEED)


@pytest.fixture(scope="session", autouse=True)
def own_cache_of_tokenised_data(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Tests neither read nor fill the user's cache; processes that they start inherit this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNRANK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
