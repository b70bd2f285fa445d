"""What the documents say is run: commands, answers, figures, links, examples in docstrings.

In a document, a ```sh block holds commands, one a line, as do indented lines that begin with python. A ```text block
right behind one of sh or python is what that prints on stdout; a long line may be broken there. Every other number in
the text has to be one that figures() works out anew, a time, or listed in NOT_OURS.
"""

import ast
import contextlib
import doctest
import functools
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import line as line_of_llavas
import published as line_facts
import pytest
import torch

import llama
import llava
import vision
import weights
from extras import anyres, checks, cli, forms, quantize

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md", "CONTRIBUTING.md", "SECURITY.md", "extras/README.md", "tiny/README.md", "tests/README.md",
    "tests/fuzz/README.md", "small/README.md",
)  # fmt: skip
DOCUMENTS = [name for name in PAGES if (ROOT / name).exists()]
DOCUMENTS += sorted(
    str(file.relative_to(ROOT)) for folder in ("docs", "benchmarks") for file in (ROOT / folder).glob("*.md")
)
FOLDERS = (".", "extras", "tiny", "small", "tests", "benchmarks", "notebooks", "docs")
SCRIPTS = sorted(file for folder in FOLDERS for file in (ROOT / folder).glob("*.py"))


def text(document):
    return (ROOT / document).read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------
# Commands


@dataclass(frozen=True)
class Example:
    """Commands or Python of a document, and what they are said to print, if anything is."""

    where: str
    language: str
    source: str
    output: str | None

    def __str__(self):
        return f"{self.where} {self.source.splitlines()[0][:60]}"


def examples(document):
    """The ```sh blocks, line by line, the indented commands, and the ```python blocks of a document."""
    blocks = list(re.finditer(r"^```(\w*)\n(.*?)^```\n(\s*^```text\n(.*?)^```)?", text(document), flags=re.M | re.S))
    for block in blocks:
        language, source, output = block[1], block[2], block[4]
        line = text(document)[: block.start()].count("\n") + 2
        if language == "python":
            yield Example(f"{document}:{line}", language, source, output)
        elif language == "sh":
            commands = source.splitlines()
            for i, command in enumerate(commands):
                yield Example(f"{document}:{line + i}", language, command, output if i == len(commands) - 1 else None)
    yield from indented(document, text(document))


def indented(where, words):
    for command in re.findall(r"^    ((?:python|pytest) .*?)(?:\s{2,}.*)?$", words, flags=re.M):
        yield Example(where, "sh", command, None)


def docstring_examples():
    for file in SCRIPTS:
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        yield from indented(str(file.relative_to(ROOT)), docstring)


EXAMPLES = [example for document in DOCUMENTS for example in examples(document)]
COMMANDS = [example for example in [*EXAMPLES, *docstring_examples()] if example.language == "sh"]

LONG = (  # not run by each test: what it is, and that it would start, is checked
    r"\.ci/run", r"pytest\b(?! tests/documents/test_docs).*", r"ruff .*", r"source .*", r"python benchmarks/.*",
    r"pip install .*",
    r"python docs/playground\.py.*", r"python (notebooks/run|extras/(finetune|assemble)|small/small)\.py.*",
    r"python llava\.py .*--explain .*",
    r"python tests/(mutations|fuzz/fuzz|smollm2)\.py.*", r"python tests/parity\.py .+",
    r"python tiny/(train|tokenizer|evaluate|scenes)\.py.*", r"python tests/official\.py .+", r"python tests/line\.py",
)  # fmt: skip


