"""A saved checkpoint: what loads again, here and in transformers, and what is left when saving fails."""

import errno
import json
import shutil
from pathlib import Path

import line
import pytest
import torch
import transformers
from checkpoints import HEAD, load, same, tied
from pictures import picture
from reference import EDGE, PATCH, PREPROCESSOR, TINY, load_reference, published_names
from safetensors.torch import load_file

import llava
from extras import lora, saving

try:
    import resource
except ImportError:  # Windows
    resource = None


def test_a_checkpoint_is_not_saved_over_a_file(pair, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file cannot be written"):
        llava.save(*pair[:2], tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("shard_size", [5_000_000_000, 60_000])
def test_what_was_saved_loads_again_here_and_in_transformers(pair, shard_size, tmp_path, monkeypatch):
    ours, processor, reference = pair
    monkeypatch.setattr(saving.write, "__defaults__", (shard_size,))
    llava.save(ours, processor, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shard_size > 10**9)
    parts = [load_file(file) for file in files]
    assert all(len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= shard_size for part in parts)
    assert sorted(name for part in parts for name in part) == sorted(published_names(reference))
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {
            name: file.name for file, part in zip(files, parts, strict=True) for name in part
        }
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for part in parts for tensor in part.values())
    again, second = llava.load(str(tmp_path), device="cpu", dtype=torch.float64)
    assert same(again, ours)
    again.config.eos_token_id = again.config.eos_token_ids[0]  # a list when saved
    assert vars(second.preprocess_config) == vars(processor.preprocess_config) and again.config == ours.config
    theirs = load_reference(tmp_path)
    image = torch.randn(1, 3, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, *[ours.config.image_token_index] * 16, 6, 7]])
    with torch.no_grad():
        logits = [model(input_ids=ids, pixel_values=image).logits for model in (again, theirs, reference)]
    assert torch.allclose(logits[0], logits[1], rtol=0, atol=1e-10) and torch.equal(logits[1], logits[2])


def test_saving_over_another_checkpoint_leaves_nothing_of_it(pairs, tmp_path, monkeypatch):
    for family, shard_size in [("llama", 60_000), ("mistral", 10**9), ("llama", 90_000), ("mistral", 60_000)]:
        ours, processor, _ = pairs[family]
        monkeypatch.setattr(saving.write, "__defaults__", (shard_size,))
        llava.save(ours, processor, tmp_path)
        index = tmp_path / "model.safetensors.index.json"
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        assert {file.name for file in tmp_path.iterdir() if "safetensors" in file.name} - {index.name} == named
        assert same(load(tmp_path, torch.float64), ours)


@pytest.fixture
def saved(pairs, tmp_path):
    """The folder of a saved checkpoint, its files, and another model to be saved over it."""
    ours, processor, _ = pairs["llama"]
    llava.save(ours, processor, tmp_path / "saved")
    before = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    return tmp_path / "saved", before, pairs["mistral"][:2]


@pytest.mark.skipif(resource is None, reason="needs a limit for the size of a file")
@pytest.mark.parametrize("room", [0, 1000, 200_000])
@pytest.mark.parametrize("shard_size", [10**9, 60_000])
def test_a_disk_that_is_full_leaves_the_old_checkpoint(saved, room, shard_size, monkeypatch):
    """The system itself refuses to write: the first file, or a later part of it."""
    folder, before, (model, processor) = saved
    if shard_size == 60_000 and room == 200_000:
        room = 50_000  # some of the shards fit
    monkeypatch.setattr(saving.write, "__defaults__", (shard_size,))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError) as caught:
            llava.save(model, processor, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value).startswith(f"{folder} cannot be written: ") and "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("number", range(6))
