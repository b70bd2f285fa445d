"""extras/lens.py: what it hears is what the model computes,
and what it reads off is right where the answer is known.
"""

import line
import numpy as np
import parity
import pytest
import torch
from PIL import Image
from reference import TINY

import llama
import llava
import vision
from extras import intake, lens

# ----------------------------------------------------------------------------------------------------------------
# The way back to the photo


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("size", [(90, 60), (61, 128), (75, 75), (301, 97)])
def test_the_way_back_from_a_patch_to_the_photo(size, pad):
    """Whiten a box on a black photo, and it is that patch which turns white, whatever crop or margin lies between."""
    config, grid = vision.PreprocessConfig(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}), 7
    boxes = lens.patch_boxes(*size, grid, config, pad)
    assert boxes.shape == (grid**2, 4)
    seen = 0
    for patch in range(grid**2):
        left, top, right, bottom = boxes[patch]
        if min(left, top) < 0 or right > size[0] or bottom > size[1]:  # partly on the margin
            continue
        photo = Image.new("RGB", size)
        photo.paste((255, 255, 255), tuple(round(edge) for edge in (left, top, right, bottom)))
        light = vision.preprocess(photo, config, pad)[0].unfold(0, 8, 8).unfold(1, 8, 8).mean((2, 3)).flatten()
        if pad:  # the margin is of a middling grey
            outside = (boxes[:, 0] < 0) | (boxes[:, 1] < 0) | (boxes[:, 2] > size[0]) | (boxes[:, 3] > size[1])
            light[torch.from_numpy(outside)] = light.min()
        assert light.argmax() == patch
        seen += 1
    assert seen >= (grid if pad else grid**2)


