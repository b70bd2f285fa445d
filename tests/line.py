"""The line of LLaVAs: a small random checkpoint of each kind in the published layout, made by transformers, the oracle.

    python tests/line.py        how far ours is from it, kind by kind

Every number is random, also those that transformers begins at 0 or 1 (biases of queries and keys, the newline, norms):
in a checkpoint with its initial values one that is left out would not be noticed.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from reference import EDGE, PAD, PATCH, PREPROCESSOR, TINY, published_names
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import llava

GRIDS = [[EDGE, 2 * EDGE], [2 * EDGE, EDGE], [2 * EDGE, 2 * EDGE], [3 * EDGE, EDGE], [EDGE, 3 * EDGE]]
FINE = [[EDGE * high, EDGE * wide] for high in range(1, 7) for wide in range(1, 7)]
CLIP = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4,
        "num_attention_heads": 4, "image_size": EDGE, "patch_size": PATCH}  # fmt: skip
SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False}
TEXT = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}  # fmt: skip
LLAMA, MISTRAL, QWEN2 = ({**TEXT, "model_type": name} for name in ("llama", "mistral", "qwen2"))
LLAMA_31 = {**LLAMA, "rope_parameters": {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64}}  # fmt: skip
QWEN2 |= {
    "use_sliding_window": False,
    "sliding_window": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}

CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA_3 = [
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in (70, 71)),
]
PHI_3 = ["<|user|>", "<|assistant|>", "<|end|>"]
PLAIN = {**PREPROCESSOR}
SQUARE = {"image_processor_type": "SiglipImageProcessor", "size": {"height": EDGE, "width": EDGE}, "resample": 3,
          "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_convert_rgb": None, "rescale_factor": 1 / 255,
          "do_resize": True, "do_rescale": True, "do_normalize": True}  # fmt: skip
NEXT = {
    **PREPROCESSOR,
    "image_processor_type": "LlavaNextImageProcessor",
    "do_pad": True,
    "image_grid_pinpoints": GRIDS,
}
ONEVISION = {**SQUARE, "image_processor_type": "LlavaOnevisionImageProcessor", "do_pad": True,
             "image_grid_pinpoints": FINE, "do_convert_rgb": True}  # fmt: skip

LLAVA, VIP, NEXT_CLASS, ONE = "Llava", "VipLlava", "LlavaNext", "LlavaOnevision"
LINE = {  # name → class, tower, text, the rest of the config, tokens, preprocessor_config.json
    "interleave": (LLAVA, SIGLIP, {**QWEN2, "tie_word_embeddings": True},
                   {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}, CHATML, SQUARE),
    "mantis": (LLAVA, {**SIGLIP, "vision_use_head": True}, LLAMA, {}, LLAMA_3, SQUARE),
    "joycaption": (LLAVA, SIGLIP, LLAMA_31, {"vision_feature_select_strategy": "full"}, LLAMA_3, SQUARE),
    "llama-3": (LLAVA, CLIP, {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
                {}, LLAMA_3, PLAIN),
    "phi-3": (LLAVA, CLIP, {**LLAMA, "num_key_value_heads": 6}, {}, PHI_3, PLAIN),
    "vipllava": (VIP, CLIP, LLAMA, {"vision_feature_layer": [-2, -4, 1]}, [], PLAIN),
    "next-vicuna": (NEXT_CLASS, CLIP, LLAMA, {"image_grid_pinpoints": GRIDS}, [], NEXT),
    "next-mistral": (NEXT_CLASS, CLIP, {**MISTRAL, "sliding_window": None}, {"image_grid_pinpoints": GRIDS}, [], NEXT),
    "next-qwen": (NEXT_CLASS, CLIP, QWEN2, {"image_grid_pinpoints": GRIDS}, CHATML, NEXT),
    "onevision": (ONE, SIGLIP, {**QWEN2, "tie_word_embeddings": True},
                  {"image_grid_pinpoints": FINE}, [*CHATML, "<video>"], ONEVISION),
}  # fmt: skip
TILED = ("next-vicuna", "next-mistral", "next-qwen", "onevision")


QUICK = ("interleave", "joycaption", "vipllava", "next-mistral", "onevision")  # each mechanism once; the rest is slow


def params(quick=QUICK):
    """The names, for parametrize."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in LINE]


