import time

import pytest

from manifests.errors import BadInputError
from passes.limits import run_limited
from vlmconvert.conversion.helper import Helper


def compute_for_ever():
    while True:
        pass


def compute_in_a_library():
    return 9 ** (9**9)


def take_memory():
    return len("a" * 10**11)


@pytest.mark.parametrize("function", [compute_for_ever, compute_in_a_library, take_memory])
def test_too_much_is_one_sentence_and_the_helper_goes_on(function, own_helpers):
    with Helper() as helper:
        with pytest.raises(BadInputError, match="too much"):
            helper.run_limited("too much", run_limited, 0.5, function)
        assert helper.run_limited("too much", run_limited, 5, max, 3, 4) == 4


def test_waiting_does_not_count(own_helpers):
    with Helper() as helper:
        helper.run_limited("too much", run_limited, 0.2, time.sleep, 0.5)
        assert helper.run(sum, (1, 2)) == 3
