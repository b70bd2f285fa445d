"""The shape comments at the ends of lines are true: each of them is executed.

    x = self.norm(x)  # (B, T, D)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, H, T, E), (B, K, T, E)
    cls = self.class_embedding.expand(len(patches), 1, -1)  # (N, 1, D), the same for each picture

A shape comment begins with a parenthesis and stands beside an assignment or a return. One shape for each target, or one
for all of them; words may follow. A dimension is an expression of +, -, *, // and /, over whole numbers, the letters of
the key in the file's docstring, and longer names, which must be integers in the function at that moment.

What a letter is worth is known apart from the tensor that the comment is about: from the config (LETTERS), from the
arguments of the function (ARGUMENTS), from a line such as `B, T, _ = x.shape`, or else from the caller in the same
file.
"""

import ast
import dataclasses
import functools
import inspect
import io
import itertools
import re
import sys
import tokenize
from fractions import Fraction

import pytest
import torch
from PIL import Image

import llama
import llava
import vision
from extras import attention, beams, lens

MODULES = {module.__name__.rpartition(".")[2]: module for module in (vision, llama, llava, beams, lens, attention)}
SOURCES = {name: inspect.getsource(module) for name, module in MODULES.items()}

# A small LLaVA in which no two sizes are alike, so that no letter can stand for another.
TOWER = vision.VisionConfig(
    hidden_size=30, intermediate_size=38, num_hidden_layers=3, num_attention_heads=6, image_size=28, patch_size=7
)
TEXT = llama.TextConfig(
    vocab_size=89, hidden_size=58, intermediate_size=62, num_hidden_layers=2, num_attention_heads=20,
    num_key_value_heads=5,
    head_dim=14, sliding_window=40,
)  # fmt: skip
LAYERS = [-2, -1, 1, 0]  # of the tower, side by side
IMAGE, PAD, EOS = 88, 87, [2, 3]
PATCHES = (TOWER.image_size // TOWER.patch_size) ** 2

LETTERS = {  # what the config decides
    "vision": dict(P=PATCHES, S=PATCHES + 1, C=TOWER.hidden_size, A=6, E=5, F=TOWER.intermediate_size),
    "llama": dict(D=TEXT.hidden_size, A=20, K=5, E=TEXT.head_dim, F=TEXT.intermediate_size, V=TEXT.vocab_size),
    "beams": dict(V=TEXT.vocab_size),
    "lens": dict(P=PATCHES),
    "attention": dict(A=20, K=5, E=TEXT.head_dim),
    "llava": dict(P=PATCHES, D=TEXT.hidden_size, V=TEXT.vocab_size, L=len(LAYERS), C=TOWER.hidden_size),
}


def rows_and_positions(ids, pictures=None):
    """B and T of ids (B, T), after each image token has grown into PATCHES of them if `pictures` are given."""
    grows = pictures is not None and int((ids == IMAGE).sum()) == len(pictures)
    longest = max(len(row) + int((row == IMAGE).sum()) * (PATCHES - 1) * grows for row in ids)
    return dict(B=len(ids), T=longest)


def decoder(x, kv_cache):
    return dict(B=x.shape[0], T=x.shape[1], S=x.shape[1] + (int(kv_cache["length"]) if kv_cache else 0))


ARGUMENTS = {  # what the arguments of a function decide
    "vision.preprocess": lambda v: dict(H=v["config"].crop_size["height"], W=v["config"].crop_size["width"]),
    "vision.VisionTower.forward": lambda v: dict(N=len(v["pixel_values"])),
    "llama.Llama.forward": lambda v: decoder(v["x"], v["kv_cache"]),
    "llama.real_tokens": lambda v: decoder(torch.empty(*v["shape"]), v["kv_cache"]),
    "llama.filtered": lambda v: dict(B=len(v["logits"])),
    "beams.search": lambda v: dict(B=len(v["input_ids"]), n=v["num_beams"]),
    "beams.beam_step": lambda v: dict(
        B=v["beams"]["ids"].shape[0],
        n=v["beams"]["ids"].shape[1],
        k=v["beams"]["ids"].shape[1] * max(2, 1 + len(v["eos_token_ids"])),
    ),
    "llava.Llava.get_image_features": lambda v: dict(N=len(v["pixel_values"])),
    "llava.Llava.merge": lambda v: rows_and_positions(v["input_ids"]),
    "llava.Llava.expand": lambda v: rows_and_positions(v["input_ids"]),
    "llava.Llava.forward": lambda v: (
        rows_and_positions(v["input_ids"], v["pixel_values"]) if v["input_ids"] is not None else {}
    ),
    "llava.Llava.prefill": lambda v: rows_and_positions(v["input_ids"], v["pixel_values"]),
    "llava.Llava.stream": lambda v: dict(B=len(v["input_ids"])),
    "attention.attend_one_query": lambda v: dict(S=v["k"].shape[2]),
}


# ----------------------------------------------------------------------------------------------------------------
# What is run


def scenario():
    """Everything that carries a shape comment, with as many different sizes as there are letters."""
    torch.manual_seed(1)
    ids = dict(image_token_index=IMAGE, pad_token_id=PAD, eos_token_id=EOS)
    model = llava.Llava(llava.LlavaConfig(TOWER, TEXT, vision_feature_layer=LAYERS, **ids)).eval()
    words = torch.randint(4, PAD, (3, 9))
    prompts = words.clone()
    prompts[0, 2] = prompts[1, 3] = prompts[1, 6] = prompts[2, 8] = IMAGE  # three rows with one, two and one pictures
    pixels = torch.randn(4, 3, TOWER.image_size, TOWER.image_size)
    mask = torch.ones_like(prompts)
    mask[0, :2] = 0

    tall = dataclasses.replace(
        vision.PreprocessConfig(), size={"shortest_edge": 50}, crop_size={"height": 40, "width": 26}
    )
    vision.preprocess(Image.new("RGB", (60, 90)), tall)
    vision.preprocess(Image.new("RGBA", (70, 50)), tall, pad=True)
    lens.patch_boxes(60, 90, TOWER.image_size // TOWER.patch_size, tall)

    model(prompts, pixels, mask, labels=prompts, output_attentions=True, output_hidden_states=True)
    model(prompts, pixels, torch.tensor([[1] * 8 + [0], [1] * 9, [1] * 9]))  # padded on the right
    model(inputs_embeds=torch.randn(5, 11, TEXT.hidden_size), labels=torch.randint(0, 80, (5, 11)))
    cache = model.init_kv_cache(3, 100)
    model(prompts, pixels, mask, kv_cache=cache)
    model(words[:, :7], kv_cache=cache, output_attentions=True)  # a chunk with a past
    model(words[:, :1], kv_cache=cache)  # a single step
    model.generate(prompts, pixels, mask, max_new_tokens=4)
    model.generate(words, max_new_tokens=5, temperature=1.0, top_k=50, top_p=0.8, seed=0)
    model.generate(prompts, pixels, mask, max_new_tokens=8, num_beams=4)
    model.score([[5, 6, 2], [7, 2]], prompts[:1], pixels[:1], mask[:1])
    k, v = torch.randn(2, 3, 5, 11, TEXT.head_dim)
    attention.attend_one_query(torch.randn(3, 20, 1, TEXT.head_dim), k, v, torch.ones(3, 1, 1, 11, dtype=torch.bool))


# ----------------------------------------------------------------------------------------------------------------
# Reading the comments


@dataclasses.dataclass(frozen=True)
class Place:
    """A statement that carries a shape comment."""

    file: str
    line: int  # of the comment
    lines: range  # of the statement
    function: str  # qualified
    targets: tuple  # the source of each target, empty for a return

    def __str__(self):
        return f"{self.file}.py:{self.line}"


def functions(tree, prefix=""):
    """Every function of a syntax tree with its qualified name."""
    for node in ast.iter_child_nodes(tree):
        name = f"{prefix}.{node.name}" if hasattr(node, "name") else prefix
        if isinstance(node, ast.FunctionDef):
            yield name, node
        yield from functions(node, name)


def statements(function):
    """The statements of a function, not those of functions within it."""
    for node in ast.iter_child_nodes(function):
        if isinstance(node, ast.stmt) and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.expr)):
            yield from statements(node)


