"""Texts and ids that several files of tests try on a tokenizer."""

import random

TEXTS = [
    "",
    " ",
    "\n",
    "Hello",
    " Hello",
    "  Hello  ",
    "Hello ",
    "<image>",
    "<image>\nUSER: What is there? ASSISTANT:",
    "USER: <image>\nWhat is there? ASSISTANT:",
    "USER: What is there? <image>",
    "USER: What is there?<image> ",
    "<image>\n<image>\nWhat is the difference?",
    "USER: <image> and <image>, which is larger?",
    "<image><image>",
    "<image> <image>",
    "a<image>b",
    "<image>\n",
    "<image> \n x",
    "<image>\n\nx",
    "USER: Hi ASSISTANT: Yes.</s>USER: And now? ASSISTANT:",
    "</s>USER:",
    "</s> USER:",
    "a</s></s>b",
    "<unk><pad>x",
    "Où est l'élève à Zürich? Ça va, señor.",
    "图中有什么？猫和狗。",
    "Здравствуйте, κόσμε, שלום, مرحبا",
    "🐈 and 👩‍👩‍👧, 🇨🇭!",
    "e\u0301 is not \u00e9; \u00a0 and \u3000 and \u200b are spaces of a kind",
    "tabs\tand\r\nlines\n\n\nof code:    x = [1,  2]",
    "▁ and \ufffd and \x00 and \x7f",
    "USER:<image>\nNo space ASSISTANT:",
    "1234567890 3.14159 100%",
]


def random_ids(tokenizer, seed, length=30):
    """Of even seeds any pieces and whole characters in bytes, of odd ones anything,
    so that bytes seldom form characters.
    """
    rng = random.Random(seed)
    size = tokenizer.bpe.get_vocab_size()
    if seed % 2:
        return [rng.randrange(3, 259) if rng.random() < 0.2 else rng.randrange(size) for _ in range(length)]
    characters = [byte_ids(tokenizer, character.encode()) for character in "é猫🐈\n"]
    parts = ([rng.randrange(259, size)] if rng.random() < 0.7 else rng.choice(characters) for _ in range(length))
    return [i for part in parts for i in part]


def byte_ids(tokenizer, data):
    return [tokenizer.id(f"<0x{byte:02X}>") for byte in data]
