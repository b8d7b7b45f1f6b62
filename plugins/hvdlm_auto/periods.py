"""After how many steps, and by how much, automatic communication notices a change."""

INTERVAL = 50  # steps between two comparisons of the ranks' figures: a change is noticed after twice as many
TURN = 6  # steps of a method's turn in a trial
UNTIMED = 2  # first steps of a turn, in which graphs are built
UNSTEADY = 2  # first steps of a process
CHANGED = 0.2  # share of a step by which the time of waiting for communication may move before the wire is measured
WIRE = 1.5  # factor on a collective's seconds from which on the wire has changed
RETRY = 1000  # steps after which the wire is measured again while a lossy method is in use: it may have become faster
GROWTH = 4.0  # factor on the least ratio of error feedback to gradient at which a method is given up
