"""From text to ids and back: equal to the tokenizers that transformers uses, and what a user types is text."""

import json
import shutil

import numpy as np
import pytest
import tokenizer_files
import torch
from PIL import Image
from reference import EDGE, PATCH, TINY, expanded
from texts import TEXTS, random_ids
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

import llama
import llava
import vision
from extras import checks, cli

TYPED = [
    "<image>",
    "</s>",
    "<s>",
    "<pad>",
    "<unk>",
    "How do I write <image> and </s>?",
    "<s><image></s><unk>",
    "[INST] <0x41>",
]
PROMPTS = {  # the published forms, of one, two and three turns
    "llama": [
        "USER: <image>\nWhat is there? ASSISTANT:",
        "USER: <image>\nWhat is there? ASSISTANT: A cat.</s>USER: Which colour? ASSISTANT:",
        "USER: <image>\nWhat is there? ASSISTANT: A cat.</s>USER: Which colour? ASSISTANT: Black.</s>USER: Où? "
        "ASSISTANT:",
    ],
    "mistral": [
        "USER: <image>\nWhat is there?\nASSISTANT:",
        "USER: <image>\nWhat is there?\nASSISTANT: A cat.</s>USER: Which colour?\nASSISTANT:",
        "USER: <image>\nWhat is there?\nASSISTANT: A cat.</s>USER: Which colour?\nASSISTANT: Black.</s>USER: Où?\n"
        "ASSISTANT:",
    ],
}
TURNS = [
    ("user", "What is there?"), ("assistant", "A cat."), ("user", "Which colour?"), ("assistant", "Black."),
    ("user", "Où?"),
]  # fmt: skip


@pytest.fixture(scope="session", params=["tiny", "vicuna"])
def both(request, tmp_path_factory):
    """(our tokenizer, the reference's): of this repository, and the published one."""
    if request.param == "tiny":
        file = TINY / "tokenizer.json"
        return checks.Tokenizer(file), PreTrainedTokenizerFast(tokenizer_file=str(file))
    published = request.getfixturevalue("data") / "vicuna-tokenizer"
    folder = tmp_path_factory.mktemp("published") / "tokenizer"
    shutil.copytree(published, folder)
    (folder / "config.json").write_text('{"model_type": "llava"}')  # which decides how AutoTokenizer reads the others
    return checks.Tokenizer(published / "tokenizer.json"), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def ours(both):
    return both[0]


@pytest.fixture(scope="session")
def theirs(both):
    return both[1]


@pytest.fixture(scope="session")
def published(data):
    return checks.Tokenizer(data / "vicuna-tokenizer" / "tokenizer.json")


def make_processor(tokenizer, family="llama"):
    config = llava.LlavaConfig(image_token_index=tokenizer.id("<image>"), pad_token_id=tokenizer.id("<pad>"))
    config.text_config = llama.TextConfig(model_type=family)
    square = {"height": EDGE, "width": EDGE}
    return llava.Processor(tokenizer, vision.PreprocessConfig(size={"shortest_edge": EDGE}, crop_size=square), config)


def pictures(number):
    rng = np.random.default_rng(number)
    return [Image.fromarray(rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)) for i in range(number)]


def special_ids(tokenizer):
    return {tokenizer.id(token) for token in ("<unk>", "<s>", "</s>", "<image>", "<pad>")}


# ----------------------------------------------------------------------------------------------------------------
# Text → ids


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_ids_equal_the_reference(ours, theirs, text):
    expected = theirs(text).input_ids
    assert ours.bos + ours.encode(text) == expected
    found = make_processor(ours)(text, pictures(text.count("<image>")) or None)
    assert found["input_ids"].tolist() == [expected]
    assert found["attention_mask"].tolist() == [[1] * len(expected)]
    assert found["input_ids"].dtype == found["attention_mask"].dtype == torch.int64
    assert ("pixel_values" in found) == ("<image>" in text)


