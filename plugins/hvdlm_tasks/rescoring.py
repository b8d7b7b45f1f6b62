"""Chooses among what may have been said by what a language model finds likely.

Of a text y and a sound x, log p(y | x) + weight log p(y) + bonus words(y) (Hannun et al. 2014, "Deep Speech: Scaling up
end-to-end speech recognition", section 2.2), over the n best that the sound alone allows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvdlm.protocols.task import Scorer


def likeliest(
    rows: Sequence[Sequence[tuple[float, str]]], scorer: Scorer | None, weight: float, bonus: float
) -> list[str]:
    """Return the best text of each row, of its (log-probability under the sound, text), one at least, the best first.

    All texts of all rows are scored together. ``scorer`` None: by the sound and the bonus alone.
    """
    texts = list(dict.fromkeys(text for row in rows for _, text in row))
    spoken = scorer.logs(texts) if scorer else np.zeros(len(texts))
    worth = {text: weight * log + bonus * len(text.split()) for text, log in zip(texts, spoken.tolist(), strict=True)}
    return [max(row, key=lambda found: found[0] + worth[found[1]])[1] for row in rows]
