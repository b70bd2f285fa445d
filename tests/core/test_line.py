"""The line of LLaVAs, each kind beside transformers: every stage, and everything that works for LLaVA-1.5."""

import json
import shutil

import line
import parity
import pytest
import torch
import transformers
from checkpoints import rename
from inputs import close
from line import TILED, photo
from safetensors.torch import load_file, save_file

import llama
import llava
import vision
import weights

SIZES = [(40, 61), (28, 28), (90, 33), (300, 21)]  # with rows trimmed, with columns, nearly nothing


@pytest.fixture(params=line.params())
def name(request):
    return request.param


def theirs_of(model, inputs):
    """The reference's arguments for ours."""
    ids, mask = model.expanded(**inputs)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    pictures = {key: inputs[key] for key in ("pixel_values", "image_sizes") if key in inputs}
    if pictures:
        pictures["pixel_values"] = pictures["pixel_values"].double()
    return {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions, **pictures}


def agree(found, name, bound=1e-9):
    """Ours and theirs of parity.py agree at every stage."""
    ours, theirs = found
    assert {*ours} == {*theirs}
    rows = parity.compare(ours, theirs, torch.float64)
    assert [row[0] for row in rows if not row[2] <= row[4]] == []


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_stage_is_the_references(made, name, size):
    """Preprocessing, tower, projector, packing, decoder, loss, every gradient, greedy and beams."""
    if size != SIZES[0] and name not in ("interleave", "next-mistral", "onevision"):
        pytest.skip("pictures are cut in the same way")
    model, processor, reference = made.pair(name)
    image, config = photo(*size), model.config
    ours = parity.ours(model, processor, image)
    prompt = processor.prompt(parity.QUESTION)
    theirs = parity.theirs(reference, made.folder(name), config, processor.preprocess_config, prompt, image)
    agree((ours, theirs), name)


def test_a_batch_of_unequal_rows_is_the_references(made, name):
    """Rows with one, two and no pictures, of different sizes; padded on the left."""
    model, processor, reference = made.pair(name)
    token = processor.image_token
    texts = [f"{token}\nWhat is this?", f"{token} or {token}? Say which.", "Hello"]
    images = [photo(40, 61), photo(90, 33, 1), photo(29, 30, 2)]
    inputs = processor(texts, images)
    grown = theirs_of(model, inputs)
    if name == "onevision":  # the reference takes one number for a whole batch: rows of several pictures by themselves
        with pytest.raises(Exception):  # noqa: B017
            reference(**grown)
        for row, own in ((0, images[:1]), (1, images[1:]), (2, [])):
            alone = processor(texts[row], own)
            more = {"batch_num_images": torch.tensor([len(own)])} if own else {}
            theirs = reference(**theirs_of(model, alone), **more).logits
            close(model(**alone).logits, theirs)
            real = grown["attention_mask"][row].bool()
            close(model(**inputs).logits[row][real], theirs[0])
        return
    out, theirs = model(**inputs), reference(**grown)
    real = grown["attention_mask"].bool()
    close(out.logits[real], theirs.logits[real])
    counts = [len(x) for x in out.image_hidden_states]
    assert counts == model.feature_counts(inputs["pixel_values"], inputs.get("image_sizes"), inputs["input_ids"])
    assert (len({*counts}) > 1) == (name in TILED)


def test_a_batch_generates_what_each_row_does_alone(made, name):
    model, processor, _ = made.pair(name)
    token = processor.image_token
    images = [photo(40, 61), photo(90, 33, 1), photo(29, 30, 2)]
    rows = [(f"{token}\nWhat is this?", images[:1]), (f"{token} or {token}?", images[1:]), ("Hello", [])]
    together = model.generate(**processor([text for text, _ in rows], images), max_new_tokens=6)
    for row, (text, own) in zip(together, rows, strict=True):
        alone = model.generate(**processor(text, own or None), max_new_tokens=6)[0]
        assert torch.equal(row[: len(alone)], alone)


