"""Prompts of the line of LLaVAs: the exact strings, which of them a folder gets, and where an answer ends."""

import json

import line
import pytest
from line import CHATML, LLAMA_3, PHI_3, write_tokenizer
from official import CURIOUS, HELPFUL
from PIL import Image
from reference import TINY
from transformers import AutoTokenizer

import llama
import llava
import vision
from extras import checks, forms, turn

SYSTEM_3 = "<|start_header_id|>system<|end_header_id|>\n\n"
USER_3, ANSWER_3 = "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"
JOY = SYSTEM_3 + "Cutting Knowledge Date: December 2023\nToday Date: 26 July 2024\n\n"
RESERVED = "<|reserved_special_token_{}|>".format
CASES = {  # model_type, text, tokens → the prompt of one question about a picture, that of two turns
    ("llava", "llama", ()): (
        "USER: <image>\nQ ASSISTANT:", "USER: <image>\nQ ASSISTANT: A</s>USER: R ASSISTANT:"),
    ("llava", "mistral", ()): (
        "USER: <image>\nQ\nASSISTANT:", "USER: <image>\nQ\nASSISTANT: A</s>USER: R\nASSISTANT:"),
    ("llava_next", "llama", ()): (
        CURIOUS + " USER: <image>\nQ ASSISTANT:", CURIOUS + " USER: <image>\nQ ASSISTANT: A</s>USER: R ASSISTANT:"),
    ("llava_next", "mistral", ()): (
        "[INST] <image>\nQ [/INST]", "[INST] <image>\nQ [/INST] A</s>[INST] R [/INST]"),
    ("vipllava", "llama", ()): (
        CURIOUS + "###Human: <image>\nQ###Assistant:",
        CURIOUS + "###Human: <image>\nQ###Assistant: A###Human: R###Assistant:"),
    ("llava", "qwen2", tuple(CHATML)): (
        "<|im_start|>user\n<image>\nQ<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n<image>\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n"),
    ("llava_onevision", "qwen2", tuple(CHATML)): (
        "<|im_start|>user\n<image>\nQ<|im_end|>\n<|im_start|>assistant\n", None),
    ("llava_next", "qwen2", tuple(CHATML)): (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nQ<|im_end|>\n"
        "<|im_start|>assistant\n", None),
    ("llava_next", "llama", (*CHATML, "<|startoftext|>")): (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nQ<|im_end|>"
        "<|im_start|>assistant\n",
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nQ<|im_end|>"
        "<|im_start|>assistant\nA<|im_end|><|im_start|>user\nR<|im_end|><|im_start|>assistant\n"),
    ("llava", "llama", tuple(LLAMA_3)): (
        f"{USER_3}<image>\nQ<|eot_id|>{ANSWER_3}",
        f"{USER_3}<image>\nQ<|eot_id|>{ANSWER_3}A<|eot_id|>{USER_3}R<|eot_id|>{ANSWER_3}"),
    ("llava_next", "llama", tuple(LLAMA_3)): (
        f"{SYSTEM_3}{HELPFUL}<|eot_id|>{USER_3}<image>\nQ<|eot_id|>{ANSWER_3}", None),
    ("llava", "llama", (*LLAMA_3, "for pictures: 69")): (
        f"{JOY}You are a helpful image captioner.<|eot_id|>{USER_3}"
        f"{RESERVED(70)}{RESERVED(69)}{RESERVED(71)}Q<|eot_id|>{ANSWER_3}", None),
    ("llava", "llama", tuple(PHI_3)): (
        "<|user|>\n<image>\nQ<|end|>\n<|assistant|>\n",
        "<|user|>\n<image>\nQ<|end|>\n<|assistant|>\nA<|end|>\n<|user|>\nR<|end|>\n<|assistant|>\n"),
}  # fmt: skip


