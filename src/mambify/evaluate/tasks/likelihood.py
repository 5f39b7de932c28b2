"""Log likelihoods of continuations after contexts; a context that several continuations share is read once.

The four choices of a question differ in a few tokens behind the same prompt. The prompts of a batch go through the
model together, padded on the left; then its cache is handed to every continuation. Logits are kept only where a token
is scored, and turned into probabilities in float32.

Letters: B contexts, R continuations, T tokens of a context, C of a continuation, V vocabulary, S scored positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mambify.errors import UsageError
from mambify.evaluate.scoring import IGNORED, Batch, Scorer
from mambify.evaluate.tasks.batching import batches, halving

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_TOKENS = 256


class Continuation(NamedTuple):
    """Token ids to be scored, and the ones they follow; neither is empty."""

    context: tuple[int, ...]
    ids: tuple[int, ...]


class Likelihood(NamedTuple):
    """Natural logarithm of a continuation's probability, and whether every token of it was the likeliest one."""

    log_likelihood: float
    is_greedy: bool


class LikelihoodScorer:
    """Scores continuations with one model.

    Args:
        model: A causal language model, evaluated in its own dtype and on its own device.
        max_length: Tokens it may read at once; what is longer loses the beginning of its context.
        batch_size: Continuations in a forward pass; ``None`` goes by their length and the device.
    """

    def __init__(self, model: PreTrainedModel, *, max_length: int, batch_size: int | None = None) -> None:
        self.model = model
        self.max_length = max_length
        self.batch_size = batch_size
        self.continues_from_cache = _continues_from_cache(model)
        self._scorer = Scorer(model)

    @torch.inference_mode()
    def __call__(
        self, continuations: Sequence[Continuation], progress: Callable[[int, int], None] | None = None
    ) -> list[Likelihood]:
        """One result each, in order; ``progress`` is called with (done, all).

        Raises:
            UsageError: a continuation longer than the model can read.
            MambifyError: logits that are not numbers.
        """
        rows = [self._fitted(continuation) for continuation in continuations]
        # The same contexts side by side; the longest continuations first, whose padding costs most where contexts are
        # read once: what is too much for the memory shows at once.
        longest: dict[tuple[int, ...], int] = {}
        for row in rows:
            longest[row.context] = max(longest.get(row.context, 0), len(row.ids))
        order = sorted(
            range(len(rows)),
            key=lambda i: (-longest[rows[i].context], -len(rows[i].context), rows[i].context, -len(rows[i].ids)),
        )
        results: dict[int, Likelihood] = {}
        for batch in batches(
            order,
            lambda i: len(rows[i].context) + len(rows[i].ids),
            batch_size=self.batch_size,
            device=self.model.device,
        ):
            scored = halving(lambda indices: self._score([rows[i] for i in indices]), batch)
            results.update(zip(batch, scored, strict=True))
            if progress is not None:
                progress(len(results), len(rows))
        return [results[index] for index in range(len(rows))]

    def _fitted(self, row: Continuation) -> Continuation:
        if len(row.ids) > self.max_length:
            raise UsageError(f"a continuation of {len(row.ids)} tokens: the model reads at most {self.max_length}")
        # The last token is only predicted, never read.
        return Continuation(row.context[-(self.max_length + 1 - len(row.ids)) :], row.ids)

    def _score(self, rows: Sequence[Continuation]) -> list[Likelihood]:
        shares = len({row.context for row in rows}) < len(rows)
        score = self._sharing if shares and self.continues_from_cache else self._whole
        log_likelihood_R, is_greedy_R = score(rows)
        return [
            Likelihood(value, greedy)
            for value, greedy in zip(log_likelihood_R.tolist(), is_greedy_R.tolist(), strict=True)
        ]

    def _whole(self, rows: Sequence[Continuation]) -> tuple[Tensor, Tensor]:
        """Every row for itself: context and continuation in one pass, without a cache."""
        ids_RT = _padded([(*row.context, *row.ids)[:-1] for row in rows], 0)
        next_RT = _padded([(*[IGNORED] * (len(row.context) - 1), *row.ids) for row in rows], IGNORED)
        batch = Batch(
            indices=list(range(len(rows))),
            ids_BT=ids_RT,
            mask_BT=None,  # what stands to the right of a token cannot change it
            positions_BT=None,
            counted_BT=next_RT != IGNORED,
            next_BT=next_RT,
        )
        sums = _Sums(len(rows))
        row_S, next_S = batch.counted_BT.nonzero()[:, 0], next_RT[batch.counted_BT]
        first = 0
        for logits_SV in self._scorer.logits(batch, _CHUNK_TOKENS):
            part = slice(first, first + len(logits_SV))
            sums.add(logits_SV, row_S[part], next_S[part])
            first = part.stop
        return sums.log_likelihood_R, sums.is_greedy_R

    def _sharing(self, rows: Sequence[Continuation]) -> tuple[Tensor, Tensor]:
        """Each context once, then all continuations from its cache."""
        contexts = list(dict.fromkeys(row.context for row in rows))
        number = {context: index for index, context in enumerate(contexts)}
        context_R = torch.tensor([number[row.context] for row in rows])
        device = self.model.device
        ids_BT = _padded(contexts, 0, side="left")
        mask_BT = _padded([[1] * len(context) for context in contexts], 0, side="left")
        output = self.model(
            input_ids=ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0).to(device),
            use_cache=True,
            logits_to_keep=1,
        )
        sums = _Sums(len(rows))
        row_R = torch.arange(len(rows))
        sums.add(output.logits[:, -1][context_R.to(device)], row_R, torch.tensor([row.ids[0] for row in rows]))

        longer_R = torch.tensor([len(row.ids) > 1 for row in rows])
        if bool(longer_R.any()):
            rest = [row.ids for row in rows if len(row.ids) > 1]
            ids_RC = _padded([ids[:-1] for ids in rest], 0)
            next_RC = _padded([ids[1:] for ids in rest], IGNORED)
            counted_RC = next_RC != IGNORED
            seen_RT = mask_BT[context_R[longer_R]]
            cache = output.past_key_values
            cache.reorder_cache(context_R[longer_R].to(device))
            logits_RCV = self.model(
                input_ids=ids_RC.to(device),
                attention_mask=torch.cat([seen_RT, counted_RC.long()], dim=1).to(device),
                position_ids=(seen_RT.sum(-1, keepdim=True) + torch.arange(ids_RC.shape[1])).to(device),
                past_key_values=cache,
                use_cache=True,
            ).logits
            row_S = row_R[longer_R][counted_RC.nonzero()[:, 0]]
            sums.add(logits_RCV[counted_RC.to(device)], row_S, next_RC[counted_RC])
        return sums.log_likelihood_R, sums.is_greedy_R


