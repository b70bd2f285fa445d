"""The parity ladder: every stage of ours against transformers, on random checkpoints in the published layout."""

import re

import line
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
    assert over[0] == "llama.2" and "llama.2 is the first that diverges" in capsys.readouterr().out


def test_a_stage_that_is_not_a_number_is_over_its_bound():
    nan, one = torch.tensor([float("nan"), 1.0]), torch.ones(2)
    rows = parity.compare({"logits": nan}, {"logits": one}, torch.float64)
    assert parity.report(rows, ("a", "b")) == ["logits"]


def test_the_command_compares_with_transformers(checkpoints, family, picture, tmp_path, capsys):
    picture.save(tmp_path / "picture.png")
    assert parity.main([str(checkpoints[family]), "--image", str(tmp_path / "picture.png")]) == 0
    assert "all within their bounds" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", line.LINE)
def test_the_command_compares_each_of_the_line(made, name, tmp_path, capsys):
    """With the stages of tiles where there are some, and a wrong one among them is named by a dump."""
    line.photo(40, 61).save(tmp_path / "photo.png")
    command = [str(made.folder(name)), "--image", str(tmp_path / "photo.png")]
    assert parity.main(command) == 0
    out = capsys.readouterr().out
    tiled = name in line.TILED
    assert [bool(re.search(f"^{stage} ", out, re.M)) for stage in ("sizes", "packed", "newline")] == [tiled] * 3
    assert "all within their bounds" in out and "only one of the two" not in out
    file = str(tmp_path / "stages.safetensors")
    assert parity.main([*command, "--no-gradients", "--dump", file]) == 0
    stages, about = parity.read_stages(file)
    for wrong in ("sizes", "packed", "newline") if tiled else ("projector",):
        changed = {**stages, wrong: stages[wrong].flip(-1)}
        parity.write_stages(changed, file, **about)
        assert parity.main([*command, "--no-gradients", "--against", file]) == 1
        assert f"{wrong} is the first that diverges, 1 in all" in capsys.readouterr().out


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
    assert "vision.2 is the first that diverges" in out and "no stage of that name: unheard_of" in out


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


@pytest.fixture(scope="module")
def dumped(checkpoints, picture, tmp_path_factory):
    """A dump in float32 of one question about one picture, neither of them the usual one: (its file, the model)."""
    folder = tmp_path_factory.mktemp("dump")
    picture.save(folder / "picture.png")
    file, model = str(folder / "stages.safetensors"), str(checkpoints["llama"])
    command = [model, "--dtype", "float32", "--no-gradients", "--image", str(folder / "picture.png")]
    assert parity.main([*command, "--question", "Is it red?", "--dump", file]) == 0
    return file, model


def changed(dumped, tmp_path, change, keep=True):
    """A copy of the dump whose stages are changed, with its metadata or without."""
    stages, about = parity.read_stages(dumped[0])
    change(stages)
    parity.write_stages(stages, tmp_path / "changed.safetensors", **(about if keep else {}))
    return [dumped[1], "--against", str(tmp_path / "changed.safetensors")]


def test_a_dump_says_what_went_in_and_ours_is_asked_the_same(dumped, capsys):
    file, model = dumped
    picture = str(parity.Path(file).parent / "picture.png")
    about = {"model": model, "question": "Is it red?", "picture": picture, "dtype": "float32"}
    assert parity.read_stages(file)[1] == about
    assert parity.main([model, "--against", file]) == 0
    out = capsys.readouterr().out
    assert f"{model} in float32, asked 'Is it red?' about {picture!r}" in out and "all within" in out.splitlines()[-1]
    assert parity.main([model, "--against", file, "--question", "Is it blue?"]) == 1  # what is given counts
    assert "ids is the first that diverges" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parity.main([model, "--against", file, "--dtype"])


def test_a_picture_that_is_not_here_is_named(dumped, tmp_path, capsys):
    stages, about = parity.read_stages(dumped[0])
    parity.write_stages(stages, tmp_path / "lost.safetensors", **{**about, "picture": "no/where.png"})
    assert parity.main([dumped[1], "--against", str(tmp_path / "lost.safetensors")]) == 2
    said = capsys.readouterr().err
    assert "is of the picture 'no/where.png', which is not here: give --image" in said and said.count("\n") == 1


