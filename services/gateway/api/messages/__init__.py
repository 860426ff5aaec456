"""`POST /v1/messages`: Anthropic's Messages API on the same turns, engines and tools as chat completions."""
