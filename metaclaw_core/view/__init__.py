"""Looking at what is recorded while it happens: in a terminal (`frame`) and on a loopback page (`site`, `server`).

Design: everything shown is read from the store and the skill library (`reading`), so the view needs no running proxy and
can't disturb one. It changes nothing but what any listing command does: it takes in what lies in the spools.
"""
