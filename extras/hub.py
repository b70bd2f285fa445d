"""From a name to a folder: tiny, small, a folder, or a repository of the Hugging Face Hub, which is downloaded once."""

import contextlib
import json
import re
import shutil
from pathlib import Path

from extras import added_tokens, beside, checks, other_formats
from extras.cli import notice
from weights import INDEX, SINGLE

CONFIGS = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    *added_tokens.FILES,  # the last three where a repository has them
]
OWN = {"tiny": "tiny", "small": "small/model"}  # names → where these models are in this repository


def find(model, revision=None):
    """A folder, "tiny", "small" or a Hub id → the folder (pathlib.Path). Of a Hub id all but the weights is downloaded,
    unless the Hub's cache has it: `complete` fetches these, once the rest has been looked at.

    Raises OSError with a complete message.
    """
    model = str(model)  # of a path
    if model in OWN:
        folder = Path(__file__).resolve().parent.parent / OWN[model]
        if not folder.is_dir():
            raise OSError(f"{model} is not put together yet: python {model}/{model}.py --make")
        return folder
    if Path(model).is_dir():
        return Path(model)
    if Path(model).is_file():
        file = Path(model)
        raise OSError(
            other_formats.without_weights(file.parent, [file.name], file.parent)
            or f"{model} is a file: give the folder that holds it, with its config.json"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model):
        raise OSError(
            f"there is no model folder {model}: give a folder, a Hub id such as llava-hf/llava-1.5-7b-hf, or tiny"
        )
    from huggingface_hub import snapshot_download

    # the last one only to say whose adapter it is
    wanted = [*CONFIGS, *beside.OBJECTS, *beside.TEXTS, INDEX, other_formats.ADAPTERS[0]]
    with refusals(model, revision):
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))


def complete(model, folder, fits=lambda size: None):
    """Download the weights of a Hub id into the folder that `find` gave for it, and check that they are files of this
    folder → the folder. What is downloaded is said before. An interrupted download resumes.

    fits: called with the size of the files in bytes, None if the Hub does not tell it, before anything is downloaded:
    it raises what keeps the model from being used here. Raises ValueError or OSError with a complete message.
    """
    model = str(model)
    if model not in OWN and not Path(model).is_dir():
        sharded = not (folder / SINGLE).exists() and (folder / INDEX).exists()
        download(model, folder, [file.name for file in checks.shards(folder)] if sharded else [SINGLE], fits)
    checks.shards(folder)
    return folder


def download(repo, folder, files, fits):
    """Files of a repository into a snapshot of it in the Hub's cache, unless they are there."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    commit, about = folder.name, {}  # the commit, so that all the files are of the same one
    for name in files:
        if not (folder / name).exists() and not constants.HF_HUB_OFFLINE:
            with absences(repo, name, folder), refusals(repo):
                about[name] = get_hf_file_metadata(hf_hub_url(repo, name, revision=commit))
                check_metadata(about[name])
    if about:
        size = sum(file.size or 0 for file in about.values())
        fits(size if all(file.size for file in about.values()) and len(about) == len(files) else None)
        announce(repo, folder, about)
    for name in files:
        with absences(repo, name, folder), refusals(repo):
            if name in about:
                fetch(repo, name, folder, about[name])
            hf_hub_download(repo, name, revision=commit)


def announce(repo, folder, about):
    """Say what is about to be downloaded, unless the disk has no room for it. about: {name: what the Hub says of it}"""
    blobs = folder.parents[1] / "blobs"
    parts = [blobs / f"{file.etag}.part" for file in about.values()]
    there = sum(part.stat().st_size for part in parts if part.exists())
    whole = sum(file.size or 0 for file in about.values())
    where, free = folder.parents[2], shutil.disk_usage(folder).free
    if whole - there > free:
        raise OSError(
            f"{repo} takes {in_words(whole - there)} more, and the disk of {where} has {in_words(free)}: make room, or "
            "set HF_HOME to a folder on another disk"
        )
    size = in_words(whole) if all(file.size for file in about.values()) else "weights of unknown size"
    rest = f", of which {in_words(there)} are here from before" if there else ""
    notice(f"{repo}: {size} to download{rest}; kept in {where}, so that it is downloaded once")


def in_words(size):
    """A number of bytes, to be read."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def check_metadata(about):
    """Raise what the Hub's client does where an answer leaves out which version of the file it is of."""
    from huggingface_hub import errors

    if about.etag is None:
        raise errors.FileMetadataError


