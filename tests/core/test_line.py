"""The line of LLaVAs, each kind beside transformers: every stage, and everything that works for LLaVA-1.5."""

import importlib
import json
import shutil

import line
import parity
import published
import pytest
import torch
import transformers
from checkpoints import rename
from inputs import close
from line import TILED, photo
from reference import published_names
from safetensors.torch import load_file, save_file

import llama
import llava
import vision
import weights
from extras import family, packed, recorded, speed

SIZES = [(40, 61), (28, 28), (90, 33), (300, 21)]  # with rows trimmed, with columns, nearly nothing


@pytest.fixture(params=line.params())
def name(request):
    return request.param


def theirs_of(model, inputs):
    """The reference's arguments for ours."""
    ids, mask = model.prompt_ids(**inputs)
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
            if len(own) == 2:
                assert alone["pixel_values"].shape[:2] == (2, 1)
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
    """OneVision's cannot be built without torchvision; its two parts can."""
    model, processor, _ = made.pair(name)
    llava.save(model, processor, tmp_path / "saved")
    text, image = processor.prompt("What?"), photo(40, 61)
    inputs = processor(text, image)
    ids = model.prompt_ids(**inputs)[0]
    if name == "onevision":
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
        pictures = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")
        token, number = processor.image_token, int((ids == model.config.image_token_index).sum())
        found = tokenizer(text.replace(token, token * number), return_tensors="pt")
        found = {**found, **pictures(image, return_tensors="pt")}
    else:
        theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "saved", use_fast=False)
        found = theirs(text=text, images=image, return_tensors="pt")
    assert torch.equal(found["input_ids"], ids)
    assert torch.equal(found["pixel_values"].float(), inputs["pixel_values"])
    assert name not in TILED or torch.equal(found["image_sizes"], inputs["image_sizes"])


@pytest.mark.slow
def test_what_transformers_saves_is_read(made, name, tmp_path):
    """Its own names of tensors and fields, its own split; and where it can be built, its processor's files."""
    model, processor, reference = made.pair(name)
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len([*tmp_path.glob("model-*.safetensors")]) > 1
    if name == "onevision":
        for file in ("tokenizer.json", "preprocessor_config.json"):
            shutil.copy(made.folder(name) / file, tmp_path)
    else:
        llava.save(model, processor, tmp_path / "ours")
        transformers.AutoProcessor.from_pretrained(tmp_path / "ours", use_fast=False).save_pretrained(tmp_path)
        assert "image_processor" in json.loads((tmp_path / "processor_config.json").read_text())
    again, reader = llava.load(str(tmp_path), device="cpu", dtype=torch.float64)
    inputs = processor.chat([("user", "What?")], [photo(40, 61)])
    found = reader.chat([("user", "What?")], [photo(40, 61)])
    assert {*found} == {*inputs} and all(torch.equal(found[key], inputs[key]) for key in inputs)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("layout", "BCDE")
def test_every_layout_is_read(made, layout, tmp_path):
    """As versions of transformers, and the authors, name tensors, the newline and SigLIP's unused end among them."""
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
            moved[rename(tensor, layout)] = value
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


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_layers_compute_with_the_numbers_that_they_hold(made, name, quantize):
    """As a plain model does whose matrices are what these layers make of single inputs, near those of the file."""
    small, processor = llava.load(str(made.folder(name)), device="cpu", dtype="float32", quantize=quantize)
    plain, _ = llava.load(str(made.folder(name)), device="cpu", dtype="float32")
    layers = [(path, layer) for path, layer in plain.llama.named_modules() if isinstance(layer, torch.nn.Linear)]
    assert len(layers) == 7 * len(plain.llama.blocks) + 1
    with torch.no_grad():
        for path, layer in layers:
            held = small.llama.get_submodule(path)(torch.eye(layer.in_features))
            held = (held if layer.bias is None else held - layer.bias).T.contiguous()
            away = (held - layer.weight).norm() / layer.weight.norm()
            assert 1e-4 < away < (0.01 if quantize == "int8" or path == "head" else 0.12), path
            layer.weight = torch.nn.Parameter(held)
    inputs = processor.chat([("user", "What?")], [photo(40, 61)])
    ours, theirs = small(**inputs).logits, plain(**inputs).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.std().item())
    assert torch.equal(small.generate(**inputs, max_new_tokens=5), plain.generate(**inputs, max_new_tokens=5))


