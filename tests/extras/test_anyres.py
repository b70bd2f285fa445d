"""Pictures in tiles: pixels, counts and packed features as transformers has them, and the way back to the photo.

OneVision's processor needs torchvision, but its formulas do not: they are called on a stub that holds what they read.
"""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from pictures import MODES, picture
from PIL import Image
from transformers import LlavaNextProcessor, LlavaOnevisionProcessor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.llava_next import modeling_llava_next
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision import modeling_llava_onevision
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

import vision
from extras import anyres, lens

NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # in tiles: the order decides between equals
OV_GRIDS = tuple((high, wide) for high in range(1, 7) for wide in range(1, 7))


def plan(grids, tile, patch, cap=None):
    return anyres.Plan(tuple((high * tile, wide * tile) for high, wide in grids), tile, patch, cap)


NEXT, ONEVISION = plan(NEXT_GRIDS, 336, 14), plan(OV_GRIDS, 384, 14, cap=9)  # as published
SMALL_NEXT, SMALL_ONEVISION = plan(NEXT_GRIDS, 28, 7), plan(OV_GRIDS, 30, 7, cap=9)  # 2 pixels fill no patch, as 6 do
PLANS = {"next": NEXT, "onevision": ONEVISION, "small next": SMALL_NEXT, "small onevision": SMALL_ONEVISION}
KINDS = pytest.mark.parametrize("kind", PLANS)
SMALL = pytest.mark.parametrize("kind", ["small next", "small onevision"])

WORKED = [  # height, width: grid, resized, tiles, map, positions
    (NEXT, 480, 640, (672, 672), (504, 672), 5, (36, 48), 2340),
    (NEXT, 640, 480, (672, 672), (672, 504), 5, (48, 36), 2352),
    (NEXT, 899, 1024, (672, 672), (590, 672), 5, (42, 48), 2634),
    (NEXT, 336, 336, (336, 672), (336, 336), 3, (24, 24), 1176),
    (NEXT, 100, 100, (336, 672), (336, 336), 3, (24, 24), 1176),
    (NEXT, 337, 336, (672, 336), (337, 336), 3, (24, 24), 1176),
    (NEXT, 672, 672, (672, 672), (672, 672), 5, (48, 48), 2928),
    (NEXT, 1000, 1000, (672, 672), (672, 672), 5, (48, 48), 2928),
    (NEXT, 300, 400, (336, 672), (336, 449), 3, (24, 32), 1368),  # 400 · (336 / 300) = 448.00000000000006
    (NEXT, 333, 500, (336, 672), (336, 505), 3, (24, 36), 1464),
    (NEXT, 427, 640, (672, 672), (449, 672), 5, (32, 48), 2144),
    (NEXT, 400, 1200, (336, 1008), (336, 1008), 4, (24, 72), 2328),
    (NEXT, 1200, 400, (1008, 336), (1008, 336), 4, (72, 24), 2376),
    (NEXT, 1080, 1920, (672, 672), (378, 672), 5, (28, 48), 1948),  # it covers 27 rows: 28 stay
    (NEXT, 3000, 2000, (672, 672), (672, 448), 5, (48, 32), 2160),
    (NEXT, 328, 861, (336, 1008), (336, 882), 4, (24, 64), 2136),  # 62.9999999 columns are 63
    (NEXT, 352, 924, (336, 1008), (336, 882), 4, (24, 64), 2136),
    (NEXT, 376, 987, (336, 1008), (336, 882), 4, (24, 64), 2136),
    (NEXT, 50, 2000, (336, 1008), (26, 1008), 4, (2, 72), 722),
    (NEXT, 1, 1000, (336, 1008), (2, 1008), 4, (0, 72), 576),  # the whole alone
    (NEXT, 1000, 1, (1008, 336), (1008, 2), 4, (72, 0), 648),  # 72 newlines
    (ONEVISION, 100, 100, (384, 384), (384, 384), 2, (27, 27), 1485),
    (ONEVISION, 336, 336, (384, 384), (384, 384), 2, (27, 27), 1485),
    (ONEVISION, 384, 384, (384, 384), (384, 384), 2, (27, 27), 1485),
    (ONEVISION, 333, 500, (384, 768), (384, 577), 3, (27, 40), 1836),
    (ONEVISION, 500, 375, (768, 384), (512, 384), 3, (36, 27), 1737),
    (ONEVISION, 480, 640, (768, 768), (576, 768), 5, (40, 54), 2929),
    (ONEVISION, 640, 480, (768, 768), (768, 576), 5, (54, 40), 2943),
    (ONEVISION, 672, 672, (768, 768), (768, 768), 5, (54, 54), 3699),
    (ONEVISION, 768, 1024, (768, 1152), (768, 1024), 7, (54, 73), 4725),
    (ONEVISION, 400, 1200, (768, 1536), (512, 1536), 9, (36, 108), 4653),
    (ONEVISION, 1200, 400, (1536, 768), (1536, 512), 9, (108, 36), 4725),
    (ONEVISION, 899, 1024, (1152, 1152), (1012, 1152), 10, (71, 81), 6551),
    (ONEVISION, 1000, 1000, (1152, 1152), (1152, 1152), 10, (81, 81), 7371),
    (ONEVISION, 950, 1256, (1152, 1536), (1152, 1524), 13, (70, 93), 7309),  # of 81 x 108
    (ONEVISION, 1080, 1920, (1152, 1920), (1080, 1920), 16, (60, 108), 7269),  # of 75 x 135
    (ONEVISION, 3000, 2000, (2304, 1536), (2304, 1536), 25, (99, 66), 7362),  # of 162 x 108
    (ONEVISION, 2304, 2304, (2304, 2304), (2304, 2304), 37, (81, 81), 7371),  # of 162 x 162
]


