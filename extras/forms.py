"""Prompts: how each checkpoint writes a conversation down, as rows of strings.

LLaVA-1.5's way is llava.Form itself. Which other one a checkpoint was trained with stands in none of its configs; but the
kind of model and the special tokens that its tokenizer has tell. docs/departures.md says where published templates and
documentation disagree, and which of them is followed.
"""

from llava import Form

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
BAKLLAVA = Form(user=("USER: ", "\nASSISTANT:"))  # as on its card; the template in its repository is another model's
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
CHATML_NEXT = Form(**{**vars(CHATML), "opening": "You are a helpful assistant."})
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
LLAMA_3_NEXT = Form(**{**vars(LLAMA_3), "opening": HELPFUL})
JOYCAPTION = Form(
    **{
        **vars(LLAMA_3),
        "system": (HEADER.format("system") + DATES, "<|eot_id|>"),
        "picture": ("<|reserved_special_token_70|>", "<|reserved_special_token_71|>"),
        "opening": "You are a helpful image captioner.",
    }
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
    """The form of a checkpoint: config, a LlavaConfig, and its tokenizer."""
    names = {*tokenizer.spelling.values(), f"for pictures: {tokenizer.spelling.get(config.image_token_index)}"}
    kinds = config.model_type, config.text_config.model_type
    for *wanted, needed, form in ROWS:
        if names.issuperset(needed) and all(want in (ANY, kind) for want, kind in zip(wanted, kinds, strict=True)):
            return form


def ends(config, form, tokenizer):
    """The ids that end an answer: the config's, and the end of a turn, whatever eos_token_id says."""
    end = [] if form.end is None else [tokenizer.id(form.end)]
    return [*dict.fromkeys([*config.eos_token_ids, *end])]