def test_a_saved_checkpoint_is_the_same_to_both(made, name, tmp_path):
    model, processor, reference = made.pair(name)
    llava.save(model, processor, tmp_path / "saved")
    again, reader = llava.load(str(tmp_path / "saved"), device="cpu", dtype=torch.float64)
    theirs = line.reference(tmp_path / "saved")
    inputs = processor.chat([("user", "What?")], [photo(40, 61)])
    assert reader.form == processor.form and again.config.eos_token_ids == model.config.eos_token_ids
    assert vars(again.config) | {"eos_token_id": 0} == vars(model.config) | {"eos_token_id": 0}
    assert all(torch.equal(reader.chat([("user", "What?")], [photo(40, 61)])[key], inputs[key]) for key in inputs)
    logits = model(**inputs).logits
    assert torch.equal(again(**inputs).logits, logits)
    close(logits, theirs(**theirs_of(model, inputs)).logits)
    wrong = {key: value for key, value in vars(reference.config).items() if key in ("tie_word_embeddings",)}
    assert {key: getattr(theirs.config, key) for key in wrong} == wrong


def test_auto_processor_prepares_the_same(made, name, tmp_path):
    if name == "onevision":
        pytest.skip("its processor cannot be built without torchvision")
    model, processor, _ = made.pair(name)
    llava.save(model, processor, tmp_path / "saved")
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "saved", use_fast=False)
    text, image = processor.prompt("What?"), photo(40, 61)
    found, inputs = theirs(text=text, images=image, return_tensors="pt"), processor(text, image)
    assert torch.equal(found["input_ids"], model.expanded(**inputs)[0])
    assert torch.equal(found["pixel_values"].float(), inputs["pixel_values"])


@pytest.mark.parametrize("layout", "BCDE")
def test_every_layout_is_read(made, layout, tmp_path):
    """As versions of transformers, and the authors, name the tensors, the newline and SigLIP's unused end among them."""
    for name in ("onevision", "mantis", "vipllava"):
        folder = tmp_path / name
        shutil.copytree(made.folder(name), folder)
        tensors = load_file(folder / "model.safetensors")
        if name == "mantis":
            assert sum(".head." in tensor for tensor in tensors) == 11
        if layout == "E" and name == "vipllava":
            continue  # its authors' names are others
        moved = {}
        for tensor, value in tensors.items():
            newline = {"B": "model.image_newline", "C": "model.image_newline", "E": "model.image_newline"}
            new = newline.get(layout, tensor) if tensor == "image_newline" else rename(tensor, layout)
            moved[new] = value
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
        again = llava.load(str(folder), device="cpu", dtype=torch.float64)[0].state_dict()
        assert all(torch.equal(value, again[key]) for key, value in made.pair(name)[0].state_dict().items())


def test_a_picture_may_be_added_in_a_later_turn(made, name):
    """From the cache, token for token as from the whole conversation."""
    model, processor, _ = made.pair(name)
    first, second = photo(40, 61), photo(90, 33, 1)
    turns = [("user", "What?", 1), ("assistant", "red"), ("user", "And this?", 1)]
    if name == "onevision":  # two pictures in one prompt would be one tile each
        turns[0], first = ("user", "What?", 0), None
    cache = model.init_kv_cache(1, 900)
    begun = processor.chat(turns[:1], [first] if first else None)
    model(**{key: value for key, value in begun.items() if key != "attention_mask"}, kv_cache=cache)
    whole = processor.chat(turns, [image for image in (first, second) if image])
    read = begun["input_ids"].shape[1]
    assert torch.equal(whole["input_ids"][:, :read], begun["input_ids"])
    rest = processor.prepare(whole["input_ids"][:, read:].tolist(), [second])
    del rest["attention_mask"]
    continued = model.generate(**rest, kv_cache=cache, max_new_tokens=5)
    assert torch.equal(continued, model.generate(**whole, max_new_tokens=5))