@pytest.mark.skipif(not packed.PackedLinear.works(torch.bfloat16), reason="this processor does not multiply bfloat16")
def test_packed_layers_give_the_same_numbers(made, name, monkeypatch):
    """With their biases, where a kind has some; after which each answers as the plain ones do."""
    monkeypatch.setitem(speed.FIXED, "products", "packed")
    plain = llava.load(str(made.folder(name)), device="cpu", dtype=torch.bfloat16)[0]
    with torch.inference_mode():
        laid_out, processor = llava.load(str(made.folder(name)), device="cpu", dtype=torch.bfloat16)
        assert {type(block.attention.wq) for block in laid_out.llama.blocks} == {packed.PackedLinear}
        for ours, theirs in zip(laid_out.llama.blocks, plain.llama.blocks, strict=True):
            for letter in ("wq", "wk", "wv", "wo"):
                x = torch.randn(3, ours.attention.wq.in_features, dtype=torch.bfloat16)
                layer, twin = getattr(ours.attention, letter), getattr(theirs.attention, letter)
                torch.testing.assert_close(layer(x), twin(x), rtol=0.02, atol=0.02)
        inputs = processor.chat([("user", "What?")], [photo(40, 61)])
        found, expected = laid_out(**inputs).logits.float(), plain(**inputs).logits.float()
        assert (found - expected).norm() < 0.05 * expected.norm()
        assert laid_out.generate(**inputs, max_new_tokens=3).shape[0] == 1


COMPILED = ("joycaption", "onevision")  # with frequencies of its own, and with biases and tied: by the compiler itself


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_recorded_step_is_the_plain_step(made, name, quantize, monkeypatch):
    """Behind a picture, across the edge of a window; what is recorded is run by Python itself in most kinds."""
    if name not in COMPILED or not any(map(shutil.which, ("g++", "clang++", "c++"))):
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function, **more: compile(function, backend="eager", **more))
        monkeypatch.setattr(recorded, "check_compiler", lambda device: None)
    settings = dict(device="cpu", dtype="float32", quantize=quantize)
    fast, processor = llava.load(str(made.folder(name)), **settings, compile=True)
    plain, _ = llava.load(str(made.folder(name)), **settings)
    inputs = processor.chat([("user", "What?")], [photo(40, 61)])
    monkeypatch.setattr(recorded, "WINDOW", plain.prompt_ids(**inputs)[0].shape[1] + 3)
    torch._dynamo.reset()
    cache = fast.init_kv_cache(1, 3 * recorded.WINDOW)
    found = fast.generate(**inputs, max_new_tokens=8, kv_cache=cache)
    assert torch.equal(found, plain.generate(**inputs, max_new_tokens=8)) and found.shape == (1, 8)
    assert len(fast.llama.run.recorded.functions) == 2  # so both windows have been recorded


QUICK = ("interleave-0.5b", "v1.6-mistral-7b", "onevision-7b")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in published.FAMILY]


