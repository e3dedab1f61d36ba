"""Families x methods: the committed table is what the committed file says, and that what the miniatures say today."""

import pytest
from miniatures import FAMILIES

from docs import families, tables
from workbench import storage

TRIED = storage.read_json(families.FILE)["families"]
AGAIN = ["Olmo2", "Qwen3Moe", "Bloom", "GPTJ"]
"""A norm after attention, a mixture of experts, ALiBi, and rotary positions by pairs of neighbours."""


@pytest.mark.parametrize("family", AGAIN)
def test_a_row_made_anew_is_the_committed_one(family: str) -> None:
    assert families.row(family) == TRIED[family]


def test_every_miniature_is_tried_and_none_is_computed_wrongly() -> None:
    assert sorted(TRIED) == sorted(FAMILIES)
    assert len([name for name, found in TRIED.items() if "refused" not in found]) >= 25
    assert not [name for name, found in TRIED.items() if found.get("wrong")]


def test_the_table_has_a_row_for_each() -> None:
    page = (tables.ROOT / "docs/concepts/families.md").read_text()
    assert tables.filled(page) == page, "make tables"
    there = {line.split("|")[1].strip() for line in tables.families().splitlines()[2:]}
    assert there == {name for name, found in TRIED.items() if "refused" not in found}
