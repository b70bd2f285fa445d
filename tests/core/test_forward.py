"""Every argument and every output of forward against transformers' LlavaForConditionalGeneration."""

import copy

import pytest
import torch
from inputs import ROW, ROWS, close, padded, pictures, theirs_of
from reference import FAMILIES, FEATURES, IMAGE, PAD, expanded, load_reference, make_checkpoint, reference_config
from transformers import MistralConfig, MistralForCausalLM

import llama
import llava

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def eager(checkpoints):
    """family → the reference that gives attention weights. For rows without padding only."""
    return {family: load_reference(checkpoints[family], attention="eager") for family in FAMILIES}


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    """A pair of another config: (our model, the reference). Made once for each config."""
    made = {}

    def get(family, **changes):
        key = (family, repr(changes))
        if key not in made:
            folder = make_checkpoint(tmp_path_factory.mktemp("variant"), family, **changes)
            made[key] = llava.load(str(folder), device="cpu", dtype=torch.float64)[0], load_reference(folder)
        return made[key]

    return get


# ----------------------------------------------------------------------------------------------------------------
# Loss


def labelled(seed=0):
    """A batch with labels, some of them ignored, and the reference's own form of both."""
    ids, mask = padded(ROWS, "left")
    labels = ids.clone()
    labels[mask == 0] = -100
    labels[:, -1] = torch.tensor([33, 34, 35])  # not what the next id is
    for row, real in zip(labels, mask, strict=True):
        row[int(real.argmax())] = -100  # predicted from padding
    labels[1, -3] = -100
    grown, real, positions = expanded(ids, mask)
    theirs = torch.full_like(grown, -100)
    for i, row in enumerate(ROWS):
        values = [
            value
            for token, value in zip(row, labels[i, -len(row) :].tolist(), strict=True)
            for value in ([-100] * FEATURES if token == IMAGE else [value])
        ]
        theirs[i, -len(values) :] = torch.tensor(values)
    inputs = {
        "input_ids": grown,
        "attention_mask": real,
        "position_ids": positions,
        "pixel_values": pictures(3).double(),
    }
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures(3)}, labels, inputs, theirs


def test_loss_equals_the_reference(model, reference):
    inputs, labels, their_inputs, their_labels = labelled()
    loss = model(**inputs, labels=labels).loss
    assert loss.dtype == torch.float32 and loss.shape == ()
    close(loss, reference(**their_inputs, labels=their_labels).loss, 1e-6)


def test_loss_is_the_mean_over_the_next_labels(model):
    ids = torch.tensor([[1, 40, 41, 42], [1, 43, 44, 45]])
    labels = torch.tensor([[7, -100, 8, 9], [-100, -100, -100, 10]])
    out = model(ids, labels=labels)
    chances = out.logits.float().log_softmax(-1)
    expected = -(chances[0, 1, 8] + chances[0, 2, 9] + chances[1, 2, 10]) / 3
    torch.testing.assert_close(out.loss, expected)
    assert model(ids).loss is None


def test_positions_of_pictures_never_count(model, reference):
    """labels = ids, as people write it: an image token is no word to be learnt.
    transformers 5 leaves that to the caller.
    """
    row = torch.tensor([ROW])
    grown = expanded(row)[0]
    inputs = {"input_ids": grown, "pixel_values": pictures(2).double()}
    expected = reference(**inputs, labels=grown.masked_fill(grown == IMAGE, -100)).loss
    close(model(row, pictures(2), labels=row).loss, expected, 1e-6)
    close(model(grown, pictures(2), labels=grown).loss, expected, 1e-6)
    close(model(row, pictures(2), labels=row.masked_fill(row == IMAGE, -100)).loss, expected, 1e-6)
    assert abs(reference(**inputs, labels=grown).loss - expected) > 1e-2


def test_labels_grow_with_padding_on_the_right(model, reference):
    ids, mask = padded(ROWS, "right")
    labels = ids.masked_fill(mask == 0, -100)
    inputs, _, their_inputs, _ = labelled()
    grown, real = their_inputs["input_ids"], their_inputs["attention_mask"]
    their_labels = grown.masked_fill((grown == IMAGE) | (real == 0), -100)
    for row, there in zip(their_labels, real, strict=True):
        row[int(there.argmax())] = -100  # on the right nothing predicts the first token
    close(
        model(ids, inputs["pixel_values"], mask, labels=labels).loss,
        reference(**their_inputs, labels=their_labels).loss,
        1e-6,
    )


