"""The coordinator's side: asks all owners at once, and waits for none that is slow.

The coordinator holds no index. Each owner it asks reads the text that it asks about.
"""

import asyncio
import json
import ssl
from collections.abc import Sequence

import httpx

from flexolmo_jax.tracing.results import Trace
from flexolmo_jax.tracing.service.answers import MAX_BYTES, Said, parse_answer, together
from flexolmo_jax.tracing.service.owners import SECONDS, Address


class Refused(Exception):
    """An owner that did not answer; the text says why."""


async def ask(
    text: str,
    owners: Sequence[Address],
    *,
    prompt: str = "",
    seconds: float = SECONDS,
    said: dict[str, Said] | None = None,
) -> Trace:
    """Traces a text by asking owners, all at the same time.

    Args:
      text: what to trace.
      owners: whom to ask; one whose expert has no part in the text should not be among them.
      prompt: what the text answers; passages are ranked against both. No owner is told of it.
      seconds: that each owner may take; then it is missing.
      said: what owners said of this text before, by their names: they are not asked again. It gains
        what the others say now.

    Returns:
      what they say together; those that do not answer are `missing`, each with the reason.
    """
    said = {} if said is None else said
    new = [owner for owner in owners if owner.name not in said]
    results = await asyncio.gather(*(_ask_one(text, owner, seconds) for owner in new))
    missing = {}
    for owner, found in zip(new, results, strict=True):
        if isinstance(found, Said):
            said[owner.name] = found
        else:
            missing[owner.name] = found
    names = [owner.name for owner in owners]
    own = {name: said[name] for name in names if name in said}
    # In a thread: answers are as large as strangers make them.
    return await asyncio.to_thread(together, text, own, f"{prompt}\n{text}", names, missing)


async def _ask_one(text: str, owner: Address, seconds: float) -> Said | str:
    """What an owner says, or why it says nothing."""
    try:
        async with asyncio.timeout(seconds):
            body = await _post(text, owner)
    except TimeoutError:
        return f"no answer within {seconds:g} s"
    except Refused as refusal:
        return str(refusal)
    except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, OSError, UnicodeError) as error:
        return f"cannot be asked: {_clean(str(error) or type(error).__name__)}"
    try:
        return await asyncio.to_thread(parse_answer, body, text)
    except ValueError as error:
        return f"its answer cannot be understood: {_clean(str(error))}"


async def _post(text: str, owner: Address) -> bytes:
    headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
    if owner.key:
        headers["Authorization"] = f"Bearer {owner.key}"
    # Proxies and passwords of the environment would change whom it asks, and as whom. An address
    # without TLS is on this machine (`read_owners`), and redirections are not followed.
    client = httpx.AsyncClient(verify=owner.tls or False, timeout=None, trust_env=False)
    question = json.dumps({"text": text})  # in ASCII: a text may hold what UTF-8 cannot write
    async with (
        client,
        client.stream("POST", f"{owner.url}/v1/trace", content=question, headers=headers) as answer,
    ):
        body = bytearray()
        async for piece in answer.aiter_raw():
            body += piece
            if len(body) > MAX_BYTES:
                raise Refused(f"its answer has more than {MAX_BYTES} bytes")
    if answer.status_code == 401:
        raise Refused(f"it does not know {'this' if owner.key else 'us: it expects a'} key (401)")
    if answer.status_code != 200:
        raise Refused(f"refused ({answer.status_code}){_message(bytes(body))}")
    return bytes(body)


def _message(body: bytes) -> str:
    """Why an owner refuses, in its words; nothing where it gives none."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f": {_clean(message)}" if isinstance(message, str) and message else ""


def _clean(text: str) -> str:
    """A stranger's words as one line that is not long."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= 200 else f"{line[:200]} ..."
