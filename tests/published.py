"""The published checkpoints, as facts about the world: their configs, tensors and shards.

CONFIGS are the three of LLaVA-1.5, as published. FAMILY are those after it: of some the whole file is known, of others,
as marked, what their converter and their text model's own config say.
"""

import torch

TOP = {
    "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001, "projector_hidden_act": "gelu", "transformers_version": "4.36.0.dev0",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default", "vocab_size": 32064,
}  # fmt: skip
TOWER = {
    "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
CONFIGS = {  # config.json as published: most of the sizes are left to the classes' defaults
    "7b": TOP | {"tie_word_embeddings": False, "torch_dtype": "float16", "vision_config": TOWER, "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096,
        "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
    }},
    "13b": TOP | {"tie_word_embeddings": False, "torch_dtype": "float16", "vision_config": TOWER, "text_config": {
        "_name_or_path": "meta-llama/Llama-2-13b-hf", "architectures": ["LlamaForCausalLM"], "hidden_size": 5120,
        "intermediate_size": 13824, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 40,
        "num_hidden_layers": 40, "num_key_value_heads": 40, "rms_norm_eps": 1e-05, "torch_dtype": "float16",
        "vocab_size": 32064,
    }},
    "bakllava": TOP | {"torch_dtype": "float32", "vision_config": TOWER, "text_config": {
        "_name_or_path": "mistralai/Mistral-7B-v0.1", "architectures": ["MistralForCausalLM"],
        "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "sliding_window": 4096, "torch_dtype": "bfloat16", "vocab_size": 32064,
    }},
}  # fmt: skip
SIGLIP = {
    "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 128000, "eos_token_id": 128001, "intermediate_size": 14336,
    "max_position_embeddings": 8192, "model_type": "llama", "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0, "vocab_size": 128320,
}  # fmt: skip
QWEN2 = {"model_type": "qwen2", "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "use_sliding_window": False}
INTERLEAVE = TOP | {
    "image_token_index": 151646, "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    "pad_token_id": None, "vision_config": SIGLIP, "vocab_size": 152000, "torch_dtype": "bfloat16",
}  # fmt: skip
NEXT = TOP | {
    "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next", "pad_token_id": None,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "use_image_newline_parameter": True, "vision_config": TOWER, "torch_dtype": "float16",
}  # fmt: skip
ONEVISION = {
    "architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision",
    "image_token_index": 151646, "video_token_index": 151647, "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9", "image_seq_length": 729,
    "projector_hidden_act": "gelu", "vision_config": SIGLIP, "torch_dtype": "float16",
    "image_grid_pinpoints": [[384 * high, 384 * wide] for high in range(1, 7) for wide in range(1, 7)],
}  # fmt: skip
FAMILY = {
    "interleave-0.5b": INTERLEAVE | {"tie_word_embeddings": True, "text_config": QWEN2 | {
        "bos_token_id": 151643, "eos_token_id": 151645, "hidden_size": 1024, "intermediate_size": 2816,
        "max_position_embeddings": 32768, "num_attention_heads": 16, "num_hidden_layers": 24,
        "num_key_value_heads": 16, "sliding_window": 32768, "tie_word_embeddings": True, "vocab_size": 152000,
    }},
    "interleave-7b": INTERLEAVE | {"text_config": QWEN2 | {  # by its text model, Qwen1.5-7B-Chat
        "bos_token_id": 151643, "eos_token_id": 151645, "hidden_size": 4096, "intermediate_size": 11008,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "sliding_window": 32768, "vocab_size": 152000,
    }},
    "llama-3-8b": TOP | {"image_token_index": 128257, "pad_token_id": 128258, "vocab_size": None,
                         "torch_dtype": "float16", "vision_config": TOWER | {"dropout": 0.0}, "text_config": LLAMA_3},
    "phi-3-mini": TOP | {"image_token_index": 32038, "pad_token_id": 32039, "vision_config": TOWER,  # by its converter
                         "torch_dtype": "float16", "text_config": {
        "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05,
        "original_max_position_embeddings": 4096, "sliding_window": 2047, "vocab_size": 32064,
    }},
    "joycaption": TOP | {  # by its ports
        "image_token_index": 128077, "image_seq_length": 729, "vision_feature_select_strategy": "full",
        "pad_token_id": 128004, "vocab_size": None, "torch_dtype": "bfloat16",
        "vision_config": SIGLIP | {"num_hidden_layers": 27}, "text_config": LLAMA_3 | {
            "max_position_embeddings": 131072, "vocab_size": 128256, "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}}},
    "vip-llava-7b": {key: value for key, value in TOP.items() if not key.startswith("vision_")} | {
        "architectures": ["VipLlavaForConditionalGeneration"], "model_type": "vipllava",
        "vision_feature_layers": [-2, -5, -8, -11, 6], "projector_layernorm_eps": 1e-05, "torch_dtype": "float16",
        "vision_config": TOWER, "text_config": CONFIGS["7b"]["text_config"] | {"pad_token_id": 0}},
    "v1.6-vicuna-7b": NEXT | {"text_config": CONFIGS["7b"]["text_config"] | {"pad_token_id": 0}},
    "v1.6-mistral-7b": NEXT | {"text_config": CONFIGS["bakllava"]["text_config"] | {
        "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2", "rope_theta": 1000000.0, "sliding_window": None}},
    "v1.6-vicuna-13b": NEXT | {"text_config": CONFIGS["13b"]["text_config"]},  # by its text model
    "llama3-next-8b": NEXT | {"image_token_index": 128256, "vocab_size": None, "text_config": LLAMA_3},  # likewise
    "onevision-0.5b": ONEVISION | {"tie_word_embeddings": True, "text_config": QWEN2 | {  # by its converter
        "bos_token_id": 151643, "eos_token_id": 151645, "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "num_attention_heads": 14, "num_hidden_layers": 24,
        "num_key_value_heads": 2, "sliding_window": 32768, "tie_word_embeddings": True, "vocab_size": 152000,
    }},
    "onevision-7b": ONEVISION | {"text_config": QWEN2 | {
        "bos_token_id": 151643, "eos_token_id": 151645, "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 32768, "num_attention_heads": 28, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "sliding_window": 131072, "vocab_size": 152128,
    }},
}  # fmt: skip
HUB = {  # name here → on the Hub
    "7b": "llava-hf/llava-1.5-7b-hf", "13b": "llava-hf/llava-1.5-13b-hf", "bakllava": "llava-hf/bakLlava-v1-hf",
    "interleave-0.5b": "llava-hf/llava-interleave-qwen-0.5b-hf",
    "interleave-7b": "llava-hf/llava-interleave-qwen-7b-hf",
    "llama-3-8b": "xtuner/llava-llama-3-8b-v1_1-transformers", "phi-3-mini": "xtuner/llava-phi-3-mini-hf",
    "joycaption": "fancyfeast/llama-joycaption-beta-one-hf-llava", "vip-llava-7b": "llava-hf/vip-llava-7b-hf",
    "v1.6-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf", "v1.6-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "v1.6-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf", "llama3-next-8b": "llava-hf/llama3-llava-next-8b-hf",
    "onevision-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    "onevision-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
}  # fmt: skip
COUNTED = {  # tensors and parameters by the shapes; the first two and the 7b of OneVision have them published, too
    "interleave-0.5b": (715, 864_031_264), "llama-3-8b": (686, 8_355_272_704), "phi-3-mini": (686, 4_137_176_064),
    "interleave-7b": (812, 8_141_100_576), "joycaption": (732, 8_464_752_496), "vip-llava-7b": (688, 7_080_214_528),
    "v1.6-vicuna-7b": (687, 7_063_431_168), "v1.6-mistral-7b": (687, 7_566_747_648),
    "v1.6-vicuna-13b": (759, 13_351_499_776), "llama3-next-8b": (687, 8_355_276_800),
    "onevision-0.5b": (716, 893_675_552), "onevision-7b": (765, 8_030_807_584),
}  # fmt: skip
DTYPES = {  # tower, language model, and projector if it has one of its own, as stored: some files are mixed
    "7b": (torch.float16, torch.float16),
    "13b": (torch.float16, torch.float16),
    "bakllava": (torch.float32, torch.bfloat16),
} | {name: (getattr(torch, config["torch_dtype"]),) * 2 for name, config in FAMILY.items()}
for name in ("llama-3-8b", "phi-3-mini"):  # by the sizes of their shards
    DTYPES[name] = *DTYPES[name], torch.float32
SHARDS = {  # GB of numbers in each file, to the digits that the Hub shows; of the others they are not known
    "interleave-0.5b": [1.73], "llama-3-8b": [5.00, 4.92, 5.00, 1.84], "phi-3-mini": [4.99, 3.31],
    "v1.6-mistral-7b": [4.92, 4.92, 4.92, 0.38],
}  # fmt: skip
PUBLISHED = {  # tensors, metadata.total_size, bytes of numbers in each shard (the last ones to three digits of a GB)
    "7b": (686, 14_126_854_144, [4_992_864_256, 4_957_863_936, 4_176_125_952]),
    "13b": (758, 26_702_989_312, [4.96e9, 4.97e9, 4.88e9, 4.93e9, 4.93e9, 2.02e9]),
    "bakllava": (686, 15_740_502_016, [4.89e9, 5.00e9, 4.92e9, 0.934e9]),
}


def cut(entries, limit=5_000_000_000):
    """Into shards, as transformers cut them in 2023: in order, a new one where the limit would be passed."""
    parts, size = [[]], 0
    for entry in entries:
        if size + nbytes(*entry[1:]) > limit:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += nbytes(*entry[1:])
    return parts


def tensors(config, tower_dtype, text_dtype, projector_dtype=None):
    """Names, shapes and dtypes in the order of the published files,
    written out here by themselves, apart from weights.py. projector_dtype: None, that of the language model.
    """
    tower, text = config["vision_config"], config["text_config"]
    width, inner = tower["hidden_size"], tower["intermediate_size"]
    start, clip = "vision_tower.vision_model.", tower["model_type"] == "clip_vision_model"
    patch, places = tower["patch_size"], (tower["image_size"] // tower["patch_size"]) ** 2
    shapes = {f"{start}embeddings.class_embedding": [width]} if clip else {}
    shapes |= {f"{start}embeddings.patch_embedding.weight": [width, 3, patch, patch]}
    shapes |= {} if clip else {f"{start}embeddings.patch_embedding.bias": [width]}
    shapes |= {f"{start}embeddings.position_embedding.weight": [places + clip, width]}
    shapes |= {f"{start}pre_layrnorm.weight": [width], f"{start}pre_layrnorm.bias": [width]} if clip else {}
    for i in range(tower["num_hidden_layers"]):
        block = f"{start}encoder.layers.{i}."
        linears = {f"self_attn.{name}_proj": [width, width] for name in ("k", "v", "q", "out")}
        parts = linears | {
            "layer_norm1": [width],
            "mlp.fc1": [inner, width],
            "mlp.fc2": [width, inner],
            "layer_norm2": [width],
        }
        for part, shape in parts.items():
            shapes |= {f"{block}{part}.weight": shape, f"{block}{part}.bias": shape[:1]}
    shapes |= {f"{start}post_layernorm.weight": [width], f"{start}post_layernorm.bias": [width]}
    seen = len(shapes)

    wide, inner = text.get("hidden_size", 4096), text.get("intermediate_size", 11008)
    heads = text.get("num_attention_heads", 32)
    narrow = wide * text.get("num_key_value_heads", heads) // heads
    if config["model_type"] == "vipllava":
        width *= len(config["vision_feature_layers"])
        norm = "multi_modal_projector.projector_layernorm"
        shapes |= {f"{norm}.weight": [width], f"{norm}.bias": [width]}
    shapes |= {"multi_modal_projector.linear_1.weight": [wide, width], "multi_modal_projector.linear_1.bias": [wide]}
    shapes |= {"multi_modal_projector.linear_2.weight": [wide, wide], "multi_modal_projector.linear_2.bias": [wide]}
    start, bridged = "language_model.model.", len(shapes)
    shapes[f"{start}embed_tokens.weight"] = [text["vocab_size"], wide]
    for i in range(text.get("num_hidden_layers", 32)):
        block = f"{start}layers.{i}."
        for name, rows in {"q": wide, "k": narrow, "v": narrow, "o": wide}.items():
            shapes[f"{block}self_attn.{name}_proj.weight"] = [rows, wide]
            if text["model_type"] == "qwen2" and name != "o":
                shapes[f"{block}self_attn.{name}_proj.bias"] = [rows]
        shapes |= {f"{block}mlp.gate_proj.weight": [inner, wide], f"{block}mlp.up_proj.weight": [inner, wide]}
        shapes |= {f"{block}mlp.down_proj.weight": [wide, inner]}
        shapes |= {f"{block}input_layernorm.weight": [wide], f"{block}post_attention_layernorm.weight": [wide]}
    shapes |= {f"{start}norm.weight": [wide], "language_model.lm_head.weight": [text["vocab_size"], wide]}
    if config.get("tie_word_embeddings"):
        del shapes["language_model.lm_head.weight"]
    if "image_grid_pinpoints" in config:
        shapes["image_newline"] = [wide]
    dtypes = [tower_dtype] * seen + [projector_dtype or text_dtype] * (bridged - seen)
    dtypes += [text_dtype] * (len(shapes) - bridged)
    return [(name, shape, dtype) for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True)]


def nbytes(shape, dtype):
    return torch.Size(shape).numel() * dtype.itemsize
