"""From a name to a folder: tiny, small, a folder, or a repository of the Hugging Face Hub, which is downloaded once."""

import contextlib
import json
import re
from pathlib import Path

from extras import checks, other_formats
from weights import INDEX, SINGLE

CONFIGS = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
]
OWN = {"tiny": "tiny", "small": "small/model"}  # names → where these models are in this repository


def find(model, revision=None):
    """A folder, "tiny", "small" or a Hub id → the folder (pathlib.Path). Of a Hub id all but the weights is downloaded,
    unless the Hub's cache has it: `complete` fetches these, once the rest has been looked at.

    Raises OSError with a finished sentence.
    """
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
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(model)):
        raise OSError(
            f"there is no model folder {model}: give a folder, a Hub id such as llava-hf/llava-1.5-7b-hf, or tiny"
        )
    from huggingface_hub import snapshot_download

    wanted = [*CONFIGS, INDEX, other_formats.ADAPTERS[0]]  # the last one only to say whose adapter it is
    with refusals(model, revision):
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))


def complete(model, folder):
    """Download the weights of a Hub id into the folder that `find` gave for it, and check that they are files of this
    folder → the folder. An interrupted download resumes.

    Raises ValueError or OSError with a finished sentence.
    """
    if model not in OWN and not Path(model).is_dir():
        sharded = not (folder / SINGLE).exists() and (folder / INDEX).exists()
        download(model, folder, [file.name for file in checks.shards(folder)] if sharded else [SINGLE])
    checks.shards(folder)
    return folder


def download(repo, folder, files):
    """Files of a repository into a snapshot of it in the Hub's cache, unless they are there."""
    from huggingface_hub import HfApi, constants, errors, hf_hub_download

    commit = folder.name  # so that all the files are of the same one
    for name in files:
        try:
            with refusals(repo):
                if not (folder / name).exists() and not constants.HF_HUB_OFFLINE:
                    fetch(repo, name, folder)
                hf_hub_download(repo, name, revision=commit)
        except errors.EntryNotFoundError:
            why = None
            if name == SINGLE:
                with contextlib.suppress(OSError, errors.HTTPError):  # no answer now: then it is just missing
                    why = other_formats.without_weights(repo, HfApi().list_repo_files(repo, revision=commit), folder)
            raise OSError(why or f"{repo} holds no {name}") from None


@contextlib.contextmanager
def refusals(repo, revision=None):
    """Turn what the Hub's client raises into an OSError with a finished sentence; not that a file is missing."""
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


def fetch(repo, name, folder):
    """A large file into the Hub's cache, where hf_hub_download then finds it. What an earlier call got of it before it
    was stopped is kept and continued, while recent versions of the Hub's own client begin anew.

    As that client does, it goes to blobs/, to which the snapshot links; where there are no links, to the snapshot.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import are_symlinks_supported, http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    blobs = folder.parents[1] / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(repo, name, revision=folder.name)
    about = get_hf_file_metadata(url)
    if about.etag is None:
        raise errors.FileMetadataError
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
