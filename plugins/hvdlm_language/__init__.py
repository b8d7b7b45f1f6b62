"""Language models in both frameworks: GPT, recurrent models, custom modules, and the task that trains them."""
