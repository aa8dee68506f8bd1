"""The bodies of requests: OpenAI's completions and chat completions, and our additions.

An unknown parameter, a wrong type and a value out of range are refused by name. What other engines
can do and this one cannot is accepted only with the value that asks for nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flexolmo_jax.inference.layerwise import MAX_BEST

MAX_CHOICES = 128  # of a request: prompts times `n`
MAX_TOKEN_LISTS = 1 << 20  # ids of a prompt, so that a list is not read for nothing

Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Ids = Annotated[list[Token], Field(min_length=1, max_length=MAX_TOKEN_LISTS)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
Lists = Annotated[list[Ids], Field(min_length=1, max_length=MAX_CHOICES)]
Stops = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Experts(Strict):
    """Which experts may answer: `only` these, or all `without` these."""

    only: list[str] | None = None
    without: list[str] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "Experts":
        if (self.only is None) == (self.without is None):
            raise ValueError('expected {"only": [names]} or {"without": [names]}')
        return self


class StreamOptions(Strict):
    include_usage: bool = False


class Common(Strict):
    """What both kinds of completions have in common."""

    model: str
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, lt=1 << 31)
    n: int | None = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stop: Annotated[str, Field(min_length=1)] | Stops | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    experts: Experts | None = None
    expert_mass: Literal["request", "token"] | None = None
    trace: bool | None = False

    # Clients send these as a matter of course; no other value is possible here.
    frequency_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = 0
    presence_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = 0
    store: Literal[False] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "Common":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        return self


class TraceOf(Strict):
    """The body of /v1/trace: the id of an answer that was given lately."""

    id: Annotated[str, Field(max_length=100)]


class Completion(Common):
    """The body of /v1/completions."""

    prompt: str | Ids | Texts | Lists
    max_tokens: int | None = Field(16, ge=0, lt=1 << 31)
    logprobs: int | None = Field(None, ge=0, le=MAX_BEST)
    echo: bool | None = False
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @property
    def scores(self) -> int | None:
        """How many of the likeliest tokens are scored beside each; None: nothing is scored."""
        return self.logprobs

    @model_validator(mode="after")
    def _best_of_asks_for_nothing(self) -> "Completion":
        if self.best_of not in (None, self.n or 1):
            raise ValueError(f"best_of: expected n, which is {self.n or 1}, found {self.best_of}")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class TextFormat(Strict):
    type: Literal["text"]


class Chat(Common):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_BEST)
    response_format: TextFormat | None = None

    @property
    def scores(self) -> int | None:
        """As of a completion."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "Chat":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true")
        return self
