"""How agents' services find the proxy: files of other programs, and ours beside them.

Design: what a file should hold is a pure function of what it holds now (`units`, `openclaw_config`); what will be done
is a list of steps that is shown before it is carried out (`plan`); what was done is remembered (`records`), so that
`stop` and `uninstall` can name it. Undoing takes our own keys away by what the file holds then: nothing is ever
restored from a copy, so what others changed in between stays.
"""
