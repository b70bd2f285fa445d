"""What stands where a checkpoint should be is named for what it is, with what to do about it."""

import json

import pytest
import torch
from checkpoints import HEAD, refusal, same

import llava
from extras import hub

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 14126000000\n"
FILES = ["model.safetensors", "tokenizer.json", "config.json", "preprocessor_config.json", "generation_config.json"]
TEXTS = {  # what came in place of a file → what is said
    "a pointer": (POINTER, "a Git-LFS pointer to a file of 14,126,000,000 bytes: run `git lfs pull`"),
    "a pointer of Windows": (POINTER.replace("\n", "\r\n"), "a Git-LFS pointer to a file of 14,126,000,000 bytes"),
    "an old pointer": (POINTER.replace("git-lfs", "hawser"), "a Git-LFS pointer"),
    "git-annex": ("../../.git/annex/objects/Zm/x1/SHA256E-s14126--a.safetensors\n", "git annex get"),
    "a page": ("<!DOCTYPE html>\n<html><head><title>Sign in</title>", "a web page: download it again"),
    "a bare page": ("\n\n  <HTML>\n<BODY>", "a web page"),
    "a commented page": ("<!-- saved from x -->\n<!doctype html>", "a web page"),
    "an error of a storage": ('<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code>', "a web page"),
    "a refusal": ("Entry not found", "a server's refusal: download it again"),
    "another refusal": ("Invalid username or password.", "a server's refusal"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", ["a pointer", "a page"])
def test_a_text_in_place_of_any_file_is_named(copy, name, text):
    copy.write()
    (copy.folder / name).write_text(TEXTS[text][0])
    message = refusal(copy.folder)
    assert f"{copy.folder / name} is not the file itself, but " in message and TEXTS[text][1] in message


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_any_such_text_is_named(copy, name, text):
    copy.write()
    (copy.folder / name).write_bytes(TEXTS[text][0].encode())
    message = refusal(copy.folder)
    assert TEXTS[text][1] in message and name in message


@pytest.mark.parametrize("shard", [1, 2])
def test_a_pointer_in_place_of_one_shard_is_named(copy, shard):
    copy.write(shards=2)
    (copy.folder / f"model-0000{shard}-of-00002.safetensors").write_text(POINTER)
    assert f"model-0000{shard}-of-00002.safetensors is not the file itself, but a Git-LFS" in refusal(copy.folder)


# ----------------------------------------------------------------------------------------------------------------
# Adapters


def adapter(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("config, words", [
    ({"peft_type": "LORA", "base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"},
     "only an adapter (LORA, of 'llava-hf/llava-1.5-7b-hf')"),
    ({"peft_type": "IA3", "base_model_name_or_path": None}, "only an adapter (IA3, of a model that it does not name)"),
    ({"base_model_name_or_path": "a\nb"}, r"(of an unknown kind, of 'a\nb')"),
    ([1], "(of an unknown kind, of a model that it does not name)"),
])  # fmt: skip
def test_a_folder_with_only_an_adapter_names_it_and_its_base(tmp_path, config, words):
    adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    message = refusal(tmp_path)
    assert words in message and "merge_and_unload" in message


@pytest.mark.parametrize("beside", ["config.json", "non_lora_trainables.bin", "training_args.bin", "tokenizer.json"])
def test_an_adapter_is_named_whatever_lies_beside_it(copy, beside):
    """The authors' own LoRA has a config.json and the projector, pickled; a trainer adds its own."""
    adapter(copy.folder, peft_type="LORA", base_model_name_or_path="liuhaotian/llava-v1.5-7b")
    (copy.folder / beside).touch()
    assert "only an adapter (LORA, of 'liuhaotian/llava-v1.5-7b')" in refusal(copy.folder)


def test_an_adapter_beside_whole_weights_is_not_applied_and_said_so(copy, checkpoints):
    adapter(copy.folder, peft_type="LORA", base_model_name_or_path="a/b")
    with pytest.warns(UserWarning, match=r"also holds an adapter \(LORA, of 'a/b'\): it is not applied") as said:
        model, _ = llava.load(copy.write(), device="cpu", dtype=torch.float32)
    assert said[0].filename == __file__
    assert same(model, llava.load(checkpoints["llama"], device="cpu", dtype=torch.float32)[0])


# ----------------------------------------------------------------------------------------------------------------
# Other formats, and weights that somebody has quantised


@pytest.mark.parametrize("name, words", [
    ("llava-v1.5-7b-Q4_K_M.gguf", "llava-v1.5-7b-Q4_K_M.gguf: GGUF, llama.cpp's format"),
    ("MMPROJ.GGUF", "MMPROJ.GGUF: GGUF"),
    ("weights.npz", "weights.npz: MLX's format"),
])  # fmt: skip
def test_another_format_is_named_by_its_file(copy, name, words):
    (copy.folder / name).touch()
    for folder in (copy.folder, copy.folder / "bare"):  # without a config.json, too
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
        message = refusal(folder)
        assert words in message and "take the 16-bit checkpoint" in message and "--quantize int8 or int4" in message


def test_what_a_trainer_pickles_is_not_called_the_weights(copy):
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (copy.folder / name).touch()
    assert "holds neither model.safetensors nor" in refusal(copy.folder)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    for name, words in {"llava.Q4_K.gguf": "GGUF", "model.safetensors": "is a file: give the folder"}.items():
        (tmp_path / name).touch()
        with pytest.raises(OSError, match=words):
            hub.find(str(tmp_path / name))


@pytest.mark.parametrize("fields, method", [
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    ({"quantization_config": {"load_in_8bit": True}}, "somebody"),
    ({"quantization_config": {"bits": 4}}, "somebody"),
    ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ({"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}}, "MLX"),
    ({"text_config": {"quantization_config": {"quant_method": "AWQ", "bits": 4}}}, "AWQ"),
    ({"vision_config": {"quantization_config": {"quant_method": "hqq"}}}, "hqq"),
    ({"quantization_config": "int4"}, "somebody"),
])  # fmt: skip
def test_quantised_weights_are_refused_by_their_config(copy, fields, method):
    message = refusal(copy.config(**fields).folder)
    assert f"the weights were quantised by {method}: take the 16-bit checkpoint" in message
    assert "--quantize" in message and "config.json" in message


@pytest.mark.parametrize("end, method", [
    (".qweight", "GPTQ or AWQ"), (".g_idx", "GPTQ or AWQ"),
    (".SCB", "bitsandbytes"), (".weight.absmax", "bitsandbytes"),
    (".scales", "MLX"), (".weight_scale", "compressed-tensors or FP8"),
])  # fmt: skip
def test_quantised_weights_are_refused_by_their_tensors(copy, end, method):
    """Where the config does not say so, as beside AutoGPTQ's old quantize_config.json."""
    name = HEAD.removesuffix(".weight") + end
    message = refusal(copy.write(beside={name: torch.zeros(3)}))
    assert f"the tensor {name} is of weights quantised by {method}: take the 16-bit checkpoint" in message
