"""Random checkpoints in the published layout, made by transformers, which is the oracle of these tests.

The published weights are not needed: a network of the same build with other sizes and random numbers exercises every
line.
"""

import argparse
import json
import shutil
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig
from transformers.utils import logging

logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"
FAMILIES = ("llama", "mistral")
EDGE, PATCH = 28, 7  # a picture is 4 x 4 patches
FEATURES = (EDGE // PATCH) ** 2
TOKENIZER = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
IMAGE, PAD = TOKENIZER.token_to_id("<image>"), TOKENIZER.token_to_id("<pad>")
VOCABULARY = -(-TOKENIZER.get_vocab_size() // 64) * 64

PREPROCESSOR = {  # the published preprocessor_config.json, for a smaller picture
    "crop_size": {"height": EDGE, "width": EDGE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": EDGE},
}


def reference_config(family, text=None, vision=None, **top):
    """transformers' config of a small LLaVA: llama, or mistral with fewer key-value heads and a short window."""
    sizes = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    if family == "llama":
        language = LlamaConfig(**{**sizes, **(text or {})})
    else:
        sizes |= {"num_key_value_heads": 2, "sliding_window": 12, "head_dim": 8}
        language = MistralConfig(**{**sizes, **(text or {})})
    tower = {
        "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": EDGE, "patch_size": PATCH,
    }  # fmt: skip
    tower = CLIPVisionConfig(**{**tower, **(vision or {})})
    top = {"image_token_index": IMAGE, "pad_token_id": PAD, **top}
    return LlavaConfig(vision_config=tower, text_config=language, **top)


def published_names(model):
    """A transformers model's tensors under the names that llava-hf publishes (layout A)."""
    names = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("model.")
        name = (
            name.replace("language_model.", "language_model.model.", 1) if name.startswith("language_model.") else name
        )
        name = (
            name.replace("vision_tower.", "vision_tower.vision_model.", 1) if name.startswith("vision_tower.") else name
        )
        names["language_model." + name if name.startswith("lm_head.") else name] = tensor.contiguous()
    return names


def make_checkpoint(folder, family="llama", seed=0, dtype=torch.float32, scale=4.0, **changes):
    """Write a random checkpoint in the published layout. scale:
    of the initial weights, so that attention is not flat.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = reference_config(family, **changes)
    model = LlavaForConditionalGeneration(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            else:  # norms and biases that are not 1 and 0, or one left out would not be noticed
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_file(published_names(model), folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlavaForConditionalGeneration"]
    (folder / "config.json").write_text(config.to_json_string())
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    shutil.copy(TINY / "tokenizer.json", folder)
    return folder


def load_reference(folder, dtype=torch.float64, attention="sdpa"):
    """The oracle on a checkpoint. "eager" only where attention weights are asked for: it gives NaN at padding in
    float64.
    """
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


def expanded(input_ids, attention_mask=None, size=FEATURES):
    """What transformers 5's processor makes of ids (B, T) with one <image> for each picture:
    `size` of them, padded again.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = []
    for ids, real in zip(input_ids.tolist(), mask.tolist(), strict=True):
        rows.append([i for i, r in zip(ids, real, strict=True) if r for i in [i] * (size if i == IMAGE else 1)])
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a small random checkpoint, to try things on.")
    parser.add_argument("folder", help="where to; it is made if it is not there")
    parser.add_argument("family", nargs="?", choices=FAMILIES, default="llama", help="(default: %(default)s)")
    options = parser.parse_args()
    make_checkpoint(options.folder, options.family)