def test_scores_are_those_of_the_logits(made, name):
    model, processor, reference = made.pair(name)
    inputs = processor.chat([("user", "What?")], [photo(40, 61)])
    answers = [[50, 51, 2], [60, 2]]
    scores = model.score(answers, **inputs)
    for answer, score in zip(answers, scores, strict=True):
        more = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
        logits = reference(**theirs_of(model, {"input_ids": ids, **more})).logits[0, -len(answer) - 1 : -1]
        assert abs(logits.log_softmax(-1)[range(len(answer)), answer].sum() - score) < 1e-4


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("name", ["interleave", "onevision"])
def test_biases_are_kept_by_quantised_layers(made, name, quantize):
    """Biases of queries and keys are large in real checkpoints: without them nothing would be right."""
    model, processor, _ = made.pair(name)
    small = llava.load(str(made.folder(name)), device="cpu", dtype=torch.float32, quantize=quantize)[0]
    for ours, theirs in zip(small.llama.blocks, model.llama.blocks, strict=True):
        for letter in ("wq", "wk", "wv"):
            layer, plain = getattr(ours.attention, letter), getattr(theirs.attention, letter)
            nothing = layer(torch.zeros(2, 3, layer.in_features))
            torch.testing.assert_close(nothing, plain.bias.float().expand(2, 3, -1))
    inputs = processor.chat([("user", "What?")], [photo(40, 61)])
    assert torch.cosine_similarity(small(**inputs).logits, model(**inputs).logits.float(), dim=-1).min() > 0.8


def test_biases_are_kept_by_packed_layers(made):
    plain = llava.load(str(made.folder("interleave")), device="cpu", dtype=torch.bfloat16)[0]
    with torch.inference_mode():
        packed, processor = llava.load(str(made.folder("interleave")), device="cpu", dtype=torch.bfloat16)
        inputs = processor.chat([("user", "What?")], [photo(40, 61)])
        torch.testing.assert_close(packed(**inputs).logits, plain(**inputs).logits, rtol=0.05, atol=0.3)
        layer = packed.llama.blocks[0].attention.wq
        torch.testing.assert_close(layer(torch.zeros(1, 48, dtype=torch.bfloat16))[0], layer.bias)


def test_the_vocabulary_may_be_resized(made, name):
    model, processor, _ = made.pair(name)
    again = llava.load(str(made.folder(name)), device="cpu", dtype=torch.float64)[0]
    rows = again.config.text_config.vocab_size
    again.resize_token_embeddings(rows + 3)
    inputs = processor.chat([("user", "What?")], [photo(40, 61)])
    close(again(**inputs).logits[..., :rows], model(**inputs).logits, 1e-12)


def test_the_first_patch_is_dropped_where_there_is_no_class_token(made):
    """Mantis was trained so: "default" takes the first position away, whatever it is."""
    model, processor, _ = made.pair("mantis")
    pixels = processor.prepare([[processor.image_id]], [photo(40, 61)])["pixel_values"]
    default = model.get_image_features(pixels)
    full = model.get_image_features(pixels, vision_feature_select_strategy="full")
    assert default.shape[1] == 15 and torch.equal(default, full[:, 1:]) and model.feature_counts(pixels) == [15]


def test_what_a_kind_of_text_has():
    """Biases: Qwen2's queries, keys and values alone. A window: Mistral's alone. The tensors of a model say the same."""
    for kind, biased, window in (("llama", False, None), ("mistral", False, 4096), ("qwen2", True, None)):
        sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        config = llama.TextConfig(**{**llama.TextConfig.KINDS[kind], **sizes, "num_key_value_heads": 1})
        names = {name.removeprefix("blocks.0.") for name in llama.Llama(config).state_dict() if name.endswith("bias")}
        assert names == ({f"attention.{name}.bias" for name in ("wq", "wk", "wv")} if biased else set())
        assert config.sliding_window == window


# ----------------------------------------------------------------------------------------------------------------
# Llama 3.1's frequencies


@pytest.mark.parametrize("theta, head_dim, numbers", [
    (500000.0, 128, [8.0, 1.0, 4.0, 8192]), (10000.0, 8, [8.0, 1.0, 4.0, 64]), (5e5, 64, [32.0, 1.0, 4.0, 8192]),
])  # fmt: skip
def test_frequencies_are_the_references_bit_for_bit(theta, head_dim, numbers):
    rope = dict(zip(weights.ROPES["llama3"], numbers, strict=True))
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": theta, **rope},
    )  # fmt: skip
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    ours = llama.frequencies(llama.TextConfig(head_dim=head_dim, rope_theta=theta, rope_scaling=numbers))
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    if head_dim == 128:
        plain = llama.frequencies(llama.TextConfig(head_dim=128, rope_theta=theta))
        kept, slowed = int((ours == plain).sum()), int((ours == plain / 8).sum())
        assert (kept, slowed) == (29, 29)  # and six between


