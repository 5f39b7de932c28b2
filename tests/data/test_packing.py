from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambify.data import Document, PackedDataset, pack
from mambify.errors import InvalidOptionError, UsageError

# Token 0 begins and ends a document here, so that documents meet in the same token; 1..9 are words.
document_ids = st.lists(st.integers(1, 9), min_size=0, max_size=14).flatmap(
    lambda words: st.sampled_from([[0, *words, 0], [0, *words], [*words, 3]])
)


def documents(rows: list[list[int]], loss_start: int = 1) -> list[Document]:
    return [Document(str(i), "text", "", np.array(row), loss_start) for i, row in enumerate(rows)]


def shuffled(rows: list[list[int]], seed: int) -> list[list[int]]:
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


@settings(max_examples=60, deadline=None)
@given(st.lists(document_ids, min_size=1, max_size=12), st.integers(2, 9), st.integers(0, 5), st.booleans())
def test_concat_is_the_stream_cut_into_blocks(
    rows: list[list[int]], length: int, seed: int, answers_only: bool
) -> None:
    stream: list[tuple[int, bool]] = []  # token, counted
    previous: int | None = None
    for row in shuffled(rows, seed):
        for index, token in enumerate(row):
            if not (index == 0 and token == previous):
                stream.append((token, not answers_only or index >= 2))
        previous = row[-1]
    if len(stream) < length:
        with pytest.raises(UsageError):
            pack(documents(rows, 2), length, seed=seed, answers_only=answers_only)
        return
    packed = pack(documents(rows, 2), length, seed=seed, answers_only=answers_only)
    assert len(packed) == len(stream) // length
    for block in range(len(packed)):
        expected = stream[block * length : (block + 1) * length]
        item = packed[block]
        assert set(item) == {"input_ids", "labels"}
        assert item["input_ids"].tolist() == [token for token, _ in expected]
        assert item["labels"].tolist() == [token if counted else -100 for token, counted in expected]
    assert packed.input_ids().tolist() == [packed[i]["input_ids"].tolist() for i in range(len(packed))]


@settings(max_examples=60, deadline=None)
@given(st.lists(document_ids, min_size=1, max_size=12), st.integers(2, 9), st.integers(0, 5), st.booleans())
def test_packed_documents_keep_their_boundaries(
    rows: list[list[int]], length: int, seed: int, answers_only: bool
) -> None:
    stream: list[tuple[int, int, bool]] = []  # token, index in its document, counted
    for row in shuffled(rows, seed):
        stream += [(token, index, not answers_only or index >= 2) for index, token in enumerate(row)]
    if len(stream) < length:
        return
    packed = pack(documents(rows, 2), length, seed=seed, mode="documents", answers_only=answers_only)
    assert len(packed) == len(stream) // length
    for block in range(len(packed)):
        positions: list[int] = []
        labels: list[int] = []
        for token, index, counted in stream[block * length : (block + 1) * length]:
            begins = index == 0 or not positions
            positions.append(0 if begins else positions[-1] + 1)
            labels.append(token if counted and not begins else -100)
        item = packed[block]
        assert item["position_ids"].tolist() == positions
        assert item["labels"].tolist() == labels
        assert (item["labels"][item["labels"] >= 0] == item["input_ids"][item["labels"] >= 0]).all()


def test_items_are_long_tensors_and_the_set_survives_pickling() -> None:
    packed = pack(documents([[0, 1, 2, 3, 0], [0, 4, 5, 0]]), 3, seed=0, mode="documents")
    again: PackedDataset = pickle.loads(pickle.dumps(packed))
    assert len(again) == len(packed) == 3
    assert (again.num_tokens, again.num_documents, again.context_length) == (9, 2, 3)
    for one, other in zip(packed, again, strict=True):
        assert {name: value.dtype for name, value in one.items()} == dict.fromkeys(one, torch.long)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(packed[-1]["input_ids"], packed[2]["input_ids"])
    with pytest.raises(IndexError):
        packed[3]


def test_the_seed_decides_the_order() -> None:
    rows = [[token] * 4 for token in range(1, 30)]
    one = pack(documents(rows), 4, seed=1).input_ids()
    assert torch.equal(one, pack(documents(rows), 4, seed=1).input_ids())
    other = pack(documents(rows), 4, seed=2).input_ids()
    assert not torch.equal(one, other)
    assert sorted(one.tolist()) == sorted(other.tolist())


def test_wrong_packing_is_refused() -> None:
    rows = documents([[0, 1, 2, 3, 4, 0]])
    with pytest.raises(InvalidOptionError, match="did you mean 'documents'"):
        pack(rows, 2, seed=0, mode="document")  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError, match="at least 2"):
        pack(rows, 1, seed=0)
    with pytest.raises(UsageError, match="6 tokens do not fill one block of 7"):
        pack(rows, 7, seed=0)
