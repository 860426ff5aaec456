"""`POST /v1/messages`: Anthropic's Messages API. It uses the same turns, engines and tools as chat completions."""
