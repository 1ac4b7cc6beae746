"""Closed-loop and open-loop evaluation: is the quantized policy still the same policy?

Importing this package imports neither torch nor a simulator nor matplotlib; each part
brings what it needs when it is used.
"""
