"""Language models: GPT, recurrent models and custom modules, independent of the framework, and the task that trains them."""
