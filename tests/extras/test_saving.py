"""A saved checkpoint: what loads again, here and in transformers, and what is left when saving fails."""

import errno
import json
import shutil
import warnings
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
from extras import beside, lora, saving

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
    write = saving.write
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*given):  # not before, when the small files are tried elsewhere
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        write(*given, shard_size)

    monkeypatch.setattr(saving, "write", limited)
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
        left[0] -= folder in self.parents
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
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("of another")
    llava.save(*llava.load(TINY, device="cpu"), folder)
    check_equal(folder, TINY)
    assert not beside.read(folder).keys() - {*beside.OBJECTS}


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
    for file in ("tokenizer_config.json", "processor_config.json"):
        (folder / file).write_text(json.dumps({"chat_template": template}))
    to = folder if over else tmp_path / "saved"
    before = transformers.AutoTokenizer.from_pretrained(folder).chat_template
    llava.save(*llava.load(folder, device="cpu"), to)
    assert before and transformers.AutoTokenizer.from_pretrained(to).chat_template == before
    assert transformers.AutoProcessor.from_pretrained(to, use_fast=False).chat_template == template
    llava.save(*llava.load(TINY, device="cpu"), to)
    assert transformers.AutoTokenizer.from_pretrained(to).chat_template is None


ADDED = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False, "normalized": False,
         "single_word": False, "special": True}  # fmt: skip
