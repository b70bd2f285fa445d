"""config.json, generation_config.json and preprocessor_config.json:
what is filled in, what is honoured, what is refused.
"""

import json

import published
import pytest
import torch
from checkpoints import configs, load, read_config, refusal, same
from effort import effort
from pictures import picture
from reference import PREPROCESSOR, load_reference

import extras.hub
import extras.speed  # noqa: F401 (load imports them, and to do so takes calls that are not to be counted)
import llava
import vision
import weights


def test_the_published_configs_are_filled_from_the_class_defaults(tmp_path):
    tower = dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, num_channels=3,
        image_size=336,
        patch_size=14, layer_norm_eps=1e-5, hidden_act="quick_gelu", class_token=True, first_norm=True,
        patch_bias=False, model_type="clip_vision_model",
    )  # fmt: skip
    text = dict(
        model_type="llama", vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, head_dim=128, max_position_embeddings=4096, rms_norm_eps=1e-5,
        rope_theta=10000.0, rope_scaling=None, qkv_bias=False,
        sliding_window=None, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    wide = dict(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40,
    )  # fmt: skip
    mistral = dict(
        model_type="mistral", intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=32768,
        sliding_window=4096,
    )  # fmt: skip
    for name, expected in {"7b": text, "13b": text | wide, "bakllava": text | mistral}.items():
        config, preprocess = read_config(tmp_path, published.CONFIGS[name])
        assert vars(config.text_config) == expected
        assert vars(config.vision_config) == tower
        assert (config.image_token_index, config.pad_token_id, config.vision_feature_layer) == (32000, 32001, -2)
        assert (config.vision_feature_select_strategy, config.multimodal_projector_bias) == ("default", True)
        assert not config.tie_word_embeddings and not config.text_config.tie_word_embeddings
    assert (preprocess.resample, preprocess.rescale_factor) == (3, 1 / 255)


def test_the_class_defaults_are_those_of_transformers(tmp_path):
    """Of an empty text_config and vision_config; and of absent ones, for which LlavaConfig has a tower of its own."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MistralConfig

    tower = {"model_type": "clip_vision_model"}
    for kind, theirs in {"llama": LlamaConfig(), "mistral": MistralConfig()}.items():
        values = {"model_type": "llava", "text_config": {"model_type": kind}, "vision_config": tower}
        config, _ = read_config(tmp_path, values, edge=224)
        for ours, other in [(config.text_config, theirs), (config.vision_config, CLIPVisionConfig())]:
            for field, value in vars(ours).items():
                if field in ("class_token", "first_norm", "patch_bias", "qkv_bias", "rope_scaling"):
                    continue  # what makes one kind another, and stands in no file as it is here
                if field == "rope_theta":
                    assert value == other.rope_parameters["rope_theta"]
                elif field == "head_dim" and not getattr(other, "head_dim", None):
                    assert value == other.hidden_size // other.num_attention_heads
                else:
                    assert value == getattr(other, field, None), field
    config, _ = read_config(tmp_path, {"model_type": "llava"})
    for field, value in vars(config.vision_config).items():
        if field not in ("class_token", "first_norm", "patch_bias"):
            assert value == getattr(LlavaConfig().vision_config, field), field


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "llava_next_video", "architectures": ["LlavaNextVideoForConditionalGeneration"]}, "LlavaNextVideo"),
    ({"model_type": "pixtral", "architectures": None}, "pixtral"),
    ({"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "the authors' own format"),
    ({"text_config": {"model_type": "granite"}}, "text_config.model_type is 'granite'"),
    ({"text_config": {"model_type": "gemma"}}, "text_config.model_type is 'gemma'"),
    ({"text_config": {"model_type": "phi3"}}, "text_config.model_type is 'phi3'"),
    ({"vision_config": {"model_type": "pixtral"}}, "vision_config.model_type is 'pixtral'"),
    ({"vision_config": {"model_type": "siglip2_vision_model"}}, "vision_config.model_type is 'siglip2_vision_model'"),
    ({"text_config": {"use_sliding_window": True}}, "text_config: use_sliding_window is True"),
    ({"vision_config": {"hidden_act": "gelu"}}, "vision_config: hidden_act is 'gelu'"),
    ({"text_config": {"hidden_act": "gelu"}}, "text_config: hidden_act is 'gelu'"),
    ({"text_config": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": ...}},
     "text_config.rope_scaling"),
    ({"text_config": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}}, "rope_"),
    ({"text_config": {"attention_bias": True}}, "text_config: attention_bias is True"),
    ({"text_config": {"mlp_bias": True}}, "text_config: mlp_bias is True"),
    ({"text_config": {"quantization_config": {"bits": 4}}}, "text_config: by quantization_config"),
    ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
    ({"wholly_new": 1}, "the field wholly_new = 1"),
    ({"vision_config": {"wholly_new": "x"}}, "vision_config: the field wholly_new"),
    ({"text_config": {"hidden_size": "48"}}, "text_config: hidden_size is '48'"),
    ({"text_config": {"hidden_size": 48.5}}, "text_config: hidden_size is 48.5"),
    ({"text_config": {"hidden_size": True}}, "text_config: hidden_size is True"),
    ({"text_config": {"hidden_size": [48]}}, "text_config: hidden_size is [48]"),
    ({"text_config": {"rms_norm_eps": "small"}}, "text_config: rms_norm_eps"),
    ({"text_config": {"rms_norm_eps": float("nan")}}, "text_config: rms_norm_eps is nan"),
    ({"text_config": {"num_attention_heads": 0}}, "text_config: num_attention_heads is 0"),
    ({"text_config": {"num_hidden_layers": -1}}, "text_config: num_hidden_layers is -1"),
    ({"text_config": {"num_hidden_layers": 10**9}}, "text_config: num_hidden_layers is 1000000000"),
    ({"vision_config": {"num_hidden_layers": 10**9}}, "vision_config: num_hidden_layers is 1000000000"),
    ({"text_config": {"hidden_size": 10**12}}, "text_config: hidden_size is 1000000000000"),
    ({"text_config": {"vocab_size": 10**30}}, "text_config: vocab_size"),
    ({"text_config": {"head_dim": 2**24, "num_attention_heads": 2**24}}, "text_config: head_dim is 16777216"),
    ({"text_config": {"rms_norm_eps": -1e-5}}, "text_config: rms_norm_eps is -1e-05"),
    ({"text_config": {"rope_theta": 0, "rope_parameters": ...}}, "text_config: rope_theta is 0"),
    ({"vision_config": {"patch_size": 0}}, "vision_config: patch_size is 0"),
    ({"text_config": "x"}, "text_config is 'x'"),
    ({"vision_config": [1]}, "vision_config is [1]"),
    ({"text_config": {"rope_scaling": "x"}}, "rope_scaling is 'x'"),
    ({"text_config": {"rope_scaling": {"rope_type": "x", "type": "default"}}}, "rope_scaling is 'x'"),
    ({"text_config": {"model_type": ["llama"]}}, "text_config.model_type is ['llama']"),
    ({"model_type": None, "architectures": {"a": 1}}, "describes a None"),
    ({"model_type": None, "architectures": 5}, "describes a None"),
    ({"vision_config": {"num_attention_heads": 5}}, "multiple of num_attention_heads"),
    ({"text_config": {"num_key_value_heads": 4}}, "num_key_value_heads"),
    ({"text_config": {"head_dim": 7}}, "head_dim is"),
    ({"text_config": {"num_attention_heads": 256, "num_key_value_heads": 256, "head_dim": None}},
     "head_dim is"),
    ({"vision_feature_layer": [-2] * 3000}, "must hold 1 to 256 numbers"),
    ({"vision_feature_layer": -99}, "vision_feature_layer is [-99]"),
    ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy is 'cls'"),
    ({"vision_feature_layer": []}, "vision_feature_layer is []"),
    ({"vision_feature_layer": ["a"]}, "vision_feature_layer is ['a']"),
    ({"vision_feature_layer": [-2, 1.5]}, "vision_feature_layer is [-2, 1.5]"),
    ({"vision_config": {"image_size": 6}}, "image_size is smaller than patch_size"),
    ({"text_config": {"num_hidden_layers": 1000}}, "num_hidden_layers is 1000"),
    ({"text_config": {"rope_scaling": {"type": "dynamic"}, "rope_parameters": {"rope_type": "default"}}},
     "text_config.rope_scaling is 'dynamic'"),
    ({"vision_feature_layer": "last"}, "vision_feature_layer is 'last'"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
])  # fmt: skip
def test_a_config_that_cannot_be_honoured_is_refused_by_its_field(copy, changes, words):
    message, calls = effort(refusal, copy.config(**changes).folder)
    assert words in message and "config.json" in message
    assert calls < 20_000  # before anything is built


@pytest.mark.parametrize(
    "field, value", [("hidden_size", 2**24), ("intermediate_size", 2**24), ("num_hidden_layers", 100)]
)
def test_sizes_that_are_possible_but_not_those_of_the_files_are_refused_soon(copy, field, value):
    copy.config(text_config={field: value})
    message, calls = effort(refusal, copy.write())
    assert "tensor" in message and calls < 1_000_000


def test_a_folder_without_config_says_so(copy):
    (copy.folder / "config.json").unlink()
    assert f"{copy.folder} holds no config.json" in refusal(copy.folder)


SAVED_IN_FULL = {  # the fields that transformers 4.38 wrote into every (sub-)config that it saved in full
    "_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None,
    "begin_suppress_tokens": None, "bos_token_id": None, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None, "decoder_start_token_id": None,
    "diversity_penalty": 0.0, "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "eos_token_id": None, "exponential_decay_length_penalty": None, "finetuning_task": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20, "min_length": 0,
    "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False, "output_scores": False, "pad_token_id": None, "prefix": None, "problem_type": None,
    "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True,
    "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None, "task_specific_params": None,
    "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False, "tokenizer_class": None, "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": None, "torchscript": False, "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip


def test_a_config_that_transformers_4_38_saved_in_full_loads(copy, checkpoints):
    values = json.loads((copy.folder / "config.json").read_text())
    text = {"tie_word_embeddings": False, "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu"}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True}
    text |= {"rope_scaling": None, "rope_theta": 10000.0, "rope_parameters": ...}
    tower = {"tie_word_embeddings": True, "attention_dropout": 0.0, "hidden_act": "quick_gelu", "projection_dim": 512}
    tower |= {"initializer_factor": 1.0, "initializer_range": 0.02}
    copy.config(
        **SAVED_IN_FULL, tie_word_embeddings=False, ignore_index=-100, vocab_size=values["text_config"]["vocab_size"],
        transformers_version="4.38.2", text_config=SAVED_IN_FULL | text, vision_config=SAVED_IN_FULL | tower,
    )  # fmt: skip
    assert same(load(copy.write()), load(checkpoints["llama"]))


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def test_rope_theta_is_found_in_its_old_and_its_new_place(copy):
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": ...}
    for place in ({"rope_theta": 5e5, "rope_parameters": ...}, new):
        copy.config(text_config=place)
        assert configs(copy.folder)[0].text_config.rope_theta == 5e5


@pytest.mark.parametrize("old, new, expected", [
    ({"type": "default"}, {"rope_type": "llama3", "rope_theta": 5e5}, (1e4, None)),
    ({"rope_type": "default", "rope_theta": 2e4}, {"rope_type": "default", "rope_theta": 5e5}, (2e4, None)),
    (LLAMA3 | {"factor": 2.0}, LLAMA3 | {"rope_theta": 5e5}, (1e4, [2.0, 1.0, 4.0, 64])),
    ({}, LLAMA3 | {"rope_theta": 5e5}, (5e5, [8.0, 1.0, 4.0, 64])),
])  # fmt: skip
def test_the_old_place_of_a_scaling_counts_alone_unless_it_is_empty(copy, old, new, expected):
    """As in transformers' config: rope_scaling or rope_parameters."""
    copy.config(text_config={"rope_scaling": old, "rope_parameters": new})
    text = configs(copy.folder)[0].text_config
    assert (text.rope_theta, text.rope_scaling) == expected
    theirs = load_reference(copy.write()).config.text_config.rope_parameters
    numbers = [theirs[name] for name in weights.ROPES[theirs["rope_type"]]]
    assert (theirs["rope_theta"], numbers or None) == expected


@pytest.mark.parametrize("ids", [7, [7, 9]])
def test_generation_config_has_the_last_word_on_where_an_answer_ends(copy, ids):
    model = load(copy.config("generation_config.json", eos_token_id=ids).write())
    assert model.config.eos_token_ids == (ids if isinstance(ids, list) else [ids])


@pytest.mark.parametrize("ids", ["x", ["x"], [], {"a": 1}, 2.5, True, [2.5], [2, 10**30]])
def test_an_end_that_is_no_token_is_refused_by_its_field(copy, ids):
    assert "generation_config.json: eos_token_id" in refusal(
        copy.config("generation_config.json", eos_token_id=ids).write()
    )


def test_a_checkpoint_without_generation_config_loads(copy):
    (copy.folder / "generation_config.json").unlink()
    assert load(copy.write()).config.eos_token_ids == [2]


def test_an_end_that_generation_config_does_not_name_is_that_of_the_config(copy):
    """transformers takes no end at all then."""
    (copy.folder / "generation_config.json").write_text("{}")
    assert load(copy.write()).config.eos_token_ids == [2]
    assert load_reference(copy.folder).generation_config.eos_token_id is None
    assert load(copy.config(text_config={"eos_token_id": 7}).folder).config.eos_token_ids == [7]


def test_preprocessing_numbers_of_a_folder_that_transformers_5_saved(copy):
    """It writes no preprocessor_config.json: the numbers stand in processor_config.json."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

    numbers = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 1 / 256, "resample": 2}
    image_processor = CLIPImageProcessorPil(**{**PREPROCESSOR, **numbers})
    tokenizer = AutoTokenizer.from_pretrained(copy.folder)
    LlavaProcessor(image_processor, tokenizer, patch_size=7, num_additional_image_tokens=1).save_pretrained(
        copy.folder / "new"
    )
    (copy.folder / "preprocessor_config.json").unlink()
    (copy.folder / "new" / "processor_config.json").rename(copy.folder / "processor_config.json")
    assert not (copy.folder / "new" / "preprocessor_config.json").exists()
    _, processor = llava.load(copy.write(), device="cpu")
    config = processor.preprocess_config
    assert {name: getattr(config, name) for name in numbers} == numbers
    assert (config.size, config.crop_size) == ({"shortest_edge": 28}, {"height": 28, "width": 28})


def test_a_folder_without_preprocessing_numbers_is_refused(copy):
    (copy.folder / "preprocessor_config.json").unlink()
    (copy.folder / "processor_config.json").write_text('{"patch_size": 7, "processor_class": "LlavaProcessor"}')
    assert "preprocessor_config.json" in refusal(copy.folder)


@pytest.mark.parametrize("changes, words", [
    ({"image_processor_type": "Siglip2ImageProcessor"}, "Siglip2ImageProcessor"),
    ({"image_processor_type": "LlavaNextVideoImageProcessor"}, "LlavaNextVideoImageProcessor"),
    ({"image_processor_type": "PixtralImageProcessor"}, "PixtralImageProcessor"),
    ({"do_center_crop": False}, "do_center_crop is False"),
    ({"do_resize": False}, "do_resize is False"),
    ({"image_mean": "grey"}, "image_mean"),
    ({"image_mean": ["grey"]}, "image_mean"),
    ({"image_processor_type": 5}, "image_processor_type is 5"),
    ({"image_mean": [0.5, float("nan"), 0.5]}, "image_mean"),
    ({"image_mean": [0.5, float("inf"), 0.5]}, "image_mean"),
    ({"image_mean": [0.5]}, "image_mean and image_std must have 3 numbers"),
    ({"image_std": [0.5, 0.5, 0.5, 0.5]}, "image_mean and image_std must have 3 numbers"),
    ({"image_std": [0.5, 0, 0.5]}, "image_std is [0.5, 0, 0.5], out of range"),
    ({"resample": 6}, "out of range: it must be 0 to 5"),
    ({"resample": -1}, "out of range: it must be 0 to 5"),
    ({"size": {"shortest_edge": "28"}}, "size is {'shortest_edge': '28'}"),
    ({"size": {"shortest_edge": 10**9}}, "size is {'shortest_edge': 1000000000}"),
    ({"size": True}, "size"),
    ({"crop_size": {"height": 27, "width": 28}}, "crop_size"),
    ({"size": {"height": 28, "width": 28}, "crop_size": ...}, "crop_size {'height': 224, 'width': 224}"),  # its class's
    ({"size": {"height": 28, "width": 27}}, "size"),
    ({"wholly_new": 1}, "wholly_new"),
])  # fmt: skip
def test_preprocessing_that_cannot_be_honoured_is_refused_by_its_field(copy, changes, words):
    message = refusal(copy.config("preprocessor_config.json", **changes).folder)
    assert words in message and "preprocessor_config.json" in message


def test_other_names_and_notes_of_transformers_are_understood(copy):
    index = json.loads((copy.folder / "config.json").read_text())["image_token_index"]
    config = {"_attn_implementation_autoset": True}
    copy.config(image_token_index=..., image_token_id=index, text_config=config, vision_config=config, **config)
    assert load(copy.write()).config.image_token_index == index


# ----------------------------------------------------------------------------------------------------------------
# Two files that say the same thing: which one counts


def nest(copy, image_processor):
    """A processor_config.json beside the older file, as a second save by transformers 5 leaves it."""
    values = {"processor_class": "LlavaProcessor", "patch_size": 7, "image_processor": image_processor}
    (copy.folder / "processor_config.json").write_text(json.dumps(values))
    copy.write()
    return copy.folder


def theirs(folder, image):
    """The pixels that the reference makes of a picture with the numbers of a folder."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, use_fast=False)(image, return_tensors="pt")["pixel_values"]


def ours(folder, image):
    processor = llava.load(str(folder), device="cpu")[1]
    return processor.prepare([[processor.image_id]], [image])["pixel_values"]


@pytest.mark.parametrize("changes", [
    {"image_mean": [0.5] * 3}, {"resample": 2, "image_std": [0.5] * 3}, {"rescale_factor": 1 / 128}, {},
])  # fmt: skip
def test_the_nested_numbers_count_and_not_the_older_file(copy, changes):
    folder = nest(copy, PREPROCESSOR | changes)
    copy.config("preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    assert torch.equal(ours(folder, picture(40, 30)), theirs(folder, picture(40, 30)))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor"])
