"""Hugging Face folders of GPT-2 and Llama: a run starts from one, and a checkpoint is written as one."""
