"""The command ``train``, with ``main(arguments) -> exit code``; the others are those of packages."""