@functools.cache
def run(command):
    """Run a command in the project's folder, with this interpreter as python and no network → stdout."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, input="", capture_output=True, encoding="utf-8", timeout=900
    )
    assert result.returncode == 0, f"$ {command}\nexit status {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout


def check_set_up(command):
    """A command that makes the environment installs from a file that is here."""
    begin = r"python3 -m venv \.venv && \.venv/bin/pip install -r "
    assert re.fullmatch(begin + r"requirements(-dev)?\.txt", command), command
    assert (ROOT / command.split()[-1]).is_file()


def check_startable(command):
    """The files that a command names are there, and its script, if it is one of Python, knows its options."""
    words = shlex.split(command)
    for word in words:
        if re.search(r"\.(py|txt|json)$|^\.ci/", word) and not re.search(r"[{<*]", word):
            assert (ROOT / word).exists(), f"{command}: there is no {word}"
    if words[0] == "python":
        options = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
        help_text = run(f"python {shlex.quote(words[1])} --help") if options else ""
        unknown = options - set(re.findall(r"^ +(?:-\w\b.*?, )?(--[\w-]+)", help_text, flags=re.M))
        assert not unknown, f"{words[1]} has no {', '.join(sorted(unknown))}"


def takes_seconds(command):
    """Whether a test of it does: each script that is asked for its options is started."""
    asked = any(re.fullmatch(pattern, command) for pattern in LONG) and command.startswith("python") and "--" in command
    return asked or command in ("python tests/parity.py", "python docs/architecture.py", "python docs/drawings.py")


@pytest.mark.parametrize("example", [
    pytest.param(example, id=str(example), marks=[pytest.mark.slow] if takes_seconds(example.source) else [])
    for example in COMMANDS
])  # fmt: skip
def test_command(example):
    if example.source.startswith("python3 -m venv"):
        assert example.output is None
        return check_set_up(example.source)
    command = example.source.removeprefix(".venv/bin/")
    words = shlex.split(command)
    if words[:2] == ["python", "llava.py"] and "tiny" not in words:
        try:
            options = cli.parse(words[2:])
        except SystemExit as error:
            raise AssertionError(f"llava.py does not take: {command}") from error
        assert options.model.startswith("llava-hf/") and (options.image or options.chat)
        assert example.output is None, f"{example}: an answer stands there that nobody checks"
    elif any(re.fullmatch(pattern, command) for pattern in LONG):
        check_startable(command)
        assert example.output is None, f"{example}: an output stands there that nobody checks"
    elif command != "pytest tests/documents/test_docs.py":
        output = run(command)
        assert example.output is None or flat(output) == flat(example.output), f"{example} prints\n{output}"


@pytest.mark.parametrize("example", [example for example in EXAMPLES if example.language == "python"], ids=str)
def test_python(example, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(example.source, example.where, "exec"), {})
    assert example.output is None or flat(capsys.readouterr().out) == flat(example.output)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_are_of_a_kind_that_is_checked(document):
    assert set(re.findall(r"^```(\w*)\n.*?^```$", text(document), flags=re.M | re.S)) <= {"sh", "python", "text"}


def test_first_screen():
    """What it is and whose, a picture, short commands that do all of their set-up, an answer, what was not run, what is
    here.
    """
    readme = text("README.md")
    first = readme[: readme.index("\n## ")]
    assert first.count("\n") <= 50
    commands = [example for example in examples("README.md") if example.source in first and "venv" in example.source]
    assert [command.output is not None for command in commands] == [False, True, False, False]
    assert [command.source.split()[-1] for command in commands[::2]] == ["requirements.txt", "requirements-dev.txt"]
    assert commands[1].source == ".venv/bin/python llava.py --model tiny --image tiny/scene.png"
    assert commands[3].source == ".venv/bin/pytest"
    blocks = "".join(re.findall(r"^```\w+\n(.*?)^```$", first, flags=re.M | re.S))
    assert max(map(len, blocks.splitlines())) <= 88  # more are cut off where documents are read
    for needed in ("arxiv.org/abs/2304.08485", "arxiv.org/abs/2310.03744", "github.com/haotian-liu/LLaVA", "Liu",
                   "![", "**We have not run the published weights**", "tests/official.py",
                   "pytorch.org/get-started", r"`.venv\Scripts\python`", "run it in the clone"):  # fmt: skip
        assert needed in flat(first), needed
    assert first.count("\n- **") >= 5 and "\n## How to cite\n" in readme
    assert len(readme.splitlines()) <= 300  # 260 with papers, map, drawing; and the tables of later LLaVAs, of proofs


def test_ci_runs_the_commands_of_the_first_screen():
    script = text(".ci/run")
    assert os.access(ROOT / ".ci/run", os.X_OK) and "pytest -m slow" in script
    (expression,) = re.findall(r"^setup=\$\((.*)\)$", script, flags=re.M)
    found = run(expression).splitlines()
    commands = [example.source for example in examples("README.md") if "venv" in example.source]
    assert found == [*commands[:4]] and len(found) == 4


def test_an_import_from_outside_says_where_the_module_is(tmp_path):
    """Where the clone is called llava, the folder itself is what Python finds."""
    (tmp_path / "llava").symlink_to(ROOT)
    environment = {**os.environ, "PYTHONPATH": ""}


    def python(code):
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    said = python("from llava import load").stderr.splitlines()[-1]
    assert said.startswith(f"ImportError: {tmp_path}/llava is the clone; the module llava is in it.")
    cure = re.search(r"sys\.path\.insert\(.*\)$", said)[0]
    found = python(f"import sys, importlib.util; {cure}; print(importlib.util.find_spec('llava').origin)")
    assert found.stdout == f"{tmp_path}/llava/llava.py\n"


def test_pip_says_that_there_is_nothing_to_install():
    """A backend that is not there is what it stops at: its name is the message."""
    system = tomllib.loads(text("pyproject.toml"))["build-system"]
    assert system == {"requires": [], "build-backend": "nothing_to_install__run_it_in_the_clone__see_README"}


@pytest.mark.slow  # asks each script for its options
def test_inline_commands_name_files_that_exist():
    for document in DOCUMENTS:
        for command in re.findall(r"`((?:python|pytest|ruff) [^`]+)`", text(document)):
            check_startable(command)


def test_the_map():
    """The README's map names the four modules, and nothing that is not there."""
    tree = text("README.md").split("\n## The map\n")[1].split("\n## ")[0]
    names = re.findall(r"^([\w./]+) {2,}\w", tree, flags=re.M)
    assert all((ROOT / name).exists() for name in names)
    assert {file.name for file in ROOT.glob("*.py")} <= set(names) and "extras/" in names


