"""Models of Hugging Face folders: a run starts from one, and is written as one."""