@pytest.mark.parametrize("step", ["do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb"])
def test_a_step_that_is_null_is_off(copy, step, kind, nested):
    """As in the reference: it is refused where a false is, and the pixels are the reference's where it is not. SigLIP's
    published files have do_convert_rgb null.
    """
    edge = {"height": 28, "width": 28}
    whole = {"size": edge, "do_center_crop": False} if kind.startswith("Siglip") else {}
    numbers = PREPROCESSOR | {"image_processor_type": kind} | whole | {step: None}
    image = picture(50, 30)

    def write(numbers):
        return nest(copy, numbers) if nested else copy.config("preprocessor_config.json", **numbers).write()

    if step == "do_convert_rgb" or (step == "do_center_crop" and whole):
        assert torch.equal(ours(write(numbers), image), theirs(copy.folder, image))
        return
    assert f"{step} is False" in refusal(write(numbers))
    null, off, on = (theirs(write(numbers | {step: value}), image) for value in (None, False, True))
    assert torch.equal(null, off) and not (null.shape == on.shape and torch.equal(null, on))


@pytest.mark.parametrize("name", ["image_mean", "image_std", "rescale_factor", "resample"])
def test_a_number_that_is_null_is_the_class_default(copy, name):
    """The reference fails over it."""
    image = picture(50, 30)
    plain = theirs(copy.folder, image)
    copy.config("preprocessor_config.json", **{name: None}).write()
    assert torch.equal(ours(copy.folder, image), plain)
    with pytest.raises(ValueError, match=r"must (both )?be specified"):
        theirs(copy.folder, image)


