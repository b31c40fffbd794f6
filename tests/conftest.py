from __future__ import annotations

import pytest
import torch

SEED = 0


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
