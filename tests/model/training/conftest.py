from pathlib import Path

import pytest

from tests.model.training.texts import write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A directory with the texts that `write_recipe` names."""
    write_corpus(tmp_path)
    return tmp_path