@pytest.mark.parametrize("nested", [{"image_mean": [0.5] * 3}, {}, {"size": {"shortest_edge": 28}}])
def test_nested_numbers_are_not_merged_with_the_older_file(copy, nested):
    """What is absent takes the class's default, a crop of 224 pixels: not this tower's."""
    folder = nest(copy, nested)
    assert theirs(folder, picture(40, 30)).shape[-2:] == (224, 224)
    message = refusal(folder)
    assert "processor_config.json: size" in message and "224" in message and "the 28 x 28 pixels" in message


@pytest.mark.parametrize("rest", [{"image_processor": None}, {"image_processor": ...}])
def test_without_nested_numbers_the_older_file_counts(copy, rest):
    folder = nest(copy, None)
    copy.config("processor_config.json", **rest)
    copy.config("preprocessor_config.json", image_mean=[0.5] * 3)
    assert torch.equal(ours(folder, picture(40, 30)), theirs(folder, picture(40, 30)))
    (folder / "preprocessor_config.json").unlink()
    assert "holds no preprocessor_config.json, and no image_processor" in refusal(folder)


def test_an_older_file_that_does_not_count_is_not_looked_at(copy):
    folder = nest(copy, PREPROCESSOR)
    (folder / "preprocessor_config.json").write_text("not JSON")
    assert torch.equal(ours(folder, picture(40, 30)), theirs(folder, picture(40, 30)))


