"""Leaves out near-duplicates by MinHash: documents that share most of their n-grams of words.

While documents are read, datatrove's own signatures of them are computed. A band here is what datatrove calls a
bucket, a part of the signature. Two documents that agree in a band are near-duplicates, and so are all that such
pairs link. datatrove's own later stages find the same clusters, but the document of a cluster that they keep depends
on how the corpus was divided among tasks; here it is the first one.
"""

from array import array
from collections.abc import Iterable
from functools import reduce
from itertools import accumulate

import numpy as np
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import HashConfig

from data_prep.work import BANDS, DocumentHeader, Work
from infini_train.files import digest_of

NAME = "MinhashDedupFilter"  # of datatrove's last stage: in pipeline files, and the reason of a reject
BAND = np.dtype("<u8")  # a digest of the hashes of a band
NONE = 0  # instead of the digest, if a text has fewer words than an n-gram and therefore no signature
BUCKETS = 14  # datatrove's default
SHINGLES = 4096  # n-grams whose hashes are computed at once
HASHES = HashConfig(hash_fc="sha1")


class MinhashSignature:
    """Computes signatures of texts.

    Args:
        n_grams: words of an n-gram.
        num_buckets: bands of a signature.
        hashes_per_bucket: hashes of a band.
        seed: of the hash functions.
        language: by which texts are split into words.
    """

    def __init__(
        self,
        n_grams: int = 5,
        num_buckets: int = BUCKETS,
        hashes_per_bucket: int = 8,
        seed: int = 1,
        language: str = "en",
    ) -> None:
        if min(n_grams, num_buckets, hashes_per_bucket) < 1:
            raise ValueError("found 0 or less, expected n_grams, num_buckets and hashes_per_bucket of at least 1")
        # datatrove's default, xxhash, is not always installed, and datatrove cannot use version 4 of it.
        config = MinhashConfig(n_grams, num_buckets, hashes_per_bucket, seed, hash_config=HASHES)
        self._step = MinhashDedupSignature(".", config, language)  # no file is written there

    def bands(self, text: str) -> bytes:
        """Return the bands of a text's signature, as an array of BAND."""
        shingles = self._step.get_shingles(text)
        if not len(shingles):
            return bytes(self._step.config.num_buckets * BAND.itemsize)
        # The hashes of all n-grams at once would take a kilobyte a word; their least ones can be found in parts.
        parts = np.split(shingles, range(SHINGLES, len(shingles), SHINGLES))
        signature = reduce(np.minimum, (np.array(self._step.get_signature(part)) for part in parts))
        return b"".join(digest_of(hashes.tobytes())[: BAND.itemsize] for hashes in signature)


class NearDuplicates:
    """Tells which documents of a preparation, asked for in their order, are near-duplicates of one that was kept."""

    def __init__(self, work: Work) -> None:
        tasks = range(work.tasks)
        sizes = [work.part(task, BANDS).stat().st_size for task in tasks]
        arguments = dict(work.options["pipeline"])[NAME]
        count = arguments.get("num_buckets", BUCKETS)
        rows = [size // (count * BAND.itemsize) for size in sizes]
        parts = [
            np.memmap(work.part(task, BANDS), BAND, "r", shape=(rows[task], count)) for task in tasks if rows[task]
        ]
        bands = (np.concatenate([part[:, band] for part in parts]) for band in range(count if parts else 0))
        self._clusters = clusters(bands, sum(rows))
        self._sizes = np.bincount(self._clusters, minlength=1)
        self._next = list(accumulate(rows, initial=0))[:-1]  # number of the next document of each part
        self._kept: dict[int, str] = {}  # the document that is kept of each cluster of several

    def of(self, header: DocumentHeader) -> tuple[int, str | None]:
        """Return the cluster of the next document, and the id of the document that was kept of it, if any."""
        number = self._next[header.part]
        self._next[header.part] += 1
        cluster = int(self._clusters[number])
        return cluster, self._kept.get(cluster)

    def keep(self, cluster: int, header: DocumentHeader) -> None:
        """Note that a document of a cluster is kept."""
        if self._sizes[cluster] > 1:
            self._kept[cluster] = header.id


def clusters(bands: Iterable[np.ndarray], documents: int) -> np.ndarray:
    """Return a number of each document's cluster, that of one of its documents, int64 [documents].

    Args:
        bands: for each band, the digests of all documents, BAND [documents].
        documents: how many there are.
    """
    above = array("q", range(documents))  # of each document another one of its cluster, or itself

    def root(number: int) -> int:
        while above[number] != number:
            above[number] = number = above[above[number]]
        return number

    for band in bands:
        order = np.argsort(band, kind="stable")
        equal = np.flatnonzero((band[order[1:]] == band[order[:-1]]) & (band[order[1:]] != NONE))
        for one, other in zip(order[equal].tolist(), order[equal + 1].tolist(), strict=True):
            low, high = sorted((root(one), root(other)))
            above[high] = low
    return np.fromiter(map(root, range(documents)), np.int64, documents)
