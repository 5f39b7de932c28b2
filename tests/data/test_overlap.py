from __future__ import annotations

import time

import numpy as np
import pytest

from mambify.data import Document, check_disjoint
from mambify.data.documents import document_id
from mambify.errors import DataOverlapError

RANDOM = np.random.default_rng(0)


def document(ids: np.ndarray | list[int], text: str | None = None) -> Document:
    ids = np.asarray(ids)
    text = " ".join(map(str, ids)) if text is None else text
    return Document(document_id(text), "text", text, ids)


def texts(count: int, length: int = 120) -> list[np.ndarray]:
    return [RANDOM.integers(0, 1000, length) for _ in range(count)]


def test_unrelated_text_is_disjoint() -> None:
    overlap = check_disjoint([document(t) for t in texts(50)], [document(t) for t in texts(10)])
    assert (overlap.train_documents, overlap.eval_documents) == (50, 10)
    assert overlap.mean_share == overlap.max_share == 0.0


@pytest.mark.parametrize("length", [3, 120])
def test_a_document_on_both_sides_is_caught_however_short(length: int) -> None:
    train, held = texts(50), texts(10, length)
    with pytest.raises(DataOverlapError, match=r"^1 of 10 evaluation documents are also training documents"):
        check_disjoint([document(t) for t in [*train, held[4]]], [document(t) for t in held])


def test_the_same_ids_under_another_text_or_the_same_text_in_other_ids_is_caught() -> None:
    one = texts(1)[0]
    with pytest.raises(DataOverlapError, match="also training"):
        check_disjoint([document(one, "one")], [document(one, "other")])
    with pytest.raises(DataOverlapError, match=r"such as .*'the text'"):
        check_disjoint([document([1, 2], "the text")], [document([3], "the text")])


def test_a_near_copy_is_caught_by_its_share() -> None:
    original, held = texts(20), texts(5)
    copy = original[7].copy()
    copy[60] = 1001  # one token in the middle spoils 13 of the 108 sequences
    evaluation = [document(t) for t in [*held, copy]]
    with pytest.raises(DataOverlapError, match=r"^1 of 6 evaluation documents .* with 88%"):
        check_disjoint([document(t) for t in original], evaluation)
    overlap = check_disjoint([document(t) for t in original], evaluation, threshold=0.9)
    assert overlap.max_share == pytest.approx(95 / 108)
    assert overlap.mean_share == pytest.approx(95 / 108 / 6)


def test_a_part_of_a_long_training_document_is_caught() -> None:
    book = RANDOM.integers(0, 1000, 5000)
    with pytest.raises(DataOverlapError, match="100%"):
        check_disjoint([document(book)], [document(book[2000:2100])])


def test_a_shared_opening_is_not_a_copy() -> None:
    system = RANDOM.integers(0, 1000, 90)
    train = [document(np.concatenate([system, t])) for t in texts(30, 40)]
    held = [document(np.concatenate([system, t])) for t in texts(10, 40)]
    assert check_disjoint(train, held).max_share == 0.0
    # Few documents cannot tell an opening from a copy.
    with pytest.raises(DataOverlapError):
        check_disjoint(train[:3], held, threshold=0.6)


def test_sequences_do_not_reach_across_documents() -> None:
    text = texts(1, 40)[0]
    pieces = [document(text[i : i + 10]) for i in range(0, 40, 10)]
    assert check_disjoint(pieces, [document(text)]).max_share == 0.0


def test_empty_sides_are_disjoint() -> None:
    assert check_disjoint([], [document(t) for t in texts(2)]).max_share == 0.0
    assert check_disjoint([document(t) for t in texts(2)], []).eval_documents == 0


def test_two_million_tokens_take_seconds() -> None:
    train = [Document(str(i), "text", "", ids) for i, ids in enumerate(RANDOM.integers(0, 50_000, (4000, 500)))]
    held = [Document(f"h{i}", "text", "", ids) for i, ids in enumerate(RANDOM.integers(0, 50_000, (80, 500)))]
    start = time.perf_counter()
    assert check_disjoint(train, held).max_share == 0.0
    assert time.perf_counter() - start < 10
