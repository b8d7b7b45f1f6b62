"""Experiment trackers as event plugins: MLflow and Weights & Biases."""
