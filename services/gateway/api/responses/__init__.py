"""`POST /v1/responses`: OpenAI's Responses API. It uses the same engines and tools as chat completions."""
