"""`flexolmo trace`: which documents hold the words of a text."""

from flexolmo_jax.commands import trace_find, trace_serve
from flexolmo_jax.commands.parser import Commands


def add_to(commands: Commands) -> None:
    actions = commands.group("trace", "find the words of a text in owners' documents", dest="trace")
    trace_find.add_to(actions)
    trace_serve.add_to(actions)
