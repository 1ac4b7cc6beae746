"""Several recipes on several checkpoints, built, measured and played alike.

`omega-qvla compare --recipes` is the general use of it, `omega-qvla demo` a preset one.
"""
