"""What helps where a model does not fit, as options of the command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncload.errors import DoesNotFitError

if TYPE_CHECKING:
    from asyncload.plan import Suggestion

__all__ = ["explain"]


def explain(error: DoesNotFitError) -> str:
    """What is needed and available, and which options help."""
    helps: dict[str, str] = {}
    for suggestion in error.suggestions:  # the least comes first
        helps.setdefault(_option(suggestion), suggestion.outcome)
    parts = [f"{option} ({outcome})" for option, outcome in helps.items()]
    if not error.kv_exact:
        parts.append("--kv-bytes, as the cache is an upper bound")
    return f"{error.message}; what helps: {'; '.join(parts) or 'a larger device, or a smaller model'}"


def _option(suggestion: Suggestion) -> str:
    option = f"--{suggestion.option.replace('_', '-')}"
    if suggestion.option == "allow":  # one more mode; the command has one or all, of which the least is the same
        return "--mode auto"
    return f"no {option}" if suggestion.value is None else f"{option} {suggestion.value}"
