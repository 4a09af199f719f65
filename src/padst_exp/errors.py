"""The one exception that means: the user asked for something that cannot be done."""

import importlib.util


class UserError(ValueError):
    """A mistake in the configuration or its data, told in one line.

    The message names the key, its value, and what would be right. Entry points print it without a
    traceback; everything else that reaches them is a bug of ours and keeps its traceback.
    """


def require(valid: bool, key: str, value: object, wanted: str) -> None:
    """Unless `valid`, raise a one-line `UserError` naming `key`, `value` and what is `wanted`."""
    if not valid:
        raise UserError(f"{key}: expected {wanted}, got {value}")


def require_installed(module: str, key: str, what: str, extra: str) -> None:
    """Raise a one-line `UserError` unless a library is there that an extra of ours brings.

    Args:
        module: as it is imported.
        key: that asks for it.
        what: it is called.
        extra: of this package.
    """
    if importlib.util.find_spec(module) is None:
        hint = f"pip install 'padst-exp[{extra}]'"
        raise UserError(f"{key}: {what} needs {module}, which is not installed: {hint}")


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a GPU, or a size is beyond all memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    signs = (
        "can't allocate memory",
        "Storage size calculation overflowed",
        "invalid shape dimension",
        "numel: integer multiplication overflow",
    )
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