def test_frequencies_are_computed_once_and_stay_in_float32(made, monkeypatch):
    model, processor, _ = made.pair("joycaption")
    monkeypatch.setattr(llama, "frequencies", None)
    model.generate(**processor.chat([("user", "What?")], [photo(40, 61)]), max_new_tokens=2)
    assert model.llama.frequencies.dtype == torch.float32
    assert not any("frequencies" in name for name in model.state_dict())


# ----------------------------------------------------------------------------------------------------------------
# What a config says, and what it leaves to its class


def config_of(made, name, tmp_path, **changes):
    """The config of a folder whose config.json is changed at the top; ... takes a field out."""
    folder = tmp_path / "changed"
    shutil.copytree(made.folder(name), folder)
    values = json.loads((folder / "config.json").read_text())
    for field, value in changes.items():
        if isinstance(value, dict):
            values[field] = {k: v for k, v in (values[field] | value).items() if v is not ...}
        elif value is ...:
            values.pop(field, None)
        else:
            values[field] = value
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("kind", ["Llava", "VipLlava", "LlavaNext", "LlavaOnevision"])
def test_what_is_absent_is_the_classs_default(tmp_path, kind):
    from extras import checks

    theirs = getattr(transformers, f"{kind}Config")()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": theirs.model_type}))
    config = weights.read_config(
        tmp_path, llava.LlavaConfig, llama.TextConfig, vision.VisionConfig, checks.clean
    )  # fmt: skip
    assert config.text_config.model_type == theirs.text_config.model_type
    assert config.vision_config.model_type == theirs.vision_config.model_type
    for ours, other, names in (
        (config, theirs, ("image_token_index", "vision_feature_layer", "vision_feature_select_strategy",
                          "image_grid_pinpoints", "vision_aspect_ratio", "video_token_index",
                          "projector_layernorm_eps")),
        (config.vision_config, theirs.vision_config, ("hidden_size", "intermediate_size", "num_hidden_layers",
                                                      "num_attention_heads", "image_size", "patch_size",
                                                      "layer_norm_eps", "hidden_act")),
        (config.text_config, theirs.text_config, ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps",
                                                  "num_hidden_layers", "num_key_value_heads", "sliding_window",
                                                  "max_position_embeddings", "eos_token_id")),
    ):  # fmt: skip
        for field in names:
            if hasattr(other, field):
                mine, his = getattr(ours, field), getattr(other, field)
                assert mine == (list(his) if isinstance(his, tuple) else his), field


@pytest.mark.parametrize("window, expected", [(None, None), (7, 7), (..., 4096)])
def test_a_null_window_is_none_and_an_absent_one_the_default(made, tmp_path, window, expected):
    folder = config_of(made, "next-mistral", tmp_path, text_config={"sliding_window": window, "layer_types": ...})
    assert llava.load(str(folder), device="cpu")[0].config.text_config.sliding_window == expected


def test_a_window_that_is_off_hides_nothing(made, tmp_path):
    """Qwen2's files hold one that is switched off, Phi-3's as a Llama one that a Llama has not."""
    folder = config_of(made, "next-qwen", tmp_path, text_config={"sliding_window": 4, "layer_types": ...})
    assert llava.load(str(folder), device="cpu")[0].config.text_config.sliding_window is None


