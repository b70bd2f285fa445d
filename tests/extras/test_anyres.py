"""Pictures in tiles: pixels, counts and packed features as transformers has them, and back to the photo."""

import pytest

from extras import anyres

NEXT = anyres.Plan(((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), tile=336, patch=14)


@pytest.mark.parametrize("height, width, positions", [(480, 640, 2340), (1080, 1920, 1948), (1000, 1, 648)])
def test_worked_sizes(height, width, positions):
    assert anyres.count(height, width, NEXT) == positions
