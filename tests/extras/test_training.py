"""Training: gradients, steps of an optimizer, initial weights,
checkpointing and another vocabulary, each as in transformers.
"""

import copy
import dataclasses
import functools

import pytest
import torch
from reference import EDGE, IMAGE, PAD, expanded, load_reference, reference_config
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

import llama
import llava
import weights

ROWS = [[1, 40, IMAGE, 41, 42, IMAGE, 43, 44], [1, 50, IMAGE, 51, 52], [1, 60, 61]]  # two pictures, one, none


@pytest.fixture
def trained(pair):
    """Copies of both, to be changed."""
    return copy.deepcopy(pair[0]), copy.deepcopy(pair[2])


def batch(seed=1):
    """Unequal rows, padded on the left, in the form that both take, and labels of the words in them."""
    torch.manual_seed(seed)
    longest = max(map(len, ROWS))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in ROWS])
    ids, mask, position_ids = expanded(ids, (ids != PAD).long())
    labels = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)
    labels[torch.arange(len(ROWS)), mask.argmax(1)] = -100  # the first real one is predicted from padding
    pixels = torch.randn(3, 3, EDGE, EDGE, dtype=torch.float64)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": position_ids,
        "pixel_values": pixels,
        "labels": labels,
    }


def gradients(model, rename, inputs):
    """The loss, and our name of each parameter → its gradient or None."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {rename(name): parameter.grad for name, parameter in model.named_parameters()}


# ----------------------------------------------------------------------------------------------------------------
# Gradients and steps


def test_the_gradient_of_each_parameter_is_the_references(trained):
    model, reference = trained
    inputs = batch()
    loss, ours = gradients(model, str, inputs)
    their_loss, theirs = gradients(reference, weights.our_name, inputs)
    assert abs(loss - their_loss) <= 1e-6 * their_loss
    assert set(ours) == set(theirs) and len(ours) > 90
    for name, gradient in theirs.items():
        assert (ours[name] is None) == (gradient is None), name
        if gradient is not None:
            assert (ours[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max() + 1e-12, name


def test_what_is_not_run_has_no_gradient_and_everything_else_has_one(trained):
    model, _ = trained
    _, found = gradients(model, str, batch())
    unused = {name for name, gradient in found.items() if gradient is None}
    last = len(model.vision.blocks) - 1
    assert unused == {name for name in found if name.startswith((f"vision.blocks.{last}.", "vision.post_norm."))}
    assert all(found[name].abs().max() > 1e-12 for name in found if name not in unused and not name.endswith("wk.bias"))
    # no text position holds the image token, so its row of the embedding learns nothing
    assert (found["llama.embed.weight"][IMAGE] == 0).all() and (found["llama.embed.weight"][0] == 0).all()


def test_one_placeholder_for_each_picture_trains_alike(trained):
    model, _ = trained
    inputs = batch()
    _, repeated = gradients(model, str, inputs)
    longest = max(map(len, ROWS))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in ROWS])
    labels = ids.masked_fill(ids == PAD, -100)
    labels[torch.arange(3), (ids != PAD).long().argmax(1)] = -100
    single = {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "pixel_values": inputs["pixel_values"],
        "labels": labels,
    }
    _, grown = gradients(model, str, single)
    for name, gradient in repeated.items():
        if gradient is not None:
            assert (grown[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max() + 1e-12, name


def test_steps_of_training_give_the_references_weights(trained):
    model, reference = trained
    losses = []
    for module in (model, reference):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.01)
        losses.append([])
        for step in range(4):
            optimizer.zero_grad()
            loss = module(**batch(step)).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0][0] != pytest.approx(losses[0][1], rel=1e-3)
    ours = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        assert (ours[weights.our_name(name)] - parameter).abs().max() <= 1e-6, name


def test_a_frozen_part_stays_as_it_is(trained):
    """The paper's first stage: the projector alone is trained."""
    model, _ = trained
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    _, found = gradients(model, str, batch())
    assert {name.split(".")[0] for name, gradient in found.items() if gradient is not None} == {"projector"}


