"""Tokens that were added to a vocabulary: those that stand beside a tokenizer.json, and secret spellings of them all.

tokenizer_config.json lists them as added_tokens_decoder, maybe with other flags. Where it does not, added_tokens.json
has names and ids, and special_tokens_map.json more names. What tokenizer_config.json calls bos_token, image_token and
the like is one, too. (PreTrainedTokenizerBase._from_pretrained and TokenizersBackend.__init__.)
"""

import secrets

import tokenizers
from tokenizers import AddedToken

CONFIG, MAP, IDS = FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
NAMES = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]  # the reference's order
LETTERS = (
    "abcdefghijklmnop", "ABCDEFGHIJKLMNOP", "0123456789", "αβγδεζηθικλμνξοπ", "一二三四五六七八九十", "!#%&*+-=?@",
)  # fmt: skip


def beside(folder, known, read_json):
    """What is to be added to a tokenizer, in this order → a list of AddedToken. The library gives those whose name is
    new the ids behind the vocabulary, and the others their new flags.

    known: what tokenizer.json has, {id: AddedToken}. read_json: a path → the JSON object there. Raises ValueError or
    OSError that names the file.
    """
    config, names, ids = (read_json(folder / name) if (folder / name).exists() else {} for name in FILES)
    decoder = config.get("added_tokens_decoder")
    named, more = special(config, folder / CONFIG)
    if decoder is None:
        of_map = special({name: names[name] for name in names if name != "additional_special_tokens"}, folder / MAP)
        named, more = named | of_map[0], more + of_map[1]
        marked = {token.content for token in (*(named[name] for name in NAMES if name in named), *more)}
        rows = {i: {"content": x, "special": x in marked, "normalized": x not in marked} for x, i in ids.items()}
        tokens = read(rows, folder / IDS) | known
    else:
        tokens = read(decoder, f"{folder / CONFIG}: added_tokens_decoder")
    named = [named[name] for name in sorted(named, key=lambda name: NAMES.index(name) if name in NAMES else 99)]
    tokens = [tokens[i] for i in sorted(tokens)]
    there = {token.content for token in (*known.values(), *tokens)}
    tokens += [token for token in (*named, *more) if token.content not in there]
    for token in tokens:
        token.special = token.special or any(token.content == each.content for each in named)
    return tokens


def special(config, where):
    """The tokens that a config calls by a name, and those in its list of more → {name: AddedToken}, [AddedToken]."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(more, dict):
        named, more = named | more, []
    if not isinstance(more, list):
        raise ValueError(f"{where}: extra_special_tokens is {more!r:.100}, and must be a list or an object")
    named = {name: token(x, where, special=True) for name, x in named.items() if isinstance(x, (str, dict))}
    return named, [token(x, where, special=True) for x in more]


def read(rows, where):
    """{id: token}, as a file has them → {id: AddedToken}."""
    if not isinstance(rows, dict) or not all(str(i).isdecimal() for i in rows):
        raise ValueError(f"{where} is {rows!r:.100}, and must be an object of ids and tokens")
    return {int(i): token(row, where) for i, row in rows.items()}


def token(value, where, **flags):
    """A token as a file has it, its name or an object → AddedToken."""
    values = {"content": value} if isinstance(value, str) else value
    try:
        flags |= {name: values[name] for name in FLAGS if name in values}
        return AddedToken(values["content"], **flags)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{where}: {value!r:.100} is no token, with a content and flags") from None


def twin(bpe):
    """A tokenizer of the same model and rules, whose added tokens have secret spellings → it, {id: spelling}.

    They are spelled in the first letters of LETTERS that the normalizer leaves apart.
    """
    names = {i: token.content for i, token in bpe.get_added_tokens_decoder().items()}
    for letters in LETTERS:
        other = tokenizers.Tokenizer(bpe.model)  # one model for both
        other.normalizer, other.pre_tokenizer = bpe.normalizer, bpe.pre_tokenizer
        added, key = bpe.get_added_tokens_decoder(), "".join(secrets.choice(letters) for _ in range(20))
        numbers = {i: "".join(letters[i // 10**place % 10] for place in range(10)) for i in added}
        secret = {i: f"{x[0]}{key}{numbers[i]}{x[-1]}" for i, x in names.items()}  # neighbours may see its ends
        for i, token in added.items():
            token.content = secret[i]
        other.add_tokens([*added.values()])  # with their own flags: to take the spaces beside them, and the like
        if all(alone(other, secret[i], other.token_to_id(secret[i])) or not alone(bpe, names[i], i) for i in added):
            return other, secret
    raise ValueError("its normalizer rewrites letters of any kind, so that special tokens cannot be told from text")


def alone(bpe, token, i):
    """Whether a token by itself is found as this id."""
    return bpe.encode(token, add_special_tokens=False).ids == [i]
