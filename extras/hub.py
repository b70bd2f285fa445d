"""From a name to a folder: "tiny", a folder, or a repository of the Hugging Face Hub, which is downloaded once."""

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


def find(model, revision=None):
    """A folder, "tiny" or a Hub id → the folder (pathlib.Path). A Hub id is downloaded unless the Hub's cache has it.

    Raises OSError with a finished sentence.
    """
    if model == "tiny":
        return Path(__file__).resolve().parent.parent / "tiny"
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
    return download(model, revision)


def download(repo, revision):
    """Download only the files needed, into the Hub's cache; an interrupted download resumes.

    Obeys HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT and HF_TOKEN. Returns the folder of the snapshot.
    """
    from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download

    here = f"{repo} at revision {revision}" if revision else repo
    try:
        wanted = [*CONFIGS, INDEX, "adapter_config.json"]  # the last one only to say whose adapter it is
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
        commit = folder.name  # so that all the files are of the same one
        files = [file.name for file in checks.shards(folder)] if (folder / INDEX).exists() else [SINGLE]
        for name in files:
            if not (folder / name).exists() and not constants.HF_HUB_OFFLINE:
                fetch(repo, name, commit, folder.parents[1] / "blobs")
            hf_hub_download(repo, name, revision=commit)
    except errors.GatedRepoError:
        raise OSError(f"{here} is gated: accept its terms on its page and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise OSError(f"{repo} has no revision {revision}") from None
    except errors.RepositoryNotFoundError:
        raise OSError(
            f"{here} is neither a folder here nor a repository on the Hub (a private one needs HF_TOKEN)"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = f"the Hub gave no answer ({reason(error.__cause__ or error)})"
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else why
        raise OSError(f"{here} is not in the cache and {why}: give a folder, or --model tiny") from None
    except errors.EntryNotFoundError:
        why = None
        with contextlib.suppress(OSError, errors.HTTPError):  # no answer now: then it is just missing
            if name == SINGLE:
                why = other_formats.without_weights(here, HfApi().list_repo_files(repo, revision=commit), folder)
        raise OSError(why or f"{here} holds no {name}") from None
    except errors.HfHubHTTPError as error:
        raise OSError(f"the Hub refused {here}: {reason(error)}") from None
    except json.JSONDecodeError:  # HTML instead of JSON: probably a captive portal
        raise OSError(
            f"{here} cannot be downloaded: the answer is not from the Hub. Give a folder, or --model tiny"
        ) from None
    except errors.HTTPError as error:  # of the connection
        raise OSError(
            f"the download of {here} was interrupted ({reason(error)}): run the same command to resume"
        ) from None
    return folder


def fetch(repo, name, commit, blobs):
    """A large file into the Hub's cache, where hf_hub_download then finds it. What an earlier call got of it before it
    was stopped is kept and continued, while recent versions of the Hub's own client begin anew.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    blobs.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(repo, name, revision=commit)
    about = get_hf_file_metadata(url)
    whole, part = blobs / about.etag, blobs / f"{about.etag}.part"
    with WeakFileLock(blobs / f"{about.etag}.lock"):  # two processes that want the same file
        if whole.exists():
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
        part.replace(whole)


def reason(error):
    """The first line of an error that says anything."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def progress(found):
    """The names of the tensors, with a bar on stderr if the files are so large that one waits for them."""
    if sum(file.stat().st_size for file in {file for file, _, _ in found.values()}) < 200e6:
        return found
    from huggingface_hub.utils import tqdm

    return tqdm(found, desc="loading", unit="tensor", leave=False)