# ----------------------------------------------------------------------------------------------------------------
# Gradient checkpointing


def saved_bytes(function):
    """The bytes that a forward pass keeps for the backward one,
    parameters not counted, and what the function returns.
    """
    kept = {}

    def keep(tensor):
        if not (tensor.is_leaf and tensor.requires_grad) and not (tensor._base is not None and tensor._base.is_leaf):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    return sum(kept.values()), result


@pytest.mark.parametrize("place", ["eval", "train"])
def test_checkpointing_gives_the_same_loss_and_gradients(trained, place):
    model, _ = trained
    getattr(model, place)()
    inputs = batch()
    loss, plain = gradients(model, str, inputs)
    model.gradient_checkpointing = True
    again, checkpointed = gradients(model, str, inputs)
    assert torch.equal(loss, again)
    for name, gradient in plain.items():
        assert gradient is None if checkpointed[name] is None else torch.equal(gradient, checkpointed[name]), name


def test_checkpointing_keeps_less_in_memory(trained):
    model, _ = trained
    inputs = batch()
    parts = {
        "tower": lambda: model.vision(inputs["pixel_values"], [-1])[0],
        "decoder": lambda: model.llama(model.llama.embed(inputs["input_ids"]))[0],
        "whole": lambda: model(**inputs).loss,
    }
    plain = {name: saved_bytes(part)[0] for name, part in parts.items()}
    model.gradient_checkpointing = True
    less = {name: saved_bytes(part)[0] for name, part in parts.items()}
    assert less["tower"] < 0.25 * plain["tower"] and less["decoder"] < 0.25 * plain["decoder"], (less, plain)
    assert less["whole"] < 0.6 * plain["whole"]  # the logits stay


def test_checkpointing_is_one_switch_for_both_towers(trained):
    model, _ = trained
    assert not model.gradient_checkpointing
    model.gradient_checkpointing = True
    assert model.vision.gradient_checkpointing and model.llama.gradient_checkpointing and model.gradient_checkpointing
    model.gradient_checkpointing = False
    assert not model.vision.gradient_checkpointing and not model.llama.gradient_checkpointing


def test_each_block_runs_again_for_its_gradient(trained):
    model, _ = trained
    model.gradient_checkpointing = True
    ran = []
    for name, block in [*model.vision.blocks.named_children(), *model.llama.blocks.named_children()]:
        block.mlp.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    loss = model(**batch()).loss
    assert len(ran) == 3 + 3
    loss.backward()
    assert len(ran) == 2 * (3 + 3)


# ----------------------------------------------------------------------------------------------------------------
# Initial weights


@functools.cache
def drawn(family, whose, tower="clip_vision_model"):
    """The initial weights of a few seeds, name → one long tensor."""
    text = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 1, "initializer_range": 0.02}
    kind = llava.vision.VisionConfig.KINDS[tower]
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}
    config = reference_config(family, text=text, vision=sizes)
    if not kind.get("class_token", True):
        sizes |= {"num_attention_heads": 4, "image_size": EDGE, "patch_size": 7, "vision_use_head": False}
        config = LlavaConfig(vision_config=SiglipVisionConfig(**sizes), text_config=config.text_config)
    found = {}
    for seed in range(8):
        torch.manual_seed(100 * seed + (whose == "ours"))
        if whose == "ours":
            own = ours_of(config)
            own.vision_config = dataclasses.replace(own.vision_config, **{**kind, "patch_size": 7})
            model, rename = llava.Llava(own), str
            model.init_weights()
        else:
            model, rename = LlavaForConditionalGeneration(config), weights.our_name
        for name, parameter in model.named_parameters():
            found.setdefault(rename(name), []).append(parameter.detach().flatten())
    return {name: torch.stack(tensors) for name, tensors in found.items()}


def ours_of(config, **top):
    """Our config of the reference's."""

    def fields(cls, source):
        names = [field for field in cls.__dataclass_fields__ if hasattr(source, field)]
        other = ("vision_config", "text_config", "rope_scaling")  # the last one is not in the form that it has there
        return cls(**{name: getattr(source, name) for name in names if name not in other})

    result = fields(llava.LlavaConfig, config)
    result.vision_config = fields(llava.vision.VisionConfig, config.vision_config)
    result.text_config = fields(llama.TextConfig, config.text_config)
    for name, value in top.items():
        setattr(result, name, value)
    return result