def write_tokenizer(folder, tokens, image="<image>", bos=True):
    """tiny's tokenizer with more special tokens → it. image: another name of <image>. bos: whether <s> is in front."""
    values = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    if not bos:
        values["post_processor"] = None
    for token in values["added_tokens"]:
        token["content"] = token["content"].replace("<image>", image)
    vocabulary = values["model"]["vocab"]
    values["model"]["vocab"] = {image if name == "<image>" else name: i for name, i in vocabulary.items()}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(values))
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in tokens])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def randomise(model, seed):
    """Overwrite every parameter, so that no number is the reference's initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(drawn * 0.15 if "embed" in name else drawn * 1.2 * parameter[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * drawn)
            else:
                parameter.copy_(0.3 * drawn)


def make(folder, name, seed=0, dtype=torch.float32, text=None, tower=None, **top):
    """Write the checkpoint of that name in LINE → its folder. text, tower, top: changes of its config."""
    kind, vision, language, rest, tokens, preprocessor = LINE[name]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    image = "<|reserved_special_token_69|>" if name == "joycaption" else "<image>"
    tokenizer = write_tokenizer(folder, tokens, image, bos=language["model_type"] != "qwen2")
    image = tokenizer.token_to_id(image)
    vocabulary = -(-tokenizer.get_vocab_size() // 64) * 64
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
    language = {**language, "vocab_size": vocabulary, **ends, **(text or {})}
    if "<video>" in tokens:
        rest = {**rest, "video_token_index": tokenizer.token_to_id("<video>")}
    config = getattr(transformers, f"{kind}Config")(
        vision_config={**vision, **(tower or {})}, text_config=language, image_token_index=image, **{**rest, **top}
    )
    config.architectures = [f"{kind}ForConditionalGeneration"]
    torch.manual_seed(seed)
    model = getattr(transformers, config.architectures[0])(config).to(dtype)
    randomise(model, seed)
    if getattr(config, "tie_word_embeddings", False) or language.get("tie_word_embeddings"):
        model.tie_weights()
    tensors = published_names(model)
    if language.get("tie_word_embeddings"):
        tensors.pop("language_model.lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(config.to_json_string())
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def photo(height, width, seed=0):
    """A picture of noise: any pixel in another place shows."""
    drawn = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(drawn)


def reference(folder, dtype=torch.float64):
    """The oracle on a checkpoint."""
    name = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    cls = getattr(transformers, name)
    return cls.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()


class Made:
    """The checkpoints of a session, each made when it is asked for."""

    def __init__(self, factory):
        self.factory, self.folders, self.pairs = factory, {}, {}

    def folder(self, name):
        if name not in self.folders:
            self.folders[name] = make(self.factory.mktemp(name), name)
        return self.folders[name]

    def pair(self, name):
        """(our model, our processor, the reference), in float64."""
        if name not in self.pairs:
            folder = self.folder(name)
            ours = llava.load(str(folder), device="cpu", dtype=torch.float64)
            self.pairs[name] = (*ours, reference(folder))
        return self.pairs[name]


def table(names=tuple(LINE)):
    """Print, for each kind, the worst relative error beside transformers in float64, and what has to be equal."""
    import tempfile

    import parity

    heads = ("pixels", "tower", "features", "decoder", "logits", "attention", "loss", "gradients", "tokens", "beams",
             "cached", "batch", "int8")  # fmt: skip
    print("  ".join([f"{'kind':<13}", *(f"{head:>9}" for head in heads)]))
    for name in names:
        folder = make(tempfile.mkdtemp(), name)
        model, processor = llava.load(str(folder), device="cpu", dtype=torch.float64)
        theirs = reference(folder)
        image, prompt = photo(40, 61), processor.prompt(parity.QUESTION)
        ours = parity.ours(model, processor, image)
        other = parity.theirs(theirs, folder, model.config, processor.preprocess_config, prompt, image)
        worst = dict.fromkeys(heads, 0.0)
        of = {
            "vision": "tower",
            "projector": "features",
            "packed": "features",
            "newline": "features",
            "llama": "decoder",
            "merge": "decoder",
            "gradient": "gradients",
            "sizes": "pixels",
            "ids": "pixels",
        }
        for stage, _, relative, _, _ in parity.compare(ours, other, torch.float64):
            head = stage.split(".")[0]
            worst[of.get(head, head)] = max(worst[of.get(head, head)], relative)
        inputs = processor.chat([("user", parity.QUESTION)], [image])
        cache = model.init_kv_cache(1, 900)
        steps = model.generate(**inputs, max_new_tokens=8, kv_cache=cache)
        ids, _ = model.prompt_ids(**inputs)
        more = {key: inputs[key] for key in ("pixel_values", "image_sizes") if key in inputs}
        more["pixel_values"] = more["pixel_values"].double()
        with torch.no_grad():
            one = model(input_ids=steps[:, -1:], kv_cache=cache)
            again = theirs(input_ids=torch.cat([ids, steps], dim=1), **more).logits[:, -1:]
        worst["cached"] = ((one.logits - again).abs().max() / again.abs().max()).item()
        both = processor([prompt, prompt[: len(prompt) // 3].replace(processor.image_token, "")], [[image], []])
        with torch.no_grad():
            row, alone = model(**both).logits[0], model(**inputs).logits[0]
            worst["batch"] = ((row[-len(alone) :] - alone).abs().max() / alone.abs().max()).item()
            small = llava.load(str(folder), device="cpu", dtype=torch.float32, quantize="int8")[0]
            a, b = small(**inputs).logits.double(), model(**inputs).logits
            worst["int8"] = ((a - b).norm() / b.norm()).item()
        print("  ".join([f"{name:<13}", *(f"{worst[head]:9.1e}" for head in heads)]), flush=True)


def main():
    parser = argparse.ArgumentParser(description="How far ours is from the reference, kind by kind, in float64.")
    parser.add_argument("names", nargs="*", metavar="KIND", help=f"which, all by default: {', '.join(LINE)}")
    names = parser.parse_args().names
    if unknown := {*names} - {*LINE}:
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    table(names or LINE)


if __name__ == "__main__":
    main()
