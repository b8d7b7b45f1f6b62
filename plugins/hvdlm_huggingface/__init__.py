"""Hugging Face folders of language models: a run starts from one, and a checkpoint is written as one."""