def test_a_disk_that_is_full_later_leaves_the_old_checkpoint(saved, number, monkeypatch):
    """Each of the small files in turn is the one for which there is no room: five configs and the tokenizer."""
    folder, before, (model, processor) = saved
    write_text, left = Path.write_text, [number]

    def full(self, *args, **options):
        left[0] -= 1
        if left[0] < 0:
            self.touch()
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(self, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"cannot be written: .*No space left"):
        patch.setattr(Path, "write_text", full)
        llava.save(model, processor, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_ctrl_c_while_saving_leaves_the_old_checkpoint(saved, monkeypatch):
    folder, before, (model, processor) = saved
    monkeypatch.setattr(saving, "save_file", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        llava.save(model, processor, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_files_that_no_checkpoint_has_written_stay(pair, tmp_path):
    for name in ("model_backup.safetensors", "model.fp32.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"mine")
    llava.save(*pair[:2], tmp_path)
    assert all(
        (tmp_path / name).read_bytes() == b"mine" for name in ("model_backup.safetensors", "model.fp32.safetensors")
    )


def test_a_model_may_be_saved_over_the_files_that_it_came_from(copy):
    model, processor = llava.load(copy.write("E", 3), device="cpu", dtype=torch.float32)
    llava.save(model, processor, copy.folder)
    assert same(load(copy.folder), model)
    assert load_file(copy.folder / "model.safetensors").keys() == copy.tensors.keys()


def test_a_tied_model_is_saved_without_its_head_and_loads_again(copy, tmp_path):
    del copy.tensors[HEAD]
    model, processor = llava.load(tied(copy).write(), device="cpu", dtype=torch.float32)
    llava.save(model, processor, tmp_path / "saved")
    assert HEAD not in load_file(tmp_path / "saved" / "model.safetensors")
    again = load(tmp_path / "saved")
    assert same(again, model) and again.llama.head.weight is again.llama.embed.weight
    theirs = load_reference(tmp_path / "saved")
    assert torch.equal(theirs.lm_head.weight, model.llama.embed.weight.double())


# ----------------------------------------------------------------------------------------------------------------
# A whole folder, for transformers' AutoProcessor


def processed(folder):
    """What AutoProcessor makes of two prompts of unequal length and their pictures, and what it knows of tokens."""
    from transformers import AutoProcessor

    theirs = AutoProcessor.from_pretrained(folder)
    texts = ["USER: <image>\nWhat is this, and why? ASSISTANT:", "USER: <image>\nHi ASSISTANT:"]
    inputs = theirs(images=[picture(40, 90), picture(90, 40)], text=texts, padding=True, return_tensors="pt")
    words = theirs.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    tokens = theirs.tokenizer.pad_token_id, theirs.tokenizer.eos_token_id, theirs.image_token_id
    return theirs, dict(inputs), (words, tokens)


def check_equal(folder, other):
    """AutoProcessor gives the same on both folders."""
    (_, inputs, rest), (_, others, other_rest) = processed(folder), processed(other)
    assert inputs.keys() == others.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(inputs[name], others[name]) for name in inputs)
    assert rest == other_rest


def original(copy, image_processor=None, strategy="default"):
    """A copy as transformers itself saves it, processor and all."""
    from transformers import AutoTokenizer, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    theirs = LlavaProcessor(
        image_processor or CLIPImageProcessorPil(**PREPROCESSOR), tokenizer, patch_size=PATCH,
        vision_feature_select_strategy=strategy, num_additional_image_tokens=1,
        chat_template="{{ messages[0].content }} ASSISTANT:",
    )  # fmt: skip
    theirs.save_pretrained(copy.folder)
    (copy.folder / "preprocessor_config.json").unlink()
    return copy.config(vision_feature_select_strategy=strategy).write()


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_a_saved_folder_gives_what_the_folder_of_transformers_gives(copy, strategy, tmp_path):
    folder = original(copy, strategy=strategy)
    model, processor = llava.load(folder, device="cpu", dtype=torch.float32)
    llava.save(model, processor, tmp_path / "saved")
    check_equal(folder, tmp_path / "saved")


def test_tiny_saved_gives_what_tiny_gives(tmp_path):
    model, processor = llava.load(TINY, device="cpu", dtype=torch.float32)
    llava.save(model, processor, tmp_path)
    check_equal(TINY, tmp_path)
    theirs, inputs, _ = processed(tmp_path)
    reference = load_reference(tmp_path, torch.float32)
    new = reference.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    ours = model.generate(**inputs, max_new_tokens=8)
    assert theirs.batch_decode(new, skip_special_tokens=True) == [processor.decode(row) for row in ours]


def test_a_saved_folder_pads_to_a_square_if_its_original_does(copy, tmp_path):
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    folder = original(copy, LlavaImageProcessorPil(**PREPROCESSOR | {"do_pad": True}))
    model, processor = llava.load(folder, device="cpu")
    llava.save(model, processor, tmp_path / "saved")
    assert processor.preprocess_config.do_pad
    check_equal(folder, tmp_path / "saved")
    assert llava.load(tmp_path / "saved", device="cpu")[1].preprocess_config.do_pad


WHOLE = {"height": EDGE, "width": EDGE}


@pytest.mark.parametrize("name, numbers", [
    ("next-vicuna", {"size": WHOLE, "crop_size": WHOLE}),
    ("next-vicuna", {"size": WHOLE, "crop_size": EDGE, "do_center_crop": False}),
    ("next-vicuna", {"size": EDGE, "crop_size": EDGE}),
    ("onevision", {"size": WHOLE, "crop_size": WHOLE}),
    ("llama-3", {"size": WHOLE, "crop_size": WHOLE}),
    ("llama-3", {"size": WHOLE, "crop_size": None, "do_center_crop": False}),
    ("llama-3", {"size": WHOLE, "crop_size": None, "do_center_crop": False, "do_pad": True,
                 "image_processor_type": "LlavaImageProcessor"}),
    ("interleave", {"size": WHOLE, "crop_size": {"height": 5, "width": 5}}),
])  # fmt: skip
def test_a_saved_folder_scales_and_cuts_as_its_original_does(made, tmp_path, name, numbers):
    """As the reference reads them: LLaVA-NeXT's class has a crop of 224 pixels by default, which SigLIP's has not."""
    folder = tmp_path / "original"
    shutil.copytree(made.folder(name), folder)
    if name == "next-vicuna":  # the tower that squashes
        tower = {"model_type": "siglip_vision_model", "vision_use_head": False}
        line.make(folder, name, tower=tower, vision_feature_select_strategy="full")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | numbers))
    model, processor = llava.load(folder, device="cpu")
    llava.save(model, processor, tmp_path / "saved")
    _, again = llava.load(tmp_path / "saved", device="cpu")
    for photo in (line.photo(40, 61), line.photo(90, 33)):
        found = [
            transformers.AutoImageProcessor.from_pretrained(where, backend="pil")(photo, return_tensors="pt")
            for where in (folder, tmp_path / "saved")
        ]
        ours = [x.prepare([[x.image_id]], [photo]) for x in (processor, again)]
        pixels = [torch.as_tensor(x["pixel_values"]).float() for x in (*found, *ours)]
        assert all(torch.equal(x, pixels[0]) for x in pixels[1:])


def test_saving_over_a_folder_of_transformers_leaves_nothing_that_would_count(copy, pairs, tmp_path):
    """The nested numbers, the names of special tokens and the chat template of another checkpoint."""
    folder = Path(original(copy))
    copy.config("processor_config.json", image_processor=PREPROCESSOR | {"image_mean": [0.1, 0.2, 0.3]})
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<unk>", "eos_token": "<unk>"}')
    (folder / "added_tokens.json").write_text('{"<more>": 700}')
    (folder / "chat_template.json").write_text('{"chat_template": "of another"}')
    llava.save(*llava.load(TINY, device="cpu"), folder)
    check_equal(folder, TINY)
    assert not {"special_tokens_map.json", "added_tokens.json", *saving.TEMPLATES} & {f.name for f in folder.iterdir()}


@pytest.mark.parametrize("over", [False, True])
def test_the_chat_template_is_passed_on(copy, tmp_path, over):
    folder = original(copy)
    to = Path(folder) if over else tmp_path / "saved"
    llava.save(*llava.load(folder, device="cpu"), to)
    assert processed(to)[0].apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi ASSISTANT:"


@pytest.mark.parametrize("template", ["Hi {{ bos_token }}", [{"name": "default", "template": "Hi"}]], ids=len)
@pytest.mark.parametrize("over", [False, True])
def test_a_chat_template_inside_a_config_is_passed_on(copy, tmp_path, over, template):
    folder = Path(copy.write())
    for file in saving.HOLDERS:
        (folder / file).write_text(json.dumps({"chat_template": template}))
    to = folder if over else tmp_path / "saved"
    before = transformers.AutoTokenizer.from_pretrained(folder).chat_template
    llava.save(*llava.load(folder, device="cpu"), to)
    assert before and transformers.AutoTokenizer.from_pretrained(to).chat_template == before
    assert transformers.AutoProcessor.from_pretrained(to, use_fast=False).chat_template == template
    llava.save(*llava.load(TINY, device="cpu"), to)
    assert transformers.AutoTokenizer.from_pretrained(to).chat_template is None


def test_a_config_that_cannot_be_read_holds_no_chat_template(copy, tmp_path):
    (copy.folder / "tokenizer_config.json").write_text("{")
    llava.save(*llava.load(copy.write(), device="cpu"), tmp_path / "saved")
    assert "chat_template" not in json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())


