"""From the chunks of an engine to the response that the client sees."""
