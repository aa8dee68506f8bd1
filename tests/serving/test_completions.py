"""Answers are those of the model itself, in OpenAI's form."""

import concurrent.futures
import json

import httpx
import jax
import numpy as np
import pytest

from flexolmo_jax.model import load

PROMPT = "The theorem"


@pytest.fixture(scope="module")
def model(world):
    return load(world.merged)


def events_of(served, path="/v1/completions", **body):
    """The events of a stream, each parsed; the last one is [DONE]."""
    body = {"model": "ours", "temperature": 0, "stream": True, **body}
    with httpx.stream("POST", served.url + path, json=body, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_the_answer_is_what_generate_gives(served, model):
    answer = served.post(model="ours", prompt=PROMPT, max_tokens=12, temperature=0).json()
    [choice] = answer["choices"]
    assert choice["text"] == model.generate([PROMPT], 12)[0]
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    prompt = len(model.tokenizer.encode_prompt(PROMPT))
    assert answer["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12,
    }  # fmt: skip
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")


def test_a_seed_repeats_an_answer(served, model):
    options = {"temperature": 0.9, "top_p": 0.9, "seed": 3}
    first = served.choices(prompt=PROMPT, n=3, max_tokens=10, **options)
    assert first == served.choices(prompt=PROMPT, n=3, max_tokens=10, **options)
    expected = model.generate([PROMPT] * 3, 10, **options)
    assert [choice["text"] for choice in first] == expected and len(set(expected)) > 1
    assert [choice["index"] for choice in first] == [0, 1, 2]
    others = {served.text(prompt=PROMPT, temperature=1, max_tokens=10) for _ in range(3)}
    assert len(others) > 1  # without a seed, each time another


def test_several_prompts_as_texts_or_ids(served, model):
    prompts = [PROMPT, "def main("]
    expected = model.generate(prompts, 6)
    ids = [model.tokenizer.encode_prompt(prompt) for prompt in prompts]
    for given in (prompts, ids):
        found = served.choices(prompt=given, max_tokens=6)
        assert [choice["text"] for choice in found] == expected
    assert served.text(prompt=ids[1], max_tokens=6) == expected[1]


@pytest.mark.parametrize("prompt", [PROMPT, "naïve"])
def test_a_stream_adds_up_to_the_whole(served, prompt):
    body = {"prompt": prompt, "max_tokens": 20, "n": 2, "temperature": 1, "seed": 5}
    whole = served.choices(**body)
    events = events_of(served, **body, stream_options={"include_usage": True})
    assert [event["choices"] for event in events[-1:]] == [[]]
    assert events[-1]["usage"]["completion_tokens"] == 40
    assert all(event["usage"] is None for event in events[:-1])
    for index, choice in enumerate(whole):
        own = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == choice["finish_reason"]
    assert len({event["id"] for event in events}) == 1


def test_experts_are_chosen_by_the_body_or_by_the_models_name(served, model):
    expected = model.generate([PROMPT], 10, without=["math"])[0]
    assert served.text(prompt=PROMPT, max_tokens=10, experts={"without": ["math"]}) == expected
    assert served.text(prompt=PROMPT, max_tokens=10, model="ours:without-math") == expected
    only = model.generate([PROMPT], 10, only=["public", "math"])[0]
    assert served.text(prompt=PROMPT, max_tokens=10, model="ours:sums") == only
    assert served.text(prompt=PROMPT, max_tokens=10, experts={"only": ["public", "math"]}) == only
    both = served.text(
        prompt=PROMPT, max_tokens=10, model="ours:sums", experts={"without": ["math"]}
    )
    assert both == model.generate([PROMPT], 10, only=["public"])[0]
    listed = {entry["id"]: entry for entry in served.get("/v1/models").json()["data"]}
    assert list(listed) == ["ours", "ours:without-math", "ours:without-code", "ours:sums"]
    assert listed["ours"]["experts"] == ["public", "math", "code"]
    assert listed["ours:sums"]["parent"] == "ours"
    assert served.get("/v1/models/ours:sums").json() == listed["ours:sums"]


def test_stops_end_the_text_before_them(served):
    whole = served.text(prompt=PROMPT, max_tokens=30)
    stop = whole[8:11]
    [choice] = served.choices(prompt=PROMPT, max_tokens=30, stop=[stop, "never there"])
    assert choice["text"] == whole[: whole.find(stop)] and choice["finish_reason"] == "stop"
    texts = [
        e["choices"][0]["text"] for e in events_of(served, prompt=PROMPT, max_tokens=30, stop=stop)
    ]
    assert "".join(texts) == choice["text"]


def test_scores_are_those_of_the_model(served, model):
    [choice] = served.choices(prompt=PROMPT, max_tokens=5, logprobs=3, echo=True)
    scores = choice["logprobs"]
    ids = model.tokenizer.encode_prompt(PROMPT)
    ids += model.generate([ids], 5)[0]
    expected = np.asarray(jax.nn.log_softmax(model.logits([ids])[0]))
    own = [expected[at, token] for at, token in enumerate(ids[1:])]
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    np.testing.assert_allclose(scores["token_logprobs"][1:], own, atol=1e-4)
    for at, top in enumerate(scores["top_logprobs"][1:]):
        best = np.sort(expected[at])[::-1][:3]
        np.testing.assert_allclose(list(top.values())[:3], best, atol=1e-4)
        assert scores["tokens"][at + 1] in top and len(top) <= 4
    assert choice["text"].startswith(PROMPT)
    offsets = scores["text_offset"]
    assert offsets == sorted(offsets) and offsets[-1] <= len(choice["text"])
    [scored] = served.choices(prompt=PROMPT, max_tokens=0, logprobs=0, echo=True)
    count = len(scored["logprobs"]["tokens"])
    assert scored["text"] == PROMPT
    assert scored["logprobs"]["token_logprobs"] == scores["token_logprobs"][:count]


def test_biases_forbid_and_force_tokens(served, model):
    [token] = model.generate([PROMPT], 1)
    first = model.tokenizer.encode_prompt(PROMPT)
    [[greedy]] = model.generate([first], 1)
    forced = served.choices(prompt=PROMPT, max_tokens=3, logit_bias={"300": 100})
    assert forced[0]["text"] == model.tokenizer.decode([300] * 3)
    banned = served.text(prompt=PROMPT, max_tokens=1, logit_bias={str(greedy): -100})
    assert banned != token


def test_answers_say_which_experts_they_are_of(served):
    body = {"prompt": PROMPT, "max_tokens": 8}
    [choice] = served.choices(**body, expert_mass="token", experts={"without": ["code"]})
    assert set(choice["expert_mass"]) == {"public", "math"}
    assert abs(sum(choice["expert_mass"].values()) - 1) < 1e-3
    assert "".join(token["text"] for token in choice["token_mass"]) == choice["text"]
    assert all(abs(sum(x["mass"].values()) - 1) < 1e-3 for x in choice["token_mass"])
    events = events_of(served, **body, expert_mass="request")
    assert [e["choices"][0].get("expert_mass") is not None for e in events] == (
        [False] * (len(events) - 1) + [True]
    )
    assert not any("token_mass" in e["choices"][0] for e in events)
    assert "expert_mass" not in served.choices(**body)[0]


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)


