"""Chat templates: a conversation as the text that a model was trained on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from flexolmo_jax.serving.protocol import Message
from flexolmo_jax.web.errors import ApiError


def find_template(folder: Path) -> str | None:
    """The template of a Hugging Face directory: a file of its own, or a field of the tokenizer's.

    Raises:
      ValueError: its tokenizer_config.json is damaged.
    """
    own, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    if not config.is_file():
        return None
    try:
        template = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{config}: not a tokenizer's config ({error})") from error
    return template if isinstance(template, str) else None


def parse_template(text: str, where: str) -> jinja2.Template:
    """Raises ValueError if the text is no template; what it may do is sandboxed."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(text)
    except jinja2.TemplateError as error:
        raise ValueError(f"{where}: not a chat template ({error})") from error


def as_text(template: jinja2.Template, messages: Sequence[Message], separator: str) -> str:
    """The prompt of a conversation.

    Args:
      separator: the token that opens documents, which a template calls bos_token and eos_token.

    Raises:
      ApiError: 400, the template refuses the conversation.
    """
    told: list[dict[str, Any]] = []
    for message in messages:
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        named = {} if message.name is None else {"name": message.name}
        told.append({"role": message.role, "content": text, **named})
    names = {"bos_token": separator, "eos_token": separator}
    try:
        return template.render(messages=told, add_generation_prompt=True, **names)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ApiError(400, f"the model's chat template refuses it: {error}", "messages") from error


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
