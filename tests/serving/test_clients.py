"""Clients that exist, unchanged: openai, litellm, and lm-evaluation-harness."""

import math
import os

import openai
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from flexolmo_jax.model import load

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it looks for a list of prices elsewhere
import litellm  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*ReadOnly:UserWarning")  # of litellm's own types
PROMPT = "The theorem"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def model(world):
    return load(world.merged)


@pytest.fixture(scope="module")
def chatty(serving, world):
    with serving(world.merged, chat_template=TEMPLATE) as server:
        yield server


def test_openai(chatty, model):
    client = openai.OpenAI(base_url=f"{chatty.url}/v1", api_key="none")
    assert [entry.id for entry in client.models.list()][0] == "ours"
    assert client.models.retrieve("ours").id == "ours"
    options = {"model": "ours", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    expected = model.generate([PROMPT], 8)[0]
    assert client.completions.create(**options).choices[0].text == expected
    stream = client.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected
    masked = client.completions.create(**options, extra_body={"experts": {"without": ["math"]}})
    assert masked.choices[0].text == model.generate([PROMPT], 8, without=["math"])[0]
    messages = [{"role": "user", "content": "Hi"}]
    chat = {"model": "ours", "messages": messages, "max_tokens": 8, "temperature": 0}
    expected = model.generate(["user: Hi\nassistant:"], 8)[0]
    answer = client.chat.completions.create(**chat, logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == expected
    assert len(answer.choices[0].logprobs.content) == 8
    stream = client.chat.completions.create(
        **chat, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-1].usage.completion_tokens == 8
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(**{**options, "max_tokens": 1000})
    assert wrong.value.param == "max_tokens" and "at most" in str(wrong.value)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**{**options, "model": "theirs"})


def test_litellm(chatty, model):
    where = {"api_base": f"{chatty.url}/v1", "api_key": "none"}
    text = litellm.text_completion(
        model="text-completion-openai/ours:without-math", prompt=PROMPT, max_tokens=8,
        temperature=0, **where,
    )  # fmt: skip
    assert text.choices[0].text == model.generate([PROMPT], 8, without=["math"])[0]
    messages = [{"role": "user", "content": "Hi"}]
    chat = {"model": "openai/ours", "messages": messages, "max_tokens": 8, "temperature": 0}
    expected = model.generate(["user: Hi\nassistant:"], 8)[0]
    assert litellm.completion(**chat, **where).choices[0].message.content == expected
    chunks = litellm.completion(**chat, **where, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_lm_evaluation_harness(chatty, model):
    """Its scores are those of the model itself."""
    client = LocalCompletionsAPI(
        base_url=f"{chatty.url}/v1/completions", model="ours:without-math", max_length=64,
        batch_size=2,
    )  # fmt: skip
    pairs = [("The theorem", " says that"), ("def main", "(self):"), ("Once upon", " a time")]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    tokenizer = model.tokenizer
    for (context, continuation), (found, is_greedy) in zip(
        pairs, client.loglikelihood(requests), strict=True
    ):
        ids = tokenizer.encode_as_transformers(context + continuation, False)
        start = len(tokenizer.encode_as_transformers(context, False))
        logits = model.logits([ids], without=["math"])[0]
        scores = [
            float(logits[at - 1, ids[at]]) - math.log(float(sum(map(math.exp, logits[at - 1]))))
            for at in range(start, len(ids))
        ]
        assert abs(found - sum(scores)) < 1e-3
        best = [int(logits[at - 1].argmax()) for at in range(start, len(ids))]
        assert is_greedy == (best == ids[start:])
    until = Instance("generate_until", {}, ("The theorem", {"until": ["\n"], "max_gen_toks": 8}), 0)
    [text] = client.generate_until([until])
    assert isinstance(text, str) and "\n" not in text
