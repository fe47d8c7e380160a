"""What every trainer test does first."""

import pytest

from .processes import remember


@pytest.fixture(autouse=True)
def _before_the_test() -> None:
    remember()
