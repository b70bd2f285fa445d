"""From the files to the parameters: names, shapes, dtypes, and what is refused."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import published
import pytest
import torch
from checkpoints import (
    ATTENTION,
    EMBED,
    HEAD,
    RENAMINGS,
    Checkpoint,
    configs,
    entry,
    header,
    leftovers,
    load,
    meta,
    read_config,
    refusal,
    rename,
    same,
    tied,
)
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from reference import ROOT, load_reference, published_names
from safetensors.torch import load_file, save_file

import weights

# ----------------------------------------------------------------------------------------------------------------
# Names


def test_names_are_one_to_one():
    assert len(weights.OURS) == len(weights.THEIRS) == len(weights.NAMES)


@pytest.mark.parametrize("name", published.CONFIGS)
def test_names_of_the_published_checkpoints(name, tmp_path):
    count, total, _ = published.PUBLISHED[name]
    entries = published.tensors(published.CONFIGS[name], *published.DTYPES[name])
    assert len(entries) == len({tensor for tensor, _, _ in entries}) == count
    assert sum(published.nbytes(*entry[1:]) for entry in entries) == total
    expected = meta(read_config(tmp_path, published.CONFIGS[name])[0]).state_dict()
    assert {weights.our_name(tensor): shape for tensor, shape, _ in entries} == {
        k: list(v.shape) for k, v in expected.items()
    }
    assert [weights.translate(weights.our_name(tensor), weights.THEIRS) for tensor, _, _ in entries] == [
        e[0] for e in entries
    ]


@pytest.mark.parametrize("layout", RENAMINGS)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_layout_loads(layout, shards, checkpoints, pairs, family, tmp_path):
    """To the same numbers as the published layout; and what this test calls a layout is one:
    transformers reads it, too.
    """
    folder = Checkpoint(checkpoints[family], tmp_path).write(layout, shards, leftovers(layout))
    assert same(load(folder), load(checkpoints[family]))
    if layout != "E" and shards == 1:
        theirs = published_names(load_reference(folder))
        assert all(torch.equal(theirs[name], tensor) for name, tensor in published_names(pairs[family][2]).items())


def test_the_numbers_are_those_of_the_file(copy):
    """Written out for some tensors of each part, so that two rows of the table cannot have changed places."""
    model = load(copy.write())
    for theirs, ours in {
        "vision_tower.vision_model.embeddings.class_embedding": model.vision.class_embedding,
        "vision_tower.vision_model.embeddings.position_embedding.weight": model.vision.position_embedding,
        "vision_tower.vision_model.pre_layrnorm.bias": model.vision.pre_norm.bias,
        "vision_tower.vision_model.encoder.layers.2.self_attn.k_proj.bias": model.vision.blocks[2].attention.wk.bias,
        "vision_tower.vision_model.encoder.layers.3.layer_norm2.weight": model.vision.blocks[3].norm2.weight,
        "multi_modal_projector.linear_2.weight": model.projector.linear_2.weight,
        "language_model.model.layers.2.mlp.up_proj.weight": model.llama.blocks[2].mlp.up.weight,
        "language_model.model.layers.0.post_attention_layernorm.weight": model.llama.blocks[0].mlp_norm.weight,
        HEAD: model.llama.head.weight,
    }.items():
        assert torch.equal(ours, copy.tensors[theirs]), theirs


# ----------------------------------------------------------------------------------------------------------------
# Strict both ways


@pytest.mark.parametrize("layout", RENAMINGS)
@pytest.mark.parametrize(
    "missing",
    [ATTENTION, HEAD, "multi_modal_projector.linear_1.bias", "vision_tower.vision_model.post_layernorm.weight"],
)
def test_a_missing_tensor_is_named(copy, layout, missing):
    del copy.tensors[missing]
    message = refusal(copy.write(layout))
    assert f" {rename(missing, layout)} is missing (1 in all)" in message


@pytest.mark.parametrize("name", [
    "language_model.model.layers.3.self_attn.q_proj.weight", "language_model.model.layers.01.self_attn.q_proj.weight",
    "language_model.model.layers.{i}.self_attn.q_proj.weight", "language_model.model.layers.0.self_attn.q_proj.bias",
    "image_newline", "model.image_newline", "vision_tower.vision_model.encoder.layers.4.mlp.fc1.weight", "",
    "language_model.model.language_model.model.norm.weight", "vision_tower.vision_model.head.weight",
])  # fmt: skip
def test_an_extra_tensor_is_named(copy, name):
    assert f"the tensor {name} has no place" in refusal(copy.write(beside={name: torch.zeros(2)}))


def test_a_misshaped_tensor_is_named(copy):
    copy.tensors[ATTENTION] = copy.tensors[ATTENTION][:-1].contiguous()
    message = refusal(copy.write("B"))
    assert rename(ATTENTION, "B") in message and "(47, 48)" in message and "(48, 48)" in message


def test_a_transposed_tensor_is_refused(copy):
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    copy.tensors[name] = copy.tensors[name].T.contiguous()
    assert name in refusal(copy.write())


@pytest.mark.parametrize("layout", "BCDE")
def test_a_tensor_under_two_names_is_named(copy, layout):
    name = "vision_tower.vision_model.pre_layrnorm.bias"
    message = refusal(copy.write(beside={rename(name, layout): copy.tensors[name].clone()}))
    assert name in message and rename(name, layout) in message and "twice" in message


def test_a_tensor_in_two_shards_is_named(copy):
    copy.write(shards=2)
    file = copy.folder / "model-00002-of-00002.safetensors"
    save_file(
        {**load_file(file), EMBED: copy.tensors[EMBED]} | load_file(copy.folder / "model-00001-of-00002.safetensors"),
        file,
    )
    message = refusal(copy.folder)
    assert "twice" in message and "00001-of-00002" in message and "00002-of-00002" in message


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_a_tensor_of_another_type_is_named(copy, dtype):
    copy.tensors[ATTENTION] = copy.tensors[ATTENTION].to(dtype)
    message = refusal(copy.write())
    assert f"the tensor {ATTENTION} is of type" in message


@pytest.mark.parametrize("asked", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mixed_dtypes_are_cast_to_the_one_asked_for(copy, asked):
    """As BakLlava is stored: a tower in float32, the rest in bfloat16."""
    stored = {name: torch.float32 if name.startswith("vision") else torch.bfloat16 for name in copy.tensors}
    stored["multi_modal_projector.linear_1.weight"] = torch.float16
    stored["multi_modal_projector.linear_2.weight"] = torch.float64
    copy.tensors = {name: tensor.to(stored[name]) for name, tensor in copy.tensors.items()}
    state = load(copy.write(), asked).state_dict()
    for name, tensor in copy.tensors.items():
        assert state[weights.our_name(name)].dtype == asked
        assert torch.equal(state[weights.our_name(name)], tensor.to(asked)), name


# ----------------------------------------------------------------------------------------------------------------
# Ties and sizes


def test_a_tied_head_may_be_absent(copy):
    del copy.tensors[HEAD]
    model = load(tied(copy).write())
    assert model.llama.head.weight is model.llama.embed.weight
    assert torch.equal(model.llama.head.weight, copy.tensors[EMBED])


def test_a_tied_head_may_be_there_if_it_is_equal(copy):
    copy.tensors[HEAD] = copy.tensors[EMBED].clone()
    model = load(tied(copy).write())
    assert model.llama.head.weight is model.llama.embed.weight


@pytest.mark.parametrize("layout", "AB")
def test_a_tied_head_that_differs_is_named_and_used(copy, layout):
    """As transformers 5 does it: configs that transformers 4 wrote in full say true at the top,
    whatever the model is.
    """
    with pytest.warns(UserWarning, match=f"tie_word_embeddings is true, but {re.escape(rename(HEAD, layout))} differs"):
        model = load(tied(copy).write(layout))
    assert torch.equal(model.llama.head.weight, copy.tensors[HEAD]) and torch.equal(
        model.llama.embed.weight, copy.tensors[EMBED]
    )
    assert model.config.tie_word_embeddings is model.config.text_config.tie_word_embeddings is False


def test_an_old_revision_with_more_rows_loads(copy):
    """The first 13B: another class name, 32128 rows instead of 32064, no tie_word_embeddings."""
    for name in (EMBED, HEAD):
        copy.tensors[name] = torch.cat([copy.tensors[name], torch.randn(64, 48)])
    rows = len(copy.tensors[EMBED])
    copy.config(
        architectures=["LlavaForCausalLM"], vocab_size=rows, tie_word_embeddings=..., text_config={"vocab_size": rows}
    )
    assert len(load(copy.write()).llama.embed.weight) == rows


def test_rows_that_the_config_does_not_know_of_are_refused(copy):
    copy.tensors[HEAD] = torch.cat([copy.tensors[HEAD], torch.randn(64, 48)])
    message = refusal(copy.write())
    assert HEAD in message and "config.json" in message


# ----------------------------------------------------------------------------------------------------------------
# Numbers that are not finite, files that are not there


def test_a_missing_shard_is_named(copy):
    copy.write(shards=3)
    (copy.folder / "model-00002-of-00003.safetensors").unlink()
    assert "lacks model-00002-of-00003.safetensors" in refusal(copy.folder)


NOT_FINITE = [("nan", torch.float32), ("inf", torch.float32), ("-inf", torch.bfloat16), ("1e30", torch.float16)]


@pytest.mark.parametrize("number, dtype", NOT_FINITE, ids=str)
def test_a_number_that_is_not_finite_is_a_warning_that_names_the_tensor(copy, number, dtype):
    """Also if it becomes so only in the dtype asked for."""
    copy.tensors[ATTENTION][3, 5] = float(number)
    folder = copy.write("C")
    with pytest.warns(UserWarning) as said:
        load(folder, dtype)
    assert len(said) == 1
    file = copy.folder / "model.safetensors"
    assert (
        str(said[0].message)
        == f"{file}: the tensor {rename(ATTENTION, 'C')} holds numbers that are not finite in {dtype}"
    )


def test_large_numbers_are_no_warning(copy):
    """Their sum overflows float16, they do not."""
    copy.tensors[ATTENTION].fill_(60000)
    folder = copy.write()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, torch.float16)


def test_an_empty_folder_is_refused(tmp_path):
    assert "config.json" in refusal(tmp_path)


def test_a_folder_without_weights_is_refused(copy):
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refusal(copy.folder)


# ----------------------------------------------------------------------------------------------------------------
# Memory and progress

MEASURE = """
import sys, llava
model, _ = llava.load(sys.argv[1], device="cpu", dtype="bfloat16")
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak * 1024, open("/proc/self/maps").read().count("safetensors\\n"), len(list(model.parameters())))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
@pytest.mark.parametrize("stored", ["F16", pytest.param("BF16", marks=pytest.mark.slow)])
def test_the_peak_of_the_memory_while_loading(copy, stored):
    """At most 1.05 x the weights at the asked dtype + 0.5 GiB, with and without a cast; and no file is left mapped."""
    copy.config(text_config={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12,
                             "num_attention_heads": 8,
                             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 16000})  # fmt: skip
    shapes = {name: tensor.shape for name, tensor in meta(configs(copy.folder)[0]).state_dict().items()}
    size = 2 * sum(shape.numel() for shape in shapes.values())
    assert size > 400e6
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape.numel()
        entries[weights.translate(name, weights.THEIRS)] = entry(start, end, shape, stored)
    file = copy.folder / "model.safetensors"
    file.write_bytes(header(entries))
    os.truncate(file, file.stat().st_size + end)  # zeros that take no room
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(copy.folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    peak, mapped, parameters = map(int, result.stdout.split())
    assert peak <= 1.05 * size + 0.5 * 2**30
    assert mapped == 0 and parameters == len(shapes)
    assert (
        "loading" in result.stderr and "100%" not in result.stdout
    )  # more than 100 million parameters: progress is shown


def test_no_progress_is_shown_for_a_small_model(checkpoints, capfd):
    enable_progress_bars()  # the oracle's are switched off, and with them all that are made by the Hub's client
    try:
        load(checkpoints["llama"])
    finally:
        disable_progress_bars()
    assert capfd.readouterr() == ("", "")
