"""Client, server and network in one process, under one seed.

A seed decides everything: what is done, every delay and fault, where either side dies, all
randomness both sides are given, the order in which trio runs tasks. Time is trio's MockClock,
which jumps. docs/testing.md says what is simulated, what is not, and how to repeat a seed.
"""
