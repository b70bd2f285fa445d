"""Leftovers of other programs in a config.json: what passes changes nothing, as transformers' logits show."""

import dataclasses
import json
import shutil

import pytest
import torch
from checkpoints import load, refusal
from reference import EDGE, FEATURES, IMAGE, load_reference

import llama
import llava
import vision
import weights
from extras import leftovers

SIZES = {  # of the models of these tests, which a trainer would write
    "max_sequence_length", "seq_length", "n_positions", "model_max_length", "seq_len", "max_seq_len", "max_seq_length",
    "original_max_position_embeddings", "max_length",
}  # fmt: skip
VALUES = {
    "keys_to_ignore_at_inference": ["past_key_values"], "_attn_implementation": "sdpa", "group_size_ratio": 0.25,
    "_attn_implementation_internal": "sdpa", "attn_implementation": "sdpa", "model_name": "unsloth/llava",
    "unsloth_version": "2026.8.1", "transformers.js_config": {"dtype": {"fp16": 1}}, "export_model_type": "llava",
    "resume_path": "runs/7", "generation_config": {"max_length": 20}, "router_aux_loss_coef": 0.001,
    "problem_type": "regression", "id2label": {"0": "A", "1": "B"}, "label2id": {"A": 0, "B": 1}, "num_labels": 2,
    "classifier_dropout": 0.5, "pruned_heads": {"0": [1]}, "finetuning_task": "sst", "prefix": "x", "dropout": 0.5,
    "auto_map": {"AutoModel": "modeling.Llava"}, "tokenizer_class": "LlamaTokenizer", "description": "a llama",
    "bad_words_ids": [[5]], "task_specific_params": {"a": {"b": 1}}, "begin_suppress_tokens": [5],
    "suppress_tokens": [5], "num_image_tokens": 576, "exponential_decay_length_penalty": [5, 1.1],
}  # fmt: skip
OUTPUT = {"output_attentions", "output_hidden_states", "return_dict", "torchscript"}  # what the reference returns


def value(name):
    return VALUES.get(name, 64 if name in SIZES else True)


def logits(model):
    ids = torch.tensor([[1, 5, *[IMAGE] * FEATURES, 6, 7]])
    image = torch.randn(1, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=image.to(model.dtype)).logits


@pytest.fixture(scope="module")
def plain(checkpoints):
    """family → (its logits, transformers'), without any leftover."""
    return {
        family: (logits(load(folder, torch.float64)), logits(load_reference(folder)))
        for family, folder in checkpoints.items()
    }


def check_nothing_changes(copy, plain, family="llama"):
    """Our logits and transformers' are as they are without."""
    ours, theirs = plain[family]
    assert torch.equal(logits(load(copy.write(), torch.float64)), ours)
    assert torch.equal(logits(load_reference(copy.folder)), theirs)


def add(copy, fields):
    """fields: {place: {name: value}}."""
    return copy.config(**fields.get(leftovers.TOP, {}), **{
        place: fields[place] for place in (leftovers.TEXT, leftovers.TOWER) if place in fields})  # fmt: skip


@pytest.mark.parametrize("program", leftovers.PROGRAMS)
def test_what_a_program_leaves_changes_nothing(copy, plain, program):
    places = leftovers.PROGRAMS[program]
    add(copy, {place: {name: value(name) for name in names} for place, names in places.items()})
    check_nothing_changes(copy, plain)


@pytest.mark.parametrize("place", [leftovers.TOP, leftovers.TEXT, leftovers.TOWER])
def test_what_every_version_of_transformers_leaves_changes_nothing(copy, plain, place):
    add(copy, {place: {name: value(name) for name in leftovers.TRANSFORMERS - OUTPUT}})
    check_nothing_changes(copy, plain)


