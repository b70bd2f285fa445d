"""What fewer bits cost: how much worse a real language model foretells a text, and the answers that tiny loses.

    python benchmarks/quality.py
    python benchmarks/quality.py --tokens 512 --questions 20

The language model is SmolLM2-135M-Instruct, which tests/smollm2.py puts together (it says what that needs; without it
this part is left out). Its file holds numbers of four bits, in groups of 32 columns: its hidden units, the units of its
MLPs and the dimensions of its values are shuffled first, which changes nothing but these groups, or schemes with groups
of 32 would be flattered. The text is of Python's own reference, which comes with it. Perplexity is e to the mean of
-log P(next token) in nats; KL the mean over positions of KL(float32 ‖ scheme) between the distributions of the next
token; top-1 the share of positions at which the likeliest token is the same. Q8_0 and Q4_0 are the roundings of
llama.cpp, by the package gguf, with a head in Q8_0 and all else in float32.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import peers
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

import llava

sys.path[:0] = [str(peers.HERE.parent / "tiny")]
import evaluate  # noqa: E402

SCHEMES = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "int4": {"dtype": "bfloat16", "quantize": "int4"},
}


def answers(settings, table):
    """tiny's answers to all questions of a table, and how many are right."""
    model, processor = llava.load("tiny", device="cpu", **settings)
    said = [words for items in table.values() for words in evaluate.answers(model, processor, items)]
    return said, sum(words == answer for words, answer in zip(said, truth(table), strict=True))


def truth(table):
    return [answer for items in table.values() for *_, answer in items]


def tiny(number):
    table = evaluate.collect("one question", number, held_out=False)
    rows = {name: answers(settings, table) for name, settings in SCHEMES.items()}
    base, right = rows["float32"]
    print(f"tiny, {len(base)} questions about fresh scenes\n")
    print("| scheme | right | right in float32 and now wrong | other words |")
    print("|---|---|---|---|")
    for name, (said, hits) in rows.items():
        lost = sum(a == t != b for a, b, t in zip(base, said, truth(table), strict=True))
        other = sum(a != b for a, b in zip(base, said, strict=True))
        print(f"| {name} | {hits} ({hits / len(base):.2%}) | {lost} ({lost / right:.2%}) | {other} |", flush=True)


# ----------------------------------------------------------------------------------------------------------------
# A real language model

TOPICS = ("objects", "execmodel", "import", "specialnames")
WINDOW = 512  # tokens that are read at once


def shuffled(folder, target):
    """A copy of a checkpoint, in which everything that has no order of its own has got another one."""
    config = json.loads((folder / "config.json").read_text())["text_config"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    drawn = torch.Generator().manual_seed(0)
    hidden, inner = (torch.randperm(config[name], generator=drawn) for name in ("hidden_size", "intermediate_size"))
    size = config["hidden_size"] // heads
    value = torch.stack([torch.randperm(size, generator=drawn) + size * group for group in range(groups)])
    offset = (
        size * torch.arange(heads)[:, None] - size * torch.arange(groups).repeat_interleave(heads // groups)[:, None]
    )
    out = (value.repeat_interleave(heads // groups, dim=0) + offset).flatten()  # the same order in each head of a group
    orders = {  # the end of a name → the new order of its rows, and of its columns
        "embed_tokens.weight": (None, hidden), "lm_head.weight": (None, hidden), "norm.weight": (hidden,),
        "q_proj.weight": (None, hidden), "k_proj.weight": (None, hidden), "v_proj.weight": (value.flatten(), hidden),
        "o_proj.weight": (hidden, out), "gate_proj.weight": (inner, hidden), "up_proj.weight": (inner, hidden),
        "down_proj.weight": (hidden, inner), "linear_2.weight": (hidden,), "linear_2.bias": (hidden,),
    }  # fmt: skip
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if not name.startswith(("language_model.", "multi_modal_projector.")):
            continue
        for end, order in orders.items():
            if name.endswith(end):
                for dim, places in enumerate(order):
                    tensor = tensor if places is None else tensor.index_select(dim, places)
        tensors[name] = tensor.contiguous()
    shutil.copytree(folder, target, ignore=lambda *_: ["model.safetensors"])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def rounded_as(model, form, head):
    """Every linear layer of a language model as it is after llama.cpp's rounding."""
    import gguf

    def rounded(weight, form):
        kind = gguf.GGMLQuantizationType[form]
        numbers = gguf.quants.dequantize(gguf.quants.quantize(weight.detach().numpy(), kind), kind)
        return nn.Parameter(torch.from_numpy(numbers), requires_grad=False)

    for layer in model.llama.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = rounded(layer.weight, head if layer is model.llama.head else form)


def log_probabilities(model, windows):
    """log P of every token at each position but the last, (windows, positions - 1, V)."""
    with torch.no_grad():
        for window in windows:
            yield model(window[None]).logits[0, :-1].float().log_softmax(-1)


def real(number):
    try:
        import smollm2
    except ImportError:
        return print("\nthere is no tests/smollm2.py here")
    if smollm2.reason():
        return print(f"\n{smollm2.reason()}")
    from pydoc_data.topics import topics

    with tempfile.TemporaryDirectory() as place:
        smollm2.make(Path(place, "as it is"))
        shuffled(Path(place, "as it is"), Path(place, "shuffled"))
        model, processor = llava.load(Path(place, "shuffled"), device="cpu", dtype="float32")
        ids = processor.tokenizer.encode(" ".join(" ".join(topics[name] for name in TOPICS).split()))
        windows = torch.tensor(ids[: number // WINDOW * WINDOW]).unflatten(0, (-1, WINDOW))
        same, _ = llava.load(Path(place, "as it is"), device="cpu", dtype="float32")
        a, b = (next(log_probabilities(each, windows)) for each in (model, same))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)  # shuffling has changed nothing
        del same, a, b
        print(f"\nSmolLM2-135M, shuffled; {windows.numel()} tokens, {WINDOW} at once\n")
        print("| scheme | perplexity | of float32's | KL | top-1 |\n|---|---|---|---|---|")
        exact, base = [x.half() for x in log_probabilities(model, windows)], None
        rounds = {"Q8_0 of llama.cpp": ("Q8_0", "Q8_0"), "Q4_0 of llama.cpp, head in Q8_0": ("Q4_0", "Q8_0")}
        for name in (*SCHEMES, *rounds):
            settings = SCHEMES.get(name, {"dtype": "float32"})
            with torch.inference_mode(name in SCHEMES):
                model, _ = llava.load(Path(place, "shuffled"), device="cpu", **settings)
            if name in rounds:
                rounded_as(model, *rounds[name])
            loss, kl, top = [], [], []
            for window, true, found in zip(windows, exact, log_probabilities(model, windows), strict=True):
                true = true.float()
                loss.append(-found.gather(1, window[1:, None]).mean().item())
                kl.append((true.exp() * (true - found)).sum(-1).mean().item())
                top.append((true.argmax(-1) == found.argmax(-1)).float().mean().item())
            loss, kl, top = (sum(each) / len(each) for each in (loss, kl, top))
            perplexity = torch.tensor(loss).exp().item()
            base = base or perplexity
            print(f"| {name} | {perplexity:.3f} | {perplexity / base - 1:+.2%} | {kl:.2e} | {top:.1%} |", flush=True)
            del model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of the text (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=300, help="to tiny, of each kind (default: %(default)s)")
    options = parser.parse_args()
    real(options.tokens)
    if options.questions:
        tiny(options.questions)


if __name__ == "__main__":
    main()