def test_without_a_label_the_loss_is_not_a_number(model):
    assert model(torch.tensor([[1, 40]]), labels=torch.full((1, 2), -100)).loss.isnan()


def test_loss_of_embeddings(model, reference):
    _, _, their_inputs, their_labels = labelled()
    repeated = {name: their_inputs[name] for name in ("input_ids", "pixel_values", "attention_mask")}
    x = model(**repeated, output_hidden_states=True).hidden_states[0]
    out = model(inputs_embeds=x, attention_mask=their_inputs["attention_mask"], labels=their_labels)
    close(out.loss, reference(**their_inputs, labels=their_labels).loss, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_is_in_float32_whatever_the_model_is(dtype):
    logits = torch.randn(2, 5, 30, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 30, (2, 5))
    loss = llava.next_token_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, llava.next_token_loss(logits.float(), labels))


# ----------------------------------------------------------------------------------------------------------------
# Outputs


@pytest.mark.parametrize("keep", [1, 3, 37, 100])
def test_logits_to_keep_keeps_the_last(model, reference, keep):
    ids, pixels = torch.tensor([ROW]), pictures(2)
    full, some = model(ids, pixels, logits_to_keep=0).logits, model(ids, pixels, logits_to_keep=keep).logits
    assert full.shape[1] == 37 and some.shape[1] == min(keep, 37)
    close(some, full[:, -keep:], 1e-12)
    close(some, reference(**theirs_of(ids, pixels), logits_to_keep=keep).logits)


def test_the_head_runs_only_where_logits_are_kept(model):
    ran = []
    hook = model.llama.head.register_forward_hook(lambda module, args, out: ran.append(args[0].shape[1]))
    try:
        model(torch.tensor([ROW]), pictures(2), logits_to_keep=2)
        model.generate(torch.tensor([ROW]), pictures(2), max_new_tokens=3)
    finally:
        hook.remove()
    assert ran == [2, 1, 1, 1]


def test_loss_counts_the_kept_positions(model):
    ids, pixels = torch.tensor([ROW]), pictures(2)
    grown = expanded(ids)[0]
    kept = model(ids, pixels, labels=ids, logits_to_keep=4)
    labels = grown.masked_fill(grown == IMAGE, -100)[:, -4:]
    torch.testing.assert_close(kept.loss, llava.next_token_loss(model(ids, pixels).logits[:, -4:], labels))


def test_loss_of_kept_positions_that_are_no_neighbours(model):
    """Each predicts the id behind it in the text, not the one behind it among those that are kept."""
    ids, where = torch.tensor([[1, 40, 41, 42, 43, 44, 45]]), torch.tensor([1, 2, 5])
    out = model(ids, labels=ids, logits_to_keep=where)
    expected = torch.nn.functional.cross_entropy(out.logits[0].float(), ids[0, where + 1])
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)


def test_hidden_states_are_the_references(model, reference):
    ids, mask = padded(ROWS, "left")
    pixels = pictures(3)
    out = model(ids, pixels, mask, output_hidden_states=True)
    theirs = reference(**theirs_of(ids, pixels, mask), output_hidden_states=True)
    real, there = model.prompt_ids(ids, pixels, mask)[1], expanded(ids, mask)[1].bool()
    assert len(out.hidden_states) == len(theirs.hidden_states) == len(model.llama.blocks) + 1
    for mine, other in zip(out.hidden_states, theirs.hidden_states, strict=True):
        close(mine[real], other[there])


def test_the_last_hidden_state_has_been_through_the_norm(model):
    out = model(torch.tensor([ROW]), pictures(2), output_hidden_states=True)
    assert torch.equal(model.llama.head(out.hidden_states[-1]), out.logits)