def test_no_field_that_is_read_is_in_the_list():
    classes = {leftovers.TOP: llava.LlavaConfig, leftovers.TEXT: llama.TextConfig, leftovers.TOWER: vision.VisionConfig}
    for place, cls in classes.items():
        names = {field.name for field in dataclasses.fields(cls)} | weights.IGNORED | {*weights.TEXT_FIXED}
        assert not leftovers.leftover(place) & names
    assert not {"hidden_size", "rope_scaling", "quantization_config", "image_token_id"} & leftovers.leftover("the top")


@pytest.mark.parametrize("fields, words", [
    ({"unsloth_optimized": True, "resume": "x"}, "the field resume = 'x'"),
    ({"text_config": {"resume_path": "x"}}, "text_config: the field resume_path"),  # of the top alone
    ({"vision_config": {"is_llama_config": True}}, "vision_config: the field is_llama_config"),
    ({"keys_to_ignore": ["past_key_values"]}, "the field keys_to_ignore = "),
])  # fmt: skip
def test_a_field_that_nobody_is_known_to_leave_there_is_refused(copy, fields, words):
    assert words in refusal(copy.config(**fields).folder)


def test_weights_by_itself_knows_none_of_them(copy):
    copy.config(unsloth_version="2026.8.1")
    with pytest.raises(ValueError, match="the field unsloth_version = "):
        weights.read_config(copy.folder, llava.LlavaConfig, llama.TextConfig, vision.VisionConfig)


@pytest.mark.parametrize("name", ["model_name", "resume_path", "some_note"])
def test_an_empty_string_is_as_good_as_absent(copy, plain, name):
    check_nothing_changes(copy.config(**{name: ""}), plain)


# ----------------------------------------------------------------------------------------------------------------
# Copies


@pytest.mark.parametrize("fields", [
    {"hidden_size": 48},  # LLaMA-Factory, ms-swift: for DeepSpeed
    {"hidden_size": 32, "num_attention_heads": 4},  # the tower's
    {"image_size": EDGE, "num_hidden_layers": 3, "num_key_value_heads": 6, "head_dim": 8},  # two of these by default
    {"rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 512},
    {"text_config": {"image_token_id": IMAGE, "vision_feature_layer": -2, "multimodal_projector_bias": True}},
    {"vision_config": {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}},
])  # fmt: skip
def test_a_copy_that_says_the_same_passes(copy, plain, fields):
    check_nothing_changes(copy.config(**fields), plain)


def test_a_copy_of_what_is_absent_passes_if_it_is_the_default(copy):
    """As in the published 7B, whose text_config leaves its hidden_size out."""
    values = json.loads((copy.folder / "config.json").read_text())
    del values["text_config"]["hidden_size"], values["text_config"]["intermediate_size"]
    values = leftovers.clean(values | {"hidden_size": 4096, "intermediate_size": 11008}, "config.json")
    assert "hidden_size" not in values and "intermediate_size" not in values
    values["text_config"]["model_type"] = "mistral"
    assert "intermediate_size" not in leftovers.clean(values | {"intermediate_size": 14336}, "config.json")
    with pytest.raises(ValueError, match=r"intermediate_size is 11008 at the top, and 14336 in text_config"):
        leftovers.clean(values | {"intermediate_size": 11008}, "config.json")


@pytest.mark.parametrize("fields, words", [
    ({"hidden_size": 64}, "hidden_size is 64 at the top, and 48 in text_config and 32 in vision_config"),
    ({"image_size": 336}, f"image_size is 336 at the top, and {EDGE} in vision_config"),
    ({"rope_theta": 500000.0}, "rope_theta is 500000.0 at the top, and 10000.0 in text_config"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu' at the top, and 'silu' in text_config and 'quick_gelu'"),
    ({"text_config": {"vision_feature_layer": -1}}, "vision_feature_layer is -1 in text_config, and -2 at the top"),
    ({"vision_config": {"vision_feature_select_strategy": "full"}}, "is 'full' in vision_config, and 'default' at"),
    ({"text_config": {"image_token_index": 7}}, f"image_token_index is 7 in text_config, and {IMAGE} at the top"),
    ({"image_token_id": 7}, f"image_token_index is {IMAGE}, and image_token_id 7"),
])  # fmt: skip
def test_a_copy_that_differs_is_refused_with_both_values(copy, fields, words):
    message = refusal(copy.config(**fields).folder)
    assert words in message and "config.json" in message


# ----------------------------------------------------------------------------------------------------------------
# Values that mean the default

ROPE = {"rope_theta": 10000.0}


@pytest.mark.parametrize("text", [
    {"partial_rotary_factor": 1.0},
    {"layer_types": ["full_attention"] * 3},
    {"hidden_act": "swish"},
    {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0, **ROPE}},
    {"rope_parameters": {"rope_type": "default", "factor": 4.0, **ROPE}},
    {"rope_parameters": {"rope_type": "linear", "factor": 1.0, **ROPE}},
    {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 1.0}, **ROPE},
    {"rope_parameters": ..., "rope_scaling": {"rope_type": "default"}, **ROPE},
])  # fmt: skip
def test_a_value_that_means_the_default_changes_nothing(copy, plain, text):
    check_nothing_changes(copy.config(text_config=text), plain)