def test_published_ids(published):
    """As transformers' own tests of LLaVA have them."""
    ids = [1, 15043, 7084, 29901, 29871, 32000, 29871, 13, 7900]
    assert published.bos + published.encode("Hello Image: <image>\nAss") == ids
    assert [published.id(token) for token in ("<unk>", "<s>", "</s>", "<image>", "<pad>")] == [0, 1, 2, 32000, 32001]
    found = make_processor(published)("USER: <image>\nX", pictures(1))["input_ids"][0].tolist()
    assert found == [1, 3148, 1001, 29901, 29871, 32000, 29871, 13, 29990]
    assert published.decode(found) == "USER:  \nX"  # two spaces, as in all published answers


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_bos_stands_in_front_and_nowhere_else(ours, text):
    bos = ours.id("<s>")
    assert ours.bos == [bos]
    ids = make_processor(ours)(text, pictures(text.count("<image>")))["input_ids"][0].tolist()
    assert ids[0] == bos and ids.count(bos) == 1
    for turns in (TURNS, TURNS[:1], [("user", text)], [("system", "Be brief."), *TURNS]):
        ids = make_processor(ours).chat(turns, pictures(2))["input_ids"][0].tolist()
        assert ids[0] == bos and ids.count(bos) == 1


def test_encoding_does_not_depend_on_what_was_encoded_before(ours):
    text = "USER: <image>\n</s>"
    special, plain = ours.encode(text), ours.encode(text, special=False)
    assert special != plain
    assert [ours.encode(text), ours.encode(text, special=False), ours.encode(text)] == [special, plain, special]


def test_nothing_is_cut_off_or_filled_up(ours, theirs):
    """A tokenizer.json may ask for truncation and padding; a prompt cut inside a picture is worse than an error."""
    text = "What is there? " * 3000
    assert ours.bos + ours.encode(text) == theirs(text).input_ids


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path):
    fresh = checks.Tokenizer(TINY / "tokenizer.json")
    fresh.bpe.enable_truncation(4)
    fresh.bpe.enable_padding(length=20)
    fresh.bpe.save(str(tmp_path / "tokenizer.json"))
    text = "What is there in this picture?"
    assert checks.Tokenizer(tmp_path / "tokenizer.json").encode(text) == checks.Tokenizer(
        TINY / "tokenizer.json"
    ).encode(text)
    assert checks.Tokenizer(tmp_path / "tokenizer.json").bos == [1]


# ----------------------------------------------------------------------------------------------------------------
# The prompt


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_prompts_of_one_two_and_three_turns(ours, theirs, family, turn):
    processor, text, turns = make_processor(ours, family), PROMPTS[family][turn], TURNS[: 2 * turn + 1]
    assert processor.as_text(processor.pieces(turns, 1)) == text
    found = processor.chat(turns, pictures(1))
    assert found["input_ids"].tolist() == [theirs(text).input_ids]
    assert found["input_ids"].tolist() == processor(text, pictures(1))["input_ids"].tolist()

    without = text.replace("<image>\n", "")
    found = processor.chat(turns)
    assert found["input_ids"].tolist() == [theirs(without).input_ids] and "pixel_values" not in found

    several = text.replace("<image>\n", "<image>\n<image>\n<image>\n")
    found = processor.chat(turns, pictures(3))
    assert found["input_ids"].tolist() == [theirs(several).input_ids] and len(found["pixel_values"]) == 3


def test_prompt_is_the_first_question_as_a_string(ours, family):
    processor = make_processor(ours, family)
    assert processor.prompt("What is there?") == PROMPTS[family][0]
    assert processor.prompt("What is there?", images=0) == PROMPTS[family][0].replace("<image>\n", "")
    assert processor.prompt("What is there?", images=2) == PROMPTS[family][0].replace("<image>\n", "<image>\n" * 2)


def test_a_system_sentence_stands_in_front(ours, theirs, family):
    processor, turns = make_processor(ours, family), [("system", cli.AUTHORS_SYSTEM), *TURNS[:1]]
    text = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and "
        "polite answers to the user's questions. " + PROMPTS[family][0]
    )
    assert processor.as_text(processor.pieces(turns, 1)) == text
    assert processor.chat(turns, pictures(1))["input_ids"].tolist() == [theirs(text).input_ids]


def test_an_answer_in_the_prompt_is_closed(ours, theirs, family):
    found = make_processor(ours, family).chat(TURNS[:2], pictures(1))["input_ids"][0].tolist()
    assert found == theirs(PROMPTS[family][0] + " A cat.</s>").input_ids
    assert found[-1] == ours.id("</s>")


