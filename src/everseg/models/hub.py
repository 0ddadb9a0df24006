"""Files of the Hugging Face hub: from its local cache, and from the network only where that is allowed (floor 2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from everseg.errors import ConfigError


def fetch(spec: str, names: Sequence[str], *, download: bool, key: str, needed: bool = True) -> Path | None:
    """Find the first of some files of a repository in the hub's cache, or download it where that is allowed.

    Args:
        spec: "org/name" or "org/name@revision".
        names: files, the best first.
        download: allow the network; a file that is in the cache already needs no permission.
        key: setting that named the repository, for messages.
        needed: a missing file is an error; else the answer is None.

    Raises:
        ConfigError: another form of name, no such file, or a download that was not allowed.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    repo, _, revision = spec.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ConfigError(f"{key}: 'hf:{spec}' is not of the form hf:org/name[@revision]")
    problem: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(repo, name, revision=revision or None, local_files_only=not download))
        except (EntryNotFoundError, LocalEntryNotFoundError) as error:
            problem = error
        except (HfHubHTTPError, OSError) as error:
            raise ConfigError(f"{key}: 'hf:{spec}' could not be downloaded: {error}") from error
    if not needed:
        return None
    if download:
        raise ConfigError(f"{key}: 'hf:{spec}' could not be downloaded: {problem}")
    raise ConfigError(
        f"{key}: 'hf:{spec}' is not on this machine; allow the download with model.download=true"
    )