def preprocess_config(plan):
    """CLIP's numbers for LLaVA-NeXT, SigLIP's for OneVision."""
    square = {"height": plan.tile, "width": plan.tile}
    if plan.cap is None:
        return vision.PreprocessConfig({"shortest_edge": plan.tile}, square)
    return vision.PreprocessConfig(square, square, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])


def reference_processor(plan, **options):
    config = preprocess_config(plan)
    square, grids = config.crop_size, [list(grid) for grid in plan.grids]
    kind, crop = LlavaNextImageProcessorPil, {"crop_size": square}
    if plan.cap is not None:
        kind, crop = LlavaOnevisionImageProcessorPil, {}
    numbers = {"image_mean": config.image_mean, "image_std": config.image_std, **options}
    return kind(size=config.size, **crop, image_grid_pinpoints=grids, **numbers)


def compare_pixels(images, plan, alone=None, **changes):
    """Pixels and sizes of pictures, held against the reference's; alone: all of them, or none, as lists or nested."""
    config = preprocess_config(plan)
    for name, value in changes.items():
        setattr(config, name, value)
    given = images if alone is None else [images]
    theirs = reference_processor(plan, **changes)(given, return_tensors="pt")
    ours = anyres.prepare(images, config, plan, alone)
    assert ours["pixel_values"].dtype == torch.float32 and ours["image_sizes"].dtype == torch.int64
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert ours["image_sizes"].tolist() == torch.as_tensor(theirs["image_sizes"]).tolist()
    return ours["pixel_values"]


def reference_count(height, width, plan):
    """What the reference's processor puts in the place of <image>, with CLIP's class token or without one."""
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=[list(grid) for grid in plan.grids]),
        patch_size=plan.patch, num_additional_image_tokens=0, num_image_tokens=plan.side**2,
        vision_aspect_ratio=f"anyres_max_{plan.cap}",
    )  # fmt: skip
    kind = LlavaNextProcessor if plan.cap is None else LlavaOnevisionProcessor
    processor._get_unpadded_features = lambda *sizes: kind._get_unpadded_features(processor, *sizes)
    return kind._get_number_of_features(processor, height, width, plan.tile, plan.tile)


def reference_pack(tiles, sizes, plan, newline):
    """pack_image_features on features of several pictures' tiles, a list of (X, P, D) → a list of (M, D)."""
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=plan.tile, patch_size=plan.patch),
        image_grid_pinpoints=[list(grid) for grid in plan.grids],
    )
    model, sizes = SimpleNamespace(config=config), torch.tensor(sizes)
    if plan.cap is None:
        kind = modeling_llava_next.LlavaNextModel
        return kind.pack_image_features(model, tiles, sizes, "default", newline)[0]
    kind = modeling_llava_onevision.LlavaOnevisionModel
    return kind.pack_image_features(model, tiles, sizes, newline, f"anyres_max_{plan.cap}")[0]


def random_tiles(height, width, plan, alone=True, width_of_features=3, seed=0):
    number = anyres.tiles(height, width, plan, alone)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, plan.side**2, width_of_features, dtype=torch.float64, generator=generator)


NEWLINE = torch.tensor([7.0, -8.0, 9.0], dtype=torch.float64)


def compare_pack(height, width, plan, alone=True):
    tiles = random_tiles(height, width, plan, alone)
    ours = anyres.pack(tiles, height, width, plan, NEWLINE)
    (theirs,) = reference_pack([tiles], [(height, width)], plan, NEWLINE)
    assert torch.equal(ours, theirs), (height, width)
    assert len(ours) == anyres.count(height, width, plan, alone) == len(lens.tile_boxes(height, width, plan, alone))


def sizes(number, longest, seed=0):
    """Random sizes, evenly over their logarithms, so that small and thin ones are among them."""
    rng = np.random.default_rng(seed)
    return [tuple(size) for size in np.exp(rng.uniform(0, np.log(longest), (number, 2))).astype(int).tolist()]


# ----------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize(
    "row", WORKED, ids=lambda row: f"{'next' if row[0] is NEXT else 'onevision'} {row[1]}x{row[2]}"
)
def test_worked_sizes(row):
    plan, height, width, grid, resized, tiles, kept, positions = row
    assert anyres.choose(height, width, plan) == grid
    assert anyres.fit(height, width, grid) == resized
    assert anyres.tiles(height, width, plan) == tiles
    assert anyres.map_size(height, width, plan) == kept
    assert anyres.count(height, width, plan) == positions == plan.side**2 + kept[0] * (kept[1] + 1)
    assert reference_count(height, width, plan) == positions


