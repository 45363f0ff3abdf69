"""Read the sizes of a model off the shapes of its state dict.

Each size is asked of several tensors and the majority answers, so one missing or misshapen tensor
does not hide what else is wrong with a file.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from maskgil_jax.convert.rules import ConversionError, Rule, StateDict, show_name

ConfigType = TypeVar("ConfigType")


def _show_pattern(pattern: str) -> str:
    return pattern.replace(r"\d+", "*").replace("\\", "")


class SizeReader:
    """Collect sizes from a state dict, and report at `finish` all that could not be found.

    Args:
        family: its name, for the error.
        state: torch key -> anything with a shape.
        rules: the family's table; keys that fit none of its patterns are reported too.
    """

    def __init__(self, family: str, state: StateDict, rules: tuple[Rule, ...]):
        self._family = family
        self._state = state
        self._rules = rules
        self._problems: list[str] = []

    def size(self, what: str, *tensors: tuple[str, int]) -> int:
        """Return the size that most tensors give; each is (key as a regular expression, axis)."""
        votes: Counter[int] = Counter()
        for pattern, axis in tensors:
            regex = re.compile(pattern)
            for key in self._state:
                shape = getattr(self._state[key], "shape", ())
                if regex.fullmatch(key) and axis < len(shape) and shape[axis] > 0:
                    votes[int(shape[axis])] += 1
        if not votes:
            keys = ", ".join(_show_pattern(pattern) for pattern, _ in tensors)
            self._problems.append(f"missing {keys}: the {what} cannot be inferred")
            return 1
        return votes.most_common(1)[0][0]

    def count(self, what: str, pattern: str, most: int) -> int:
        """Return 1 + the largest number that the pattern's group matches in any key.

        Numbers of `most` and beyond are left out, so that their keys are reported as unexpected: no
        key may name a size that its file does not bear out.
        """
        matches = (re.match(pattern, key) for key in self._state)
        numbers = {int(m.group(1)) for m in matches if m and len(m.group(1)) <= 4}
        numbers = {number for number in numbers if number < most}
        if not numbers:
            key = _show_pattern(pattern).replace("(*)", "0")
            self._problems.append(f"missing {key}*: the {what} cannot be inferred")
            return 1
        return 1 + max(numbers)

    def problem(self, text: str) -> None:
        """Add something that is wrong with the sizes themselves."""
        self._problems.append(text)

    def finish(self) -> None:
        """Raise `ConversionError` if any size could not be found."""
        if not self._problems:
            return
        fits = [rule.key_regex.fullmatch for rule in self._rules]
        strangers = [key for key in self._state if not any(fit(key) for fit in fits)]
        problems = self._problems + [f"unexpected {show_name(key)}" for key in strangers]
        raise ConversionError(f"not a {self._family} checkpoint:", problems)

    def build(self, config_type: Callable[..., ConfigType], **sizes: Any) -> ConfigType:
        """Return the config of these sizes.

        Raises:
            ConversionError: a size could not be found, or the sizes make no model.
        """
        self.finish()
        try:
            return config_type(**sizes)
        except ValueError as error:
            raise ConversionError(
                f"the sizes in the file make no {self._family}: {error}"
            ) from error