def comments(source):
    """{line: text} of the comments at line ends that begin with a parenthesis."""
    lines = source.splitlines()
    return {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
        and re.match(r"#\s*\(", token.string)
        and lines[token.start[0] - 1][: token.start[1]].strip()
    }


@functools.cache
def places(file, source):
    """{line of a shape comment: Place, or None if no assignment or return stands there}."""
    found = dict.fromkeys(comments(source))
    for name, function in functions(ast.parse(source), file):
        for node in statements(function):
            if isinstance(node, ast.Return):
                targets = ()
            elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
                target = node.targets[-1] if isinstance(node, ast.Assign) else node.target
                targets = tuple(
                    ast.unparse(part) for part in (target.elts if isinstance(target, ast.Tuple) else [target])
                )
            else:
                continue
            lines = range(node.lineno, node.end_lineno + 1)
            for line in set(lines) & set(found):
                found[line] = Place(file, line, lines, name, targets)
    return found


@functools.cache
def key(source):
    """The letters of the key in a file's docstring."""
    rows = re.findall(
        r"^    ([A-Za-z](?:, [A-Za-z])*)  +\S", ast.get_docstring(ast.parse(source), clean=False), flags=re.M
    )
    return {letter for row in rows for letter in row.split(", ")}


def spans(text):
    """Where the shapes of a comment stand: (start, end) of the inside of each parenthesis;
    what follows in words is left out.
    """
    start = 0
    while text.startswith("(", start):
        depths = itertools.accumulate({"(": 1, ")": -1}.get(character, 0) for character in text[start:])
        closed = [i for i, depth in enumerate(depths, start) if depth == 0]
        if not closed:
            raise ValueError("its parenthesis is not closed")
        end = closed[0]
        if text[end + 1 : end + 2] not in ("", ",", " "):
            raise ValueError(f"{text[end + 1 :]!r} follows the shape without a comma or a space")
        yield start + 1, end
        another = re.match(r"\),\s*(?=\()", text[end:])
        start = end + another.end() if another else len(text)