def test_published_counts():
    """Of the reference's own tests, and the two that are just not shrunk: they take more than any that is."""
    assert anyres.count(503, 316, anyres.Plan(((672, 336),), 336, 14)) == 1526
    assert anyres.count(1154, 951, ONEVISION) == 8765 and anyres.count(776, 1154, ONEVISION) == 8686
    assert anyres.counts([[480, 640], [899, 1024]], NEXT) == [2340, 2634]
    assert anyres.counts(torch.tensor([[480, 640], [480, 640]]), ONEVISION, [True, False]) == [2929, 730]
    assert anyres.counts([[480, 640]], NEXT, [False]) == [2340]  # it cuts each of several pictures, too


@KINDS
def test_any_size_counts_as_in_the_reference(kind):
    plan = PLANS[kind]
    for height, width in sizes(500, 4000):
        grid = anyres.choose(height, width, plan)
        assert grid == select_best_resolution((height, width), plan.grids)
        assert anyres.fit(height, width, grid) == get_patch_output_size(
            np.empty((3, height, width)), grid, "channels_first"
        )
        assert anyres.count(height, width, plan) == reference_count(height, width, plan), (height, width)


@pytest.mark.slow
@KINDS
def test_each_size_of_a_wide_range_counts_as_in_the_reference(kind):
    plan = PLANS[kind]
    for height in [*range(1, 700, 6), *range(701, 3000, 100)]:
        for width in [*range(1, 700, 6), *range(702, 3000, 100)]:
            assert anyres.count(height, width, plan) == reference_count(height, width, plan), (height, width)


@examples(100)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6),
    st.sampled_from([(28, 7), (30, 7), (14, 14), (24, 4)]), st.sampled_from([None, 1, 4, 9]),
    st.integers(1, 400), st.integers(1, 400),
)  # fmt: skip
def test_any_grids_and_any_size(grids, pixels, cap, height, width):
    """Repeated grids, a lone one, in any order: features and positions as in the reference, and as many as said."""
    own = plan(grids, *pixels, cap)
    try:
        anyres.count(height, width, own)
    except ValueError:  # too thin to be shrunk
        with pytest.raises(RuntimeError, match="sizes should be greater than 0"):
            reference_pack([random_tiles(height, width, own)], [(height, width)], own, NEWLINE)
    else:
        compare_pack(height, width, own)


def test_sizes_are_divided_in_float64():
    """12 rows for 732 pixels are 3 columns for 183: in float32 a little less, and two columns would be cut off."""
    assert anyres.map_size(732, 183, SMALL_NEXT) == (12, 4)
    assert anyres.count(732, 183, SMALL_NEXT) == reference_count(732, 183, SMALL_NEXT)
    assert anyres.counts(torch.tensor([[732, 183]]), SMALL_NEXT) == [anyres.count(732, 183, SMALL_NEXT)]


def test_the_first_of_equal_grids_is_taken():
    wide, high = (28, 56), (56, 28)
    assert anyres.choose(28, 28, anyres.Plan((wide, high), 28, 7)) == wide
    assert anyres.choose(28, 28, anyres.Plan((high, wide), 28, 7)) == high


# ----------------------------------------------------------------------------------------------------------------
# Pixels, bit for bit


@SMALL
@pytest.mark.parametrize(
    "size",
    [(1, 1), (28, 28), (30, 30), (61, 44), (44, 61), (97, 33), (33, 97), (40, 30), (1, 40), (90, 1), (200, 190)],
    ids=str,
)
def test_any_size_is_cut_as_in_the_reference(size, kind):
    image = picture(*size)
    before = image.tobytes()
    pixels = compare_pixels([image], PLANS[kind])
    assert image.tobytes() == before and pixels.is_contiguous()


@pytest.mark.parametrize("kind", ["next", "onevision"])
@pytest.mark.parametrize("size", [(640, 480), (333, 97), (400, 300)], ids=str)
def test_published_tiles_equal_the_reference(size, kind):
    compare_pixels([picture(*size)], PLANS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["next", "onevision"])
@pytest.mark.parametrize("size", [*sizes(25, 2500), (1, 50_000), (50_000, 1), (50_000, 40)], ids=str)
def test_many_sizes_of_published_tiles_equal_the_reference(size, kind):
    compare_pixels([picture(*size)], PLANS[kind])


@SMALL
@pytest.mark.parametrize("mode", MODES)
def test_any_mode_equals_the_reference(mode, kind):
    assert compare_pixels([picture(61, 44, mode)], PLANS[kind]).std() > 0.1


@SMALL
@pytest.mark.parametrize("resample", Image.Resampling)
def test_another_filter_in_the_config_is_followed(resample, kind):
    compare_pixels([picture(61, 44)], PLANS[kind], resample=int(resample))


