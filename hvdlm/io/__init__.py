"""Files, folders and the terminal: atomic writes, bounded reads of untrusted input, user folders."""