@pytest.mark.parametrize("name, changes, words", [
    ("next-qwen", {"text_config": {"use_sliding_window": True}}, "use_sliding_window is True"),
    ("next-vicuna", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
    ("onevision", {"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy is 'default'"),
    ("onevision", {"vision_aspect_ratio": "square"}, "vision_aspect_ratio is 'square'"),
    ("next-vicuna", {"image_grid_pinpoints": []}, "image_grid_pinpoints"),
    ("next-vicuna", {"image_grid_pinpoints": [[28, 57]]}, "image_grid_pinpoints holds [28, 57]"),
    ("next-vicuna", {"image_grid_pinpoints": [[28 * 1000, 28 * 1000]]}, "image_grid_pinpoints holds"),
    ("next-vicuna", {"image_grid_pinpoints": "all"}, "image_grid_pinpoints"),
    ("next-vicuna", {"image_grid_pinpoints": [[28, 56]]}, "image_grid_pinpoints"),  # not the preprocessor's
    ("joycaption", {"text_config": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}}},
     "rope_scaling is 'yarn'"),
    ("joycaption", {"text_config": {"rope_parameters": {"rope_type": "llama3", "factor": 4.0, "rope_theta": 5e5}}},
     "rope_scaling lacks low_freq_factor"),
    ("joycaption", {"text_config": {"rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0, "rope_theta": 5e5,
        "original_max_position_embeddings": 64}}}, "high_freq_factor"),
    ("joycaption", {"text_config": {"rope_parameters": {
        "rope_type": "llama3", "factor": "8", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5,
        "original_max_position_embeddings": 64}}}, "factor is '8'"),
    ("vipllava", {"projector_layernorm_eps": -1.0}, "projector_layernorm_eps is -1.0"),
    ("interleave", {"text_config": {"model_type": "granite"}}, "text_config.model_type is 'granite'"),
    ("interleave", {"vision_config": {"model_type": "pixtral"}}, "vision_config.model_type is 'pixtral'"),
    ("interleave", {"model_type": "llava_next_video"}, "describes a"),
])  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name_before_the_weights(made, tmp_path, name, changes, words):
    folder = config_of(made, name, tmp_path, **changes)
    (folder / "model.safetensors").unlink()  # what is wrong with the config is said first
    with pytest.raises(ValueError) as refused:
        llava.load(str(folder), device="cpu")
    assert words in str(refused.value) and "config.json" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_video_token_in_a_prompt_is_refused(made):
    _, processor, _ = made.pair("onevision")
    with pytest.raises(ValueError, match="the token of a video"):
        processor("<video>\nWhat happens?")
    with pytest.raises(ValueError, match="the token of a video"):
        processor(f"{processor.image_token}<video>\nWhat happens?", photo(40, 40))
    assert processor.chat([("user", "<video>")])  # typed, it is text


def test_the_image_token_is_the_tokenizers_own(made):
    _, processor, _ = made.pair("joycaption")
    assert processor.image_token == "<|reserved_special_token_69|>"
    with pytest.raises(ValueError, match=r"holds 0 <\|reserved_special_token_69\|> and 1 pictures"):
        processor("What?", photo(40, 40))


def test_the_end_of_a_turn_ends_an_answer(made, monkeypatch):
    """Whatever eos_token_id says: in the published files of some it is another token."""
    model, processor, _ = made.pair("llama-3")
    end = processor.tokenizer.id("<|eot_id|>")
    assert model.config.eos_token_ids == [2, end]
    said = iter([[50], [end], [51], [52]])

    def sample(logits, *_):
        return torch.tensor(next(said))

    monkeypatch.setattr(llama, "sample", sample)
    ids = model.generate(**processor.chat([("user", "What?")]), max_new_tokens=4)
    assert ids.tolist() == [[50, end]]


@pytest.mark.parametrize("wrong, words", [
    (None, "image_sizes are missing"), (torch.tensor([[40, 61], [40, 61]]), "image_sizes"),
    (torch.tensor([[400, 400]]), "image"), (torch.tensor([[0, 5]]), "image_sizes"),
    (torch.tensor([40, 61]), "image_sizes"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["next-vicuna", "onevision"])
def test_sizes_that_do_not_belong_to_the_pixels_are_refused(made, name, wrong, words):
    model, processor, _ = made.pair(name)
    inputs = processor.chat([("user", "What?")], [photo(28, 28)]) | {"image_sizes": wrong}
    for call in (model, lambda **inputs: model.generate(**inputs, max_new_tokens=2)):
        with pytest.raises(ValueError, match=words):
            call(**inputs)
