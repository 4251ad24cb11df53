from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the project."""
    return Path(__file__).parent.parent
