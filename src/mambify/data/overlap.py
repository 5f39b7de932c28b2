"""Training and evaluation text must not overlap; this finds out.

Two documents are the same when their text or their token ids are. A near copy shows as a share of 13-token
sequences (the length GPT-3's authors used to look for contamination) that also stand in training text.
Sequences that many training documents have in common (a system prompt, a licence header) say nothing about
copying and are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mambify.data.documents import Document
from mambify.errors import DataOverlapError

NGRAM = 13
_MIN_NGRAMS = 8  # with fewer distinct ones a document is too short to tell a copy from chance
_COMMON_DOCUMENTS = 5  # a sequence in more documents than this, and than the share below, is boilerplate
_COMMON_SHARE = 0.01
_CHUNK_TOKENS = 1_000_000
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Overlap:
    """What the check found below its threshold.

    ``max_share`` is the largest share of an evaluation document's 13-grams that stand in training text,
    ``mean_share`` the average over the documents that were long enough to judge.
    """

    train_documents: int
    eval_documents: int
    mean_share: float
    max_share: float


def check_disjoint(train_docs: Sequence[Document], eval_docs: Sequence[Document], *, threshold: float = 0.8) -> Overlap:
    """Checks that no evaluation document stands, whole or nearly so, in the training text.

    Raises:
        DataOverlapError: some do; names how many, the kind of overlap, and the beginning of one.
    """
    known = {document.id for document in train_docs} | {_ids_hash(document) for document in train_docs}
    same = [doc for doc in eval_docs if doc.id in known or _ids_hash(doc) in known]
    if same:
        raise DataOverlapError(
            f"{len(same)} of {len(eval_docs)} evaluation documents are also training documents, "
            f"such as {_example(same[0])}"
        )
    shares = _shared_ngrams(train_docs, eval_docs)
    judged = shares[~np.isnan(shares)]
    copies = np.flatnonzero(shares > threshold)  # NaN compares false
    if len(copies):
        worst = int(copies[np.argmax(shares[copies])])
        raise DataOverlapError(
            f"{len(copies)} of {len(eval_docs)} evaluation documents have more than {threshold:.0%} of their "
            f"{NGRAM}-token sequences in the training text, such as {_example(eval_docs[worst])} "
            f"with {shares[worst]:.0%}"
        )
    return Overlap(
        train_documents=len(train_docs),
        eval_documents=len(eval_docs),
        mean_share=float(judged.mean()) if len(judged) else 0.0,
        max_share=float(judged.max()) if len(judged) else 0.0,
    )


def _shared_ngrams(train: Sequence[Document], evaluation: Sequence[Document]) -> npt.NDArray[np.float64]:
    """The share of each evaluation document's telling n-grams that training text has; NaN if too few."""
    grams, owners = _ngrams(evaluation)
    unique, inverse = np.unique(grams, return_inverse=True)
    seen_in = np.zeros(len(unique), dtype=np.int64)  # training documents that have the n-gram
    if len(unique):
        for chunk in _chunks(train):
            found, holders = _ngrams(chunk)
            at = np.searchsorted(unique, found).clip(max=len(unique) - 1)
            hit = unique[at] == found
            pairs = np.unique(holders[hit].astype(np.int64) * len(unique) + at[hit])
            seen_in += np.bincount(pairs % len(unique), minlength=len(unique))
    common = seen_in > max(_COMMON_DOCUMENTS, _COMMON_SHARE * len(train))
    # One row for every distinct (document, n-gram): a phrase repeated within a document counts once.
    pairs = np.unique(owners.astype(np.int64) * max(1, len(unique)) + inverse)
    owner, gram = np.divmod(pairs, max(1, len(unique)))
    telling = ~common[gram] if len(unique) else np.zeros(0, dtype=bool)
    total = np.bincount(owner[telling], minlength=len(evaluation)).astype(np.float64)
    shared = np.bincount(owner[telling & (seen_in[gram] > 0)], minlength=len(evaluation))
    shares = np.full(len(evaluation), np.nan)
    np.divide(shared, total, out=shares, where=total >= _MIN_NGRAMS)
    return shares


def _ngrams(documents: Sequence[Document]) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """Hashes of all n-grams that lie within one document, and the number of that document."""
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    if lengths.sum() < NGRAM:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    ids = np.concatenate([document.input_ids for document in documents]).astype(np.uint64)
    # A polynomial in an odd multiplier modulo 2^64, the bits mixed at each step.
    hashes = np.zeros(len(ids) - NGRAM + 1, dtype=np.uint64)
    for offset in range(NGRAM):
        hashes = (hashes ^ (hashes >> np.uint64(29))) * _MULTIPLIER + ids[offset : len(ids) - NGRAM + 1 + offset]
    owner = np.repeat(np.arange(len(documents)), lengths)
    inside = owner[: len(hashes)] == owner[NGRAM - 1 :]
    return hashes[inside], owner[: len(hashes)][inside]


def _chunks(documents: Sequence[Document]) -> list[Sequence[Document]]:
    chunks: list[Sequence[Document]] = []
    first = size = 0
    for index, document in enumerate(documents):
        size += len(document)
        if size >= _CHUNK_TOKENS:
            chunks.append(documents[first : index + 1])
            first, size = index + 1, 0
    return [*chunks, documents[first:]]


def _ids_hash(document: Document) -> str:
    return hashlib.sha256(document.input_ids.tobytes()).hexdigest()


def _example(document: Document) -> str:
    text = " ".join(document.text.split())
    return f"{document.id[:8]} ({text[:60]!r}{'…' if len(text) > 60 else ''})"