def test_chat_needs_a_template(served, serving, world, model):
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": "ours", "messages": messages, "max_tokens": 6, "temperature": 0}
    answer = served.post("/v1/chat/completions", **body)
    assert answer.status_code == 400 and "--chat-template" in answer.json()["error"]["message"]
    with serving(world.merged, chat_template=TEMPLATE) as chatty:
        answer = chatty.post("/v1/chat/completions", **body, logprobs=True, top_logprobs=2).json()
        [choice] = answer["choices"]
        expected = model.generate(["user: Hi\nassistant:"], 6)[0]
        assert choice["message"] == {"role": "assistant", "content": expected}
        assert answer["object"] == "chat.completion"
        assert [len(x["top_logprobs"]) for x in choice["logprobs"]["content"]] == [2] * 6
        parts = events_of(chatty, "/v1/chat/completions", messages=messages, max_tokens=6)
        deltas = [part["choices"][0]["delta"] for part in parts]
        assert "".join(delta["content"] for delta in deltas) == expected
        assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        refused = chatty.post(
            "/v1/chat/completions", model="ours", messages=[{"role": "developer", "content": "x"}]
        )
        assert refused.status_code == 400 and "no developers" in refused.text


WRONG = [
    ({"model": "theirs"}, 404, "model"),
    ({"model": 5}, 400, "model"),
    ({"prompt": ""}, 200, None),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": [99999]}, 400, "prompt"),
    ({"prompt": "x " * 200}, 400, "prompt"),
    ({"prompt": "\ud800"}, 400, "prompt"),
    ({"max_tokens": "5"}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 1000}, 400, "max_tokens"),
    ({"temperature": -1}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"n": 0}, 400, "n"),
    ({"n": 100, "prompt": ["a", "b"]}, 400, "n"),
    ({"stop": ""}, 400, "stop"),
    ({"logprobs": 21}, 400, "logprobs"),
    ({"logit_bias": {"1": 101}}, 400, "logit_bias"),
    ({"logit_bias": {"a": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"512": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"0000000000009999999": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"0" * 5000 + "1": 1}}, 200, None),
    ({"logit_bias": {"1" * 5000: 1}}, 400, "logit_bias"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"best_of": 3}, 400, "best_of"),
    ({"presence_penalty": 1.0}, 400, "presence_penalty"),
    ({"experts": {}}, 400, "experts"),
    ({"experts": {"only": ["nobody"]}}, 400, "experts.only"),
    ({"experts": {"without": ["public", "math", "code"]}}, 400, "experts"),
    ({"expert_mass": "all"}, 400, "expert_mass"),
    ({"best": 1}, 400, "best"),
]


