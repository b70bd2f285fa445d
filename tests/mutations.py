# ruff: noqa: E501 (a line of a module may be long, and stands here twice)
"""Deliberate bugs, planted one at a time: the tests must catch each.

    python tests/mutations.py                 all of them; exit status 1 if one survives
    python tests/mutations.py cls pad         those whose names contain one of the words

Most are bugs that real LLaVA ports had and nobody noticed, as their answers stayed plausible. Each is a change of a line in
one of the modules. The test files named beside it must catch it. Everything heavy is imported once, and each bug gets a copy of
the repository and a fork of this process.
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# fmt: off
MUTATIONS = [  # name, file, what is right there, what is planted instead, the test files that should see it
    (
        "T1 class token behind the patches",
        "vision.py",
        "torch.cat([cls, patches], dim=1)",
        "torch.cat([patches, cls], dim=1)",
        "test_parity.py",
    ),
    (
        "T2 one block too many",
        "vision.py",
        "layers = [layer % (last + 1) for layer in layers]",
        "layers = [layer % (last + 1) + (layer < -1) for layer in layers]",
        "test_parity.py",
    ),
    (
        "T2 one block too few",
        "vision.py",
        "layers = [layer % (last + 1) for layer in layers]",
        "layers = [layer % (last + 1) - (layer < -1) for layer in layers]",
        "test_parity.py",
    ),
    (
        "T3 post_norm applied to the features",
        "vision.py",
        "        return [states[layer] for layer in layers]",
        "        return [self.post_norm(states[layer]) for layer in layers]",
        "test_parity.py",
    ),
    (
        "T4 fast GELU's constant in the tower",
        "vision.py",
        "return x * torch.sigmoid(1.702 * x)",
        "return x * torch.sigmoid(1.773 * x)",
        "test_parity.py",
    ),
    (
        "T4 approximate GELU in the projector",
        "llava.py",
        "F.gelu(self.linear_1(x))",
        'F.gelu(self.linear_1(x), approximate="tanh")',
        "test_parity.py",
    ),
    ("T5 another epsilon in the RMS norm", "llama.py", "self.eps = eps", "self.eps = 1e-6", "test_parity.py"),
    (
        "T6 interleaved rotation",
        "llama.py",
        "    first, second = x.chunk(2, dim=-1)\n    return x * cos + torch.cat([-second, first], dim=-1) * sin",
        "    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) * sin",
        "test_parity.py",
    ),
    (
        "T6 rotation the other way round",
        "llama.py",
        "torch.cat([-second, first], dim=-1)",
        "torch.cat([second, -first], dim=-1)",
        "test_parity.py",
    ),
    (
        "T7 the beginning of text twice",
        "llava.py",
        "self.tokenizer.start + self.tokenizer.encode(text) for text in texts",
        "self.tokenizer.start * 2 + self.tokenizer.encode(text) for text in texts",
        "test_text.py",
    ),
    (
        "T7 no beginning of text in a chat",
        "llava.py",
        "return self.inputs([self.tokenizer.start + self.encode(",
        "return self.inputs([self.encode(",
        "test_text.py",
    ),
    (
        "T8 stretches of text encoded piece by piece",
        "llava.py",
        "                text += piece\n                continue\n",
        "                ids += self.tokenizer.encode(piece, special=False)\n                continue\n",
        "test_text.py",
    ),
    (
        "T9 Mistral gets Llama's template",
        "llava.py",
        '"mistral": ("USER: ", "\\nASSISTANT:")',
        '"mistral": ("USER: ", " ASSISTANT:")',
        "test_text.py",
    ),
    (
        "T10 padding rounds to the other side",
        "vision.py",
        "((side - image.width) // 2, (side - image.height) // 2)",
        "((side - image.width + 1) // 2, (side - image.height + 1) // 2)",
        "test_pictures.py",
    ),
    (
        "T10 padding although nobody asked",
        "vision.py",
        "if config.do_pad if pad is None else pad:\n        image",
        "if config.do_pad if pad is False else True:\n        image",
        "test_pictures.py",
    ),
    (
        "T11 bilinear instead of bicubic",
        "vision.py",
        "image.resize(size, config.resample)",
        "image.resize(size, 2)",
        "test_pictures.py",
    ),
    (
        "T11 the long side is rounded",
        "vision.py",
        "other = int(edge * long / short)",
        "other = round(edge * long / short)",
        "test_pictures.py",
    ),
    (
        "T12 the crop is off by one",
        "vision.py",
        '(size[1] - config.crop_size["height"]) // 2\n',
        '(size[1] - config.crop_size["height"] + 1) // 2\n',
        "test_pictures.py",
    ),
    (
        "T12 width and height change places",
        "vision.py",
        "size = (edge, other) if width <= height else (other, edge)",
        "size = (edge, other) if width > height else (other, edge)",
        "test_pictures.py",
    ),
    (
        "the way back to the photo forgets the crop",
        "vision.py",
        "+ np.tile([left, top], 2)",
        "+ 0 * np.tile([left, top], 2)",
        "test_pictures.py",
    ),
    (
        "the way back to the photo forgets the margin",
        "vision.py",
        "- np.tile(margin, 2)",
        "- 0 * np.tile(margin, 2)",
        "test_pictures.py",
    ),
    (
        "T13 features go where embeddings are zero",
        "llava.py",
        "return x if features is None else x.masked_scatter(is_image[..., None], features.to(x.dtype))",
        "x = x.masked_fill(is_image[..., None], 0)\n        return x if features is None else x.masked_scatter((x == 0).all(-1, keepdim=True), features.to(x.dtype))",
        "test_forward.py",
    ),
    (
        "T13 only the first picture grows",
        "llava.py",
        "copies = torch.where(is_image, size, 1)",
        "copies = torch.where(is_image & (is_image.cumsum(1) == 1), size, 1)",
        "test_forward.py",
    ),
    (
        "T13 rows are padded on the wrong side after growing",
        "llava.py",
        'side = "left" if mask[:, -1].all() else "right"',
        'side = "right" if mask[:, -1].all() else "left"',
        "test_forward.py",
    ),
    (
        "T14 padding is seen again in decode steps",
        "llava.py",
        'attention_mask = torch.cat([kv_cache["real"][:, : llama.length(kv_cache)], real[:, None]], dim=1)',
        "attention_mask = torch.ones(len(ids), llama.length(kv_cache) + 1)",
        "test_generate.py",
    ),
    (
        "T15 positions count padding",
        "llama.py",
        "position_ids = before(real)[:, past:]",
        "position_ids = (torch.ones_like(real).cumsum(-1) - 1)[:, past:]",
        "test_forward.py",
    ),
    (
        "T15 padding is not masked",
        "llama.py",
        "return (mask & real[:, None, None, :]) | (key == query)",
        "return mask & torch.ones_like(real)[:, None, None, :]",
        "test_forward.py",
    ),
    (
        "T16 a chunk with a past is masked as if it had none",
        "llama.py",
        "query = where[:, None]",
        "query = (where - where[0])[:, None]",
        "test_cache.py",
    ),
    (
        "T16 a chunk sees its own future",
        "llama.py",
        "mask = key <= query  # (T, S)",
        "mask = key < len(key) + 0 * query  # (T, S)",
        "test_cache.py",
    ),
    (
        "T16 positions start anew in each chunk",
        "llama.py",
        "position_ids = before(real)[:, past:]",
        "position_ids = real[:, past:].cumsum(-1) - real[:, past:].long()",
        "test_cache.py",
    ),
    (
        "T17 the cache is shared between answers",
        "llava.py",
        "            kv_cache = self.init_kv_cache(B, T + max_new_tokens - 1)\n",
        '            kv_cache = self.__dict__.setdefault("kept", self.init_kv_cache(B, 500))\n',
        "test_cache.py",
    ),
    (
        "T17 the image token is embedded and checked for nothing",
        "llava.py",
        "        if tokens != pictures * size:",
        "        if tokens < 0:",
        "test_forward.py",
    ),
    ("T19 the norm works in the model's dtype", "llama.py", "        y = x.float()\n", "        y = x\n", "test_llama.py"),
    (
        "T19 numbers out of range are not noticed",
        "llava.py",
        "    if not (total.isfinite() or x.isfinite().all()):",
        "    if False:",
        "test_forward.py",
    ),
    (
        "T20 heads are flattened before they are side by side",
        "vision.py",
        "self.wo(x.transpose(1, 2).flatten(2))",
        "self.wo(x.flatten(2).view(len(x), -1, self.wo.in_features))",
        "test_parity.py",
    ),
    (
        "T21 gate and up change places",
        "weights.py",
        'mlp.gate_proj.weight", "llama.blocks.{i}.mlp.gate.weight"),\n    ("language_model.model.layers.{i}.mlp.up_proj.weight", "llama.blocks.{i}.mlp.up.weight"),',
        'mlp.gate_proj.weight", "llama.blocks.{i}.mlp.up.weight"),\n    ("language_model.model.layers.{i}.mlp.up_proj.weight", "llama.blocks.{i}.mlp.gate.weight"),',
        "test_weights.py",
    ),
    (
        "T21 an unknown tensor is passed over",
        "weights.py",
        "                if not any(re.search(pattern, name) for pattern, _ in UNUSED):",
        "                if False:",
        "test_weights.py",
    ),
    ("T21 a repeated tensor is taken", "weights.py", "            if ours in found:", "            if False:", "test_weights.py"),
    (
        "T22 the projector stays random",
        "weights.py",
        "state[ours] = as_part(numbers, expected[ours])",
        'state[ours] = as_part(numbers, expected[ours])\n                if ours.startswith("projector"):\n                    torch.nn.init.normal_(state[ours], std=0.02)',
        "test_weights.py",
    ),
    (
        "T24 text in another encoding",
        "llama.py",
        "return self.bpe.encode(text, add_special_tokens=False).ids",
        'return self.bpe.encode(text.encode().decode("latin-1"), add_special_tokens=False).ids',
        "test_text.py",
    ),
    (
        "a typed </s> ends the prompt",
        "llava.py",
        "ids += self.tokenizer.encode(text, special=False)",
        "ids += self.tokenizer.encode(text)",
        "test_text.py",
    ),
    ("generation never stops", "llava.py", "going & ~torch.isin(ids, eos)", "going", "test_generate.py"),
    (
        "only the first end of several counts",
        "llava.py",
        "eos = torch.tensor(self.config.eos_token_ids, device=self.device)",
        "eos = torch.tensor(self.config.eos_token_ids[:1], device=self.device)",
        "test_generate.py",
    ),
    (
        "one ended row ends them all",
        "llava.py",
        "return ids, None, real, bool(going.any())",
        "return ids, None, real, bool(going.all())",
        "test_generate.py",
    ),
    (
        "beams forget finished hypotheses",
        "llama.py",
        'worth = scores / (step + 1) + ~beams["open"] * NEVER + ~answers * NEVER',
        'worth = scores / (step + 1) + ~beams["open"] * NEVER + ~(answers & (step + 1 == limit)) * NEVER',
        "test_generate.py",
    ),
    ("beams are not divided by their length", "llama.py", "worth = scores / (step + 1)", "worth = scores", "test_generate.py"),
    (
        "the cache does not follow the beams",
        "llava.py",
        "            if parents is not None:\n                llama.reorder_cache(kv_cache, parents)",
        "            if parents is None:\n                llama.reorder_cache(kv_cache, parents)",
        "test_generate.py",
    ),
    (
        "top-p keeps one token too many",
        "llama.py",
        "unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - top_p",
        "unlikely = ascending.softmax(-1).cumsum(-1) < 1 - top_p - 0.05",
        "test_generate.py",
    ),
    (
        "top-k keeps one token too many",
        "llama.py",
        "logits.topk(min(top_k, logits.shape[-1]))",
        "logits.topk(min(top_k + 1, logits.shape[-1]))",
        "test_generate.py",
    ),
    (
        "the window is one key too wide",
        "llama.py",
        "(key > query - sliding_window)",
        "(key >= query - sliding_window)",
        "test_forward.py",
    ),
    (
        "key-value heads are dealt out in turn",
        "llama.py",
        "scores = q.to(dtype).reshape(B, K, -1, E) @ k.to(dtype).transpose(2, 3)",
        "scores = q.to(dtype).view(B, H // K, K, T, E).transpose(1, 2).reshape(B, K, -1, E) @ k.to(dtype).transpose(2, 3)",
        "test_llama.py",
    ),
    (
        "labels are not shifted",
        "llava.py",
        "logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()",
        "logits.float().flatten(0, 1), labels.flatten()",
        "test_forward.py",
    ),
    (
        "positions of pictures count in the loss",
        "llava.py",
        "            if input_ids is not None:\n                labels",
        "            if input_ids is None:\n                labels",
        "test_forward.py",
    ),
    (
        "the last hidden state is given before the norm",
        "llama.py",
        "hidden_states = (*hidden_states[:-1], x) if output_hidden_states else None",
        "hidden_states = tuple(hidden_states) if output_hidden_states else None",
        "test_parity.py",
    ),
    ("a full cache is overwritten", "llama.py", "    if held + new > capacity:", "    if held > capacity:", "test_cache.py"),
    (
        "transparency shows black",
        "vision.py",
        'Image.new("RGBA", image.size, "white")',
        'Image.new("RGBA", image.size, "black")',
        "test_pictures.py",
    ),
    ("photographs lie on their side", "vision.py", "image = ImageOps.exif_transpose(image)", "image = image.copy()", "test_pictures.py"),
    (
        "an index may name any file",
        "weights.py",
        "if not isinstance(name, str) or not re.fullmatch(",
        'if not isinstance(name, str) or re.fullmatch(r"never", name) and not re.fullmatch(',
        "test_weights.py",
    ),
    ("T18 a broken character is shown", "llama.py", 'if not text.endswith("\\ufffd"):', "if True:", "test_text.py"),
    (
        "T23 a prompt without pictures gets a placeholder",
        "llava.py",
        'pieces += [self.before, *[self.image_id, "\\n"] * images, words, self.after]',
        'pieces += [self.before, *[self.image_id, "\\n"] * max(images, 1), words, self.after]',
        "test_text.py",
    ),
    ("a chat reads its answers twice", "llava.py", "talk.ids = said[read:] +", "talk.ids = said +", "test_chat.py"),
    (
        "a chat leaves out the end of a turn",
        "llava.py",
        "[] if said[-1] in model.config.eos_token_ids else [processor.eos_id]",
        "[]",
        "test_chat.py",
    ),
    (
        "a choice counts without its end",
        "llava.py",
        'scores = model.score([row[shared:] for row in rows], inputs["input_ids"], inputs.get("pixel_values"))',
        'scores = model.score([row[shared:-1] for row in rows], inputs["input_ids"], inputs.get("pixel_values"))',
        "test_cli.py",
    ),
    (
        "new rows of the vocabulary are zeros",
        "llava.py",
        "drawn = rows.mean(0) + 1e-9**0.5 * torch.randn(new, len(rows), device=rows.device) @ spread",
        "drawn = 0 * rows.mean(0) + 1e-9**0.5 * torch.randn(new, len(rows), device=rows.device) @ spread",
        "test_training.py",
    ),
    (
        "eight bits without their scale",
        "llama.py",
        "self.q[start:end].to(x.dtype)) * self.scale[start:end].to(x.dtype)",
        "self.q[start:end].to(x.dtype)) * self.scale.mean().to(x.dtype)",
        "test_fast.py",
    ),
    ("the halves of a byte change places", "llama.py", "first | second << 4", "second | first << 4", "test_fast.py"),
    (
        "four bits round down",
        "llama.py",
        "at_least_tiny(scale)).round().add(8)",
        "at_least_tiny(scale)).floor().add(8)",
        "test_fast.py",
    ),
    (
        "a recorded step grows with the cache",
        "llava.py",
        "-(-needed // self.WINDOW) * self.WINDOW",
        "needed",
        "test_fast.py",
    ),
    (
        "a recorded step sees what is not filled yet",
        "llama.py",
        "where = torch.arange(past, past + T, device=x.device)  # (T)",
        "where = torch.arange(S - T, S, device=x.device)  # (T)",
        "test_fast.py",
    ),
    (
        "every process reads the first rows",
        "weights.py",
        "own = slice(mesh.get_local_rank() * size, (mesh.get_local_rank() + 1) * size)",
        "own = slice(0, size)",
        "test_split.py",
    ),
    (
        "the projector is wired to one layer of several",
        "llava.py",
        "states = self.vision(pixel_values.to(self.device), layers)",
        "states = self.vision(pixel_values.to(self.device), layers[:1] * len(layers))",
        "test_forward.py",
    ),
    (
        "an index may link to any file",
        "weights.py",
        'if Path(os.path.realpath(file)).parent not in (here, here.parent.parent / "blobs"):',
        "if file.parent.resolve() != here:",
        "test_weights.py",
    ),
    (
        "the links of the Hub's cache are refused",
        "weights.py",
        'if Path(os.path.realpath(file)).parent not in (here, here.parent.parent / "blobs"):',
        "if file.resolve().parent != here:",
        "test_weights.py",
    ),
    (
        "a sum that overflows is called not finite",
        "weights.py",
        "if not (numbers.sum().isfinite() or numbers.isfinite().all()):",
        "if not numbers.sum().isfinite():",
        "test_weights.py",
    ),
    (
        "numbers of a list have no bounds",
        "weights.py",
        "all(type(item) in numbers and -limit <= item <= limit for item in value)",
        "all(type(item) in numbers for item in value)",
        "test_weights.py",
    ),
    (
        "saving that fails leaves half a checkpoint beside the old one",
        "weights.py",
        '(folder / f"{file}.new").unlink(missing_ok=True)',
        '(folder / f"{file}.new").exists()',
        "test_weights.py",
    ),
    (
        "configs are written over the old ones at once",
        "weights.py",
        '(folder / f"{file}.new").write_text(text, encoding="utf-8")',
        '[(folder / f"{file}{end}").write_text(text, encoding="utf-8") for end in ("", ".new")]',
        "test_weights.py",
    ),
    (
        "a tokenizer is tried on a letter that every vocabulary has",
        "llama.py",
        'self.encode("\\U0010ffff")',
        'self.encode("a")',
        "test_text.py",
    ),
    (
        "the transparent grey of a 16-bit picture is black",
        "vision.py",
        "grey[grey == clear] = 65535",
        "grey[grey == clear] = 0",
        "test_pictures.py",
    ),
    (
        "a picture that waits is refused for ever",
        "llava.py",
        "if images:  # or they would be refused",
        "if not images:  # or they would be refused",
        "test_chat.py",
    ),
    (
        "messages speak to the terminal",
        "llava.py",
        'letter if letter.isprintable() else " "',
        'letter if letter != "\\n" else " "',
        "test_cli.py",
    ),
    (
        "every failure on a device is the machine's",
        "llava.py",
        'if "CUDA error" in text and "assert" not in text:',
        'if "CUDA error" in text:',
        "test_cli.py",
    ),
    (
        "notices go to stdout where stderr is closed",
        "llava.py",
        "sys.stderr = sys.stderr or io.StringIO()",
        "sys.stderr = sys.stderr or None",
        "test_hostile_cli.py",
    ),
    (
        "the loss counts a word that padding predicts",
        "llava.py",
        "masked_fill(first, -100)",
        "masked_fill(first & False, -100)",
        "test_forward.py",
    ),
    (
        "the probabilities of choices may be nan",
        "llava.py",
        'logits = check_finite(self.llama.head(x[:, keep]), "the logits")',
        "logits = self.llama.head(x[:, keep])",
        "test_forward.py",
    ),
    (
        "a sum that overflows is taken for numbers that do",
        "llava.py",
        "    if not (total.isfinite() or x.isfinite().all()):",
        "    if not total.isfinite():",
        "test_forward.py",
    ),
    (
        "eight bits multiply only half of the vector",
        "llama.py",
        "return ((high + low / 254) * size).to(x.dtype)",
        "return (high * size).to(x.dtype)",
        "test_fast.py",
    ),
    (
        "a packed layer has no bias",
        "llama.py",
        "return packed_product(x, self.w, self.bias)",
        "return packed_product(x, self.w, None)",
        "test_fast.py",
    ),
    (
        "four bits without their zero",
        "llama.py",
        "q.sub_(8).mul_(scale).add_(zero)",
        "q.sub_(8).mul_(scale)",
        "test_fast.py",
    ),
    (
        "every model is packed, and can be neither trained nor saved",
        "llava.py",
        "packed = compile or torch.is_inference_mode_enabled()",
        "packed = True",
        "test_fast.py",
    ),
    (
        "oneDNN stays switched off after the first word",
        "llama.py",
        "    finally:\n        torch.backends.mkldnn.enabled = before",
        "    finally:\n        before = None",
        "test_fast.py",
    ),
]
# fmt: on


def plant(folder, file, right, wrong):
    """Copy the repository to a folder and change one place of it."""
    keep = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache")
    shutil.copytree(ROOT, folder, ignore=keep, dirs_exist_ok=True)
    source = (folder / file).read_text()
    if source.count(right) != 1:
        raise SystemExit(f"{file} holds {source.count(right)} times, not once: {right}")
    source = source.replace(right, wrong)
    compile(source, file, "exec")
    (folder / file).write_text(source)


def ours(path):
    """Whether a path lies in this repository, and not in a virtual environment that happens to stand inside it."""
    path = Path(path).resolve()
    return path.is_relative_to(ROOT) and not path.is_relative_to(Path(sys.prefix).resolve())


def start(folder, tests):
    """Run tests in a fork, in the given repository, until the first fails → the fork's process id."""
    child = os.fork()
    if child:
        return child
    status = 70  # of a fork that never came to its tests
    try:
        os.setsid()
        out = os.open(folder / "out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(folder)
        for name, module in list(sys.modules.items()):  # what came from here must come from there
            if name != "__main__" and ours(getattr(module, "__file__", None) or sys.prefix):
                del sys.modules[name]
        sys.path[:] = [str(folder), str(folder / "tests"), *[path for path in sys.path if not ours(path)]]
        import pytest

        class Note:
            def pytest_runtest_logreport(self, report):
                if report.failed:
                    (folder / "caught").write_text(report.nodeid)

        status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[Note()]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def verdict(folder, status):
    """How a fork ended → the name of the test that failed, None if all passed. Anything else is no verdict, and stops us."""
    code = os.waitstatus_to_exitcode(status)
    if code == 1 and (folder / "caught").exists():
        return (folder / "caught").read_text()
    if code != 0:
        raise SystemExit(f"the tests did not run (exit status {code}):\n{(folder / 'out').read_text()}")
    return None


def try_all(mutations, jobs, limit=600):
    """Plant each bug and run the tests beside it; yields (name, the test that failed or None, seconds).

    Forks from this one thread only: a fork of a process with several may find a lock that nobody is left to open.
    """
    waiting, running = list(reversed(mutations)), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                mutation = waiting.pop()
                folder = tempfile.TemporaryDirectory()
                plant(Path(folder.name), *mutation[1:4])
                tests = [f"tests/{test}" for test in mutation[4].split()]
                running[start(Path(folder.name), tests)] = mutation[0], folder, time.monotonic()
            child, status = os.waitpid(-1, os.WNOHANG)
            if not child:
                time.sleep(0.02)
                if any(time.monotonic() - began > limit for _, _, began in running.values()):
                    raise SystemExit(f"the tests did not end within {limit} s")
                continue
            name, folder, began = running.pop(child)
            caught = verdict(Path(folder.name), status)
            folder.cleanup()
            yield name, caught, time.monotonic() - began
    finally:
        for child in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)


def main(words):
    import reference  # noqa: F401 (transformers and torch, once for all)
    import torch
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel  # noqa: F401

    torch.set_num_threads(1)
    chosen = [mutation for mutation in MUTATIONS if not words or any(word in mutation[0] for word in words)]
    for _, file, right, wrong, _ in chosen:
        source = (ROOT / file).read_text()
        if source.count(right) != 1 or right == wrong:
            print(f"{file} holds {source.count(right)} times, not once: {right}", file=sys.stderr)
            return 2
    began, survivors = time.monotonic(), []
    for name, caught, seconds in try_all(chosen, jobs=os.cpu_count() or 2):
        print(f"{name:<64} {caught or 'SURVIVED'}  ({seconds:.0f} s)", flush=True)
        survivors += [] if caught else [name]
    print(f"{len(chosen)} bugs, {len(survivors)} survived, {time.monotonic() - began:.0f} s")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
