"""What other programs leave in a config.json without an effect on what the model computes.

Trainers, converters and every age of transformers write fields of their own into it. weights.py knows what the
published files hold and refuses the rest, as it might change what should be computed; this is the list of what does
not, by program and by place, each with the line of that program that writes it. transformers 5.23 computes the same
logits with all of them: the test compares. Nothing is here because it looks harmless.

Four more kinds are taken: a field of one place that stands again in another and says the same; a value that means the
default; what is said about positions, in any of its spellings; a quantization_config in which everything is switched
off.
"""

import dataclasses

import llama
import llava
import vision
import weights

TRANSFORMERS = {  # in every config, at every place, written by one version or another when it saves in full
    "add_cross_attention", "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "dropout", "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label", "is_composition", "label2id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "prefix", "problem_type",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class",
    "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16",
    "_flash_attn_2_enabled",  # 4.34, 4.35: modeling_utils.py:1323
    "_attn_implementation_autoset",  # 4.46 to 4.52
    "gradient_checkpointing",  # an old keyword of every config: configuration_utils.py:386
}  # fmt: skip
TOP, TEXT, TOWER = "the top", "text_config", "vision_config"
PROGRAMS = {  # program → place → fields
    "transformers, of other models": {  # LlavaNextConfig, LlavaOnevisionConfig; Qwen2Config
        TOP: {"num_image_tokens", "use_image_newline_parameter"},
        TEXT: {"description", "max_window_layers"},
    },
    "LLaMA-Factory": {  # model_utils/attention.py:39,97; v1/core/model_engine.py:171 (reward models)
        TOP: {"_attn_implementation", "_attn_implementation_internal", "num_labels", "classifier_dropout"},
        TEXT: {"_attn_implementation", "num_labels", "classifier_dropout"},
        TOWER: {"_attn_implementation"},
    },
    "ms-swift": {
        TOP: {
            "keys_to_ignore_at_inference", "num_labels",  # swift/model/register.py:219,238
            "max_sequence_length", "seq_length", "n_positions", "model_max_length", "seq_len", "max_seq_len",
            "max_seq_length",  # utils/hf_config.py:152, model/models/llava.py:304
            "group_size_ratio",  # tuners/longlora/longlora.py:72: of attention while it trains
            "use_flash_attn",  # model/utils.py:50
            "router_aux_loss_coef",  # trainers/seq2seq_trainer.py:117: a loss of experts, of which there are none
        },
        TEXT: {
            "max_sequence_length", "seq_length", "n_positions", "model_max_length", "seq_len", "max_seq_len",
            "max_seq_length", "use_flash_attn",
        },
        TOWER: {"use_flash_attn"},
    },
    "unsloth": {  # models/_utils.py:3490, models/vision.py:1448; zoo: patching_utils.py:549; what they publish again
        TOP: {"unsloth_version", "unsloth_fixed", "unsloth_optimized", "model_name"},
        TEXT: {"unsloth_version", "unsloth_fixed", "unsloth_optimized", "model_name"},
        TOWER: {"unsloth_version", "unsloth_fixed", "unsloth_optimized"},
    },
    "axolotl": {TOP: {"num_labels"}},  # core/builders/causal.py:443
    "xtuner": {TEXT: {"original_max_position_embeddings"}},  # convert_phi_to_llama.py:26 leaves Phi-3's; see rope
    "nanotron": {  # config/models_config.py: LlamaConfig.is_llama_config, as in SmolLM2
        TOP: {"is_llama_config"},
        TEXT: {"is_llama_config"},
    },
    "optimum, transformers.js": {  # exporters/tasks.py:1035; dtypes of ONNX files
        TOP: {"export_model_type", "transformers.js_config"},
        TEXT: {"export_model_type", "transformers.js_config"},
    },
    "AutoAWQ, VILA": {TOP: {"max_seq_len", "resume_path"}, TEXT: {"max_seq_len"}},  # awq/models/base.py:619; builder.py
    "mlx-vlm": {TOP: {"generation_config"}},  # utils.py:90: the whole object
}  # fmt: skip
# TRL, PEFT, mergekit, DeepSpeed, accelerate: nothing that weights.py does not know


def leftover(place):
    """The fields without an effect at a place of config.json."""
    return TRANSFORMERS.union(*(places.get(place, set()) for places in PROGRAMS.values()))


def clean(values, where):
    """The values of a config.json without all of this. Raises ValueError for a copy that differs from its original.

    where: the file's name, for messages.
    """
    parts = {TOP: {**values}, TEXT: {**(values.get(TEXT) or {})}, TOWER: {**(values.get(TOWER) or {})}}
    settle_rope(parts[TEXT])
    for place, part in parts.items():
        for name in leftover(place) & {*part}:
            del part[name]
        if "quantization_config" in part and is_off(part["quantization_config"]):
            del part["quantization_config"]
    drop_defaults(parts[TEXT])
    drop_copies(parts, where)
    return parts[TOP] | {name: parts[name] for name in (TEXT, TOWER) if values.get(name) is not None}


# ----------------------------------------------------------------------------------------------------------------
# Values that mean the default

SWITCHES = {"load_in_8bit", "load_in_4bit", "_load_in_8bit", "_load_in_4bit"}  # of bitsandbytes
DETAILS = ("llm_int8_", "bnb_4bit_")  # how the beginnings of its other fields are spelled


