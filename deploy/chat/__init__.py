"""``nanochat chat``: a conversation in the terminal with any server that offers the OpenAI API."""
