"""The interfaces between the core and its plugins, one per file. Read these before writing a plugin.

Arrays are passed as numpy arrays, so that neither side needs the other's framework; only groups, exchanges, compressors
and host tensors handle the active framework's own tensors. Shapes: ``rows`` counts sequences, ``time`` counts tokens in
a sequence. "All ranks call" marks methods that communicate: every rank has to call them, in the same order.
"""
