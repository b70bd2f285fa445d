"""What lies beside a tokenizer for transformers alone: read when the tokenizer is, and passed on when it is saved.

Of it added_tokens.py reads the tokens; AutoProcessor also reads their names, the side that is padded, templates.
"""

import contextlib
import json

OBJECTS = ("tokenizer_config.json", "processor_config.json", "generation_config.json")  # some fields of which are known
TEXTS = (
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "video_preprocessor_config.json",
)
MOST = 4_000_000  # bytes of one file


def read(folder):
    """The files of a folder → {name: JSON object, or text}. What cannot be read is left out here."""
    found = {}
    for file in [file for name in (*OBJECTS, *TEXTS) for file in sorted(folder.glob(name))]:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if file.is_file() and file.stat().st_size <= MOST:  # opening a pipe would block
                text = file.read_text(encoding="utf-8")
                found[file.relative_to(folder).as_posix()] = json.loads(text) if file.name in OBJECTS else text
    return {name: value for name, value in found.items() if isinstance(value, dict if name in OBJECTS else str)}
