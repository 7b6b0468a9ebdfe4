"""Tables appended to a folder as whole Parquet files, about two a second, merged where they have become many; written by a thread.

What a process had added when it was killed is there but for the last moments: a file has its name only once it is complete.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

EVERY_S: Final = 0.5  # between two files
ROWS: Final = 1 << 18  # of one file, at most about
MANY: Final = 120  # files, or 4 x ROWS rows, that are merged into one
BATCH: Final = 1 << 15  # rows that are read at once
WAITING: Final = 256  # pieces that may wait for the thread


class Parts:
    """Appends tables of one schema to `folder`, which must be empty or not be there.

    A piece is a function that makes the table, called by the thread. `fault`: why nothing is written any more; None while all is well.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.fault, self.rows, self.cpu_s = folder, "", 0, 0.0
        self._held: list[pa.Table] = []
        self._small: list[tuple[int, Path, int]] = []  # number, file, rows
        self._number = 0
        self._queue: queue.SimpleQueue[Callable[[], pa.Table] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"cift-{folder.name}", daemon=True)
        self._thread.start()

    def add(self, piece: Callable[[], pa.Table]) -> bool:
        """False where nothing is written any more."""
        if self.fault:
            return False
        if self._queue.qsize() >= WAITING:
            self.fault = f"{self.folder}: the disk does not keep up"
            return False
        self._queue.put(piece)
        return True

    def close(self, seconds: float = 60.0) -> None:
        """Write what waits. The thread is left behind where it takes longer."""
        self._queue.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        due = time.monotonic() + EVERY_S
        while True:
            try:
                piece = self._queue.get(timeout=max(0.0, due - time.monotonic()) if self._held else None)
                if piece is not None and not self.fault:
                    if not self._held:
                        due = time.monotonic() + EVERY_S
                    self._held.append(piece())
            except queue.Empty:
                piece = _nothing
            try:
                if self._held and (piece is None or time.monotonic() >= due or sum(t.num_rows for t in self._held) >= ROWS):
                    self._write()
            except (OSError, pa.ArrowException) as e:
                self.fault = f"{self.folder} cannot be written: {e}"
                self._held.clear()
            if piece is None:
                self.cpu_s = time.thread_time()
                return

    def _write(self) -> None:
        table = pa.concat_tables(self._held)
        path = self.folder / f"{self._number:08}.parquet"
        self._put(table, path)
        self._held.clear()
        self._small.append((self._number, path, table.num_rows))
        self._number += 1
        self.rows += table.num_rows
        if len(self._small) >= MANY or sum(n for _, _, n in self._small) >= 4 * ROWS:
            merged = pa.concat_tables([pq.read_table(p) for _, p, _ in self._small])
            self._put(merged, self.folder / f"{self._small[0][0]:08}-{self._small[-1][0]:08}.parquet")
            for _, p, _ in self._small:
                p.unlink()
            self._small.clear()

    def _put(self, table: pa.Table, path: Path) -> None:
        part = self.folder / ".part"
        pq.write_table(table, part, compression="zstd", compression_level=1)
        os.replace(part, path)


def _nothing() -> pa.Table:
    raise AssertionError


def read(folder: Path, said: list[str], columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The tables in the order in which they were added. A last file that is torn is passed over, and `said` gets a line about it."""
    from catalog.errors import InputError

    found, end = sorted(folder.glob("[0-9]*.parquet"), key=lambda p: (int(p.stem[:8]), -len(p.stem))), -1
    for n, path in enumerate(found):
        first, last = int(path.stem[:8]), int(path.stem[-8:])
        if last <= end:
            continue  # killed between a merge and the removal of what was merged
        if first != end + 1:
            raise InputError(f"{folder} lacks a part between {end} and {first}: it is not as it was recorded")
        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as e:
            if n + 1 < len(found):
                raise InputError(f"{path} is damaged ({e}): it is not as it was recorded") from None
            said.append(f"the last part of {folder.name} is torn and was left out ({path.name})")
            return
        end = last
        for batch in file.iter_batches(BATCH, columns=columns):
            yield pa.Table.from_batches([batch])