def test_initial_weights_are_drawn_as_the_references(family):
    ours, theirs = drawn(family, "ours"), drawn(family, "theirs")
    assert set(ours) == set(theirs)
    for name, reference in theirs.items():
        mine = ours[name]
        assert mine.shape == reference.shape, name
        spread, n = reference.std(), reference.numel()
        if spread == 0:
            assert torch.equal(mine, reference), name  # norms and biases
            continue
        # both are estimates: a standard deviation of n numbers is known to 1 / √(2 n), of two such to √2 of that
        assert abs(mine.std() / spread - 1) <= 5 / n**0.5, (name, mine.std(), spread)
        assert abs(mine.mean()) <= 5 * spread / n**0.5, name
        assert (mine.abs() > 2 * spread).double().mean() == pytest.approx(0.0455, abs=5 * (0.0455 / n) ** 0.5), (
            name
        )  # normal
        assert not torch.equal(mine[0], mine[1]), name  # another seed, other numbers


def test_initial_weights_of_a_siglip_are_drawn_as_the_references():
    """By its own rule: patches wider, blocks uniform, and biases in the MLP that are not quite 0."""
    ours, theirs = (drawn("llama", whose, "siglip_vision_model") for whose in ("ours", "theirs"))
    assert set(ours) == set(theirs)
    for name, reference in theirs.items():
        mine, spread, n = ours[name], reference.std(), reference.numel()
        assert mine.shape == reference.shape, name
        if spread == 0:
            assert torch.equal(mine, reference), name
            continue
        assert abs(mine.std() / spread - 1) <= 5 / n**0.5 and abs(mine.mean()) <= 5 * spread / n**0.5, name
        far, their_far = ((x.abs() > 1.7 * spread).double().mean() for x in (mine, reference))
        assert abs(far - their_far) <= 5 * (2 * 0.09 / n) ** 0.5, name  # of a normal 9 %, of a uniform hardly any
    assert ours["vision.blocks.0.mlp.fc1.bias"].std() == pytest.approx(1e-6, rel=0.1)
    assert ours["vision.position_embedding"].std() == pytest.approx(128**-0.5, rel=0.1)
    assert ours["vision.blocks.0.attention.wq.weight"].abs().max() <= (6 / 256) ** 0.5


def test_initial_spreads_are_these():
    """The same in numbers, of a width of 128 and 3 blocks in the tower."""
    ours, deep = drawn("llama", "ours"), 6**-0.5
    expected = {"class_embedding": 1, "blocks.0.attention.wq.weight": deep, "blocks.1.attention.wk.weight": deep}
    expected |= {
        "blocks.2.attention.wv.weight": deep,
        "blocks.0.attention.wo.weight": 1,
        "blocks.0.mlp.fc2.weight": deep,
    }
    expected |= {"blocks.0.mlp.fc1.weight": 2**-0.5}
    for name, factor in expected.items():
        assert ours[f"vision.{name}"].std() == pytest.approx(factor * 128**-0.5, rel=0.1), name
    rest = [
        name
        for name in ours
        if "norm" not in name and "bias" not in name and name.removeprefix("vision.") not in expected
    ]
    for name in rest:
        if "vision.blocks" not in name:
            assert ours[name].std() == pytest.approx(0.02, rel=0.05), name
    for name, tensor in ours.items():
        if name.endswith("bias"):
            assert (tensor == 0).all(), name
        elif "norm" in name:
            assert (tensor == 1).all(), name


# ----------------------------------------------------------------------------------------------------------------
# Another vocabulary