@pytest.mark.parametrize("words", [text for text in TEXTS if "<" not in text], ids=ascii)
def test_any_words_are_encoded_as_in_the_whole_string(ours, theirs, family, words):
    before, after = PROMPTS[family][0].split("What is there?")
    found = make_processor(ours, family).chat([("user", words)], pictures(1))
    assert found["input_ids"].tolist() == [theirs(before + words + after).input_ids]


def test_unknown_roles_and_pictures_without_a_question_are_refused(ours):
    processor = make_processor(ours)
    with pytest.raises(ValueError, match="role is 'human'"):
        processor.chat([("human", "Hello")])
    with pytest.raises(ValueError, match="not as many as the user"):
        processor.chat([("assistant", "Hello")], pictures(1))


@pytest.mark.parametrize("words", TYPED)
def test_what_a_user_types_is_text(ours, family, words):
    processor = make_processor(ours, family)
    plain = ours.encode(words, special=False)
    assert not special_ids(ours) & set(plain)
    assert ours.decode(plain) == words

    for role in ("user", "system", "assistant"):
        typed, harmless = ([(role, text), ("user", "Why?")] for text in (words, "Hello"))
        ids, usual = (processor.chat(turns, pictures(2))["input_ids"][0].tolist() for turns in (typed, harmless))
        for special in special_ids(ours):
            assert ids.count(special) == usual.count(special)
        assert words in ours.decode(ids)
    assert not special_ids(ours) & set(processor.chat([("user", words)])["input_ids"][0, 1:].tolist())


def test_in_a_prompt_special_tokens_count(ours):
    ids = make_processor(ours)("<image></s><pad><unk>", pictures(1))["input_ids"][0, 1:].tolist()
    assert ids == [ours.id(token) for token in ("<image>", "</s>", "<pad>", "<unk>")]


# ----------------------------------------------------------------------------------------------------------------
# Batches

BATCH = [
    "USER: <image>\nWhat? ASSISTANT:",
    "Hello",
    "USER: <image>\n<image>\nWhich of them is larger, and why? ASSISTANT:",
    "",
]


def test_a_batch_is_padded_on_the_left(ours, theirs):
    found = make_processor(ours)(BATCH, pictures(3))
    rows = [theirs(text).input_ids for text in BATCH]
    longest = max(map(len, rows))
    assert found["input_ids"].tolist() == [[ours.id("<pad>")] * (longest - len(row)) + row for row in rows]
    assert found["attention_mask"].tolist() == [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    assert found["input_ids"].dtype == found["attention_mask"].dtype == torch.int64
    assert found["pixel_values"].shape == (3, 3, EDGE, EDGE) and found["pixel_values"].dtype == torch.float32


def test_a_batch_equals_the_reference_processor():
    """Which puts one placeholder for each feature; so does `expanded`, on which the tests of the model lean."""
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "extra_special_tokens": {"image_token": "<image>"},
    }
    reference = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE}),
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(TINY / "tokenizer.json"), padding_side="left", **names),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    expected = reference(text=BATCH, images=pictures(3), padding=True, return_tensors="pt")
    found = make_processor(checks.Tokenizer(TINY / "tokenizer.json"))(BATCH, pictures(3))
    ids, mask, _ = expanded(found["input_ids"], found["attention_mask"])
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(mask, expected["attention_mask"])
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(
    "text, given",
    [
        ("<image>", 0),
        ("<image>", 2),
        ("Hello", 1),
        ("<image><image>", 1),
        (["<image>", "Hello"], 2),
        (["<image>"] * 3, 2),
    ],
)
def test_a_wrong_number_of_pictures_is_refused_with_both_numbers(ours, text, given):
    wanted = text.count("<image>")
    with pytest.raises(ValueError, match=rf"\b{wanted} <image>.*\b{given} pictures"):
        make_processor(ours)(text, pictures(given))


def test_one_picture_need_not_be_in_a_list(ours):
    image, processor = pictures(1)[0], make_processor(ours)
    single, listed = processor("<image>", image), processor(["<image>"], [image])
    assert all(torch.equal(single[name], listed[name]) for name in ("input_ids", "attention_mask", "pixel_values"))


