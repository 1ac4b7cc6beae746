"""`omega-qvla demo`: the whole road on the two bundled policies, with one command."""
