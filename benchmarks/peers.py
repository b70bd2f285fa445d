"""What the benchmarks share: a random checkpoint of the published widths, sides that take turns, and a table of ratios.

Each side (this code in one of its settings, transformers, llama.cpp) is a process of its own that loads the checkpoint
once and then waits for its turn. All sides run once in each round, so that what disturbs the machine disturbs all of
them, and a ratio is taken within a round. The first round is not counted.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line has it, for all sides

import full_size  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import llava  # noqa: E402

SMALL = "smollm2"  # a real language model of 135 million parameters
BASE = "transformers bfloat16"  # what the ratios are relative to
SIDES = {  # name → (kind, settings)
    BASE: ("transformers", {}),
    "transformers static, compiled": ("transformers", {"best": True}),
    "ours bfloat16": ("ours", {"dtype": "bfloat16"}),  # as the command line loads it
    "ours bfloat16 to train": ("ours", {"dtype": "bfloat16", "packed": False}),  # outside of torch.inference_mode()
    "ours float16": ("ours", {"dtype": "float16"}),
    "ours bfloat16 compiled": ("ours", {"dtype": "bfloat16", "compile": True}),
    "ours int8": ("ours", {"dtype": "bfloat16", "quantize": "int8"}),
    "ours int4": ("ours", {"dtype": "bfloat16", "quantize": "int4"}),
    "ours int8 compiled": ("ours", {"dtype": "bfloat16", "quantize": "int8", "compile": True}),
    "ours int4 compiled": ("ours", {"dtype": "bfloat16", "quantize": "int4", "compile": True}),
    "llama.cpp BF16": ("llama.cpp", {"type": "BF16"}),
    "llama.cpp Q8_0": ("llama.cpp", {"type": "Q8_0"}),
    "llama.cpp Q4_0": ("llama.cpp", {"type": "Q4_0"}),
}
TEXT = list(range(100, 164))  # a prompt of 64 tokens


def nbytes(model):
    """Bytes of the numbers that a model holds, also of those that FBGEMM has laid out."""
    held = [layer.held for layer in model.modules() if getattr(layer, "held", None) is not None]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *held))


def picture():
    """A picture of noise: what is in it does not change the time."""
    torch.manual_seed(0)
    return Image.fromarray((torch.rand(336, 336, 3) * 255).byte().numpy())


# ----------------------------------------------------------------------------------------------------------------
# The sides, each with the same methods: decode, prefill, batch, turns → seconds


class Ours:
    def __init__(self, folder, packed=True, device="cpu", **settings):
        with torch.inference_mode(packed):  # as the command line does it
            self.model, self.processor = llava.load(folder, device=device, **settings)
        self.model.config.eos_token_id = -1  # no answer ends early
        # what a step reads: all weights of the language model but the embedding, of which it reads one row
        self.bytes, embed = nbytes(self.model.llama), self.model.llama.embed.weight
        if getattr(self.model.llama.head, "weight", None) is not embed:
            self.bytes -= embed.nbytes

    def decode(self, tokens, batch=1):
        """Seconds for each step behind a prompt of 64 tokens."""
        marks = [
            time.perf_counter() for _ in self.model.stream(torch.tensor([TEXT] * batch), max_new_tokens=tokens + 1)
        ]
        assert len(marks) == tokens + 1, "the answer ended early"
        return (marks[-1] - marks[0]) / tokens

    def prefill(self, words):
        inputs = self.inputs(words)
        begin = time.perf_counter()
        with torch.no_grad():
            logits = self.model(**inputs, kv_cache=self.model.init_kv_cache(1, 1024), logits_to_keep=1).logits
            logits.sum().item()  # waits for a GPU
        return time.perf_counter() - begin

    def inputs(self, words):
        """A picture and so many words, as many positions as transformers gets."""
        ids = [1, self.processor.image_id, *[9] * words]
        return {"input_ids": torch.tensor([ids]), "pixel_values": self.processor("<image>", picture())["pixel_values"]}

    def grow(self, positions, rows=1, steps=4):
        """Seconds to read so many positions in each of some rows, seconds of a step behind them, the peak of memory."""
        ids, real = tokens(rows, positions), torch.ones(rows, dtype=torch.bool)
        cache = self.model.init_kv_cache(rows, positions + steps)
        begin = time.perf_counter()
        with torch.no_grad():
            self.model.prefill(ids, kv_cache=cache)
            marks = [time.perf_counter()]
            for _ in range(steps):
                self.model.step(ids[:, 0], cache, real)
                marks.append(time.perf_counter())
        return grown(begin, marks)

    def turns(self):
        """Seconds to the first token of two questions about a picture: the second goes on from the first's cache."""
        cache, seconds = self.model.init_kv_cache(1, 1024), []
        for more in (self.inputs(20), {"input_ids": torch.tensor([TEXT[:20]])}):
            begin = time.perf_counter()
            self.model.generate(**more, kv_cache=cache, max_new_tokens=1)
            seconds.append(time.perf_counter() - begin)
        return seconds