def test_hidden_states_and_attentions_come_only_if_asked_for(model):
    out = model(torch.tensor([ROW]), pictures(2))
    assert out.hidden_states is None and out.attentions is None and out.kv_cache is None
    out = model(torch.tensor([ROW]), pictures(2), output_attentions=True)
    assert out.hidden_states is None and isinstance(out.attentions, tuple)


def test_attentions_are_the_references(model, eager, family):
    ids, pixels = torch.tensor([ROW, [1, IMAGE, IMAGE, 40, 41, 42, 43]]), pictures(4)
    out = model(ids, pixels, output_attentions=True)
    theirs = eager[family](**theirs_of(ids, pixels), output_attentions=True)
    heads = model.config.text_config.num_attention_heads
    assert len(out.attentions) == len(theirs.attentions) == len(model.llama.blocks)
    for mine, other in zip(out.attentions, theirs.attentions, strict=True):
        assert mine.shape == (2, heads, 37, 37) and mine.dtype == torch.float64
        assert (mine - other).abs().max() <= 1e-6
        assert (mine.sum(-1) - 1).abs().max() <= 1e-12
    close(out.logits, model(ids, pixels).logits, 1e-11)


def test_attentions_of_a_padded_row_are_those_of_the_row_alone(model):
    ids, mask = padded(ROWS, "left")
    attentions = model(ids, pictures(3), mask, output_attentions=True).attentions
    alone = model(torch.tensor(ROWS[1:2]), pictures(3)[:1], output_attentions=True).attentions
    length = len(ROWS[1]) + FEATURES - 1
    for mine, other in zip(attentions, alone, strict=True):
        assert (mine[1:2, :, -length:, -length:] - other).abs().max() <= 1e-12
        assert (mine[1, :, -length:, :-length] == 0).all()


def test_image_hidden_states_are_the_features_that_were_merged(model, reference):
    ids, mask = padded(ROWS, "left")
    out = model(ids, pictures(3), mask)
    assert out.image_hidden_states.shape == (3, FEATURES, model.config.text_config.hidden_size)
    theirs = reference(**theirs_of(ids, pictures(3), mask)).image_hidden_states
    close(out.image_hidden_states.flatten(0, 1), theirs, 1e-11)
    assert torch.equal(out.image_hidden_states, model.get_image_features(pictures(3)))
    assert model(torch.tensor([[1, 40]])).image_hidden_states is None


# ----------------------------------------------------------------------------------------------------------------
# Other ways in


def test_embeddings_instead_of_ids(model, reference):
    ids, mask = padded(ROWS, "left")
    out = model(ids, pictures(3), mask, output_hidden_states=True)
    x, real = out.hidden_states[0], model.prompt_ids(ids, pictures(3), mask)[1]
    assert torch.equal(model(inputs_embeds=x, attention_mask=real).logits, out.logits)
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    theirs = reference(inputs_embeds=x, attention_mask=real.long(), position_ids=positions).logits
    close(out.logits[real], theirs[real])


