"""A teacher's truncated outputs on disk: `build_cache` writes them once, `TeacherCache` reads them.

    format.py   what the bytes mean: the manifest, the columns of a shard, their encodings
    samples.py  rows of a dataset, their hashes, fingerprints of what a cache was built from
    build.py    a teacher's outputs into shards, resumable at every moment
    read.py     shards into `TruncatedSoftmax`, and the checks that they fit a dataset

docs/teacher-cache.md describes the format for other readers.
"""

from kdfast.teacher_cache.build import build_cache
from kdfast.teacher_cache.format import OtherRowsError, TeacherCacheError
from kdfast.teacher_cache.read import TeacherCache

__all__ = ["OtherRowsError", "TeacherCache", "TeacherCacheError", "build_cache"]
