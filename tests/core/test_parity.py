"""The parity ladder: every stage of ours against transformers, on random checkpoints in the published layout."""

import parity
import pytest
import torch
from PIL import Image
from reference import load_reference
from safetensors.torch import load_file, save_file

import llava
import weights


@pytest.fixture(scope="module")
def picture():
    torch.manual_seed(0)
    return Image.fromarray(torch.randint(0, 256, (40, 61, 3), dtype=torch.uint8).numpy())


def both(checkpoints, family, dtype, picture, **options):
    """The stages of ours and of the reference on one checkpoint."""
    folder = checkpoints[family]
    stages, config, processor = parity.run_ours(str(folder), dtype, "cpu", picture, True)
    reference = load_reference(folder, dtype)
    prompt = processor.prompt(parity.QUESTION)
    return stages, parity.theirs(reference, folder, config, processor.preprocess_config, prompt, picture, **options)


def test_every_stage_in_float64(checkpoints, family, picture):
    ours, theirs = both(checkpoints, family, torch.float64, picture)
    assert set(ours) == set(theirs)
    rungs = [
        "ids",
        "pixels",
        *(f"vision.{i}" for i in range(5)),
        "projector",
        "merge",
        "llama.1",
        "llama.2",
        "llama.3",
        "logits",
    ]
    rungs += ["attention.1", "attention.2", "attention.3", "loss"]
    assert list(ours)[: len(rungs)] == rungs
    assert sum(name.startswith("gradient.") for name in ours) > 60
    assert len(ours["tokens"][0]) == parity.NEW_TOKENS
    rows = parity.compare(ours, theirs, torch.float64)
    assert [row for row in rows if not row[2] <= row[4]] == []


def test_every_stage_in_float32(checkpoints, family, picture):
    rows = parity.compare(*both(checkpoints, family, torch.float32, picture), torch.float32)
    assert [row for row in rows if not row[2] <= row[4]] == []


@pytest.mark.parametrize("dtype", parity.SIXTEEN)
def test_sixteen_bits_are_no_worse_than_the_references(checkpoints, family, picture, dtype):
    ours, theirs = both(checkpoints, family, dtype, picture, gradients=False)
    truth = both(checkpoints, family, torch.float32, picture, gradients=False)[1]["logits"]
    assert ours["logits"].dtype == dtype
    same, kl = parity.judge_logits(ours["logits"], truth)
    their_same, their_kl = parity.judge_logits(theirs["logits"], truth)
    assert same >= their_same - 0.05 and kl <= 1.1 * their_kl + 1e-9
    assert not parity.report_logits(ours["logits"], theirs["logits"], truth)


def test_one_wrong_number_is_traced_to_its_stage(checkpoints, picture, capsys):
    folder = checkpoints["llama"]
    model, processor = llava.load(str(folder), device="cpu", dtype="float64")
    right = parity.ours(model, processor, picture)
    with torch.no_grad():
        model.llama.blocks[1].mlp.up.weight[0, 0] += 1e-3
    rows = parity.compare(parity.ours(model, processor, picture), right, torch.float64)
    over = parity.report(rows, ("broken", "right"))
    assert over[0] == "llama.2" and "llama.2 is the first that departs" in capsys.readouterr().out


def test_a_stage_that_is_not_a_number_is_over_its_bound():
    nan, one = torch.tensor([float("nan"), 1.0]), torch.ones(2)
    rows = parity.compare({"logits": nan}, {"logits": one}, torch.float64)
    assert parity.report(rows, ("a", "b")) == ["logits"]


def test_the_command_compares_with_transformers(checkpoints, family, picture, tmp_path, capsys):
    picture.save(tmp_path / "picture.png")
    assert parity.main([str(checkpoints[family]), "--image", str(tmp_path / "picture.png")]) == 0
    assert "all within their bounds" in capsys.readouterr().out


def test_the_command_dumps_and_compares_a_file_of_stages(checkpoints, picture, tmp_path, capsys):
    picture.save(tmp_path / "picture.png")
    command = [str(checkpoints["llama"]), "--image", str(tmp_path / "picture.png")]
    file = str(tmp_path / "stages.safetensors")
    assert parity.main([*command, "--dump", file]) == 0
    assert parity.main([*command, "--against", file]) == 0
    stages = load_file(file)
    stages["vision.2"][0, 3] += 1e-3  # a port with one wrong stage, and one of another name
    save_file({**stages, "unheard_of": torch.ones(1)}, file)
    assert parity.main([*command, "--against", file]) == 1
    out = capsys.readouterr().out
    assert "vision.2 is the first that departs" in out and "no stage of that name: unheard_of" in out


def test_bad_arguments_are_one_line(tmp_path, capsys):
    assert parity.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert parity.main(["--dtype", "int8"]) == 2
    (tmp_path / "text.md").write_text("no stages")
    for wrong in (["--against", str(tmp_path / "text.md")], ["--dump", str(tmp_path / "nowhere" / "x.safetensors")]):
        capsys.readouterr()
        assert parity.main(wrong) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1


def test_names_of_gradients_are_ours(pair):
    model, _, reference = pair
    names = {weights.our_name(name) for name, _ in reference.named_parameters()}
    assert names == {name for name, _ in model.named_parameters()}