@pytest.mark.parametrize("body, status, param", WRONG, ids=[str(list(x[0])) for x in WRONG])
def test_what_is_wrong_is_named(served, body, status, param):
    whole = {"model": "ours", "prompt": PROMPT, "max_tokens": 4, **body}
    answer = httpx.post(served.url + "/v1/completions", content=json.dumps(whole), headers={
        "content-type": "application/json"}, timeout=60)  # fmt: skip
    assert answer.status_code == status, answer.text
    if status != 200:
        error = answer.json()["error"]
        assert error["param"] is not None and error["param"].startswith(param), error
        assert error["message"] and error["type"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_what_is_no_request_is_refused(served, content):
    headers = {"content-type": "application/json"}
    answer = httpx.post(served.url + "/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text


def test_other_paths_methods_and_sizes(served):
    assert served.get("/v2").status_code == 404
    assert served.get("/v1/completions").status_code == 405
    assert "error" in served.get("/v1/completions").json()
    page = served.get("/").headers
    assert (
        page["cache-control"] == "no-cache" and "frame-ancestors" in page["content-security-policy"]
    )
    assert served.get("/v1/models").headers["x-content-type-options"] == "nosniff"
    large = httpx.post(served.url + "/v1/completions", content=b" " * (2 << 20))
    assert large.status_code == 413
    chunks = httpx.post(
        served.url + "/v1/completions", content=(b" " * (1 << 19) for _ in range(6))
    )
    assert chunks.status_code == 413


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_others_are_answered_while_a_long_text_becomes_tokens(served, path):
    body = {"model": "ours", "prompt": "one and the other " * 50_000}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        long = pool.submit(served.post, path, **body)
        answered = 0
        while not long.done():
            answered += served.get("/health").status_code == 200
    assert answered > 5
    assert long.result().status_code == (200 if path == "/tokenize" else 400)
