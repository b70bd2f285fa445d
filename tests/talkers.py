"""Random checkpoints that speak in words, and what the command line prints of them."""

import io
import itertools

import torch
from checkpoints import HEAD
from reference import TOKENIZER, VOCABULARY, make_checkpoint
from safetensors.torch import load_file, save_file

import llava

EOS = 2
WORDS = [i for i in range(VOCABULARY) if (TOKENIZER.id_to_token(i) or "<").lstrip("▁").isalpha()]
COST = r"(image \d+ ms, )?prefill \d+ ms, (\d+) tokens, \d+\.\d tokens/s, peak memory (\d+\.\d\d) GB"
CUT = "notice: the answer is cut off after {} tokens"


def make_talker(folder, family="llama", ending=None, **changes):
    """A random checkpoint that speaks in words, never in single bytes.
    ending: a token in whose place its answers end.
    """
    folder = make_checkpoint(folder, family, scale=12.0, **changes)  # so large that it does not repeat itself
    tensors = load_file(folder / "model.safetensors")
    head = torch.zeros_like(tensors[HEAD])
    head[WORDS] = 4 * tensors[HEAD][WORDS]
    if ending is not None:
        head[EOS] = head[ending] * 1.01
    save_file(tensors | {HEAD: head}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_brief_talker(folder, family, dtype, words, *pictures):
    """(model, processor) of a talker whose answer to these words ends after a few tokens,
    from the first seed that has one.
    """
    for seed in itertools.count():
        model, processor = llava.load(make_talker(folder, family, seed=seed), device="cpu", dtype=dtype)
        inputs = processor.chat([("user", words)], list(pictures))
        answer = model.generate(**inputs, max_new_tokens=9)[0].tolist()
        for ending in (answer[i] for i in range(4, 9) if answer[i] not in answer[:i]):
            model, processor = llava.load(make_talker(folder, family, ending, seed=seed), device="cpu", dtype=dtype)
            if 4 < len(model.generate(**inputs, max_new_tokens=9)[0]) < 9:
                return model, processor


def expected(ours, words, images=(), turns=(), pad=None, **settings):
    """The answer by way of the Python interface."""
    model, processor = ours
    inputs = processor.chat([*turns, ("user", words)], list(images), pad)
    return processor.decode(model.generate(**inputs, **settings)[0])


def say(monkeypatch, ids):
    """Let every model answer with these ids."""

    def stream(self, *_, **__):
        for i in ids:
            self.llama(torch.zeros(1, 1, self.config.text_config.hidden_size))  # a step costs something
            yield torch.tensor([i])

    monkeypatch.setattr(llava.Llava, "stream", stream)


def byte_ids(text):
    return [TOKENIZER.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


class Screen(io.StringIO):
    """A stdout that notes each piece when it is flushed, and the passes of the language model by then."""

    def __init__(self):
        super().__init__()
        self.pieces, self.passes, self.rows, self.shown = [], 0, set(), 0

    def flush(self):
        text = self.getvalue()
        self.pieces.append((text[self.shown :], self.passes))
        self.shown = len(text)