def test_options():
    """The README's section on options names none that llava.py has not, and the defaults that it has."""
    section = flat(text("README.md").split("\n## Options\n")[1].split("\n## ")[0])
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as printed:
        cli.parse(["--help"])
    named = set(re.findall(r"--[a-z-]+", section))
    assert "--help" in named and named <= set(re.findall(r"--[a-z-]+", printed.getvalue()))
    options = cli.parse([])
    for default in (options.prompt, options.model, str(options.max_new_tokens)):
        assert f"by default `{default}`" in section or f"by default {default}" in section


# ----------------------------------------------------------------------------------------------------------------
# Figures

PUBLISHED = {  # the text_config of the three published checkpoints, as far as their config.json gives one
    "llava-hf/llava-1.5-7b-hf": {"model_type": "llama"},
    "llava-hf/llava-1.5-13b-hf": {
        "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40,
    },
    "llava-hf/bakLlava-v1-hf": {
        "model_type": "mistral", "intermediate_size": 14336, "max_position_embeddings": 32768, "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}  # fmt: skip
PUBLISHED_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip


def published(name, folder):
    """One of the published models, without numbers: built on the meta device from its config."""
    text_config = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064, **PUBLISHED[name]}
    config = {
        "model_type": "llava",
        "vision_config": PUBLISHED_VISION,
        "text_config": text_config,
        "pad_token_id": 32001,
    }
    crop = {"height": 336, "width": 336}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 336}, "crop_size": crop}))
    with torch.device("meta"):
        return llava.Llava(weights.read_config(folder, llava.LlavaConfig, llama.TextConfig, vision.VisionConfig))


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def memory(model, tokens):
    """The bytes of a model's weights, and of its cache for so many tokens, in 16 bits."""
    with torch.device("meta"):
        cache = model.to(torch.float16).init_kv_cache(1, tokens)
    return size(model) * 2, sum(tensor.nbytes for key, tensor in cache.items() if key.startswith(("keys.", "values.")))


