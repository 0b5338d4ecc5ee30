"""A checkpoint on the Hugging Face hub: its small files, and the headers of its shards by HTTP range requests.

`huggingface_hub` finds the endpoint (HF_ENDPOINT), the token (HF_TOKEN, or the one that `hf auth login` saved) and the
cache. All files are those of one commit, the one that the revision stands for when it is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from ..checkpoint.errors import CheckpointError
from ..checkpoint.headers import TensorHeader, header_length, parse_header

# Of a Flash checkpoint's 46 shards most have their header in here; the rest of a longer one takes a second request.
_FIRST_BYTES = 1 << 19
_CONNECTIONS = 8
_TIMEOUT_S = 30.0
_UNSATISFIABLE = 416  # the status of a range that begins where a file ends: an empty one has no first byte
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def is_hub_id(model: str) -> bool:
    """Whether a name can be a repository's: OWNER/NAME, and no such path on this machine."""
    return _ID.fullmatch(model) is not None and not Path(model).exists()


class HubFiles:
    """The files of one commit of a repository.

    Attributes:
        where: What messages call it.
        names: Every file of the commit.
        snapshot: Its directory in the cache, where there is no network (HF_HUB_OFFLINE); None otherwise.
    """

    def __init__(self, repository: str, revision: str | None) -> None:
        """Ask the hub for the commit.

        Raises:
            CheckpointError: no such repository or revision, no access, no connection, or no `huggingface_hub`.
        """
        try:
            import huggingface_hub
            from huggingface_hub import constants
            from huggingface_hub.utils import http_stream_backoff
        except ImportError as error:
            raise CheckpointError(
                f"{repository}: is not a directory here, and to read it from the Hugging Face hub takes "
                f"huggingface_hub 1.0 or later. Run `pip install -U huggingface_hub`, or pass a directory."
            ) from error
        self._hub, self._stream = huggingface_hub, http_stream_backoff
        self.repository, self.where = repository, repository
        self.snapshot: Path | None = None
        self.names: frozenset[str] = frozenset()
        if constants.HF_HUB_OFFLINE:
            self.snapshot = self._cached(revision)
            return
        with self._explained(f"{repository}{f' at {revision}' if revision else ''}"):
            info = huggingface_hub.HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT_S)
        self._commit = str(info.sha)
        self.where = f"{repository} at {self._commit[:12]}"
        self.names = frozenset(sibling.rfilename for sibling in info.siblings or ())

    def read(self, name: str) -> bytes:
        """A small file, through the hub's cache."""
        with self._explained(f"{self.where}: {name}"):
            path = self._hub.hf_hub_download(self.repository, name, revision=self._commit)
        return Path(path).read_bytes()

    def headers(self, files: list[str]) -> Iterator[list[TensorHeader]]:
        """The tensors of each safetensors file; their bytes stay on the hub.

        Raises:
            CheckpointError: see `read_headers`; or a server without range requests.
        """
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            yield from pool.map(self._header, files)

    def _header(self, name: str) -> list[TensorHeader]:
        file = Path(self.repository) / name
        with self._explained(f"{self.where}: {name}"):
            size, text = self._range(name, 0, _FIRST_BYTES)
            length = header_length(file, size, text)
            if 8 + length > len(text):
                text += self._range(name, len(text), 8 + length)[1]
        found = parse_header(file, size, 8 + length, text[8 : 8 + length])
        # Without offsets nothing looks for the bytes in a file of this machine.
        return [TensorHeader(tensor.dtype, tensor.shape, tensor.name, tensor.file) for tensor in found]

    def _range(self, name: str, begin: int, end: int) -> tuple[int, bytes]:
        """The size of a file, and its bytes from `begin` to `end` or to where it ends."""
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = self._hub.hf_hub_url(self.repository, name, revision=self._commit)
        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        with self._stream("GET", url, headers=headers, timeout=_TIMEOUT_S, follow_redirects=True) as response:
            if response.status_code == _UNSATISFIABLE and begin == 0:
                return 0, b""
            hf_raise_for_status(response)
            found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
            # A whole shard must not come instead of its first bytes.
            if response.status_code != 206 or found is None or int(found[1]) != begin:
                raise CheckpointError(
                    f"{self.where}: {name}: the server does not answer range requests (status "
                    f"{response.status_code}). Use another HF_ENDPOINT, or download the repository and pass its "
                    f"directory."
                )
            return int(found[3]), response.read()

    def _cached(self, revision: str | None) -> Path:
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(self._hub.snapshot_download(self.repository, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError as error:
            raise CheckpointError(
                f"{self.repository}: HF_HUB_OFFLINE is set, and the cache does not have it. Unset it, or pass a "
                f"directory."
            ) from error

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Failures of the hub as one sentence."""
        from huggingface_hub import errors

        # The base class is that of the HTTP client that this version uses.
        connection = cast(type[Exception], errors.HfHubHTTPError.__mro__[1])
        try:
            yield
        except CheckpointError:
            raise
        except errors.GatedRepoError as error:
            fix = "Accept its terms on its page on the hub, and set HF_TOKEN or run `hf auth login`"
            raise CheckpointError(f"{what}: access is restricted. {fix}.") from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointError(f"{what}: no such revision. Pass a branch, a tag or a commit.") from error
        except errors.RepositoryNotFoundError as error:
            fix = "Check the name; for a private one set HF_TOKEN or run `hf auth login`"
            raise CheckpointError(f"{what}: no such directory here, and no such repository. {fix}.") from error
        except errors.HFValidationError as error:
            raise CheckpointError(f"{what}: is not the name of a repository. Pass OWNER/NAME.") from error
        except (OSError, connection) as error:
            first = str(error).strip().partition("\n")[0] or type(error).__name__
            raise CheckpointError(f"{what}: the hub did not answer: {first}. Try again, or set HF_ENDPOINT.") from error