@SMALL
def test_other_numbers_in_the_config_are_followed(kind):
    numbers = {"image_mean": [0.1, 0.5, 0.7], "image_std": [0.3, 0.5, 0.9], "rescale_factor": 1 / 127.5}
    compare_pixels([picture(61, 44)], PLANS[kind], **numbers)
    compare_pixels([picture(61, 44), picture(44, 61)], SMALL_ONEVISION, alone=[False] * 2, **numbers)


@SMALL
def test_a_batch_is_padded_with_zeros_to_the_most_tiles(kind):
    images = [picture(28, 28), picture(200, 190, "RGBA"), picture(10, 90)]
    pixels = compare_pixels(images, PLANS[kind])
    number = [anyres.tiles(image.height, image.width, PLANS[kind]) for image in images]
    assert pixels.shape[1] == max(number) > min(number)
    for own, n in zip(pixels, number, strict=True):
        assert own[:n].abs().amax(dim=(1, 2, 3)).min() > 0 and not own[n:].any()


@pytest.mark.parametrize("size", [(44, 61), (61, 44), (30, 30), (1, 9), (200, 7)], ids=str)
def test_several_pictures_of_a_prompt_get_one_tile_each_in_onevision(size):
    for kind in ("small onevision", "onevision"):
        pixels = compare_pixels([picture(*size), picture(50, 40, "LA")], PLANS[kind], alone=[False, False])
        assert pixels.shape[1] == 1
    assert compare_pixels([picture(*size), picture(50, 40)], SMALL_NEXT).shape[1] > 1  # flat and nested are the same
    ours = anyres.prepare([picture(*size)], preprocess_config(SMALL_NEXT), SMALL_NEXT, [False])["pixel_values"]
    assert torch.equal(ours, compare_pixels([picture(*size)], SMALL_NEXT))


def test_a_mixed_batch_of_onevision():
    """A lone picture and two of another prompt, as the reference makes them from lists of lists."""
    images = [picture(61, 44), picture(50, 40), picture(33, 33)]
    theirs = reference_processor(SMALL_ONEVISION)([images[:1], images[1:]], return_tensors="pt")
    ours = anyres.prepare(images, preprocess_config(SMALL_ONEVISION), SMALL_ONEVISION, [True, False, False])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert theirs["batch_num_images"].tolist() == [1, 2]


def test_the_whole_stands_in_front_squashed_and_the_rest_is_the_picture_on_black():
    image = picture(90, 61)
    whole, *tiles = anyres.cut(image, SMALL_NEXT, Image.Resampling.NEAREST)
    assert np.array_equal(whole, image.resize((28, 28), Image.Resampling.NEAREST))
    joined = np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])
    assert np.array_equal(joined[9:47], image.resize((56, 38), Image.Resampling.NEAREST))
    assert not joined[:9].any() and not joined[47:].any()


# ----------------------------------------------------------------------------------------------------------------
# Features


@KINDS
def test_packing_equals_the_reference(kind):
    plan = PLANS[kind]
    scale = plan.tile // 28
    for height, width in [(1, 500), (500, 1), (28 * scale, 28 * scale), *sizes(12, 250 * scale, seed=1)]:
        compare_pack(height, width, plan)
    for _, height, width, *_ in [row for row in WORKED if row[0] is plan][::3]:
        compare_pack(height, width, plan)


@pytest.mark.slow
@KINDS
def test_packing_many_sizes_equals_the_reference(kind):
    for height, width in [*sizes(150, 3000, seed=2), *[row[1:3] for row in WORKED]]:
        compare_pack(height, width, PLANS[kind])


def test_a_single_tile_ends_in_one_newline():
    for height, width in [(30, 30), (44, 61), (400, 1)]:
        compare_pack(height, width, SMALL_ONEVISION, alone=False)


def test_packing_by_hand():
    """Two tiles of 2 x 2 features, side by side; a square picture covers the two columns in the middle."""
    plan = anyres.Plan(((2, 4),), tile=2, patch=1)
    x = torch.arange(12.0).view(3, 4, 1)
    assert anyres.pack(x, 9, 9, plan, torch.tensor([-1.0]))[:, 0].tolist() == [0, 1, 2, 3, 5, 8, -1, 7, 10, -1]
    assert anyres.pack(x, 9, 18, plan, torch.tensor([-1.0]))[4:, 0].tolist() == [4, 5, 8, 9, -1, 6, 7, 10, 11, -1]


