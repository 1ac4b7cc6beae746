"""The command `omega-qvla`: one small module per verb, each imported when it is called."""