@contextlib.contextmanager
def absences(repo, name, folder):
    """Turn the error that a file is missing into an OSError that says what stands there instead."""
    from huggingface_hub import HfApi, errors

    try:
        yield
    except errors.EntryNotFoundError:
        why = None
        if name == SINGLE:
            with contextlib.suppress(OSError, errors.HTTPError):  # no answer now: then it is just missing
                there = HfApi().list_repo_files(repo, revision=folder.name)
                why = other_formats.without_weights(repo, there, folder)
        raise OSError(why or f"{repo} holds no {name}") from None


@contextlib.contextmanager
def refusals(repo, revision=None):
    """Turn what the Hub's client raises into an OSError with a complete message; not that a file is missing."""
    from huggingface_hub import constants, errors

    here = f"{repo} at revision {revision}" if revision else repo
    elsewhere = "give a folder, or --model tiny"
    try:
        yield
    except errors.GatedRepoError:
        raise OSError(f"{here} is gated: accept its terms on its page and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise OSError(f"{repo} has no revision {revision}") from None
    except errors.RepositoryNotFoundError:
        raise OSError(
            f"{here} is neither a folder here nor a repository on the Hub (a private one needs HF_TOKEN)"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.FileMetadataError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, errors.FileMetadataError) and not constants.HF_HUB_OFFLINE:
            raise OSError(
                f"{here} cannot be downloaded: {constants.ENDPOINT} does not say which version of a file it holds, as "
                f"the Hub does (a mirror that drops its headers?): {elsewhere}"
            ) from None
        why = f"the Hub gave no answer ({reason(cause)})"
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else why
        raise OSError(f"{here} is not in the cache and {why}: {elsewhere}") from None
    except errors.EntryNotFoundError:
        raise
    except errors.HfHubHTTPError as error:
        raise OSError(f"the Hub refused {here}: {reason(error)}") from None
    except json.JSONDecodeError:  # HTML instead of JSON: probably a captive portal
        raise OSError(f"{here} cannot be downloaded: the answer is not from the Hub: {elsewhere}") from None
    except errors.HTTPError as error:  # of the connection
        raise OSError(
            f"the download of {here} was interrupted ({reason(error)}): run the same command to resume"
        ) from None


def fetch(repo, name, folder, about):
    """A large file into the Hub's cache, where hf_hub_download then finds it. What an earlier call got of it before it
    was stopped is kept and continued, while recent versions of the Hub's own client begin anew.

    As that client does, it goes to blobs/, to which the snapshot links; where there are no links, to the snapshot.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import are_symlinks_supported, http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    blobs = folder.parents[1] / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(repo, name, revision=folder.name)
    whole, part = blobs / about.etag, blobs / f"{about.etag}.part"
    with WeakFileLock(blobs / f"{about.etag}.lock"):  # two processes that want the same file
        if whole.exists() or (folder / name).exists():
            return
        with open(part, "ab") as file:
            http_get(
                url,
                file,
                resume_size=file.tell(),
                headers=build_hf_headers(),
                expected_size=about.size,
                displayed_filename=name,
            )
        part.replace(whole if are_symlinks_supported(blobs.parent) else folder / name)


def reason(error):
    """The first line of an error that says anything."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def progress(found):
    """The names of the tensors, with a bar on stderr if the files are so large that one waits for them."""
    if sum(file.stat().st_size for file in {file for file, _, _ in found.values()}) < 200e6:
        return found
    from huggingface_hub.utils import tqdm

    return tqdm(found, desc="loading", unit="tensor", leave=False)