class Transformers:
    def __init__(self, folder, best=False, device="cpu"):
        from transformers import LlavaForConditionalGeneration

        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).to(device)
        text = self.model.model.language_model
        self.bytes = sum(tensor.nbytes for tensor in [*text.parameters(), *self.model.lm_head.parameters()])
        self.bytes -= text.embed_tokens.weight.nbytes
        self.settings = {"cache_implementation": "static"} if best else {}
        if best:  # what its documentation recommends for a fast decode
            self.model.forward = torch.compile(self.model.forward)

    def decode(self, tokens, batch=1):
        marks = []

        class Clock:
            def put(self, value):
                marks.append(time.perf_counter())

            def end(self):
                pass

        ids = torch.tensor([TEXT] * batch, device=self.model.device)
        length = {"max_new_tokens": tokens + 1, "min_new_tokens": tokens + 1}
        if batch == 1:
            length["streamer"] = Clock()
        begin = time.perf_counter()
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            pad_token_id=0,
            **length,
            **self.settings,
        )
        if batch == 1:
            return (marks[-1] - marks[1]) / tokens  # the first mark is the prompt's
        return (time.perf_counter() - begin) / (tokens + 1)

    def prefill(self, words):
        inputs = expanded_inputs(self.model.config, words)
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        begin = time.perf_counter()
        with torch.no_grad():
            self.model(**inputs, logits_to_keep=1).logits.sum().item()  # waits for a GPU
        return time.perf_counter() - begin

    def grow(self, positions, rows=1, steps=4):
        ids = tokens(rows, positions)
        begin = time.perf_counter()
        with torch.no_grad():
            cache = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            marks = [time.perf_counter()]
            for _ in range(steps):
                self.model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
                marks.append(time.perf_counter())
        return grown(begin, marks)


class LlamaCpp:
    """Text against text: llama-cpp-python on a GGUF file with the same sizes and random numbers."""

    def __init__(self, folder, type):
        import llama_cpp

        path = Path(folder) / f"{type}.gguf"
        embedding = write_gguf(path, json.loads((Path(folder) / "config.json").read_text())["text_config"], type)
        self.model = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=torch.get_num_threads(), verbose=False)
        self.bytes = path.stat().st_size - embedding

    def decode(self, tokens, batch=1):
        self.model.reset()
        self.model.eval(TEXT)
        begin = time.perf_counter()
        for i in range(tokens):
            self.model.eval([TEXT[i % len(TEXT)]])
        return (time.perf_counter() - begin) / tokens


def tokens(rows, positions):
    return torch.randint(100, 1000, (rows, positions), generator=torch.Generator().manual_seed(0))


def grown(begin, marks):
    laps = [b - a for a, b in itertools.pairwise(marks)][1:]  # the first step may prepare something
    return {"prefill": marks[0] - begin, "step": statistics.median(laps), "peak": full_size.high_water()}


def expanded_inputs(config, words):
    """What transformers takes for the same prompt: a picture that has grown into its 576 places, then words."""
    size = config.vision_config.image_size
    ids = [1, *[config.image_token_id] * (size // config.vision_config.patch_size) ** 2, *[9] * words]
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
            "pixel_values": torch.randn(1, 3, size, size, dtype=torch.bfloat16)}  # fmt: skip


def write_gguf(path, text, type):
    """A llama for llama.cpp with the sizes of a text_config; one random matrix of each shape serves all layers.

    Returns the bytes of the embedding.
    """
    import gguf
    import numpy as np

    wide, inner, heads = (
        text.get("hidden_size", 4096),
        text.get("intermediate_size", 11008),
        text.get("num_attention_heads", 32),
    )
    groups, layers, words = text.get("num_key_value_heads", heads), text["num_hidden_layers"], text["vocab_size"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096), writer.add_embedding_length(wide), writer.add_block_count(layers)
    writer.add_feed_forward_length(inner), writer.add_head_count(heads), writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_dimension_count(wide // heads), writer.add_vocab_size(words)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"w{i}" for i in range(words)])
    writer.add_token_scores([0.0] * words)
    writer.add_token_types([2, 3, 3] + [1] * (words - 3))
    kind, made = gguf.GGMLQuantizationType[type], {}

    def matrix(name, rows, columns):
        if (rows, columns) not in made:
            values = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32) * 0.02
            made[rows, columns] = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, made[rows, columns], raw_dtype=kind)

    def vector(name):
        writer.add_tensor(name, np.ones(wide, dtype=np.float32))

    narrow = wide // heads * groups
    matrix("token_embd.weight", words, wide)
    for i in range(layers):
        for name, rows, columns in (
            ("attn_q", wide, wide), ("attn_k", narrow, wide), ("attn_v", narrow, wide), ("attn_output", wide, wide),
            ("ffn_gate", inner, wide), ("ffn_up", inner, wide), ("ffn_down", wide, inner),
        ):  # fmt: skip
            matrix(f"blk.{i}.{name}.weight", rows, columns)
        vector(f"blk.{i}.attn_norm.weight"), vector(f"blk.{i}.ffn_norm.weight")
    vector("output_norm.weight")
    matrix("output.weight", words, wide)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return made[words, wide].nbytes