class _Sums:
    """Log likelihoods added up over the tokens of each of R rows, on the CPU in float64."""

    def __init__(self, num_rows: int) -> None:
        self.log_likelihood_R = torch.zeros(num_rows, dtype=torch.float64)
        self.is_greedy_R = torch.ones(num_rows, dtype=torch.bool)

    def add(self, logits_SV: Tensor, row_S: Tensor, next_S: Tensor) -> None:
        """Takes in the logits that predict the tokens ``next_S`` of the rows ``row_S``."""
        for logits_CV, row_C, next_C in zip(
            logits_SV.split(_CHUNK_TOKENS), row_S.split(_CHUNK_TOKENS), next_S.split(_CHUNK_TOKENS), strict=True
        ):
            logp_CV = logits_CV.float().log_softmax(-1)
            next_C1 = next_C.to(logp_CV.device)[:, None]
            self.log_likelihood_R.index_add_(0, row_C, logp_CV.gather(1, next_C1)[:, 0].double().cpu())
            missed_C = (logp_CV.argmax(-1) != next_C1[:, 0]).cpu()
            self.is_greedy_R[row_C[missed_C]] = False


@torch.inference_mode()
def _continues_from_cache(model: PreTrainedModel) -> bool:
    """Whether several tokens after a cache give what they give in one piece, found by trying it.

    Not all models can: a recurrent one may begin anew where more than one token follows. Those read every row whole.
    """
    known = inspect.signature(model.forward).parameters
    if not {"position_ids", "past_key_values", "attention_mask", "logits_to_keep"} <= set(known):
        return False
    ids_1T = torch.arange(1, 11, device=model.device)[None] % model.config.vocab_size
    whole_1TV = model(input_ids=ids_1T, use_cache=False).logits[:, 5:].float()
    cache = model(input_ids=ids_1T[:, :5], use_cache=True).past_key_values
    if not hasattr(cache, "reorder_cache"):
        return False
    cache.reorder_cache(torch.zeros(1, dtype=torch.long, device=model.device))
    parts_1TV = model(input_ids=ids_1T[:, 5:], past_key_values=cache, use_cache=True).logits.float()
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    return bool((whole_1TV - parts_1TV).abs().max() <= tolerance * whole_1TV.abs().max())


def _padded(rows: Sequence[Sequence[int]], value: int, *, side: str = "right") -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