@pytest.mark.parametrize("nested", ["x", [1], 3])
def test_nested_numbers_that_are_no_object_are_refused(copy, nested):
    assert f"processor_config.json: image_processor is {nested!r}, and must be an object" in refusal(nest(copy, nested))


def test_a_processor_config_that_is_no_json_is_refused_although_the_older_file_is_there(copy):
    folder = nest(copy, None)
    (folder / "processor_config.json").write_text("not JSON")
    assert "processor_config.json is not valid JSON" in refusal(folder)


@pytest.mark.parametrize("kind, pads", [
    ({"image_processor_type": "LlavaImageProcessor"}, True), ({"image_processor_type": ...}, True),
    ({"image_processor_type": "LlavaImageProcessorFast"}, True), ({"image_processor_type": None}, True),
    ({"image_processor_type": "CLIPImageProcessor"}, False),
    ({"image_processor_type": "CLIPImageProcessorFast"}, False),
    ({"image_processor_type": ..., "feature_extractor_type": "CLIPFeatureExtractor"}, False),
])  # fmt: skip
@pytest.mark.parametrize("place", ["nested", "older"])
def test_do_pad_counts_only_where_the_references_class_pads(copy, kind, pads, place):
    values = {name: value for name, value in (PREPROCESSOR | kind | {"do_pad": True}).items() if value is not ...}
    folder = nest(copy, values if place == "nested" else None)
    (folder / "preprocessor_config.json").write_text(json.dumps(values if place == "older" else PREPROCESSOR))
    image = picture(40, 30)
    plain = vision.preprocess(image, configs(folder)[1], pad=False)
    assert torch.equal(ours(folder, image), theirs(folder, image))
    assert torch.equal(ours(folder, image)[0], plain) != pads