KINDS = {"ours": Ours, "transformers": Transformers, "llama.cpp": LlamaCpp}
NEEDS = {"ours": "torch", "transformers": "transformers", "llama.cpp": "llama_cpp"}


# ----------------------------------------------------------------------------------------------------------------
# Taking turns


class Side:
    """A process that holds one side; ask(method, arguments) → what the method returns there."""

    def __init__(self, name, folder):
        command = [sys.executable, __file__, "--serve", name, "--folder", str(folder)]
        self.name = name
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.about = self.answer()

    def ask(self, method, **arguments):
        print(json.dumps([method, arguments]), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} stopped with status {self.process.wait()}")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve(name, folder):
    """The other end: one line of JSON in, one out."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    kind, settings = SIDES[name]
    side = KINDS[kind](folder, **settings)
    print(json.dumps({"bytes": side.bytes}), file=out, flush=True)
    for line in sys.stdin:
        method, arguments = json.loads(line)
        print(json.dumps(getattr(side, method)(**arguments)), file=out, flush=True)


def bandwidth():
    """Bytes a second that a sum over 1 GB reads with all threads: the best of five."""
    numbers, best = torch.ones(250_000_000), 0.0
    for _ in range(5):
        begin = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - begin))
    return best


def installed(names, sides=SIDES):
    """Those of the named sides whose package is there."""
    from importlib.util import find_spec

    return [name for name in names if find_spec(NEEDS[sides[name][0]])]


def rounds(names, folder, number, method, **arguments):
    """{side: [what the method returned in each round]}, one round more than is kept; {side: what it says of itself}."""
    sides = [Side(name, folder) for name in names]
    results = {name: [] for name in names}
    for turn in range(number + 1):
        for side in sides:
            result = side.ask(method, **arguments)
            if turn:
                results[side.name].append(result)
        print(f"\rround {turn} of {number}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for side in sides:
        side.close()
    return results, {side.name: side.about for side in sides}


def spread(values, digits=2):
    """The median, and between which values all lie."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def compare(names, folder, number, method, what="seconds", **arguments):
    """Run the rounds and print a row for each side: the seconds, and their ratio to transformers' in the same round."""
    results, _ = rounds(names, folder, number, method, **arguments)
    print(f"| side | {what} | of {BASE}'s time, within a round |\n|---|---|---|")
    for name in names:
        ratio = [ours / theirs for theirs, ours in zip(results.get(BASE, results[name]), results[name], strict=True)]
        print(f"| {name} | {spread(results[name], 3)} | {spread(ratio)} |")
    return results


def parser(docstring, sides):
    made = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--model",
        choices=[*full_size.CONFIGS, SMALL],
        default="7b",
        help=f"whose widths (default: %(default)s); {SMALL} is a real one, whole: see tests/smollm2.py",
    )
    made.add_argument("--layers", type=int, default=2, help="of the language model (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=5, help="that count (default: %(default)s)")
    made.add_argument("--sides", nargs="+", choices=list(SIDES), default=sides, metavar="SIDE", help="; ".join(SIDES))
    return made


def checkpoint(options):
    """A temporary folder with the random checkpoint; remove it with its cleanup()."""
    folder = tempfile.TemporaryDirectory()
    if options.model == SMALL:
        import smollm2

        if smollm2.reason():
            raise SystemExit(smollm2.reason())
        smollm2.make(folder.name)
    else:
        full_size.write(Path(folder.name), options.model, options.layers)
    return folder


def what(options):
    """The model that is measured, in words."""
    return f"{options.model}, {'all' if options.model == SMALL else options.layers} layers"


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}"


if __name__ == "__main__":
    made = argparse.ArgumentParser()
    made.add_argument("--serve", choices=list(SIDES), required=True)
    made.add_argument("--folder", required=True)
    options = made.parse_args()
    serve(options.serve, options.folder)
