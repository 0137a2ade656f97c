"""One set of training runs for the whole session."""

from collections.abc import Iterator

import pytest
from support.training_runs import TrainingRuns


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingRuns]:
    """Real Megatron training runs; each different one is done once."""
    runs = TrainingRuns(tmp_path_factory.mktemp("runs"))
    yield runs
    runs.close()