def test_a_tokenizer_with_another_image_token_is_refused(ours):
    config = llava.LlavaConfig(image_token_index=ours.id("<image>") + 1)
    with pytest.raises(ValueError, match=f"<image> the id {ours.id('<image>')}, config.json {ours.id('<image>') + 1}"):
        llava.Processor(ours, vision.PreprocessConfig(), config)


# ----------------------------------------------------------------------------------------------------------------
# Ids → text


def test_decoding_equals_the_reference(ours, theirs):
    for text in TEXTS:
        ids = ours.bos + ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(torch.tensor(ids)) == make_processor(ours).decode(torch.tensor(ids)) == ours.decode(ids)
    for seed in range(200):
        ids = random_ids(ours, seed)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_special_tokens_are_not_shown(ours):
    ids = [ours.id(token) for token in ("<s>", "<image>", "<unk>", "<pad>", "</s>")]
    assert ours.decode(ids) == "" and ours.decode([]) == ""
    assert ours.decode([*ids, *ours.encode("Hello"), *ids]) == "Hello"


@pytest.mark.parametrize("text", [text for text in TEXTS if "<" not in text and "\ufffd" not in text], ids=ascii)
def test_text_comes_back_as_it_was(ours, text):
    assert ours.decode(ours.encode(text)) == text.replace("▁", " ")


# ----------------------------------------------------------------------------------------------------------------
# Other files: text whose ids depend on what stands beside it, special tokens with other flags, other templates

TALKS = [
    [("user", "What?")],
    [("user", "  two  spaces "), ("assistant", "A cat."), ("user", "Où est le 猫?")],
    [("system", "Be brief."), ("user", ""), ("assistant", ""), ("user", "\n"), ("assistant", " x ")],
]


@pytest.fixture
def kind():
    return checks.Tokenizer


@pytest.mark.parametrize("rules", tokenizer_files.RULES)
def test_the_ids_of_a_prompt_are_those_of_the_written_prompt(tmp_path, kind, rules):
    file = tokenizer_files.write(tmp_path, tokenizer_files.RULES[rules])
    ours, theirs = kind(file), AutoTokenizer.from_pretrained(tmp_path)
    processor = make_processor(ours)
    for turns in TALKS:
        for images in range(3):
            pieces = processor.pieces(turns, images)
            text = processor.as_text(pieces)
            assert text.count("<image>") == images and "▁<" not in text
            assert ours.bos + ours.encode_pieces(pieces) == theirs(text).input_ids == ours.bos + ours.encode(text)
    for pieces in ([638, 2, 638, "\n", 2, 2], ["a", 2, "b"], [2, " a ", 638, " b"], ["a", 1, 0, 639, 2], [2]):
        assert ours.encode_pieces(pieces) == theirs(processor.as_text(pieces), add_special_tokens=False).input_ids
    chatted = processor.chat([("user", "What?")], pictures(1))["input_ids"].tolist()
    assert chatted == processor(processor.prompt("What?"), pictures(1))["input_ids"].tolist()


@pytest.mark.parametrize("rules", tokenizer_files.RULES)
def test_what_is_typed_is_text_whatever_the_flags(tmp_path, kind, rules):
    ours = kind(tokenizer_files.write(tmp_path, tokenizer_files.RULES[rules]))
    processor = make_processor(ours)
    for words in [*TYPED, " </s> ", "a</s>", "</s>\n", "▁<image>"]:
        assert not special_ids(ours) & set(ours.encode_pieces([words]))
        assert not special_ids(ours) & set(ours.encode(words, special=False))
        for role in ("user", "system", "assistant"):
            pieces = processor.pieces([(role, words), ("user", "Why?"), ("assistant", "So.")], 1)
            ids = ours.encode_pieces(pieces)
            for special in special_ids(ours):
                assert ids.count(special) <= pieces.count(special)