def test_both_shapes_are_printed_where_they_differ(dumped, tmp_path, capsys):
    def change(stages):
        stages["projector"] = torch.cat([stages["projector"][:, :, :1], stages["projector"]], dim=2)  # the class token
        stages["llama.1"] = stages["llama.1"][0]

    assert parity.main(changed(dumped, tmp_path, change)) == 1
    out = capsys.readouterr().out.splitlines()
    lines = {line.split()[0]: line for line in out if line}
    shape = parity.read_stages(dumped[0])[0]["projector"].shape
    more = (*shape[:2], shape[2] + 1, *shape[3:])
    assert lines["projector"].endswith(f" {more} against {tuple(shape)}  <-- over")
    assert ": its batch dimension is missing  <-- over" in lines["llama.1"]
    assert "against" not in lines["logits"] and "projector is the first that diverges, 2 in all" in out[-1]


def test_another_shape_and_no_number_are_over_in_sixteen_bits_too():
    one, more = {"logits": torch.ones(2)}, {"logits": torch.ones(3)}
    nan = {"logits": torch.tensor([1.0, float("nan")])}
    for other in (more, nan):
        assert parity.report(parity.compare(other, one, torch.bfloat16), ("a", "b")) == ["logits"]
    assert parity.report(parity.compare(one, one, torch.bfloat16), ("a", "b")) == []


@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
def test_another_dtype_is_hinted_at(dumped, tmp_path, capsys, kept):
    """Compared in float64 with numbers that were computed in float32, whatever they are kept in."""

    def change(stages):
        stages |= {name: tensor.to(kept) for name, tensor in stages.items() if tensor.is_floating_point()}

    command = [*changed(dumped, tmp_path, change), "--dtype", "float64"]
    assert parity.main(command) == 1
    assert "try --dtype float32" in capsys.readouterr().out
    assert parity.main([*command[:-1], "float32"]) == 0
    assert "hint: " not in capsys.readouterr().out


def test_a_wrong_number_is_no_matter_of_dtype(dumped, tmp_path, capsys):
    def change(stages):
        stages |= {name: tensor.double() for name, tensor in stages.items() if tensor.is_floating_point()}
        stages["vision.1"] *= 1.01

    assert parity.main([*changed(dumped, tmp_path, change), "--dtype", "float64"]) == 1
    assert "hint: " not in capsys.readouterr().out


def test_names_are_counted_where_they_are_many(dumped, tmp_path, capsys):
    def change(stages):
        logits = stages["logits"]
        stages.clear()
        stages |= {"logits": logits, **{f"strange.{i}": torch.ones(1) for i in range(100)}}

    assert parity.main(changed(dumped, tmp_path, change)) == 0
    out = capsys.readouterr().out
    assert "no stage of that name: strange.0, strange.1, strange.10, strange.11 and 96 more\n" in out
    assert "the file does not have it: ids, pixels, vision.0, vision.1 and 14 more\n" in out
    assert "\n1 stage, " in out and max(map(len, out.splitlines())) < 200
    assert parity.main(changed(dumped, tmp_path, lambda stages: (change(stages), stages.pop("logits")))) == 2
    said = capsys.readouterr().err
    assert "none of our stages, which are called ids, pixels, vision.0, vision.1 and" in said and len(said) < 250


def test_zeros_behind_a_difference_are_explained(pair, picture):
    """The language model's norm gives the same for numbers that float32 cannot tell apart; the table says so."""
    norm = pair[0].double().llama.norm
    x = torch.randn(3, norm.weight.shape[0], dtype=torch.float64) + 3
    assert (x * (1 + 1e-15) != x).any() and torch.equal(norm(x * (1 + 1e-15)), norm(x))
    rows = [("ids", 0.0, 0.0, 1.0, 0.0), ("vision.0", 0.0, 0.0, 1.0, 1e-9), ("llama.1", 1e-15, 1e-15, 1.0, 1e-9)]
    zeros = [(name, 0.0, 0.0, 1.0, 1e-9) for name in ("llama.2", "logits")]
    (said,) = parity.why_zeros(rows + zeros)
    assert said.startswith("llama.2, logits: 0, though stages before differ.") and "norms compute in float32" in said
    assert parity.why_zeros(rows) == parity.why_zeros(zeros) == []
    over = ("llama.1", 9e-7, 9e-7, 1.0, 1e-9)  # float32 shows this: a 0 behind it has another reason
    assert parity.why_zeros([*rows[:2], over, *zeros]) == []
