"""What is checked with a framework on real ranks; each check adds sentences to a list of faults."""
