"""EleutherAI's lm-evaluation-harness (lm_eval) with the model of a run."""