@pytest.mark.parametrize("known", ALL)
def test_memory_is_judged_before_a_byte_of_weights(tmp_path, monkeypatch, known):
    """By the published config: what has a byte too few for all numbers is refused. A scale of int4 takes some bits."""
    from extras import checks

    (tmp_path / "config.json").write_text(json.dumps(published.FAMILY[known]))
    read = weights.read_config(tmp_path, llava.LlavaConfig, llama.TextConfig, vision.VisionConfig, checks.clean)
    with torch.device("meta"):
        model = llava.Llava(read)
    everything, head = published.COUNTED[known][1], model.llama.head.weight.numel()
    matrices = sum(x.weight.numel() for x in model.llama.blocks.modules() if isinstance(x, torch.nn.Linear))
    rest = 2 * (everything - matrices - (0 if read.tie_word_embeddings else head)) + head  # that is 8 bits in both
    for quantize_to, least, most in (
        (None, 2 * everything, 2 * everything),
        ("int8", rest + matrices, rest + int(1.01 * matrices)),
        ("int4", rest + matrices // 2, rest + int(0.65 * matrices)),
    ):
        limits = iter([(most, "this machine"), (least - 1, "this machine")])
        monkeypatch.setattr(speed.memory, "limit", lambda processes, limits=limits: next(limits))
        speed.check_before_download(model, torch.device("cpu"), torch.bfloat16, quantize_to)
        with pytest.raises(ValueError, match=r"the weights take \d+\.\d GB in bfloat16 and the cpu has"):
            speed.check_before_download(model, torch.device("cpu"), torch.bfloat16, quantize_to)


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
    assert default.shape[1] == 15 and model.feature_counts(pixels) == [15]
    torch.testing.assert_close(default, full[:, 1:], rtol=1e-12, atol=1e-12)  # products of 15 and of 16 rows


def test_what_a_kind_of_text_has():
    """Biases: Qwen2's queries, keys and values. A window: Mistral's alone. The tensors of a model say the same."""
    for kind, biased, window in (("llama", False, None), ("mistral", False, 4096), ("qwen2", True, None)):
        sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        config = llama.TextConfig(**{**llama.TextConfig.KINDS[kind], **sizes, "num_key_value_heads": 1})
        names = {name.removeprefix("blocks.0.") for name in llama.Llama(config).state_dict() if name.endswith("bias")}
        assert names == ({f"attention.{name}.bias" for name in ("wq", "wk", "wv")} if biased else set())
        assert config.sliding_window == window


def test_any_mode_is_converted(made):
    """SigLIP's published files have do_convert_rgb null."""
    folder = made.folder("interleave")
    assert json.loads((folder / "preprocessor_config.json").read_text())["do_convert_rgb"] is None
    processor, image = made.pair("interleave")[1], photo(40, 61)
    for mode in ("RGBA", "P", "L"):
        pixels = processor.prepare([[processor.image_id]], [image.convert(mode)])["pixel_values"]
        plain = processor.prepare([[processor.image_id]], [image.convert(mode).convert("RGB")])["pixel_values"]
        assert torch.equal(pixels, plain)


def test_a_tied_text_is_tied_whoever_says_so(made, tmp_path):
    folder = config_of(
        made, "next-qwen", tmp_path, tie_word_embeddings=False, text_config={"tie_word_embeddings": True}
    )
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = llava.load(str(folder), device="cpu")[0]
    assert model.llama.head.weight is model.llama.embed.weight


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


@pytest.mark.parametrize("name", ["llama-3", "interleave", "next-vicuna", "onevision"])
def test_numbers_of_pictures_that_a_file_leaves_out_are_its_classs(made, tmp_path, name):
    """SigLIP's class has a mean of its own, OneVision's has CLIP's."""
    folder, file = config_of(made, name, tmp_path), "preprocessor_config.json"
    values = json.loads((folder / file).read_text())
    left = {key: value for key, value in values.items() if key not in ("image_mean", "image_std")}
    (folder / file).write_text(json.dumps(left))
    _, processor = llava.load(str(folder), device="cpu")
    module = {"CLIP": "clip", "Siglip": "siglip", "LlavaNext": "llava_next", "LlavaOnevision": "llava_onevision"}
    kind = values["image_processor_type"].removesuffix("ImageProcessor")
    place = importlib.import_module(f"transformers.models.{module[kind]}.image_processing_pil_{module[kind]}")
    theirs = getattr(place, f"{kind}ImageProcessorPil")()
    config = processor.preprocess_config
    assert [*config.image_mean] == [*theirs.image_mean] and [*config.image_std] == [*theirs.image_std]


@pytest.mark.parametrize("name", published.FAMILY)
def test_the_published_tensors_are_those_of_the_model(tmp_path, name):
    """Each of them, by name and shape, from the published config; and every parameter has one."""
    from extras import checks

    config, kinds = published.FAMILY[name], published.DTYPES[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = weights.read_config(tmp_path, llava.LlavaConfig, llama.TextConfig, vision.VisionConfig, checks.clean)
    with torch.device("meta"):
        expected = {key: list(value.shape) for key, value in llava.Llava(read).state_dict().items()}
    found = {weights.our_name(key): shape for key, shape, _ in published.tensors(config, *kinds)}
    if read.tie_word_embeddings:
        found["llama.head.weight"] = found["llama.embed.weight"]
    assert found == expected
    back = {weights.translate(key, weights.THEIRS) for key in expected}
    theirs = {key for key, *_ in published.tensors(config, *kinds)}
    assert back - {"language_model.lm_head.weight"} == theirs - {"language_model.lm_head.weight"}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ("interleave-0.5b", "onevision-7b") else pytest.mark.slow)
    for name in published.CONFIGS | published.FAMILY
])  # fmt: skip
def test_the_published_tensors_are_those_of_transformers(name):
    """By name and shape, from its own classes on the meta device; so many, and so many numbers, as are counted."""
    config = (published.CONFIGS | published.FAMILY)[name]
    cls = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model = cls(cls.config_class(**{key: value for key, value in config.items() if value is not None}))
    theirs = {key: list(tensor.shape) for key, tensor in published_names(model).items()}
    if config.get("tie_word_embeddings"):
        del theirs["language_model.lm_head.weight"]
    entries = published.tensors(config, *published.DTYPES[name])
    assert {key: list(shape) for key, shape, _ in entries} == theirs and len(entries) == len(theirs)
    if name in published.COUNTED:
        assert published.COUNTED[name] == (len(entries), sum(torch.Size(shape).numel() for _, shape, _ in entries))