def shapes(text):
    """A comment → a list of shapes, each a list of dimensions as source text."""
    return [[part.strip() for part in text[start:end].split(",") if part.strip()] for start, end in spans(text)]


OPERATORS = {
    ast.Add: Fraction.__add__, ast.Sub: Fraction.__sub__, ast.Mult: Fraction.__mul__, ast.Div: Fraction.__truediv__,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
}  # fmt: skip


def evaluate(dimension, letters, key, values):
    """One dimension → its size. Raises ValueError that tells the author of the comment what is wrong with it."""
    try:
        tree = ast.parse(dimension, mode="eval").body
    except SyntaxError:
        raise ValueError(f"{dimension!r} is not an expression over letters and numbers") from None

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Name) and len(node.id) == 1:
            if node.id not in key:
                raise ValueError(f"the letter {node.id} is not in the key of the file's docstring")
            if node.id not in letters:
                raise ValueError(f"nothing says how large {node.id} is here: add it to ARGUMENTS in {__name__}.py")
            return Fraction(letters[node.id])
        if isinstance(node, ast.Name):
            if type(values.get(node.id)) is not int:
                raise ValueError(f"{node.id} is not an integer of this function; a letter of the key would do")
            return Fraction(values[node.id])
        raise ValueError(f"{dimension!r} is not an expression over letters and numbers")

    return value(tree)


