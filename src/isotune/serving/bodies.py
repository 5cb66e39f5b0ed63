"""The bodies that the endpoints take, each key checked: a key that nobody knows, or that would do nothing, is refused.

The two of a language model are OpenAI's. What they can ask for and this server has not is refused by name; keys that
only say who asks are taken and passed over.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from isotune.serving.limits import BAD_REQUEST, Limits, Refused


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else [] if value is None else value


def _or_default(value: Any, info: ValidationInfo) -> Any:
    """Null is what clients send for what they leave open."""
    if value is not None or info.field_name is None:
        return value
    return Generation.model_fields[info.field_name].default


Open = BeforeValidator(_or_default)
Texts = Annotated[list[str], Field(min_length=1)]
B = TypeVar("B", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ToClassify(_Body):
    """Texts or pairs of them, in one of four forms."""

    text: str | None = None
    text_pair: str | None = None
    texts: Texts | None = None
    pairs: Annotated[list[Annotated[list[str], Field(min_length=2, max_length=2)]], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> "ToClassify":
        if sum(form is not None for form in (self.text, self.texts, self.pairs)) != 1:
            raise ValueError('say one of "text", "texts" and "pairs"')
        if self.text_pair is not None and self.text is None:
            raise ValueError('"text_pair" stands beside "text"')
        return self

    def columns(self) -> tuple[list[str], list[str] | None]:
        """The texts, and the second ones where they are pairs."""
        if self.pairs is not None:
            return [one for one, _ in self.pairs], [two for _, two in self.pairs]
        texts = self.texts if self.texts is not None else [str(self.text)]
        return texts, None if self.text_pair is None else [self.text_pair]


class OneText(_Body):
    """One text, or a pair, and the label that is asked about."""

    text: str
    text_pair: str | None = None
    label: str | None = None


class StreamOptions(_Body):
    """What a stream ends with."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(_Body):
    """Text is the only form of an answer."""

    type: Literal["text"]


class Generation(_Body):
    """How to go on from a prompt; the defaults are greedy, and null is the default."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2), Open] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1), Open] = 1.0
    seed: Annotated[int, Field(ge=0)] | None = None
    stop: Annotated[list[Annotated[str, Field(max_length=1_000)]], BeforeValidator(_listed), Field(max_length=4)] = []
    stream: Annotated[bool, Open] = False
    stream_options: StreamOptions | None = None
    # in the one form that changes nothing
    n: Annotated[Literal[1], Open] = 1
    presence_penalty: Annotated[Literal[0], Open] = 0
    frequency_penalty: Annotated[Literal[0], Open] = 0
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    # who asks, and how others would be charged for it
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def stop_words(self) -> tuple[str, ...]:
        """The stop words that have a character."""
        return tuple(word for word in self.stop if word)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Chat(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    modalities: list[Literal["text"]] | None = None


class Completion(Generation):
    """POST /v1/completions."""

    prompt: Annotated[Texts, BeforeValidator(_listed)]  # each is a choice of the answer
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None


def read_body(kind: type[B], content: Any) -> B:
    """The body of a request; Refused names the first key that is wrong, and what it takes."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("constrained", "list[")))
        if first["type"] == "extra_forbidden":
            raise Refused(BAD_REQUEST, "unknown_key", f"{place} is not a key of this request", place) from None
        what = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        raise Refused(BAD_REQUEST, "wrong_value", f"{place}: it {what}" if place else what, place or None) from None


def check_count(count: int, limits: Limits, field: str) -> None:
    """Refuse more texts or prompts in one request than the limits have."""
    if count > limits.texts:
        raise Refused(BAD_REQUEST, "too_many", f"{count} {field}: one request has at most {limits.texts}", field)