def processor_of(folder, case):
    kind, text, tokens = case
    image = RESERVED(69) if "for pictures: 69" in tokens else "<image>"
    write_tokenizer(folder, [name for name in tokens if not name.startswith("for pictures")], image)
    tokenizer = checks.Tokenizer(folder / "tokenizer.json")
    config = llava.LlavaConfig(model_type=kind, image_token_index=tokenizer.id(image))
    config.text_config = llama.TextConfig(model_type=text)
    return llava.Processor(tokenizer, vision.PreprocessConfig(), config), config


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_form_is_the_published_one(tmp_path, case):
    processor, config = processor_of(tmp_path, case)
    one, two = CASES[case]
    assert processor.prompt("Q") == one
    if two is not None:
        turns = [("user", "Q"), ("assistant", "A"), ("user", "R")]
        assert processor.as_text(processor.pieces(turns, 1)) == two
    end = next((end for end in ("<|im_end|>", "<|eot_id|>", "<|end|>") if end in case[2]), "</s>")
    assert processor.as_text([processor.eos_id]) == end
    assert processor.eos_id in config.eos_token_ids and 2 in config.eos_token_ids


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_ids_of_a_prompt_are_those_of_its_string(tmp_path, case):
    """Special tokens of the form are special, and what a user types in their spelling is not."""
    processor, _ = processor_of(tmp_path, case)
    tokenizer = processor.tokenizer
    pieces = processor.pieces([("user", "Q"), ("assistant", "A"), ("user", "R")], 1)
    assert tokenizer.encode_pieces(pieces) == tokenizer.encode(processor.as_text(pieces))
    typed = processor.pieces([("user", processor.as_text(pieces))], 0)
    ids = tokenizer.encode_pieces(typed)
    plain = tokenizer.encode_pieces(processor.pieces([("user", "Q")], 0))
    special = {*tokenizer.spelling} - {tokenizer.id("<unk>")}
    assert [i for i in ids if i in special] == [i for i in plain if i in special]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_later_turn_continues_the_string(tmp_path, case):
    """The first turn, its answer, and what going_on puts behind it are the conversation in one piece."""
    processor, _ = processor_of(tmp_path, case)
    first, answer, second = [("user", "Q"), ("assistant", "A"), ("user", "R")]
    answered = processor.pieces([first, answer], 1)
    assert answered[-1] == processor.eos_id
    whole = processor.as_text(processor.pieces([first, answer, second], 1))
    assert processor.as_text([*answered[:-1], *processor.pieces([second], going_on=True)]) == whole


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_conversation_without_a_turn_is_refused(tmp_path, case):
    processor, _ = processor_of(tmp_path, case)
    for images in (None, [Image.new("RGB", (5, 7))]):
        with pytest.raises(ValueError, match=r"a conversation is a list of .*, and not \[\]"):
            processor.chat([], images)


def test_a_checkpoint_that_says_nowhere_how_an_answer_ends_is_refused(tmp_path):
    """SigLIP and a Qwen2, whose class has no end by default; its usual <|im_end|> is no token of this tokenizer's."""
    folder = line.make(tmp_path, "interleave")
    line.write_tokenizer(folder, [], bos=False)
    (folder / "generation_config.json").unlink()
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["eos_token_id"] = values["eos_token_id"] = None
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"neither config\.json nor generation_config\.json says eos_token_id"):
        llava.load(str(folder), device="cpu")


def test_a_systems_words_take_the_place_of_the_opening(tmp_path):
    processor, _ = processor_of(tmp_path, ("llava_next", "qwen2", tuple(CHATML)))
    text = processor.as_text(processor.pieces([("system", "Be brief."), ("user", "Q")], 0))
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n")
    processor, _ = processor_of(tmp_path, ("vipllava", "llama", ()))
    assert processor.as_text(processor.pieces([("system", "S"), ("user", "Q")], 0)) == "S###Human: Q###Assistant:"
    processor, _ = processor_of(tmp_path, ("llava_next", "mistral", ()))
    assert processor.as_text(processor.pieces([("system", "S"), ("user", "Q")], 0)) == "S\n[INST] Q [/INST]"


def test_several_pictures_stand_in_front_each_with_its_line(tmp_path):
    processor, _ = processor_of(tmp_path, ("llava", "qwen2", tuple(CHATML)))
    assert processor.prompt("Q", 2) == "<|im_start|>user\n<image>\n<image>\nQ<|im_end|>\n<|im_start|>assistant\n"


def test_each_row_is_reached():
    """A row that another one above it hides is a form that nobody gets."""
    reached = []
    for model, text, needed, form in forms.ROWS:
        names = {i: name for i, name in enumerate([*needed, "<image>"])}
        image = len(needed)
        if any(name.startswith("for pictures: ") for name in needed):
            names[image] = next(name for name in needed if name.startswith("for pictures: ")).split(": ")[1]
        tokenizer = type("Names", (), {"spelling": names})
        config = llava.LlavaConfig(model_type=model or "llava", image_token_index=image)
        config.text_config = llama.TextConfig(model_type=text or "llama")
        reached.append(forms.choose(config, tokenizer) is form)
    assert all(reached)


# ----------------------------------------------------------------------------------------------------------------
# Tokens of a form that have other names and other flags


