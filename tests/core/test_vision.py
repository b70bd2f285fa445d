"""The eye against CLIP as transformers has it (CLIPVisionModel), and the mistakes that ports of it are known for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import EDGE, PATCH
from transformers.activations import ACT2FN

import vision

GRID = EDGE // PATCH


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def tower(pairs):
    return pairs["llama"][0].vision


@pytest.fixture
def clip(pairs):
    return pairs["llama"][2].model.vision_tower


@pytest.fixture
def pixels():
    torch.manual_seed(1)
    return torch.randn(2, 3, EDGE, EDGE, dtype=torch.float64)


def close(a, b, bound=1e-12):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= bound * b.abs().max()


def all_states(tower, pixels):
    return tower(pixels, range(len(tower.blocks) + 1))


def with_patches(pixels, order):
    """The same pictures with their patches in another order."""
    cut = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).flatten(2, 3)[:, :, order]  # (N, 3, P, 7, 7)
    rows = cut.unflatten(2, (GRID, GRID)).transpose(3, 4)  # (N, 3, 4, 7, 4, 7)
    return rows.reshape(pixels.shape)


# ----------------------------------------------------------------------------------------------------------------
# Stage by stage


def test_every_hidden_state_is_the_references(tower, clip, pixels):
    theirs = clip(pixels, output_hidden_states=True).hidden_states
    ours = all_states(tower, pixels)
    assert len(ours) == len(theirs) == len(tower.blocks) + 1
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other)


def test_every_block_alone_is_the_references(tower, clip):
    torch.manual_seed(2)
    x = torch.randn(2, GRID**2 + 1, tower.config.hidden_size, dtype=torch.float64)
    for ours, theirs in zip(tower.blocks, clip.encoder.layers, strict=True):
        close(ours(x), theirs(x, None))
        close(ours.mlp(x), theirs.mlp(x))
        close(ours.attention(x), theirs.self_attn(x)[0])
        close(ours.norm1(x), theirs.layer_norm1(x))
        close(ours.norm2(x), theirs.layer_norm2(x))


def test_patch_embedding_is_one_linear_layer_on_the_patches_row_by_row(tower, pixels):
    weight = tower.patch_embedding.weight.flatten(1)  # (D, 3 * 7 * 7)
    patches = []
    for top in range(0, EDGE, PATCH):
        for left in range(0, EDGE, PATCH):
            patches.append(pixels[:, :, top : top + PATCH, left : left + PATCH].flatten(1) @ weight.T)
    sequence = [tower.class_embedding.expand(len(pixels), -1), *patches]
    close(tower.embed(pixels), tower.pre_norm(torch.stack(sequence, dim=1) + tower.position_embedding))


def test_a_picture_is_the_same_alone_and_among_others(tower, pixels):
    for together, alone in zip(all_states(tower, pixels), all_states(tower, pixels[1:]), strict=True):
        close(together[1:], alone)


def test_norms_take_their_eps_from_the_config():
    tower = vision.VisionTower(
        vision.VisionConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, layer_norm_eps=0.5)
    )
    assert {module.eps for module in tower.modules() if isinstance(module, torch.nn.LayerNorm)} == {0.5}


# ----------------------------------------------------------------------------------------------------------------
# The class token and the positions


def test_the_class_token_comes_first(tower, pixels):
    other = copy.deepcopy(tower)
    other.class_embedding += 1 + torch.arange(len(other.class_embedding))
    changed = (other.embed(pixels) - tower.embed(pixels)).abs().amax(-1)  # (N, S)
    assert (changed[:, 0] > 0.1).all() and (changed[:, 1:] == 0).all()


def test_default_leaves_out_the_class_token_and_nothing_else(pairs, pixels):
    model = pairs["llama"][0]
    full = model.get_image_features(pixels, vision_feature_select_strategy="full")
    default = model.get_image_features(pixels, vision_feature_select_strategy="default")
    assert full.shape[1] == GRID**2 + 1 and default.shape[1] == GRID**2
    close(full[:, 1:], default)


def test_patches_are_told_apart_by_their_positions_alone(tower, pixels):
    """Patches in another order, and the positions in the same order, give the same outputs in that order."""
    torch.manual_seed(3)
    order = torch.randperm(GRID**2)
    moved = with_patches(pixels, order)
    assert torch.equal(with_patches(moved, order.argsort()), pixels)
    other = copy.deepcopy(tower)
    other.position_embedding[1:] = tower.position_embedding[1:][order]
    for there, here in zip(all_states(other, moved), all_states(tower, pixels), strict=True):
        close(there[:, 0], here[:, 0])
        close(there[:, 1:], here[:, 1:][:, order])
    for there, here in zip(all_states(tower, moved)[1:], all_states(tower, pixels)[1:], strict=True):
        assert (there[:, 1:] - here[:, 1:][:, order]).abs().max() > 1e-2


def test_positions_are_row_by_row(tower):
    """What changes in one patch changes the embedding of that patch, counted row by row behind the class token."""
    blank = torch.zeros(1, 3, EDGE, EDGE, dtype=torch.float64)
    for row, column in [(0, 0), (0, 3), (2, 1), (3, 3)]:
        spot = blank.clone()
        spot[..., row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = 1
        changed = (tower.embed(spot) - tower.embed(blank)).abs().amax(-1)[0]
        assert changed.nonzero().flatten().tolist() == [1 + row * GRID + column]


# ----------------------------------------------------------------------------------------------------------------
# Which layer is read


@pytest.mark.parametrize(
    "layers, run",
    [([-2], 3), ([-1], 4), ([-3], 2), ([3], 3), ([4], 4), ([1], 1), ([0], 0), ([-5], 0), ([1, -2], 3), ([4, 0], 4)],
)
def test_exactly_as_many_blocks_run_as_the_layer_needs(tower, pixels, layers, run):
    ran = []
    hooks = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(tower.blocks, start=1)
    ]
    try:
        states = tower(pixels, layers)
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == list(range(1, run + 1)) and len(states) == len(layers)


def test_the_features_of_neighbouring_layers_differ(pairs, pixels):
    model = pairs["llama"][0]
    features = [model.get_image_features(pixels, layer) for layer in (-3, -2, -1)]
    assert torch.equal(features[1], model.get_image_features(pixels))
    for other in (features[0], features[2]):
        assert (features[1] - other).abs().max() > 0.01 * features[1].abs().max()


def test_layers_come_in_the_order_in_which_they_are_asked_for(tower, pixels):
    states = all_states(tower, pixels)
    for asked, state in zip([-1, 0, 2, -1, -3], tower(pixels, [-1, 0, 2, -1, -3]), strict=True):
        assert torch.equal(state, states[asked])


def test_the_last_norm_is_never_applied(pairs, pixels):
    model = copy.deepcopy(pairs["llama"][0])
    before = [*all_states(model.vision, pixels), model.get_image_features(pixels, -1)]
    model.vision.post_norm.weight.fill_(torch.nan)
    model.vision.post_norm.bias.fill_(1e6)
    for a, b in zip(before, [*all_states(model.vision, pixels), model.get_image_features(pixels, -1)], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layer", [5, -6, 100])
def test_a_layer_that_is_not_there_is_named(pairs, pixels, layer):
    model = pairs["llama"][0]
    for call in (lambda: model.get_image_features(pixels, layer), lambda: model.vision(pixels, [-2, layer])):
        with pytest.raises(
            ValueError, match=f"vision_feature_layer {layer} is not one of this tower's 5 hidden states"
        ):
            call()


@pytest.mark.parametrize("shape", [(2, 3, 21, 28), (2, 3, 35, 35), (2, 1, 28, 28), (3, 28, 28), (1, 2, 3, 28, 28)])
def test_pixels_of_another_shape_are_refused(pairs, shape):
    with pytest.raises(ValueError, match=r"pixel_values has the shape .*; the tower takes \(pictures, 3, 28, 28\)"):
        pairs["llama"][0].get_image_features(torch.zeros(shape))


# ----------------------------------------------------------------------------------------------------------------
# Two activations in one model


def test_the_towers_activation_is_clips_and_the_projectors_the_exact_one(pairs):
    grid = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    quick, exact = ACT2FN["quick_gelu"](grid), ACT2FN["gelu"](grid)
    assert (quick - exact).abs().max() > 0.01  # or the test would see nothing
    assert (vision.quick_gelu(grid) - quick).abs().max() <= 1e-12
    assert (F.gelu(grid) - exact).abs().max() <= 1e-6

    mlp = copy.deepcopy(pairs["llama"][0].vision.blocks[0].mlp)
    projector = copy.deepcopy(pairs["llama"][0].projector)
    for first, second, expected in ((mlp.fc1, mlp.fc2, quick), (projector.linear_1, projector.linear_2, exact)):
        for layer in (first, second):  # number 0 goes through both of them unchanged
            layer.weight.zero_()
            layer.bias.zero_()
            layer.weight[0, 0] = 1
        x = torch.zeros(len(grid), first.in_features, dtype=torch.float64)
        x[:, 0] = grid
        out = (mlp if first is mlp.fc1 else projector)(x)[:, 0]
        assert (out - expected).abs().max() <= 1e-6