def test_the_kept_part_and_the_margin_of_the_photo():
    config = vision.PreprocessConfig(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    assert lens.patch_boxes(112, 224, 7, config)[[0, -1]].tolist() == [[0, 56, 16, 72], [96, 152, 112, 168]]
    assert lens.patch_boxes(112, 224, 7, config, pad=True)[[0, -1]].tolist() == [
        [-56, 0, -24, 32],
        [136, 192, 168, 224],
    ]


@pytest.fixture(scope="module")
def tiny():
    return llava.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def scene():
    return intake.open_image(TINY / "scene.png")


def asked(processor, scene, question=parity.QUESTION):
    return processor.chat([("user", question)], [scene])


def test_the_stages_are_those_of_parity(model, processor):
    """Same names, same numbers, bit for bit; parity takes them from what the model puts out, lens from hooks."""
    torch.manual_seed(0)
    picture = Image.fromarray(torch.randint(0, 256, (40, 61, 3), dtype=torch.uint8).numpy())
    theirs = parity.ours(model, processor, picture, gradients=False)
    inputs = asked(processor, picture)
    fused, written = lens.trace(model, **inputs, output_attentions=False), lens.trace(model, **inputs)
    last = f"vision.{len(model.vision.blocks)}"  # which LLaVA does not run
    named = [name for name in theirs if name not in (last, "loss", "tokens", "beams")]
    assert len(named) > 10
    for name in named:
        ours = written if name.startswith("attention.") else fused
        assert torch.equal(ours[name], theirs[name]), name
    assert set(fused) | set(written) == set(named) | {name for name in fused if name[-2:] in (".q", ".k", ".v")}
    assert [name for name in fused if name in theirs] == [name for name in named if not name.startswith("attention.")]


def test_hooks_are_gone_afterwards(tiny, scene):
    model, processor = tiny

    def hooks():  # those that keep a small model on one thread stay
        return [[*module._forward_hooks, *module._forward_pre_hooks] for module in model.modules()]

    before = hooks()
    lens.trace(model, **asked(processor, scene))
    with pytest.raises(ValueError, match="image tokens"):
        lens.trace(model, input_ids=torch.tensor([[model.config.image_token_index]]))
    assert hooks() == before


def test_queries_and_keys_give_the_attention(tiny, scene):
    """softmax(q kᵀ / √E) by hand, from what was heard, is what the block used."""

    model, processor = tiny
    stages, config = lens.trace(model, **asked(processor, scene)), model.config.text_config
    q, k = (stages[f"llama.2.{x}"].unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for x in "qk")
    positions = torch.arange(q.shape[2])[None]
    cos, sin = llama.rope_angles(positions, model.llama.frequencies)
    scores = llama.rotate(q, cos, sin) @ llama.rotate(k, cos, sin).transpose(2, 3) / config.head_dim**0.5
    mask = positions[0] <= positions[0][:, None]
    assert torch.allclose(scores.masked_fill(~mask, -torch.inf).softmax(-1), stages["attention.2"], atol=1e-5)


def test_image_positions(tiny, scene):
    model, processor = tiny
    inputs = processor.chat([("user", "Hi")], [scene, scene])
    ids = model.prompt_ids(inputs["input_ids"], inputs["pixel_values"])[0]
    positions = lens.image_positions(model, ids)
    assert positions.shape == (2, 49) and (ids[0, positions] == model.config.image_token_index).all()
    assert positions.flatten().tolist() == sorted(positions.flatten().tolist())
    merged, stages = model.get_image_features(inputs["pixel_values"]), lens.trace(model, **inputs)
    assert torch.equal(stages["merge"][0, positions], merged)


def test_image_positions_leave_out_a_class_token(tiny, monkeypatch):
    model, _ = tiny
    monkeypatch.setattr(model.config, "vision_feature_select_strategy", "full")
    ids = torch.tensor([[1, *[model.config.image_token_index] * 50, 5]])
    assert lens.image_positions(model, ids).tolist() == [list(range(2, 51))]


def test_sinks_are_taken_away():
    """A patch that every word looks at says nothing; one that a single word looks at stays."""
    weights = torch.tensor([[0.5, 0.1, 0.0], [0.5, 0.0, 0.2], [0.5, 0.0, 0.0]])
    left = lens.without_sinks(weights)
    assert left[:, 0].tolist() == [0, 0, 0] and left[0].argmax() == 1 and left[1].argmax() == 2 and not left[2].any()


def test_rollout():
    """Rows stay distributions; without attention elsewhere everything stays where it is; two layers are a product."""
    torch.manual_seed(0)
    a, b = (torch.randn(1, 3, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1) for _ in "ab")
    flow = lens.rollout([a, b])
    assert flow.shape == (1, 5, 5) and torch.allclose(flow.sum(-1), torch.ones(1, 5))
    assert torch.allclose(flow, (b.mean(1) + torch.eye(5)) / 2 @ (a.mean(1) + torch.eye(5)) / 2)
    assert torch.equal(lens.rollout([torch.eye(5)[None, None]] * 3)[0], torch.eye(5))
    assert not torch.allclose(flow, lens.rollout([b, a]))


def test_the_lens_on_the_last_layer_is_the_model(tiny, scene):
    model, processor = tiny
    inputs, before = asked(processor, scene), []
    hook = model.llama.norm.register_forward_hook(lambda module, args, out: before.append(args[0]))
    stages = lens.trace(model, **inputs)
    hook.remove()
    assert torch.equal(lens.logit_lens(model, before[0]), stages["logits"])


def test_patching_the_projector_moves_the_answer_to_another_picture(tiny, scene):
    model, processor = tiny
    other = Image.new("RGB", (224, 224), "white")
    here, there = (model.generate(**asked(processor, picture), max_new_tokens=60) for picture in (scene, other))
    features = model.get_image_features(asked(processor, other)["pixel_values"])
    with lens.patched(model.projector, lambda output: features):
        moved = model.generate(**asked(processor, scene), max_new_tokens=60)
    assert torch.equal(moved, there) and not torch.equal(moved, here)
    assert torch.equal(model.generate(**asked(processor, scene), max_new_tokens=60), here)


@pytest.mark.slow
def test_occlusion_finds_the_thing_asked_about(tiny):
    """One red circle at the top left of a plain picture: covering it costs the answer most,
    covering the rest next to nothing.
    """
    from PIL import ImageDraw

    model, processor = tiny
    picture = Image.new("RGB", (224, 224), (225, 225, 225))
    ImageDraw.Draw(picture).ellipse((14, 14, 62, 62), fill=(217, 40, 44))
    inputs = asked(processor, picture, "What colour is the circle?")
    answer = model.generate(**inputs, max_new_tokens=4)[0].tolist()
    assert processor.decode(answer) == "red"
    falls = lens.occlusion(model, answer, inputs["input_ids"], inputs["pixel_values"])
    assert falls.shape == (49,)
    row, column = divmod(int(falls.argmax()), 7)
    assert row < 2 and column < 2
    same = lens.occlusion(model, answer, inputs["input_ids"], torch.ones_like(inputs["pixel_values"]))
    assert same.abs().max() < 1e-4  # of a picture of one colour no patch can be missed


@pytest.mark.parametrize("name", line.params(("next-mistral",)))
def test_what_is_covered_is_covered_on_the_photo(made, name):
    """In each cell by hand, from transformers' own preprocessing on: in the whole picture and in each tile of it."""
    model, processor, reference = made.pair(name)
    photo, answer, grid, grey = line.photo(40, 61), [50, 51, 2], 3, (90, 120, 7)
    inputs = processor.chat([("user", "What?")], [photo])
    falls = lens.occlusion_on_photo(model, processor, answer, inputs["input_ids"], [photo], grid=grid, fill=grey)
    ids = torch.cat([model.prompt_ids(**inputs)[0], torch.tensor([answer])], dim=1)

    def worth(pixels):
        seen = parity.their_pictures(model.config, processor.preprocess_config, Image.fromarray(pixels))
        seen["pixel_values"] = seen["pixel_values"].double()
        with torch.no_grad():
            logits = reference(input_ids=ids, attention_mask=torch.ones_like(ids), **seen).logits[0, -4:-1]
        return logits.log_softmax(-1)[range(3), answer].sum().item()

    whole, pixels, changed = worth(np.asarray(photo)), np.asarray(photo), 0
    for i, (left, top, right, bottom) in enumerate(lens.photo_boxes(61, 40, grid).round().astype(int)):
        covered = pixels.copy()
        covered[top:bottom, left:right] = grey
        fall = whole - worth(covered)
        assert abs(falls[i].item() - fall) < 1e-4
        changed += abs(fall) > 1e-3
    assert changed > 5 and len(falls) == grid**2


def test_a_cover_reaches_over_its_neighbours_and_one_picture_of_several(made):
    """Of a plain photo nothing can be missed in its own colour. reach: as many cells more on each side."""
    model, processor, _ = made.pair("onevision")
    plain, other = Image.new("RGB", (61, 40), (10, 200, 30)), line.photo(40, 40)
    ids = processor.chat([("user", "What?")], [plain, other])["input_ids"]
    fall = lens.occlusion_on_photo(model, processor, [50, 2], ids, [plain, other], grid=3)
    assert fall.abs().max() == 0
    of_all = lens.occlusion_on_photo(model, processor, [50, 2], ids, [plain, other], 1, grid=2, reach=1, fill=(0, 0, 0))
    assert of_all.abs().min() > 1e-3 and of_all.unique().numel() == 1  # each cover is the whole picture
    single = lens.occlusion_on_photo(model, processor, [50, 2], ids, [plain, other], 1, grid=1, fill=(0, 0, 0))
    assert single.item() == of_all[0].item()


def test_covering_tiles_one_by_one_is_refused(made):
    model, processor, _ = made.pair("onevision")
    inputs = processor.chat([("user", "What?")], [line.photo(40, 40)])
    with pytest.raises(ValueError, match="occlusion_on_photo covers all of them"):
        lens.occlusion(model, [50], inputs["input_ids"], inputs["pixel_values"])


def test_a_trace_of_tiles_holds_every_position(made):
    model, processor, _ = made.pair("onevision")
    inputs = processor.chat([("user", "What?")], [line.photo(40, 61)])
    stages = lens.trace(model, **inputs)
    assert torch.equal(stages["ids"], model.prompt_ids(**inputs)[0])
    assert stages["ids"].shape[1] == stages["merge"].shape[1] == stages["logits"].shape[1] > 100


def test_heat_lies_where_the_patches_are(scene):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots()
    config = vision.PreprocessConfig(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    wide = scene.resize((448, 224))
    lens.heat(axes, wide, torch.arange(49), lens.patch_boxes(448, 224, 7, config), "title")
    heat = axes.images[1]
    assert heat.get_extent() == [112, 336, 224, 0]
    veil = heat.get_array()  # red, green, blue, and how much of it
    assert veil[0, 0, 3] == 0 and tuple(veil[6, 6]) == (1, 0, 1, 0.75) and veil[3, 3, 3] == 0.375
    assert axes.images[0].get_array().shape == (224, 448, 3)  # the picture keeps its colours
    lens.heat(axes, wide, torch.tensor([-1e-3, *[0.0] * 48]), lens.patch_boxes(448, 224, 7, config), limit=0.5)
    faint = axes.images[3].get_array()  # what is far below the limit is not blown up
    assert tuple(faint[0, 0, :3]) == (0, 1, 1) and faint[0, 0, 3] < 0.01
    plt.close("all")
