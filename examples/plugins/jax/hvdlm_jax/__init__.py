"""JAX as a framework of hvdlm: GPT and recurrent models, compiled by XLA, on CPUs."""