def memory_row(name, folder):
    """A row of the README's table."""
    weights, cache = memory(published(name, folder), 4096)
    weights, cache = weights / 1e9, cache / 1e9
    int8, int4 = (quantized(published(name, folder), scheme) / 1e9 for scheme in ("int8", "int4"))
    sizes = f"{weights * 2:.1f} | {weights:.1f} | {int8:.1f} | {int4:.1f}"
    return f"| [{name}] | {weights / 2:.2f} billion | {sizes} | {cache / 4096:.5f} | {cache:.2f} |"


TOKENS = {  # name in published.FAMILY → the special tokens by which its prompt is known, where there are any
    **dict.fromkeys(("interleave-0.5b", "interleave-7b", "onevision-0.5b", "onevision-7b"), line_of_llavas.CHATML),
    **dict.fromkeys(("llama-3-8b", "llama3-next-8b", "joycaption"), line_of_llavas.LLAMA_3),
    "phi-3-mini": line_of_llavas.PHI_3,
}


def config_of_line(name):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(line_facts.FAMILY[name]))
        return weights.read_config(Path(folder), llava.LlavaConfig, llama.TextConfig, vision.VisionConfig, checks.clean)


@functools.cache
def line_row(name):
    """A row of the README's table of the LLaVAs after 1.5."""
    read = config_of_line(name)

    def model():
        with torch.device("meta"):
            return llava.Llava(read)

    whole, cache = memory(model(), 1)
    sizes = " | ".join(f"{x / 1e9:.1f}" for x in (whole, quantized(model(), "int8"), quantized(model(), "int4")))
    token = "<|reserved_special_token_69|>" if name == "joycaption" else "<image>"
    names = [other for other in TOKENS.get(name, []) if other != token]
    spelling = {-i - 1: other for i, other in enumerate(names)} | {read.image_token_index: token}
    form = forms.choose(read, SimpleNamespace(spelling=spelling))
    (before, behind), (left, right) = form.user, form.picture
    prompt = f"{before}{left}{token}{right}…{behind}".replace("\n", "\\n").replace("|", "\\|")
    plan = anyres.plan(read)
    positions = f"{model().feature_counts(range(1))[0]}" if plan is None else f"{anyres.count(480, 640, plan):,}"
    opening = "a system sentence, " if form.opening else ""
    hub = line_facts.HUB[name]
    link = f"[{hub}](https://huggingface.co/{hub})"
    return f"| {link} | {sizes} | {cache / 1e9:.5f} | {positions} | {opening}`{prompt}` |"


def quantized(model, scheme):
    """The bytes of a model whose language model is quantised, the rest in 16 bits."""
    quantize.quantize_layers(model.llama, scheme, torch.float16)
    return size(model) * 2 + sum(buffer.nbytes for buffer in model.buffers())


def pins():
    """{package: version} of all files of requirements."""
    lines = "".join((ROOT / f"requirements{end}.txt").read_text() for end in ("", "-notebooks", "-dev")).split()
    return dict(line.split("==") for line in lines if "==" in line)


