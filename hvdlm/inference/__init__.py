"""Inference: text from a trained model, and scores of given texts."""
