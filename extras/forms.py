"""Prompts: how each checkpoint writes a conversation down, as rows of strings.

Which one a checkpoint was trained with stands in none of its configs; but the kind of model and the special tokens that
its tokenizer has tell. docs/departures.md says where published templates and documentation disagree, and which of them
is followed.
"""

import re
from dataclasses import dataclass, replace
from numbers import Integral


@dataclass
class Form:
    """How a conversation is written down: the defaults are LLaVA-1.5's way.

    A pair stands before and behind the words of a role, or a picture. <…> is a special token, if there is one.
    """

    system: tuple = ("", " ")
    user: tuple = ("USER: ", " ASSISTANT:")
    assistant: tuple = (" ", "")
    picture: tuple = ("", "\n")
    end: str | None = None  # the token behind the last answer; None: the first of the config's ends
    between: str | None = None  # what stands behind an answer that another turn follows; None: the same
    opening: str = ""  # the system's words in a conversation that has none of its own

    def pieces(self, processor, turns, images=0, going_on=False):
        """Processor.pieces: a conversation as a list of text and of ids of special tokens."""
        check(turns)
        tokenizer, pieces, numbered = processor.tokenizer, [], any(len(turn) > 2 for turn in turns)
        if self.opening and not going_on and turns[0][0] == "user":
            pieces += special(self.opening.join(self.system), tokenizer)
        for role, words, *number in turns:
            if going_on:
                pieces += [processor.eos_id] if self.between is None else special(self.between, tokenizer)
            own = 0  # pictures: without numbers the first user turn takes them all
            if role == "user":
                own = sum(number) if numbered else images
            left, right, before, behind = (special(x, tokenizer) for x in (*self.picture, *getattr(self, role)))
            pieces += [*before, *[*left, processor.image_id, *right] * own, words, *behind]
            images, going_on = images - own, role == "assistant"
        if images:
            raise ValueError("pictures were given, but not as many as the user's turns are about")
        return [*pieces, processor.eos_id] if going_on else pieces


def check(turns):
    """Raise ValueError unless this is a conversation."""
    kinds = (list, tuple)
    if not (turns and isinstance(turns, kinds) and all(isinstance(x, kinds) and len(x) in (2, 3) for x in turns)):
        right = 'a list of (role, words), or of (role, words, number of its pictures), such as [("user", "What?")]'
        raise ValueError(f"a conversation is {right}, and not {turns!r:.100}")
    for role, words, *number in turns:
        if not isinstance(words, str):
            raise ValueError(f"the words of a turn are {words!r:.100}, and must be a str")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"a turn's role is {role!r}, and must be system, user or assistant")
        if not all(isinstance(x, Integral) and x >= 0 for x in number):
            raise ValueError(f"the number of a turn's pictures is {number[0]!r:.100}, and must be 0, 1, 2, …")


def special(text, tokenizer):
    """A string of a form as pieces: the tokens that were added to the vocabulary as their ids, the longest first."""
    ids = {name: i for i, name in tokenizer.spelling.items()}
    names = "|".join(re.escape(name) for name in sorted(ids, key=len, reverse=True) if name)
    return [ids.get(part, part) for part in re.split(f"({names})", text) if part]


def control(processor):
    """The ids that stand for no text, whatever the flags in tokenizer.json, a set: what begins, ends and fills a row,
    pictures, and what the form has in brackets.
    """
    tokenizer, config, form = processor.tokenizer, processor.config, processor.form
    text = "".join((*form.system, *form.user, *form.assistant, *form.picture, form.between or ""))
    ids = {*tokenizer.bos, *config.eos_token_ids, config.padding, config.image_token_index, config.video_token_index}
    ids |= {i for i, name in tokenizer.spelling.items() if re.fullmatch(r"<.+>|\[.+\]", name) and name in text}
    return getattr(tokenizer, "control", set()) | ids & tokenizer.spelling.keys()


CURIOUS = (  # "human", where LLaVA-1.5's authors write "user"
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"  # of a turn in Llama 3
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 July 2024\n\n"  # of Llama 3.1's template, always these

VICUNA = Form()
BAKLLAVA = Form(user=("USER: ", "\nASSISTANT:"))  # as on its card: the template beside it is of another model
VICUNA_NEXT = Form(opening=CURIOUS)
MISTRAL = Form(system=("", "\n"), user=("[INST] ", " [/INST]"))
HASHES = Form(
    system=("", ""), user=("###Human: ", "###Assistant:"), assistant=(" ", ""), between="", opening=CURIOUS
)  # fmt: skip
CHATML = Form(
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    assistant=("", ""),
    end="<|im_end|>",
    between="<|im_end|>\n",
)
CHATML_NEXT = replace(CHATML, opening="You are a helpful assistant.")
CHATML_DIRECT = Form(  # without line breaks behind the ends
    system=("<|im_start|>system\n", "<|im_end|>"),
    user=("<|im_start|>user\n", "<|im_end|><|im_start|>assistant\n"),
    assistant=("", ""),
    end="<|im_end|>",
    opening="Answer the questions.",
)
LLAMA_3 = Form(
    system=(HEADER.format("system"), "<|eot_id|>"),
    user=(HEADER.format("user"), "<|eot_id|>" + HEADER.format("assistant")),
    assistant=("", ""),
    end="<|eot_id|>",
)
LLAMA_3_NEXT = replace(LLAMA_3, opening=HELPFUL)
JOYCAPTION = replace(
    LLAMA_3,
    system=(HEADER.format("system") + DATES, "<|eot_id|>"),
    picture=("<|reserved_special_token_70|>", "<|reserved_special_token_71|>"),
    opening="You are a helpful image captioner.",
)
PHI_3 = Form(
    system=("<|system|>\n", "<|end|>\n"),
    user=("<|user|>\n", "<|end|>\n<|assistant|>\n"),
    assistant=("", ""),
    end="<|end|>",
    between="<|end|>\n",
)

ANY = None
ROWS = [  # model_type, text_config.model_type, special tokens that are there → the form; the first row that fits
    ("vipllava", ANY, [], HASHES),
    (ANY, ANY, ["<|eot_id|>", "for pictures: <|reserved_special_token_69|>"], JOYCAPTION),
    ("llava_next", ANY, ["<|im_start|>", "<|im_end|>", "<|startoftext|>"], CHATML_DIRECT),
    ("llava_next", ANY, ["<|im_start|>", "<|im_end|>"], CHATML_NEXT),
    (ANY, ANY, ["<|im_start|>", "<|im_end|>"], CHATML),
    ("llava_next", ANY, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], LLAMA_3_NEXT),
    (ANY, ANY, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], LLAMA_3),
    (ANY, ANY, ["<|user|>", "<|assistant|>", "<|end|>"], PHI_3),
    ("llava_next", "mistral", [], MISTRAL),
    ("llava_next", ANY, [], VICUNA_NEXT),
    (ANY, "mistral", [], BAKLLAVA),
    (ANY, ANY, [], VICUNA),
]


def choose(config, tokenizer):
    """The form of a checkpoint: config, a LlavaConfig; its tokenizer. Raises ValueError where no answer would end."""
    names = {*tokenizer.spelling.values(), f"for pictures: {tokenizer.spelling.get(config.image_token_index)}"}
    kinds = config.model_type, config.text_config.model_type
    for *wanted, needed, form in ROWS:
        if names.issuperset(needed) and all(want in (ANY, kind) for want, kind in zip(wanted, kinds, strict=True)):
            if form.end is None and not config.eos_token_ids:
                raise ValueError("neither config.json nor generation_config.json says eos_token_id: add it there")
            return form