# ----------------------------------------------------------------------------------------------------------------
# Running and recording


@dataclasses.dataclass
class Record:
    """One execution of a commented line: the letters' sizes, the function's integers, and the shapes that came out."""

    letters: dict
    values: dict
    shapes: list
    conflicts: list  # letters whose local variable differs from what they are worth


def shape_of(value):
    """The shape of a tensor or array, a list of them for a tuple; None for anything else."""
    return tuple(value.shape) if hasattr(value, "shape") else None


class Recorder:
    """Runs something under sys.settrace → {Place: [Record, …]}."""

    def __init__(self, sources):
        self.names, self.places = {}, {}
        for file, source in sources.items():
            for name, node in functions(ast.parse(source), file):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                self.names[MODULES[file].__file__, node.name, first] = name
            for place in filter(None, places(file, source).values()):
                self.places.setdefault(place.function, []).append(place)
        self.arguments = {}  # frame → letters from ARGUMENTS
        self.pending = {}  # frame → the place that is being executed
        self.records = {place: [] for found in self.places.values() for place in found}

    def run(self, function):
        before = sys.gettrace()
        sys.settrace(self.call)
        try:
            function()
        finally:
            sys.settrace(before)
        return self.records

    def name(self, frame):
        return self.names.get((frame.f_code.co_filename, frame.f_code.co_name, frame.f_code.co_firstlineno))

    def call(self, frame, event, argument):
        name = self.name(frame)
        if name is None:
            return None
        if name in ARGUMENTS and frame not in self.arguments:
            self.arguments[frame] = ARGUMENTS[name](frame.f_locals)
        return self.line if name in self.places else None

    def line(self, frame, event, argument):
        place = self.pending.get(frame)
        if event == "exception" and argument[0] is not StopIteration:
            self.pending.pop(frame, None)
        elif place is not None and (event == "return" or frame.f_lineno not in place.lines):
            del self.pending[frame]
            self.record(place, frame, argument)
        if event == "line":
            for place in self.places[self.name(frame)]:
                if frame.f_lineno in place.lines:
                    self.pending[frame] = place
        return self.line

    def record(self, place, frame, returned):
        if place.targets:
            values = [eval(target, frame.f_globals, frame.f_locals) for target in place.targets]
        else:
            values = list(returned) if isinstance(returned, tuple) else [returned]
        integers = {name: value for name, value in frame.f_locals.items() if type(value) is int}
        known = self.letters(frame, place.file)
        conflicts = [name for name in integers if len(name) == 1 and known.get(name, integers[name]) != integers[name]]
        self.records[place].append(Record(integers | known, integers, [shape_of(value) for value in values], conflicts))

    def letters(self, frame, file):
        """What each letter is worth: by this frame,
        or the nearest caller in the same file that knows it, or the config.
        """
        found = {}
        while frame is not None:
            if frame.f_code.co_filename == MODULES[file].__file__:
                local = {name: value for name, value in frame.f_locals.items() if len(name) == 1 and type(value) is int}
                found = local | self.arguments.get(frame, {}) | found
            frame = frame.f_back
        return found | LETTERS[file]


@pytest.fixture(scope="module")
def records():
    return Recorder(SOURCES).run(scenario)


def problem(text, place, record, key):
    """What one execution says against a comment, None if nothing."""
    try:
        claimed = [
            tuple(evaluate(part, record.letters, key, record.values) for part in shape) for shape in shapes(text)
        ]
    except ValueError as error:
        return str(error)
    if record.conflicts:
        return f"the variable {record.conflicts[0]} is another size than the letter {record.conflicts[0]}"
    if len(claimed) == 1:
        claimed = claimed * len(record.shapes)
    if len(claimed) != len(record.shapes):
        return f"{len(claimed)} shapes stand beside {len(record.shapes)} values"
    for shape, real in zip(claimed, record.shapes, strict=True):
        if shape != real:
            return f"it comes to ({', '.join(map(str, shape))}), the shape was {real}"
    return None


