"""Options of precisions and targets: their kinds, and what is said of a value that is of another."""

from __future__ import annotations

import pytest

from manifests.errors import BadInputError
from vlmconvert.options import Option, parse_size, read_options

FLAG = Option("all_layers", bool, "")
WHOLE = Option("group_size", int, "")
NUMBER = Option("ratio", float, "")
CHOICE = Option("logits", str, "", default="last", choices=("last", "all"))
SIZE = Option("shard_size", "size", "", default=4_000_000_000)


@pytest.mark.parametrize(
    ("option", "value", "read"),
    [
        (FLAG, True, True),
        (WHOLE, -1, -1),
        (NUMBER, 0.5, 0.5),
        (NUMBER, 1, 1.0),
        (CHOICE, "all", "all"),
        (SIZE, 5, 5),
        (SIZE, "1.5GB", 1_500_000_000),
    ],
)
def test_values_that_fit(option, value, read):
    found = option.read(value)
    assert found == read
    assert type(found) is type(read)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (FLAG, 1, "--all-layers 1 cannot be used: give true or false"),
        (FLAG, "true", "--all-layers 'true' cannot be used: give true or false"),
        (WHOLE, "64", "--group-size '64' cannot be used: give a whole number"),
        (WHOLE, 64.0, "--group-size 64.0 cannot be used: give a whole number"),
        (WHOLE, True, "--group-size True cannot be used: give a whole number"),
        (NUMBER, "0.5", "--ratio '0.5' cannot be used: give a number"),
        (NUMBER, True, "--ratio True cannot be used: give a number"),
        (CHOICE, 1, "--logits 1 cannot be used: give a text"),
        (CHOICE, ["all"], "cannot be used: give a text"),
        (CHOICE, "some", "--logits some is unknown: use last, all"),
        (SIZE, True, "--shard-size True is not a size: write it as 4GB or 500MB"),
        (SIZE, 1.5, "--shard-size 1.5 is not a size"),
        (SIZE, [1], "is not a size"),
    ],
)
def test_values_of_another_kind(option, value, message):
    with pytest.raises(BadInputError) as caught:
        option.read(value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("4GB", 4_000_000_000),
        ("500 mb", 500_000_000),
        (" 1.5kB ", 1500),
        ("7B", 7),
        ("4 GiB", 4 << 30),
        ("1.5TB", 1_500_000_000_000),
    ],
)
def test_sizes(text, size):
    assert parse_size("shard_size", text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "4K", "4Ki", "4iB", "1,5GB", "4GB each"])
def test_what_is_no_size(text):
    with pytest.raises(BadInputError, match="--shard-size .* is not a size: write it as 4GB or 500MB"):
        parse_size("shard_size", text)


def test_all_options_get_a_value():
    values = {"ratio": 0.5, "logits": None}
    assert read_options((WHOLE, NUMBER, CHOICE), values, "it") == {"group_size": None, "ratio": 0.5, "logits": "last"}


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(BadInputError, match="^the target has no option bits: its options are group_size, ratio$"):
        read_options((WHOLE, NUMBER), {"bits": 4}, "the target")
    with pytest.raises(BadInputError, match="^the target has no option bits: leave it out$"):
        read_options((), {"bits": 4}, "the target")


def test_an_option_that_is_not_given_may_be_unknown():
    assert read_options((), {"bits": None}, "the target") == {}
