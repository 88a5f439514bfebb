"""What the server of runs.py holds in memory when it forks: the program, and the parsed standard library."""

import train

train.library()