def problems(sources, records):
    """Every shape comment that is not true, as "file.py:line  comment: why"."""
    found = []
    for file, source in sources.items():
        where, letters = places(file, source), key(source)
        for line, text in comments(source).items():
            if where[line] is None:
                why = "no assignment or return stands beside it"
            elif not records[where[line]]:
                why = "the line was never executed: let scenario() come by"
            else:
                why = next(
                    filter(None, (problem(text, where[line], record, letters) for record in records[where[line]])), None
                )
            if why:
                found.append(f"{file}.py:{line}  # {text}: {why}")
    return found


# ----------------------------------------------------------------------------------------------------------------
# The tests


def test_shape_comments_are_true(records):
    assert not problems(SOURCES, records), "\n".join(["shape comments that are not true:", *problems(SOURCES, records)])
    assert all(comments(source) for file, source in SOURCES.items())


def test_letters_in_docstrings_are_in_the_key():
    """(B, T, D) in words too: each capital letter of such a tuple in a docstring stands in the file's key."""
    for file, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                for shape in re.findall(r"\(((?:[\w+*/ -]+,)+[\w+*/ -]*)\)", ast.get_docstring(node) or ""):
                    letters = set(re.findall(r"\b[A-Z]\b", shape))
                    assert letters <= key(source), (
                        f"{file}.py, {getattr(node, 'name', 'module')}: ({shape}) is not in the key"
                    )


def lies(source):
    """(line, comment) with one letter or number of one shape replaced by another letter, once for each such lie."""
    for line, text in comments(source).items():
        *_, (_, end) = spans(text)
        for match in re.finditer(r"\b[A-Za-z]\b|\b\d\b", text[:end]):
            for letter in sorted(key(source) - {match[0]}):
                yield line, text[: match.start()] + letter + text[match.end() :]


@pytest.mark.parametrize("file", MODULES)
def test_every_lie_is_caught(records, file):
    """No letter of any shape comment could be another one: the proof that the first test sees what it should."""
    letters, where = key(SOURCES[file]), places(file, SOURCES[file])
    for line, lie in lies(SOURCES[file]):
        assert any(problem(lie, where[line], record, letters) for record in records[where[line]]), (
            f"{file}.py:{line}  # {lie}"
        )


def test_a_seeded_lie_is_named(records):
    """The whole way, on altered sources: a false letter, an unknown one, words, a line that carries no value."""
    code = SOURCES["llama"].splitlines()
    line, true = next(
        (n, c) for n, c in comments(SOURCES["llama"]).items() if c == "(B, T, D)" and " = " in code[n - 1]
    )
    for lie, why in {
        "(B, S, D)": "the shape was",
        "(B, D)": "the shape was",
        "(B, T, Q)": "the letter Q is not in the key",
        "(B, T, width of it)": "is not an expression",
        "(B, T, width)": "is not an integer of this function",
        "(B, T, D": "is not closed",
        "(B, T, D), (B, T, D)": "2 shapes stand beside 1 values",
    }.items():
        lines = SOURCES["llama"].splitlines(keepends=True)
        lines[line - 1] = lines[line - 1].replace(true, lie)
        found = problems({"llama": "".join(lines)}, records)
        assert any(p.startswith(f"llama.py:{line}  ") and why in p for p in found), (lie, found)
    lines = SOURCES["llama"].splitlines(keepends=True)
    lines[line - 1] = re.sub(r"\w+ = ", "", lines[line - 1], count=1)
    assert any("no assignment or return" in p for p in problems({"llama": "".join(lines)}, {**records, None: []}))
    nowhere = {place: [] for place in records}
    assert all("never executed" in p for p in problems({"llama": SOURCES["llama"]}, nowhere))
