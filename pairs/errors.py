"""The one error that users see: what was expected, what was found, what to do next.

The command line prints it without a traceback and exits with code 2. Anything else that is raised
is a bug of ours and shows its traceback.
"""


class PairmillError(ValueError):
    """A mistake or a failure that the user can mend.

    `expected` and `found` state the two sides with their values; `remedy` is the next step.
    """

    def __init__(self, *, expected: str, found: str, remedy: str) -> None:
        self.expected, self.found, self.remedy = expected, found, remedy
        super().__init__(f"expected {expected}\n   found {found}\n      do {remedy}")

    def __reduce__(self) -> tuple[object, ...]:  # exceptions with keyword arguments don't pickle by themselves
        return _rebuild, (self.expected, self.found, self.remedy)


def _rebuild(expected: str, found: str, remedy: str) -> PairmillError:
    return PairmillError(expected=expected, found=found, remedy=remedy)