def test_the_kind_of_each_layer_passes_where_it_is_that_of_the_window(checkpoints, tmp_path, plain):
    folder = shutil.copytree(checkpoints["mistral"], tmp_path / "mistral")
    values = json.loads((folder / "config.json").read_text())
    for kind, passes in {"sliding_attention": True, "full_attention": False}.items():
        values["text_config"]["layer_types"] = [kind] * 3
        (folder / "config.json").write_text(json.dumps(values))
        if passes:
            assert torch.equal(logits(load(folder, torch.float64)), plain["mistral"][0])
        else:
            assert "layer_types" in refusal(folder)


@pytest.mark.parametrize("text, words", [
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, **ROPE}}, "partial_rotary_factor"),
    ({"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "layer_types"),
    ({"layer_types": "full_attention"}, "layer_types"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, **ROPE}}, "rope_scaling is 'linear'"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 1.0, **ROPE}},  # far out not
     "rope_scaling is 'dynamic'"),
])  # fmt: skip
def test_a_value_that_means_something_else_is_refused(copy, text, words):
    assert words in refusal(copy.config(text_config=text).folder)


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
OLD_AND_NEW = [  # rope_scaling, rope_parameters
    ({"type": "default"}, LLAMA3 | ROPE),
    ({"rope_type": "default", "factor": 4.0}, LLAMA3 | {"rope_theta": 500.0}),
    (LLAMA3, {"rope_type": "default", "rope_theta": 5e5}),
    (LLAMA3, LLAMA3 | {"factor": 2.0, "rope_theta": 77.0}),
    ({"rope_type": "default", "rope_theta": 2e4}, {"rope_type": "default", "rope_theta": 5e5}),
    ({"type": "linear", "factor": 1.0}, LLAMA3 | ROPE),
    ({"rope_type": "default"}, {"rope_type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5}),
    ({}, LLAMA3 | ROPE),
    (None, LLAMA3 | {"rope_theta": 5e5}),
]


@pytest.mark.parametrize("beside", [{}, {"rope_theta": 3e4}])
@pytest.mark.parametrize("old, new", OLD_AND_NEW)
def test_the_old_place_counts_whole_and_alone_unless_it_is_empty(copy, old, new, beside):
    check_the_same(copy.config(text_config={"rope_scaling": old, "rope_parameters": new} | beside))


def check_the_same(copy):
    """Our logits are transformers', to the last digits of float64."""
    assert (logits(load(copy.write(), torch.float64)) - logits(load_reference(copy.folder))).abs().max() < 1e-9


@pytest.mark.parametrize("text", [
    {"rope_scaling": LLAMA3 | {"partial_rotary_factor": 1.0}, "rope_parameters": ...},
    {"rope_parameters": LLAMA3 | ROPE | {"partial_rotary_factor": 1.0}},  # as transformers 5 writes it
    {"rope_parameters": LLAMA3 | ROPE, "partial_rotary_factor": 1.0},
    {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}, "partial_rotary_factor": 0.5},  # the one inside counts
    {"rope_parameters": LLAMA3 | ROPE | {"type": "yarn"}},
    {"rope_parameters": ROPE | {name.removeprefix("rope_"): value for name, value in LLAMA3.items()}},
])  # fmt: skip
def test_a_scaling_is_read_in_each_of_its_spellings(copy, text):
    check_the_same(copy.config(text_config=text))


@pytest.mark.parametrize("inside, beside, length", [
    ({}, {}, 512), ({}, {"max_position_embeddings": 64}, 64),  # of the context
    ({}, {"original_max_position_embeddings": 64}, 64),
    ({"original_max_position_embeddings": 64}, {"original_max_position_embeddings": 99}, 99),
    ({"original_max_position_embeddings": 64}, {"max_position_embeddings": 99}, 64),
])  # fmt: skip
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_the_length_that_was_trained_may_stand_beside_the_scaling(copy, place, inside, beside, length):
    scaling = {name: value for name, value in LLAMA3.items() if not name.startswith("original")} | inside
    check_the_same(copy.config(text_config={"rope_parameters": ..., "rope_theta": 1e4, place: scaling} | beside))
    assert load(copy.folder).config.text_config.rope_scaling == [8.0, 1.0, 4.0, length]


@pytest.mark.parametrize("inside", [ROPE | {"rope_type": "default"}, LLAMA3 | ROPE])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_a_copy_of_the_scaling_is_compared_by_what_it_means(copy, inside, place):
    copy.config(text_config={"rope_parameters": inside})
    alone = logits(load(copy.write(), torch.float64))
    bare = {name: value for name, value in inside.items() if name != "rope_theta"}
    for same in (inside, bare, bare | {"partial_rotary_factor": 1.0}, inside | {"rope_theta": 10000}, {}, None):
        assert torch.equal(logits(load(copy.config(**{place: same}).folder, torch.float64)), alone)
    for other in (inside | {"rope_theta": 5e5}, LLAMA3 | {"factor": 2.0}, {"type": "linear", "factor": 2.0}, "x", [1]):
        message = refusal(copy.config(**{place: other}).folder)
        assert f"{place} is {other!r} at the top, and {{'rope_" in message and "make them the same" in message


def test_what_stands_in_a_scaling_does_not_take_the_place_of_another_field(copy):
    """transformers does not read it there at all."""
    message = refusal(copy.config(text_config={"rope_parameters": LLAMA3 | ROPE | {"rms_norm_eps": 0.5}}).folder)
    assert "rope_scaling.rms_norm_eps = 0.5 is not known here" in message


def test_a_default_rope_keeps_its_base(copy):
    copy.config(text_config={"rope_parameters": {"rope_type": "default", "factor": 4.0, "rope_theta": 500.0}})
    assert load(copy.write()).config.text_config.rope_theta == 500.0
    assert torch.allclose(logits(load(copy.folder, torch.float64)), logits(load_reference(copy.folder)), atol=1e-9)


OFF = [
    {}, {"load_in_8bit": False, "load_in_4bit": False},
    {"quant_method": "bitsandbytes", "_load_in_4bit": False, "_load_in_8bit": False, "llm_int8_threshold": 6.0,
     "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float32", "llm_int8_skip_modules": ["lm_head"]},
    {"llm_int8_skip_modules": ["lm_head"]},
]  # fmt: skip


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("place", ["top", "text_config"])
def test_a_quantisation_in_which_all_is_off_passes(copy, plain, off, place):
    field = {"quantization_config": off}
    copy.config(**(field if place == "top" else {place: field}))
    assert torch.equal(logits(load(copy.write(), torch.float64)), plain["llama"][0])
