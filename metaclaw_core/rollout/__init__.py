"""Tasks from a folder, given to an agent behind the proxy one by one: traffic to learn from without a human at the keyboard.

Each task runs in a folder of its own and leaves one result file, so a run that was cut off is continued by running it again.
"""
