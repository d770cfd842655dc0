"""Numbers in sentences."""

import pytest

from finetune.errors import counted, duration


def test_one_of_a_thing_has_no_s() -> None:
    assert [counted(number, "commit") for number in (0, 1, 2, 12_000)] == [
        "0 commits",
        "1 commit",
        "2 commits",
        "12,000 commits",
    ]
    assert counted(2, "directory", "directories") == "2 directories"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "0 seconds"),
        (1, "1 second"),
        (119, "119 seconds"),
        (120, "2 minutes"),
        (7_200, "2 hours"),
        (864_000, "10 days"),
    ],
)
def test_a_duration_is_told_in_a_unit_that_fits(seconds, said) -> None:
    assert duration(seconds) == said