def installed():
    """What the packages of requirements.txt and theirs take on the disk, in GB; None where PyTorch is another one."""
    from importlib.metadata import PackageNotFoundError, distribution

    from packaging.requirements import Requirement

    sizes, wanted = {}, [line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().split()]
    while wanted:
        name = wanted.pop().lower()
        with contextlib.suppress(PackageNotFoundError):
            if name not in sizes:
                found = distribution(name)
                sizes[name] = sum(file.size or 0 for file in found.files or [])
                needs = [Requirement(line) for line in found.requires or []]
                wanted += [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return sum(sizes.values()) / 1e9 if torch.version.cuda is None and sys.platform == "linux" else None


def figures(folder):
    """document → the sentences, or parts of them, in which its figures stand, from what they really are."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    seven = published("llava-hf/llava-1.5-7b-hf", folder)
    short, full = (sum(memory(seven, tokens)) / 1e9 for tokens in (700, 4096))
    assert short < 15 and 16 < full < 22, "the README's advice about GPUs no longer holds"
    about = int(re.search(r"about ([\d,]+) lines", flat(text("README.md")))[1].replace(",", ""))
    lines = sum(len((ROOT / f"{name}.py").read_text().splitlines()) for name in ("vision", "llama", "llava", "weights"))
    assert f"{size(seven) * 2 / 1e9:.1f} GB to download" in flat(cli.make_parser().format_help())
    tiny = llava.load("tiny", device="cpu", dtype=torch.float32)[0]
    next_plan, one_plan = (anyres.plan(config_of_line(name)) for name in ("v1.6-vicuna-7b", "onevision-7b"))
    return {
        "README.md": [
            f"about {about if abs(about - lines) < lines / 20 else round(lines, -2):,} lines",
            f"Python {project['requires-python'].removeprefix('>=')} or newer",
            f"installed so, everything takes about {installed() or 0.9:.1f} GB",
            "in under 5 minutes",
            f"A LLaVA of {size(tiny) / 1e6:.1f} million parameters",
            *(memory_row(name, folder) for name in PUBLISHED),
            *(flat(without_code(line_row(name))) for name in line_facts.FAMILY),
            "of 480 x 640 pixels",
            f"a square one of 672 or more {anyres.count(672, 672, next_plan):,}",
            f"one of 1154 x 951 {anyres.count(1154, 951, one_plan):,}",
            f"each takes {anyres.count(480, 640, one_plan, alone=False)}",
            "of 10⁹ bytes",
            "cache for 4,096 tokens",
            f"A picture is {seven.vision.grid**2} tokens",
            f"transformers {pins()['transformers']}",
            f"by default {cli.parse([]).max_new_tokens}",
            f"the 7B, which is meant where no is named, {size(seven) * 2 / 1e9:.1f} GB",
            f"the first one here is {line_facts.COUNTED['interleave-0.5b'][1] * 2 / 1e9:.1f} GB",
            f"the 7B takes {short:.1f} GB with a picture and a short answer, and {full:.1f} GB with 4,096 tokens",
            "a GPU with 24 GB has room to spare, one with 16 GB has little",
        ],
        "CONTRIBUTING.md": [
            f"at most {tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['ruff']['line-length']} characters",
        ],
    }


def test_the_notebooks_are_counted():
    words = ["five", "six", "seven", "eight", "nine", "ten"]
    number = words[len([*(ROOT / "notebooks").glob("*.ipynb")]) - 5]
    said = re.findall(r"\b(\w+) (?:notebooks\b|lessons that)", text("README.md").lower())
    assert [word for word in said if word in words] == [number] * 3


@pytest.mark.parametrize("name", line_facts.FAMILY)
def test_a_row_of_the_line_is_what_its_config_gives(name):
    """Its memory, the positions of a picture, and its prompt."""
    assert line_row(name) in text("README.md"), line_row(name)


TIMES = r"\b[\d.]+ (s|seconds?|minutes?|hours?|ms|tokens/s)\b"
NOT_OURS = [  # numbers that are names, and facts about others; each is a pattern
    r"LLaVA-1\.[56]", r"Qwen2\b", r"SmolLM2(-135M-Instruct)?",
    r"[Ll]lava-1\.5-\d+b-hf", r"bakLlava-v1-hf", r"\b(7|13)B\b",
    r"Llama 2\b", r"Mistral 7B",
    r"U\+[0-9A-F]+",
    r"(b?float|int)(4|8|16|32|64)\b", r"\b(16|32)[ -]bits?\b",
    r"temperature 0\.2",  # the default of the authors' command line
    r"et al\. \d{4}", r"section \d(\.\d)?\b", r"16x16 Words",  # papers
]  # fmt: skip


def prose(document):
    """A document without code: blocks, indented ones, code within a line, addresses of links."""
    words = re.sub(r"^```.*?^```$", "", text(document), flags=re.M | re.S)
    return without_code(re.sub(r"^    .*$", "", words, flags=re.M))


def without_code(words):
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`\n]+`", "", words))


def flat(words):
    return re.sub(r"\s+", " ", words)


def unknown_numbers(words, known):
    """The numbers in a text that are not in one of the known sentences, not a time and not the business of others."""
    for sentence in sorted(known, key=len, reverse=True):
        words = words.replace(sentence, "·")
    words = re.sub("|".join([TIMES, *NOT_OURS]), "·", words)
    words = re.sub(r"(^| )\d\. ", " ", words)  # the numbers of a list
    return re.findall(r".{0,40}\d.{0,20}", words)


def stated_bound():
    """The bound that the README gives is the one that the comparison uses."""
    found = re.search(r"difference allowed is (\S+) of the largest number", flat(text("README.md")))
    assert found and f"{found[1]} in float64" in text("tests/parity.py"), (
        "the bound of the README is not that of tests/parity.py"
    )
    return found[0]


def test_figures(tmp_path):
    known = figures(tmp_path)
    known["README.md"].append(stated_bound())
    for document in ("README.md", "CONTRIBUTING.md"):
        words = flat(prose(document))
        missing = [sentence for sentence in known[document] if sentence not in words]
        assert not missing, f"{document} should say: {missing}"
        assert not unknown_numbers(words, known[document]), f"{document}: figures that nothing recomputes"


def test_sizes_of_tiny():
    """The sizes that tiny/README.md states, wherever it states one.
    Its table of answers is the business of another test.
    """
    tiny, words = llava.load("tiny", device="cpu", dtype=torch.float32)[0], flat(text("tiny/README.md"))
    parts = [size(part) for part in (tiny, tiny.vision, tiny.projector, tiny.llama)]
    stated = set(re.findall(r"([\d.,]+(?: million)?) parameters", words))
    assert stated & {f"{parts[0]:,}", f"{parts[0] / 1e6:.1f} million"}, f"tiny has {parts[0]:,} parameters"
    assert stated <= {f"{n:,}" for n in parts} | {f"{n / 1e6:.1f} million" for n in parts}
    edge, bytes_ = tiny.config.vision_config.image_size, (ROOT / "tiny/model.safetensors").stat().st_size
    assert set(re.findall(r"(\d+ [x×] \d+) pixels", words)) <= {f"{n} {x} {n}" for n in (edge, 224) for x in "x×"}
    assert set(re.findall(r"(\d+) patches", words)) <= {str(tiny.vision.grid**2)}
    assert set(re.findall(r"([\d.]+) MB", words)) <= {f"{bytes_ / 1e6:.1f}"}


@pytest.mark.slow
def test_table_of_tiny():
    """The tables of answers in tiny/README.md are what its command prints now."""
    command = "python tiny/evaluate.py"
    assert f"    {command}\n" in text("tiny/README.md")
    tables = run(command).strip().split("\n\n")
    assert len(tables) == 3 and all(f"\n{table}\n" in text("tiny/README.md") for table in tables), "\n\n".join(tables)


def test_a_false_figure_is_found():
    """A number that nobody recomputes does not pass, nor does one digit that is off."""
    assert unknown_numbers("It has 12 layers.", []) == ["It has 12 layers."]
    assert unknown_numbers("A picture is 577 tokens", ["A picture is 576 tokens"])
    assert not unknown_numbers("LLaVA-1.5 took 3 minutes; a picture is 576 tokens", ["a picture is 576 tokens"])


def test_pins_and_ranges():
    """What is pinned is what runs here, within the ranges of pyproject.toml,
    and nothing is pinned that is not in them.
    """
    from importlib.metadata import version

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {Requirement(line).name: Requirement(line).specifier for line in project["dependencies"]}
    runtime = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
    assert set(runtime) == set(ranges)
    for name, pin in pins().items():
        assert version(name).split("+")[0] == pin, f"{name} {version(name)} runs here, {pin} is pinned"
        assert name not in ranges or ranges[name].contains(pin)


# ----------------------------------------------------------------------------------------------------------------
# Links, docstrings, and what does not belong here


def anchors(document):
    """The addresses of a document's headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ (.*)$", text(document), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", text(document)):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / document).parent / file if file else ROOT / document
        assert target.exists(), f"{document}: {link} is not there"
        assert not anchor or anchor in anchors(str(target.resolve().relative_to(ROOT))), (
            f"{document}: no heading {link}"
        )


@pytest.mark.parametrize(
    "file", [file for file in SCRIPTS if file.parent in (ROOT, ROOT / "tiny")], ids=lambda file: file.name
)
def test_docstring_examples(file, monkeypatch):
    """`>>>` examples, and indented statements in a module's docstring, run in the module's own namespace."""
    monkeypatch.syspath_prepend(str(file.parent))
    source = file.read_text(encoding="utf-8")
    statements = []
    for paragraph in re.findall(r"(?:^    .*\n?)+", ast.get_docstring(ast.parse(source)) or "", flags=re.M):
        code = re.sub(r"^    ", "", paragraph, flags=re.M)
        try:
            ast.parse(code)
        except SyntaxError:
            continue
        statements.append(code)
    if statements or ">>>" in source:
        module = importlib.import_module(file.stem)
        for code in statements:
            exec(compile(code, f"docstring of {file.name}", "exec"), dict(vars(module)))
        assert doctest.testmod(module).failed == 0


FORBIDDEN = [  # paths of one machine, workplaces, registries, places to be filled
    r"/wor[k]/", r"/roo[t]/", r"/hom[e]/", r"/Use[r]s/", r"/op[t]/", r"/tm[p]/", r"share[d][\"/]", r"issue[s] show",
    r"pyp[i]\.org", r"pythonhoste[d]", r"download\.pytorc[h]", r"index-ur[l]", r"find-link[s]",
    r"FILL-I[N]", r"\bTOD[O]\b", r"FIXM[E]",
    r"^(TABL[E]|TIM[E]|ANSWE[R])$",
]  # fmt: skip


def committed():
    """The files of the project, without what is made by running it."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name == ".ci" or not name.startswith((".", "__"))]
        binary = (".safetensors", ".png", ".jpg", ".pt", ".new")
        kept = [name for name in files if not name.endswith(binary) and name != ".git"]  # a file in a second work tree
        yield from (Path(folder) / name for name in kept)


def test_speaks_of_the_project_alone():
    found = []
    for file in committed():
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            for match in filter(None, (re.search(pattern, line) for pattern in FORBIDDEN)):
                found.append(f"{file.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found, "\n".join(found)


def test_nothing_is_missing():
    """tiny and its documents are part of the project; without them half of this file would have nothing to look at."""
    for name in (*PAGES, "LICENSE", "tiny/scene.png", "tiny/model.safetensors"):
        assert (ROOT / name).is_file(), f"{name} is missing"


def test_the_lower_bounds_are_those_that_are_run():
    """But for torch, whose lower bound is not installed."""
    from packaging.requirements import Requirement

    bounds = {}
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        package = Requirement(line)
        (bounds[package.name],) = [(bound.operator, bound.version) for bound in package.specifier]
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements-lowest.txt").read_text().splitlines()]
    lowest = {name: (">=", version) for name, version in (line.split("==") for line in lines if line)}
    assert {name: lowest[name] for name in bounds if name != "torch"} == {
        name: bound for name, bound in bounds.items() if name != "torch"
    }
    pinned = pins()
    for name in ("torch", "transformers", "pytest", "hypothesis"):
        assert lowest[name] == (">=", pinned[name])
    assert "requirements-lowest.txt" in (ROOT / ".ci" / "run").read_text()
