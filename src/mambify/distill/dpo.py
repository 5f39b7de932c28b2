"""Stage ``dpo``: of two answers to a prompt, the one that people preferred becomes likelier (arXiv 2305.18290).

Legend: B pairs, T tokens, N positions of all rows, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mambify.distill.graphs import StepResult, Sums, ratios
from mambify.distill.losses import IGNORE, next_token_labels
from mambify.distill.towers import Towers
from mambify.distill.trainer import scale_gradients
from mambify.model import HybridForCausalLM
from mambify.ops.linear_kl import linear_kl
from mambify.ops.linear_logprob import linear_logprob


def dpo_loss(margin_B: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """−log σ(β · margin) of each pair, ``[B]``; smoothed, a pair counts with that share as preferred the other way.

    Args:
        margin_B: log π(chosen)/π_ref(chosen) − log π(rejected)/π_ref(rejected).
        beta: how far the student may go from the reference; the smaller, the further.
        label_smoothing: the share of pairs taken to be labelled wrongly (conservative DPO).
    """
    right_B, wrong_B = F.logsigmoid(beta * margin_B), F.logsigmoid(-beta * margin_B)
    return -(1 - label_smoothing) * right_B - label_smoothing * wrong_B


class PreferenceTuner(Towers):
    """The student beside its reference, over pairs of answers.

    A pair's loss is :func:`dpo_loss` + sft_weight · −log π of a token of the chosen answer + kl_weight · KL(reference ‖
    student) of a token. The KL is a sum over the pair's tokens divided by how many a pair of this data has on average:
    a step's loss is then a sum over pairs, however it is cut.
    """

    def __init__(
        self,
        student: HybridForCausalLM,
        reference: HybridForCausalLM,
        *,
        beta: float,
        label_smoothing: float = 0.0,
        sft_weight: float = 0.0,
        kl_weight: float = 0.0,
    ) -> None:
        super().__init__(student, reference)
        self.beta, self.label_smoothing = beta, label_smoothing
        self.weights = {"dpo": 1.0, "nll": sft_weight, "kl": kl_weight}

    def forward(self, input_ids: Tensor, labels: Tensor, lengths: Tensor, mean_tokens: Tensor) -> StepResult:
        """The loss summed over pairs, and its figures.

        Args:
            input_ids: ``[B, 2, T]``, the chosen row before the rejected one; padded on the right, which no token sees.
            labels: ``[B, 2, T]``; what is not the answer is ignored.
            lengths: ``[B, 2]``, tokens of each row without padding.
            mean_tokens: ``[B]``, all the same: tokens of a pair of this data, on average.
        """
        labels_N = next_token_labels(labels.flatten(0, 1))
        student_BTD, reference_BTE = self.hidden_states(input_ids.flatten(0, 1))
        assert reference_BTE is not None
        ours_ND, theirs_NE = student_BTD.flatten(0, 1), reference_BTE.flatten(0, 1)
        with torch.no_grad():
            reference_N = linear_logprob(theirs_NE, self.teacher_lm_head.weight, labels_N, ignore_index=IGNORE)
        student_N = linear_logprob(ours_ND, self.lm_head.weight, labels_N, ignore_index=IGNORE)
        logp_B2 = student_N.view(labels.shape).sum(-1)
        gain_B2 = logp_B2 - reference_N.view(labels.shape).sum(-1)
        margin_B = gain_B2[:, 0] - gain_B2[:, 1]
        answer_B2 = (labels_N != IGNORE).view(labels.shape).sum(-1).clamp(min=1)
        nll_B = -logp_B2[:, 0] / answer_B2[:, 0]
        parts = {
            "dpo": dpo_loss(margin_B, beta=self.beta, label_smoothing=self.label_smoothing).sum(),
            "nll": nll_B.sum(),
        }
        count = torch.ones_like(margin_B).sum()
        figures = {
            "dpo": parts["dpo"],
            "nll": parts["nll"],
            "rewards/accuracies": (margin_B > 0).float().sum(),
            "rewards/margins": self.beta * margin_B.sum(),
            "rewards/chosen": self.beta * gain_B2[:, 0].sum(),
            "rewards/rejected": self.beta * gain_B2[:, 1].sum(),
            "logps/chosen": logp_B2[:, 0].sum(),
            "logps/rejected": logp_B2[:, 1].sum(),
        }
        if self.weights["kl"]:
            parts["kl"] = self._kl(ours_ND, theirs_NE, input_ids, lengths) / mean_tokens[0]
            figures["kl"] = parts["kl"]
        loss = torch.stack([self.weights[name] * x for name, x in parts.items() if self.weights[name]]).sum()
        return StepResult(loss, {name: torch.stack([x, count]) for name, x in figures.items()})

    def _kl(self, ours_ND: Tensor, theirs_NE: Tensor, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """KL(reference ‖ student) of the next token, summed over the tokens of all rows."""
        index_T = torch.arange(input_ids.shape[-1], device=input_ids.device)
        real = input_ids.masked_fill(index_T >= lengths[..., None], IGNORE)
        return linear_kl(
            ours_ND,
            self.lm_head.weight,
            theirs_NE,
            self.teacher_lm_head.weight,
            next_token_labels(real.flatten(0, 1)),
            ignore_index=IGNORE,
        ).total

    def finish_gradients(self, sums: Sums) -> None:
        scale_gradients(self.parameters(), sums["dpo"][1].clamp(min=1).reciprocal())

    def loss(self, sums: Sums) -> Tensor:
        means = ratios(sums)
        return torch.stack([weight * means[name] for name, weight in self.weights.items() if weight]).sum()
