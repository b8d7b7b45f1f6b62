"""Corpora: reads texts from files of many formats, trains tokenizers, and writes token folders."""