@pytest.mark.parametrize("stored, used", [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_the_newline_takes_the_dtype_of_the_features_and_learns(stored, used):
    newline = torch.randn(3, dtype=stored).requires_grad_()
    x = random_tiles(61, 44, SMALL_NEXT).to(used).requires_grad_()
    packed = anyres.pack(x, 61, 44, SMALL_NEXT, newline)
    assert packed.dtype == used
    assert anyres.pack(x[:1], 61, 44, SMALL_NEXT, newline).dtype == used
    packed.float().sum().backward()
    assert newline.grad.tolist() == [anyres.map_size(61, 44, SMALL_NEXT)[0]] * 3
    assert x.grad[0].eq(1).all() and x.grad[1:].sum() / 3 == len(packed) - 16 - newline.grad[0]


TEXT = {
    "model_type": "llama", "vocab_size": 99, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
TOWER = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 7}


@pytest.fixture(scope="module", params=["small next", "small onevision"])
def reference(request):
    """A model of transformers whose parameters are all random, and its plan."""
    plan = PLANS[request.param]
    if plan.cap is None:
        kind, config = modeling_llava_next.LlavaNextForConditionalGeneration, modeling_llava_next.LlavaNextConfig
        tower = {**TOWER, "model_type": "clip_vision_model", "image_size": plan.tile}
    else:
        kind = modeling_llava_onevision.LlavaOnevisionForConditionalGeneration
        config = modeling_llava_onevision.LlavaOnevisionConfig
        tower = {**TOWER, "model_type": "siglip_vision_model", "image_size": plan.tile, "vision_use_head": False}
    grids = [list(grid) for grid in plan.grids]
    config = config(vision_config=tower, text_config=TEXT, image_token_index=5, image_grid_pinpoints=grids)
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation="sdpa", dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.model, plan


def encoder(model):
    """Tower and projector of the reference, as features wants them."""

    def encode(pixels):
        x = model.vision_tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
        return model.multi_modal_projector(x[:, 1:] if model.config.vision_feature_select_strategy == "default" else x)

    return encode


@torch.no_grad()
def test_features_of_a_batch_equal_the_reference(reference):
    """Pictures of different numbers of tiles: the zeros behind them do not go through the tower."""
    model, plan = reference
    images = [picture(28, 28), picture(200, 190), picture(10, 90)]
    inputs = anyres.prepare(images, preprocess_config(plan), plan)
    pixels, sizes = inputs["pixel_values"].double(), inputs["image_sizes"]
    theirs = model.get_image_features(pixels, sizes).pooler_output
    ours = anyres.features(encoder(model), pixels, sizes, plan, model.image_newline)
    assert [len(own) for own in ours] == anyres.counts(sizes, plan)
    for own, their in zip(ours, theirs, strict=True):
        assert torch.equal(own, their)


@torch.no_grad()
def test_features_of_several_pictures_of_a_prompt_equal_the_reference(reference):
    model, plan = reference
    if plan.cap is None:
        return
    config, images = preprocess_config(plan), [picture(61, 44), picture(50, 40), picture(33, 33)]
    for alone, numbers in [([False] * 3, [3]), ([True, False, False], [1, 2]), ([True] * 3, [1, 1, 1])]:
        inputs = anyres.prepare(images, config, plan, alone)
        pixels, sizes = inputs["pixel_values"].double(), inputs["image_sizes"]
        theirs = model.get_image_features(pixels, sizes, batch_num_images=torch.tensor(numbers)).pooler_output
        for told in (alone, None) if len(numbers) != 2 else (alone,):  # without being told: by the number of tiles
            ours = anyres.features(encoder(model), pixels, sizes, plan, model.image_newline, told)
            assert len(ours) == 3 and all(map(torch.equal, ours, theirs))


# ----------------------------------------------------------------------------------------------------------------
# Which pictures are alone


def ids(*rows):
    """Rows of ids in which a number stands for so many image tokens, and a str for words."""
    rows = [[i for part in row for i in ([1] * len(part) if isinstance(part, str) else [5] * part)] for row in rows]
    return torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])


def test_which_pictures_are_alone():
    sizes, single = [(61, 44), (50, 40), (33, 33)], SMALL_ONEVISION.side**2 + 1
    first, second, third = anyres.counts(sizes, SMALL_ONEVISION)
    for rows, expected in [
        ([[1, "w"], ["w", 1, "w", 1]], [True, False, False]),  # one token for each picture
        ([["w", 2], [1]], [False, False, True]),
        ([[1], ["w"], [1], [1]], [True, True, True]),
        ([[first, "w"], ["w", single, "w", single]], [True, False, False]),  # one for each position
        ([[first, "w"], ["w", 2 * single]], [True, False, False]),
        ([[3 * single]], [False, False, False]),
        ([[first, "w", second, "w", third, "w"]], [True, True, True]),  # turn by turn, each alone in its own
        ([[first, "w", 2 * single]], [True, False, False]),
    ]:
        assert anyres.lone(ids(*rows), 5, torch.tensor(sizes), SMALL_ONEVISION) == expected, rows
        assert anyres.lone(ids(*rows), 5, sizes, SMALL_NEXT) == [True] * 3


@pytest.mark.parametrize("row", [[], [4], ["w", 1, "w"], [2000]], ids=str)
def test_ids_that_fit_no_pictures_are_for_the_merge_to_refuse(row):
    assert len(anyres.lone(ids(["w", *row]), 5, [(61, 44), (50, 40)], SMALL_ONEVISION)) == 2


# ----------------------------------------------------------------------------------------------------------------
# The way back to the photo