@pytest.mark.parametrize("around", tokenizer_files.TEMPLATES)
def test_in_front_of_a_prompt_stands_what_the_file_puts_in_front(tmp_path, kind, around):
    file = tokenizer_files.write(tmp_path, {"post_processor": tokenizer_files.TEMPLATES[around]})
    theirs, processor = AutoTokenizer.from_pretrained(tmp_path), make_processor(kind(file))
    text = processor.prompt("What?")
    whole, alone = theirs(text).input_ids, theirs(text, add_special_tokens=False).input_ids
    start = next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
    right = [whole[:start] + alone]
    assert processor.chat([("user", "What?")], pictures(1))["input_ids"].tolist() == right
    assert processor(text, pictures(1))["input_ids"].tolist() == right


def test_a_piece_whose_id_lies_behind_the_vocabularys_number_stays_text(tmp_path, kind):
    """Vocabularies have holes, and the tokenizer's twin numbers its own tokens from their size on."""
    values = json.loads((TINY / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    for shift in range(12):
        changed = vocab | {"▁star": max(vocab.values()) + 3 + shift}
        ours = kind(tokenizer_files.write(tmp_path, {"model": {"vocab": changed}}))
        assert ours.encode_pieces([2, "star", 2]) == [2, changed["▁star"], 2]


def test_encoding_switches_nothing(ours):
    """Two threads may encode at once."""
    ours.encode("</s>")
    ours.encode("</s>", special=False)
    ours.encode_pieces(["</s>", 2])
    assert not ours.bpe.encode_special_tokens and not ours.twin.encode_special_tokens


# ----------------------------------------------------------------------------------------------------------------
# A list of pictures for each prompt


def test_pictures_may_come_as_a_list_for_each_prompt(ours):
    processor, (a, b, c) = make_processor(ours), pictures(3)
    flat = processor(BATCH, [a, b, c])
    for dealt in ([[a], [], [b, c], []], ((a,), (), (b, c), ()), [a, [], [b, c], ()]):
        found = processor(BATCH, dealt)
        assert all(torch.equal(found[name], flat[name]) for name in flat)
    single = processor("<image><image>", [[a, b]])
    assert torch.equal(single["pixel_values"], processor("<image><image>", [a, b])["pixel_values"])
    assert "pixel_values" not in processor(["Hello", "you"], [[], []])


@pytest.mark.parametrize(
    "numbers, words",
    [
        ((2, 1, 0), "row 0 holds 1 <image> and 2 pictures"),
        ((1, 1, 1), "row 1 holds 2 <image> and 1 pictures"),
        ((1, 2, 1), "row 2 holds 0 <image> and 1 pictures"),
        ((1, 0, 0), "row 1 holds 2 <image> and 0 pictures"),
        ((1, 2), "2 lists of pictures were given for 3 prompts"),
        ((0, 1, 2, 0), "4 lists of pictures were given for 3 prompts"),
    ],
)
def test_pictures_that_are_dealt_to_the_wrong_prompt_name_its_row(ours, numbers, words):
    with pytest.raises(ValueError, match=words):
        make_processor(ours)(["<image>", "<image><image>", "Hello"], [pictures(number) for number in numbers])


def test_words_of_a_turn_that_are_no_text_are_refused(ours):
    """A number among the pieces of a prompt would be taken for a token."""
    for words in (2, None, ["Hello"], b"Hello"):
        for role in ("system", "user", "assistant"):
            with pytest.raises(ValueError, match="the words of a turn are"):
                make_processor(ours).chat([(role, words)])


def test_a_turn_may_say_how_many_pictures_are_its_own(ours):
    processor = make_processor(ours)
    said = [("user", "Hi"), ("assistant", "Yes."), ("user", "And these?", 2), ("assistant", "No.")]
    said += [("user", "This?", 1)]
    text = processor.as_text(processor.pieces(said, 3))
    assert text == (
        "USER: Hi ASSISTANT: Yes.</s>USER: <image>\n<image>\nAnd these? ASSISTANT: No.</s>"
        "USER: <image>\nThis? ASSISTANT:"
    )
    assert processor.chat(said, pictures(3))["pixel_values"].shape[0] == 3
    assert processor.as_text(processor.pieces(said[:3], 2)).count("<image>") == 2
    for number in (2, 4):
        with pytest.raises(ValueError, match="pictures were given"):
            processor.chat(said, pictures(number))
