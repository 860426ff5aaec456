"""OpenAI's unchanged client talks to the running services."""

import concurrent.futures

import httpx
import openai

SUM = [{"role": "user", "content": "What is 1234 * 5678?"}]


def test_a_chat_answers_with_a_python_call(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=SUM, temperature=0)
    message = answer.choices[0].message
    assert "7006652" in (message.content or "")
    call, result = message.nanochat["tool_events"]
    assert (call["type"], call["code"]) == ("call", "1234 * 5678")
    assert (result["type"], result["status"], result["output"]) == ("result", "ok", "7006652")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same_as_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=SUM, temperature=0).choices[0].message.content
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=SUM, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert not chunks[-1].choices


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]


def test_a_conversation_goes_on_with_its_tool_calls(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="demo", messages=SUM, temperature=0).choices[0].message
    messages = [*SUM, first.model_dump(), {"role": "user", "content": "Who keeps the lighthouse?"}]
    second = client.chat.completions.create(model="demo", messages=messages, temperature=0)
    assert "Mara" in (second.choices[0].message.content or "")


def test_clients_at_once_get_the_tokens_that_each_gets_alone(client: openai.OpenAI) -> None:
    questions = [
        "What is 1234 * 5678?",
        "Who keeps the lighthouse?",
        "How many r are in strawberry?",
        "Hello! Who are you?",
        "What is 87 - 2345?",
        "Who is the mayor of Paris?",
    ]

    def ask(question: str) -> list[tuple[str, float]]:
        answer = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": question}], temperature=0, logprobs=True
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        return [(token.token, token.logprob) for token in logprobs.content or []]

    alone = [ask(question) for question in questions]
    with concurrent.futures.ThreadPoolExecutor(len(questions)) as clients:
        for _ in range(3):
            assert list(clients.map(ask, questions)) == alone


def test_a_seeded_sample_repeats(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Hello!"}], temperature=1.5, seed=seed
        )
        return answer.choices[0].message.content

    assert [ask(seed) for seed in range(5)] == [ask(seed) for seed in range(5)]


def test_every_service_exports_metrics(url: str, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="demo", messages=SUM, temperature=0)
    metrics = httpx.get(f"{url}/metrics", timeout=60).text
    assert "nanochat_gateway_requests_total" in metrics
    assert "nanochat_gateway_time_to_first_token_seconds_bucket" in metrics
