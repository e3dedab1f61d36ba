"""What is shared on the hub: a folder put there, and one result as a JSON file, put there and read back.

A result that is one JSON file (`Circuit`, `HeadMap`) is an `Artefact`: `save` and `load` it as a file, `push_to_hub`
and `load` it by a repository's name. What the local hub cache holds is read without a network. JSON alone is read: no
code.
"""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from workbench.errors import InputError
from workbench.storage.assets import located
from workbench.storage.directories import MARKER
from workbench.storage.files import read_json, write_json

ORIGIN = "origin"
"""In a run folder's file, beside the result: what it was made of."""


class Artefact:
    """A result that is one JSON file."""

    __slots__ = ()
    FILE: ClassVar[str]
    """What the file is called in a repository or folder, unless another name is given."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read what `to_json` gave."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write it as a JSON file, which `load` reads."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, source: str | Path, file: str | None = None, *, revision: str | None = None) -> Self:
        """Read a JSON file, or the one called `file` (see `FILE`) in a folder or in a hub repository (`owner/name`).

        A repository's file comes from the local hub cache where it is there, else it is downloaded. `revision`: a
        commit, tag or branch of the repository. Errors: `InputError` where there is no such file, it is damaged, or is
        something else.
        """
        value = read_json(_local(source, file or cls.FILE, revision))
        return cls.from_json(
            {name: each for name, each in value.items() if name != ORIGIN} if isinstance(value, dict) else value
        )

    def push_to_hub(
        self, repository: str, file: str | None = None, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Put it into a hub repository (`owner/name`), made where there is none, beside what is there; returns the
        repository's address. Errors: `InputError` for a hub that can't be reached or does not let you write."""
        content = io.BytesIO(json.dumps(self.to_json(), indent=1, allow_nan=False).encode())
        with _writing(repository, private=private, token=token) as hub:
            hub.upload_file(path_or_fileobj=content, path_in_repo=file or self.FILE, repo_id=repository)
        return f"{hub.endpoint}/{repository}"


def push_folder(folder: Path, repository: str, *, private: bool | None, token: str | None) -> str:
    """Upload a folder's files; returns the repository's address. Errors: `InputError` when the hub can't be reached or
    refuses."""
    with _writing(repository, private=private, token=token) as hub:
        hub.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=[MARKER])
    return f"{hub.endpoint}/{repository}"


@contextmanager
def _writing(repository: str, *, private: bool | None, token: str | None) -> Iterator[Any]:
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        yield hub
    except Exception as error:  # whatever the HTTP client raises without a network, a login or the right to write
        said = " ".join(str(error).split())[:300]
        raise InputError(
            f"{repository!r} could not be written to on the hub ({type(error).__name__}: {said}); check the name "
            "(owner/name), your login (hf auth login) and the network, or save it and upload the files."
        ) from error


def _local(source: str | Path, file: str, revision: str | None) -> Path:
    """Where the file lies on this machine."""
    path = Path(located(source)).expanduser()
    if path.is_dir():
        return path / file
    if path.is_file() or isinstance(source, Path) or source.endswith(".json") or source.startswith((".", "/", "~")):
        return path
    return _from_hub(source, file, revision)


def _from_hub(repository: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        with suppress(LocalEntryNotFoundError):
            return Path(hf_hub_download(repository, file, revision=revision, local_files_only=True))
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"{file} of {repository!r} is not in the hub cache, and HF_HUB_OFFLINE is set; go online once to fetch "
                "it, or give a file."
            )
        return Path(hf_hub_download(repository, file, revision=revision))
    except InputError:
        raise
    except HFValidationError:
        raise InputError(f"{repository!r} is neither a file, a folder nor a hub id (owner/name); give one.") from None
    except Exception as error:  # whatever the HTTP client raises: it is not to be had is all that matters here
        said = " ".join(str(error).split())[:300]
        raise InputError(
            f"the hub does not give {file} of {repository!r} ({type(error).__name__}: {said}); check both names, your "
            "access and the network, or give a file."
        ) from None
