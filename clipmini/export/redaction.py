"""What a config or a command may hold and a published page must not: passwords, keys and signed addresses."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

REDACTED = "REDACTED"
SECRET_WORDS = {
    *("apikey", "auth", "authorization", "cookie", "credential", "credentials", "key", "passphrase", "passwd"),
    *("password", "pwd", "secret", "secrets", "signature", "token"),
}
SECRET_NAMES = {"storage_options", "client_kwargs", "headers", "connection_string"}
PUBLIC_NAMES = {"caption_key", "image_key", "label_key"}  # members of samples and columns of tables


def redact(value: Any, name: str = "") -> Any:
    """Return plain data without the values of secret names, in any depth, and with its texts redacted."""
    if value is not None and is_secret(name):
        return REDACTED
    if isinstance(value, Mapping):
        return {key: redact(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    return redact_text(value) if isinstance(value, str) else value


def is_secret(name: str) -> bool:
    """Tell whether a name is one of a secret: `secret_access_key` and `accessKeyId` are, `hf_tokenizer_name` is not."""
    if name in PUBLIC_NAMES:
        return False
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return name in SECRET_NAMES or any(word.lower() in SECRET_WORDS for word in words)


def redact_text(text: str) -> str:
    """Return a text without the user, password and query of addresses, and without commands, which may hold anything.

    A `?` without a `=` behind it is a pattern, not a query.
    """
    text = re.sub(r"\bpipe:.*", f"pipe:{REDACTED}", text, flags=re.DOTALL)
    text = re.sub(r"(?<=://)[^/@\s]+@", f"{REDACTED}@", text)
    return re.sub(r"(://[^\s?]*\?)[^\s]*=[^\s]*", rf"\1{REDACTED}", text)


def redact_command(command: str) -> str:
    """Return a command line with the values of overrides of secret names redacted."""
    try:
        words = shlex.split(command)
    except ValueError:  # quotes that do not close: where a value ends is anyone's guess
        return redact_override(command)
    return shlex.join(map(redact_override, words))


def redact_override(word: str) -> str:
    """Return an override `a.b=value` redacted if any name in it, also inside braces, is a secret's."""
    key, equals, _ = word.partition("=")
    names = re.findall(r"\w+(?=\s*[=:](?!//))", word)
    if equals and any(map(is_secret, names)):
        return f"{key}={REDACTED}"
    return redact_text(word)
