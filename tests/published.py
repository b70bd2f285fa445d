"""The three published checkpoints, as facts about the world: their configs, tensors and shards."""

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
DTYPES = {  # tower, projector and language model as stored: BakLlava's files are mixed
    "7b": (torch.float16, torch.float16),
    "13b": (torch.float16, torch.float16),
    "bakllava": (torch.float32, torch.bfloat16),
}
PUBLISHED = {  # tensors, metadata.total_size, bytes of numbers in each shard (the last ones to three digits of a GB)
    "7b": (686, 14_126_854_144, [4_992_864_256, 4_957_863_936, 4_176_125_952]),
    "13b": (758, 26_702_989_312, [4.96e9, 4.97e9, 4.88e9, 4.93e9, 4.93e9, 2.02e9]),
    "bakllava": (686, 15_740_502_016, [4.89e9, 5.00e9, 4.92e9, 0.934e9]),
}


def tensors(config, tower_dtype, text_dtype):
    """Names, shapes and dtypes in the order of the published files,
    written out here by themselves, apart from weights.py.
    """
    tower, text = config["vision_config"], config["text_config"]
    width, inner = tower["hidden_size"], tower["intermediate_size"]
    start = "vision_tower.vision_model."
    shapes = {
        f"{start}embeddings.class_embedding": [width],
        f"{start}embeddings.patch_embedding.weight": [width, 3, tower["patch_size"], tower["patch_size"]],
        f"{start}embeddings.position_embedding.weight": [(tower["image_size"] // tower["patch_size"]) ** 2 + 1, width],
        f"{start}pre_layrnorm.weight": [width],
        f"{start}pre_layrnorm.bias": [width],
    }
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
    shapes |= {"multi_modal_projector.linear_1.weight": [wide, width], "multi_modal_projector.linear_1.bias": [wide]}
    shapes |= {"multi_modal_projector.linear_2.weight": [wide, wide], "multi_modal_projector.linear_2.bias": [wide]}
    start = "language_model.model."
    shapes[f"{start}embed_tokens.weight"] = [text["vocab_size"], wide]
    for i in range(text.get("num_hidden_layers", 32)):
        block = f"{start}layers.{i}."
        for name, rows in {"q": wide, "k": narrow, "v": narrow, "o": wide}.items():
            shapes[f"{block}self_attn.{name}_proj.weight"] = [rows, wide]
        shapes |= {f"{block}mlp.gate_proj.weight": [inner, wide], f"{block}mlp.up_proj.weight": [inner, wide]}
        shapes |= {f"{block}mlp.down_proj.weight": [wide, inner]}
        shapes |= {f"{block}input_layernorm.weight": [wide], f"{block}post_attention_layernorm.weight": [wide]}
    shapes |= {f"{start}norm.weight": [wide], "language_model.lm_head.weight": [text["vocab_size"], wide]}
    return [(name, shape, tower_dtype if i < seen else text_dtype) for i, (name, shape) in enumerate(shapes.items())]


def nbytes(shape, dtype):
    return torch.Size(shape).numel() * dtype.itemsize