@pytest.mark.parametrize("name", published.SHARDS)
def test_published_files_are_as_large_as_their_dtypes_say(name):
    """Of two the shards tell that the projector is in float32: in 16 bits they would be smaller."""
    entries = published.tensors(published.FAMILY[name], *published.DTYPES[name])
    sizes = [sum(published.nbytes(*entry[1:]) for entry in part) / 1e9 for part in published.cut(entries)]
    assert [round(size, 2) for size in sizes] == published.SHARDS[name]
    kinds = {"tower": set(), "projector": set(), "model": set(), "newline": set()}
    for key, _, dtype in entries:
        next(found for part, found in kinds.items() if part in key.split(".")[0]).add(dtype)
    assert all(len(found) <= 1 for found in kinds.values())
    assert (kinds["projector"] == {torch.float32}) == (name in ("llama-3-8b", "phi-3-mini"))


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
    ("vipllava", {"vision_feature_layers": [-2, -4, 1], "vision_feature_layer": [-1, -3, 0]},
     "vision_feature_layer is [-1, -3, 0], and vision_feature_layers [-2, -4, 1]"),
    ("onevision", {"video_token_id": 5}, "video_token_index is"),
    ("interleave", {"projector_layernorm_eps": 1e-5}, "the field projector_layernorm_eps = 1e-05 is none of a llava's"),
    ("interleave", {"image_grid_pinpoints": [[28, 56]]}, "the field image_grid_pinpoints = [[28, 56]] is none of a"),
    ("interleave", {"vision_feature_layers": -2}, "the field vision_feature_layers = -2 is none of a llava's"),
    ("interleave", {"video_token_id": 5}, "the field video_token_id = 5 is none of a llava's"),
    ("next-vicuna", {"vision_aspect_ratio": "anyres_max_9"}, "vision_aspect_ratio = 'anyres_max_9' is none of a"),
    ("vipllava", {"image_grid_pinpoints": [[28, 56]]}, "image_grid_pinpoints = [[28, 56]] is none of a vipllava's"),
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


@pytest.mark.parametrize("name, changes", [
    ("vipllava", {"vision_feature_select_strategy": "full"}),
    ("vipllava", {"multimodal_projector_bias": False}),
    ("vipllava", {"vision_feature_layer": ..., "vision_feature_layers": [-2, -4, 1]}),
    ("interleave", {"image_grid_pinpoints": [], "vision_aspect_ratio": None}),
    ("onevision", {"video_token_index": ..., "video_token_id": 5}),
])  # fmt: skip
def test_a_field_that_a_class_does_not_have_changes_nothing(made, tmp_path, name, changes):
    """ViP-LLaVA always leaves the class token out and has a bias; and other names of fields are as good."""
    folder = config_of(made, name, tmp_path, **changes)
    model, processor = llava.load(str(folder), device="cpu", dtype=torch.float64)
    inputs = processor.chat([("user", "What?")], [photo(40, 61)])
    close(model(**inputs).logits, line.reference(folder)(**theirs_of(model, inputs)).logits)
    assert "video_token_id" not in changes or model.config.video_token_index == 5
    llava.save(model, processor, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    theirs = getattr(transformers, saved["architectures"][0]).config_class()
    assert all(hasattr(theirs, field) for field in family.SOME if field in saved)


def test_a_single_layer_of_vipllava_is_saved_and_read(tmp_path):
    folder = line.make(tmp_path / "one", "vipllava", vision_feature_layer=-2)
    model, processor = llava.load(str(folder), device="cpu", dtype=torch.float64)
    llava.save(model, processor, tmp_path / "saved")
    again, _ = llava.load(str(tmp_path / "saved"), device="cpu", dtype=torch.float64)
    inputs = processor.chat([("user", "What?")], [photo(40, 61)])
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    close(model(**inputs).logits, line.reference(tmp_path / "saved")(**theirs_of(model, inputs)).logits)


@pytest.mark.parametrize("edge", [20, 32, 56])
def test_tiles_that_would_be_scaled_again_are_refused(made, tmp_path, edge):
    """Their edges would be cropped, and the whole is not at the scale of the tower."""
    folder = config_of(made, "next-vicuna", tmp_path)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"shortest_edge": edge}}))
    with pytest.raises(ValueError, match=rf"preprocessor_config.json: size is .*{edge}.*, and must be 28"):
        llava.load(str(folder), device="cpu")


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
