"""Learning: what the recorded turns are worth, and what is made of them. Only the worker and the commands import it."""