def narrow(tied=False, vocabulary=256):
    """A model with far more words than dimensions, so that the covariance of its rows has full rank."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text |= {"vocab_size": vocabulary, "tie_word_embeddings": tied}
    config = reference_config(
        "llama", text=text, tie_word_embeddings=tied, image_token_index=vocabulary - 1, pad_token_id=0
    )
    model = llava.Llava(ours_of(config))
    model.init_weights()
    return config, model


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_drawn_as_the_references(tied):
    torch.manual_seed(0)
    config, model = narrow(tied)
    reference = LlavaForConditionalGeneration(config)
    assert (reference.lm_head.weight is reference.get_input_embeddings().weight) == tied
    shift, mix = torch.randn(16), torch.randn(16, 16)
    with torch.no_grad():
        for ours, theirs in pairs_of_matrices(model, reference)[: 1 if tied else 2]:
            ours.copy_(ours @ mix + shift)  # a mean and a covariance that are not those of noise
            theirs.copy_(ours)
    old = [ours.detach().clone() for ours, _ in pairs_of_matrices(model, reference)]
    new = 20000
    assert model.resize_token_embeddings(256 + new) is model.llama.embed
    reference.resize_token_embeddings(256 + new)
    for before, (ours, theirs) in zip(old, pairs_of_matrices(model, reference), strict=True):
        mean = before.mean(0)
        covariance = 1e-9 * (before - mean).T @ (before - mean) / len(before)
        deviation = covariance.diagonal().sqrt()
        for matrix in (ours.detach(), theirs.detach()):
            assert matrix.shape == (256 + new, 16) and torch.equal(matrix[:256], before)
            rows = matrix[256:].double() - mean.double()
            # float32 numbers near the mean are about a tenth of a deviation apart
            assert (rows.mean(0).abs() <= 6 * deviation / new**0.5 + 2e-7).all()
            found = rows.T @ rows / new
            assert (found - covariance).abs().max() <= 0.08 * covariance.abs().max()


def pairs_of_matrices(model, reference):
    """Embedding and head, ours and theirs."""
    ours, theirs = model.llama, reference.get_input_embeddings()
    return [(ours.embed.weight, theirs.weight), (ours.head.weight, reference.lm_head.weight)]


def test_a_larger_vocabulary_keeps_the_old_words(trained):
    model, _ = trained
    inputs, old = batch(), model.config.text_config.vocab_size
    before = model(**inputs).logits
    embed, head = model.llama.embed.weight.detach().clone(), model.llama.head.weight.detach().clone()
    returned = model.resize_token_embeddings(old + 24)
    assert returned is model.llama.embed and returned.num_embeddings == model.llama.head.out_features == old + 24
    assert model.config.text_config.vocab_size == old + 24
    assert torch.equal(model.llama.embed.weight[:old], embed) and torch.equal(model.llama.head.weight[:old], head)
    assert model.llama.embed.weight.dtype == model.llama.head.weight.dtype == torch.float64
    after = model(**inputs).logits
    assert after.shape[-1] == old + 24
    torch.testing.assert_close(after[..., :old], before, rtol=0, atol=1e-12)
    words = torch.tensor([[1, old, old + 23]])  # the new ones work, in generation and in training
    assert model.generate(words, max_new_tokens=2).shape == (1, 2)
    _, found = gradients(model, str, {"input_ids": words, "labels": words})
    assert found["llama.embed.weight"][old].abs().max() > 0 and found["llama.head.weight"][old + 23].abs().max() > 0


def test_a_smaller_vocabulary_drops_the_last_words(trained):
    model, _ = trained
    words = torch.tensor([[1, 40, 41]])
    before = model(words).logits
    model.resize_token_embeddings(100)
    assert (
        model.config.text_config.vocab_size == 100 and model.llama.embed.weight.shape == model.llama.head.weight.shape
    )
    torch.testing.assert_close(model(words).logits, before[..., :100], rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [300, 100])
def test_a_tied_head_stays_tied(n):
    _, model = narrow(tied=True)
    model.resize_token_embeddings(n)
    assert model.llama.head.weight is model.llama.embed.weight and model.llama.embed.weight.shape == (n, 16)
    _, model = narrow(tied=False)
    model.resize_token_embeddings(n)
    assert model.llama.head.weight is not model.llama.embed.weight


def test_a_frozen_embedding_stays_frozen(trained):
    model, _ = trained
    model.llama.embed.requires_grad_(False)
    model.resize_token_embeddings(700)
    assert not model.llama.embed.weight.requires_grad and model.llama.head.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_resizing_keeps_the_type(dtype):
    _, model = narrow()
    model.to(dtype).resize_token_embeddings(300)
    assert model.llama.embed.weight.dtype == model.llama.head.weight.dtype == dtype
    assert torch.isfinite(model.llama.embed.weight).all()


@pytest.mark.parametrize("n", [1.3, 640.0, "640", None, True, 0, -3, torch.tensor(640)])
def test_a_size_that_is_not_a_whole_number_is_refused(trained, n):
    model, _ = trained
    with pytest.raises(ValueError, match="give an integer of at least 1"):
        model.resize_token_embeddings(n)
    assert model.config.text_config.vocab_size == model.llama.embed.num_embeddings == len(model.llama.head.weight)


def test_a_resized_model_is_saved_and_loaded(trained, processor, tmp_path):
    """By ours, and by transformers, which gives the same logits from it."""
    model, _ = trained
    inputs, old = batch(), model.config.text_config.vocab_size
    model.resize_token_embeddings(old + 8)
    llava.save(model, processor, tmp_path)
    again, _ = llava.load(str(tmp_path), device="cpu", dtype=torch.float64)
    assert again.config.text_config.vocab_size == old + 8
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    theirs = load_reference(tmp_path)(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert (theirs - model(**inputs).logits)[real].abs().max() <= 1e-9 * theirs.abs().max()


# ----------------------------------------------------------------------------------------------------------------
# One matrix for both ends


def tied_pair(processor, folder):
    """A tied model of ours and the reference's reading of it."""
    text = {"tie_word_embeddings": True}
    torch.manual_seed(4)
    model = llava.Llava(ours_of(reference_config("llama", text=text, tie_word_embeddings=True))).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    llava.save(model, processor, folder)
    return model, load_reference(folder)