def is_off(quantization):
    """Whether a quantization_config says that nothing is quantised, as BitsAndBytesConfig() does when it is saved."""
    if not quantization:
        return True
    if not isinstance(quantization, dict) or quantization.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return False
    others = [name for name, value in quantization.items() if value and name not in SWITCHES | {"quant_method"}]
    return not any(map(quantization.get, SWITCHES)) and all(name.startswith(DETAILS) for name in others)


def drop_defaults(text):
    """Take out of a text_config, in place, what only says that the default holds."""
    if text.get("hidden_act") == "swish":  # another name of the same function
        text["hidden_act"] = "silu"
    default = weights.kind_of(llama.TextConfig, text).get("sliding_window")  # None of a kind that has no window
    windowed = default is not None and text.get("sliding_window", default) is not None
    layers = text.get("layer_types")  # which layers see a window: there is one rule for all of them here
    if isinstance(layers, list) and all(kind == ("sliding" if windowed else "full") + "_attention" for kind in layers):
        del text["layer_types"]


# ----------------------------------------------------------------------------------------------------------------
# Positions, which have an old place and a new one, several spellings, and fields beside them

PLACES = ("rope_scaling", "rope_parameters")


def rope(text):
    """What a text_config says about positions, as the reference reads it (convert_rope_params_to_dict) → one dict, in
    which two that mean the same are equal. Of the old place and the new the old one, unless empty, counts whole and
    alone; what it lacks stands beside it, or is the default.
    """
    given = text.get("rope_scaling") or text.get("rope_parameters") or {}
    full = filled(llama.TextConfig, weights.kind_of(llama.TextConfig, text) | text)
    beside = {"rope_theta": full["rope_theta"], "partial_rotary_factor": text.get("partial_rotary_factor")}
    meant = beside | {name: value for name, value in given.items() if value is not None}
    kind = meant.pop("type", None)
    kind = meant.setdefault("rope_type", kind or "default")
    if kind == "default" or (kind == "linear" and meant.get("factor") == 1):
        # of what stands beside it only these mean anything
        meant = {"rope_type": "default"} | {name: meant[name] for name in beside}
    if kind == "llama3":
        name = "original_max_position_embeddings"  # the one beside it goes before the one in it
        meant[name] = text.get(name) or meant.get(name, full["max_position_embeddings"])
    if meant["partial_rotary_factor"] in (None, 1):  # all of a head is rotated
        del meant["partial_rotary_factor"]
    return meant


def settle_rope(text):
    """Put what `rope` says in the place of all that a text_config says about positions."""
    meant = rope(text)
    for name in (*PLACES, "partial_rotary_factor"):
        text.pop(name, None)
    text["rope_theta"] = meant.pop("rope_theta")
    known = {name: meant.pop(name) for name in ("rope_type", *weights.ROPES["llama3"]) if name in meant}
    text |= {"rope_scaling": known} | {f"rope_scaling.{name}": value for name, value in meant.items()}  # to be refused


# ----------------------------------------------------------------------------------------------------------------
# Copies: a field that belongs to one place and stands in another, too


def drop_copies(parts, where):
    """Take copies out of {place: its values}, in place: the language model's and the tower's fields at the top, and
    the top's in those two. DeepSpeed looks for hidden_size at the top, so trainers put it there.
    """
    top, text, tower = parts[TOP], parts[TEXT], parts[TOWER]
    for alias, name in weights.ALIASES.items():  # two names of one field
        if alias in top and top.get(name, top[alias]) != top[alias]:
            raise ValueError(f"{where}: {name} is {top[name]!r}, and {alias} {top[alias]!r}: make them the same")
    for name in PLACES:
        copy = top.pop(name, None)
        if copy and not (isinstance(copy, dict) and rope(text | {"rope_scaling": copy}) == rope(text)):
            raise ValueError(f"{where}: {name} is {copy!r} {at(TOP)}, and {rope(text)} {at(TEXT)}: make them the same")
    seen = weights.kind_of(vision.VisionConfig, tower) | (tower or weights.PUBLISHED_TOWER)
    meant = {
        TOP: filled(llava.LlavaConfig, {weights.ALIASES.get(name, name): value for name, value in top.items()}),
        TEXT: filled(llama.TextConfig, weights.kind_of(llama.TextConfig, text) | text) | weights.TEXT_FIXED,
        TOWER: filled(vision.VisionConfig, seen),
    }
    meant[TOP] = {name: value for name, value in meant[TOP].items() if name not in (TEXT, TOWER)}
    meant[TEXT]["partial_rotary_factor"] = 1.0  # another one is refused
    meant[TOP] |= {"image_token_id": meant[TOP]["image_token_index"], "projector_hidden_act": "gelu"}
    for place, part in parts.items():
        homes = [TEXT, TOWER] if place == TOP else [TOP]
        for name in sorted({*part} - {*meant[place]} - weights.IGNORED):
            there = {home: meant[home][name] for home in homes if name in meant[home]}
            if there and part[name] is not None and part[name] not in there.values():
                others = " and ".join(f"{value!r} {at(home)}" for home, value in there.items())
                raise ValueError(f"{where}: {name} is {part[name]!r} {at(place)}, and {others}: make them the same")
            if there:
                del part[name]


def at(place):
    return f"at {place}" if place == TOP else f"in {place}"


def filled(cls, values):
    """The fields of a config class, as the values and its defaults have them."""
    names = {field.name for field in dataclasses.fields(cls)}
    return vars(cls(**{name: value for name, value in values.items() if name in names and value is not None}))
