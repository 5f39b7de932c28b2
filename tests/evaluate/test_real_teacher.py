"""The real teacher on real text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mambify.evaluate import compare, comparison_table

if TYPE_CHECKING:
    from mambify.families.load import LoadedModel


def test_smollm2_on_wikitext(smollm2: LoadedModel, shared_data: Path) -> None:
    text = shared_data / "lm_text" / "wikitext2_test.txt"
    result = compare(
        smollm2.model,
        smollm2.model,
        {"WikiText-2": text},
        tokenizer=smollm2.tokenizer,
        teacher_tokenizer=smollm2.tokenizer,
        max_tokens=4096,
    )
    figures = result["sources"]["WikiText-2"]
    assert figures["num_tokens"] == 8 * 511
    # 25.8 over the whole test set; its beginning is a little harder.
    low, high = figures["student"]["perplexity_interval"]
    assert low < figures["student"]["perplexity"] < high
    assert 20 < figures["student"]["perplexity"] < 40
    assert figures["student"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert figures["student"]["top1_agreement"] == 1.0
    assert comparison_table(result).row_count == 1