def changed(folder, kind, text, names=(), model=None, **flags):
    """A processor whose tokenizer has these tokens, too, and its file; flags: of all its added tokens."""
    values = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    values["added_tokens"] += [{**values["added_tokens"][0], "id": 640 + i, "content": x} for i, x in enumerate(names)]
    for token in values["added_tokens"]:
        token.update(flags)
    values["model"] |= model or {}
    if model:
        values |= {"normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}}
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "llava"}', encoding="utf-8")
    config = llava.LlavaConfig(model_type=kind, image_token_index=638, pad_token_id=639)
    config.text_config = llama.TextConfig(model_type=text)
    return llava.Processor(checks.Tokenizer(folder / "tokenizer.json"), vision.PreprocessConfig(), config)


@pytest.mark.parametrize("flags", [{}, {"special": False, "normalized": True}, {"lstrip": True}, {"single_word": True}])
@pytest.mark.parametrize(
    ("kind", "text", "names"),
    [
        ("llava_next", "mistral", ["[INST]", "[/INST]"]),
        ("llava", "llama", ["USER:", "ASSISTANT:"]),
        ("llava", "llama", ["USER", "USER:", "A"]),
        ("vipllava", "llama", ["###Human:", "###Assistant:"]),
        ("llava_next", "llama", ["assistant", "the"]),
        ("llava", "mistral", ["\nASSISTANT:", "\n"]),
    ],
    ids=str,
)
def test_words_of_the_form_that_were_added_to_the_tokenizer_are_tokens(tmp_path, kind, text, names, flags):
    processor = changed(tmp_path, kind, text, names, **flags)
    tokenizer, theirs = processor.tokenizer, AutoTokenizer.from_pretrained(tmp_path)
    for turns in ([("user", "What?")], [("user", "What?"), ("assistant", "So."), ("user", "Why?")]):
        for images in range(3):
            pieces = processor.pieces(turns, images)
            expected = theirs(processor.as_text(pieces)).input_ids
            assert tokenizer.bos + tokenizer.encode_pieces(pieces) == expected
            assert flags or {640, 641} & {*expected}
    typed = processor.pieces([("user", " ".join(names))], 0)
    assert all(tokenizer.encode_pieces(typed).count(i) <= typed.count(i) for i in range(640, 640 + len(names)))


def test_an_end_that_its_flags_do_not_call_special_is_neither_typed_nor_shown(tmp_path):
    """A model that takes words whole finds it in any text: then the text is refused."""
    processor = changed(tmp_path, "llava", "llama", model={"ignore_merges": True}, special=False)
    for word in ("</s>", "<s>"):
        for turns in ([("user", f"Is {word} a word?")], [("user", "Hi"), ("assistant", f"{word} is")]):
            with pytest.raises(ValueError, match=f"takes {word} in a text for a special token"):
                processor.chat(turns)
    assert processor.chat([("user", "Is star a word?")])["input_ids"].shape[0] == 1
    processor = changed(tmp_path, "llava", "llama", special=False)
    words = processor.tokenizer.encode("A small blue")
    assert processor.decode([1, *words, 2, 639, 639]) == "A small blue"
    assert "".join(turn.as_text(processor.tokenizer, [*words, 2])) == "A small blue"


def test_a_word_that_ends_an_answer_can_be_typed_and_is_shown(tmp_path):
    """The config may end an answer at a line break; and a word that was added is no special token."""
    processor = changed(tmp_path, "llava", "llama", ["star", "[x]"], special=False)
    tokenizer = processor.tokenizer
    tokenizer.control = set()
    (word,) = tokenizer.encode_pieces(["blue"])
    processor.config.eos_token_id = [2, word]
    tokenizer.control = forms.control(processor)
    ids = tokenizer.encode("blue star [x]")
    assert {word, 640, 641} & {*ids} == {word, 640, 641} and not tokenizer.control & {word, 640, 641}
    assert tokenizer.decode([*ids, 2]) == AutoTokenizer.from_pretrained(tmp_path).decode(ids)
    assert word in tokenizer.encode_pieces(["blue"])


# ----------------------------------------------------------------------------------------------------------------
# What is no conversation


@pytest.mark.parametrize("turns", ["What?", [], None, [("user",)], ["What?"], [("user", "a", 1, 2)], {"user": "What?"}])
@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_what_is_no_conversation_is_said_with_what_one_is(tmp_path, kind, turns):
    with pytest.raises(ValueError, match=r"a conversation is a list of \(role, words\).*and not") as caught:
        changed(tmp_path, kind, "llama").chat(turns)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", ["1", 1.0, None, -1, [1]], ids=repr)
def test_a_number_of_pictures_that_is_none_is_named(tmp_path, number):
    with pytest.raises(ValueError, match="the number of a turn's pictures is"):
        changed(tmp_path, "llava", "llama").chat([("user", "What?", number)], Image.new("RGB", (30, 30)))