def test_ids_or_embeddings_and_not_both(model):
    x = torch.randn(1, 3, model.config.text_config.hidden_size, dtype=torch.float64)
    for inputs in ({}, {"input_ids": torch.tensor([[1, 40, 41]]), "inputs_embeds": x}, {"pixel_values": pictures(1)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)


def test_pictures_beside_embeddings_are_refused(model):
    x = torch.randn(1, 3, model.config.text_config.hidden_size, dtype=torch.float64)
    with pytest.raises(ValueError, match="leave out pixel_values"):
        model(inputs_embeds=x, pixel_values=pictures(1))


def test_positions_of_the_callers_choice(model, reference):
    ids, pixels = torch.tensor([ROW, [1, IMAGE, IMAGE, 40, 41, 42, 43]]), pictures(4)
    inputs = theirs_of(ids, pixels)
    stretched = 3 + 2 * torch.arange(37).expand(2, -1) + torch.tensor([[0], [50]])
    out = model(ids, pixels, position_ids=stretched)
    close(out.logits, reference(**inputs | {"position_ids": stretched}).logits)
    assert (out.logits - model(ids, pixels).logits).abs().max() > 1e-3
    same = model(ids, pixels, position_ids=torch.arange(37).expand(2, -1))
    assert torch.equal(same.logits, model(ids, pixels).logits)


def test_positions_count_the_real_tokens_before_each_one(model):
    for side in ("left", "right"):
        ids, mask = padded(ROWS, side)
        _, real = model.prompt_ids(ids, pictures(3), mask)
        positions = real.long().cumsum(1) - real.long()
        given = model(ids, pictures(3), mask, position_ids=positions).logits
        assert torch.equal(model(ids, pictures(3), mask).logits, given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels_of_any_float_type(model, dtype):
    ids, pixels = torch.tensor([ROW]), pictures(2).to(dtype)
    assert torch.equal(model(ids, pixels).logits, model(ids, pixels.double()).logits)


# ----------------------------------------------------------------------------------------------------------------
# Which features of a picture


@pytest.mark.parametrize("layer", [-1, -2, -3, -5, 1, 3, 4, [-2], [3], [-1]])
def test_feature_layer_in_a_call(model, reference, layer):
    ids, pixels = torch.tensor([ROW]), pictures(2)
    out = model(ids, pixels, vision_feature_layer=layer)
    close(out.logits, reference(**theirs_of(ids, pixels), vision_feature_layer=layer).logits)


def test_feature_layer_zero_is_the_embedding(model, reference):
    """As a list for the reference, which takes the number 0 for no number."""
    ids, pixels = torch.tensor([ROW]), pictures(2)
    out = model(ids, pixels, vision_feature_layer=0)
    close(out.logits, reference(**theirs_of(ids, pixels), vision_feature_layer=[0]).logits)


@pytest.mark.parametrize("layer", [[-1, -3, 1], 3, [-2], -1])
def test_feature_layer_of_the_config(variant, family, layer):
    model, reference = variant(family, vision_feature_layer=layer)
    ids, pixels = torch.tensor([ROW]), pictures(2)
    assert model.config.vision_feature_layer == layer
    close(model(ids, pixels).logits, reference(**theirs_of(ids, pixels)).logits)


@pytest.mark.parametrize("layers", [[0, 2, 4], [-2, -2, -2], [4, 3, 2]])
def test_several_layers_in_a_call(variant, family, layers):
    model, reference = variant(family, vision_feature_layer=[-1, -3, 1])
    ids, pixels = torch.tensor([ROW]), pictures(2)
    out = model(ids, pixels, vision_feature_layer=layers)
    close(out.logits, reference(**theirs_of(ids, pixels), vision_feature_layer=layers).logits)
    assert (out.logits - model(ids, pixels).logits).abs().max() > 1e-3


@pytest.mark.parametrize("layers", [[-1, -2], []])
def test_as_many_layers_as_the_projector_takes(model, layers):
    with pytest.raises(ValueError, match=f"vision_feature_layer names {len(layers)} layers, and the projector takes 1"):
        model(torch.tensor([ROW]), pictures(2), vision_feature_layer=layers)


def test_features_with_the_class_token_in_a_call(model, reference):
    ids, mask = padded(ROWS, "left")
    pixels, size = pictures(3), FEATURES + 1
    out = model(ids, pixels, mask, vision_feature_select_strategy="full")
    inputs = theirs_of(ids, pixels, mask, size)
    theirs = reference(**inputs, vision_feature_select_strategy="full")
    assert out.image_hidden_states.shape[1] == size
    for i, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        close(out.logits[i, -length:], theirs.logits[i, -length:])
    repeated = model(**inputs, vision_feature_select_strategy="full")
    close(repeated.logits[2], theirs.logits[2])


def test_features_with_the_class_token_by_the_config(variant, family):
    model, reference = variant(family, vision_feature_select_strategy="full", vision_feature_layer=[1, -1])
    ids, pixels = torch.tensor([ROW]), pictures(2)
    inputs = theirs_of(ids, pixels, size=FEATURES + 1)
    close(model(ids, pixels).logits, reference(**inputs).logits)
    assert torch.equal(model.prompt_ids(ids, pixels)[0], inputs["input_ids"])
    default = model(ids, pixels, vision_feature_select_strategy="default")
    close(default.logits, reference(**theirs_of(ids, pixels), vision_feature_select_strategy="default").logits)
    tokens = reference.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=PAD)
    assert torch.equal(model.generate(ids, pixels, max_new_tokens=5), tokens[:, -5:])


def test_get_image_features_is_the_references(model, reference):
    pixels = pictures(2)
    for layer, strategy in [(-2, "default"), (1, "full"), ([-1], "default")]:
        theirs = reference.get_image_features(pixels.double(), layer, strategy).pooler_output
        close(model.get_image_features(pixels, layer, strategy), torch.stack(theirs), 1e-11)


def test_a_strategy_that_is_not_there_is_named(model):
    for strategy in ("cls", "patch", "Default"):
        with pytest.raises(ValueError, match=f"'{strategy}', and must be 'default' or 'full'"):
            model(torch.tensor([ROW]), pictures(2), vision_feature_select_strategy=strategy)


def test_a_projector_without_bias(variant, family):
    model, reference = variant(family, multimodal_projector_bias=False)
    assert model.projector.linear_1.bias is None and model.projector.linear_2.bias is None
    ids, pixels = torch.tensor([ROW]), pictures(2)
    close(model(ids, pixels).logits, reference(**theirs_of(ids, pixels)).logits)


def test_eps_theta_and_head_width_come_from_the_config(variant, family):
    text = {"rms_norm_eps": 0.2, "head_dim": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
    model, reference = variant(family, text=text)
    assert (model.config.text_config.rms_norm_eps, model.config.text_config.rope_theta) == (0.2, 50.0)
    ids, pixels = torch.tensor([ROW]), pictures(2)
    close(model(ids, pixels).logits, reference(**theirs_of(ids, pixels)).logits)


# ----------------------------------------------------------------------------------------------------------------
# Mistral's window


def test_the_window_counts_keys_as_the_reference_does(pairs, eager):
    model, window = pairs["mistral"][0], reference_config("mistral").text_config.sliding_window
    ids, pixels = torch.tensor([ROW]), pictures(2)
    ours = model(ids, pixels, output_attentions=True).attentions[0]
    theirs = eager["mistral"](**theirs_of(ids, pixels), output_attentions=True).attentions[0]
    i, j = torch.arange(37)[:, None], torch.arange(37)
    seen = (i - window < j) & (j <= i)
    for weights in (ours, theirs):
        assert torch.equal(weights > 0, seen.expand_as(weights))
    assert seen.sum(1).max() == window  # the query's own among them


def test_llama_has_no_window(pairs):
    weights = pairs["llama"][0](torch.tensor([ROW]), pictures(2), output_attentions=True).attentions[0]
    assert torch.equal(weights[0, 0] > 0, torch.ones(37, 37, dtype=torch.bool).tril())


def test_steps_beyond_the_window_equal_the_reference(pairs):
    """A prompt shorter than the window, then three windows of steps: logits as the reference's own cache gives them."""
    model, _, reference = pairs["mistral"]
    torch.manual_seed(2)
    ids = torch.randint(40, 600, (2, 44))
    cache, past = model.init_kv_cache(2, 44), None
    full = reference(input_ids=ids).logits
    for start, end in [(0, 6), *((i, i + 1) for i in range(6, 44))]:
        ours = model(ids[:, start:end], kv_cache=cache).logits
        out = reference(input_ids=ids[:, start:end], past_key_values=past, use_cache=True)
        past = out.past_key_values
        close(ours, out.logits)
        close(ours, full[:, start:end])


def test_the_window_of_the_published_size():
    """4096 keys and more positions than that, on one narrow layer:
    position 4096 is the first that no longer sees position 0.
    """
    window, T = 4096, 4104
    config = MistralConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8, sliding_window=window, max_position_embeddings=8192, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    reference = MistralForCausalLM(config).double().eval()
    for parameter in reference.parameters():
        parameter.mul_(4)
    names = {
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    }
    sizes = {name: getattr(config, name) for name in names | {"vocab_size", "sliding_window", "rms_norm_eps"}}
    model = llama.Llama(
        llama.TextConfig(model_type="mistral", rope_theta=config.rope_parameters["rope_theta"], **sizes)
    ).double()
    state = reference.state_dict()
    model.load_state_dict({name: state[their] for name, their in one_layer_names().items()})

    ids = torch.randint(1, 64, (1, T))
    ids[0, 0] = 0  # the only one of its kind
    theirs = reference(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    x = model.embed(ids)
    ours = model.head(model(x)[0])
    close(ours, theirs)
    cache = llama.init_kv_cache(model.config, 1, T, torch.float64)
    model(x[:, : window - 2], kv_cache=cache)
    steps = [model.head(model(x[:, i : i + 1], kv_cache=cache)[0]) for i in range(window - 2, T)]
    close(torch.cat(steps, dim=1), theirs[:, window - 2 :])

    other = x.clone()
    other[:, 0] += 1
    cut = slice(window - 3, window + 3)
    rows = (model.head(model(other)[0]) - ours).abs().amax(-1)[0, cut]
    assert (rows > 1e-9).tolist() == [True, True, True, False, False, False]


def one_layer_names():
    """Our names of a decoder of one layer → the reference's."""
    block, layer = "blocks.0.", "model.layers.0."
    pairs = {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    pairs |= {f"{block}attention.w{x}.weight": f"{layer}self_attn.{x}_proj.weight" for x in "qkvo"}
    pairs |= {f"{block}mlp.{x}.weight": f"{layer}mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    pairs |= {f"{block}attention_norm.weight": f"{layer}input_layernorm.weight"}
    return pairs | {f"{block}mlp_norm.weight": f"{layer}post_attention_layernorm.weight"}


# ----------------------------------------------------------------------------------------------------------------
# Number types


@pytest.fixture(scope="module")
def typed(checkpoints):
    """(family, dtype) → our model in that type."""
    made = {}

    def get(family, dtype):
        if (family, dtype) not in made:
            made[family, dtype] = llava.load(str(checkpoints[family]), device="cpu", dtype=dtype)[0]
        return made[family, dtype]

    return get


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_stay_in_the_type_that_was_asked_for(typed, family, dtype):
    model = typed(family, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    ids, mask = padded(ROWS, "left")
    kinds = {}
    hooks = [
        module.register_forward_hook(
            lambda module, args, out, name=name: (
                kinds.update({name: out.dtype}) if isinstance(out, torch.Tensor) else None
            )
        )
        for name, module in model.named_modules()
    ]
    try:
        cache = model.init_kv_cache(3, 60)
        out = model(
            ids, pictures(3), mask, kv_cache=cache, labels=ids, output_hidden_states=True, output_attentions=True
        )
        step = model(torch.tensor([[40], [41], [42]]), kv_cache=cache)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(kinds) > 60 and set(kinds.values()) == {dtype}
    outputs = [out.logits, step.logits, *out.hidden_states, *out.attentions, out.image_hidden_states, cache["keys.0"]]
    assert {tensor.dtype for tensor in outputs} == {dtype}
    assert out.loss.dtype == torch.float32
    assert all(tensor.isfinite().all() for tensor in outputs)


def test_norms_and_positions_compute_in_float32_in_a_narrow_type(typed, family, monkeypatch):
    """Twice the precision where it matters: no squares and no angles in 16 bits,
    and none in 64 either, as in the reference.
    """
    seen, rsqrt, cos = [], torch.rsqrt, torch.Tensor.cos
    models = [typed(family, dtype) for dtype in DTYPES]
    monkeypatch.setattr(torch, "rsqrt", lambda x: seen.append(x.dtype) or rsqrt(x))
    monkeypatch.setattr(torch.Tensor, "cos", lambda x: seen.append(x.dtype) or cos(x))
    for model in models:
        model(torch.tensor([[1, 40, 41]]))
    assert len(seen) == 4 * (7 + 1) and set(seen) == {torch.float32}


def test_hidden_values_of_hundreds_do_not_overflow_float16(typed, family):
    half, single = typed(family, torch.float16), typed(family, torch.float32)
    x = 300 * torch.randn(1, 12, half.config.text_config.hidden_size, generator=torch.Generator().manual_seed(1)).sign()
    assert x.half().pow(2).isinf().all()
    ours, truth = half(inputs_embeds=x.half()).logits, single(inputs_embeds=x).logits
    assert ours.dtype == torch.float16 and ours.isfinite().all()
    assert torch.cosine_similarity(ours.float(), truth, dim=-1).min() > 0.999


def test_a_picture_that_overflows_is_reported_as_such(typed, family):
    model = typed(family, torch.float16)
    pixels = pictures(2)
    pixels[1, 0, 0, 0] = 1e6  # infinite in float16
    with pytest.raises(
        ValueError, match=r"the picture features are not finite in torch.float16: use a dtype of wider range"
    ):
        model(torch.tensor([ROW]), pixels)
    pixels[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="the picture features are not finite"):
        model.get_image_features(pixels)


def test_logits_that_overflow_are_reported_by_every_way_to_them(model):
    other, ids = copy.deepcopy(model), torch.tensor([[1, 40, 41]])
    other.llama.norm.weight[3] = torch.inf
    for way in (
        lambda: other(ids),
        lambda: other.score([[5], [6, 7]], ids),
        lambda: next(other.stream(ids, max_new_tokens=2)),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match="the logits are not finite"):
            way()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(model, side):
    """Nothing is predicted from padding: the first token of a row does not count, wherever the row is padded."""
    rows = [torch.tensor([1, 20, 21]), torch.tensor([1, 5, 6, 7, 8, 9]), torch.tensor([1, 30, 31, 32])]
    pad = dict(batch_first=True, padding_side=side)
    ids = torch.nn.utils.rnn.pad_sequence(rows, padding_value=0, **pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], **pad)
    labels = torch.nn.utils.rnn.pad_sequence(rows, padding_value=-100, **pad)
    with torch.no_grad():
        alone = [model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
        together = model(ids, attention_mask=mask, labels=labels).loss
        again = model(ids, attention_mask=mask, labels=labels.int()).loss
    torch.testing.assert_close(together, sum(alone) / sum(len(row) - 1 for row in rows), rtol=1e-6, atol=0)
    assert again == together


def test_logits_to_keep_may_name_positions(model, reference):
    ids, where = torch.tensor([[1, 40, 41, 42, 43]]), torch.tensor([4, 0, 2])
    with torch.no_grad():
        ours, theirs = (each(input_ids=ids, logits_to_keep=where).logits for each in (model, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_shapes_that_do_not_belong_together_are_named(model):
    ids = torch.tensor([[1, 40, 41]])
    for words, inputs in {
        r"position_ids has the shape \(1, 2\)": dict(input_ids=ids, position_ids=torch.arange(2)[None]),
        r"labels has the shape \(1, 5\), not \(1, 3\): one for each id": dict(
            input_ids=ids, labels=torch.ones(1, 5, dtype=torch.int64)
        ),
        r"the input has the shape \(3,\)": dict(input_ids=ids[0]),
        r"the input has the shape \(1, 0\)": dict(input_ids=ids[:, :0]),
    }.items():
        with pytest.raises(ValueError, match=words):
            model(**inputs)
    with pytest.raises(ValueError, match="at least one position"):
        model.generate(ids[:, :0], max_new_tokens=2)


def test_large_numbers_are_not_taken_for_numbers_out_of_range():
    """Each is finite, their sum is not; and in float16 not even the sum of small ones."""
    for dtype, value in (
        (torch.bfloat16, 2e38),
        (torch.float32, 2e38),
        (torch.float64, 1e308),
        (torch.float16, 60000.0),
    ):
        x = torch.full((1, 32064), value, dtype=dtype)
        assert llava.check_finite(x, "the logits") is x
        x[0, 5] = -torch.inf
        with pytest.raises(ValueError, match="the logits are not finite"):
            llava.check_finite(x, "the logits")


def test_logits_that_overflow_are_reported_as_such(model):
    other = copy.deepcopy(model)
    other.llama.norm.weight[3] = torch.inf
    for options in ({}, {"num_beams": 2}, {"temperature": 1.0}):
        with pytest.raises(ValueError, match=r"the logits are not finite in torch.float64"):
            other.generate(torch.tensor([[1, 40]]), max_new_tokens=2, **options)
