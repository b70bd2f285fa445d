"""Examples that hypothesis makes up: the same ones in each run, as a test that fails only sometimes helps nobody."""

import warnings

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from extras import cli

CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def examples(number):
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=CHECKS)


def tried(call, *args):
    """What the call returns; None if it refuses the input, with an error of the right kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call(*args)
        except (ValueError, OSError) as error:
            assert str(error) and "\n" not in cli.one_line(error)


BROKEN = st.characters(
    min_codepoint=0xDC80, max_codepoint=0xDCFF, exclude_categories=()
)  # bytes, as the shell disguises them
LETTERS = st.characters(codec="utf-8") | BROKEN
ARGUMENTS = st.text(LETTERS) | st.text("<>/simagepdun|USER:ASTN \n▁\0", max_size=60)
PLAIN = ARGUMENTS.map(cli.readable)