def test_a_folder_that_holds_an_adapter_is_not_written_to(pair, tmp_path):
    """transformers would load the adapter and its base model in place of what is saved."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"):
        llava.save(*pair[:2], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter_config.json"]


# ----------------------------------------------------------------------------------------------------------------
# A model that cannot be written


class Wrapped(torch.nn.Module):
    """As PEFT wraps a model: what it lacks itself, it asks of the model inside."""

    def __init__(self, model):
        super().__init__()
        self.base_model = torch.nn.ModuleDict({"model": model})

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model["model"], name)


def more(model):
    model.llama.extra = torch.nn.Parameter(torch.zeros(3))


def one_block_more(model):
    model.llama.blocks.append(model.llama.blocks[-1])


def one_block_less(model):
    del model.llama.blocks[-1]


def no_bias(model):
    model.projector.linear_2.bias = None


def another_shape(model):
    model.projector.linear_1 = torch.nn.Linear(7, 48)


def on_meta(model):
    model.projector.to("meta")


def normed(model):
    torch.nn.utils.parametrizations.weight_norm(model.projector.linear_1)


def compiled_block(model):
    model.llama.blocks[1] = torch.compile(model.llama.blocks[1])


BROKEN = {  # what was done to the model → the parameter that is named
    "LoRA that is not merged": (
        lambda m: lora.add(m, 2) and None, "llama.blocks.0.attention.wq.parametrizations.weight.original has no"),
    "torch.compile": (torch.compile, "_orig_mod.vision.class_embedding has no place"),
    "one block compiled": (compiled_block, r"llama.blocks.1._orig_mod.attention_norm.weight has no place"),
    "PEFT": (Wrapped, "base_model.model.vision.class_embedding has no place"),
    "DataParallel": (torch.nn.DataParallel, "module.vision.class_embedding has no place"),
    "weight_norm": (normed, "projector.linear_1.parametrizations.weight.original0 has no place"),
    "a parameter more": (more, "llama.extra has no place"),
    "a block more": (one_block_more, r"llama.blocks.3.attention_norm.weight has no place"),
    "a block less": (one_block_less, r"llama.blocks.2.attention_norm.weight is missing"),
    "a bias less": (no_bias, "projector.linear_2.bias is missing"),
    "another shape": (another_shape, r"projector.linear_1.weight has the shape \(48, 7\)"),
    "no numbers": (on_meta, "projector.linear_1.weight has no numbers"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_model_that_cannot_be_written_is_refused_by_a_parameter(copy, tmp_path, how):
    model, processor = llava.load(copy.write(), device="cpu", dtype=torch.float32)
    change, words = BROKEN[how]
    changed = change(model)
    model = model if changed is None else changed
    with pytest.raises(ValueError, match=words) as caught:
        llava.save(model, processor, tmp_path / "saved")
    assert "\n" not in str(caught.value) and not (tmp_path / "saved").exists()


def test_a_head_that_was_tied_by_hand_is_written_as_the_config_says(copy, tmp_path):
    model, processor = llava.load(copy.write(), device="cpu", dtype=torch.float32)
    model.llama.head.weight = model.llama.embed.weight
    llava.save(model, processor, tmp_path / "saved")
    assert same(load(tmp_path / "saved"), model)
