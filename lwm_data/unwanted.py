"""The records that the manifest does not want, from their marks: those that hold evaluation text, and duplicates.

    taken by length     a  b  .  d  e  f         a duplicate of a record that is not taken is none
    contaminated        a  .     d  e  f
    duplicates          a        d  .  f

That is the manifest's wish: it does not count as bad.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Bool

from lwm_data.duplicates import EXACT, find_duplicates
from lwm_data.folder import Folder
from lwm_data.manifest import DatasetManifest
from lwm_data.manifest_sources import AnySource
from lwm_data.sources.record import Rejection
from lwm_data.text_marks import SHINGLE, MarksFile
from lwm_data.token_store import OPEN_FILES, StoreFile

Taken = Callable[[AnySource, StoreFile, dict[int, Rejection]], Bool[np.ndarray, " records"]]


class Unwanted:
    """What is not wanted of each file `names` of the token store, each of the source beside it.

    marks: the name of each one's marks, None where it has none. taken: which records of a store file, those named left
    out, are taken by their lengths.
    """

    def __init__(
        self,
        manifest: DatasetManifest,
        sources: Sequence[AnySource],
        store: Folder,
        names: Sequence[str],
        marks: Sequence[str | None],
        taken: Taken,
    ) -> None:
        self._manifest, self._sources, self._store, self._marks = manifest, sources, store, marks
        self._file = lru_cache(OPEN_FILES)(lambda unit: StoreFile.without_tokens(store, names[unit]))
        rule = manifest.duplicates
        compared = [(i, name) for i, name in enumerate(marks) if name and rule and sources[i].deduplicate]
        self._units = [unit for unit, _ in compared]
        of_units = [taken(sources[unit], self._file(unit), self._contaminated(unit)) for unit in self._units]
        self._firsts = np.cumsum([0, *map(len, of_units)])
        if compared and rule is not None:
            self._duplicates = find_duplicates(store, [name for _, name in compared], of_units, rule.exact, rule.near)

    def of(self, unit: int) -> dict[int, Rejection]:
        """Record number -> why it is not wanted, of store file number `unit`."""
        found = self._contaminated(unit)
        at = bisect.bisect_left(self._units, unit)
        if self._units[at : at + 1] != [unit]:
            return found
        start, stop = np.searchsorted(self._duplicates.records, self._firsts[at : at + 2]).tolist()
        for i in range(start, stop):
            record = int(self._duplicates.records[i] - self._firsts[at])
            key = self._file(unit).key(record)
            original = self._name(int(self._duplicates.kept[i]))
            similarity = float(self._duplicates.similarity[i])
            if similarity == EXACT:
                found[record] = Rejection(key, "duplicate", f"the same text as {original}, which is kept")
            else:
                alike = f"about {similarity:.2f} of their {SHINGLE}-word sequences are the same"
                found[record] = Rejection(key, "near duplicate", f"like {original}, which is kept: {alike}")
        return found

    def _name(self, number: int) -> str:
        """Source and key of a record, by its number among all that are compared."""
        at = int(np.searchsorted(self._firsts, number, "right")) - 1
        unit = self._units[at]
        return f"{self._sources[unit].name} {self._file(unit).key(number - int(self._firsts[at]))}"

    def _contaminated(self, unit: int) -> dict[int, Rejection]:
        name, rule = self._marks[unit], self._manifest.contamination
        if name is None or rule is None or not self._sources[unit].decontaminate:
            return {}
        found = MarksFile(self._store.fetch(name)).found()
        return {
            record: Rejection(
                self._file(unit).key(record), "contaminated", f"{count:,} of its n-grams are of {text}; first: {ngram}"
            )
            for record, count, text, ngram in found
            if count >= rule.least
        }