FINE = plan(OV_GRIDS, 32, 3, cap=9)


@pytest.mark.parametrize(
    "plan, alone", [(SMALL_NEXT, True), (SMALL_ONEVISION, True), (FINE, False)], ids=["next", "onevision", "a square"]
)
@pytest.mark.parametrize("size", [(90, 60), (61, 128), (75, 75), (301, 97), (40, 30), (500, 480)], ids=str)
def test_the_way_back_from_a_position_to_the_photo(size, plan, alone):
    """On a photo whose colours say where they are, the mean colour of a position's pixels is the middle of its box."""
    width, height = size
    down, across = np.mgrid[0:height, 0:width] + 0.5
    photo = np.stack([255 * across / width, 255 * down / height, np.full((height, width), 255)], -1)
    photo = Image.fromarray(photo.round().astype(np.uint8))
    config = preprocess_config(plan)
    config.image_mean, config.image_std, config.resample = [0, 0, 0], [1, 1, 1], int(Image.Resampling.BILINEAR)
    tiles = anyres.preprocess(photo, config, plan, alone)[0].double()
    means = torch.nn.functional.avg_pool2d(tiles, plan.patch).flatten(2).transpose(1, 2)  # the "tower"
    x = anyres.pack(means, height, width, plan, torch.full((3,), torch.nan)).numpy()
    boxes = lens.tile_boxes(height, width, plan, alone)
    assert boxes.dtype == np.float64 and np.array_equal(np.isnan(boxes), np.isnan(x[:, [0, 0, 0, 0]]))
    inside = (boxes >= -1e-9).all(1) & (boxes[:, 2] <= width + 1e-9) & (boxes[:, 3] <= height + 1e-9)
    inside &= x[:, 2] > 0.999  # no black, and no colour of a square, has been mixed in
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    # at the photo's very edge a filter repeats its last pixel; a shrunk map has no pixels between two tiles
    tolerance = np.array(size) * (0.012 if plan.cap is None else 0.02) + 1
    assert (np.abs(x[:, :2] * size - middle)[inside] < tolerance).all()
    assert inside.sum() > (0.6 if alone else 0.15) * (~np.isnan(boxes[:, 0])).sum()


def test_boxes_by_hand():
    """480 x 640, the drawing in the docstring: 84 rows of black, at 504/480 pixels for one of the photo."""
    boxes = lens.tile_boxes(480, 640, NEXT)
    assert boxes.shape == (2340, 4) and np.isnan(boxes[576 + 48 :: 49]).all() and np.isnan(boxes).sum() == 4 * 36
    assert boxes[[0, 575]].round(3).tolist() == [[0, 0, 26.667, 20], [613.333, 460, 640, 480]]
    assert boxes[[576, 576 + 47, 2338]].round(3).tolist() == [
        [0, 0, 13.333, 13.333], [626.667, 0, 640, 13.333], [626.667, 466.667, 640, 480]
    ]  # fmt: skip
    top, bottom = lens.tile_boxes(1080, 1920, NEXT)[[576, -2]]
    assert top[1] == -20 and bottom[3] == 1100  # 28 rows of the 27 that it covers: half a row too many on each side


def stub(plan):
    """As much of a model as says how it cuts pictures."""
    tower = SimpleNamespace(image_size=plan.tile, patch_size=plan.patch)
    ratio = None if plan.cap is None else f"anyres_max_{plan.cap}"
    config = SimpleNamespace(image_grid_pinpoints=[*plan.grids], vision_aspect_ratio=ratio, vision_config=tower,
                             image_token_index=3)  # fmt: skip
    return SimpleNamespace(image_newline=torch.zeros(1), config=config)


def edges(plan, images, sizes=None, prompt=(3,)):
    sizes = torch.tensor([(image.height, image.width) for image in images] if sizes is None else sizes)
    return lens.tile_edges(stub(plan), torch.tensor([prompt]), sizes, images)


