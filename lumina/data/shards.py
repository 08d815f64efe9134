"""Token shards: a stream of token ids in ArrayRecord files, which check every record that is read.

A stream is cut into records of a fixed number of tokens, records into shards of bounded size: a token's place follows from
its index. Tokens are little-endian uint16, or uint32 for vocabularies above 65,536.
"""

import hashlib
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lumina.errors import DataError, UsageError

RECORD_TOKENS = 8192
SHARD_RECORDS = 8192  # 64 Mi tokens: 128 or 256 MiB before compression
RECORDS_KEPT = 256  # read records kept decoded, 4 to 8 MiB: saves decoding anew for each row of a record


def token_dtype(vocab_size: int) -> str:
    """The narrowest of uint16 and uint32 that holds every id, as numpy's little-endian name."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


class ShardWriter:
    """Writes one stream as `<name>-00000.arrayrecord`, ... in `directory`; `finish` returns what a manifest says of it."""

    def __init__(self, directory: Path, name: str, vocab_size: int, dtype: str = ""):
        self._directory, self._name, self._vocab_size = directory, name, vocab_size
        self._dtype = dtype or token_dtype(vocab_size)
        self._rest = np.empty(0, self._dtype)
        self._digest = hashlib.sha256()  # over the ids, whatever array_record makes of them
        self._tokens = 0
        self._shards: list[dict[str, Any]] = []
        self._writer: Any = None
        self._records = 0  # in the open shard

    def write(self, tokens: np.ndarray) -> None:
        """Append token ids, int [N]."""
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            raise DataError(
                f"token ids {tokens.min()} to {tokens.max()} are outside the tokenizer's 0 to {self._vocab_size - 1}"
            )
        self._rest = np.concatenate([self._rest, tokens.astype(self._dtype)])
        whole = self._rest.size // RECORD_TOKENS * RECORD_TOKENS
        for start in range(0, whole, RECORD_TOKENS):
            self._write_record(self._rest[start : start + RECORD_TOKENS])
        self._rest = self._rest[whole:]

    def finish(self) -> dict[str, Any]:
        """Close the last shard; returns the stream's part of the manifest."""
        if self._rest.size:
            self._write_record(self._rest)
        self._close_shard()
        return {
            "tokens": self._tokens,
            "tokens_sha256": self._digest.hexdigest(),
            "dtype": self._dtype,
            "record_tokens": RECORD_TOKENS,
            "shard_records": SHARD_RECORDS,
            "shards": self._shards,
        }

    def _path(self) -> Path:
        return self._directory / f"{self._name}-{len(self._shards):05d}.arrayrecord"

    def _write_record(self, tokens: np.ndarray) -> None:
        from array_record.python import array_record_module

        if self._writer is None:
            self._writer = array_record_module.ArrayRecordWriter(str(self._path()), "group_size:1")
        data = tokens.tobytes()
        try:
            self._writer.write(data)
        except RuntimeError as error:
            raise self._refusal(error) from error
        self._digest.update(data)
        self._tokens += tokens.size
        self._records += 1
        if self._records == SHARD_RECORDS:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        path = self._path()
        try:
            self._writer.close()
        except RuntimeError as error:
            raise self._refusal(error) from error
        # close() after a failed write is silent: ask a reader what has arrived.
        if _open_reader(path).num_records() != self._records:
            raise self._refusal("not all records were written")
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self._shards.append({"name": path.name, "records": self._records, "bytes": path.stat().st_size, "sha256": sha256})
        self._writer, self._records = None, 0

    def _refusal(self, why: object) -> UsageError:
        why = str(why).partition(";")[0]
        return UsageError(f"{self._path()}: cannot be written ({why}); free disk space, or set data.cache_dir or LUMINA_CACHE")


def _open_reader(path: Path) -> Any:
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")  # random access


class TokenStream:
    """Random access to one stream of token ids. Threads may share it.

    Args:
        directory: where the shards are.
        name: what errors call it, `train` or `held_out`.
        part: what `ShardWriter.finish` returned.

    Raises:
        DataError: a shard is missing or of another size than the manifest says.
    """

    def __init__(self, directory: Path, name: str, part: dict[str, Any]):
        self.name = name
        self.num_tokens: int = part["tokens"]
        self._directory, self._part, self._shards, self._dtype = directory, part, part["shards"], part["dtype"]
        self._record_tokens, self._shard_records = part["record_tokens"], part["shard_records"]
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._record = lru_cache(RECORDS_KEPT)(self._read_record)
        for shard in self._shards:
            path = directory / shard["name"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                raise self._broken(shard, "is missing" if size is None else f"has {size} bytes, not {shard['bytes']}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process, such as one that makes batches, opens its own readers."""
        return TokenStream, (self._directory, self.name, self._part)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Token ids [start, stop) as a new int32 array; raises DataError where a record is corrupt."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of a stream of {self.num_tokens}")
        tokens = np.empty(stop - start, np.int32)
        for number in range(start // self._record_tokens, -(-stop // self._record_tokens)):
            base = number * self._record_tokens
            first, last = max(start, base), min(stop, base + self._record_tokens)
            tokens[first - start : last - start] = self._record(number)[first - base : last - base]
        return tokens

    def _read_record(self, number: int) -> np.ndarray:
        index, within = divmod(number, self._shard_records)
        shard = self._shards[index]
        size = min(self._record_tokens, self.num_tokens - number * self._record_tokens)
        try:
            # `read` with an index keeps no position in the reader, so threads may share it.
            (data,) = self._reader(index).read([within])
        except RuntimeError as error:
            raise self._broken(shard, f"record {within} is corrupt: {str(error).partition(';')[0]}") from error
        tokens = np.frombuffer(data, self._dtype)
        if tokens.size != size:
            raise self._broken(shard, f"record {within} has {tokens.size} tokens, not {size}")
        return tokens

    def _reader(self, index: int) -> Any:
        with self._lock:
            if index not in self._readers:
                shard = self._shards[index]
                reader = _open_reader(self._directory / shard["name"])
                # A file without a readable footer opens as one of no records.
                if reader.num_records() != shard["records"]:
                    raise self._broken(shard, f"has {reader.num_records()} records, not {shard['records']}")
                self._readers[index] = reader
            return self._readers[index]

    def _broken(self, shard: dict[str, Any], what: str) -> DataError:
        return DataError(f"{self._directory / shard['name']}: {what}; delete {self._directory}, and it is made again")
