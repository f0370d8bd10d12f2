"""A source on the Hugging Face Hub, pinned to a commit: headers by range requests, shards when they are read.

Only safetensors, JSON, tokenizer and licence files are ever fetched, and only into the cache folder given.
"""

from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Kind
from compressor.checkpoint.layout import (
    MAX_JSON_BYTES,
    fingerprint,
    is_side_file,
    merge_headers,
    parse_config,
    parse_index,
    weight_files,
)
from compressor.checkpoint.modelopt import CONFIG_NAME, with_description
from compressor.checkpoint.safetensors_file import (
    AGAIN,
    FileHeader,
    header_length,
    parse_header,
    read_header,
    read_tensor,
)
from compressor.checkpoint.safetensors_writer import INDEX_NAME
from compressor.errors import CheckpointError, UserError
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch

# Most headers fit, so that one request does (as huggingface_hub's parse_safetensors_file_metadata).
FIRST_READ_BYTES = 100_000
CONNECTIONS = 16
TIMEOUT_S = 15.0
LOCAL_FIX = "use a local folder, or `model.headers` to plan"


class HubUnavailable(CheckpointError):
    """The Hub cannot be reached or does not let us in; a plan may fall back on shipped headers.

    Attributes:
        reason: a few words for the plan's note.
    """

    def __init__(self, reason: str, *, where: str, fix: str) -> None:
        self.reason = reason
        super().__init__(reason, where=where, fix=fix)