@SMALL
@pytest.mark.parametrize("size", [(90, 60), (61, 128), (75, 75), (301, 97), (500, 480)], ids=str)
def test_tiles_meet_where_a_photo_is_cut(kind, size):
    """On a photo whose colours say where they are: what ends one tile and what begins the next lie around the edge."""
    plan, (width, height) = PLANS[kind], size
    down, across = np.mgrid[0:height, 0:width] + 0.5
    photo = np.stack([255 * across / width, 255 * down / height, np.full((height, width), 255)], -1)
    photo = Image.fromarray(photo.round().astype(np.uint8))
    (found,) = edges(plan, [photo])
    _, *tiles = (np.array(tile).astype(float) for tile in anyres.cut(photo, plan, Image.Resampling.BILINEAR))
    high, wide = (edge // plan.tile for edge in anyres.choose(height, width, plan))
    assert found["tiles"] == len(tiles) == high * wide
    wanted = {"down": [], "across": []}  # pairs: the number of an edge, where it is
    for i in range(high):
        for j in range(wide):
            this = tiles[i * wide + j]
            for name, other, last, first, colour, edge in (
                ("across", (i, j + 1), this[:, -1], lambda tile: tile[:, 0], 0, width),
                ("down", (i + 1, j), this[-1], lambda tile: tile[0], 1, height),
            ):
                if other[0] < high and other[1] < wide:
                    pairs = np.stack([last, first(tiles[other[0] * wide + other[1]])])
                    pairs = pairs[:, (pairs[..., 2] == 255).all(0)]  # nothing of the black around
                    if pairs.size:
                        wanted[name].append((i if name == "down" else j, pairs[..., colour].mean() * edge / 255))
    for name, edge in (("across", width), ("down", height)):
        numbers = sorted({number for number, _ in wanted[name]})
        assert len(numbers) == len(found[name])
        for number, place in wanted[name]:
            assert abs(found[name][numbers.index(number)] - place) < 0.015 * edge + 1


def test_edges_of_tiles_by_hand():
    """480 x 640 in 2 x 2 tiles meets in the middle; 400 x 1200 twice; with --pad the margin is taken off."""
    photos = [Image.new("RGB", size) for size in ((640, 480), (1200, 400), (640, 400))]
    found = edges(NEXT, photos, [(480, 640), (400, 1200), (640, 640)], (3, 3, 3))
    assert found == [
        {"tiles": 4, "down": [240.0], "across": [320.0]}, {"tiles": 3, "down": [], "across": [400.0, 800.0]},
        {"tiles": 4, "down": [200.0], "across": [320.0]},
    ]  # fmt: skip
    assert edges(ONEVISION, photos[:2], prompt=(3, 5, 3)) == [None, None]  # several in a prompt are not cut
    assert edges(ONEVISION, photos[:1])[0]["tiles"] == 4
    assert lens.tile_edges(SimpleNamespace(image_newline=None), None, None, photos) == [None] * 3


@SMALL
def test_the_map_covers_the_photo_without_gaps(kind):
    """But for the pixels that fill no patch, and where a shrunk map ends a tile."""
    plan = PLANS[kind]
    for height, width in [(61, 44), (44, 61), (300, 280), (200, 30)]:
        boxes = lens.tile_boxes(height, width, plan)
        rows, columns = anyres.map_size(height, width, plan)
        own = boxes[plan.side**2 :].reshape(rows, columns + 1, 4)[:, :-1]
        scaled = anyres.fit(height, width, anyres.choose(height, width, plan))
        down, across = (
            (plan.tile - plan.side * plan.patch) * edge / other + 1e-9
            for edge, other in zip((height, width), scaled, strict=True)
        )
        between = own[1:, :, 1] - own[:-1, :, 3], own[:, 1:, 0] - own[:, :-1, 2]
        assert between[0].min() > -1e-9 and between[0].max() < down
        assert between[1].min() > -1e-9 and between[1].max() < across
        assert (own[..., 2] > own[..., 0]).all() and (own[..., 3] > own[..., 1]).all()


# ----------------------------------------------------------------------------------------------------------------
# Bad input


def config(**changes):
    values = {"image_grid_pinpoints": [[56, 28], [28, 56]], "vision_aspect_ratio": None, **changes}
    return SimpleNamespace(vision_config=SimpleNamespace(image_size=28, patch_size=7), **values)


def test_the_plan_of_a_config():
    assert anyres.plan(config(image_grid_pinpoints=None)) is None
    assert anyres.plan(config()) == anyres.Plan(((56, 28), (28, 56)), 28, 7)
    assert anyres.plan(config(vision_aspect_ratio="anyres_max_9", image_grid_pinpoints=((28, 28),))).cap == 9


@pytest.mark.parametrize(
    "pinpoints, said",
    [
        ([], "must be a list of 1 to 1000 sizes"),
        ("large", "must be a list of 1 to 1000 sizes"),
        ([[28, 28]] * 5000, "must be a list of 1 to 1000 sizes"),
        ([28, 28], "holds 28, which is not a [height, width]"),
        ([[28, 28], [28]], "holds [28], which is not"),
        ([[28, 28.0]], "holds [28, 28.0], which is not"),
        ([[True, 28]], "holds [True, 28], which is not"),
        ([[28, "28"]], "holds [28, '28'], which is not"),
        ([[28, 42]], "holds [28, 42]: a grid is made of 1 to 100 tiles of 28 pixels"),
        ([[0, 28]], "holds [0, 28]: a grid is made of"),
        ([[-28, -28]], "holds [-28, -28]: a grid is made of"),
        ([[28, 28 * 101]], "holds [28, 2828]: a grid is made of"),
        ([[28 * 10**12, 28 * 10**12]], "a grid is made of 1 to 100"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_grids_that_are_none(pinpoints, said):
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        anyres.plan(config(image_grid_pinpoints=pinpoints))
    assert "image_grid_pinpoints" in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize("ratio", ["anyres", "square", "anyres_max_0", "anyres_max_9x", "anyres_max_99999", 9], ids=str)
def test_an_aspect_ratio_that_is_none(ratio):
    with pytest.raises(ValueError, match=r"vision_aspect_ratio is .* must be 'anyres_max_' and a number"):
        anyres.plan(config(vision_aspect_ratio=ratio))


def test_hundred_tiles_are_not_too_many():
    assert anyres.plan(config(image_grid_pinpoints=[[280, 280]])).grids == ((280, 280),)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_an_empty_picture(size):
    image = Image.new("RGB", size)
    with pytest.raises(ValueError, match=f"{size[1]} x {size[0]} pixels cannot be cut into tiles"):
        anyres.prepare([image], preprocess_config(NEXT), NEXT)
    with pytest.raises(ValueError, match="pixels"):
        anyres.prepare([image], preprocess_config(ONEVISION), ONEVISION, [False])


@pytest.mark.parametrize("size", [(1, 600_000), (600_000, 1)], ids=str)
def test_a_picture_that_would_take_gigabytes(size, monkeypatch):
    """Before anything is scaled, what Pillow would hold is added up; tens of thousands of pixels are no matter."""
    image = Image.new("L", size)
    monkeypatch.setattr(vision, "MAX_PIXELS", 4_000_000)
    for plan, alone in [(NEXT, True), (ONEVISION, True), (ONEVISION, False)]:
        with pytest.raises(ValueError, match=f"a picture of {size[0]} x {size[1]} pixels is too (thin|long)"):
            anyres.prepare([image], preprocess_config(plan), plan, [alone])


def test_tens_of_thousands_of_pixels_are_cut_like_any():
    for size in [(1, 50_000), (50_000, 1)]:
        pixels = compare_pixels([picture(*size)], SMALL_NEXT)
        assert len(lens.tile_boxes(*size[::-1], SMALL_NEXT)) == anyres.count(*size[::-1], SMALL_NEXT)
        assert pixels.shape[1] == 3
    image = picture(1, 50_000)
    with pytest.raises(ValueError, match="too long for a square"):
        anyres.prepare([image], preprocess_config(SMALL_ONEVISION), SMALL_ONEVISION, [False])


def test_a_map_too_thin_to_be_shrunk():
    thin = anyres.Plan(((4, 400),), tile=4, patch=1, cap=1)
    with pytest.raises(ValueError, match="a map of 2 x 400 features is too thin"):
        anyres.count(2, 700, thin)


@pytest.mark.parametrize(
    "shape, sizes",
    [
        ((1, 3, 3, 28, 28), [[56, 56]]),  # a picture of five tiles
        ((2, 5, 3, 28, 28), [[56, 56]]),
        ((1, 5, 3, 28, 28), [[56, 56]] * 2),
        ((5, 3, 28, 28), [[56, 56]]),
        ((1, 1, 3, 28, 28), [[56, 56]]),
        ((3,), [[56, 56]]),
    ],
    ids=str,
)
def test_sizes_that_belong_to_other_pictures(shape, sizes):
    with pytest.raises(ValueError, match=r"image_sizes .* do not belong to pixel_values") as caught:
        anyres.features(None, torch.zeros(shape), torch.tensor(sizes), SMALL_NEXT, NEWLINE)
    assert str(shape) in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_in_another_order_are_seen_by_the_tiles():
    """The second picture would lose two of its tiles, and zeros would go through the tower for the first."""
    images = [picture(28, 28), picture(56, 56)]
    inputs = anyres.prepare(images, preprocess_config(SMALL_NEXT), SMALL_NEXT)
    wrong = inputs["image_sizes"].flip(0)
    with pytest.raises(ValueError, match=r"image_sizes \[28, 28\] give picture 1 3 tiles, and it has more"):
        anyres.features(None, inputs["pixel_values"], wrong, SMALL_NEXT, NEWLINE)


@pytest.mark.parametrize(
    "sizes",
    [[], [[1.0, 2.0]], [[0, 5]], [[5, -1]], [5, 5], [[1, 2, 3]], torch.zeros(9, 3), "abc", [["a", 1]], [[1], []]],
    ids=lambda sizes: " ".join(str(sizes).split())[:20],
)
def test_sizes_that_are_none(sizes):
    for call in (
        lambda: anyres.features(None, torch.zeros(1, 5, 3, 28, 28), sizes, SMALL_NEXT, NEWLINE),
        lambda: anyres.counts(sizes, SMALL_NEXT),
        lambda: anyres.lone(ids(["w"]), 5, sizes, SMALL_ONEVISION),
    ):
        with pytest.raises(ValueError, match="image_sizes has to hold") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_sizes_that_are_missing():
    with pytest.raises(ValueError, match="image_sizes are missing"):
        anyres.features(None, torch.zeros(1, 5, 3, 28, 28), None, SMALL_NEXT, NEWLINE)


def test_features_that_fill_no_square():
    """CLIP with its class token, or SigLIP without its first patch."""
    for number in (15, 17):
        with pytest.raises(ValueError, match=f"a tile has {number} features, not 4 x 4"):
            anyres.pack(torch.zeros(5, number, 3), 56, 56, SMALL_NEXT, NEWLINE)
