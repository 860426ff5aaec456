"""`POST /v1/responses`: OpenAI's Responses API on the same turns, engines and tools as chat completions."""