class HubSource:
    """A model repository on the Hub at one commit; opening reads config.json, the index and headers.

    Args:
        repo: ``org/name``.
        revision: branch, tag or commit; None is the default branch. The commit found is pinned.
        cache: where files are downloaded to when they are read; None for planning, where none are.
        quantized: whether the weights may be quantized; they are read as they lie, and ``config`` says how.

    Raises:
        HubUnavailable: no connection, or the repository is gated.
        CheckpointError: no such repository or revision, or contents that cannot be used.
    """

    kind: Kind = "safetensors"
    note = ""

    def __init__(
        self, repo: str, revision: str | None = None, cache: Path | None = None, *, quantized: bool = False
    ) -> None:
        self._repo, self._cache = repo, cache
        self._commit, self._sizes, self._sha256, self.license = _pinned(repo, revision)
        self.revision: str | None = self._commit
        self.label = f"{repo}@{self._commit}"
        if "config.json" not in self._sizes:
            raise CheckpointError("config.json is missing", where=self.label)
        self.config: dict[str, Any] = parse_config(
            self.small_file("config.json"), self.label, quantized=quantized
        )
        if quantized and CONFIG_NAME in self._sizes:
            self.config = with_description(self.config, self.small_file(CONFIG_NAME), self.label)
        lead = weight_files(self._sizes, self.label)
        weight_map = parse_index(self.small_file(lead), self.label) if lead == INDEX_NAME else {}
        shards = sorted(set(weight_map.values())) or [lead]
        for shard in shards:
            if shard not in self._sizes:
                raise CheckpointError(f"{INDEX_NAME} names {shard}: it is missing", where=self.label)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            self._files = dict(zip(shards, pool.map(self._remote_header, shards), strict=True))
        headers, homes = merge_headers(self._files, weight_map, self.label, quantized=quantized)
        self.homes: Mapping[str, str] = homes
        self.headers: Mapping[str, TensorHeader] = headers
        self.file_bytes: Mapping[str, int] = {shard: self._sizes[shard] for shard in shards}
        self._local: dict[str, Path] = {}
        self._evicting = threading.Lock()
        sizes = {shard: (self._sizes[shard],) for shard in shards}
        self.fingerprint = fingerprint(self.config, headers, sizes, [self._commit.encode()])

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """See ``Source.read``; downloads the tensor's shard first if the cache has it not."""
        shard = self.homes[name]
        return read_tensor(self._shard(shard), self.headers[name], self._files[shard].offsets[name], index)

    @property
    def files(self) -> Mapping[str, int]:
        """Every file of the repository at its commit -> its bytes."""
        return self._sizes

    @property
    def held_bytes(self) -> int:
        """See ``FetchedSource``."""
        return sum(path.stat().st_size for path in {path.resolve() for path in self._cached().values()})

    def keep_only(self, names: Set[str]) -> None:
        """See ``FetchedSource``: removes shards from the cache, those that an earlier run left there too."""
        kept = {self.homes[name] for name in names if name in self.homes}
        with self._evicting:
            found = self._cached()
            # Shards of the same bytes are links to one file.
            used = {path.resolve() for shard, path in found.items() if shard in kept}
            for shard in found.keys() - kept:
                self._local.pop(shard, None)
                self._checked(shard).unlink(missing_ok=True)
                stored = found[shard].resolve()
                assert self._cache is not None
                assert stored.is_relative_to(self._cache.resolve()), f"{stored} is not in the cache"
                found[shard].unlink()
                if stored not in used:
                    stored.unlink(missing_ok=True)

    def write_side_files(self, folder: Path) -> list[str]:
        """Downloads tokenizer, template, processor, generation and licence files; see ``Source``."""
        names = sorted(filter(is_side_file, self._sizes))
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(self._download(name).read_bytes())
        return names

    def model_dir(self) -> Path | None:
        """The snapshot folder in the cache, with everything that ``transformers`` needs downloaded."""
        for name in filter(is_side_file, self._sizes):
            self._download(name)
        for shard in self._files:
            self._shard(shard)
        if INDEX_NAME in self._sizes:
            self._download(INDEX_NAME)
        return self._download("config.json").parent

    def gguf_file(self) -> str | None:
        """None: the weights are safetensors."""
        return None

    def _shard(self, shard: str) -> Path:
        """The local file of a shard, checked once against the header that was planned with."""
        if shard not in self._local:
            path = self._download(shard)
            if read_header(path) != self._files[shard]:
                raise CheckpointError(
                    "the downloaded shard differs from the Hub's", where=str(path), fix=AGAIN
                )
            self._local[shard] = path
        return self._local[shard]

    def _cached(self) -> dict[str, Path]:
        """The shards that are in the cache, and where."""
        from huggingface_hub import try_to_load_from_cache

        if self._cache is None:
            return {}
        found = {shard: try_to_load_from_cache(**self._place(shard)) for shard in self._files}
        return {shard: Path(path) for shard, path in found.items() if isinstance(path, str)}

    def _checked(self, name: str) -> Path:
        """A file that is there once the download ``name`` has been checked; a kill may come in between."""
        assert self._cache is not None
        told = hashlib.sha256(f"{self._repo} {self._commit} {name}".encode()).hexdigest()
        return self._cache / "checked" / told

    def _download(self, name: str) -> Path:
        """The file ``name`` in the cache, fetched if it was not there, and checked once by sha256."""
        from huggingface_hub import hf_hub_download

        assert self._cache is not None, "a source opened for planning is not read"
        place = self._place(name)
        with _told(self._repo, self._commit):
            path = Path(hf_hub_download(**place))
        # The cache links snapshots/<commit>/<name> to blobs/<hash> of the same repository.
        assert path.resolve().is_relative_to(self._cache.resolve()), f"{path} leads out of the cache"
        checked = self._checked(name)
        if name in self._sha256 and not checked.exists():
            _check_sha256(path.resolve(), self._sha256[name])
            checked.parent.mkdir(parents=True, exist_ok=True)
            checked.touch()
        return path

    def _place(self, name: str) -> dict[str, Any]:
        """Where a file is or will be, as ``huggingface_hub`` is asked for it."""
        return {"repo_id": self._repo, "filename": name, "revision": self._commit, "cache_dir": self._cache}

    def _remote_header(self, shard: str) -> FileHeader:
        """A shard's header by one or two range requests."""
        where = f"{self.label}/{shard}"
        head = self._first_bytes(shard, FIRST_READ_BYTES)
        length = header_length(head[:8], self._sizes[shard], where)
        if len(head) < 8 + length:
            head = self._first_bytes(shard, 8 + length)
        return parse_header(head[8 : 8 + length], 8 + length, self._sizes[shard], where)

    def small_file(self, name: str) -> bytes:
        """The contents of a JSON file, up to a cap, without storing it."""
        if self._sizes[name] > MAX_JSON_BYTES:
            raise CheckpointError(f"larger than {MAX_JSON_BYTES:,} bytes", where=f"{self.label}/{name}")
        return self._first_bytes(name, self._sizes[name])

    def _first_bytes(self, name: str, count: int) -> bytes:
        """At most the first ``count`` bytes of a file, even from a server that ignores ranges."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self._repo, name, revision=self._commit)
        headers = build_hf_headers() | {"range": f"bytes=0-{count - 1}", "accept-encoding": "identity"}
        found = bytearray()
        with (
            _told(self._repo, self._commit),
            get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S) as response,
        ):
            hf_raise_for_status(response)
            for chunk in response.iter_bytes():
                found += chunk
                if len(found) >= count:
                    break
        return bytes(found[:count])


def _pinned(repo: str, revision: str | None) -> tuple[str, dict[str, int], dict[str, str], str | None]:
    """The commit of ``revision``, its files' sizes, sha256 of the large ones, and the stated licence."""
    from huggingface_hub import HfApi

    with _told(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
    commit = str(info.sha or "")
    looks_like_commit = (
        revision is not None and len(revision) == 40 and not set(revision) - set("0123456789abcdef")
    )
    if not commit or (looks_like_commit and commit != revision):
        raise CheckpointError(
            f"wrong revision: asked for {revision}, the Hub answers {commit or 'nothing'}", where=repo
        )
    files = [file for file in info.siblings or [] if file.size is not None]
    sizes = {str(file.rfilename): int(file.size) for file in files}
    sha256 = {str(file.rfilename): str(file.lfs.sha256) for file in files if file.lfs is not None}
    stated = info.card_data.get("license") if info.card_data is not None else None
    return commit, sizes, sha256, stated if isinstance(stated, str) else None


def _check_sha256(path: Path, expected: str) -> None:
    """Removes and refuses a download that is not what the Hub says it is."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        path.unlink()
        raise CheckpointError(f"wrong sha256: {found}, the Hub says {expected}", where=str(path), fix=AGAIN)


@contextmanager
def _told(repo: str, revision: str | None) -> Iterator[None]:
    """Turns the faults of ``huggingface_hub`` into messages that say what to do."""
    import httpx
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        fix = f"accept the terms on {page} and log in with `hf auth login`; or {LOCAL_FIX}"
        raise HubUnavailable("the repository is gated", where=repo, fix=fix) from error
    except errors.RepositoryNotFoundError as error:
        fix = "check the name (a private one needs `hf auth login`); a local folder must exist by this path"
        raise CheckpointError("no such model on the Hub", where=repo, fix=fix) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"no revision {revision} on the Hub", where=repo, fix=f"see {page}") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"not a Hub id: {error}", where=repo) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        refused = status in (401, 403)
        reason = f"the Hub refuses access (HTTP {status})" if refused else f"the Hub answers HTTP {status}"
        fix = f"log in with `hf auth login`; or {LOCAL_FIX}" if refused else f"try again; or {LOCAL_FIX}"
        raise HubUnavailable(reason, where=repo, fix=fix) from error
    except (httpx.HTTPError, ConnectionError, errors.LocalEntryNotFoundError) as error:
        raise HubUnavailable("the Hub cannot be reached", where=repo, fix=LOCAL_FIX) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError("disk full while downloading", where=repo, fix="free space and run again") from error
