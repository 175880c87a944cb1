"""docs/MODELS.md says what the tool finds out."""

import sys

import pytest
from tool_runs import TOOLS

sys.path.insert(0, str(TOOLS))
import model_families

TABLE = model_families.PAGE.read_text().partition(model_families.BEGIN)[2]
CONFIGURATIONS = dict(model_families.configurations())


def test_every_family_has_a_row():
    assert TABLE.count("\n| ") == len(CONFIGURATIONS) + 1
    for family in CONFIGURATIONS:
        assert f"\n| {family} | " in TABLE


@pytest.mark.parametrize("family", sorted(CONFIGURATIONS))
def test_a_row_is_what_becomes_of_the_family(family):
    assert f"\n{model_families.row_of(family, CONFIGURATIONS[family])}\n" in TABLE
