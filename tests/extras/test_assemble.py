"""extras/assemble.py: a CLIP or SigLIP and a language model become a LLaVA that computes what its parts did."""

import json
import shutil
import tempfile

import pytest
import torch
from PIL import Image
from reference import EDGE, PATCH, PREPROCESSOR, TINY
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)  # fmt: skip

import llava
from extras import assemble, finetune

VISION = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
          "image_size": EDGE, "patch_size": PATCH}  # fmt: skip
CAPTIONS = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 99}  # fmt: skip
TEXT = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 638, "max_position_embeddings": 512, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
SIGLIP = PREPROCESSOR | {"image_processor_type": "SiglipImageProcessor", "size": {"height": EDGE, "width": EDGE},
                         "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
del SIGLIP["crop_size"], SIGLIP["do_center_crop"]

TOWERS = {
    "CLIPModel": lambda: CLIPModel(CLIPConfig(vision_config=VISION, text_config=CAPTIONS, projection_dim=16)),
    "CLIPVisionModel": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "SiglipModel": lambda: SiglipModel(SiglipConfig(vision_config=VISION, text_config=CAPTIONS)),
    "SiglipVisionModel": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
}
LANGUAGES = {
    "Llama": lambda **changes: LlamaForCausalLM(LlamaConfig(**{**TEXT, **changes})),
    "Mistral": lambda **changes: MistralForCausalLM(MistralConfig(**{**TEXT, "sliding_window": 9, **changes})),
    "Qwen2": lambda **changes: Qwen2ForCausalLM(Qwen2Config(**{**TEXT, "tie_word_embeddings": True, **changes})),
}


def randomised(model):
    """Norms that are not 1 and biases that are not 0, or one left out would not be noticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def plain_tokenizer(folder):
    """tiny's tokenizer without <image> and <pad>, as a language model has it."""
    values = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    values["added_tokens"] = [x for x in values["added_tokens"] if x["content"] not in ("<image>", "<pad>")]
    for token in ("<image>", "<pad>"):
        values["model"]["vocab"].pop(token, None)
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """name → the folder in which transformers 5 saved a part."""
    folders = {}
    torch.manual_seed(0)
    for name, make in {**TOWERS, **LANGUAGES}.items():
        folders[name] = tmp_path_factory.mktemp(name)
        randomised(make()).save_pretrained(folders[name])
        if name in LANGUAGES:
            plain_tokenizer(folders[name])
        else:
            file = folders[name] / "preprocessor_config.json"
            file.write_text(json.dumps(SIGLIP if "Siglip" in name else PREPROCESSOR))
    return folders


def published(parts, name, folder):
    """A copy of a tower with the names that its publishers use: vision_model. in front, and positions stored."""
    shutil.copytree(parts[name], folder)
    tensors = load_file(folder / "model.safetensors")
    if name.endswith("VisionModel"):
        tensors = {f"vision_model.{key}": x for key, x in tensors.items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tower_features(folder, model, pixels):
    """What transformers' own tower gives, of the layer that the assembled model reads."""
    whole = {"clip": CLIPModel, "siglip": SiglipModel, "clip_vision_model": CLIPVisionModel,
             "siglip_vision_model": SiglipVisionModel}  # fmt: skip
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    tower = whole[kind].from_pretrained(folder, dtype=torch.float64).eval()
    tower = tower.vision_model if kind in ("clip", "siglip") else tower
    states = tower(pixels, output_hidden_states=True).hidden_states
    assert len(states) == 4
    return states[model.config.vision_feature_layer][:, 1 if "clip" in kind else 0 :]


def close(a, b):
    return (a - b).norm() <= 1e-9 * b.norm()


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    "layout", ["as published", pytest.param("as transformers 5 saves it", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("tower", TOWERS)
def test_features_and_logits_are_those_of_the_two_parts(parts, tmp_path, tower, layout, language, capsys):
    eye = published(parts, tower, tmp_path / "eye") if layout == "as published" else parts[tower]
    command = ["--vision", str(eye), "--language", str(parts[language]), "--out", str(tmp_path / "new")]
    assert assemble.main(command) == 0, capsys.readouterr().err
    model, processor = llava.load(str(tmp_path / "new"), device="cpu", dtype=torch.float64)
    pixels = torch.randn(2, 3, EDGE, EDGE, dtype=torch.float64)
    heard = []
    model.projector.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    with torch.no_grad():
        model.get_image_features(pixels)
        assert close(heard[0], tower_features(eye, model, pixels))
        alone = AutoModelForCausalLM.from_pretrained(parts[language], dtype=torch.float64).eval()
        ids = torch.randint(3, 638, (2, 20))
        assert close(model(ids).logits[..., :638], alone(ids).logits)
    assert processor.tokenizer.id("<image>") == model.config.image_token_index == 638
    assert model.config.padding == processor.tokenizer.id("<pad>") == 639
    assert model.config.text_config.vocab_size == len(model.llama.head.weight) == 640


@pytest.mark.parametrize("tower", ["CLIPModel", "SiglipVisionModel"])
def test_transformers_loads_what_was_assembled(parts, tmp_path, tower):
    command = ["--vision", str(parts[tower]), "--language", str(parts["Llama"]), "--out", str(tmp_path / "new")]
    assert assemble.main(command) == 0
    model, processor = llava.load(str(tmp_path / "new"), device="cpu", dtype=torch.float64)
    reference, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "new", dtype=torch.float64, output_loading_info=True
    )
    assert not any(info.values())
    inputs = processor("USER: <image>\nWhat? ASSISTANT:", Image.new("RGB", (50, 40), "red"))
    ids = inputs["input_ids"][0]
    ids = ids.repeat_interleave(torch.where(ids == 638, 16, 1))[None]
    with torch.no_grad():
        theirs = reference(input_ids=ids, pixel_values=inputs["pixel_values"].double()).logits
        assert close(model(**inputs).logits, theirs)


def test_what_was_assembled_is_trained_on_and_its_new_rows_are_average(parts, tmp_path, capsys):
    new = tmp_path / "new"
    command = ["--vision", str(parts["CLIPModel"]), "--language", str(parts["Llama"]), "--out", str(new)]
    assert assemble.main(command) == 0
    rows = load_file(new / "model.safetensors")["language_model.model.embed_tokens.weight"]
    assert (rows[638:] - rows[:638].mean(0)).abs().max() < 1e-3
    lines = []
    for i in range(5):
        Image.new("RGB", (30, 30), (50 * i, 0, 0)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": "What?", "answer": "red"}))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    capsys.readouterr()
    command = ["--model", str(new), "--data", str(tmp_path / "questions.jsonl"), "--images", str(tmp_path)]
    assert finetune.main([*command, "--stage", "1", "--out", str(tmp_path / "trained"), "--device", "cpu"]) == 0
    assert "too few to tell" in capsys.readouterr().out


def test_each_part_keeps_its_dtype_and_the_result_is_the_same_each_time(parts, tmp_path):
    shutil.copytree(parts["Llama"], tmp_path / "half")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    save_file({name: x.half() for name, x in tensors.items()}, tmp_path / "half" / "model.safetensors")
    made = []
    for n in range(2):
        command = ["--vision", str(parts["CLIPModel"]), "--language", str(tmp_path / "half"), "--out"]
        assert assemble.main([*command, str(tmp_path / f"{n}")]) == 0
        made.append(load_file(tmp_path / f"{n}" / "model.safetensors"))
    assert {x.dtype for name, x in made[0].items() if name.startswith("vision")} == {torch.float32}
    assert {x.dtype for name, x in made[0].items() if not name.startswith("vision")} == {torch.float16}
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_rows_to_spare_are_used_and_a_pad_token_of_its_own_stays(parts, tmp_path):
    """Qwen2 has more rows than tokens, and a token that pads."""
    folder = tmp_path / "qwen"
    torch.manual_seed(1)
    randomised(LANGUAGES["Qwen2"](vocab_size=700, pad_token_id=5)).save_pretrained(folder)
    plain_tokenizer(folder)
    model, processor = assemble.assemble(str(parts["SiglipModel"]), str(folder))
    assert model.config.padding == 5 and processor.tokenizer.id("<pad>") is None
    assert len(model.llama.embed.weight) == 700 and model.config.image_token_index == 638
    assert model.llama.head.weight is model.llama.embed.weight


def test_what_was_assembled_prepares_a_prompt_before_it_is_saved(parts):
    """Nothing of the language model's names and templates is passed on: they are not LLaVA's."""
    _, processor = assemble.assemble(str(parts["CLIPModel"]), str(parts["Llama"]))
    assert processor.tokenizer.beside == {}
    assert processor.decode(processor("a dog")["input_ids"][0].tolist()) == "a dog"


def test_a_pad_of_minus_one_is_none(parts, tmp_path):
    shutil.copytree(parts["Llama"], tmp_path / "text")
    change(tmp_path / "text", pad_token_id=-1)
    _, processor = assemble.assemble(str(parts["CLIPModel"]), str(tmp_path / "text"))
    assert processor.config.padding == processor.tokenizer.id("<pad>") is not None


def test_an_end_that_generation_config_does_not_name_is_that_of_the_config(parts, tmp_path):
    shutil.copytree(parts["Llama"], tmp_path / "text")
    (tmp_path / "text" / "generation_config.json").write_text('{"eos_token_id": null, "pad_token_id": null}')
    change(tmp_path / "text", pad_token_id=7)
    model, _ = assemble.assemble(str(parts["CLIPModel"]), str(tmp_path / "text"))
    assert model.config.eos_token_ids == [2] and model.config.padding == 7


def test_a_vocabulary_that_is_absent_is_that_of_the_kind(parts, tmp_path):
    """Qwen2's has 151936 rows by default, and not Llama's 32000."""
    shutil.copytree(parts["Qwen2"], tmp_path / "text")
    file = tmp_path / "text" / "config.json"
    values = json.loads(file.read_text())
    del values["vocab_size"]
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"has the shape \(638, 48\), by config.json it should be \(151936, 48\)"):
        assemble.assemble(str(parts["SiglipModel"]), str(tmp_path / "text"))


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def drop(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def add(folder, name, x):
    save_file({**load_file(folder / "model.safetensors"), name: x}, folder / "model.safetensors")


NORM = "encoder.layers.0.layer_norm1.weight"
BROKEN = {  # what is done to a CLIPVisionModel or a Llama → the sentence
    "a tower that is none": (
        lambda eye, text: change(eye, model_type="resnet"),
        "model_type is 'resnet'; --vision takes clip"),
    "a text that is none": (
        lambda eye, text: change(text, model_type="gpt2"),
        "'gpt2'; --language takes llama, mistral, qwen2"),
    "no config": (
        lambda eye, text: (eye / "config.json").unlink(),
        "holds no config.json"),
    "no tokenizer": (
        lambda eye, text: (text / "tokenizer.json").unlink(),
        "holds no tokenizer.json"),
    "no preprocessor": (
        lambda eye, text: (eye / "preprocessor_config.json").unlink(),
        "holds no preprocessor_config.json"),
    "a broken tokenizer": (
        lambda eye, text: (text / "tokenizer.json").write_text("{}"),
        "cannot be read as a tokenizer"),
    "no ends": (
        lambda eye, text: [change(text, eos_token_id=None), (text / "generation_config.json").unlink()],
        "eos_token_id"),
    "too few positions": (
        lambda eye, text: change(text, max_position_embeddings=20),
        "a picture takes 16 positions and the"),
    "an unknown field": (
        lambda eye, text: change(text, residual_multiplier=2.0),
        "residual_multiplier = 2.0 is not known here"),
    "another activation": (
        lambda eye, text: change(eye, hidden_act="relu"),
        "hidden_act is 'relu'"),
    "another size of pictures": (
        lambda eye, text: change(eye, image_size=35),
        "the 35 x 35 pixels of the vision tower"),
    "a tensor less": (
        lambda eye, text: drop(eye, NORM),
        f"the tensor vision_model.{NORM} is missing (1 in all)"),
    "a head less": (
        lambda eye, text: drop(text, "lm_head.weight"),
        "the tensor lm_head.weight is missing"),
    "a tensor more": (
        lambda eye, text: add(eye, "encoder.extra", torch.ones(1)),
        "encoder.extra has no place"),
    "a tensor more of the text": (
        lambda eye, text: add(text, "model.extra", torch.ones(1)),
        "model.extra has no place"),
    "a tensor twice": (
        lambda eye, text: add(eye, f"vision_model.{NORM}", torch.ones(32)),
        "appears twice"),
    "another shape": (
        lambda eye, text: add(eye, NORM, torch.ones(31)),
        "has the shape (31,), by config.json it should be (32,)"),
    "whole numbers": (
        lambda eye, text: add(eye, NORM, torch.ones(32, dtype=torch.int8)),
        "is of type I8"),
    "a tower's tensor in the text": (
        lambda eye, text: add(text, "vision_tower." + NORM, torch.ones(32)),
        "has no place"),
    "a pad that is a word": (
        lambda eye, text: change(text, pad_token_id="x"),
        "Llama/config.json: pad_token_id is 'x', of the wrong type"),
    "a list of pads": (
        lambda eye, text: change(text, pad_token_id=[3]),
        "pad_token_id is [3], of the wrong type"),
    "a pad beyond all bounds": (
        lambda eye, text: change(text, pad_token_id=2**40),
        "pad_token_id is 1099511627776, out of range"),
    "a pad of the generation that is a word": (
        lambda eye, text: (text / "generation_config.json").write_text('{"pad_token_id": "x"}'),
        "Llama/generation_config.json: pad_token_id is 'x', of the wrong type"),
    "a vocabulary in quotes": (
        lambda eye, text: change(text, vocab_size="638"),
        "vocab_size is '638', of the wrong type"),
    "a list of vocabularies": (
        lambda eye, text: change(text, vocab_size=[638]),
        "vocab_size is [638], of the wrong type"),
    "a vocabulary below nothing": (
        lambda eye, text: change(text, vocab_size=-3),
        "vocab_size is -3, out of range"),
    "a tower's part that is a word": (
        lambda eye, text: change(eye, model_type="clip", vision_config="x"),
        "CLIPVisionModel/config.json: vision_config is 'x', and must be an object"),
    "captions that are a word": (
        lambda eye, text: change(eye, model_type="clip", vision_config=VISION, text_config="x"),
        "text_config is 'x', and must be an object"),
    "a tower's layers in quotes": (
        lambda eye, text: change(eye, model_type="clip", vision_config={**VISION, "num_hidden_layers": "3"}),
        "CLIPVisionModel/config.json: vision_config: num_hidden_layers is '3', of the wrong type"),
    "no weights": (
        lambda eye, text: (text / "model.safetensors").unlink(),
        "holds neither model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(parts, tmp_path, capsys, what):
    for name in ("CLIPVisionModel", "Llama"):
        shutil.copytree(parts[name], tmp_path / name)
    broken, said = BROKEN[what]
    broken(tmp_path / "CLIPVisionModel", tmp_path / "Llama")
    command = ["--vision", str(tmp_path / "CLIPVisionModel"), "--language", str(tmp_path / "Llama")]
    assert assemble.main([*command, "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert tempfile.gettempdir() not in error.replace(str(tmp_path), "")  # it names the parts, not what is made of them


def test_wrong_names_are_one_line(parts, tmp_path, capsys):
    for tower, language, out, said in (
        ("nowhere", str(parts["Llama"]), "new", "there is no model folder nowhere"),
        (str(parts["CLIPModel"]), "tiny", "new", "--language tiny: tiny is a whole LLaVA"),
        (str(TINY), str(parts["Llama"]), "new", "model_type is 'llava'; --vision takes"),
        (str(parts["CLIPModel"]), str(parts["CLIPModel"]), "new", "model_type is 'clip'; --language takes"),
        (str(parts["CLIPModel"]), str(parts["Llama"]), "", "is there already"),
    ):
        assert assemble.main(["--vision", tower, "--language", language, "--out", str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
