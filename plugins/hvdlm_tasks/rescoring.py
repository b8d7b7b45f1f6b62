"""Rescores candidate transcripts with a language model.

Of a text y and a sound x, log p(y | x) + weight log p(y) + bonus words(y) (Hannun et al. 2014, "Deep Speech: Scaling up
end-to-end speech recognition", section 2.2), over the n best transcripts of the acoustic model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvdlm_language.scorer import Scorer


def rescore(
    rows: Sequence[Sequence[tuple[float, str]]], scorer: Scorer | None, weight: float, bonus: float
) -> list[str]:
    """Return the best text of each row.

    Args:
        rows: of each row (log-probability given the sound, text), at least one, the best first.
        scorer: scores all texts of all rows at once; None: only the acoustic model and the bonus count.
        weight: of the language model's log-probability.
        bonus: nats per word.
    """
    texts = list(dict.fromkeys(text for row in rows for _, text in row))
    logs = scorer.logs(texts) if scorer else np.zeros(len(texts))
    added = {text: weight * log + bonus * len(text.split()) for text, log in zip(texts, logs.tolist(), strict=True)}
    return [max(row, key=lambda candidate: candidate[0] + added[candidate[1]])[1] for row in rows]