TOKENS = [  # tokenizer_config.json, special_tokens_map.json, the pad of config.json
    ({"pad_token": "<pad>"}, None, ...),
    ({"pad_token": "</s>"}, None, 639),
    ({"pad_token": "<pad>", "padding_side": "right"}, None, 639),
    ({"pad_token": "<unk>", "padding_side": "left", "unk_token": "<unk>", "model_max_length": 77}, None, 639),
    ({"pad_token": ADDED, "unk_token": None, "truncation_side": "left", "bos_token": "<unk>"}, None, 639),
    ({"pad_token": "<pad>", "eos_token": "<pad>", "add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}, None, 0),
    ({"pad_token": "<pad>", "clean_up_tokenization_spaces": True, "extra_special_tokens": {"a_token": "▁"}}, None, 0),
    ({}, {"pad_token": "<unk>", "eos_token": "<pad>"}, 639),
    ({"pad_token": "<pad>"}, {"pad_token": "</s>", "unk_token": "<unk>"}, 639),
    (None, {"pad_token": "</s>", "bos_token": ADDED, "eos_token": "</s>"}, 639),
]
NAMES = ("pad_token", "eos_token", "bos_token", "unk_token", "model_max_length", "padding_side", "truncation_side",
         "clean_up_tokenization_spaces", "extra_special_tokens", "all_special_tokens", "chat_template")  # fmt: skip


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("tokens, special, pad", TOKENS)
def test_a_saved_folder_names_tokens_and_pads_as_its_original_does(copy, tmp_path, tokens, special, pad, over):
    files = {"tokenizer_config.json": tokens, "special_tokens_map.json": special}
    folder = Path(copy.config(pad_token_id=pad).write())
    (folder / "generation_config.json").unlink(missing_ok=True)
    like_tiny = json.loads((TINY / "processor_config.json").read_text())
    copy.config("processor_config.json", **like_tiny | {"patch_size": PATCH})
    for name, values in files.items():
        (folder / name).unlink(missing_ok=True)
        if values is not None:
            (folder / name).write_text(json.dumps(values))
    to = folder if over else tmp_path / "saved"
    theirs, inputs, rest = processed(folder)
    llava.save(*llava.load(folder, device="cpu"), to)
    again, others, other_rest = processed(to)
    assert inputs.keys() == others.keys() and all(torch.equal(inputs[name], others[name]) for name in inputs)
    assert rest == other_rest
    for name in NAMES:
        assert getattr(again.tokenizer, name) == getattr(theirs.tokenizer, name), name


def test_where_nothing_names_tokens_the_model_does(copy, tmp_path):
    """And rows are padded on the left, as answers follow on the right."""
    assert not {"tokenizer_config.json", "special_tokens_map.json"} & {file.name for file in copy.folder.iterdir()}
    llava.save(*llava.load(copy.write(), device="cpu"), tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.padding_side) == (1, 2, 639, "left")


def test_what_lay_beside_the_tokenizer_outlives_its_folder_and_a_change_of_folder(copy, tmp_path, monkeypatch):
    folder = Path(original(copy))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("Of documents")
    before = processed(folder)[0]
    monkeypatch.chdir(tmp_path)
    model, processor = llava.load(str(folder.relative_to(tmp_path)), device="cpu")
    shutil.rmtree(folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    llava.save(model, processor, "saved")
    after = processed(Path("saved").resolve())[0]
    assert after.chat_template == before.chat_template and {*after.chat_template} == {"default", "rag"}
    assert after.tokenizer.chat_template == before.tokenizer.chat_template


def test_how_transformers_generates_is_passed_on(copy, tmp_path):
    given = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1, "eos_token_id": 2}
    folder = copy.config("generation_config.json", **given).write()
    llava.save(*llava.load(folder, device="cpu"), tmp_path / "saved")
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "saved").to_dict()
    assert {name: found[name] for name in given} == given | {"eos_token_id": [2]}


def test_what_would_count_in_place_of_what_is_written_is_not_passed_on(copy, tmp_path):
    """Code of a repository, another tokenizer file, preprocessing numbers inside the processor's."""
    code = {"auto_map": {"AutoTokenizer": [None, "tokens.Fast"]}, "fast_tokenizer_files": ["tokenizer.4.0.0.json"]}
    folder = copy.config("tokenizer_config.json", pad_token="<pad>", **code).write()
    copy.config("processor_config.json", image_processor=PREPROCESSOR, auto_map={"AutoProcessor": "own.Processor"})
    llava.save(*llava.load(folder, device="cpu"), tmp_path / "saved")
    for file in beside.OBJECTS:
        assert not saving.REPLACED & json.loads((tmp_path / "saved" / file).read_text()).keys()
    assert transformers.AutoProcessor.from_pretrained(tmp_path / "saved").tokenizer.pad_token_id == 639


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


def fields(**changes):
    """Changes of model.config: text__NAME and vision__NAME are those of its parts."""

    def change(model, processor):
        for name, value in changes.items():
            part, _, inner = name.rpartition("__")
            setattr(getattr(model.config, f"{part}_config") if part else model.config, inner, value)

    return change


def pictures(**changes):
    return lambda model, processor: [setattr(processor.preprocess_config, *change) for change in changes.items()]


def weight(make):
    """Put another tensor in the place of a matrix, which as it is cannot be trained."""

    def change(model, processor):
        old = model.llama.blocks[1].mlp.up.weight
        model.llama.blocks[1].mlp.up.weight = torch.nn.Parameter(make(old.detach()), requires_grad=False)

    return change


def resized(model, processor):
    model.resize_token_embeddings(600)


def shared(model, processor):
    model.llama.blocks[1].mlp.up = model.llama.blocks[0].mlp.up


def half_of_another(model, processor):
    model.llama.norm.weight = torch.nn.Parameter(model.llama.embed.weight.detach()[3])


def lazy(model, processor):
    model.projector.linear_2 = torch.nn.LazyLinear(48)


def other_tokenizer(model, processor):
    processor.tokenizer.bpe.add_tokens(["<more>"])
    model.config.image_token_index = processor.tokenizer.bpe.token_to_id("<more>")


def no_tokenizer(model, processor):
    del processor.tokenizer


UP = r"llama\.blocks\.1\.mlp\.up\.weight"
REFUSED = {  # what was done to model and processor → what is said; all but the first few of each kind were written
    "fewer rows than ids": (resized, r"saved/generation_config.json: pad_token_id is 639, and .* are 0 to 599"),
    "an end outside": (fields(eos_token_id=700), r"saved/generation_config.json: eos_token_id is 700"),
    "no end": (fields(eos_token_id=[]), "config.json: eos_token_id is .., and must hold 1"),
    "a pad below zero": (fields(pad_token_id=-1), "pad_token_id is -1"),
    "an id that is none": (fields(eos_token_id="</s>"), "are not such as load gives them: TypeError"),
    "a layer that is not there": (fields(vision_feature_layer=-9), "saved/config.json: vision_feature_layer is"),
    "another strategy": (fields(vision_feature_select_strategy="cls"), "vision_feature_select_strategy is 'cls'"),
    "another <image>": (fields(image_token_index=5), "gives <image> the id"),
    "an <image> below zero": (fields(image_token_index=-200), "gives <image> the id"),
    "another kind": (fields(model_type="idefics"), "model_type is 'idefics'"),
    "another kind of text": (fields(text__model_type="gemma"), "text_config.model_type is 'gemma'"),
    "another activation": (fields(vision__hidden_act="relu"), "hidden_act is 'relu'"),
    "nan": (fields(text__rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "a window that a Llama has not": (fields(text__sliding_window=64), r"sliding_window is 64, .* would read None"),
    "biases that a Llama has not": (fields(text__qkv_bias=True), r"text_config: qkv_bias is True, .* would read False"),
    "no JSON": (fields(description=Path("x")), "are not such as load gives them: TypeError"),
    "no config of the text": (fields(text_config=None), "are not such as load gives them: TypeError"),
    "no tokenizer": (no_tokenizer, "are not such as load gives them: AttributeError"),
    "another token": (other_tokenizer, "gives <image> the id"),
    "another crop": (pictures(crop_size={"height": 40, "width": 40}), "saved/preprocessor_config.json: size .* crop_"),
    "a mean of two colours": (pictures(image_mean=[0.5, 0.5]), "image_mean and image_std must have 3"),
    "a filter that is none": (pictures(resample=9), "resample is 9"),
    "whole numbers": (weight(lambda x: x.to(torch.int32)), f"{UP} is in torch.int32, which load would refuse"),
    "float8": (weight(lambda x: x.to(torch.float8_e4m3fn)), f"{UP} is in torch.float8_e4m3fn"),
    "complex numbers": (weight(lambda x: x.to(torch.complex64)), f"{UP} is in torch.complex64"),
    "truth values": (weight(lambda x: x > 0), f"{UP} is in torch.bool"),
    "a sparse one": (weight(lambda x: x.to_sparse()), f"{UP} is a torch.sparse_coo"),
    "sparse rows": (weight(lambda x: x.to_sparse_csr()), f"{UP} is a torch.sparse_csr"),
    "one without a shape": (lazy, r"projector.linear_2.weight is a UninitializedParameter"),
    "one matrix twice": (shared, r"llama.blocks.0.mlp.up.weight and llama.blocks.1.mlp.up.weight share their numbers"),
    "a row of another": (half_of_another, r"llama.embed.weight and llama.norm.weight share their numbers"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:Lazy modules")
@pytest.mark.parametrize("how", REFUSED)
def test_what_load_would_refuse_is_one_sentence_and_nothing_is_written(copy, tmp_path, how):
    model, processor = llava.load(copy.write(), device="cpu", dtype=torch.float32)
    llava.save(model, processor, tmp_path / "over" / "saved")
    before = {file.name: file.read_bytes() for file in (tmp_path / "over" / "saved").iterdir()}
    change, words = REFUSED[how]
    change(model, processor)
    for folder in (tmp_path / "new" / "saved", tmp_path / "over" / "saved"):
        with pytest.raises(ValueError, match=words) as caught:
            llava.save(model, processor, folder)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
    assert {file.name: file.read_bytes() for file in (tmp_path / "over" / "saved").iterdir()} == before


def test_a_folder_that_could_not_be_filled_is_taken_away_again(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no room")))
    pair[1].tokenizer.beside = {"additional_chat_templates/rag.jinja": "Hi"}
    (tmp_path / "mine").mkdir()
    for folder in ("new", "mine/new/newer", "mine"):
        with pytest.raises(OSError, match="no room"):
            llava.save(*pair[:2], tmp_path / folder)
        assert [file.name for file in tmp_path.rglob("*")] == ["mine"]


def test_what_is_tried_before_is_no_second_copy_of_the_weights(pair, tmp_path, monkeypatch):
    written, save_file = [], saving.save_file
    monkeypatch.setattr(saving, "save_file", lambda part, *x, **y: written.append(part) or save_file(part, *x, **y))
    llava.save(*pair[:2], tmp_path)
    assert len(written) == 1


def test_columns_of_one_matrix_are_written_apart(copy, tmp_path):
    """They are no copy of each other, and what is not contiguous is copied before it is written."""
    model, processor = llava.load(copy.write(), device="cpu", dtype=torch.float32)
    mlp = model.llama.blocks[0].mlp
    both = torch.cat([mlp.gate.weight.detach(), mlp.up.weight.detach()], dim=1).chunk(2, dim=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mlp.gate.weight, mlp.up.weight = map(torch.nn.Parameter, both)
    llava.save(model, processor, tmp_path / "saved")
    after = load(tmp_path / "saved").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_head_that_is_no_longer_tied_is_one_of_its_own_to_transformers_too(copy, tmp_path):
    del copy.tensors[HEAD]
    model, processor = llava.load(tied(copy).write(), device="cpu", dtype=torch.float32)
    model.llama.head.weight = torch.nn.Parameter(model.llama.head.weight.detach() + 1)
    llava.save(model, processor, tmp_path / "saved")
    with warnings.catch_warnings(action="error"):  # that the file says two things
        assert same(load(tmp_path / "saved"), model)
    theirs = load_reference(tmp_path / "saved", torch.float32)
    assert torch.equal(theirs.lm_head.weight, model.llama.head.weight)


def test_a_head_that_was_tied_by_hand_is_written_as_the_config_says(copy, tmp_path):
    model, processor = llava.load(copy.write(), device="cpu", dtype=torch.float32)
    model.llama.head.weight = model.llama.embed.weight
    llava.save(model, processor, tmp_path / "saved")
    assert same(load(tmp_path / "saved"), model)
