"""Checks that are made with a framework on real ranks; each adds sentences to a list of faults."""
