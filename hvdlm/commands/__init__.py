"""The commands of ``python -m hvdlm``, one per file: its parser and its ``main(arguments) -> exit code``."""
