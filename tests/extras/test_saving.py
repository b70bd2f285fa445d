"""A saved checkpoint: what loads again, here and in transformers, and what is left when saving fails."""

import errno
import json
from pathlib import Path

import pytest
import torch
from checkpoints import HEAD, load, same, tied
from reference import load_reference, published_names
from safetensors.torch import load_file

import llava
from extras import saving

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


@pytest.mark.parametrize("number", range(4))
def test_a_disk_that_is_full_later_leaves_the_old_checkpoint(saved, number, monkeypatch):
    """Each of the small files in turn is the one for which there is no room: three configs and the tokenizer."""
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
