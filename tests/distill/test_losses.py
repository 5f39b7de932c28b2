"""What the stages make of the losses: masks and shifts. The loss through the heads has tests of its own, in ops."""

from __future__ import annotations

import torch

from mambify.distill.losses import IGNORE, next_token_labels
from mambify.ops.linear_kl import linear_kl


def test_the_loss_leaves_out_ignored_positions() -> None:
    student, head, teacher, teacher_head = (torch.randn(n, 8) for n in (5, 29, 5, 29))
    labels = torch.tensor([3, IGNORE, 0, 28, IGNORE])
    weights = {"kl_weight": 0.3, "ce_weight": 0.7, "temperature": 2.0}
    result = linear_kl(student, head, teacher, teacher_head, labels, ignore_index=IGNORE, **weights)
    kept = labels != IGNORE
    expected = linear_kl(student[kept], head, teacher[kept], teacher_head, labels[kept], **weights)
    assert result.num_positions == 3
    torch.testing.assert_close(result, expected)
    assert not result.total.isclose(linear_kl(student[kept], head, teacher[kept], teacher_head, labels[kept]).total)


def test_next_token_labels_shift_and_drop_the_last() -> None:
    labels = torch.tensor([[5, 6, 7], [8, IGNORE, 9]])
    assert next_token_labels(labels).tolist() == [6, 7, IGNORE, IGNORE, 9, IGNORE]
