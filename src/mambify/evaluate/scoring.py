"""Per-token figures of a model, and of a student beside its teacher; [B, T, V] is never held in float32.

The trunk runs on a whole batch; the head and everything over the vocabulary run on a few hundred tokens at a
time. Sums are kept per block in float64.

Letters: B blocks of a batch, T tokens, D hidden, V vocabulary, C tokens of a chunk, N all blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mambify.errors import MambifyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Block = Tensor | npt.NDArray[Any] | Sequence[int] | Mapping[str, Any]
IGNORED = -100
COLUMNS = ("tokens", "nll", "teacher_nll", "kl", "agreement")
_CHECK_TOKENS = 8


class Batch(NamedTuple):
    """Blocks padded on the right to one length.

    ``counted_BT`` marks the positions t whose next token is counted, ``next_BT`` holds that token; the last
    position of a block is never counted. The mask is None where nothing is masked.
    """

    indices: list[int]
    ids_BT: Tensor
    mask_BT: Tensor | None
    positions_BT: Tensor | None
    counted_BT: Tensor
    next_BT: Tensor


def make_batch(blocks: Sequence[Mapping[str, Tensor]], indices: list[int]) -> Batch:
    """Puts the blocks with these indices together; see :func:`as_block` for what they hold."""
    chosen = [blocks[index] for index in indices]
    ids_BT = _pad([block["input_ids"] for block in chosen], 0)
    labels_BT = _pad([block.get("labels", block["input_ids"]) for block in chosen], IGNORED)
    mask_BT = _pad([block.get("attention_mask", torch.ones_like(block["input_ids"])) for block in chosen], 0)
    # What stands to the right of a token cannot change it: the padding added here needs no mask, and without
    # one a model still reads from positions that restart where documents were packed.
    masked = any(not bool(block["attention_mask"].all()) for block in chosen if "attention_mask" in block)
    positions_BT = None
    if any("position_ids" in block for block in chosen):
        positions_BT = _pad([_positions(block) for block in chosen], 0)
    elif masked:
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    next_BT = torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    seen_BT = mask_BT.bool() & torch.nn.functional.pad(mask_BT[:, 1:], (0, 1)).bool()
    return Batch(
        indices=indices,
        ids_BT=ids_BT,
        mask_BT=mask_BT if masked else None,
        positions_BT=positions_BT,
        counted_BT=seen_BT & (next_BT != IGNORED),
        next_BT=next_BT,
    )


def as_block(block: Block) -> dict[str, Tensor]:
    """A block as one-dimensional int64 tensors: ``input_ids`` and, where given, ``labels`` and the like."""
    fields: Mapping[str, Any] = block if isinstance(block, Mapping) else {"input_ids": block}
    return {name: as_ids(value) for name, value in fields.items()}


def as_ids(values: Any) -> Tensor:
    """A tensor, array or sequence of integers as an int64 tensor on the CPU."""
    if isinstance(values, Tensor):
        return values.detach().to("cpu", torch.long)
    return torch.from_numpy(np.array(values, dtype=np.int64))  # a copy: what is given may be read-only


def score_batch(model: Scorer, teacher: Scorer | None, batch: Batch, *, chunk_tokens: int) -> npt.NDArray[np.float64]:
    """Sums over each block of the batch, ``[B, 5]`` in the order of :data:`COLUMNS`."""
    num_counted = int(batch.counted_BT.sum())
    row_C = batch.counted_BT.nonzero()[:, 0]
    next_C = batch.next_BT[batch.counted_BT]
    figures_C5 = torch.zeros(num_counted, len(COLUMNS), dtype=torch.float64)
    figures_C5[:, 0] = 1.0
    of_student = model.logits(batch, chunk_tokens)
    of_teacher = None if teacher is None else teacher.logits(batch, chunk_tokens)
    first = 0
    for logits_CV in of_student:
        logp_CV = logits_CV.float().log_softmax(-1)
        last = first + len(logp_CV)
        chunk, label_C1 = slice(first, last), next_C[first:last, None].to(logp_CV.device)
        figures_C5[chunk, 1] = -logp_CV.gather(1, label_C1)[:, 0].double().cpu()
        if of_teacher is not None:
            teacher_CV = next(of_teacher).to(logp_CV.device).float().log_softmax(-1)
            figures_C5[chunk, 2] = -teacher_CV.gather(1, label_C1)[:, 0].double().cpu()
            # KL(teacher‖student) = Σ p_T (log p_T - log p_S); a token the teacher rules out adds nothing.
            terms_CV = teacher_CV.exp() * (teacher_CV - logp_CV)
            kl_C = terms_CV.masked_fill(teacher_CV == -torch.inf, 0.0).sum(-1)
            figures_C5[chunk, 3] = kl_C.double().cpu()
            figures_C5[chunk, 4] = (teacher_CV.argmax(-1) == logp_CV.argmax(-1)).double().cpu()
        first = last
    sums_B5 = torch.zeros(len(batch.indices), len(COLUMNS), dtype=torch.float64)
    return sums_B5.index_add_(0, row_C, figures_C5).numpy()


class Scorer:
    """A model that gives the logits of the counted positions of a batch, a chunk at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.splits = _head_stands_apart(model)

    def logits(self, batch: Batch, chunk_tokens: int) -> Iterator[Tensor]:
        """Logits ``[C, V]`` of the counted positions in row order, C at most ``chunk_tokens``.

        Raises:
            MambifyError: they are not numbers.
        """
        for chunk_CV in self._split(batch, chunk_tokens) if self.splits else self._whole(batch, chunk_tokens):
            if bool(chunk_CV.isnan().any()):
                raise MambifyError("the model's logits are not numbers (NaN): its weights are damaged")
            yield chunk_CV

    def _split(self, batch: Batch, chunk_tokens: int) -> Iterator[Tensor]:
        arguments = self._arguments(batch)
        hidden_BTD = self.model.model(**arguments).last_hidden_state
        hidden_CD = hidden_BTD[batch.counted_BT.to(hidden_BTD.device)]
        for part_CD in hidden_CD.split(chunk_tokens):
            yield self.model.lm_head(part_CD)

    def _whole(self, batch: Batch, chunk_tokens: int) -> Iterator[Tensor]:
        # One row's logits at a time, [T, V]; chunks run across rows as they do with the head apart, so that
        # the two ways can stand side by side for student and teacher.
        waiting_CV: Tensor | None = None
        for row in range(len(batch.indices)):
            logits_TV = self.model(**self._arguments(batch, slice(row, row + 1))).logits[0]
            row_CV = logits_TV[batch.counted_BT[row].to(logits_TV.device)]
            waiting_CV = row_CV if waiting_CV is None else torch.cat([waiting_CV, row_CV])
            while len(waiting_CV) >= chunk_tokens:
                yield waiting_CV[:chunk_tokens]
                waiting_CV = waiting_CV[chunk_tokens:]
        if waiting_CV is not None and len(waiting_CV):
            yield waiting_CV

    def _arguments(self, batch: Batch, rows: slice = slice(None)) -> dict[str, Any]:
        given = {
            "input_ids": batch.ids_BT,
            "attention_mask": batch.mask_BT,
            "position_ids": batch.positions_BT,
        }
        device = self.model.device
        return {
            "use_cache": False,
            **{name: value[rows].to(device) for name, value in given.items() if value is not None},
        }


@torch.inference_mode()
def _head_stands_apart(model: PreTrainedModel) -> bool:
    """Whether the logits are ``lm_head(model.model(…))`` and nothing more, found by trying it.

    Some models scale or cap their logits after the head; for those the whole forward is used, row by row.
    """
    if not (hasattr(model, "model") and hasattr(model, "lm_head")):
        return False
    ids_1T = torch.arange(1, 1 + _CHECK_TOKENS, device=model.device)[None] % model.config.vocab_size
    whole_1TV = model(input_ids=ids_1T, use_cache=False).logits
    split_1TV = model.lm_head(model.model(input_ids=ids_1T, use_cache=False).last_hidden_state)
    if whole_1TV.shape != split_1TV.shape:
        return False
    scale = float(whole_1TV.abs().max())
    return bool((whole_1TV - split_1TV).abs().max() <= 1e-3 * scale)


def _positions(block: Mapping[str, Tensor]) -> Tensor:
    given = block.get("position_ids")
    return torch.arange(len(block["input_ids"])) if given is None else given


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