def test_a_tied_head_is_one_matrix_with_one_gradient(pairs, tmp_path):
    model, reference = tied_pair(pairs["llama"][1], tmp_path)
    assert model.llama.head.weight is model.llama.embed.weight
    assert reference.lm_head.weight is reference.get_input_embeddings().weight
    assert "llama.head.weight" not in dict(model.named_parameters())
    inputs = batch()
    loss, ours = gradients(model, str, inputs)
    their_loss, theirs = gradients(reference, weights.our_name, inputs)
    assert abs(loss - their_loss) <= 1e-6 * their_loss
    # the gradient of both uses in one sum: rows of words that were read, and rows of words that could have been said
    name = "llama.embed.weight"
    assert (ours[name] - theirs[name]).abs().max() <= 1e-6 * theirs[name].abs().max()
    assert (ours[name].abs().amax(1) > 0).all()


def test_a_tied_model_is_loaded_tied_and_stays_so_when_resized(pairs, tmp_path):
    model, _ = tied_pair(pairs["llama"][1], tmp_path)
    again, processor = llava.load(str(tmp_path), device="cpu", dtype=torch.float64)
    assert again.llama.head.weight is again.llama.embed.weight
    again.resize_token_embeddings(648)
    llava.save(again, processor, tmp_path / "resized")
    resized, _ = llava.load(str(tmp_path / "resized"), device="cpu", dtype=torch.float64)
    assert resized.llama.head.weight is resized.llama.embed.weight
    words = torch.tensor([[1, 40, 645]])
    assert torch.equal(resized(words).logits, again(words).logits)
    old = torch.tensor([[1, 40, 41]])
    torch.testing.assert_close(again(old).logits[..., :640], model(old).logits, rtol=0, atol=1e-12)


def test_gradients_are_those_of_one_call(model):
    cache, ids = model.init_kv_cache(1, 8), torch.tensor([[1, 40, 41]])
    model(ids, kv_cache=cache)
    with pytest.raises(RuntimeError, match="inplace"):
        model(ids, kv_cache=cache).logits.sum().backward()
