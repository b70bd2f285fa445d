"""Trains tiny's tokenizer.json: a byte-fallback BPE in the published Llama form, about 600 pieces instead of 32,000.

    python tiny/tokenizer.py    # writes tiny/new/tokenizer.json

It finds the pieces of the shipped tokenizer.json and gives some of them other ids: the shipped one was made once, and
tiny knows its ids. A tokenizer that is made anew is for a tiny that is trained anew.

The published file has no pre-tokenizer, so nothing would stop the trainer from gluing words together ("▁of▁the"). Hence
it is trained with one, which cuts before each word and around each sign, and the file is written without: no merge
crosses a cut, so encoding is the same with and without it.
"""

import argparse
import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

import scenes

FOLDER = Path(__file__).parent
PIECES = 638                                    # + <image> and <pad> = 640, a multiple of 64 as in the published models

# Ordinary English, so that a question in a visitor's own words falls into pieces rather than into single letters.
ENGLISH = """
Is there anything else in this image? What else can you tell me about it? Please tell me what is \
shown here, in one sentence.
Can you see a person, a dog, a cat, a house, a tree, a car or a street? Are there any people in the \
photo? No, there are none.
Who made this drawing, when was it made, and why does it look like that? How big is it? How old are \
you? How does it work?
What is the difference between the first shape and the second one? Which one is bigger, and which one is smaller?
Does the picture have a light or a dark background? I think that the background is grey. Do you \
know which colours were used?
Look at the upper part, then at the lower part. What is on the left side, what is on the right \
side, what is near the corner?
Name all the things that you see, from the top to the bottom. List the colours of the objects. Say \
where each of them is.
Where would you like to go today? The weather is fine, the sky is clear, and the sun is shining \
over the water and the hills.
This model was trained for less than an hour. It knows only a few words, and it has never seen a real photograph.
Hello, thank you, good morning, yes please, no thanks. Could you write a short story about a small \
boat on a long river?
They have been here before, but she had not yet found what he was looking for. We will try again \
with more time and care.
Tell us something interesting about these shapes. Are they close to each other? Do they touch? \
Count the number of items.
Black, white, brown, pink and grey; rectangle, line, cross, heart, ring and diamond; five, six, \
seven, eight, nine, ten.
"""


def corpus():
    """What people and tiny say to each other, over and over, and a little English in between."""
    for i in range(3000):
        rng = random.Random(f"words {i}")
        things = scenes.arrange(rng)
        for kind, question, answer in scenes.ask(rng, things):
            if kind == "missing":  # is newer than the tokenizer, and its words are there without it
                continue
            yield f"USER:\n{question} ASSISTANT: {answer}"
    for line in ENGLISH.strip().splitlines() * 60:
        yield line
        yield f"\n{line}"


def train():
    """Merges for the corpus -> a Tokenizer whose vocabulary has no special tokens yet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("\n"), "removed"),           # a newline becomes the byte <0x0A>, as in Llama
        pre_tokenizers.Split("▁", "merged_with_next"),
        pre_tokenizers.Split(Regex("[^\\w▁]|[0-9]"), "isolated"),
    ])
    letters = ["▁", *map(chr, range(33, 127))]                  # whatever else is typed falls back to its bytes
    size = PIECES - 3 - 256
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=letters, limit_alphabet=len(letters), show_progress=False))
    return tokenizer


def published_form(trained):
    """The same file layout as llava-1.5-7b-hf's: ids 0-2 special, 3-258 the bytes, the pieces, <image>, <pad>."""
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    special = {0: "<unk>", 1: "<s>", 2: "</s>", len(vocab): "<image>", len(vocab) + 1: "<pad>"}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, token in special.items()],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {**json.loads(trained.to_str())["model"], "unk_token": "<unk>", "fuse_unk": True,
                  "byte_fallback": True, "vocab": {token: i for i, token in enumerate(vocab)}},
    }


def main():
    parser = argparse.ArgumentParser(
        description="Make a tokenizer for tiny from the words of its world. Writes one file, --out, and nothing else.")
    parser.add_argument("--out", type=Path, default=FOLDER / "new" / "tokenizer.json", metavar="FILE",
                        help="where to write it (tiny/new/tokenizer.json)")
    parser.add_argument("--overwrite", action="store_true", help="even where there is a file already")
    args = parser.parse_args()
    if args.out.exists() and not args.overwrite:
        parser.error(f"{args.out} is there already: name another --out, or add --overwrite to write over it")
    text = json.dumps(published_form(train()), ensure_ascii=False, indent=1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
