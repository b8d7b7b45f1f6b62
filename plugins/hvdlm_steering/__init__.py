"""Built-in plugins that steer a run, or show how it fares: early stopping, samples of text."""
