"""One answer at the command line: its prompt is checked, its text is streamed, and what it cost goes to stderr."""

import sys
import time
from dataclasses import dataclass

import torch

import llama
from extras import intake
from extras.cli import notice


@dataclass
class Conversation:
    """Where a conversation stands: what the model has read, and the ids that it has not read yet."""

    ids: list
    kv_cache: dict | None = None


def open_named(name):
    """The picture of a name at the command line; - is standard input."""
    return intake.open_image(sys.stdin.buffer if name == "-" else name)


def answer(model, processor, options, turns, images, conversation=None):
    """Yield the answer to the last turn in pieces of text. The conversation goes on from its end or interruption."""
    conversation = conversation or Conversation(processor.tokenizer.bos)
    past = llama.length(conversation.kv_cache)
    pieces = processor.pieces(turns, len(images), going_on=past > 0)
    inputs = processor.prepare([following(processor.tokenizer, conversation, pieces)], images, options.pad)
    del inputs["attention_mask"]  # a single row has no padding, and the cache keeps its own mask
    shown = conversation.ids[:-1] if past else conversation.ids  # the end of the last answer begins the pieces
    end = check_prompt(model, processor, options, [*shown, *pieces], inputs, past)
    cost, said = Cost(model), []
    sampling = dict(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    sampling["max_new_tokens"] = min(options.max_new_tokens, context(model) - end + 1)
    try:
        if options.num_beams > 1:
            beams = {**sampling, "num_beams": options.num_beams, "kv_cache": conversation.kv_cache}
            said += model.generate(**inputs, **beams)[0].tolist()
            yield processor.decode(said)
        else:
            ids = model.stream(**inputs, **sampling, kv_cache=conversation.kv_cache)
            yield from as_text(processor.tokenizer, ids, said)
    finally:  # also when it is interrupted
        cost.close()
        if said:
            read = max(0, llama.length(conversation.kv_cache) - end)
            ended = said[-1] in model.config.eos_token_ids
            conversation.ids = said[read:] + ([] if ended else [processor.eos_id])
    yield "\n"
    print(cost.summary(len(said)), file=sys.stderr)
    if not ended:
        notice(f"the answer is cut off after {len(said)} tokens")


def following(tokenizer, conversation, pieces):
    """The ids that the model has not read yet: the conversation's, and behind them those of the next turn's pieces.

    The pieces of a later turn begin with the end of the last answer, as the form has it there: text may begin in
    another way behind it than it does in front.
    """
    ids = conversation.ids
    if llama.length(conversation.kv_cache):
        behind, end = tokenizer.encode_pieces(pieces), pieces[0]
        if isinstance(end, int) and behind[0] != end:  # by its flags, this end would be letters in front of a text
            return [*ids[:-1], end, *tokenizer.encode_pieces(pieces[1:])]
        return [*ids[:-1], *behind]
    return [*ids, *tokenizer.encode_pieces(pieces)]


def as_text(tokenizer, ids, seen=None):
    """An iterator of ids → an iterator of pieces of text, each of whole characters. The ids are appended to the list
    seen.

    The bytes of an incomplete character decode to U+FFFD: they are held back until it is complete, and dropped if it
    never is.
    """
    seen, shown = [] if seen is None else seen, 0
    for i in ids:
        seen.append(int(i))
        text = tokenizer.decode(seen)
        if not text.endswith("\ufffd"):
            piece, shown = text[shown:].replace("\ufffd", ""), len(text)
            if piece:
                yield piece


def check_prompt(model, processor, options, pieces, inputs, past=0):
    """Where a prompt ends, behind `past` positions. Refuses one that is too long; prints it to stderr if asked to."""
    new = model.prompt_ids(**inputs)[0].shape[1]
    if past + new > context(model):
        hint = "ask for less at once"
        if past:
            hint = f"{past} hold what was said so far: ask for less, or start a new conversation"
        raise ValueError(f"text and pictures take {past + new} positions, and the model has {context(model)}: {hint}")
    if options.show_prompt:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
        print(f"prompt: {processor.as_text(pieces)!r}\nids: {inputs['input_ids'][0].tolist()}", file=sys.stderr)
        print(f"shapes: {shapes}, expanded to {new} positions", file=sys.stderr)
    return past + new


def context(model):
    """How many positions a conversation may take: the trained length, capped so that the cache stays small enough."""
    most = 8192 if model.image_newline is None else 16384  # a single picture in tiles may take 8765
    return min(model.config.text_config.max_position_embeddings, most)


# ----------------------------------------------------------------------------------------------------------------
# What it cost


class Cost:
    """Clocks around the stages of an answer, by hooks on the modules, so that the model itself knows nothing of it."""

    def __init__(self, model):
        self.device, self.marks = model.device, {}
        self.hooks = [
            model.vision.register_forward_pre_hook(lambda *_: self.mark("image")),
            model.llama.register_forward_pre_hook(lambda *_: self.mark("prefill")),
            model.llama.register_forward_hook(lambda *_: self.mark("first")),
        ]

    def mark(self, stage):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.marks.setdefault(stage, time.perf_counter())

    def close(self):
        self.mark("end")
        for hook in self.hooks:
            hook.remove()

    def summary(self, tokens):
        """What `tokens` new tokens took; the first of them comes out of the prefill."""
        marks = self.marks
        image = f"image {1000 * (marks['prefill'] - marks['image']):.0f} ms, " if "image" in marks else ""
        prefill = f"prefill {1000 * (marks['first'] - marks['prefill']):.0f} ms, "
        speed = f"{tokens} tokens, {(tokens - 1) / (marks['end'] - marks['first']):.1f} tokens/s, "
        peak = peak_memory(self.device)
        return f"{image}{prefill}{speed}peak memory " + (f"{peak / 1e9:.2f} GB" if peak else "unknown")


def peak_memory(device):
    """The most memory that was used so far, in bytes: of the GPU, or else of this process; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
