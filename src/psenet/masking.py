"""Keep passwords and tokens out of what is printed and kept."""

import os
import re
from urllib.parse import unquote, unquote_plus

_PASSWORD = re.compile(r"(:/{1,2}[^:/@\s]*):[^/@\s]*@")
"""With one slash where a URL was taken for a path."""
_TOKEN = re.compile(r"([?&][^=&\s]*(?:pass|pwd|token|secret|key|sig|auth)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE)


def without_passwords(text: str) -> str:
    """Return a text without the passwords and the tokens of the URLs in it.

    Example:
        >>> without_passwords("no such data: https://me:s3cret@host/x.tar?token=abc")
        'no such data: https://me:***@host/x.tar?token=***'
    """
    return _TOKEN.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text))


def without_password(storage: str | os.PathLike[str] | None) -> str:
    """Return a storage's path or URL for a message, without its password and the values of its options.

    Example:
        >>> without_password("postgresql://me:s3cret@host/db?token=abc&sslmode=require")
        'postgresql://me:***@host/db?token=***&sslmode=***'
    """
    address, mark, options = str(storage).partition("?") if "://" in str(storage) else (str(storage), "", "")
    # To the last @, as a password may hold some itself.
    address = re.sub(r"(://[^:/@]*):.*@", r"\1:***@", address)
    return address + mark + re.sub(r"=[^&]*", "=***", options)


def told_without(url: str, error: BaseException) -> str:
    """Return what an error says, without the secrets of a URL in any of the forms in which drivers repeat them."""
    missing = error.__cause__ or error.__context__
    if isinstance(missing, ModuleNotFoundError):
        return f"its driver, the package {missing.name!r}, is not installed"
    text = str(error).replace(url, without_password(url))
    return text if all(secret not in text for secret in _secrets(url)) else type(error).__name__


def _secrets(url: str) -> set[str]:
    """Return the password and the values of the options of a URL, as written and decoded."""
    address, _, options = url.partition("?")
    password = re.search(r"://[^:/@]*:(.*)@", address)
    found = {value for value in re.findall(r"=([^&]*)", options)} | ({password[1]} if password else set())
    return {form for one in found for form in (one, unquote(one), unquote_plus(one)) if form}
