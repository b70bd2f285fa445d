"""A model that is split over several processes answers as the whole one does: two of them, on the CPU, over gloo."""

import json
import subprocess
import sys
from pathlib import Path

import line
import pytest
import torch
from groups import torchrun
from reference import ROOT, TINY
from safetensors.torch import load_file, save_file

import llava
import weights
from extras import parallel

QUESTION = "USER: <image>\nWhat is there? ASSISTANT:"


def answer(folder, out):
    """One process of the group: write what the model gives, and what it holds, to files."""
    model, processor = llava.load(folder, device="cpu", dtype="float64")
    inputs = processor(QUESTION.replace("<image>", processor.image_token), TINY / "scene.png")
    cache = model.init_kv_cache(1, 1000)
    logits = model(**inputs, kv_cache=cache, output_attentions=False).logits
    ids = model.generate(**inputs, max_new_tokens=12)
    beams = model.generate(**inputs, max_new_tokens=6, num_beams=3)
    held = sum(tensor.nbytes for tensor in model.llama.blocks.state_dict().values())
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "whole"
    save_file({"logits": logits, "ids": ids, "beams": beams}, f"{out}/{rank}.safetensors")
    about = {"held": held, "heads": cache["keys.0"].shape[1]}
    Path(f"{out}/{rank}.json").write_text(json.dumps(about))


@pytest.mark.slow
def test_two_processes_give_the_logits_of_one(checkpoints, family, tmp_path):
    torchrun(__file__, checkpoints[family], tmp_path)
    answer(str(checkpoints[family]), tmp_path)
    whole, about = load_file(tmp_path / "whole.safetensors"), json.loads((tmp_path / "whole.json").read_text())
    for rank in range(2):
        part, said = load_file(tmp_path / f"{rank}.safetensors"), json.loads((tmp_path / f"{rank}.json").read_text())
        torch.testing.assert_close(part["logits"], whole["logits"], rtol=1e-10, atol=1e-10)
        assert torch.equal(part["ids"], whole["ids"]) and torch.equal(part["beams"], whole["beams"])
        assert said["held"] < 0.51 * about["held"] and said["heads"] == about["heads"] // 2


@pytest.mark.parametrize("dim", [0, 1])
def test_each_process_reads_its_own_part_of_a_matrix(checkpoints, monkeypatch, dim):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    file = weights.shards(checkpoints["llama"])[0]
    with weights.safe_open(file, framework="pt") as tensors:
        name = "language_model.model.layers.0.mlp.down_proj.weight"
        layer = parallel.SplitLinear(80, 48, torch.float64, dim)
        own = layer.take_weight(tensors.get_slice(name), torch.device("cpu"))
        expected = tensors.get_tensor(name)[:, 60:] if dim else tensors.get_tensor(name)[36:]
    assert torch.equal(own, expected.double()) and torch.equal(layer.w, own)


def test_each_process_has_its_own_part_of_a_bias(monkeypatch):
    """Qwen2 has biases where matrices are split by rows. The processes' outputs side by side are the whole one's."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    whole, x, parts = torch.nn.Linear(6, 8, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64), []
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        layer = parallel.SplitLinear(6, 8, torch.float64, 0, bias=True)
        layer.take_weight(whole.weight, "cpu")
        layer.load_state_dict({"w": layer.w, "bias": whole.bias}, assign=True)
        parts.append(layer(x))
    torch.testing.assert_close(torch.cat(parts, dim=-1), whole(x))


@pytest.mark.slow
def test_each_of_the_line_gives_in_two_processes_the_logits_of_one(made, tmp_path):
    """Biases, tied matrices, Llama 3.1's frequencies, pictures in tiles: one group reads all of them in turn."""
    for name in line.LINE:
        (tmp_path / name).mkdir()
    pairs = [path for name in line.LINE for path in (made.folder(name), tmp_path / name)]
    torchrun(__file__, *pairs)
    for name in line.LINE:
        answer(str(made.folder(name)), tmp_path / name)
        whole = load_file(tmp_path / name / "whole.safetensors")
        for rank in range(2):
            part = load_file(tmp_path / name / f"{rank}.safetensors")
            torch.testing.assert_close(part["logits"], whole["logits"], rtol=1e-10, atol=1e-10, msg=name)
            assert torch.equal(part["ids"], whole["ids"]) and torch.equal(part["beams"], whole["beams"]), name


@pytest.mark.slow
def test_the_command_line_speaks_with_one_voice():
    command = ["--model", "tiny", "--image", "tiny/scene.png", "--device", "cpu"]
    alone = subprocess.run(
        [sys.executable, "llava.py", *command], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    together = torchrun("llava.py", *command)
    assert together.stdout == alone
    assert together.stderr.count("tokens/s") == 1


@pytest.mark.slow
@pytest.mark.parametrize("more, words", [
    (["--chat"], "cannot share one standard input"),
    (["--quantize", "int8"], "neither quantised nor compiled"),
])  # fmt: skip
def test_what_does_not_go_together_is_said(more, words):
    result = torchrun("llava.py", "--model", "tiny", "--device", "cpu", "--prompt", "Hi", *more, status=2)
    assert result.stderr.count(words) >= 1


@pytest.mark.slow
def test_an_uneven_split_is_refused():
    result = torchrun("llava.py", "--model", "tiny", "--device", "cpu", "--prompt", "Hi", processes=3, status=2)
    assert "4 key-value heads and 352 columns cannot be dealt out evenly to 3 processes" in result.stderr


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    for folder, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        answer(folder, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
